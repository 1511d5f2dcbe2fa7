"""Codes that say the words: alignment against brute force, what spelling reads, whom agreement pulls where."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from anytoken.tokenizers.base import TokenizerError
from anytoken.tokenizers.losses.speech_content import (
    SpellingHead,
    SpokenPairs,
    agreement_loss,
    align,
    spelled,
)
from anytoken.tokenizers.speech import SpeechTokenizer

CONTENT = {
    "width": 32, "encoder_depth": 1, "decoder_depth": 1, "quantizer": {"kind": "vq", "code_dim": 8},
    "codebook_size": 16, "frames_per_code": 2, "num_global_codes": 2,
}  # fmt: skip


def best_path_cost(cost):
    """The least cost of any monotonic path, by trying all of them."""
    rows, columns = cost.shape

    def rest(i, j):
        if (i, j) == (rows - 1, columns - 1):
            return cost[i, j]
        steps = [(i + 1, j), (i, j + 1), (i + 1, j + 1)]
        return cost[i, j] + min(rest(*step) for step in steps if step[0] < rows and step[1] < columns)

    return rest(0, 0)


def test_alignment_is_on_a_cheapest_path():
    rng = np.random.default_rng(0)
    for rows, columns in ((4, 5), (6, 3), (1, 4), (5, 5)):
        cost = rng.random((3, rows, columns))
        forth, back = align(cost)
        for one, ours, theirs in zip(cost, forth, back, strict=True):
            met = {*enumerate(ours.tolist()), *((i, j) for j, i in enumerate(theirs.tolist()))}
            # What both name lies on one monotonic path, whose cost is that of the best.
            ordered = sorted(met)
            assert all(a[1] <= b[1] for a, b in pairwise(ordered))
            assert sum(one[cell] for cell in met) <= best_path_cost(one) + 1e-9


def test_alignment_finds_the_same_content_at_another_pace():
    content = np.array([0.0, 5, 9, 2])
    slow, fast = np.repeat(content, 3), content
    forth, back = align(np.abs(slow[:, None] - fast[None])[None])
    assert forth[0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert (back[0] // 3).tolist() == [0, 1, 2, 3]


def test_texts_are_spelled_in_lower_case_letters():
    assert spelled("Ice-Cream  Été!") == b"ice cream ete"


def test_a_head_learns_to_read_and_its_loss_says_so():
    torch.manual_seed(0)
    vectors, texts = torch.randn(3, 10, 32), ["fox", "red ox", "égg"]
    head = SpellingHead(32)
    optimizer = torch.optim.Adam(head.parameters(), 3e-3)
    first = head.loss(vectors, texts).item()
    for _ in range(150):
        optimizer.zero_grad()
        loss = head.loss(vectors, texts)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1 * first
    best = head(vectors).argmax(-1)
    read = [bytes(int(one) - 1 for one in row.unique_consecutive() if one).decode() for row in best]
    assert read == ["fox", "red ox", "egg"]
    assert head.loss(vectors.roll(1, 0), texts).item() > 10 * loss.item()


def test_a_text_longer_than_the_clip_does_not_count():
    head, vectors = SpellingHead(8), torch.randn(1, 2, 8, requires_grad=True)
    loss = head.loss(vectors, ["a long sentence"])
    loss.backward()
    assert loss.item() == 0 and vectors.grad.abs().sum() == 0


def agreement_by_hand(ours, theirs, texts):
    """InfoNCE moment by moment, with everything that must not count left out by hand."""
    losses = []
    for b in range(len(texts)):
        paths = align(1 - np.einsum("bnd,bmd->bnm", ours, theirs))
        for anchors, others, path in ((ours, theirs, paths[0]), (theirs, ours, paths[1])):
            for i, j in enumerate(path[b]):
                right = np.exp(anchors[b, i] @ others[b, j] / 0.1)
                wrong = sum(
                    np.exp(anchors[b, i] @ others[c, k] / 0.1)
                    for c in range(len(texts))
                    for k in range(others.shape[1])
                    if (c == b and abs(k - j) > 1) or texts[c] != texts[b]
                )
                losses.append(-np.log(right / (right + wrong)))
    return np.mean(losses)


def test_agreement_is_contrastive_over_other_moments_and_texts():
    features = torch.from_numpy(np.random.default_rng(0).normal(size=(6, 5, 4)))
    texts = ["fox", "owl", "fox"]
    unit = features / features.norm(dim=-1, keepdim=True)
    expected = agreement_by_hand(*(one.numpy() for one in unit.chunk(2)), texts)
    assert agreement_loss(features, texts).item() == pytest.approx(expected, rel=1e-5)


def test_agreement_is_least_for_clips_that_say_the_same_at_any_pace():
    sounds = torch.eye(10)
    said, slower = sounds[[0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9]], sounds[[0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 9]]
    alike, different = (
        agreement_loss(torch.stack([said, other]), ["fox"]).item() for other in (slower, said.flip(0))
    )
    assert alike < 0.01 and different > 1


def pairs():
    time = torch.arange(12_800) / 16_000
    rows = [torch.sin(2 * torch.pi * pitch * time) * 0.3 for pitch in (150, 200, 250, 300)]
    samples = torch.stack(rows) * (1 + torch.sin(2 * torch.pi * 3 * time))
    return SpokenPairs(samples, samples[:, :6_400], ["fox", "owl"])


def test_a_tokenizer_learns_from_pairs_by_both_terms():
    torch.manual_seed(0)
    tokenizer = SpeechTokenizer(**CONTENT)
    head = tokenizer.configure_losses({"mel": 1, "spelling": 1, "agreement": 1})
    parts = [*tokenizer.parameters(), *head.parameters()]
    loss, seen = tokenizer.train().training_loss(pairs())
    loss.backward()
    assert set(seen) == {"mel", "spelling", "agreement"} and all(one > 0 for one in seen.values())
    assert all(one.grad is not None for one in parts)
    optimizer = torch.optim.Adam(parts, 2e-3)
    for _ in range(40):
        optimizer.zero_grad()
        loss, now = tokenizer.training_loss(pairs())
        loss.backward()
        optimizer.step()
    assert now["spelling"] < 0.5 * seen["spelling"]
    assert not any("spelling" in name or "head" in name for name in tokenizer.state_dict())


def test_crops_have_no_content_terms():
    tokenizer = SpeechTokenizer(**CONTENT)
    tokenizer.configure_losses({"mel": 1, "spelling": 1, "agreement": 1})
    assert set(tokenizer.train().training_loss(pairs().samples)[1]) == {"mel"}


@pytest.mark.parametrize(
    "config", [{"num_global_codes": 0}, {"quantizer": "fsq"}, {"quantizer": {"kind": "vq", "residual": 2}}]
)
def test_content_terms_need_a_voice_and_one_codebook(config):
    with pytest.raises(TokenizerError, match="need num_global_codes and one codebook"):
        SpeechTokenizer(**{**CONTENT, **config}).configure_losses({"agreement": 1})
