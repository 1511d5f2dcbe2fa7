"""Estimate the cost of a stage on many GPUs: parameters, memory, FLOPs and hours, without allocating weights.

Parameters are counted on the model itself, built on PyTorch's meta device. Memory follows mixed-precision AdamW as
divided by ZeRO (arXiv 1910.02054): 2 bytes per weight, 2 per gradient, 12 of optimizer state (a float32 copy and two
moments). Activations are what a decoder layer keeps for its backward pass (arXiv 2205.05198) with an attention kernel
that keeps no score matrix, or one hidden state a layer with gradient checkpointing. With LoRA gradients and optimizer
are the adapter's alone, counted on PEFT's own model. FLOPs are the model's own: 2 a weight and token forward, 2 for the
gradient of the input, 2 for that of a trained weight, and causal attention over full contexts (an upper bound where
packed samples are shorter).
"""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from anytoken import recipes
from anytoken.model.configuration import AnyTokenConfig
from anytoken.processor import SPACE_FILE
from anytoken.token_space import TokenSpace
from anytoken.tokenizers.base import load_tokenizer
from anytoken.tokenizers.pretrained import KINDS
from anytoken.training.config import LoraSpec, TrainConfig
from anytoken.training.initialize import MINI, build_processor, checkpoint_folder
from anytoken.training.lora import add_lora
from anytoken.utils.errors import ConfigError
from anytoken.utils.hints import choices, no_such_model

# What is divided: + optimizer, + gradients, + weights.
SHARDING = {"ddp": 0, "zero1": 1, "zero2": 2, "zero3": 3, "fsdp": 3}
GIB = 2**30
WEIGHT, GRADIENT, OPTIMIZER = 2, 2, 12  # bytes per parameter
LOSS_TOKENS = 1024  # positions whose logits exist at a time


@dataclass(frozen=True)
class Gpu:
    """Memory in GiB and dense bf16 peak in TFLOP/s, from the vendor's data sheet."""

    memory_gib: float
    peak_tflops: float


GPUS = {
    "a100": Gpu(80, 312),
    "h100": Gpu(80, 989),
    "h200": Gpu(141, 989),
    "b200": Gpu(180, 2250),
    "l40s": Gpu(48, 362),
    "rtx4090": Gpu(24, 165),
}


@dataclass(frozen=True)
class Parameters:
    """Parameter counts: total, active per token, trained, trained and active, and used in lookups only."""

    total: int
    active: int
    trained: int
    trained_active: int
    lookup: int


@dataclass(frozen=True)
class Share:
    """The MFU (share of a GPU's peak) assumed for training, and its source."""

    value: float = 0.4
    source: str = "assumed"


@dataclass(frozen=True)
class CostEstimate:
    """A stage's cost. `memory` is GiB on one GPU by part; `hours` at `share` of the peak."""

    parameters: Parameters
    memory: dict[str, float]
    tokens: int
    flops: float
    hours: float
    gpu_hours: float
    fits: bool
    share: Share


