"""The report: one file that needs nothing else, with every part of the run on it; references to hold a run against."""

import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from anytoken import recipes
from anytoken.training.config import (
    TrainConfig,
)
from anytoken.training.metrics import MetricsLog, read_metrics
from anytoken.training.report.html import FACTS, HtmlReport, find_reference
from anytoken.training.report.reference import BEGIN, END, publish_references, thin_metrics
from anytoken.training.report.samples import FOLDER
from anytoken.training.report.svg import LEFT, RIGHT, WIDTH, Line, board, heat_map, line_chart, thin
from anytoken.utils.errors import ConfigError

SVG = "{http://www.w3.org/2000/svg}"


def write_run(folder: Path, steps: int = 30) -> Path:
    """A run's folder with a log as training writes it."""
    log = MetricsLog(folder / "metrics.jsonl")
    for step in range(1, steps + 1):
        groups = {name: {"bits": 9.0 - step / 10, "loss": 1.0} for name in ("text", "image")}
        log.write(
            {
                "step": step,
                "loss": 6.0 - step / 10,
                "learning_rate": 1e-3,
                "groups": groups,
                "expert_load": {"image": [[0.75, 0.25], [0.5, 0.5]]},
                "tokens_per_second": 100.0 + step,
            }
        )
    log.write({"step": steps, "eval": {"groups": {"text": {"bits": 7.5}}}})
    return folder


def stage_of(folder: Path, **changes: Any) -> TrainConfig:
    data = [{"path": "a", "views": {"text->image": 1}}]
    return TrainConfig.from_dict(
        {"init_from": "mini", "output": str(folder), "steps": 40, "data": data, **changes}
    )


def test_a_page_holds_the_run_and_needs_nothing_else(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run & more")
    (folder / FACTS).write_text(json.dumps({"commit": "abc123", "data": [{"set": "things", "records": 7}]}))
    for step in range(10):
        path = folder / FOLDER / f"step-{step:08d}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            json.dumps([{"prompt": "a <fox>", "output": "image", "html": f"<img alt='at{step}'>"}])
        )
    HtmlReport(stage_of(folder, reference=str(write_run(tmp_path / "other") / "metrics.jsonl"))).update()
    text = (folder / "report.html").read_text()
    assert "Step 30 of 40" in text and "Median speed 116 tokens/s" in text
    assert (
        "run &amp; more" in text
        and "a &lt;fox&gt;" in text
        and "abc123" in text
        and "init_from: mini" in text
    )
    assert re.findall(r"alt='at(\d)'", text) == ["0", "2", "4", "7", "9"]
    assert "layer 0, expert 0: 75.0 %" in text and 'class="line reference"' in text and 'class="dot"' in text
    assert not re.findall(r"(?:src|href)=[\"'](?!data:)", text) and "<script" not in text
    assert set(re.findall(r"https?://[^\"' <]+", text)) == {"http://www.w3.org/2000/svg"}
    # On a phone of 390 px nothing is shrunk or cut off: one chart an image, and tables that scroll in themselves.
    assert 'name="viewport"' in text and "display:block;overflow-x:auto" in text
    assert {int(wide) for wide in re.findall(r'<svg[^>]* width="(\d+)"', text)} == {WIDTH} and WIDTH <= 358
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)


def test_a_page_is_written_before_anything_is_logged(tmp_path: Path) -> None:
    MetricsLog(tmp_path / "metrics.jsonl").write({"step": 0})
    HtmlReport(stage_of(tmp_path)).update()
    assert "No step has been logged yet" in (tmp_path / "report.html").read_text()


def test_a_page_that_is_slow_to_write_is_written_seldom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([100.0, 101.0, 101.0, 149.0, 152.0, 153.0, 153.0, 160.0, 160.0, 160.0]).__next__
    page, written = HtmlReport(stage_of(write_run(tmp_path))), []
    monkeypatch.setattr("anytoken.training.report.html.time.monotonic", clock)
    monkeypatch.setattr(HtmlReport, "_html", lambda self, finished: written.append(finished) or "")
    page.update()  # from 100 to 101: the next not before 151
    page.update()  # 149
    page.update()  # 152
    page.update(finished=True)
    assert written == [False, False, True]


