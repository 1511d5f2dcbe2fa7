"""Scores equal a plain forward over whole sequences, whatever the batch; bad requests are one clear error."""

import numpy as np
import pytest
import torch

from anytoken.inference import best_answers as best_module
from anytoken.inference import score as score_module
from anytoken.inference.answer_tree import ROOT, AnswerTree
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

    def features(engine, ids, cache, **given):
        read.append(ids.numel())
        return original(engine, ids, cache, **given)

    monkeypatch.setattr(score_module, "_features", features)
    prompt = "red apple green pear"
    together = model.score(prompt, ANSWERS)
    length = len(model.encode_prompt(prompt))
    inner = {tuple(ids[:n]) for ids in map(model.processor.encode_reply, ANSWERS) for n in range(1, len(ids))}
    assert read == [length, len(inner)]  # all answers in one forward, and what they share once
    monkeypatch.setattr(score_module, "PART", 1)  # one answer in a batch, one id of the prompt in a forward
    assert together == pytest.approx(model.score(prompt, ANSWERS), abs=1e-4)
    assert together == pytest.approx([model.score(prompt, [one])[0] for one in ANSWERS], abs=1e-4)


def test_answers_that_begin_alike_are_a_tree(model, image):
    answers = ["red apple", "red pear", "red", "red apple", "red apple red pear", ["red", image], "pear"]
    found = model.score_details([image, "What is this?"], answers)
    for answer, one in zip(answers, found, strict=True):
        expected = plain_forward(model, [image, "What is this?"], answer)
        assert np.allclose(one.logprobs, expected.numpy(), atol=1e-5), answer
    assert found[0].total == found[3].total
    tree = AnswerTree.of([[5, 6, 7], [5, 8], [9]])
    assert tree.ids == [5, 6, 7, 8, 9] and tree.parents == [ROOT, 0, 1, 0, ROOT] and tree.inner == [0, 1]
    mask = AnswerTree.of([[5, 6, 0], [5, 8, 0]]).mask([0, 1, 3])
    assert mask.tolist() == [[True, False, False], [True, True, False], [True, False, True]]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_window_and_eager_attention_score_branches_alike(tmp_path, attention):
    """A model whose layers look back 6 ids only, alternately, with a mask per type of layer."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    from anytoken.inference.answer_tree import BranchedCache, branch_mask

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        layer_types=["sliding_attention", "full_attention"],
        num_key_value_heads=1, head_dim=8, sliding_window=6, attn_implementation=attention,
    )  # fmt: skip
    lm, prompt, answers = (
        Gemma3ForCausalLM(config).eval(),
        [1, 2, 3, 4, 5, 6, 7, 8],
        [[5, 6, 7], [5, 8, 3, 2]],
    )
    tree, cache = AnswerTree.of(answers), BranchedCache()
    with torch.no_grad():
        lm(input_ids=torch.tensor([prompt]), past_key_values=cache, use_cache=True)
        nodes = list(range(len(tree.ids)))
        where = len(prompt) + torch.tensor(tree.depths)
        mask = branch_mask(config, tree.mask(nodes), where, len(prompt), torch.float32)
        given = {"attention_mask": mask, "position_ids": where[None], "past_key_values": cache}
        found = lm(input_ids=torch.tensor([tree.ids]), use_cache=True, **given).logits[0]
        for path, answer in zip(tree.paths, answers, strict=True):
            expected = lm(input_ids=torch.tensor([[*prompt, *answer]]), use_cache=False).logits[
                0, len(prompt) :
            ]
            assert torch.allclose(found[path], expected, atol=1e-5)


@pytest.mark.parametrize("normalize", ["none", "tokens", "pmi"])
@pytest.mark.parametrize("steps", [1, 16, 10_000])
def test_the_best_answers_are_those_of_full_scoring(model, image, monkeypatch, normalize, steps):
    """Whether the walk ends within its steps, and where equal answers, long and short ones compete."""
    monkeypatch.setattr(best_module, "MOST_STEPS", steps)
    names = ["red", "green", "apple", "pear", "a"]
    answers = [*names, *(f"{a} {b}" for a in names for b in names), "red", image]
    for prompt in ("pear", [image, "What is this?"]):
        full = model.rerank(prompt, answers, normalize)
        for top in (1, 3, len(answers)):
            found = model.rerank(prompt, answers, normalize, top=top)
            assert [score for _, score in found] == pytest.approx(
                [score for _, score in full[:top]], abs=1e-4
            )
            scores = dict(full)
            assert [score for _, score in found] == pytest.approx([scores[row] for row, _ in found], abs=1e-4)
            assert len({row for row, _ in found}) == top


def test_the_best_of_many_answers_is_found_in_a_few_steps(model, monkeypatch):
    read = []
    original = best_module._Walk.children

    def children(walk, node):
        read.append(node)
        return original(walk, node)

    monkeypatch.setattr(best_module._Walk, "children", children)
    monkeypatch.setattr(best_module, "MOST_STEPS", 10_000)
    answers = [f"{first} {second}" for first in ANSWERS for second in ANSWERS]
    model.rerank("pear", answers, "none", top=1)
    tree = AnswerTree.of([model.processor.encode_reply(one) for one in answers])
    assert len(read) < len(tree.inner) / 2 and len(read) == len(set(read))


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
    with pytest.raises(RequestError, match="context is 256"):
        model.rerank("pear", ["a" * 400], top=1)
    with pytest.raises(RequestError, match="top is at least 1"):
        model.rerank("pear", ["a"], top=0)
    with pytest.raises(RequestError, match="list of answers"):
        model.rerank("pear", [], top=1)
    with pytest.raises(RequestError, match="no tokenizer for 'dna'"):
        from anytoken import DNA

        model.score("pear", [DNA("ACGT")])