def plan(
    stage: TrainConfig,
    config: PretrainedConfig,
    gpus: int,
    gpu: str = "h100",
    sharding: str = "zero3",
    mfu: float | Path = Share.value,
    space: TokenSpace | None = None,
) -> CostEstimate:
    """Cost of a stage with a model of this configuration.

    mfu: assumed, or the file of `anytoken bench gpu` that it was measured in (see `measured_share`). space:
    of the model, which says how many vocabulary rows are trained. ConfigError for an unknown GPU or sharding, a file
    without what is needed, a batch that the GPUs cannot share evenly, or ``lora.new_rows`` without a space.
    """
    if gpu not in GPUS:
        raise ConfigError(f"gpu is {gpu!r}{choices(gpu, GPUS)}")
    if sharding not in SHARDING:
        raise ConfigError(f"sharding is {sharding!r}{choices(sharding, SHARDING)}")
    if not isinstance(mfu, Path) and not 0 < mfu <= 1:
        raise ConfigError(f"mfu is {mfu}; give a share above 0 and at most 1")
    rows = stage.context * stage.gradient_accumulation_steps * gpus
    if gpus < 1 or stage.tokens_per_batch % rows:
        raise ConfigError(
            f"tokens_per_batch {stage.tokens_per_batch} is not a multiple of {rows}, which is context x "
            "gradient_accumulation_steps x gpus"
        )
    model = meta_model(config)
    parameters = (
        count(model, stage.trainable) if stage.lora is None else count_adapted(model, stage.lora, space)
    )
    share = measured_share(mfu, parameters, gpu) if isinstance(mfu, Path) else Share(mfu)
    memory = _memory(stage, model, parameters, gpus, sharding)
    tokens = stage.steps * stage.tokens_per_batch
    flops = tokens * flops_per_token(config, parameters, stage.context)
    gpu_hours = flops / (GPUS[gpu].peak_tflops * 1e12 * share.value) / 3600
    fits = sum(memory.values()) <= 0.92 * GPUS[gpu].memory_gib  # the rest is the driver's and fragmentation's
    return CostEstimate(parameters, memory, tokens, flops, gpu_hours / gpus, gpu_hours, fits, share)


def measured_share(path: Path, parameters: Parameters, gpu: str) -> Share:
    """The MFU that `anytoken bench gpu` measured with the most similar model.

    Models with experts are compared with steps with experts, dense ones with dense ones; of these, the shape nearest in
    active parameters is used, in its fastest setting. The value is `plan_share` in the file, by this module's FLOPs.
    ConfigError if the file holds no such row, or was measured on another GPU.
    """
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; `anytoken bench gpu --out {path}` writes it on a GPU")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = found["parts"].get("train", {"rows": []})["rows"]
        measured_on = found.get("gpu")
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is not a file of `anytoken bench gpu` ({error})") from None
    if measured_on is None:
        raise ConfigError(
            f"{path} was measured on {found.get('device')}, whose peak is not known; there are {', '.join(GPUS)}"
        )
    if measured_on != gpu:
        raise ConfigError(
            f"{path} was measured on {measured_on}, and the plan is for {gpu}; give --gpu {measured_on}"
        )
    ours = [row for row in rows if row.get("status") == "measured" and row.get("side") == "ours"]
    sparse = parameters.active < parameters.total
    alike = [row for row in ours if (row["M active"] < row["M parameters"]) == sparse]
    if not alike:
        raise ConfigError(
            f"{path} holds no measured step of a model {'with' if sparse else 'without'} experts; run "
            f"`anytoken bench gpu --part train --out {path}` again, or give --mfu"
        )
    nearest = min(alike, key=lambda row: abs(math.log(row["M active"] * 1e6 / parameters.active)))
    best = max((row for row in alike if row["shape"] == nearest["shape"]), key=lambda row: row["plan_share"])
    return Share(best["plan_share"], f"measured on {measured_on}: {best['case']}, rows of {best['context']}")


def sharding_of(stage: TrainConfig) -> str:
    """What a recipe's engine shards; ZeRO-3 for a recipe of one process, which does not specify it."""
    distributed = stage.distributed
    if distributed.deepspeed:
        settings = json.loads(recipes.find(distributed.deepspeed).read_text(encoding="utf-8"))
        return f"zero{settings['zero_optimization']['stage']}"
    if distributed.mesh is not None:
        return "fsdp"
    return "ddp" if distributed.world_size > 1 else "zero3"


