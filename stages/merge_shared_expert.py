"""Make a checkpoint without a shared expert from one that has it, to train on and to export to stock engines.

    python stages/merge_shared_expert.py mini runs/plain --data data/sets

The mean weight of each expert is measured on 100 training samples of captioned images and 100 of translated genes in
--data. `anytoken.model.shared_expert` says what is kept and what changes.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer

import anytoken
from anytoken import DNA, Image, Text
from anytoken.data.records import open_media
from anytoken.model.shared_expert import without_shared_expert
from anytoken.segments import Segment
from anytoken.utils.json_lines import read_json_lines

SAMPLES = 100  # of each set


def main(
    model: Annotated[str, typer.Argument(help="A checkpoint, or mini.")],
    out: Annotated[Path, typer.Argument(help="The folder to write the new checkpoint to.")],
    data: Annotated[Path, typer.Option(help="The folder of the built sets.")] = Path("data/sets"),
) -> None:
    """Write the checkpoint."""
    loaded = anytoken.load(model)
    prompts: list[list[Segment]] = []
    for file, key in (("emoji/images.jsonl", "image"), ("dna/translate.jsonl", "dna")):
        records = [one for one in read_json_lines(data / file) if one["split"] == "train"]
        for one in records[:: max(1, len(records) // SAMPLES)]:
            media = DNA(one["dna"]) if key == "dna" else open_media(one[key], Image, data / "emoji")
            prompts.append([media, Text(one["text"])])
    ids = [torch.tensor([one for part in prompt for one in loaded.tokenize(part)]) for prompt in prompts]
    loaded.lm = without_shared_expert(loaded.lm, ids)
    loaded.save_pretrained(out)
    typer.echo(f"wrote {out}: {loaded.lm.config.num_experts} experts, none shared")


if __name__ == "__main__":
    typer.run(main)
