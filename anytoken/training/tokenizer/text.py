"""Train a text tokenizer: byte-pair merges of the strings in files and of some given in the recipe."""

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from anytoken import recipes
from anytoken.tokenizers.base import TokenizerError
from anytoken.tokenizers.text import TextTokenizer
from anytoken.training.tokenizer.recipe import TextRecipe
from anytoken.utils.atomic import write_file
from anytoken.utils.errors import ConfigError
from anytoken.utils.json_lines import load_json, read_json_lines

log = logging.getLogger(__name__)


def train_text(recipe: TextRecipe, data: Path, out: Path) -> Path:
    """Train on the sets in `data` and save to `out`; returns that folder.

    Lines of the test split are not used: training.json says the bytes per id on them. A corpus file that
    was not built is left out with a warning; TokenizerError if no text is left.
    """
    texts = recipe.texts * recipe.texts_weight
    held_out: list[str] = []
    missing: list[str] = []
    for source in recipe.corpus:
        path = _find_corpus(source.file, data)
        if path is None:
            log.warning("%s is neither under %s nor a recipe: left out of the corpus", source.file, data)
            missing.append(source.file)
            continue
        for text, is_test in _read_fields(path, source.fields):
            if is_test:
                held_out.append(text)
            else:
                texts += [text] * source.weight
    if not texts:
        raise TokenizerError(
            f"No text to train on: {data} has none of the recipe's files; build the sets first."
        )
    tokenizer = TextTokenizer.train(texts, recipe.vocab_size, recipe.always)
    folder = tokenizer.save_pretrained(out)
    report = {
        "vocab_size": tokenizer.vocab_size, "texts": len(texts), "missing": missing, "held_out_texts": len(held_out),
        "held_out_bytes_per_token": _bytes_per_token(tokenizer, held_out),
        "held_out_exact": all(tokenizer.decode(tokenizer.encode(text)) == text for text in held_out),
    }  # fmt: skip
    write_file(folder / "training.json", json.dumps(report, indent=2) + "\n")
    return folder


def _find_corpus(name: str, data: Path) -> Path | None:
    if (data / name).is_file():
        return data / name
    try:
        return recipes.find(name)
    except ConfigError:
        return None


def _read_fields(path: Path, fields: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """The strings, or lists of strings, in these fields, and whether their line is in the test split."""
    try:
        records = list(read_json_lines(path)) if path.suffix == ".jsonl" else [load_json(path.read_bytes())]
    except ValueError as error:
        raise TokenizerError(f"{path} is not JSON ({error}); build it again.") from error
    for record in records:
        for field in fields:
            value = record.get(field) or []
            for text in [value] if isinstance(value, str) else value:
                yield text, record.get("split") == "test"


def _bytes_per_token(tokenizer: TextTokenizer, texts: Sequence[str]) -> float | None:
    ids = sum(len(tokenizer.encode(text)) for text in texts)
    return sum(len(text.encode()) for text in texts) / ids if ids else None
