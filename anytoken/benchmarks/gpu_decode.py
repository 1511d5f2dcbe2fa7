"""Decoding on one GPU: images by our engine at several batch sizes, against transformers' `generate`.

Both sides have the same random weights in bf16 and generate the same number of ids; ours follows the grammar and
computes only the allowed logits, theirs samples from the whole vocabulary. If vLLM is installed, it is measured with
the stock model of the same shape.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from functools import partial
from typing import Any

import torch

from anytoken.benchmarks.gpu_part import Part, Shape, Sizes, Skip
from anytoken.benchmarks.gpu_train import our_config, stock_model, usable
from anytoken.benchmarks.harness import Figures
from anytoken.grammar import Grammar
from anytoken.inference.engine import Engine
from anytoken.inference.request import GenerationRequest
from anytoken.inference.sampling import Sampling
from anytoken.model.modeling import AnyTokenForCausalLM
from anytoken.token_space import TokenSpace

PROMPT = 64  # ids
NEEDS = {"ours": 8.0, "graphs": 15.0, "transformers": 8.0, "vllm": 60.0}


def our_model(part: Part, sizes: Sizes, shape: Shape) -> AnyTokenForCausalLM:
    """Our model in a shape, for inference."""
    torch.manual_seed(0)
    with part.device:
        lm = AnyTokenForCausalLM(our_config(shape, sizes.space(), sizes.context))
    return lm.to(_dtype(part)).eval()


def _dtype(part: Part) -> torch.dtype:
    return torch.bfloat16 if part.device.type == "cuda" else torch.float32


def prompts(space: TokenSpace, sizes: Sizes, rows: int) -> list[list[int]]:
    """Distinct random texts."""
    generator = torch.Generator().manual_seed(0)
    length = min(PROMPT, sizes.context // 4)
    return torch.randint(space.text_size, (rows, length), generator=generator).tolist()


def our_ids(engine: Engine, given: list[list[int]], side: int) -> int:
    """Decode one image per prompt, in one batch; returns the number of ids."""
    scheduler = engine.scheduler(len(given))
    plan, greedy, sizes = ("image",), {"image": Sampling(temperature=0)}, {"image": (side, side)}
    for prompt in given:
        scheduler.submit(GenerationRequest(prompt, plan, greedy, seed=0, sizes=sizes))
    made = 0
    while len(scheduler):
        made += len(scheduler.step())
    scheduler.close()
    return made


def ours(part: Part, sizes: Sizes, shape: Shape, rows: int, cuda_graphs: bool = False) -> Figures:
    """Ids per second of our engine."""
    if cuda_graphs and part.device.type != "cuda":
        raise Skip("CUDA graphs need a CUDA device")
    engine = Engine(our_model(part, sizes, shape), Grammar(sizes.space()), cuda_graphs=cuda_graphs)
    given = prompts(sizes.space(), sizes, rows)
    made = our_ids(engine, given, sizes.grid)  # also the first warm-up
    seconds = part.time(partial(our_ids, engine, given, sizes.grid), sizes.seconds, warmups=0, least=1)
    return {"tokens/s": made / seconds, "ms a step": 1000 * seconds * rows / made, "ids": made // rows}


@torch.inference_mode()
def transformers(part: Part, sizes: Sizes, shape: Shape, rows: int, attention: str) -> Figures:
    """Ids per second of `generate` with the same weights, greedy, over the whole vocabulary."""
    lm = our_model(part, sizes, shape)
    usable(lm, attention, part.device)
    given = torch.tensor(prompts(sizes.space(), sizes, rows), device=part.device)
    new = sizes.grid**2 + 4
    options: dict[str, Any] = {
        "do_sample": False,
        "max_new_tokens": new,
        "min_new_tokens": new,
        "pad_token_id": 0,
    }
    mask = torch.ones_like(given)
    work = partial(lm.generate, given, attention_mask=mask, **options)
    seconds = part.time(work, sizes.seconds, warmups=1, least=1)
    return {"tokens/s": rows * new / seconds, "ms a step": 1000 * seconds / new, "ids": new}


def vllm(part: Part, sizes: Sizes, shape: Shape, rows: int) -> Figures:
    """Ids per second of vLLM with the stock model of the shape."""
    if importlib.util.find_spec("vllm") is None:
        raise Skip("vllm is not installed")
    from vllm import LLM, SamplingParams

    space, new = sizes.space(), sizes.grid**2 + 4
    with tempfile.TemporaryDirectory() as folder:
        stock_model(shape, space.vocab_size, sizes.context).to(_dtype(part)).save_pretrained(folder)
        served = LLM(
            model=folder, skip_tokenizer_init=True, max_model_len=PROMPT + new, max_num_seqs=rows,
            gpu_memory_utilization=0.5,
        )  # fmt: skip
        given = [{"prompt_token_ids": one} for one in prompts(space, sizes, rows)]
        asked = SamplingParams(temperature=0, max_tokens=new, min_tokens=new, detokenize=False)
        served.generate(given, asked, use_tqdm=False)
        start = time.perf_counter()
        served.generate(given, asked, use_tqdm=False)
        seconds = time.perf_counter() - start
    return {"tokens/s": rows * new / seconds, "ms a step": 1000 * seconds / new, "ids": new}


def bench_decode(part: Part, sizes: Sizes) -> None:
    """Every batch size on every side, the largest first."""
    name, shape = next(iter(sizes.shapes.items()))
    for rows in sorted(sizes.batches, reverse=True):
        sides = {
            "ours": partial(ours, part, sizes, shape, rows),
            "graphs": partial(ours, part, sizes, shape, rows, True),
            "transformers": partial(transformers, part, sizes, shape, rows, "sdpa"),
        }
        for side, measure in sides.items():
            needs = 0.0 if sizes.is_tiny else NEEDS[side]
            part.case(f"{name}, {side}, batch {rows}", needs, measure, side=side, batch=rows)
    rows = max(sizes.batches)
    measure = partial(vllm, part, sizes, shape, rows)
    needs = 0.0 if sizes.is_tiny else NEEDS["vllm"]
    part.case(f"{name}, vllm, batch {rows}", needs, measure, side="vllm", batch=rows)
