"""Train an adapter on sixteen concepts that `mini` never saw, in five styles, and measure it.

    python stages/new_concepts.py build data/sets out/fruits
    for captions in fruits shuffled; do
      anytoken train stages/lora.yaml output=out/fruits/$captions context=256 \
        data.train=out/fruits/$captions.jsonl data.test=out/fruits/$captions.jsonl \
        'data.views={image->text: 3, text->image: 1}' \
        'data.replay=[{path: data/shards/images, weight: 4.5, views: {image->text: 3, text->image: 1}},
          data/shards/conversations, {path: data/shards/videos, views: {text->video: 1, video->text: 1}}]'
    done
    python stages/new_concepts.py score data/sets out/fruits

Every fifth picture of a concept (a style on a background) is held out. The score is how many held-out pictures are
named right, without an adapter and with each of the folder; and how many answers of the held-out prompts that `mini`
was held to before, as what an adapter teaches may cost what was known: old pictures are given new names, for one.
Replay keeps it (arXiv 1811.11682).
`shuffled` is the control: the same pictures with the training captions dealt out anew, which must not name held-out
ones better than chance, one in sixteen.
"""

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

import anytoken
from anytoken import Image
from anytoken.benchmarks.harness import report
from anytoken.data.records import open_media
from anytoken.emoji_world.emoji import BACKGROUNDS, compose
from anytoken.evaluation.metrics import same_text, share
from anytoken.segments import KINDS
from anytoken.utils.json_lines import read_json_lines

NAMES = (
    "banana", "lemon", "strawberry", "watermelon", "pineapple", "cherries", "grapes", "pear",
    "carrot", "tomato", "avocado", "broccoli", "eggplant", "mushroom", "pancakes", "pizza",
)  # fmt: skip
# What is named or read: the kind of the prompt, and the records beside the built sets.
OLD = {"image": "emoji/images.jsonl", "video": "emoji/videos.jsonl", "dna": "dna/translate.jsonl"}
app = typer.Typer(add_completion=False, help=__doc__)
Sets = Annotated[Path, typer.Argument(help="The folder of the built sets.")]
Folder = Annotated[Path, typer.Argument(help="Where the small set and its adapters are.")]


def read(path: Path) -> list[dict[str, str]]:
    return list(read_json_lines(path))


def write(path: Path, lines: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def shuffled(lines: list[dict[str, str]]) -> list[dict[str, str]]:
    """The captions of the training split dealt out at random; held-out ones stay true."""
    train = [line for line in lines if line["split"] == "train"]
    order = iter(np.random.default_rng(0).permutation(len(train)))
    return [
        {**line, "text": train[next(order)]["text"]} if line["split"] == "train" else line for line in lines
    ]


@app.command()
def build(sets: Sets, folder: Folder) -> None:
    """Compose the pictures and write fruits.jsonl, and shuffled.jsonl for the control."""
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
            lines.append({"text": text, "image": path, "split": split})
    write(folder / "fruits.jsonl", lines)
    write(folder / "shuffled.jsonl", shuffled(lines))
    print(f"{folder / 'fruits.jsonl'}: {len(lines)} pictures")


@app.command()
def score(sets: Sets, folder: Folder, model: str = "mini", count: int = 128) -> None:
    """Answer held-out prompts, new and old, without and with each adapter; writes figures.json."""
    opened = anytoken.load(model)
    adapters = sorted(path.parent.name for path in folder.glob("*/adapter_config.json"))
    for name in adapters:
        opened.load_adapter(folder / name, name)
    tasks = [("new", "image", folder / "fruits.jsonl")]
    tasks += [("old", kind, sets / file) for kind, file in OLD.items()]
    rows = []
    for age, kind, file in tasks:
        held_out = [line for line in read(file) if line["split"] == "test"]
        held_out = held_out[:: max(1, len(held_out) // count)][:count]
        prompts = [open_media(line[kind], KINDS[kind], file.parent) for line in held_out]
        for name in (None, *adapters):
            opened.use_adapter(name)
            replies = opened.generate(prompts, output="text", batch=True, temperature=0)
            pairs = [(reply.text, line["text"]) for reply, line in zip(replies, held_out, strict=True)]
            whole = share([same_text(said, wanted) for said, wanted in pairs]).to_dict()
            start = share([same_text(said.split(",")[0], wanted.split(",")[0]) for said, wanted in pairs])
            new = share([any(one in said for one in NAMES) for said, _ in pairs]).value
            row = {"prompts": f"{age}, {kind}->text", "adapter": name, **whole}
            rows.append({**row, "name": start.value, "names_a_new_one": new})
    report({"model": model, "rows": rows}, folder / "figures.json")


if __name__ == "__main__":
    app()
