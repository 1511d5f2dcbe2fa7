"""A plug-in joins mini: old ids, logits and answers stay to the bit, and the grown checkpoint opens by consent.

And a tokenizer of mini is replaced: everything but its codes stays.
"""

from pathlib import Path

import pytest
import torch

import anytoken
from anytoken.inference.api import AnyToken
from anytoken.model.extend_vocab import (
    replace_modality,
)
from anytoken.segments import Image
from anytoken.tokenizers.base import MODALITIES, TokenizerError
from anytoken.tokenizers.registry import load_modality
from anytoken.tokenizers.speech import SpeechTokenizer
from anytoken.utils.errors import CheckpointError

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
    # A learned codebook begins where its first batch is.
    shape = {"protein": (2, 64, 2), "motion": (8, 64, 6), "palette": (1, 900, 3)}[kind]
    batch = torch.randint(0, 20, shape) if kind == "protein" else torch.rand(shape) * 2 - 1
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


def test_another_speech_tokenizer_moves_ids_and_no_rows(tmp_path):
    model = anytoken.load("mini", device="cpu")
    ids, old_logits = answers(model)
    old, rows = model.token_space, model.lm.get_input_embeddings().weight.detach().clone()
    torch.manual_seed(0)
    fewer = SpeechTokenizer(16, 1, 1, levels=[5, 5, 4], max_frames=20).eval()
    processor = replace_modality(model.lm, model.processor, fewer)
    space, table = processor.token_space, model.lm.get_input_embeddings().weight
    assert space.modalities == old.modalities and space.codebook_sizes("speech") == (100,)
    assert len(table) == space.vocab_size == model.lm.config.vocab_size
    fewer_codes = old.codebook_sizes("speech")[0] - 100
    assert len(table) == old.vocab_size - fewer_codes - 256  # codes, and the voice header
    before, after = ({span.name: span for span in one.ranges} for one in (old, space))
    for name in set(before) - {"speech", "speech.global"}:
        a, b = before[name], after[name]
        assert torch.equal(rows[a.start : a.stop], table[b.start : b.stop]), name
    fresh = table[after["speech"].start : after["speech"].stop]
    replaced = torch.cat(
        [rows[before[name].start : before[name].stop] for name in ("speech", "speech.global")]
    )
    assert torch.dist(fresh.mean(0), replaced.mean(0)) < 0.2 * replaced.norm(dim=1).mean()
    assert 0.8 < fresh.std() / replaced.std() < 1.25

    again = AnyToken(model.lm, processor, model.sampling).save_pretrained(tmp_path / "new")
    again = anytoken.load(again, device="cpu")
    ids_again, logits = answers(again)
    assert ids_again == ids  # of text and pictures, which stand before speech
    for name in ("text", "image", "video"):
        a, b = before[name], after[name]
        torch.testing.assert_close(logits[..., b.start : b.stop], old_logits[..., a.start : a.stop])
    spoken = again.generate("a fox", "speech", seed=0, max_new_tokens=30)
    assert spoken.speech[0].seconds <= 0.4
    with pytest.raises(CheckpointError, match="no palette to replace; it has dna, image"):
        replace_modality(again.lm, again.processor, new_tokenizer("palette"))
