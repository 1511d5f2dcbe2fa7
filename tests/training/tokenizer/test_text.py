"""Text tokenizers by a recipe: lines of the test split are not read, and a wrong recipe says what is wrong."""

import json
from pathlib import Path

import pytest

from anytoken.tokenizers.base import TokenizerError
from anytoken.tokenizers.text import TextTokenizer
from anytoken.training.tokenizer.recipe import TextRecipe
from anytoken.training.tokenizer.text import train_text


def test_a_recipe_learns_from_training_lines_only(sets, tmp_path, caplog):
    recipe = {
        "kind": "text", "vocab_size": 300, "texts": ["Draw this."], "texts_weight": 3,
        "corpus": [
            {"file": "emoji/images.jsonl", "fields": ["text"], "weight": 2},
            {"file": "no/such.jsonl", "fields": ["a"]},
        ],
    }  # fmt: skip
    folder = train_text(TextRecipe.from_dict(recipe), sets, tmp_path / "text")
    said = json.loads((folder / "training.json").read_text())
    assert said["texts"] == 3 + 2 * 12 and said["held_out_texts"] == 8, (
        "12 training captions, 8 of the test split"
    )
    assert said["missing"] == ["no/such.jsonl"] and "no/such.jsonl" in caplog.text
    assert said["held_out_exact"] is True and said["held_out_bytes_per_token"] > 1
    vocabulary = [TextTokenizer.from_pretrained(folder).id_bytes(i) for i in range(said["vocab_size"])]
    assert any(b"raining" in piece for piece in vocabulary) and not any(
        b"unsee" in piece for piece in vocabulary
    )


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ({"vocab_size": 300, "vocabsize": 3}, r"unknown key 'vocabsize' \(did you mean 'vocab_size'\?\)"),
        ({"texts": ["a"]}, "vocab_size is missing"),
        ({"vocab_size": 300, "corpus": []}, "No text to train on: no-such-folder"),
    ],
)
def test_a_wrong_recipe_is_an_error(recipe, says, tmp_path):
    with pytest.raises(TokenizerError, match=says):
        train_text(TextRecipe.from_dict(recipe), Path("no-such-folder"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
