"""Task files: mistakes are named with line and nearest word; records become questions; runs resume and compare."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from anytoken.evaluation.suite import compare, runner
from anytoken.evaluation.suite.metrics import Tools
from anytoken.evaluation.suite.samples import TaskSet
from anytoken.evaluation.suite.schema import (
    load_tasks,
    read_tasks,
)
from anytoken.evaluation.suite.template import fill, fill_each, kinds, parse
from anytoken.inference.score import classify
from anytoken.model.embedding_head import EmbeddingHead
from anytoken.segments import Image, Text
from anytoken.utils.errors import EvaluationError

GOOD = """\
name: colours
data: set.jsonl
split: test
prompt: "{image} Which colour?"
answer: "{colour}"
decoding:
  how: classify
metrics: [accuracy, mcc]
"""


@pytest.fixture
def folder(tmp_path):
    """Twelve images of one colour each, four of them for examples."""
    colours = {"red": (250, 0, 0), "green": (0, 250, 0), "blue": (0, 0, 250)}
    lines = []
    for number in range(12):
        name = list(colours)[number % 3]
        pixels = np.full((8, 8, 3), colours[name], np.uint8)
        pixels[0, 0] = number
        Image(pixels).save(tmp_path / f"{number}.png")
        lines.append(
            {
                "image": f"{number}.png",
                "colour": name,
                "number": number,
                "split": "train" if number < 4 else "test",
            }
        )
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


@pytest.fixture
def write(folder):
    def write_(text, name="my.yaml"):
        (folder / name).write_text(text)
        return folder / name

    return write_


class Painter:
    """Sees the colour of an image; errs on every prompt whose first pixel is in `wrong`."""

    kinds = ("text", "image")

    def __init__(self, wrong=(), weight=0.0):
        self.wrong, self.asked = set(wrong), []
        self.lm = SimpleNamespace(named_parameters=lambda: [("w", torch.tensor([weight]))])

    def colour(self, prompt):
        [image] = [one for one in prompt if getattr(one, "kind", "") == "image"]
        number, name = int(image.pixels[0, 0, 0]), ("red", "green", "blue")[int(image.pixels[4, 4].argmax())]
        return "none" if number in self.wrong else name

    def generate(self, prompts, output, batch, seed):
        assert batch and output == "text"
        self.asked += prompts
        usage = SimpleNamespace(new_tokens=2)
        return [
            SimpleNamespace(segments=[Text(self.colour(one))], finish_reason="stop", usage=usage)
            for one in prompts
        ]

    def score(self, prompt, answers, normalize="none"):
        self.asked.append(prompt)
        named = self.colour(prompt)
        return [0.0 if named in (one if isinstance(one, str) else one[0].text) else -3.0 for one in answers]

    def classify(self, prompt, labels, normalize="none"):
        return classify(labels, self.score(prompt, labels))


def run(model, path, out, name="painter", **options):
    tasks = load_tasks([path])
    tools = Tools(path.parent)
    return runner.run_tasks(model, tasks, out, tools, name, progress=False, resamples=200, **options)


def figures(folder, task):
    return runner.read_scores(folder)[task]["metrics"]


# ---- the schema ----


@pytest.mark.parametrize(
    ("change", "line", "says"),
    [
        (("metrics:", "metric:"), 8, "unknown key 'metric' (did you mean 'metrics'?); allowed: name"),
        (
            ("how: classify", "how: clasify"),
            7,
            "received 'clasify' (did you mean 'classify'?); allowed: generate",
        ),
        (("how: classify", "how: classify\n  shots: 2"), 8, "decoding.shots: unknown key 'shots'"),
        (("mcc", "mmc"), 8, "received 'mmc' (did you mean 'mcc'?); allowed: exact_match"),
        (
            ("mcc", "wer"),
            8,
            "the metric wer does not score classify; allowed: accuracy, macro_f1, mcc, auroc",
        ),
        (("mcc", "{name: auroc, positiv: x}"), 8, "unknown key 'positiv' (did you mean 'positive'?)"),
        (("split: test", "count: none"), 3, "count: Input should be a valid integer"),
        (("{image} W", "{imag:photo} W"), 4, "unknown kind 'imag' (did you mean 'image'?)"),
        (("{image} W", "{image W"), 4, "brace without its field"),
        (('answer: "{colour}"\n', ""), 1, "answer is missing"),
        (("name: colours", "name: a/b"), 1, "name: String should match pattern"),
        (("data: set.jsonl\n", ""), 1, "the key 'data' is missing"),
        (("split: test", "data: twice.jsonl"), 3, "the key 'data' is already in line 2"),
        (("split: test", "split: [test"), 4, "not YAML"),
        (
            ("split: test", "shots: {count: 1, seeds: 3}"),
            3,
            "shots.seeds: unknown key 'seeds' (did you mean 'seed'?)",
        ),
        (
            ("how: classify", "how: generate\n  output: imge"),
            8,
            "decoding.output: received 'imge' (did you mean 'image'?)",
        ),
        (("how: classify", "how: generate\n  extract: no group"), 8, "put the answer in parentheses"),
        (("how: classify", "how: retrieve\n  normalize: pmi"), 8, "normalize applies only to by: score"),
        (
            ("  how: classify\nmetrics: [accuracy, mcc]", "  how: generate\nmetrics: [chrf, psnr]"),
            8,
            "psnr compares image or video; the answer is text",
        ),
        (
            ("  how: classify\nmetrics: [accuracy, mcc]", "  how: generate\nmetrics: stoi"),
            8,
            "stoi compares speech",
        ),
        (
            ("  how: classify\nmetrics: [accuracy, mcc]", "  how: retrieve\nmetrics: {name: recall, k: 0}"),
            8,
            "greater than or equal to 1",
        ),
    ],
)
def test_a_mistake_names_line_key_and_nearest_word(write, change, line, says):
    path = write(GOOD.replace(*change))
    with pytest.raises(EvaluationError) as caught:
        read_tasks(path)
    assert f"{path} line {line}" in str(caught.value) and says in str(caught.value)


def test_tasks_of_a_file_share_its_keys_and_a_mistake_in_a_shared_key_has_its_line(write):
    shared = "data: set.jsonl\nsplit: test\nprompt: '{image}'\nanswer: '{colour}'\n"
    tasks = "tasks:\n- {name: a, metrics: wer}\n- name: b\n  split: train\n  metrics: [cer]\n"
    one, other = read_tasks(write(shared + tasks))
    assert (one.split, other.split, other.metrics[0].name) == ("test", "train", "cer")
    with pytest.raises(EvaluationError, match=r"my.yaml line 2, split"):
        read_tasks(write((shared + tasks).replace("split: test", "split: [1, 2]")))
    with pytest.raises(EvaluationError, match=r"line 8, metrics\.0: .*'ce' \(did you mean 'cer'"):
        read_tasks(write((shared + tasks).replace("  split: train\n", "").replace("[cer]", "[ce]")))


def test_files_are_found_by_path_folder_and_name(write, folder):
    write(GOOD)
    write(GOOD.replace("colours", "more"), "other.yaml")
    assert [one.name for one in load_tasks([folder])] == ["colours", "more"]
    with pytest.raises(EvaluationError, match="Two tasks are named 'colours'"):
        load_tasks([folder, folder / "my.yaml"])
    with pytest.raises(EvaluationError, match=r"dna/promotr is neither .*did you mean 'dna/promoter'"):
        load_tasks(["dna/promotr"])


# ---- templates ----


def test_templates_fill_kinds_paths_and_indices():
    record = {
        "image": "a.png",
        "photo": "b.png",
        "n": 1,
        "choices": ["x", "y"],
        "answers": [{"a": "p"}, {"a": "q"}],
    }
    opened = []

    def opener(field, value):
        opened.append((field.kind, value))
        return Image(np.zeros((2, 2, 3), np.uint8))

    found = fill("{{see}} {image}{image:photo} or {choices}?", record, opener)
    assert opened == [("image", "a.png"), ("image", "b.png")]
    assert [getattr(one, "text", one.kind) for one in found] == ["{see}", "image", "image", "or x, y?"]
    assert fill("{choices[n]}{choices[0]}", record, opener) == [Text("yx")]
    assert fill("{text[0]} on {text[1]}", {"text": "a fox, red"}, opener) == [Text("a fox on red")]
    with pytest.raises(ValueError, match="1 entries has no entry 1"):
        fill("{text[1]}", {"text": "a fox"}, opener)
    assert fill_each("{answers.a}", record, opener) == [[Text("p")], [Text("q")]]
    assert kinds("a {image} b {n}{n}") == ["text", "image", "text"]
    with pytest.raises(EvaluationError, match="character 3"):
        parse("a }")
    with pytest.raises(ValueError, match=r"has no 'choice' \(did you mean 'choices'"):
        fill("{choice}", record, opener)


# ---- samples ----


def test_samples_are_repeatable_and_shots_are_other_records_of_their_split(write, folder):
    text = GOOD + "count: 5\nshots: {count: 2, split: test}\n"
    [task] = read_tasks(write(text))
    samples = TaskSet(task, folder).samples()
    assert [one.id for one in samples] == [one.id for one in TaskSet(task, folder).samples()]
    assert len(samples) == 5
    for one in samples:
        assert [turn["role"] for turn in one.messages] == ["user", "assistant"] * 2 + ["user"]
        asked = [turn["content"][0].pixels[0, 0, 0] for turn in one.messages if turn["role"] == "user"]
        assert len(set(asked)) == 3 and asked[-1] == one.id and min(asked) >= 4
        assert one.labels[one.truth_label] == one.record["colour"]
    longer = TaskSet(read_tasks(write(text.replace("count: 5", "count: 7")))[0], folder).samples()
    assert [one.id for one in longer[:5]] == [one.id for one in samples]
    [alone] = TaskSet(read_tasks(write(text.replace("count: 5", "count: 1")))[0], folder).samples()
    assert alone.labels == samples[0].labels == ("blue", "green", "red")  # whatever the count


def test_conversations_are_asked_up_to_their_last_answer(write, folder):
    turns = [("user", "<image>which colour?"), ("assistant", "red"), ("user", "sure?"), ("assistant", "yes")]
    line = {"image": "0.png", "conversations": [{"from": who, "value": text} for who, text in turns]}
    line["conversations"] = [
        {"from": {"user": "human", "assistant": "gpt"}[who], "value": text} for who, text in turns
    ]
    (folder / "chat.jsonl").write_text(json.dumps(line) + "\n")
    path = write(
        'name: chat\ndata: chat.jsonl\nprompt: "{messages}"\nanswer: "{messages}"\nmetrics: exact_match\n'
    )
    [task] = read_tasks(path)
    [sample] = TaskSet(task, folder).samples()
    assert [turn["role"] for turn in sample.messages] == ["user", "assistant", "user"]
    assert [one.kind for one in sample.messages[0]["content"]] == ["image", "text"]
    assert sample.truth_text == "yes" and task.output is None


def test_what_a_set_lacks_is_said(write, folder):
    def samples(change):
        return TaskSet(read_tasks(write(GOOD.replace(*change)))[0], folder).samples()

    with pytest.raises(EvaluationError, match=r"there is no .*nowhere.jsonl"):
        samples(("set.jsonl", "nowhere.jsonl"))
    with pytest.raises(EvaluationError, match=r"none of the 12 records .* their splits: test, train"):
        samples(("split: test", "split: tset"))
    with pytest.raises(
        EvaluationError, match=r"record \d+ of set.jsonl: \{color\}: the record has no 'color' \(did you"
    ):
        samples(("{colour}", "{color}"))
    with pytest.raises(
        EvaluationError, match=r"answer 'blue' of record \d+ is none of the labels: red, green"
    ):
        samples(("how: classify", "how: classify\n  labels: [red, green]"))
    with pytest.raises(EvaluationError, match="two labels or more"):
        samples(("how: classify", "how: classify\n  labels: []"))
    with pytest.raises(
        EvaluationError, match=r"group_by is 'color', and record 5 .*\(did you mean 'colour'\?\)"
    ):
        samples(("split: test", "split: test\ngroup_by: color"))
    retrieve = "how: retrieve\n  item: '{image}'\n  match: color"
    with pytest.raises(EvaluationError, match=r"decoding\.match is 'color'"):  # all would match all
        samples(("how: classify\nmetrics: [accuracy, mcc]", f"{retrieve}\nmetrics: {{name: recall, k: 1}}"))
    (folder / "none.jsonl").write_text("")
    with pytest.raises(EvaluationError, match=r"none\.jsonl holds no records"):
        samples(("set.jsonl", "none.jsonl"))
    with pytest.raises(EvaluationError, match="12 shots need more records"):
        samples(("split: test", "shots: {count: 12, split: null}"))


# ---- runs ----


def test_a_run_is_scored_beside_majority_and_shuffled_answers(write, tmp_path):
    path = write(GOOD + "group_by: colour\n")
    found = figures(run(Painter(), path, tmp_path / "out"), "colours")
    assert found["accuracy"]["model"]["value"] == 1 and found["mcc"]["model"]["value"] == 1
    assert found["accuracy"]["majority"]["value"] < 0.5 and found["mcc"]["majority"]["value"] == 0
    assert found["accuracy"]["shuffled"]["value"] < 0.7
    assert set(found["accuracy"]["groups"]) == {"red", "green", "blue"}
    some = figures(run(Painter(wrong=[4, 5]), path, tmp_path / "other"), "colours")["accuracy"]["model"]
    assert some["value"] < 1 and some["low"] < some["value"] <= some["high"]


def test_a_killed_run_asks_only_for_what_is_missing(write, tmp_path):
    path = write(
        GOOD.replace("how: classify", "how: generate").replace("[accuracy, mcc]", "[exact_match, wer]")
    )
    whole = run(Painter(), path, tmp_path / "whole")
    part = tmp_path / "part/painter"
    part.mkdir(parents=True)
    lines = (whole / "colours.jsonl").read_bytes().splitlines(keepends=True)
    (part / "colours.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:10])
    model = Painter()
    run(model, path, tmp_path / "part")
    assert len(model.asked) == 8 - 3
    assert (part / "colours.json").read_bytes() == (whole / "colours.json").read_bytes()
    model = Painter()
    run(model, path, tmp_path / "part")
    assert not model.asked and (part / "colours.jsonl").read_bytes() == (whole / "colours.jsonl").read_bytes()
    write(path.read_text().replace("[exact_match, wer]", "[cer]"))  # scored anew, not asked anew
    run(model, path, tmp_path / "part")
    assert not model.asked and set(figures(part, "colours")) == {"cer"}
    with pytest.raises(EvaluationError, match="answers of another model"):
        run(Painter(weight=1.0), path, tmp_path / "part")
    write(path.read_text().replace("Which", "What"))
    with pytest.raises(EvaluationError, match="another version of the task or its data"):
        run(model, path, tmp_path / "part")
    run(model, path, tmp_path / "part", overwrite=True)
    assert len(model.asked) == 8


def test_extract_takes_the_answer_out_of_a_reply(write, tmp_path):
    text = GOOD.replace("how: classify", "extract: '(r?e?d|gre)'").replace("[accuracy, mcc]", "exact_match")
    found = figures(run(Painter(), write(text), tmp_path / "out"), "colours")["exact_match"]["model"]
    assert 0 < found["value"] < 0.5  # red is found whole, others are cut or empty


def test_retrieval_ranks_items_and_a_tie_is_no_success(write, tmp_path):
    text = GOOD.replace("how: classify", "how: retrieve\n  by: score").replace(
        "[accuracy, mcc]", "[recall, mrr, map]"
    )
    path = write(text)
    found = figures(run(Painter(), path, tmp_path / "out"), "colours")
    assert found["recall@1"]["model"]["value"] == 1 and found["map"]["model"]["value"] == 1
    blind = figures(run(Painter(wrong=range(12)), path, tmp_path / "blind"), "colours")
    assert blind["recall@1"]["model"]["value"] == 0 and blind["mrr"]["model"]["value"] == pytest.approx(
        1 / 3, abs=1e-4
    )
    with pytest.raises(EvaluationError, match="no embed"):
        run(Painter(), write(text.replace("by: score", "by: embed")), tmp_path / "embed")


class Embedder(Painter):
    """A vector per colour, for images and words alike."""

    def embed(self, prompts):
        rows = []
        for one in prompts:
            words = "".join(getattr(part, "text", "") for part in one)
            named = self.colour(one) if any(part.kind == "image" for part in one) else words
            rows.append([float(named == name) for name in ("red", "green", "blue")])
        return torch.tensor(rows)


def test_retrieval_by_embeddings_finds_all_items_that_match(write, tmp_path):
    text = (
        GOOD.replace("how: classify", "how: retrieve\n  item: '{image}'\n  match: colour")
        .replace("{image} Which colour?", "{colour}").replace("[accuracy, mcc]", "[map, {name: recall, k: [1]}]")
    )  # fmt: skip
    found = figures(run(Embedder(), write(text), tmp_path / "out"), "colours")
    assert found["map"]["model"]["value"] == 1 and found["map"]["shuffled"]["value"] < 1
    assert found["recall@1"]["model"]["value"] == 1


def test_rankings_by_another_head_are_not_kept(write, tmp_path):
    text = GOOD.replace("how: classify", "how: retrieve\n  item: '{image}'\n  match: colour")
    text = text.replace("{image} Which colour?", "{colour}").replace("[accuracy, mcc]", "map")
    model = Embedder()
    model.embedding_heads = {None: EmbeddingHead(4, ["text"], 3)}
    run(model, write(text), tmp_path / "out")
    run(model, write(text), tmp_path / "out")
    model.embedding_heads = {None: EmbeddingHead(4, ["text"], 3)}  # other weights
    with pytest.raises(EvaluationError, match="answers of another model"):
        run(model, write(text), tmp_path / "out")


class Hopper(Painter):
    """Images are near words of their colour, and these near things; images and things are not near each other."""

    def embed(self, prompts):
        rows = []
        for one in prompts:
            words = "".join(getattr(part, "text", "") for part in one)
            image = any(part.kind == "image" for part in one)
            name = self.colour(one) if image else words.removeprefix("thing ")
            unit = [float(name == colour) for colour in ("red", "green", "blue")]
            rows.append(
                [*(unit if image or name == words else [0.0] * 3), *(unit if not image else [0.0] * 3)]
            )
        return torch.tensor(rows)


def test_two_hops_find_what_one_cannot(write, tmp_path):
    text = (
        GOOD.replace("how: classify", "how: retrieve\n  item: 'thing {colour}'\n  via: '{colour}'")
        .replace("{image} Which colour?", "{image}").replace("[accuracy, mcc]", "{name: recall, k: [1]}")
    )  # fmt: skip
    found = figures(run(Hopper(), write(text), tmp_path / "out"), "colours")
    assert found["recall@1"]["model"]["value"] == 1
    found = figures(
        run(Hopper(), write(text.replace("  via: '{colour}'\n", "")), tmp_path / "one"), "colours"
    )
    assert found["recall@1"]["model"]["value"] == 0
    with pytest.raises(EvaluationError, match="via applies only to by: embed"):
        read_tasks(write(text.replace("how: retrieve", "how: retrieve\n  by: score")))


def test_a_joined_record_is_of_the_split_that_is_asked(write, folder):
    text = (
        GOOD.replace('"{colour}"', '"{other.split}"') + "join: {data: set.jsonl, key: colour, split: train}\n"
    )
    text = text.replace("how: classify", "how: generate").replace("[accuracy, mcc]", "exact_match")
    samples = TaskSet(read_tasks(write(text))[0], folder).samples()
    assert len(samples) == 8 and {one.truth_text for one in samples} == {"train"}


def test_scores_without_labels_are_judged_by_auroc(write, tmp_path):
    text = GOOD.replace("how: classify", "how: score\n  of: '{colour}'\n  against: blue").replace(
        "[accuracy, mcc]", "{name: auroc, positive: red}"
    )
    model = Painter(wrong=[5, 8])
    found = figures(run(model, write(text), tmp_path / "out"), "colours")["auroc"]
    # red: 6, 9; others: green 4, 7, 10, blue 11 and two that nothing is seen of
    assert found["model"]["value"] == pytest.approx((2 * 3 + 2 * 3 * 0.5) / 12)


def test_two_models_are_compared_pair_by_pair(write, tmp_path):
    path = write(GOOD)
    good = run(Painter(), path, tmp_path / "out", "good")
    bad = run(Painter(wrong=range(9)), path, tmp_path / "out", "bad")
    one = compare.compare(good, bad, 400)["colours"]["accuracy"]
    assert one["value"] > 0 and one["low"] > 0 and one["p"] <= 0.05 and one["total"] == 8
    same = compare.compare(good / "colours.json", good / "colours.json", 50)["colours"]["mcc"]
    assert (same["value"], same["low"], same["high"], same["p"]) == (0, 0, 0, 1)
    rows = compare.rows_of({"colours": {"accuracy": one}}, "good", "bad")
    assert rows[1][-1] == "good" and rows[1][2] == "100.0"
    with pytest.raises(EvaluationError, match="holds no results"):
        compare.compare(good / "colours.jsonl", bad)
    with pytest.raises(EvaluationError, match="different versions"):
        other = run(Painter(), write(GOOD.replace("Which", "What")), tmp_path / "other", "good")
        compare.compare(good, other)


def test_the_page_holds_figures_and_media(write, tmp_path):
    folder = run(
        Painter(wrong=[6]), write(GOOD.replace("name: colours", "name: <colours>")), tmp_path / "out"
    )
    page = (folder / "index.html").read_text()
    assert page.count("data:image/png;base64") == 8 and "&lt;colours&gt;" in page and "<colours>" not in page
    assert "<td>accuracy</td>" in page and "http" not in page
