"""Decoding against transformers' `generate`, and against hardware limits.

Both sides have the same weights and the same grammar, both are greedy, and their ids must agree; they alternate. The
models are the given one, the same with a large vocabulary (so few ids are allowed in an image), and a random model too
large for a core's cache.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from anytoken.benchmarks.harness import Figures, interleaved_timing, ratio_of_turns
from anytoken.inference.api import AnyToken
from anytoken.inference.engine import Engine
from anytoken.inference.kv_cache import KVCache
from anytoken.inference.request import GenerationRequest
from anytoken.inference.sampling import Sampling
from anytoken.model.configuration import AnyTokenConfig
from anytoken.model.modeling import AnyTokenForCausalLM
from anytoken.utils.errors import EvaluationError

GREEDY = Sampling(temperature=0)
ROWS = 8
PROMPT = 256  # ids that a first event waits for
LIMIT = 96  # ids of a reply
GUIDED_ROUNDS = 8  # of guidance a repeat: its two sides are so near that a few rounds say little


@dataclass(frozen=True)
class Sizes:
    """What is measured: vocabulary of the large head; width and layers of the large model; contexts of the curve."""

    vocabulary: int = 150_000
    width: int = 768
    layers: int = 12
    contexts: tuple[int, ...] = (128, 512, 1024, 2048, 4096)


class Subject:
    """One model under test: the same images by our engine and by transformers."""

    def __init__(self, model: AnyToken, kind: str, prompt: str) -> None:
        self.model, self.kind, self.prompt = model, kind, prompt
        self.ids = model.encode_prompt(prompt)
        self.engine = Engine(model.lm, model.processor.grammar)
        self.tokens = len(self.ours()[0])

    def ours(self, rows: int = 1, cfg_scale: float = 1.0, engine: Engine | None = None) -> list[list[int]]:
        """Ids of this number of replies."""
        sampling, null = {self.kind: replace(GREEDY, cfg_scale=cfg_scale)}, self.model.processor.null_prompt()
        request = GenerationRequest(self.ids, (self.kind,), sampling, LIMIT, null_prompt=null)
        return [one.ids for one in (engine or self.engine).generate([request] * rows)]

    def transformers(self, rows: int = 1) -> list[list[int]]:
        """The same with transformers' `generate` and a dynamic cache."""
        inputs = self.model.lm_inputs([self.prompt] * rows, self.kind, batch=True, max_new_tokens=LIMIT)
        output = self.model.lm.generate(**inputs, do_sample=False)[:, len(self.ids) :].tolist()
        end = self.model.token_space.end
        return [row[: row.index(end) + 1] for row in output]


def bench_generate(model: AnyToken, kind: str, prompt: str, repeats: int, sizes: Sizes) -> Figures:
    """All comparisons; EvaluationError if the two sides' ids differ."""
    wide = with_lm(model, copy.deepcopy(model.lm))
    wide.lm.extend_vocabulary(max(sizes.vocabulary, wide.lm.config.vocab_size))
    large = with_lm(model, large_lm(model, sizes))
    name = f"{large.lm.num_parameters() / 1e6:.0f} M"
    small, big = Subject(model, kind, prompt), Subject(large, kind, prompt)
    rows = [
        *_beside_transformers("the model", small, repeats, (1, ROWS)),
        *_beside_transformers(f"{sizes.vocabulary} ids", Subject(wide, kind, prompt), repeats, (1,)),
        *_beside_transformers(name, big, repeats, (1, ROWS)),
        _guidance(small, repeats),
        _first_event(small, repeats),
        _first_event(big, repeats) | {"model": name},
    ]
    compiled = {label: Engine(one.model.lm, one.model.processor.grammar, compiled=True)
                for label, one in (("the model", small), (name, big))}  # fmt: skip
    for (label, engine), subject in zip(compiled.items(), (small, big), strict=True):
        rows += _beside_transformers(label, subject, repeats, (1,), engine)
    rows.append(_bandwidth(name, big, compiled[name], repeats))
    curve = _context_curve(large.lm, compiled[name], sizes.contexts)
    return {"kind": kind, "prompt": prompt, "repeats": repeats, "rows": rows, "context curve": curve}


def bench_decode(model: AnyToken, kind: str, prompt: str, repeats: int, sizes: Sizes) -> Figures:
    """The engine's decoding step (`inference/fast_decode.py`) against the forward of the model's own layers.

    The median over rounds of the ratio in each. EvaluationError if the two sides' ids differ.
    """
    rows = []
    for part in (model, with_lm(model, large_lm(model, sizes))):
        subject, own = Subject(part, kind, prompt), Engine(part.lm, part.processor.grammar)
        own.head().decoder = None
        for count in (1, ROWS):
            fast, plain = partial(subject.ours, count), partial(subject.ours, count, engine=own)
            if fast() != plain():
                raise EvaluationError("The two sides give different ids, so they cannot be compared.")
            ratio = ratio_of_turns(plain, fast, repeats)
            name = "the model" if part is model else f"{part.lm.num_parameters() / 1e6:.0f} M"
            rows.append({"model": name, "what": "own layers over fast decode", "rows": count, "ratio": ratio})
    return {"kind": kind, "prompt": prompt, "repeats": repeats, "rows": rows}


