"""Plans: counted parameters agree with published models and with built ones, FLOPs with PyTorch's counter."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig
from typer.testing import CliRunner

import anytoken
from anytoken.cli import app
from anytoken.token_space import TokenSpace
from anytoken.training.config import (
    LoraSpec,
    TrainConfig,
)
from anytoken.training.cost_estimate import (
    GIB,
    as_rows,
    count,
    flops_per_token,
    meta_model,
    plan,
    planned_start,
    read_config,
    sharding_of,
)
from anytoken.training.initialize import build_model
from anytoken.training.lora import add_lora
from anytoken.utils.errors import ConfigError

STAGES = Path(__file__).parents[2] / "stages"
SCALE = STAGES / "scale"
TINY: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 48, "vocab_size": 96,
}  # fmt: skip
TINY_MOE = TINY | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
QWEN3 = {"vocab_size": 151_936, "head_dim": 128}
QWEN3_06B = Qwen3Config(
    **QWEN3, hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
    intermediate_size=3072, tie_word_embeddings=True,
)  # fmt: skip
QWEN3_30B_A3B = Qwen3MoeConfig(
    **QWEN3, hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, num_experts=128,
    num_experts_per_tok=8, moe_intermediate_size=768, tie_word_embeddings=False,
)  # fmt: skip


def stage(**changes: Any) -> TrainConfig:
    recipe = {
        "init_from": "runs/start", "output": "runs/out", "data": [{"path": "a", "views": {"text->image": 1}}],
        "steps": 1000, "tokens_per_batch": 2**20, "context": 8192,
    }  # fmt: skip
    return TrainConfig.from_dict(recipe | changes)


@pytest.mark.parametrize(
    ("config", "total", "active"),
    [(QWEN3_06B, 0.6e9, 0.6e9), (QWEN3_30B_A3B, 30.5e9, 3.3e9)],
    ids=["0.6B", "30B"],
)
def test_counts_are_the_published_ones(config: Any, total: float, active: float) -> None:
    counts = count(meta_model(config))
    assert counts.total == pytest.approx(total, rel=0.01)
    assert counts.active == pytest.approx(active, rel=0.02)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("config", [Qwen3Config(**TINY), Qwen3MoeConfig(**TINY_MOE)], ids=["dense", "moe"])
def test_counts_are_those_of_the_built_model(config: Any, tied: bool) -> None:
    config.tie_word_embeddings = tied
    model = AutoModelForCausalLM.from_config(config)
    counts = count(meta_model(config), ["*.self_attn.*"])
    assert counts.total == sum(one.numel() for one in model.parameters())
    expert = 3 * 32 * 24
    idle = 2 * 2 * expert if config.model_type == "qwen3_moe" else 0
    assert counts.active == counts.total - idle
    assert counts.trained == sum(one.numel() for name, one in model.named_parameters() if "self_attn" in name)


def test_flops_are_those_pytorch_counts() -> None:
    config = Qwen3Config(
        **TINY, attn_implementation="eager"
    )  # whose score matrix is full: twice the causal half
    model, tokens = AutoModelForCausalLM.from_config(config), 40
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, tokens, dtype=torch.long)).logits.sum().backward()
    norms = sum(one.numel() for name, one in model.named_parameters() if "norm" in name)
    ours = tokens * (flops_per_token(config, count(model), tokens) - 6 * norms)
    causal = tokens * 6 * 2 * 64 * tokens
    assert ours + causal == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_frozen_weights_cost_a_third_less() -> None:
    model = meta_model(Qwen3Config(**TINY))
    everything, nothing = count(model), count(model, ["*.no_such"])
    attention = 6 * 2 * 64
    assert flops_per_token(model.config, everything, 1) - attention == pytest.approx(
        1.5 * (flops_per_token(model.config, nothing, 1) - attention)
    )


def test_activations_are_those_autograd_saves() -> None:
    config = Qwen3Config(**(TINY | {"hidden_size": 256, "intermediate_size": 768, "head_dim": 64}))
    model, tokens = AutoModelForCausalLM.from_config(config), 128
    saved: dict[int, int] = {}
    owned = {one.untyped_storage().data_ptr() for one in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.model(torch.zeros(1, tokens, dtype=torch.long), use_cache=False).last_hidden_state
    assert output is not None
    planned = plan(stage(context=tokens, tokens_per_batch=tokens), config, 1).memory["activations"] * GIB
    assert planned == pytest.approx(sum(saved.values()) / 2, rel=0.35)  # float32 here, 2 bytes in a plan


def test_sharding_divides_what_it_shards() -> None:
    by = {
        name: plan(stage(), QWEN3_30B_A3B, 64, sharding=name).memory
        for name in ("ddp", "zero1", "zero2", "zero3")
    }
    assert by["ddp"]["weights"] == pytest.approx(2 * 30.53e9 / GIB, rel=0.01)
    assert by["zero1"]["optimizer"] == by["ddp"]["optimizer"] / 64
    assert (
        by["zero2"]["gradients"] == by["ddp"]["gradients"] / 64
        and by["zero1"]["gradients"] == by["ddp"]["gradients"]
    )
    assert (
        by["zero3"]["weights"] == by["ddp"]["weights"] / 64 and by["zero2"]["weights"] == by["ddp"]["weights"]
    )
    assert plan(stage(), QWEN3_30B_A3B, 64).fits is False  # without checkpointing
    assert plan(stage(gradient_checkpointing=True), QWEN3_30B_A3B, 64).fits
    assert not plan(stage(gradient_checkpointing=True), QWEN3_30B_A3B, 64, sharding="ddp").fits


def test_hours_follow_from_flops() -> None:
    one = plan(stage(), QWEN3_06B, 16, "a100", mfu=0.5)
    assert one.tokens == 1000 * 2**20
    assert one.hours == pytest.approx(one.flops / (16 * 312e12 * 0.5 * 3600))
    assert one.gpu_hours == pytest.approx(16 * one.hours)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gpus": 8, "gpu": "tpu"}, "gpu is 'tpu'; allowed: a100"),
        ({"gpus": 8, "sharding": "zero4"}, r"sharding is 'zero4' .did you mean 'zero3'..; allowed: ddp"),
        ({"gpus": 3}, "not a multiple of 24576"),
        ({"gpus": 0}, "not a multiple"),
        ({"gpus": 8, "mfu": 1.5}, "mfu is 1.5"),
    ],
)
def test_bad_requests(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        plan(stage(), Qwen3Config(**TINY), **options)


@pytest.mark.parametrize("name", ["qwen3_0.6b", "qwen3_8b", "qwen3_30b_a3b"])
def test_shipped_configurations_are_those_models(name: str) -> None:
    config = read_config(SCALE / "models" / f"{name}.json", new_ids=1000)
    assert config.vocab_size == 151_936 + 1000
    size = float(name.split("_")[1].removesuffix("b"))
    assert count(meta_model(config)).total == pytest.approx(size * 1e9, rel=0.04)


@pytest.mark.parametrize("name", ["0.6b_dense", "8b_dense", "30b_a3b_moe"])
def test_scale_recipes_fit_their_gpus(name: str) -> None:
    recipe = TrainConfig.load(SCALE / f"{name}.yaml")
    assert recipe.backbone is not None
    bare, config = read_config(recipe.backbone.config), planned_start(recipe)[0]
    codes = 2 * 32_768 + 8 * 2048  # Emu3's twice, Mimi's
    assert codes < config.vocab_size - bare.vocab_size < codes + 100  # and control ids
    gpus = recipe.distributed.world_size
    found = plan(recipe, config, gpus, "h100", sharding_of(recipe))
    assert found.fits and found.memory["optimizer"] * GIB == pytest.approx(
        12 * found.parameters.total / (gpus if recipe.distributed.engine != "ddp" else 1)
    )


def test_configurations_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="has no model_type"):
        read_config(tmp_path / "config.json")
    (tmp_path / "model").mkdir()
    with pytest.raises(ConfigError, match="has no model configuration"):
        read_config(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"no folder '\S+/modell' \(did you mean '\S+/model'\?\)"):
        read_config(tmp_path / "modell")
    with pytest.raises(ConfigError, match=r"'mni' \(did you mean 'mini'\?\)"):
        read_config("mni")


def test_the_bundled_model_is_planned_by_its_name() -> None:
    model = anytoken.load("mini").lm
    counts = count(meta_model(read_config("mini")))
    assert counts.total == sum(one.numel() for one in model.parameters())
    assert counts.active == model.num_active_parameters()


@pytest.mark.parametrize("settings", [{}, {"experts": False, "new_rows": []}, {"router": True, "r": 4}])
def test_an_adapter_is_counted_as_peft_builds_it(settings: dict[str, Any]) -> None:
    recipe = TrainConfig.load(
        STAGES / "lora.yaml", [f"lora.{key}={value}" for key, value in settings.items()]
    )
    config, space = planned_start(recipe)
    found = plan(recipe, config, 1, sharding="ddp", space=space)
    model = anytoken.load("mini").lm
    total, active = sum(one.numel() for one in model.parameters()), model.num_active_parameters()
    assert recipe.lora is not None
    adapted = add_lora(model, recipe.lora, space)
    trained = sum(one.numel() for one in adapted.parameters() if one.requires_grad)
    assert (found.parameters.trained, found.parameters.total) == (trained, total + trained)
    assert active < found.parameters.active <= active + trained
    assert found.memory["optimizer"] * GIB == pytest.approx(12 * trained)
    assert found.memory["gradients"] * GIB == pytest.approx(2 * trained)
    full = TrainConfig.from_dict(recipe.model_dump() | {"lora": None})
    bound = 0.85 if settings else 0.9  # adapters of eight narrow experts cost more
    assert found.flops < bound * plan(full, config, 1, sharding="ddp", space=space).flops


def test_an_adapter_of_experts_keeps_their_sum_with_it() -> None:
    """Bytes that autograd saves of a step, with and without experts in the adapter."""
    spec = {"r": 2, "new_rows": []}
    sizes = TINY_MOE | {"num_experts": 16, "moe_intermediate_size": 64}
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**sizes))
    planned = plan(stage(lora=spec), model.config, 1, sharding="ddp").memory["adapted experts"] * GIB
    saved = []
    for experts in (False, True):
        adapted = add_lora(copy.deepcopy(model), LoraSpec(**spec, experts=experts), TokenSpace(96))
        owned = {one.untyped_storage().data_ptr() for one in adapted.parameters()}
        kept: dict[int, torch.Tensor] = {}

        def keep(
            tensor: torch.Tensor, owned: set[int] = owned, kept: dict[int, torch.Tensor] = kept
        ) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in owned:
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            adapted(torch.zeros(1, 4, dtype=torch.long), use_cache=False)
        saved.append(sum(one.untyped_storage().nbytes() for one in kept.values()))
    assert planned == pytest.approx((saved[1] - saved[0]) / 2, rel=0.1)  # float32 here, 2 bytes in a plan


def test_rows_of_a_bare_configuration_are_not_known() -> None:
    with pytest.raises(ConfigError, match=r"number of rows of text cannot.*lora.new_rows=\[\]"):
        plan(stage(lora={"new_rows": ["text"]}), Qwen3MoeConfig(**TINY_MOE), 1)


def test_a_model_from_scratch_is_planned_without_weights(recipe: dict[str, Any], world: Path) -> None:
    config, space = planned_start(TrainConfig.from_dict(recipe))
    _, model = build_model(TrainConfig.from_dict(recipe))
    assert count(meta_model(config)).total == sum(one.numel() for one in model.parameters())
    assert list(space.modality_names) == ["text", "tile", "beep"]
    recipe["tokenizers"]["tile"] = str(world / "nowhere")
    with pytest.raises(ConfigError, match=r"missing.*nowhere"):
        planned_start(TrainConfig.from_dict(recipe))


def test_the_command_plans_an_adapter() -> None:
    found = CliRunner().invoke(app, ["plan", "stages/lora.yaml", "--json"])
    assert found.exit_code == 0, found.output
    counts = json.loads(found.stdout)["parameters"]
    assert 0 < counts["trained"] < 0.2 * counts["total"]


def measured_file(path: Path, **facts: Any) -> Path:
    def row(shape: str, share: float, total: float, active: float, **more: Any) -> dict[str, Any]:
        return {
            "case": f"{shape}, {share}", "status": "measured", "side": "ours", "shape": shape, "plan_share": share,
            "M parameters": total, "M active": active, "context": 8192,
        } | more  # fmt: skip

    rows = [
        row("350M dense", 0.31, 570, 570), row("350M dense", 0.36, 570, 570), row("8B cut", 0.52, 2500, 2500),
        row("8B cut", 0.99, 2500, 2500, side="stock"), row("8B cut", 0.98, 2500, 2500, status="failed"),
        row("MoE", 0.21, 1070, 370),
    ]  # fmt: skip
    path.write_text(json.dumps({"gpu": "h200", "parts": {"train": {"rows": rows}}} | facts))
    return path


def test_a_measured_share_replaces_the_assumption(tmp_path: Path) -> None:
    file = measured_file(tmp_path / "gpu.json")
    for config, share, case in (
        (QWEN3_06B, 0.36, "350M dense, 0.36"),  # the nearest shape in its fastest setting
        (QWEN3_30B_A3B, 0.21, "MoE, 0.21"),
    ):
        one = plan(stage(), config, 8, "h200", mfu=file)
        assert one.share.value == share
        assert one.share.source == f"measured on h200: {case}, rows of 8192"
        assert one.gpu_hours == pytest.approx(one.flops / (989e12 * share * 3600))
        assert dict(as_rows(one, 8, "h200"))["MFU"] == f"{share}, {one.share.source}"
    assumed = dict(as_rows(plan(stage(), QWEN3_06B, 8), 8, "h100"))
    assert assumed["MFU"] == "0.4, assumed"


@pytest.mark.parametrize(
    ("facts", "gpu", "said"),
    [
        ({}, "h100", "was measured on h200, and the plan is for h100; give --gpu h200"),
        ({"gpu": None, "device": "x86_64"}, "h100", "measured on x86_64, whose peak is not known"),
        ({"parts": {}}, "h200", "no measured step of a model without experts"),
        ({"parts": 3}, "h200", "is not a file of `anytoken bench gpu`"),
    ],
)
def test_a_measurement_that_says_nothing_of_this_is_an_error(
    tmp_path: Path, facts: dict[str, Any], gpu: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        plan(stage(), QWEN3_06B, 8, gpu, mfu=measured_file(tmp_path / "gpu.json", **facts))
    with pytest.raises(ConfigError, match="does not exist; `anytoken bench gpu"):
        plan(stage(), QWEN3_06B, 8, gpu, mfu=tmp_path / "nothing.json")


def test_the_command_takes_the_file(tmp_path: Path) -> None:
    file = measured_file(tmp_path / "gpu.json")
    words = ["plan", "stages/scale/0.6b_dense.yaml", "--gpu", "h200", "--measured", str(file), "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["share"]["value"] == 0.36