def planned_start(stage: TrainConfig) -> tuple[PretrainedConfig, TokenSpace]:
    """Configuration and token space of a recipe's initial model, without downloads or weights.

    That is its checkpoint with the ``modalities`` it adds, its own model from scratch, or its backbone if there is no
    checkpoint yet. ConfigError if there is neither.
    """
    if stage.init_from == "scratch":
        space = build_processor(stage.tokenizers).token_space
        return AnyTokenConfig.from_token_space(space, **stage.model), space
    if stage.backbone is None or Path(stage.init_from).is_dir():
        folder = checkpoint_folder(stage.init_from)
        config, space = read_config(folder), TokenSpace.load(folder / SPACE_FILE)
        rows = space.vocab_size
        for kind, path in stage.modalities.items():
            added = load_tokenizer(path)
            space.append_modality(kind, added.codebook_sizes, added.shape, added.global_codebook_size)
        config.vocab_size += space.vocab_size - rows
        return config, space
    config = read_config(recipes.find(stage.backbone.config))
    space = TokenSpace(config.vocab_size)
    for kind, codec in stage.backbone.codecs.items():
        with torch.device("meta"):
            tokenizer = KINDS[kind](model_config=codec.config, **codec.settings)
        space.append_modality(kind, tokenizer.codebook_sizes, tokenizer.shape, tokenizer.global_codebook_size)
    config.vocab_size = space.vocab_size
    return config, space


def read_config(source: str | Path, new_ids: int = 0) -> PretrainedConfig:
    """A model's configuration from a .json file, a checkpoint folder or a hub id, with the vocabulary extended by
    `new_ids`."""
    path = MINI if source == "mini" else Path(source)
    if path.suffix == ".json" and path.is_file():
        settings = json.loads(path.read_text(encoding="utf-8"))
        if "model_type" not in settings:
            raise ConfigError(f"{path} has no model_type; give a transformers config.json")
        config = AutoConfig.for_model(**settings)
    else:
        try:
            config = AutoConfig.from_pretrained(str(path))
        except (OSError, ValueError) as error:
            if path.exists():
                raise ConfigError(f"{path} has no model configuration: {error}") from error
            raise ConfigError(no_such_model(source, ["mini"])) from error
    config.vocab_size += new_ids
    return config


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a configuration on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def count(model: PreTrainedModel, trainable: Sequence[str] = ("*",)) -> Parameters:
    """Count a model's parameters; `trainable` holds name patterns as in a recipe (rows:KIND counts as none)."""
    named = dict(model.named_parameters())  # a tied head is counted once
    total = sum(one.numel() for one in named.values())
    trained = [name for name in named if any(fnmatch.fnmatch(name, pattern) for pattern in trainable)]
    table = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is table
    return Parameters(
        total,
        _active(model, named),
        sum(named[name].numel() for name in trained),
        _active(model, {name: named[name] for name in trained}),
        0 if tied else table.numel(),
    )


def count_adapted(model: PreTrainedModel, spec: LoraSpec, space: TokenSpace | None) -> Parameters:
    """Count a model (on the meta device) with an adapter, the only trained part; the model is wrapped in place."""
    if space is None and spec.new_rows:
        raise ConfigError(
            f"the number of rows of {', '.join(spec.new_rows)} cannot be determined from a bare configuration; leave "
            "--model out, or set lora.new_rows=[]"
        )
    bare = count(model, [])
    adapted = add_lora(model, spec, space or TokenSpace(model.config.vocab_size))
    trained = {name: one for name, one in adapted.named_parameters() if one.requires_grad}
    size, active = sum(one.numel() for one in trained.values()), _active(model, trained)
    return Parameters(bare.total + size, bare.active + active, size, active, bare.lookup)


def _active(model: PreTrainedModel, named: dict[str, torch.nn.Parameter]) -> int:
    """The number of these parameters that are active per token: of routed experts only the selected ones."""
    experts = getattr(model.config, "num_experts", None) or getattr(model.config, "num_local_experts", 0)
    idle = sum(one.numel() for name, one in named.items() if ".experts." in name)
    idle = idle * (experts - model.config.num_experts_per_tok) // experts if experts else 0
    return sum(one.numel() for one in named.values()) - idle


def flops_per_token(config: PretrainedConfig, parameters: Parameters, context: int) -> float:
    """Training FLOPs of one token."""
    multiplied = parameters.active - parameters.lookup
    width = config.num_attention_heads * _head_dim(config)
    # Scores and values, causal, forward and backward.
    attention = 6 * config.num_hidden_layers * width * context
    return 4 * multiplied + 2 * min(parameters.trained_active, multiplied) + attention


