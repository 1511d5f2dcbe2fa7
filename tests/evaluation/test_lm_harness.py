"""The lm-evaluation-harness runs our model on a task of its own YAML form, offline."""

import json
from types import SimpleNamespace

import pytest

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra harness")

from anytoken import AnyToken  # noqa: E402
from anytoken.evaluation.suite.lm_harness import AnyTokenLM  # noqa: E402
from anytoken.segments import Text  # noqa: E402
from anytoken.utils.errors import EvaluationError  # noqa: E402


@pytest.fixture(scope="module")
def model(save_tiny, tmp_path_factory):
    return AnyToken.from_pretrained(save_tiny(tmp_path_factory.mktemp("models") / "tiny", {}, 64), "cpu")


def requests(*arguments):
    return [SimpleNamespace(args=one) for one in arguments]


def test_likelihoods_are_those_of_score_and_replies_those_of_generate(model):
    lm = AnyTokenLM(model)
    asked = requests(("what is this?", " a red apple"), ("what is this?", " an apple"))
    found = [one for one, _ in lm.loglikelihood(asked)]
    assert found == pytest.approx(model.score("what is this?", ["a red apple", "an apple"]), abs=1e-4)
    made = model.generate("what is this?", "text", temperature=0.0, max_new_tokens=6).text
    assert lm.generate_until(requests(("what is this?", {"until": ["\x00none"], "max_gen_toks": 6}))) == [
        made
    ]
    cut = made[len(made) // 2]
    assert lm.generate_until(requests(("what is this?", {"until": [cut], "max_gen_toks": 6}))) == [
        made.split(cut)[0]
    ]


def test_a_continuation_is_greedy_if_decoding_gives_it(model, monkeypatch):
    lm, reply = AnyTokenLM(model), model.processor.encode_reply("an apple")
    monkeypatch.setattr(model, "generate_ids", lambda *_, **__: [SimpleNamespace(ids=[*reply, 0])])
    found = lm.loglikelihood(requests(("what?", " an apple"), ("what?", " an"), ("what?", " a red apple")))
    assert [greedy for _, greedy in found] == [True, False, False]


def test_plain_likelihoods_add_up_over_a_text(model):
    lm = AnyTokenLM(model, plain=True)
    [whole] = lm.loglikelihood_rolling(requests(("a red apple",)))
    pieces = lm.loglikelihood(requests(("a red", " apple"), ("", "a red")))
    assert sum(one for one, _ in pieces) == pytest.approx(whole, abs=1e-3) and whole < 0


def test_a_text_longer_than_the_context_is_read_in_windows_each_id_once(model, monkeypatch):
    import anytoken.evaluation.suite.lm_harness as module

    counted = []
    real = module.score_ids

    def count(engine, prompt, answers):
        counted.append((len(prompt), len(answers[0])))
        return real(engine, prompt, answers)

    monkeypatch.setattr(module, "score_ids", count)
    text = "what is this? " * 40
    [total] = AnyTokenLM(model, plain=True).loglikelihood_rolling(requests((text,)))
    assert sum(length for _, length in counted) == len(model.tokenize(Text(text))) > 64 and total < 0
    assert all(before + length <= 64 for before, length in counted)
    assert all(before >= 30 for before, _ in counted[1:])


def test_a_task_of_the_harness_runs_offline(model, tmp_path):
    lines = [
        {"question": "what is this?", "choices": ["a red apple", "a boat"], "answer": n % 2} for n in range(3)
    ]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = {
        "task": "apples", "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "set.jsonl")}},
        "output_type": "multiple_choice", "test_split": "test", "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "answer", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    found = lm_eval.simple_evaluate(
        model=AnyTokenLM(model), tasks=[task], bootstrap_iters=0, verbosity="ERROR"
    )
    scores = model.score("what is this?", ["a red apple", "a boat"])
    best = int(scores[1] > scores[0])
    assert found["results"]["apples"]["acc,none"] == pytest.approx(sum(n % 2 == best for n in range(3)) / 3)


def test_mistakes_are_named(model):
    with pytest.raises(EvaluationError, match="Unknown model argument 'dtype'"):
        AnyTokenLM(model, dtype="float16")
    with pytest.raises(EvaluationError, match="does not fit the context of 64"):
        AnyTokenLM(model).loglikelihood(requests(("a", "what is this? " * 60)))
