"""Scores equal a plain forward over whole sequences, whatever the batch; bad requests are one clear error."""

import numpy as np
import pytest
import torch

from anytoken.inference import score as score_module
from anytoken.segments import Image
from anytoken.utils.errors import RequestError

ANSWERS = ["red apple", "green pear", "a", "What is this? Ein Apfel, schön, schön"]


@pytest.fixture(scope="module")
def image():
    return Image(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def plain_forward(model, prompt, answer, start=None):
    """Log-probabilities of an answer's ids by one forward over the whole sequence and a masked softmax."""
    start = model.encode_prompt(prompt) if start is None else start
    ids = model.processor.encode_reply(answer)
    with torch.no_grad():
        logits = model.lm(input_ids=torch.tensor([[*start, *ids]])).logits[0, len(start) - 1 : -1].double()
    grammar = model.processor.grammar
    ranges = [grammar.class_ranges[n] for n in grammar.loss_rows(torch.tensor(ids)).tolist()]
    allowed = torch.stack([grammar.mask(one) for one in ranges])
    return (
        logits.masked_fill(~allowed, -torch.inf).log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
    )


def test_scores_equal_a_plain_forward(model, image, toys):
    answers = [*ANSWERS, image, ["red", image, "pear"], toys.Tone([(1, 2), (3, 4)])]
    found = model.score_details([image, "What is this?"], answers)
    for answer, one in zip(answers, found, strict=True):
        expected = plain_forward(model, [image, "What is this?"], answer)
        assert np.allclose(one.logprobs, expected.numpy(), atol=1e-5)
        assert one.total == pytest.approx(float(expected.sum()), abs=1e-4)
        assert sum(value for _, value in one.segments) == pytest.approx(one.total, abs=1e-5)
    assert [kind for kind, _ in found[5].segments] == ["text", "image", "text"]


def test_the_prompt_is_read_once_and_batches_change_nothing(model, monkeypatch):
    read = []
    original = score_module._features

    def features(engine, ids, cache):
        read.append(ids.numel())
        return original(engine, ids, cache)

    monkeypatch.setattr(score_module, "_features", features)
    prompt = "red apple green pear"
    together = model.score(prompt, ANSWERS)
    length = len(model.encode_prompt(prompt))
    assert read.count(length) == 1 and max(read[1:]) < length * len(ANSWERS)
    monkeypatch.setattr(score_module, "CACHE_ELEMENTS", 1)  # one answer in a batch
    assert together == pytest.approx(model.score(prompt, ANSWERS), abs=1e-4)
    assert together == pytest.approx([model.score(prompt, [one])[0] for one in ANSWERS], abs=1e-4)


def test_normalisation(model):
    plain, means, pmi = (model.score("pear", ANSWERS, how) for how in ("none", "tokens", "pmi"))
    lengths = [len(model.processor.encode_reply(one)) for one in ANSWERS]
    null = model.processor.null_prompt()
    priors = [float(plain_forward(model, None, one, null).sum()) for one in ANSWERS]
    assert means == pytest.approx([a / n for a, n in zip(plain, lengths, strict=True)])
    assert pmi == pytest.approx([a - b for a, b in zip(plain, priors, strict=True)], abs=1e-3)


def test_classify_and_rerank(model):
    scores = model.score("pear", ANSWERS)
    found = model.classify("pear", ANSWERS)
    assert found.label == ANSWERS[int(np.argmax(scores))]
    assert sum(found.probabilities) == pytest.approx(1) and found.top(1) == [
        (found.label, max(found.probabilities))
    ]
    order = [index for index, _ in model.rerank("pear", ANSWERS, "none")]
    assert order == np.argsort(scores)[::-1].tolist()


def test_perplexity_is_of_tokens_that_have_a_choice(model, image):
    ids = model.processor.encode_reply(image)
    found = plain_forward(model, None, image, model.processor.null_prompt())
    close = ids.index(model.token_space.close_token("image"))
    assert found[close] == 0
    kept = [n for n in range(len(ids)) if n != close]
    assert model.perplexity(image) == pytest.approx(float((-found[kept].mean()).exp()), rel=1e-4)


def test_an_adapted_head_gives_its_own_scores(own_model):
    from peft import LoraConfig, get_peft_model

    before = own_model.score("pear", ANSWERS)
    torch.manual_seed(0)
    own_model.lm = get_peft_model(own_model.lm, LoraConfig(r=2, target_modules=["lm_head"]))
    for name, weight in own_model.lm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    after = own_model.score("pear", ANSWERS)
    assert after != pytest.approx(before, abs=1e-2)
    assert after == pytest.approx(
        [float(plain_forward(own_model, "pear", one).sum()) for one in ANSWERS], abs=1e-4
    )


@pytest.mark.parametrize("answers", [[], "pear", None, 3])
def test_answers_are_a_list(model, answers):
    with pytest.raises(RequestError, match="list of answers"):
        model.score("pear", answers)


def test_errors_name_what_is_wrong(model):
    with pytest.raises(RequestError, match="reply is empty"):
        model.score("pear", [""])
    with pytest.raises(RequestError, match="none, tokens, pmi"):
        model.score("pear", ["a"], "mean")
    with pytest.raises(RequestError, match="context is 256"):
        model.score("pear", ["a" * 400])
    with pytest.raises(RequestError, match="no tokenizer for 'dna'"):
        from anytoken import DNA

        model.score("pear", [DNA("ACGT")])