def test_lines_go_through_their_points() -> None:
    chart = ElementTree.fromstring(
        board([line_chart("a", [Line([(0, 0), (5, 10), (10, 0), (7, math.nan)])])])
    )
    [line] = chart.iter(f"{SVG}polyline")
    points = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
    assert len(points) == 3 and points[0][0] == LEFT and points[2][0] == WIDTH - RIGHT
    assert points[0][1] == points[2][1] > points[1][1]  # up is down in SVG


@given(st.lists(st.tuples(st.integers(0, 10**7), st.floats(-1e12, 1e12)), max_size=30))
@example([(0, 0.0), (1, 5e-324)])
def test_any_numbers_make_a_chart_inside_its_frame(points: list[tuple[float, float]]) -> None:
    chart = ElementTree.fromstring(board([line_chart("any", [Line(points, "dots")])]))
    for line in chart.iter(f"{SVG}polyline"):
        for x, _ in (map(float, point.split(",")) for point in line.attrib["points"].split()):
            assert LEFT - 0.1 <= x <= WIDTH - RIGHT + 0.1


def test_ticks_of_a_narrow_range_are_told_apart() -> None:
    chart = ElementTree.fromstring(board([line_chart("narrow", [Line([(0, 1.0121), (9, 1.0258)])])]))
    ticks = [text.text for text in chart.iter(f"{SVG}text") if text.get("text-anchor") == "end"]
    assert ticks == ["1.01", "1.015", "1.02", "1.025", "1.03"]


def test_a_heat_maps_colour_is_the_share() -> None:
    chart = ElementTree.fromstring(board([heat_map("m", [[0.5, 0.25, 0.25, 0.0], [0.25] * 4])]))
    shown = [float(cell.attrib["fill-opacity"]) for cell in chart.iter(f"{SVG}rect")]
    assert shown == [1.0, 0.5, 0.5, 0.0, 0.5, 0.5, 0.5, 0.5]


def test_thinning_keeps_the_mean_and_short_curves() -> None:
    points = [(float(n), float(n % 7)) for n in range(1000)]
    thinned = thin(points, 100)
    assert len(thinned) == 100 and thin(points[:50], 100) == points[:50]
    assert sum(y for _, y in thinned) / 100 == pytest.approx(sum(y for _, y in points) / 1000)


def test_references_are_thin_and_written_between_the_marks(tmp_path: Path) -> None:
    run, stages = write_run(tmp_path / "1_first", 200), tmp_path / "stages"
    stages.mkdir()
    (stages / "README.md").write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    publish_references([run], stages)
    text = publish_references([run], stages).read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert text.count("### 1_first") == 1 and "| 200 | -11.00 | -11.00 |" in text
    kept = read_metrics(stages / "reference" / "1_first.jsonl")
    assert len(kept) == 26 and kept[0]["step"] == 1 and kept[-2]["step"] == 200 and "eval" in kept[-1]
    assert thin_metrics(kept) == kept
    ElementTree.parse(stages / "reference" / "1_first.svg")
    (stages / "README.md").write_text("no marks")
    with pytest.raises(ConfigError, match="no place for the curves"):
        publish_references([run], stages)


@pytest.mark.parametrize(
    "name",
    ["1_alignment", "2_interleaved", "3_speech", "4_instruct", "5_more", "6_speech", "7_codes", "8_instruct"],
)
def test_shipped_stages_have_their_references(name: str) -> None:
    stage = TrainConfig.load(recipes.root() / "stages" / f"{name}.yaml")
    assert stage.reference is not None
    entries = read_metrics(find_reference(stage.reference))
    assert entries[-1]["step"] == stage.steps and (find_reference(stage.reference)).stat().st_size < 10_000
    assert f"### {name}" in (recipes.root() / "stages" / "README.md").read_text()


def test_a_reference_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a metrics file"):
        HtmlReport(stage_of(tmp_path, reference="nowhere.jsonl"))
