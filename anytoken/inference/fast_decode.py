"""One decoding step of AnyTokenForCausalLM as a single function over the weights of its layers.

With one token per step, the modules of transformers are mostly overhead: for a small model on a CPU, matrix products
take a tenth of a step, and module calls, keyword arguments, cache objects, mask building, one-hot routing tables and
thirty small tensor operations per layer take the rest. Here a step is one function over plain tensors. Weights are
views: nothing is copied, and in-place changes take effect immediately.

What it gains over the forward of the model's own layers, with the same ids, on one CPU thread (`anytoken bench decode`,
docs/bench/decode.json): mini is 1.81 times as fast at batch 1 and 1.43 at batch 8, a random model of 112 M parameters
1.15 and 1.36. It is kept for mini; by the 112 M model at batch 1 alone, just under the limit of 1.150, it would go.

It is taken only for models whose every module is of a known type (an adapter's layers are not), and only after a few
tokens through both ways agreed; otherwise the model's own forward is used, and the log says why. Three things
differ from the modules, all up to rounding only. Query heads that share a key-value head are its query rows, so keys
are never repeated. A chosen expert's weights are indexed directly. Products of a few rows with a large matrix go by
blocks of the matrix, because MKL runs such a product on one thread but spreads a batch of them.

Shapes: S sequences, H hidden, G key-value heads, A query heads of each, E head size, K experts per token, T columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from anytoken.inference.cuda_graphs import StepGraphs
from anytoken.inference.kv_cache import COLUMNS, KeyValues, KVCache, forward_inputs
from anytoken.inference.weights import has_hooks
from anytoken.model.grid_positions import NOWHERE, Place
from anytoken.model.modeling import AnyTokenForCausalLM
from anytoken.model.moe import AnyTokenMoE, group_mask, run_experts
from anytoken.utils.device import sent

KNOWN = {  # where the types of modules that this file does the work of are defined
    "anytoken.model.modeling", "anytoken.model.moe", "anytoken.model.grid_positions",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "torch.nn.modules.container", "torch.nn.modules.linear", "torch.nn.modules.sparse",
}  # fmt: skip
BLOCKS = 4  # of a large matrix
LARGE = 1 << 18  # elements; below, one call is faster than a batch of calls
FEW = 16  # rows for which chosen experts are indexed one by one; more go through the model's own experts


# Ids, positions, rows, cos, sin, open experts, embeddings of places.
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


class Layer(NamedTuple):
    """Weights of one decoder layer; matrices as `blocked` gives them.

    dense: gate, up and down of the shared expert, or of a layer without routed experts. The router is the model's own
    module.
    """

    norm: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Tensor
    mlp_norm: Tensor
    router: nn.Module | None
    experts: Any
    gate_up: list[Tensor]
    down: list[Tensor]
    dense: tuple[Tensor, Tensor, Tensor] | None


class FlatDecoder:
    """A decoding step of one model; see the module's docstring. Created by `flat_decoder`."""

    def __init__(self, lm: PreTrainedModel) -> None:
        config, model = lm.config, lm.model
        self.kv_heads, self.head_dim = config.num_key_value_heads, model.layers[0].self_attn.head_dim
        self.eps, self.top_k = config.rms_norm_eps, config.num_experts_per_tok
        self.act: Any = ACT2FN[config.hidden_act]
        self.scaling = model.layers[0].self_attn.scaling
        self.embedding, self.norm = model.embed_tokens.weight, model.norm.weight
        self.layers = [_layer(one) for one in model.layers]
        self._compiled: Callable[..., Tensor] | None = None
        self.graphs: StepGraphs | None = None  # takes the steps that it can
        self._model = model
        self.grid_positions = model.grid_positions
        self.cos, self.sin = _rotary_table(model, COLUMNS)
        groups, device = group_mask(config), self.embedding.device
        everything = torch.arange(config.vocab_size, device=device)
        self.open = None if groups is None else groups.to(device)[model.modality_of(everything)]

    def step(
        self,
        ids: list[int],
        positions: list[int],
        cache: KVCache,
        start: int,
        code_places: Sequence[Place] | None = None,
    ) -> Tensor:
        """Feed one id to each of the rows from `start` on; the last hidden state [S, H], normed, of each.

        code_places: [S, 4], needed for a model with grid positions.
        """
        if (
            self.graphs is not None
            and not start
            and (found := self.graphs.step(ids, positions, cache, code_places)) is not None
        ):
            return found
        inputs, length = self._inputs(ids, positions, cache, start, code_places), max(positions) + 1
        if self._compiled is None or start:
            read, mask = cache.views(start, start + len(ids), length)
            return self.forward(*inputs, cache.keys, cache.values, read, mask)
        with torch.compiler.set_stance("eager_on_recompile"):  # what was not warmed is never waited for
            return self._compiled(*inputs, cache.keys, cache.values, cache.seen, cache.sight(length))

    def compile(self) -> None:
        """Compile the step for one row and for several, and wait for it; RuntimeError if that fails."""
        compiled = torch.compile(self._first_rows, fullgraph=True, dynamic=True)
        weight = self.embedding
        for layer in self.layers:
            for part in (layer.q, layer.k, layer.v, layer.o, *(layer.dense or ())):
                torch._dynamo.mark_static(part)  # a view would else be compiled for any size
        empty = weight.new_zeros(self.kv_heads, 0, self.head_dim)
        several = torch._dynamo.config.patch(recompile_limit=1 << 16)  # models of one process count together
        with torch.inference_mode(), several:
            for rows in (1, 2):
                cache = KVCache(weight.device, weight.dtype)
                cache.reserve(4, 2 * COLUMNS)  # no two sizes alike: equal ones would be taken for one
                cache.write_row(0, [(empty, empty)] * len(self.layers), 0)
                for stored in (*cache.keys, *cache.values):
                    torch._dynamo.mark_static(stored, [1, 3])
                for position in (0, COLUMNS):
                    inputs = self._inputs([0] * rows, [position] * rows, cache, 0, [NOWHERE] * rows)
                    compiled(*inputs, cache.keys, cache.values, cache.seen, cache.sight(position + 1))
        self._compiled = compiled

    def reach(self, length: int) -> None:
        """Extend the rotary table to this number of positions."""
        if length > len(self.cos):
            self.cos, self.sin = _rotary_table(self._model, 2 * length)

    def _inputs(
        self,
        ids: list[int],
        positions: list[int],
        cache: KVCache,
        start: int,
        code_places: Sequence[Place] | None = None,
    ) -> Inputs:
        device, length = self.embedding.device, max(positions) + 1
        self.reach(length)
        tokens, where = sent(ids, device, torch.long), sent(positions, device, torch.long)
        rows = torch.arange(start, start + len(ids), device=device)
        cache.seen[rows, 0, 0, where] = 0
        open_ = None if self.open is None else self.open[tokens]
        placed = None
        if self.grid_positions is not None:
            assert code_places is not None, "the model has grid positions: give code_places"
            placed = self.grid_positions(sent(code_places, device, torch.long))
        return tokens, where, rows, self.cos[where], self.sin[where], open_, placed

    def _first_rows(
        self, ids: Tensor, positions: Tensor, rows: Tensor, cos: Tensor, sin: Tensor, open_: Tensor | None,
        placed: Tensor | None, keys: list[Tensor], values: list[Tensor], seen: Tensor, sight: int,
    ) -> Tensor:  # fmt: skip
        """`forward` for the compiler, which writes in place only to whole tensors and copies views."""
        many = len(ids)
        read = [(k[:many, :, :sight], v[:many, :, :sight]) for k, v in zip(keys, values, strict=True)]
        mask = seen[:many, ..., :sight]
        return self.forward(ids, positions, rows, cos, sin, open_, placed, keys, values, read, mask)

    def forward(
        self, ids: Tensor, positions: Tensor, rows: Tensor, cos: Tensor, sin: Tensor, open_: Tensor | None,
        placed: Tensor | None, keys: list[Tensor], values: list[Tensor], read: KeyValues, mask: Tensor,
    ) -> Tensor:  # fmt: skip
        """Hidden states [S, H] of ids [S]; writes to the cache's `keys` and `values`, and reads its views `read`.

        positions and rows int64 [S], cos and sin [S, 1, E], open experts bool [S, choices], mask [S, 1, 1, T],
        placed [S, H], the embeddings of places.
        """
        hidden = F.embedding(ids, self.embedding)
        if placed is not None:
            hidden = hidden + placed
        for layer, to_keys, to_values, (k, v) in zip(self.layers, keys, values, read, strict=True):
            normed = self._norm(hidden, layer.norm)
            query = self._turned(self._heads(product(normed, layer.q)), layer.q_norm, cos, sin)
            key = self._turned(self._heads(product(normed, layer.k)), layer.k_norm, cos, sin)
            to_keys[rows, :, positions] = key
            to_values[rows, :, positions] = self._heads(product(normed, layer.v))
            query = query.view(len(ids), self.kv_heads, -1, self.head_dim)
            heard = F.scaled_dot_product_attention(query, k, v, attn_mask=mask, scale=self.scaling)
            hidden = hidden + product(heard.reshape(len(ids), -1), layer.o)
            hidden = hidden + self._mlp(self._norm(hidden, layer.mlp_norm), layer, open_)
        return self._norm(hidden, self.norm)

    def _norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(hidden, weight.shape, weight, self.eps)

    def _heads(self, flat: Tensor) -> Tensor:
        return flat.view(len(flat), -1, self.head_dim)

    def _turned(self, heads: Tensor, norm: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        """QK-norm and rotary embedding of heads [S, ..., E]; sin includes the sign of the rotation."""
        heads = heads if norm is None else self._norm(heads, norm)
        return torch.addcmul(heads * cos, heads.roll(self.head_dim // 2, -1), sin)

    def _mlp(self, hidden: Tensor, layer: Layer, open_: Tensor | None) -> Tensor:
        parts = []
        if layer.router is not None:
            _, weights, choices = layer.router(hidden, open_)
            if torch.compiler.is_compiling():
                parts.append(_gathered(hidden, layer.experts, self.act, choices, weights))
            elif len(hidden) > FEW or hidden.device.type != "cpu":
                parts.append(
                    run_experts(layer.experts, hidden, choices.clamp(max=len(layer.gate_up)), weights)
                )
            else:
                parts.append(self._routed(hidden, layer, choices.tolist(), weights))
        if layer.dense is not None:
            gate, up, down = layer.dense
            parts.append(product(self.act(product(hidden, gate)) * product(hidden, up), down))
        return sum(parts[1:], parts[0])

    def _routed(self, hidden: Tensor, layer: Layer, chosen: list[list[int]], weights: Tensor) -> Tensor:
        """The chosen experts' weighted sum [S, H]; rows with the same experts are computed together.

        Contiguous rows are a view: only scattered rows are gathered, since that costs more than the product of a row.
        """
        if all(row == chosen[0] for row in chosen):
            return self._together(hidden, layer, chosen[0], weights)
        if len(chosen) == 2:  # guidance: a row with the prompt and one without
            apart = zip(hidden.split(1), chosen, weights.split(1), strict=True)
            return torch.cat([self._together(row, layer, experts, share) for row, experts, share in apart])
        members: dict[int, list[int]] = {}
        for place, expert in enumerate(expert for row in chosen for expert in row):
            if expert < len(layer.gate_up):  # the others are null experts
                members.setdefault(expert, []).append(place)
        flat, routed = weights.view(-1, 1), torch.zeros_like(hidden)
        for expert, at in members.items():
            rows = torch.tensor([place // self.top_k for place in at])
            routed.index_add_(0, rows, self._expert(hidden[rows], layer, expert) * flat[torch.tensor(at)])
        return routed

    def _together(self, hidden: Tensor, layer: Layer, experts: list[int], weights: Tensor) -> Tensor:
        """The weighted sum [S, H] of experts that all the rows chose; weights [S, K]."""
        parts = [
            self._expert(hidden, layer, expert) * weights[:, place : place + 1]
            for place, expert in enumerate(experts)
            if expert < len(layer.gate_up)
        ]
        return sum(parts[1:], parts[0]) if parts else torch.zeros_like(hidden)

    def _expert(self, hidden: Tensor, layer: Layer, expert: int) -> Tensor:
        gate, up = product(hidden, layer.gate_up[expert]).chunk(2, dim=-1)
        return product(self.act(gate) * up, layer.down[expert])


def _gathered(hidden: Tensor, experts: Any, act: Any, chosen: Tensor, weights: Tensor) -> Tensor:
    """The chosen experts' weighted sum in a form that the compiler fuses: the lookup becomes part of the product's
    loop.

    A null expert has weight zero, so any expert may be read for it.
    """
    chosen = chosen.clamp(max=len(experts.gate_up_proj) - 1)
    gate, up = (experts.gate_up_proj[chosen] * hidden[:, None, None]).sum(-1).chunk(2, dim=-1)  # [S, K, I]
    parts = (experts.down_proj[chosen] * (act(gate) * up)[:, :, None]).sum(-1)
    return (parts * weights[..., None]).sum(1)


def flat_decoder(lm: PreTrainedModel) -> tuple[FlatDecoder | None, str]:
    """The flat step of a model, or None and the reason to use its own forward pass."""
    if type(lm) is not AnyTokenForCausalLM:
        return None, "it is another architecture"
    for name, module in lm.named_modules():
        if type(module).__module__ not in KNOWN and not name.endswith("act_fn"):
            return None, f"{name} is a {type(module).__name__}"
        if has_hooks(module):
            return None, f"{name or 'the model'} has hooks"
    config = lm.config
    if config.attention_bias or config.sliding_window is not None:
        return None, "its attention has biases or a sliding window"
    if config.qk_norm == "projection":
        return None, "it normalises queries and keys over all heads"
    if config.rope_parameters["rope_type"] in ("dynamic", "longrope"):
        return None, "its rotary embedding depends on the length of the sequence"
    decoder = FlatDecoder(lm)
    return (decoder, "") if _agrees(decoder, lm) else (None, "the two ways disagree on a few tokens")


@torch.inference_mode()
def _agrees(decoder: FlatDecoder, lm: PreTrainedModel) -> bool:
    ids = [0, 1, lm.config.vocab_size - 1]
    weight = decoder.embedding
    caches = [KVCache(weight.device, weight.dtype) for _ in range(2)]
    for position, token in enumerate(ids):
        place = (1, 1, 1, 1) if decoder.grid_positions is not None else None
        inputs, _ = forward_inputs(lm, [[token]], [[position]], caches[0], 0, place and [[place]])
        expected = lm.model(**inputs).last_hidden_state[:, -1]
        if not position:  # the storage of the other cache is made by a first write
            caches[1].write_row(0, caches[0].read_row(0, 1), 1)
        found = decoder.step([token], [position], caches[1], 0, place and [place])
    tolerance = 1e-3 if weight.dtype in (torch.float32, torch.float64) else 5e-2
    return torch.allclose(found, expected, rtol=tolerance, atol=tolerance)


def blocked(weight: Tensor) -> Tensor:
    """A matrix [N, K] as `product` takes it: itself, or if it is large a view [BLOCKS, K, N / BLOCKS]."""
    rows, columns = weight.shape
    if weight.device.type != "cpu" or rows * columns < LARGE or rows % BLOCKS or not weight.is_contiguous():
        return weight
    return weight.view(BLOCKS, rows // BLOCKS, columns).transpose(1, 2)


def product(rows: Tensor, weight: Tensor) -> Tensor:
    """rows [S, K] times the transpose of a `blocked` matrix [N, K]: [S, N]."""
    if weight.ndim == 2:
        return F.linear(rows, weight)
    parts = torch.bmm(rows.expand(BLOCKS, *rows.shape), weight)
    return parts.view(1, -1) if len(rows) == 1 else parts.transpose(0, 1).reshape(len(rows), -1)


@torch.no_grad()
def _layer(layer: Any) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    routed = isinstance(mlp, AnyTokenMoE)
    dense = mlp.shared_expert if routed else mlp
    experts = mlp.experts if routed else None
    return Layer(
        norm=layer.input_layernorm.weight,
        q=blocked(attention.q_proj.weight),
        k=blocked(attention.k_proj.weight),
        v=blocked(attention.v_proj.weight),
        q_norm=getattr(attention.q_norm, "weight", None),
        k_norm=getattr(attention.k_norm, "weight", None),
        o=blocked(attention.o_proj.weight),
        mlp_norm=layer.post_attention_layernorm.weight,
        router=mlp.gate if routed else None,
        experts=experts,
        gate_up=[blocked(one) for one in experts.gate_up_proj] if experts else [],
        down=[blocked(one) for one in experts.down_proj] if experts else [],
        dense=dense
        and tuple(blocked(getattr(dense, name).weight) for name in ("gate_proj", "up_proj", "down_proj")),
    )


def _rotary_table(model: Any, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin of all positions, [length, 1, E]; the first half of sin negative, where rotation subtracts."""
    weight = model.embed_tokens.weight
    positions = torch.arange(length, device=weight.device)[None]
    cos, sin = model.rotary_emb(weight[:1, None], positions)
    half = sin.shape[-1] // 2
    return cos[0, :, None], torch.cat([-sin[0, :, None, :half], sin[0, :, None, half:]], dim=-1)
