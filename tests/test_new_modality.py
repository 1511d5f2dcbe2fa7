"""A plug-in joins mini: old ids, logits and answers stay to the bit, and the grown checkpoint opens by consent."""

from pathlib import Path

import pytest
import torch

import anytoken
from anytoken.segments import Image
from anytoken.tokenizers.base import MODALITIES, TokenizerError
from anytoken.tokenizers.modalities import load_modality

ROOT = Path(__file__).parents[1]
SETTINGS = {
    "protein": {"width": 16, "codebook_size": 32},
    "motion": {"width": 16, "depth": 1},
    "palette": {"width": 16},
}
PICTURE = ROOT / "tests" / "assets" / "images" / "1F300-3d-red.png"


def new_tokenizer(kind: str):
    torch.manual_seed(0)
    tokenizer = load_modality(ROOT / "tokenizers" / kind)(**SETTINGS[kind])
    if kind != "motion":  # a learned codebook begins where its first batch is
        width = {"protein": (2, 64, 2), "palette": (1, 900, 3)}[kind]
        batch = torch.randint(0, 20, width) if kind == "protein" else torch.rand(width) * 2 - 1
        tokenizer.train().training_loss(batch)
    return tokenizer.eval()


def answers(model) -> tuple[list[list[int]], torch.Tensor]:
    """Greedy ids in two directions, and the logits of a prompt."""
    requests = [("red apple, 3d", "image"), ([Image.open(PICTURE), "What is this?"], None)]
    ids = [
        model.generate(prompt, output, temperature=0, max_new_tokens=72).ids for prompt, output in requests
    ]
    with torch.inference_mode():
        logits = model.lm(torch.tensor([model.encode_prompt([Image.open(PICTURE), "a blue car"])])).logits
    return ids, logits


def test_three_modalities_join_mini_and_nothing_old_changes(tmp_path, monkeypatch):
    model = anytoken.load("mini", device="cpu")
    names = [model.token_space.token_name(token) for token in range(model.token_space.vocab_size)]
    old_ids, old_logits = answers(model)
    tokenizers = {kind: new_tokenizer(kind) for kind in SETTINGS}
    for tokenizer in tokenizers.values():
        model.add_modality(tokenizer)
    ids, logits = answers(model)
    assert ids == old_ids and torch.equal(logits[..., : len(names)], old_logits)
    assert [model.token_space.token_name(token) for token in range(len(names))] == names
    assert model.token_space.vocab_size == model.lm.config.vocab_size == logits.shape[-1]
    for kind in SETTINGS:
        written = model.generate("M K L V", kind, seed=1, max_new_tokens=30)
        assert [segment.kind for segment in written.segments] == [kind]

    folder = model.save_pretrained(tmp_path / "grown", torch.bfloat16)
    for kind in SETTINGS:
        copy = folder / "tokenizers" / kind / f"{kind}.py"
        assert copy.read_bytes() == (ROOT / "tokenizers" / kind / f"{kind}.py").read_bytes()
    monkeypatch.delitem(MODALITIES, "palette")
    with pytest.raises(TokenizerError, match=r"palette\.py, then call anytoken\.load_modality"):
        anytoken.load(folder)
    monkeypatch.undo()
    again = anytoken.load(folder, device="cpu")
    assert again.kinds == model.kinds and torch.equal(answers(again)[1][..., : len(names)], old_logits)
    for kind, tokenizer in tokenizers.items():
        assert type(again.processor.tokenizers[kind]) is type(tokenizer)
