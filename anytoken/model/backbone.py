"""Use a transformers language model as the backbone: its vocabulary is extended, its text logits do not change.

A backbone that is expressible becomes an `AnyTokenForCausalLM` with the same weights: Llama, Mistral, Qwen2, Qwen3,
OLMoE and Qwen3-MoE differ from each other in QK-norm, biases, the window and which layers have experts, which are
settings of `AnyTokenConfig`. So everything that is made for our model (expert groups, losses, export) holds for
it too, and one class is saved and loaded. What is expressible is not a list of names: the weights must have a
place each and the logits must come out the same, else the backbone stays what it is, with appended rows. That is
shorter than a second set of classes, and it cannot be silently wrong.

Dense feed-forward layers can be upcycled to experts (sparse upcycling, arXiv 2212.05055): every expert begins as a
copy of the layer and the weights of the chosen ones add up to one, so nothing changes until training.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from anytoken.model.configuration import AnyTokenConfig
from anytoken.model.embedding_init import appended_rows
from anytoken.model.modeling import AnyTokenForCausalLM
from anytoken.processor import Processor
from anytoken.token_space import TokenSpace
from anytoken.tokenizers.base import ModalityTokenizer
from anytoken.tokenizers.text import TextTokenizer
from anytoken.utils.errors import CheckpointError
from anytoken.utils.hints import no_such_model

TOLERANCE = 1e-4  # of logits, relative to their size: float32 sums in another order
COPIED = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "rope_parameters",
    "attention_dropout", "tie_word_embeddings",
)  # fmt: skip


def load_backbone(source: str | Path) -> tuple[PreTrainedModel, TextTokenizer]:
    """A folder, a hub id or a .gguf file as a float32 model and its tokenizer; CheckpointError if it is neither."""
    path, settings = str(source), {}
    if path.endswith(".gguf"):
        path, settings = str(Path(path).parent), {"gguf_file": Path(path).name}
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **settings)
        tokenizer = AutoTokenizer.from_pretrained(path, **settings)
    except (OSError, ValueError, ImportError, KeyError) as error:
        if not Path(path).exists():
            raise CheckpointError(f"{no_such_model(source)} ({type(error).__name__}).") from error
        raise CheckpointError(f"{source} does not load as a causal language model: {error}") from error
    if not tokenizer.is_fast:
        raise CheckpointError(f"{source} has no tokenizer.json, which is needed to encode text.")
    return model.eval(), TextTokenizer.adopt(tokenizer.backend_tokenizer)


def adopt_backbone(
    source: str | Path, tokenizers: Mapping[str, ModalityTokenizer], upcycle: int = 0, top_k: int = 2
) -> tuple[PreTrainedModel, Processor]:
    """A backbone with the ids of every tokenizer's codes appended, and the processor of the new vocabulary.

    Logits of the old ids are the backbone's (in float32 to a relative 1e-5). upcycle: convert every dense feed-forward
    layer to this number of experts, `top_k` per token; 0 is off. CheckpointError says what does not fit.
    """
    backbone, text = load_backbone(source)
    rows = len(backbone.get_input_embeddings().weight)
    if text.vocab_size > rows:
        raise CheckpointError(
            f"The tokenizer of {source} has {text.vocab_size} ids but the model {rows} rows."
        )
    space = TokenSpace(rows, text_ranges=text.ranges)
    for name, tokenizer in tokenizers.items():
        space.append_modality(name, tokenizer.codebook_sizes, tokenizer.shape, tokenizer.global_codebook_size)
    ends = _end_ids(backbone)
    lm: PreTrainedModel
    try:
        lm = express(backbone, upcycle, top_k)
    except CheckpointError:
        if upcycle or not _head_is_plain(backbone):
            raise
        lm = backbone
    _append_rows(lm, space, tokenizers, _first(backbone.config.bos_token_id), _first(ends))
    _tell_config(lm, space, ends)
    return lm, Processor(space, text, tokenizers)


@torch.no_grad()
def express(backbone: PreTrainedModel, upcycle: int = 0, top_k: int = 2) -> AnyTokenForCausalLM:
    """The backbone's weights in our own class, with the same logits; CheckpointError if it cannot express them."""
    if upcycle and not 2 <= top_k <= upcycle:
        raise CheckpointError(
            f"top_k must be from 2 to upcycle={upcycle} (the weight of a single expert would always be one, and "
            f"its router would learn nothing); received {top_k}."
        )
    weights = {name: tensor.float() for name, tensor in backbone.state_dict().items()}
    lm = AnyTokenForCausalLM(AnyTokenConfig(**_settings(backbone, weights, upcycle, top_k))).eval()
    if upcycle:
        weights = _as_experts(weights, upcycle)
    report = lm.load_state_dict(weights, strict=False)
    missing = []
    for name in report.missing_keys:
        if name.endswith("o_proj.bias"):  # Qwen2 has biases on queries, keys and values alone
            nn.init.zeros_(lm.get_parameter(name))
        elif not (upcycle and name.endswith("mlp.gate.weight")):
            missing.append(name)
    kind = type(backbone).__name__
    lost = [*missing, *report.unexpected_keys]
    if lost:
        raise CheckpointError(
            f"{kind} has weights that AnyToken's decoder has not, or lacks some: {lost[0]} ({len(lost)} in all)."
        )
    ids = torch.randint(
        len(weights["model.embed_tokens.weight"]), (1, 33), generator=torch.Generator().manual_seed(0)
    )
    expected, got = (model(input_ids=ids, use_cache=False).logits for model in (backbone, lm))
    error = ((got - expected).abs().max() / expected.abs().max()).item()
    if not error < TOLERANCE:
        raise CheckpointError(
            f"{kind} computes different logits than AnyToken's decoder: the difference is {error:.1e}."
        )
    return lm


