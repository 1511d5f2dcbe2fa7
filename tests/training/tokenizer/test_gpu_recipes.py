"""The tokenizers' recipes for one large GPU in miniature: they train, and a command that is ended goes on."""

from pathlib import Path

import pytest

from anytoken.tokenizers.base import load_tokenizer
from anytoken.training.tokenizer import trainer
from anytoken.training.tokenizer.recipe import TokenizerRecipe
from anytoken.training.tokenizer.trainer import train_tokenizer

ROOT = Path(__file__).parents[3]
TINY = ROOT / "tests" / "assets" / "tiny"
RECIPES = sorted((ROOT / "stages" / "gpu" / "tokenizers").glob("*.yaml"))


def test_there_is_one_for_each_kind_and_the_page_names_its_command() -> None:
    assert [path.stem for path in RECIPES] == ["image", "speech", "video"]
    page = (ROOT / "stages" / "gpu" / "README.md").read_text()
    for path in RECIPES:
        plan, small = (
            TokenizerRecipe.load(path),
            TokenizerRecipe.load(ROOT / "tokenizers" / path.stem / "recipe.yaml"),
        )
        assert plan.precision == "bf16" and plan.compile and plan.device == "auto" and plan.save_every <= 200
        assert (plan.kind, plan.config, plan.data) == (small.kind, small.config, small.data)
        command = path.read_text().splitlines()[1].removeprefix("# ")
        assert f"timeout 540 {command}" in page


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_runs_in_miniature_and_goes_on(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ["steps=2", "batch_size=4", "compile=false", "save_every=1", "threads=1", "device=cpu"]
    small += ["config.width=32", "config.encoder_depth=1", "config.decoder_depth=1"]
    real = trainer._Loop._train_step

    def ended(self: trainer._Loop) -> dict[str, float]:
        if self.step == 1 and not (tmp_path / "again").exists():
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(trainer._Loop, "_train_step", ended)
    with pytest.raises(KeyboardInterrupt):
        train_tokenizer(path, TINY, tmp_path / "out", small)
    assert (tmp_path / "out" / "checkpoint.pt").is_file()
    (tmp_path / "again").touch()
    assert load_tokenizer(train_tokenizer(path, TINY, tmp_path / "out", small)).kind == path.stem
