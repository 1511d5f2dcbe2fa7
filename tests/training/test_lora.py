"""LoRA: only the adapter trains, it is small, and PEFT opens it again with the same answers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from anytoken.training.metrics import read_metrics
from anytoken.training.stage import Stage, StageError
from anytoken.training.trainer import StageTrainer, train


@pytest.fixture
def lora_recipe(recipe: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    pictures = [{"path": "things", "views": {"text->tile": 1, "tile->text": 1}}]
    base = train(Stage.from_dict(recipe | {"steps": 40, "output": str(tmp_path / "base"), "data": pictures}))
    kept = {key: value for key, value in recipe.items() if key not in ("tokenizers", "model")}
    return kept | {
        "init_from": str(base),
        "output": str(tmp_path / "adapter"),
        "lora": {"r": 4, "alpha": 8},
        "optimizer": {"lr": 1e-2},
    }


@pytest.mark.parametrize("new_rows", [[], ["beep"]])
def test_adapter_trains_and_loads_back(lora_recipe: dict[str, Any], new_rows: list[str]) -> None:
    lora_recipe["lora"]["new_rows"] = new_rows
    lora_recipe["steps"] = 100
    folder = train(Stage.from_dict(lora_recipe))
    assert not (folder / "model.safetensors").exists() and (folder / "adapter_model.safetensors").is_file()
    losses = [entry["loss"] for entry in read_metrics(folder / "metrics.jsonl") if "loss" in entry]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])

    ids = torch.arange(3, 40)[None]
    base = AutoModelForCausalLM.from_pretrained(lora_recipe["init_from"], dtype=torch.float32).eval()
    plain = base(ids).logits
    adapted = PeftModel.from_pretrained(base, folder).eval()
    changed = adapted(ids).logits
    assert (changed - plain).abs().max() > 1e-3
    torch.testing.assert_close(adapted.merge_and_unload()(ids).logits, changed, atol=1e-4, rtol=1e-4)


def test_resumed_adapter_equals_uninterrupted(
    lora_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(Stage.from_dict(lora_recipe | {"output": str(tmp_path / "whole")}))
    inner = StageTrainer.compute_loss

    def dying(self: StageTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == 6:
            raise KeyboardInterrupt
        return inner(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "compute_loss", dying)
        with pytest.raises(KeyboardInterrupt):
            train(Stage.from_dict(lora_recipe))
    resumed = train(Stage.from_dict(lora_recipe))
    first, second = (read_metrics(folder / "metrics.jsonl") for folder in (whole, resumed))
    assert [entry["loss"] for entry in first] == [entry["loss"] for entry in second]


def test_combinations_that_peft_refuses_are_said_early(lora_recipe: dict[str, Any]) -> None:
    with pytest.raises(StageError, match="dropout"):
        train(Stage.from_dict(lora_recipe | {"lora": {"dropout": 0.1}}))
    with pytest.raises(StageError, match="trains nothing"):
        nothing = {"attention": False, "experts": False}
        train(Stage.from_dict(lora_recipe | {"lora": nothing, "output": lora_recipe["output"] + "2"}))
