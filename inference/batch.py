"""Answer many prompts in one batch, with several replies each and settings per modality.

    python inference/batch.py "a fox, 3d" "a red apple, line" --output image --num-return 3
    python inference/batch.py prompts.txt --output text image --temperature image=0.9 text=0

A prompt that names a .txt file stands for its lines. Prompts of different lengths share every step of the model, and
the same seed gives a prompt the same replies in any batch. OUT/replies.jsonl has one line per reply, next to its files.
"""

import argparse
import json
from pathlib import Path

import anytoken
from anytoken.segments import Text, usual_suffix

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("prompts", nargs="+", help="text, or a .txt file with one prompt per line")
parser.add_argument("--output", nargs="+", help="kinds to answer with; without it the model decides")
parser.add_argument("--num-return", type=int, default=1, help="replies for each prompt")
parser.add_argument("--temperature", nargs="+", default=[], metavar="KIND=T", help="temperature per kind")
parser.add_argument("--model", default="mini", help="bundled name, folder or hub id")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("out/batch"), help="folder for the files")
arguments = parser.parse_args()

prompts = []
for words in arguments.prompts:
    lines = Path(words).read_text(encoding="utf-8").splitlines() if words.endswith(".txt") else [words]
    prompts += [line for line in lines if line.strip()]
temperatures = dict(item.split("=") for item in arguments.temperature)

model = anytoken.load(arguments.model)
groups = model.generate(
    prompts,
    arguments.output,
    batch=True,
    num_return=arguments.num_return,
    seed=arguments.seed,
    sampling={kind: {"temperature": float(value)} for kind, value in temperatures.items()},
)

arguments.out.mkdir(parents=True, exist_ok=True)
with open(arguments.out / "replies.jsonl", "w", encoding="utf-8") as file:
    for number, (prompt, group) in enumerate(zip(prompts, groups, strict=True)):
        for copy, reply in enumerate(group if isinstance(group, list) else [group]):
            parts = []
            for place, segment in enumerate(reply.segments):
                if isinstance(segment, Text):
                    parts.append(segment.text)
                    continue
                name = f"{number:03d}-{copy}-{place}{usual_suffix(segment.kind)}"
                segment.save(arguments.out / name)
                parts.append(name)
            line = {"prompt": prompt, "reply": parts, "finish_reason": reply.finish_reason}
            print(json.dumps(line, ensure_ascii=False), file=file)
            print(f"{prompt}: {', '.join(parts)}")
