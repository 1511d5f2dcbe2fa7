"""LoRA: only the adapter trains, it is small, and PEFT opens it again with the same answers."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import anytoken
from anytoken.cli import app
from anytoken.processor import Processor
from anytoken.token_space import TokenSpace
from anytoken.training.config import (
    LoraSpec,
    TrainConfig,
)
from anytoken.training.lora import add_lora, portable_name
from anytoken.training.metrics import read_metrics
from anytoken.training.optim.param_groups import modality_rows
from anytoken.training.trainer import train
from anytoken.utils.errors import ConfigError

STAGES = Path(__file__).parents[2] / "stages"


@pytest.fixture(scope="module")
def base(world: Path, toy_recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows pictures and no sounds yet."""
    folder = tmp_path_factory.mktemp("base")
    pictures = [{"path": "things", "views": {"text->tile": 1, "tile->text": 1}}]
    recipe = toy_recipe(world, folder) | {"steps": 40, "save_every": 100, "data": pictures}
    return train(TrainConfig.from_dict(recipe))


@pytest.fixture
def lora_recipe(base: Path, recipe: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    kept = {key: value for key, value in recipe.items() if key not in ("tokenizers", "model")}
    return kept | {
        "init_from": str(base),
        "output": str(tmp_path / "adapter"),
        "lora": {"r": 4, "alpha": 8},
        "optimizer": {"lr": 1e-2},
    }


@pytest.mark.parametrize("new_rows", [[], ["beep"], ["text"]])
def test_adapter_trains_and_loads_back(lora_recipe: dict[str, Any], new_rows: list[str]) -> None:
    lora_recipe["lora"]["new_rows"] = new_rows
    lora_recipe["steps"] = 100
    folder = train(TrainConfig.from_dict(lora_recipe))
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
    lora_recipe: dict[str, Any], tmp_path: Path, killed_at: Callable[[int, dict[str, Any]], None]
) -> None:
    whole = train(TrainConfig.from_dict(lora_recipe | {"output": str(tmp_path / "whole")}))
    killed_at(6, lora_recipe)
    resumed = train(TrainConfig.from_dict(lora_recipe))
    first, second = (read_metrics(folder / "metrics.jsonl") for folder in (whole, resumed))
    assert [entry["loss"] for entry in first] == [entry["loss"] for entry in second]


PARTS = {
    "attention": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "experts": {"gate_up_proj", "down_proj"},
    "router": {"weight"},
    "new_rows": {"embed_tokens"},
}
ALL_OFF = {"attention": False, "experts": False, "router": False}


