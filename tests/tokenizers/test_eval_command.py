"""`anytoken tokenizer eval` prints a table to read, and JSON only when asked."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from anytoken.cli import app
from anytoken.evaluation.tokenizers.compare import summary

ROOT = Path(__file__).parents[2]
CARDS = sorted((ROOT / "tokenizers").rglob("figures.json"))


@pytest.mark.parametrize(
    "path", CARDS, ids=lambda path: path.parent.relative_to(ROOT / "tokenizers").as_posix()
)
def test_the_figures_of_every_card_are_a_table(path: Path) -> None:
    figures = json.loads(path.read_text(encoding="utf-8"))
    head, *rows = summary(figures)
    assert len(head) > 1 and all(1 < len(row) <= len(head) for row in rows)
    assert rows[0][1] == figures.get("tokenizer", figures["kind"])
    assert any(len(row) == len(head) for row in rows), "nothing stands beside what comes back"


def test_eval_prints_a_table_or_json() -> None:
    words = ["tokenizer", "eval", str(ROOT / "anytoken/pretrained/mini/tokenizers/image"), "--count", "2"]
    words += ["--data", str(ROOT / "tests/assets/tiny")]
    table = CliRunner().invoke(app, words, env={"COLUMNS": "160"})
    assert table.exit_code == 0, table.output
    assert "PSNR in dB" in table.stdout and "codebook usage" in table.stdout and "{" not in table.stdout
    figures = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert figures["items"] == 2 and f"{figures['psnr_db']:.2f}" in table.stdout