def _settings(
    backbone: PreTrainedModel, weights: Mapping[str, Tensor], upcycle: int, top_k: int
) -> dict[str, Any]:
    """The configuration of our decoder for the backbone's weights, from their names and shapes."""
    config = backbone.config.get_text_config()
    first = "model.layers.0.self_attn."
    if f"{first}q_proj.weight" not in weights:
        raise CheckpointError(
            f"{type(backbone).__name__} does not use the weight names of Llama-like models."
        )
    if len(set(getattr(config, "layer_types", None) or [""])) > 1:
        raise CheckpointError(f"{type(backbone).__name__} mixes layers of several kinds of attention.")
    heads = config.num_attention_heads
    head_dim = len(weights[f"{first}q_proj.weight"]) // heads
    norm = weights.get(f"{first}q_norm.weight")
    qk_norm = "none" if norm is None else "head" if len(norm) == head_dim else "projection"
    window = getattr(config, "sliding_window", None)
    settings = {key: getattr(config, key) for key in COPIED if hasattr(config, key)}
    settings |= {
        "vocab_size": len(weights["model.embed_tokens.weight"]),
        "head_dim": head_dim,
        "qk_norm": qk_norm,
        "attention_bias": f"{first}q_proj.bias" in weights,
        "use_sliding_window": window is not None,
        "sliding_window": window,
    }
    experts = [name for name in weights if name.endswith("mlp.experts.gate_up_proj")]
    dense = [
        i for i in range(config.num_hidden_layers) if f"model.layers.{i}.mlp.gate_proj.weight" in weights
    ]
    if upcycle:
        if experts:
            raise CheckpointError(f"{type(backbone).__name__} has experts already; leave upcycle out.")
        width = config.intermediate_size
        return settings | _expert_settings(upcycle, top_k, width, True, [])
    if not experts:
        return settings | {"mlp_only_layers": dense}
    number, width = weights[experts[0]].shape[0], weights[experts[0]].shape[1] // 2
    return settings | _expert_settings(
        number, config.num_experts_per_tok, width, config.norm_topk_prob, dense
    )


def _expert_settings(number: int, top_k: int, width: int, norm: bool, dense: list[int]) -> dict[str, Any]:
    return {
        "num_experts": number,
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": width,
        "norm_topk_prob": norm,
        "mlp_only_layers": dense,
    }


def _as_experts(weights: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """Every dense feed-forward layer as `number` equal experts: gate and up [2I, H] in one, down [H, I]."""
    found = {name: tensor for name, tensor in weights.items() if ".mlp." not in name}
    for name in weights:
        if name.endswith("mlp.gate_proj.weight"):
            layer = name.removesuffix("gate_proj.weight")
            gate_up = torch.cat([weights[name], weights[f"{layer}up_proj.weight"]])
            found[f"{layer}experts.gate_up_proj"] = gate_up.expand(number, -1, -1)
            found[f"{layer}experts.down_proj"] = weights[f"{layer}down_proj.weight"].expand(number, -1, -1)
        elif ".mlp." in name and not name.endswith(("up_proj.weight", "down_proj.weight")):
            found[name] = weights[name]  # a bias has no place in an expert: it will be reported
    return found


@torch.no_grad()
def _head_is_plain(lm: PreTrainedModel) -> bool:
    """Whether logits are the head's product with the last hidden state, as training assumes."""
    ids, head = torch.zeros(1, 2, dtype=torch.long), lm.get_output_embeddings()
    if head is None:
        return False
    hidden = lm.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return torch.allclose(head(hidden), lm(input_ids=ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def _append_rows(
    lm: PreTrainedModel,
    space: TokenSpace,
    tokenizers: Mapping[str, ModalityTokenizer],
    bos: int | None,
    end: int | None,
) -> None:
    """Append rows for the ids after the text; sequence start and end ids get the backbone's own rows."""
    first = space.text_size
    tables = [lm.get_input_embeddings().weight, lm.get_output_embeddings().weight]
    rows = appended_rows(lm, space, tokenizers, first)
    for table, new in zip(tables, rows, strict=True):
        for ours, theirs in ((space.bos, bos), (space.end, end)):
            if theirs is not None:
                new[ours - first] = table[theirs]
    if isinstance(lm, AnyTokenForCausalLM):
        lm.extend_vocabulary(space.vocab_size)
    else:
        lm.resize_token_embeddings(space.vocab_size, mean_resizing=False)
    lm.get_input_embeddings().weight[first:] = rows[0]
    lm.get_output_embeddings().weight[first:] = rows[1]


def _tell_config(lm: PreTrainedModel, space: TokenSpace, ends: list[int]) -> None:
    """Set our special ids; transformers' `generate` also stops at the backbone's end ids."""
    for config in (lm.config, lm.generation_config):
        config.bos_token_id, config.pad_token_id = space.bos, space.pad
        config.eos_token_id = [space.end, *ends]
    if isinstance(lm, AnyTokenForCausalLM):
        lm.config.modality_boundaries = space.bucket_boundaries()
        lm.config.modality_index = space.bucket_modalities()
        lm.config.modality_names = space.modality_names


def _end_ids(backbone: PreTrainedModel) -> list[int]:
    """The backbone's end ids; that of its chat template first, if they differ."""
    for config in (backbone.generation_config, backbone.config):
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            return list(found) if isinstance(found, list | tuple) else [found]
    return []


def _first(ids: int | list[int] | None) -> int | None:
    return (ids[0] if ids else None) if isinstance(ids, list) else ids