@pytest.mark.parametrize(
    "settings",
    [
        *[{**ALL_OFF, part: True} for part in ALL_OFF],
        {"r": 2, "router": True, "new_rows": ["tile", "text"]},
        {"r": 9, "rslora": True, "experts": False},
        {"dora": True, "experts": False},
    ],
    ids=[*ALL_OFF, "all", "rslora", "dora"],
)
def test_a_setting_adapts_what_it_names_and_no_more(base: Path, settings: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    spec, space = LoraSpec(**{"alpha": 8, **settings}), Processor.from_pretrained(base).token_space
    adapted = add_lora(model, spec, space)
    tuner = adapted.base_model
    named = [name.split(".")[-1] for name in tuner.targeted_module_names + tuner.targeted_parameter_names]
    trained = {name: one for name, one in adapted.named_parameters() if one.requires_grad}
    rows = [one for name, one in trained.items() if "trainable_tokens" in name]
    assert {*named, *(["embed_tokens"] if rows else [])} == set().union(
        *(targets for part, targets in PARTS.items() if getattr(spec, part))
    )
    assert [len(one) for one in rows] == [len(modality_rows(space, spec.new_rows))] * bool(spec.new_rows)
    assert any("lora_magnitude" in name for name in trained) == spec.dora
    layers = [one for one in adapted.modules() if isinstance(one, LoraLayer)]
    scale = spec.alpha / (spec.r**0.5 if spec.rslora else spec.r)
    assert {(one.r["default"], one.scaling["default"]) for one in layers} == (
        {(spec.r, scale)} if named else set()
    )
    narrow = {
        one.shape[0] for name, one in trained.items() if "_proj.lora_A" in name and "experts" not in name
    }
    assert narrow == ({spec.r} if spec.attention else set())


@pytest.mark.parametrize(
    "settings", [{"rslora": True, "router": True}, {"dora": True, "experts": False}], ids=["rslora", "dora"]
)
def test_variants_train_and_open_everywhere(lora_recipe: dict[str, Any], settings: dict[str, Any]) -> None:
    lora_recipe["lora"] |= settings
    folder = train(TrainConfig.from_dict(lora_recipe | {"steps": 3}))
    written = json.loads((folder / "adapter_config.json").read_text())
    assert (
        written["base_model_name_or_path"] == Path(lora_recipe["init_from"]).name
    )  # no path of this machine
    assert written["use_rslora"] == settings.get("rslora", False)
    assert written["use_dora"] == settings.get("dora", False)
    ids = torch.arange(3, 40)[None]
    plain = AutoModelForCausalLM.from_pretrained(lora_recipe["init_from"], dtype=torch.float32).eval()
    adapted = PeftModel.from_pretrained(plain, folder).eval()(ids).logits
    opened = anytoken.load(lora_recipe["init_from"], device="cpu", adapter=folder)
    torch.testing.assert_close(opened.lm(ids).logits, adapted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("given", "written"), [("mini", "mini"), ("runs/mine", "runs/mine"), ("/a/b", "b"), ("../up/c", "c")]
)
def test_the_base_is_named_without_this_machines_folders(given: str, written: str) -> None:
    assert portable_name(given) == written


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_text_train_in_a_tied_and_an_untied_head(base: Path, tmp_path: Path, tied: bool) -> None:
    """Where the head has rows of its own, both are in the adapter; codes and controls keep theirs."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, tie_word_embeddings=tied)
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach().clone())
    model.save_pretrained(tmp_path / "base")
    Processor.from_pretrained(base).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "sampling.json").write_text("{}")
    space = Processor.from_pretrained(base).token_space
    adapted = add_lora(model, LoraSpec(r=2, new_rows=["text"]), space, "base")
    ids = torch.arange(3, 40)[None]
    adapted(ids).logits.logsumexp(-1).sum().backward()
    rows = {name: one for name, one in adapted.named_parameters() if "trainable_tokens" in name}
    assert len(rows) == (1 if tied else 2)
    assert all(len(one) == space.text_size and one.grad.abs().sum() > 0 for one in rows.values())
    with torch.no_grad():
        for number, one in enumerate(rows.values()):
            one.add_(torch.randn(one.shape, generator=torch.Generator().manual_seed(number)))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    logits = adapted.eval()(ids).logits

    merged = anytoken.load(tmp_path / "base", device="cpu", adapter=tmp_path / "adapter").lm
    switched = anytoken.load(tmp_path / "base", device="cpu")
    before = [one.weight.clone() for one in tables(switched.lm)]
    switched.load_adapter(tmp_path / "adapter", "words")
    assert all(torch.equal(one.weight, old) for one, old in zip(tables(switched.lm), before, strict=True))
    switched.use_adapter("words")
    for lm in (merged, switched.lm):
        torch.testing.assert_close(lm(ids).logits, logits, atol=1e-4, rtol=1e-4)
        for one, old in zip(tables(lm), before, strict=True):
            assert torch.equal(one.weight[space.text_size :], old[space.text_size :])
            assert not torch.equal(one.weight[: space.text_size], old[: space.text_size])
    switched.use_adapter(None)
    assert all(torch.equal(one.weight, old) for one, old in zip(tables(switched.lm), before, strict=True))


def tables(lm: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    return lm.get_input_embeddings(), lm.get_output_embeddings()


def test_an_adapter_goes_on_from_another(lora_recipe: dict[str, Any], tmp_path: Path) -> None:
    first = train(TrainConfig.from_dict(lora_recipe | {"steps": 2}))
    second = lora_recipe | {"steps": 1, "optimizer": {"lr": 1e-30}, "output": str(tmp_path / "second")}
    second["lora"] = lora_recipe["lora"] | {"start": str(first)}
    one, other = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (first, train(TrainConfig.from_dict(second)))
    )
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    bigger = second | {"output": str(tmp_path / "third"), "lora": second["lora"] | {"r": 8}}
    with pytest.raises(ConfigError, match="other lora settings"):
        train(TrainConfig.from_dict(bigger))


def test_the_users_own_jsonl_in_one_command(base: Path, world: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    tiny = ["steps=2", "tokens_per_batch=128", "context=64", "schedule.warmup_steps=1", "save_every=1"]
    words = ["train", str(STAGES / "lora.yaml"), f"data.train={world / 'things.jsonl'}", f"init_from={base}"]
    result = CliRunner().invoke(app, [*words, f"data.test={world / 'things.jsonl'}", f"output={out}", *tiny])
    assert result.exit_code == 0, result.output
    entries = read_metrics(out / "metrics.jsonl")
    assert entries[0]["step"] == 0 and entries[0]["eval"]["groups"]["beep"]["tokens"] > 0
    assert set(entries[1]["groups"]) == {"text", "tile", "beep", "control"}  # all six directions
    assert len(list((out / "shards").glob("*/manifest.json"))) == 1
    assert "2 of 2" in (out / "report.html").read_text() and (out / "adapter_config.json").is_file()
    check_card(out, entries)


def check_card(folder: Path, entries: list[dict[str, Any]]) -> None:
    """It has the run's own figures, and its code opens the adapter, the same by both ways."""
    card, facts = (folder / "README.md").read_text(), json.loads((folder / "run.json").read_text())
    assert all(one["sha256"] in card and f"| {one['records']:,} |" in card for one in facts["data"])
    assert (
        facts["commit"] in card
        and "LoRA of rank 16, alpha 32, on attention, experts, the vocabulary rows of text." in card
    )
    assert f"It trains {facts['trained_parameters']:,} of " in card and "before and after training" in card
    before, after = (
        [f"{group['bits']:.2f}" for group in one["eval"]["groups"].values()]
        for one in entries
        if "eval" in one
    )
    assert f"| 0 | {' | '.join(before)} |" in card and f"| 2 | {' | '.join(after)} |" in card
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        exec(code, names)
    ids = torch.arange(3, 40)[None]
    ours, theirs = (one.eval()(ids).logits for one in (names["model"].lm, names["lm"]))
    torch.testing.assert_close(ours.float(), theirs.float(), atol=1e-4, rtol=1e-4)


def test_data_that_changed_is_not_gone_on_with(
    lora_recipe: dict[str, Any], world: Path, tmp_path: Path, killed_at: Callable[[int, dict[str, Any]], None]
) -> None:
    lines = (world / "things.jsonl").read_text().splitlines(keepends=True)
    mine = tmp_path / "mine.jsonl"
    mine.write_text("".join(lines))
    recipe = lora_recipe | {"data_root": "", "data": {"train": str(mine)}}

    killed_at(5, recipe)
    mine.write_text("".join(reversed(lines)))
    with pytest.raises(ConfigError, match="changed since this run started"):
        train(TrainConfig.from_dict(recipe))


def test_a_new_modality_and_its_adapter_in_one_folder(
    lora_recipe: dict[str, Any], world: Path, tmp_path: Path
) -> None:
    smaller = {**lora_recipe, "init_from": str(without_beeps(lora_recipe["init_from"], tmp_path / "smaller"))}
    smaller |= {"modalities": {"beep": str(world / "tokenizers" / "beep")}, "steps": 30}
    smaller["lora"] = {"r": 4, "alpha": 8, "new_rows": ["beep"]}
    smaller["data"] = [{"path": "things", "views": {"text->beep": 1}}]
    folder = train(TrainConfig.from_dict(smaller))
    assert not [
        name
        for name in load_file(folder / "adapter_model.safetensors")
        if name.endswith("embed_tokens.weight")
    ]
    plain = anytoken.load(smaller["init_from"], device="cpu")
    model = anytoken.load(smaller["init_from"], device="cpu", adapter=folder)
    assert plain.kinds == ["text", "tile"] and model.kinds == ["text", "tile", "beep"]
    rows = slice(plain.token_space.vocab_size, None)
    plain.load_adapter(folder, "sounds")
    untrained = plain.lm.get_input_embeddings().weight[rows].clone()
    plain.use_adapter("sounds")
    trained = plain.lm.get_input_embeddings().weight[rows]
    assert torch.equal(trained, model.lm.get_input_embeddings().weight[rows]) and not torch.equal(
        trained, untrained
    )
    ids = torch.tensor([model.encode_prompt("ant")])
    assert torch.equal(model.lm(ids).logits, plain.lm(ids).logits)


def without_beeps(checkpoint: str, to: Path) -> Path:
    """The base model as it would be had it never heard of the last modality."""
    model = anytoken.load(checkpoint, device="cpu")
    space, processor = TokenSpace(model.token_space.text_size), model.processor
    tile = processor.tokenizers["tile"]
    space.append_modality("tile", tile.codebook_sizes, tile.shape)
    model.lm.resize_token_embeddings(space.vocab_size)
    model.lm.config.modality_boundaries, model.lm.config.modality_index = (
        space.bucket_boundaries(), space.bucket_modalities(),
    )  # fmt: skip
    model.processor = Processor(space, processor.text_tokenizer, {"tile": tile})
    return model.save_pretrained(to)


def test_combinations_that_peft_refuses_are_said_early(lora_recipe: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="dropout"):
        train(TrainConfig.from_dict(lora_recipe | {"lora": {"dropout": 0.1}}))
    with pytest.raises(ConfigError, match="no DoRA for experts"):
        train(TrainConfig.from_dict(lora_recipe | {"lora": {"dora": True}}))
    with pytest.raises(ConfigError, match="trains nothing"):
        # PEFT has no adapter of rows alone.
        nothing = {"attention": False, "experts": False, "new_rows": ["tile"]}
        train(TrainConfig.from_dict(lora_recipe | {"lora": nothing, "output": lora_recipe["output"] + "2"}))