def _head_dim(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _memory(
    stage: TrainConfig, model: PreTrainedModel, parameters: Parameters, gpus: int, sharding: str
) -> dict[str, float]:
    level = SHARDING[sharding]
    weights = parameters.total * WEIGHT
    gradients, optimizer = parameters.trained * GRADIENT, parameters.trained * OPTIMIZER
    tokens = stage.tokens_per_batch // (stage.gradient_accumulation_steps * gpus)
    parts = {
        "weights": weights / (gpus if level >= 3 else 1),
        "gradients": gradients / (gpus if level >= 2 else 1),
        "optimizer": optimizer / (gpus if level >= 1 else 1),
        "activations": _activations(model.config, tokens, stage.gradient_checkpointing),
        "loss": 2.0 * 4 * LOSS_TOKENS * model.config.vocab_size,
    }
    if stage.lora is not None and stage.lora.experts:
        # PEFT adds a routed expert's adapter to its weights and keeps the sum for the backward pass.
        experts = sum(
            one.numel()
            for name, one in model.named_parameters()
            if ".experts." in name and "lora_" not in name
        )
        layers = model.config.num_hidden_layers if stage.gradient_checkpointing else 1
        parts["adapted experts"] = WEIGHT * experts / layers
    if level >= 3:  # the layer at work and the next one are gathered whole
        layer = max(sum(one.numel() for one in block.parameters()) for block in _blocks(model))
        parts["gathered layers"] = 2.0 * WEIGHT * layer
    return {name: size / GIB for name, size in parts.items()}


def _blocks(model: PreTrainedModel) -> list[torch.nn.Module]:
    lists = [one for one in model.modules() if isinstance(one, torch.nn.ModuleList)]
    return [block for one in lists if len(one) == model.config.num_hidden_layers for block in one]


def _activations(config: PretrainedConfig, tokens: int, checkpointing: bool) -> float:
    """Bytes of bf16 activations for the backward pass of `tokens` tokens."""
    hidden, dim = config.hidden_size, _head_dim(config)
    kv = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    chosen = getattr(config, "num_experts_per_tok", None) or 1
    inner = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    inner = chosen * inner + (getattr(config, "shared_expert_intermediate_size", None) or 0)
    # Norm, q k v before and after RoPE, out.
    attention = 2 * hidden + dim * (3 * config.num_attention_heads + 4 * kv)
    feedforward = 3 * hidden + 4 * inner  # norm, gate, up, activation, product
    layer = 2.0 * tokens * (attention + feedforward)
    layers = config.num_hidden_layers
    return layer + 2.0 * tokens * hidden * layers if checkpointing else layer * layers


def as_rows(one: CostEstimate, gpus: int, gpu: str) -> list[tuple[str, str]]:
    """An estimate as rows of a table."""
    memory = sum(one.memory.values())
    counts = one.parameters
    return [
        ("parameters", _count(counts.total)),
        ("active parameters", _count(counts.active)),
        ("trained parameters", _count(counts.trained)),
        *((f"memory: {name}", f"{size:.2f} GiB") for name, size in one.memory.items()),
        (
            "memory a GPU",
            f"{memory:.1f} of {GPUS[gpu].memory_gib:.0f} GiB{'' if one.fits else ': does not fit'}",
        ),
        ("tokens", _count(one.tokens)),
        ("FLOPs", f"{one.flops:.2e}"),
        ("MFU", f"{one.share.value:.3g}, {one.share.source}"),
        ("hours", f"{one.hours:.2f} on {gpus} {gpu} ({one.gpu_hours:.1f} GPU hours)"),
    ]


def _count(number: float) -> str:
    exponent = min(4, int(math.log10(max(number, 1)) // 3))
    return f"{number / 1000**exponent:.4g} {['', 'k', 'M', 'B', 'T'][exponent]}".strip()