def with_lm(model: AnyToken, lm: Any) -> AnyToken:
    """Another language model behind the same processor."""
    return AnyToken(lm.eval(), model.processor)


def large_lm(model: AnyToken, sizes: Sizes) -> AnyTokenForCausalLM:
    """A random model over the same ids: four routed experts, one per token, and a shared one."""
    torch.manual_seed(0)
    config = AnyTokenConfig(
        vocab_size=model.lm.config.vocab_size, hidden_size=sizes.width, num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.width // 64, num_key_value_heads=max(sizes.width // 192, 1), head_dim=64,
        moe_intermediate_size=sizes.width * 5 // 6, shared_expert_intermediate_size=sizes.width * 5 // 6,
        max_position_embeddings=2 * max(*sizes.contexts, PROMPT), initializer_range=0.05,
    )  # fmt: skip
    lm = AnyTokenForCausalLM(config)
    lm.set_experts_implementation("eager")  # what `load` takes on a CPU
    return lm


def _beside_transformers(
    name: str, subject: Subject, repeats: int, rows: Iterable[int], engine: Engine | None = None
) -> list[Figures]:
    found = []
    for count in rows:
        ours, peer = partial(subject.ours, count, engine=engine), partial(subject.transformers, count)
        if ours() != peer():
            raise EvaluationError("The two sides give different ids, so they cannot be compared.")
        taken = interleaved_timing({"ours": ours, "transformers": peer}, repeats, warmups=0)
        what = "compiled against transformers" if engine else "against transformers"
        found.append(_ratio(name, what, count, taken["ours"], taken["transformers"], subject.tokens))
    if len(found) > 1:
        gain = found[-1]["tokens/s"] / found[0]["tokens/s"]
        found.append({"model": name, "what": f"{ROWS} rows against one, tokens/s", "ratio": gain})
    return found


def _ratio(model: str, what: str, rows: int, ours: float, peer: float, tokens: int) -> Figures:
    speed = {"tokens/s": rows * tokens / ours, "peer's": rows * tokens / peer}
    return {"model": model, "what": what, "rows": rows, **speed, "ratio": peer / ours}


def _guidance(subject: Subject, repeats: int) -> Figures:
    guided, rounds = partial(subject.ours, 1, 3.0), repeats * GUIDED_ROUNDS
    return {
        "model": "the model",
        "what": "time of a token with guidance over without",
        "rounds": rounds,
        "ratio": ratio_of_turns(guided, subject.ours, rounds) * subject.tokens / len(guided()[0]),
    }


@torch.inference_mode()
def _first_event(subject: Subject, repeats: int) -> Figures:
    """Time to the first text event after a prompt of PROMPT ids."""
    ids = (subject.ids * PROMPT)[:PROMPT]
    engine, batch = subject.engine, torch.tensor([ids])
    taken = interleaved_timing(
        {
            "event": lambda: next(engine.stream([GenerationRequest(ids, ("text",), {"text": GREEDY}, 8)])),
            "prefill": lambda: subject.model.lm(batch, use_cache=True, logits_to_keep=1),
        },
        repeats,
    )
    what = f"first event over one forward of {PROMPT} ids"
    return {"model": "the model", "what": what, "ratio": taken["event"] / taken["prefill"]}


def _bandwidth(name: str, subject: Subject, engine: Engine, repeats: int) -> Figures:
    """The share of the time per token that reading the weights from memory takes."""
    lm = subject.model.lm
    codes = subject.model.token_space.code_range(subject.kind, 0)
    other = lm.config.vocab_size - (codes.stop - codes.start)
    active = 4 * (lm.num_active_parameters() - other * lm.config.hidden_size)
    memory = torch.ones(1 << 28)
    taken = interleaved_timing(
        {"tokens": partial(subject.ours, 1, engine=engine), "memory": memory.sum}, repeats
    )
    seconds, rate = taken["tokens"] / subject.tokens, 4 * memory.numel() / taken["memory"]
    share = active / rate / seconds
    return {"model": name, "what": f"share of {rate / 1e9:.0f} GB/s, compiled", "ratio": share}


@torch.inference_mode()
def _context_curve(lm: Any, engine: Engine, contexts: Iterable[int]) -> list[Figures]:
    """Milliseconds of one step, and of its attention alone, by context length."""
    decoder, config = engine.head().decoder, lm.config
    assert decoder is not None
    cache = KVCache(lm.device, lm.dtype)
    empty = torch.zeros(config.num_key_value_heads, 0, config.head_dim)
    cache.write_row(0, [(empty, empty)] * config.num_hidden_layers, 0)
    curve = []
    for context in contexts:
        cache.reserve(1, context)
        cache.show(0, 0, context)
        views, mask = cache.views(0, 1, context)
        query = torch.randn(1, config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads,
                            config.head_dim)  # fmt: skip

        def attend(views: Any = views, mask: Any = mask, query: Any = query) -> None:
            for keys, values in views:
                F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)

        step = partial(decoder.step, [1], [context - 1], cache, 0)
        taken = interleaved_timing({"step": step, "attention": attend}, 10, 2)
        curve.append({"context": context, **{f"{side} ms": 1e3 * time for side, time in taken.items()}})
    return curve
