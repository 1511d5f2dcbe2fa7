"""How fast a model decodes, beside `generate` of transformers: same weights, same grammar, taking turns in one run.

    python inference/bench.py --out out/bench.json

Both are greedy and must give the same ids, or the comparison is refused. The ratio is what to quote: absolute
speeds are the machine's.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

import anytoken
from anytoken.inference.logits_processor import GrammarLogitsProcessor
from anytoken.tokenizers.measures import commit

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="mini", help="bundled name, folder or hub id")
parser.add_argument("--kind", default="image", help="what is generated")
parser.add_argument("--prompt", default="a fox, 3d, blue background")
parser.add_argument("--repeats", type=int, default=5)
parser.add_argument("--out", type=Path, help="a JSON file for the figures")
arguments = parser.parse_args()

model = anytoken.load(arguments.model)
prompt, space = model.encode_prompt(arguments.prompt), model.token_space
limit = len(model.generate_ids([prompt], arguments.kind, temperature=0)[0].ids)  # also warms up


def ours(rows: int) -> list[list[int]]:
    return [
        one.ids for one in model.generate_ids([prompt] * rows, arguments.kind, temperature=0, cfg_scale=1)
    ]


def transformers(rows: int) -> list[list[int]]:
    grammar = GrammarLogitsProcessor(model.processor.grammar, len(prompt), [arguments.kind])
    ids = torch.tensor([prompt] * rows)
    output = model.lm.generate(
        ids, attention_mask=torch.ones_like(ids), logits_processor=[grammar], do_sample=False,
        max_new_tokens=2 * limit, pad_token_id=space.pad, eos_token_id=space.end,
    )  # fmt: skip
    return [row[: row.index(space.end) + 1] for row in output[:, len(prompt) :].tolist()]


def median_seconds(rows: int) -> tuple[float, float]:
    """Of ours and theirs, in turns, so that a drift of the machine's speed touches both."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(arguments.repeats):
        for taken, run in zip(times, (ours, transformers), strict=True):
            start = time.perf_counter()
            run(rows)
            taken.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


figures = {
    "kind": arguments.kind,
    "commit": commit(),
    "torch": torch.__version__,
    "threads": torch.get_num_threads(),
}
for rows in (1, 8):
    if ours(rows) != transformers(rows):
        raise SystemExit("The two give different ids: there is nothing to compare.")
    mine, theirs = median_seconds(rows)
    tokens = rows * limit
    figures[f"batch_{rows}"] = {
        "tokens_per_second": round(tokens / mine, 1),
        "transformers_tokens_per_second": round(tokens / theirs, 1),
        "ratio": round(theirs / mine, 2),
    }
    print(
        f"batch {rows}: {tokens / mine:.0f} tokens/s, transformers {tokens / theirs:.0f}: {theirs / mine:.2f}x"
    )
if arguments.out:
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(figures, indent=1) + "\n")
