"""Numeric equality of all attention, expert and loss implementations, by flash-attention's tolerance rule.

The rule: the error of an implementation in bf16 against a float32 reference is at most twice that of plain PyTorch in
bf16, plus a rounding. It applies to outputs and gradients on packed rows. On a CPU the same rule is used in float32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from anytoken.benchmarks.gpu_part import Part, Sizes
from anytoken.benchmarks.gpu_train import ATTENTION, Batch, our_config, packed_batch, usable
from anytoken.benchmarks.harness import Figures
from anytoken.model.modeling import AnyTokenForCausalLM
from anytoken.model.moe import PLAIN_LOOP, AnyTokenExperts
from anytoken.training.losses.linear_cross_entropy import linear_cross_entropy

TIMES, ROUNDING = 2.0, 1e-3  # the rule; ROUNDING is of the reference's largest value
NEEDS = 5.0
Results = dict[str, Tensor]  # outputs and gradients by name


def held(reference: Results, plain: Results, found: Results) -> Figures:
    """Figures of one implementation: the error of each result and that of plain PyTorch, and whether all are within
    tolerance."""
    row: Figures = {}
    within = True
    for name, exact in reference.items():
        error, allowed = ((one[name].double() - exact.double()).abs().max() for one in (found, plain))
        limit = TIMES * allowed + ROUNDING * exact.double().abs().max()
        within &= bool(error <= limit)
        row |= {f"error of {name}": float(error), f"plain's error of {name}": float(allowed)}
    return {"within": within} | row


def _tokens(lm: AnyTokenForCausalLM, batch: Batch, seed: Tensor) -> Results:
    """Hidden states of packed rows, and gradients of a random projection of them."""
    output = lm.model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    hidden = output.last_hidden_state
    (hidden.float() * seed).mean().backward()
    first = {name: lm.get_parameter(f"model.layers.0.self_attn.{name}_proj.weight").grad for name in "qkv"}
    return {
        "output": hidden.detach(),
        **{f"gradient of {name}": one for name, one in first.items() if one is not None},
    }


def attention_errors(part: Part, sizes: Sizes, name: str, width: int) -> Figures:
    """One attention implementation with heads of a width, on packed rows."""
    shape = {
        "hidden_size": 4 * width, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": width, "intermediate_size": 8 * width, "tie_word_embeddings": True,
    }  # fmt: skip
    length = min(sizes.context, 1024)
    small = Sizes(text=200, codes=80, context=length, samples=(length // 8, length // 2), grid=2)
    space = small.space()
    torch.manual_seed(0)
    exact = AnyTokenForCausalLM(our_config(shape, space, length)).to(part.device)
    exact.set_attn_implementation("eager")
    batch = packed_batch(small, space, 2, part.device)
    seed = torch.randn(2, length, 4 * width, device=part.device)
    plain, other = (copy.deepcopy(exact).to(torch.bfloat16) for _ in range(2))
    usable(other, name, part.device)
    return held(*(_tokens(lm, batch, seed) for lm in (exact, plain, other)))


def experts_errors(part: Part, sizes: Sizes, name: str) -> Figures:
    """One implementation of the experts, with the choices and weights of the router given."""
    count, chosen, tokens = (4, 2, 32) if sizes.is_tiny else (64, 8, 4096)
    shape = {
        "hidden_size": 64 if sizes.is_tiny else 1024, "num_experts": count, "num_experts_per_tok": chosen,
        "moe_intermediate_size": 32 if sizes.is_tiny else 256, "num_hidden_layers": 1,
    }  # fmt: skip
    torch.manual_seed(0)
    config = our_config(shape, sizes.space(), 64)
    exact = AnyTokenExperts(config).to(part.device)
    for one in exact.parameters():
        nn.init.normal_(one, std=0.05)
    states = torch.randn(tokens, config.hidden_size, device=part.device)
    weights, choices = torch.rand(tokens, count, device=part.device).softmax(-1).topk(chosen)

    def results(experts: AnyTokenExperts, forward: Callable[..., Tensor]) -> Results:
        dtype = experts.gate_up_proj.dtype
        output = forward(states.to(dtype), choices, weights.to(dtype))
        output.float().square().mean().backward()
        return {
            "output": output.detach(),
            "gradient of gate and up": experts.gate_up_proj.grad.detach(),
            "gradient of down": experts.down_proj.grad.detach(),
        }

    plain, other = (copy.deepcopy(exact).to(torch.bfloat16) for _ in range(2))
    other.config._experts_implementation = name
    return held(
        results(exact, partial(PLAIN_LOOP, exact)),
        results(plain, partial(PLAIN_LOOP, plain)),
        results(other, other),
    )


def loss_errors(part: Part, sizes: Sizes) -> Figures:
    """The chunked cross-entropy in bf16, against the plain softmax over all logits."""
    tokens, width, vocabulary = (32, 16, 64) if sizes.is_tiny else (2048, 256, 20_000)
    torch.manual_seed(0)
    states = torch.randn(tokens, width, device=part.device)
    head = torch.randn(vocabulary, width, device=part.device) / width**0.5
    targets = torch.randint(vocabulary, (tokens,), device=part.device)
    weights = torch.full((tokens,), 1 / tokens, device=part.device)

    def results(loss: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> Results:
        given = [one.detach().clone().to(dtype).requires_grad_() for one in (states, head)]
        value = loss(*given)
        value.backward()
        names = ("gradient of states", "gradient of head")
        gradients = {name: one.grad for name, one in zip(names, given, strict=True) if one.grad is not None}
        return {"output": value.detach(), **gradients}

    def plain(hidden: Tensor, rows: Tensor) -> Tensor:
        return F.cross_entropy((hidden @ rows.T).float(), targets)

    def ours(hidden: Tensor, rows: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, rows, targets, weights).loss

    return held(results(plain, torch.float32), results(plain, torch.bfloat16), results(ours, torch.bfloat16))


def bench_equality(part: Part, sizes: Sizes) -> None:
    """All implementations; one that cannot run here is skipped with the reason."""
    needs = 0.0 if sizes.is_tiny else NEEDS
    for width in (16,) if sizes.is_tiny else (64, 128):
        for name in ATTENTION:
            measure = partial(attention_errors, part, sizes, name, width)
            part.case(f"attention {name}, heads of {width}", needs, measure)
    for name in ("eager", *sorted(ALL_EXPERTS_FUNCTIONS.valid_keys())):
        part.case(f"experts {name}", needs, partial(experts_errors, part, sizes, name))
    part.case("chunked cross-entropy", needs, partial(loss_errors, part, sizes))
