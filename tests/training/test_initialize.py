"""Where a run begins: the id layout, the first embedding rows, folders that are not what they should be."""

from pathlib import Path
from typing import Any

import pytest
import torch

from anytoken.model.embedding_init import projected_rows
from anytoken.tokenizers.base import load_tokenizer
from anytoken.training.config import (
    TrainConfig,
)
from anytoken.training.initialize import build_init_checkpoint, build_model, build_processor
from anytoken.utils.errors import ConfigError


def test_ids_follow_the_order_of_the_recipe(recipe: dict[str, Any]) -> None:
    processor = build_processor(recipe["tokenizers"])
    assert processor.token_space.modalities == ["tile", "beep"]
    turned = {kind: recipe["tokenizers"][kind] for kind in ("beep", "text", "tile")}
    assert build_processor(turned).token_space.modalities == ["beep", "tile"]


def test_scratch_is_the_seeds_model_with_the_token_spaces_size(recipe: dict[str, Any]) -> None:
    processor, model = build_model(TrainConfig.from_dict(recipe))
    _, again = build_model(TrainConfig.from_dict(recipe))
    _, other = build_model(TrainConfig.from_dict(recipe | {"seed": 1}))
    table = model.get_input_embeddings().weight
    assert len(table) == processor.token_space.vocab_size and model.config.hidden_size == 32
    assert torch.equal(table, again.get_input_embeddings().weight)
    assert not torch.equal(table, other.get_input_embeddings().weight)
    assert table.std().item() == pytest.approx(model.config.initializer_range, rel=0.2)


def test_rows_of_near_codes_are_near() -> None:
    line = torch.linspace(0, 1, 9)[:, None]
    rows = projected_rows(line, 64, torch.Generator().manual_seed(0))
    distances = (rows - rows[0]).norm(dim=1)
    assert torch.all(distances.diff() > 0)
    assert rows.std().item() == pytest.approx(1, abs=0.05)


def test_missing_tokenizer_folders_are_named(recipe: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="tile: nowhere"):
        build_processor(recipe["tokenizers"] | {"tile": "nowhere"})
    with pytest.raises(ConfigError, match="text"):
        build_processor({"tile": recipe["tokenizers"]["tile"]})


def test_a_backbone_is_not_made_over_something_else(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Said before anything is loaded."""
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.tex").write_text("years")
    swap = {key: value for key, value in recipe.items() if key not in ("tokenizers", "model")}
    codecs = {"image": {"source": "nowhere", "config": {"model_type": "emu3"}}}
    swap |= {"init_from": str(taken), "backbone": {"model": "nowhere", "config": "no.json", "codecs": codecs}}
    with pytest.raises(ConfigError, match=r"taken exists and holds something else \(thesis\.tex\)"):
        build_init_checkpoint(TrainConfig.from_dict(swap))
    assert [path.name for path in taken.iterdir()] == ["thesis.tex"]


def test_an_unknown_model_setting_is_refused(recipe: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="hiden_size"):
        build_model(TrainConfig.from_dict(recipe | {"model": {"hiden_size": 32}}))


def test_a_stage_replaces_a_tokenizer_of_its_checkpoint(recipe: dict[str, Any], save_tiny, tmp_path) -> None:
    tokenizers = {name: load_tokenizer(recipe["tokenizers"][name]) for name in ("tile", "beep")}
    start = str(save_tiny(tmp_path / "start", tokenizers, 128))
    swap = {key: value for key, value in recipe.items() if key not in ("tokenizers", "model")}
    swap |= {"init_from": start, "replace_tokenizers": {"beep": recipe["tokenizers"]["beep"]}}
    processor, model = build_model(TrainConfig.from_dict(swap))
    _, before = build_model(TrainConfig.from_dict(swap | {"replace_tokenizers": {}}))
    span = processor.token_space.code_range("beep")
    old, new = (one.get_input_embeddings().weight for one in (before, model))
    assert torch.equal(old[: span.start], new[: span.start])
    assert not (old[span.start : span.stop] == new[span.start : span.stop]).any()
    with pytest.raises(ConfigError, match=r"replace_tokenizers\.tile: .* of beep"):
        build_model(
            TrainConfig.from_dict(swap | {"replace_tokenizers": {"tile": recipe["tokenizers"]["beep"]}})
        )
    with pytest.raises(ConfigError, match="from scratch, name all under tokenizers"):
        TrainConfig.from_dict(recipe | {"replace_tokenizers": {"beep": recipe["tokenizers"]["beep"]}})
