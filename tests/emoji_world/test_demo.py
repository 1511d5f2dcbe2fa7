"""The demo page: every direction answered, every file it names written, nothing unescaped."""

import re
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from anytoken.emoji_world import demo, report
from anytoken.emoji_world.directions import DIRECTIONS, WORDS
from anytoken.segments import DNA, Image, Text
from anytoken.utils.errors import EvaluationError

ASSETS = Path(__file__).parents[1] / "assets"


def test_the_demo_answers_every_direction_and_links_only_files_that_exist(tmp_path, fake_model, anything):
    hostile = fake_model(
        lambda prompt, out: [Text("<script>")] if out == "text" else [anything(out)], tmp_path
    )
    page = demo.run_demo(hostile, ASSETS, tmp_path / "demo", each=1)
    text = page.read_text()
    for name in (name for name, one in DIRECTIONS.items() if not one.how and one.file != WORDS):
        assert f"<h2>{name.replace('>', '&gt;')}</h2>" in text
    linked = set(re.findall(r'(?:src|href)="([^"]+)"', text))
    assert linked and linked == {path.name for path in page.parent.iterdir()} - {"index.html", "images.png"}
    assert "<script>" not in text and "&lt;script&gt;" in text and "carries no scores" in text


def test_a_strip_holds_the_images_in_order():
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    images = [Image(np.full((8, 4, 3), color, dtype=np.uint8)) for color in colors]
    row = np.asarray(demo.strip(images, side=16, gap=2))
    assert row.shape == (16, 52, 3)
    assert [tuple(row[8, 8 + 18 * place].tolist()) for place in range(3)] == colors
    assert (row[:, 16:18] == 255).all()


def test_the_demo_shows_the_scores_of_the_checkpoint(tmp_path, fake_model, ignorant, anything, world, capsys):
    found = report.evaluate(ignorant, world, ["dna->text"], count=5, progress=False)
    report.save(found, tmp_path / "scores.json")
    model = fake_model(lambda prompt, out: [anything(out)], tmp_path)
    text = demo.run_demo(model, ASSETS, tmp_path / "demo", each=1).read_text()
    assert "<td>dna-&gt;text</td>" in text and "carries no scores" not in text
    assert "Held-out scores beside baselines" in capsys.readouterr().out


def test_scores_fit_80_columns():
    mini = Path(demo.__file__).parents[1] / "pretrained/mini/scores.json"
    found = report.read(mini)
    screen = StringIO()
    Console(width=80, file=screen).print(demo.score_table(found))
    lines = screen.getvalue().splitlines()
    for row in report.rows(found)[1:]:
        [line] = [line for line in lines if line.split()[:1] == [row[0]]]
        figures = [cell.split()[0] for cell in row[1:] if cell]
        assert [cell.strip("*") for cell in line.split()[1:]] == figures


def test_verdicts(anything):
    gene = demo.DemoExample("text->dna", [Text("M K L")], "dna", anything("dna"))
    assert demo.judge(gene, [DNA("ATGAAACTG")], None) == "translates to 100.0 % of it"
    assert demo.judge(gene, [], None) == "nothing of this kind"
    word = demo.DemoExample("image->text", [], "text", Text("a dog"))
    assert demo.judge(word, [Text("A dog")], None) == "exact"
    assert demo.judge(word, [Text("a cat")], None) == "wanted: a dog"


def test_missing_files_are_named(tmp_path, ignorant):
    with pytest.raises(EvaluationError, match=r"images\.jsonl is missing"):
        demo.run_demo(ignorant, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
