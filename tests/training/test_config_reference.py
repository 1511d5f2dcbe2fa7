"""The recipe reference knows every key that a recipe can have, and the page in docs/ is what the command prints."""

from pathlib import Path

import yaml
from typer.testing import CliRunner

from anytoken.cli import app
from anytoken.training.config_reference import reference

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_the_command_prints() -> None:
    printed = CliRunner().invoke(app, ["recipes", "reference"])
    assert printed.exit_code == 0 and printed.stdout == reference()
    assert (ROOT / "docs/recipe_reference.md").read_text(encoding="utf-8") == printed.stdout


def test_every_key_has_a_type_a_default_and_a_meaning() -> None:
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    assert len(rows) > 100
    for row in rows:
        cells = [cell.strip() for cell in row.replace("\\|", "").strip("|").split("|")]
        assert len(cells) == 4 and all(cells), row


def test_the_keys_of_a_shipped_recipe_are_listed() -> None:
    listed = {line.split("`")[1] for line in reference().splitlines() if line.startswith("| `")}
    recipe = yaml.safe_load((ROOT / "stages/edition/1_alignment.yaml").read_text())
    assert set(recipe) <= listed
    assert {f"optimizer.{key}" for key in recipe["optimizer"]} <= listed
    assert {f"data.N.{key}" for one in recipe["data"] for key in one} <= listed
