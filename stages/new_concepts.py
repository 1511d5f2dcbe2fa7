"""A small set that `mini` never saw, learnt as an adapter, and how well: sixteen fruits and vegetables in five styles.

    python stages/new_concepts.py build data/sets out/fruits
    anytoken train stages/lora.yaml output=out/fruits/adapter steps=250 \\
      data.train=out/fruits/fruits.jsonl data.test=out/fruits/fruits.jsonl
    python stages/new_concepts.py score data/sets out/fruits

Every fifth picture of a concept (a style on a background) is held out. The score is how many held-out pictures are
named right, without and with the adapter; and how many of the pictures `mini` was held to before, as what an adapter
teaches may cost what was known.
"""

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

import anytoken
from anytoken import Image
from anytoken.data.emoji import BACKGROUNDS, compose
from anytoken.evaluation.bench import environment

NAMES = (
    "banana", "lemon", "strawberry", "watermelon", "pineapple", "cherries", "grapes", "pear",
    "carrot", "tomato", "avocado", "broccoli", "eggplant", "mushroom", "pancakes", "pizza",
)  # fmt: skip
app = typer.Typer(add_completion=False, help=__doc__)
Sets = Annotated[Path, typer.Argument(help="The folder of the built sets.")]
Folder = Annotated[Path, typer.Argument(help="Where the small set and its adapter are.")]


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@app.command()
def build(sets: Sets, folder: Folder) -> None:
    """Compose the pictures and write fruits.jsonl."""
    sprites = np.load(sets / "emoji" / "sprites.npy", mmap_mode="r")
    drawn = [line for line in read(sets / "emoji" / "sprites.jsonl") if line["name"] in NAMES]
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for number, line in enumerate(drawn):
        for place, (background, colour) in enumerate(BACKGROUNDS.items()):
            name, style = line["name"], line["style"]
            path = f"images/{name}-{style}-{background}.png"
            Image(compose(np.array(sprites[int(line["row"])]), colour)).save(folder / path)
            article = (
                "" if name.endswith("s") or name == "broccoli" else "an " if name[0] in "aeiou" else "a "
            )
            text = f"{article}{name}, {style}, {background} background"
            split = "test" if (number + 2 * place) % 5 == 0 else "train"
            lines.append(json.dumps({"text": text, "image": path, "split": split}) + "\n")
    (folder / "fruits.jsonl").write_text("".join(lines), encoding="utf-8")
    print(f"{folder / 'fruits.jsonl'}: {len(lines)} pictures")


@app.command()
def score(sets: Sets, folder: Folder, model: str = "mini", count: int = 128) -> None:
    """Name held-out pictures without and with the adapter; writes figures.json."""
    opened = anytoken.load(model)
    opened.load_adapter(folder / "adapter", "fruits")
    tasks = {"fruits": (folder, "fruits.jsonl"), "before": (sets / "emoji", "images.jsonl")}
    figures: dict[str, object] = {}
    for task, (root, file) in tasks.items():
        held_out = [line for line in read(root / file) if line["split"] == "test"]
        held_out = held_out[:: max(1, len(held_out) // count)][:count]
        prompts = [Image.open(root / line["image"]) for line in held_out]
        for name in (None, "fruits"):
            opened.use_adapter(name)
            replies = opened.generate(prompts, output="text", batch=True, temperature=0)
            right = [(reply.text, line["text"]) for reply, line in zip(replies, held_out, strict=True)]
            figures[f"{task}, {'with' if name else 'without'} the adapter"] = {
                "pictures": len(right),
                "named exactly": sum(said == wanted for said, wanted in right) / len(right),
                "the concept": sum(said.split(",")[0] == wanted.split(",")[0] for said, wanted in right)
                / len(right),
            }
    figures |= environment()
    (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    app()
