"""Generate with transformers' own `generate`: the model is a plain causal LM, the grammar a LogitsProcessor.

    python inference/transformers_generate.py "a fox, 3d, blue background" --output image
    python inference/transformers_generate.py "a fox" "a red apple" --output text --num-beams 4

Every reply is legal with any decoding method; with --greedy the ids are those of `model.generate(temperature=0)`.
"""

import argparse
from pathlib import Path

import anytoken
from anytoken.segments import Text, usual_suffix

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("prompts", nargs="+", help="texts, with one reply each")
parser.add_argument("--output", nargs="+", help="kinds to answer with; without it the model decides")
parser.add_argument(
    "--greedy", action="store_true", help="always choose the most likely id instead of sampling"
)
parser.add_argument("--num-beams", type=int, default=1, help="beam search instead of sampling if above 1")
parser.add_argument("--max-new-tokens", type=int, help="by default enough for the requested kinds")
parser.add_argument("--model", default="mini", help="bundled name, folder or hub id")
parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the files")
arguments = parser.parse_args()

model = anytoken.load(arguments.model)
inputs = model.lm_inputs(
    arguments.prompts, arguments.output, batch=True, max_new_tokens=arguments.max_new_tokens
)
sample = not arguments.greedy and arguments.num_beams == 1
rows = model.lm.generate(**inputs, do_sample=sample, num_beams=arguments.num_beams)

arguments.out.mkdir(parents=True, exist_ok=True)
start, end = inputs["input_ids"].shape[1], model.token_space.end
for number, row in enumerate(rows[:, start:].tolist()):
    for place, segment in enumerate(model.detokenize(row[: row.index(end) + 1])):
        if isinstance(segment, Text):
            print(segment.text)
        else:
            print(segment.save(arguments.out / f"{number}-{place}{usual_suffix(segment.kind)}"))
