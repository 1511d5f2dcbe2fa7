"""Vectors have unit norm, do not depend on the batch or its padding, and leave the language model alone."""

import numpy as np
import pytest
import torch

from anytoken.inference.api import AnyToken
from anytoken.model.embedding_head import EmbeddingHead, pool, similar_lengths
from anytoken.segments import Image, Text
from anytoken.utils.errors import RequestError


def picture(seed: int, side: int = 16) -> Image:
    return Image(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


@pytest.fixture
def embedding_model(own_model):
    torch.manual_seed(0)
    own_model.embedding_heads[None] = EmbeddingHead(32, ["text", "image"], 12, widths=[4, 8])
    return own_model


PROMPTS = [
    "red apple",
    picture(0),
    [picture(1), "What is this?"],
    "green pear, red apple, green pear",
    Text("a"),
    [{"role": "user", "content": "pear"}, {"role": "assistant", "content": [picture(2)]}],
]


def test_vectors_are_the_same_alone_and_in_any_batch(embedding_model):
    together = embedding_model.embed(PROMPTS)
    assert together.shape == (len(PROMPTS), 12) and together.dtype == np.float32
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    alone = np.concatenate([embedding_model.embed([one]) for one in PROMPTS])
    assert np.abs(together - alone).max() < 1e-5
    assert np.abs(together[::-1] - embedding_model.embed(PROMPTS[::-1])).max() < 1e-5
    assert len(np.unique(together.round(4), axis=0)) == len(PROMPTS)
    assert np.array_equal(embedding_model.embed("red apple"), alone[:1])


def test_a_vector_is_the_formula_over_a_plain_forward(embedding_model):
    """Means by modality of content tokens, and the last state, through each modality's maps."""
    model, prompt = embedding_model, [picture(1), "What is this?"]
    ids, head = model.encode_prompt(prompt), embedding_model.embedding_heads[None]
    states = model.hidden_states(prompt)
    assert states.shape == (3, len(ids), 32)
    features = states[-1]
    space = model.token_space
    content = [n for n, token in enumerate(ids) if space.range_of(token).kind != "control"]
    kinds = [space.modality_names[int(space.modality_of(torch.tensor(ids[n])))] for n in content]
    vector = torch.zeros(12)
    for place, kind in enumerate(("text", "image")):
        own = [n for n, one in zip(content, kinds, strict=True) if one == kind]
        share = len(own) / len(content)
        vector += share * (head.mean_weight[place] @ features[own].mean(0) + head.bias[place])
        vector += share * head.last_weight[place] @ features[-1]
    expected = torch.nn.functional.normalize(vector, dim=0).detach().numpy()
    assert np.allclose(model.embed([prompt])[0], expected, atol=1e-5)


def test_the_last_hidden_state_is_what_the_head_reads(model):
    states = model.hidden_states("red apple")
    ids = torch.tensor([model.encode_prompt("red apple")])
    with torch.no_grad():
        assert torch.allclose(model.lm.lm_head(states[-1]), model.lm(ids).logits[0], atol=1e-5)


def test_token_vectors_are_one_per_content_token(embedding_model):
    found = embedding_model.embed(PROMPTS, tokens=True)
    counts = [
        sum(embedding_model.token_space.range_of(token).kind != "control" for token in ids)
        for ids in map(embedding_model.encode_prompt, PROMPTS)
    ]
    assert [len(one) for one in found] == counts
    assert all(np.allclose(np.linalg.norm(one, axis=1), 1, atol=1e-6) for one in found)
    alone = embedding_model.embed(PROMPTS[2:3], tokens=True, width=4)[0]
    assert np.allclose(np.linalg.norm(alone, axis=1), 1, atol=1e-6)
    prefix = found[2][:, :4] / np.linalg.norm(found[2][:, :4], axis=1, keepdims=True)
    assert np.abs(alone - prefix).max() < 1e-5


def test_widths_are_prefixes(embedding_model):
    whole = embedding_model.embed(PROMPTS)
    for width in (4, 8, 12):
        cut = whole[:, :width] / np.linalg.norm(whole[:, :width], axis=1, keepdims=True)
        assert np.abs(embedding_model.embed(PROMPTS, width=width) - cut).max() < 1e-6
    with pytest.raises(RequestError, match=r"4, 8, 12.*received 5"):
        embedding_model.embed("a", width=5)
    for width in (0, -1, "4", True):
        with pytest.raises(RequestError, match="width is one of 4, 8, 12"):
            embedding_model.embed("a", width=width)


def test_the_language_model_keeps_every_bit(own_model):
    def facts():
        return own_model.generate("red apple", output="text", seed=1).ids, own_model.score(
            "pear", ["red", "a"]
        )

    before, weights = facts(), {name: one.clone() for name, one in own_model.lm.state_dict().items()}
    own_model.embedding_heads[None] = EmbeddingHead(32, own_model.kinds, 8)
    own_model.embed(["red apple", picture(0)])
    assert facts() == before
    assert all(torch.equal(one, weights[name]) for name, one in own_model.lm.state_dict().items())


def test_without_a_trained_head(model):
    with pytest.raises(RequestError, match=r"stages/embed\.yaml.*untrained=True"):
        model.embed("red apple")
    ids = model.encode_prompt("red apple")
    content = [n for n, token in enumerate(ids) if token < model.token_space.text_size]
    mean = model.hidden_states("red apple")[-1][content].mean(0)
    assert np.allclose(model.embed("red apple", untrained=True)[0], (mean / mean.norm()).numpy(), atol=1e-5)


def test_errors_name_what_is_wrong(embedding_model, toys):
    with pytest.raises(RequestError, match="list is empty"):
        embedding_model.embed([])
    with pytest.raises(RequestError, match=r"knows text, image.*holds tone.*stages/embed_all\.yaml"):
        embedding_model.embed([toys.Tone([(1, 2), (3, 4)])])
    with pytest.raises(RequestError, match="context is 256"):
        embedding_model.embed(["a" * 400])


def test_a_head_is_saved_in_a_checkpoint_and_opens_alone_as_an_adapter(embedding_model, tmp_path):
    found = embedding_model.embed(PROMPTS)
    whole = embedding_model.save_pretrained(tmp_path / "whole")
    assert np.abs(AnyToken.from_pretrained(whole).embed(PROMPTS) - found).max() < 1e-6
    head = embedding_model.embedding_heads.pop(None)
    plain = embedding_model.save_pretrained(tmp_path / "plain")
    assert not (plain / "embedding.safetensors").exists()
    (tmp_path / "head").mkdir()
    head.save(tmp_path / "head")
    opened = AnyToken.from_pretrained(plain, adapter=tmp_path / "head")
    assert np.abs(opened.embed(PROMPTS) - found).max() < 1e-6
    later = AnyToken.from_pretrained(plain)
    later.load_adapter(tmp_path / "head", "found")
    assert np.abs(later.embed(PROMPTS) - found).max() < 1e-6
    data = (whole / "embedding.safetensors").read_bytes()
    (whole / "embedding.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(RequestError, match=r"embedding\.safetensors is damaged"):
        AnyToken.from_pretrained(whole)


def test_a_head_that_came_with_an_adapter_brings_it_along(embedding_model, tmp_path):
    from peft import LoraConfig, get_peft_model

    head = embedding_model.embedding_heads.pop(None)
    embedding_model.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    adapted = get_peft_model(embedding_model.lm, LoraConfig(r=2, target_modules=["q_proj"]))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    adapted.save_pretrained(tmp_path / "adapter")
    head.save(tmp_path / "adapter")
    merged = AnyToken.from_pretrained(tmp_path / "base", adapter=tmp_path / "adapter").embed(PROMPTS)
    model = AnyToken.from_pretrained(tmp_path / "base")
    before = model.score("pear", ["red", "a"])
    model.load_adapter(tmp_path / "adapter", "search")
    assert np.abs(model.embed(PROMPTS) - merged).max() < 1e-5
    assert model.adapters.active is None and model.score("pear", ["red", "a"]) == before
    model.embedding_heads[None] = head
    assert np.abs(model.embed(PROMPTS) - merged).max() > 1e-3
    model.use_adapter("search")
    assert np.abs(model.embed(PROMPTS) - merged).max() < 1e-5


def test_a_fingerprint_tells_models_apart(embedding_model, toys):
    probe = embedding_model.embedding_probe()
    assert np.allclose(embedding_model.embedding_probe(), probe)
    other = toys.make_model(seed=1)
    other.embedding_heads[None] = embedding_model.embedding_heads[None]
    assert abs(probe @ other.embedding_probe()) < 0.99
    torch.manual_seed(1)
    other = EmbeddingHead(32, ["text", "image"], 12)
    embedding_model.embedding_heads[None] = other
    assert abs(probe @ embedding_model.embedding_probe()) < 0.99


def test_padding_is_never_pooled():
    states, modality = torch.randn(2, 5, 3), torch.tensor([[0, 1, -1, 0, 0], [0, -2, 0, 1, 1]])
    lengths = torch.tensor([3, 5])
    pooled = pool(states, modality, lengths, 2)
    assert torch.allclose(pooled.mean[0, 0], states[0, 0] / 2) and torch.allclose(
        pooled.last[0], states[0, 2]
    )
    assert torch.allclose(pooled.share, torch.tensor([[0.5, 0.5], [0.5, 0.5]]))


def test_batches_are_of_similar_length():
    lengths = [5, 100, 7, 90, 6, 99, 101]
    batches = similar_lengths(lengths, most=303)
    assert sorted(row for batch in batches for row in batch) == list(range(7))
    assert all(len(batch) * max(lengths[row] for row in batch) <= 303 for batch in batches)
    assert {frozenset(batch) for batch in batches} >= {frozenset({0, 2, 4})}
