"""The loop: it learns what it is told to, stops on time, and ends in a loadable folder."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from anytoken.inference.api import AnyToken
from anytoken.model.backbone import adopt_backbone
from anytoken.processor import Processor
from anytoken.tokenizers.base import load_tokenizer
from anytoken.tokenizers.text import TextTokenizer
from anytoken.training import callbacks
from anytoken.training.config import (
    TrainConfig,
)
from anytoken.training.initialize import build_model
from anytoken.training.metrics import read_metrics
from anytoken.training.optim.param_groups import modality_rows
from anytoken.training.trainer import train
from anytoken.utils.errors import ConfigError


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in read_metrics(folder / "metrics.jsonl") if "loss" in entry]


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def test_a_recipe_switches_the_balancing_on(recipe: dict[str, Any]) -> None:
    """Expert groups, a balance within each modality, and the bias, which the checkpoint keeps."""
    recipe["steps"] = 3
    recipe["model"] |= {"num_experts": 4, "expert_groups": {"common": 2, "text": 2}}
    recipe["moe"] = {"router_modality_aux_loss": 0.01, "expert_bias_rate": 0.01}
    folder = train(TrainConfig.from_dict(recipe))
    last = read_metrics(folder / "metrics.jsonl")[-1]
    assert last["modality_load_balance"] > 0
    for layer in last["expert_load"]["tile"]:
        assert sum(layer[2:]) <= 0.25  # the closing id alone is a text id
    assert 0 <= last["expert_entropy"]["tile"] <= 1
    assert set(last["dropped_share"].values()) == {0}
    model = AutoModelForCausalLM.from_pretrained(folder)
    biases = [module.expert_bias for module in model.modules() if hasattr(module, "expert_bias")]
    assert len(biases) == 2 and all(bias.abs().sum() > 0 for bias in biases)


def test_a_foreign_backbone_is_trained(recipe: dict[str, Any], world: Path, tmp_path: Path) -> None:
    """What `anytoken init` writes, upcycled or of a class of its own, is a start like any other."""
    for number, (kind, upcycle) in enumerate({"qwen3": 2, "gpt2": 0}.items()):
        config = AutoConfig.for_model(
            kind, vocab_size=290, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, head_dim=16, max_position_embeddings=128, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / kind)
        text = TextTokenizer.from_pretrained(world / "tokenizers" / "text")
        PreTrainedTokenizerFast(tokenizer_object=text._bpe).save_pretrained(tmp_path / kind)
        tokenizers = {name: load_tokenizer(world / "tokenizers" / name) for name in ("tile", "beep")}
        lm, processor = adopt_backbone(tmp_path / kind, tokenizers, upcycle)
        start = AnyToken(lm, processor).save_pretrained(tmp_path / f"{kind} start")
        changes = {
            "init_from": str(start),
            "tokenizers": {},
            "model": {},
            "output": str(tmp_path / str(number)),
        }
        folder = train(TrainConfig.from_dict(recipe | changes | {"steps": 20}))
        losses = [
            entry["mean_over_modalities"]
            for entry in read_metrics(folder / "metrics.jsonl")
            if "loss" in entry
        ]
        assert losses[-1] < 0.8 * losses[0]


def test_a_bias_without_experts_is_refused(recipe: dict[str, Any]) -> None:
    recipe["moe"] = {"expert_bias_rate": 0.01}
    recipe["model"] |= {"mlp_only_layers": [0, 1]}
    with pytest.raises(ConfigError, match="no effect"):
        train(TrainConfig.from_dict(recipe))


def test_it_learns_and_leaves_a_loadable_checkpoint(recipe: dict[str, Any]) -> None:
    recipe["steps"] = 60
    recipe["eval"] = {"batches": 1, "data": [{"path": "things", "views": {"text->tile": 1}, "split": "test"}]}
    folder = train(TrainConfig.from_dict(recipe))
    entries = read_metrics(folder / "metrics.jsonl")
    first, last = entries[0], [entry for entry in entries if "loss" in entry][-1]
    assert set(last["groups"]) == {"text", "tile", "beep", "control"}
    assert last["groups"]["tile"]["loss"] < 0.5 * first["groups"]["tile"]["loss"]
    assert last["groups"]["text"]["loss"] < 0.5 * first["groups"]["text"]["loss"]
    assert 0 <= last["groups"]["beep"]["accuracy"] <= 1 and last["tokens_per_second"] > 0
    layers = [layer for load in last["expert_load"].values() for layer in load]
    assert len(layers) == 8 and all(sum(layer) == pytest.approx(1, abs=1e-3) for layer in layers)
    assert [entry["step"] for entry in entries if "eval" in entry] == [60]
    assert entries[-1]["eval"]["groups"]["tile"]["tokens"] > 0
    processor = Processor.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.vocab_size == processor.token_space.vocab_size
    assert isinstance(json.loads((folder / "sampling.json").read_text()), dict)
    assert not (folder / "state").exists()


def test_finished_runs_are_kept_and_other_settings_refused(recipe: dict[str, Any]) -> None:
    folder = train(TrainConfig.from_dict(recipe))
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert train(TrainConfig.from_dict(recipe | {"log_every": 3})) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    changed = recipe | {"seed": 1, "optimizer": {"lr": 0.02}}
    with pytest.raises(ConfigError, match=r"another optimizer.lr \(0.01 before, 0.02 now\); seed \(0 before"):
        train(TrainConfig.from_dict(changed))
    (folder / "stage.yaml").unlink()
    with pytest.raises(ConfigError, match="choose another output"):
        train(TrainConfig.from_dict(recipe))


def test_a_stage_starts_from_the_last_ones_output(recipe: dict[str, Any], tmp_path: Path) -> None:
    first = train(TrainConfig.from_dict(recipe | {"steps": 2}))
    second = {key: value for key, value in recipe.items() if key not in ("tokenizers", "model")}
    second |= {"init_from": str(first), "output": str(tmp_path / "second"), "steps": 1}
    _, model = build_model(TrainConfig.from_dict(second))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in weights(first).items())
    assert train(TrainConfig.from_dict(second)) == tmp_path / "second"


def test_only_named_parameters_change(recipe: dict[str, Any], tmp_path: Path) -> None:
    first = train(TrainConfig.from_dict(recipe | {"steps": 2}))
    second = {key: value for key, value in recipe.items() if key not in ("tokenizers", "model")}
    second |= {"init_from": str(first), "steps": 2, "trainable": ["*.q_proj.weight", "rows:tile"]}
    stage = TrainConfig.from_dict(second | {"output": str(tmp_path / "second")})
    before, after = weights(first), weights(train(stage))
    space = Processor.from_pretrained(first).token_space
    tile = torch.zeros(space.vocab_size, dtype=torch.bool)
    tile[modality_rows(space, ["tile"])] = True
    for name, value in after.items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            assert torch.equal(value[~tile], before[name][~tile]) and not torch.equal(
                value[tile], before[name][tile]
            )
        else:
            assert torch.equal(value, before[name]) != name.endswith("q_proj.weight")


def test_patterns_and_modalities_that_match_nothing(recipe: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"\*\.wings matches no parameter|'\*\.wings'"):
        train(TrainConfig.from_dict(recipe | {"trainable": ["*.wings"]}))
    with pytest.raises(ConfigError, match="no modality 'smell'"):
        train(TrainConfig.from_dict(recipe | {"trainable": ["rows:smell"], "output": recipe["output"] + "2"}))


def test_a_time_limit_ends_the_run_early_with_a_checkpoint(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = itertools.count()  # every look at the clock is a second later
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(monotonic=lambda: float(next(seconds))))
    folder = train(TrainConfig.from_dict(recipe | {"steps": 1000, "max_minutes": 0.2, "save_every": 1000}))
    entries = [entry for entry in read_metrics(folder / "metrics.jsonl") if "loss" in entry]
    assert len(entries) == 12 and (folder / "model.safetensors").is_file()
    assert entries[-1]["learning_rate"] < entries[5]["learning_rate"]


def test_wrong_world_size_is_an_error(recipe: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="torchrun --nproc_per_node 2"):
        train(TrainConfig.from_dict(recipe | {"distributed": {"world_size": 2}}))


def test_init_from_a_folder_without_a_checkpoint(recipe: dict[str, Any], tmp_path: Path) -> None:
    bad = {key: value for key, value in recipe.items() if key not in ("tokenizers", "model")}
    with pytest.raises(ConfigError, match="no checkpoint folder"):
        train(TrainConfig.from_dict(bad | {"init_from": str(tmp_path)}))
    with pytest.raises(ConfigError, match=r"'mni' is no checkpoint folder.*did you mean 'mini'"):
        train(TrainConfig.from_dict(bad | {"init_from": "mni"}))


def test_checkpointed_gradients_are_the_same(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["steps"] = 2
    plain = losses(train(TrainConfig.from_dict(recipe)))
    changed = recipe | {"gradient_checkpointing": True, "output": str(tmp_path / "checkpointed")}
    assert losses(train(TrainConfig.from_dict(changed))) == pytest.approx(plain, abs=1e-6)
