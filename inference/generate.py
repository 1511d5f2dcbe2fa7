"""Answer one prompt of text and files, and save the generated media.

    python inference/generate.py "a red apple, 3d, blue background" --output image
    python inference/generate.py cat.png "What is this?" --output text
    python inference/generate.py say.wav --output text image --out answers

Arguments that name a file are opened as an image, speech, video or DNA, by their suffix.
"""

import argparse
from os.path import isfile  # unlike Path.is_file, it takes words that are too long for a path
from pathlib import Path

import anytoken
from anytoken import Text
from anytoken.segments import open_segment, usual_suffix

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("prompt", nargs="+", help="words and files, in order")
parser.add_argument("--output", nargs="+", help="kinds to answer with; without it the model decides")
parser.add_argument("--model", default="mini", help="bundled name, folder or hub id")
parser.add_argument("--adapter", help="PEFT folder")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the files")
arguments = parser.parse_args()

model = anytoken.load(arguments.model, adapter=arguments.adapter)
prompt = [open_segment(part) if isfile(part) else part for part in arguments.prompt]
reply = model.generate(prompt, output=arguments.output, seed=arguments.seed)

arguments.out.mkdir(parents=True, exist_ok=True)
for number, segment in enumerate(reply.segments):
    if isinstance(segment, Text):
        print(segment.text)
    else:
        print(segment.save(arguments.out / f"{number}-{segment.kind}{usual_suffix(segment.kind)}"))
usage = reply.usage
print(f"{usage.new_tokens} tokens, {usage.seconds:.1f} s, {usage.tokens_per_second:.0f} tokens/s")
