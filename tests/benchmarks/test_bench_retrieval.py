"""The retrieval benchmark: heads are trained from the model without its own, once, and compared on the same items."""

import numpy as np

import anytoken
from anytoken import Image, recipes
from anytoken.benchmarks import retrieval
from anytoken.benchmarks.data import tiny_shards
from anytoken.evaluation.suite.schema import load_tasks
from anytoken.model.embedding_head import EmbeddingHead, has_head

TINY = recipes.assets() / "tiny"
SHORT = ["steps=2", "eval.every=0", "contrastive.batch=4", "schedule.warmup_steps=1"]


def test_heads_are_compared_on_the_same_items_and_trained_once(tmp_path, monkeypatch):
    tasks = load_tasks(["retrieval"])[:2]
    monkeypatch.setattr(retrieval, "load_tasks", lambda names: tasks)
    monkeypatch.setattr(retrieval, "HEADS", {"stages/embed.yaml": retrieval.HEADS["stages/embed.yaml"]})
    shards = tiny_shards(tmp_path / "shards")

    def run():
        model = anytoken.load("mini", device="cpu")
        return retrieval.bench_retrieval(model, TINY, shards, tmp_path / "runs", 1, overrides=SHORT)

    found = run()
    heads = ["untrained", "embed", "embed_equal", "embed_scratch_1"]
    assert [(row["head"], row["task"]) for row in found["rows"]] == [
        (head, task) for head in heads for task in ("text->image", "image->text")
    ]
    for row in found["rows"]:
        assert row["prompts"] == 2 and 0 <= row["recall@1"]["value"] <= row["recall@5"]["value"] <= 1
    folder = tmp_path / "runs" / found["model"]
    assert (
        not has_head(folder / "model") and has_head(folder / "embed") and has_head(folder / "embed_scratch_1")
    )
    written = (folder / "embed" / "embedding.safetensors").stat().st_mtime_ns
    again = run()
    assert (folder / "embed" / "embedding.safetensors").stat().st_mtime_ns == written
    assert again["rows"] == found["rows"]
    table = retrieval.markdown({"commit": "abc", **found})
    assert (
        "| R@1 / R@5, % | untrained | embed | embed_equal | embed_scratch_1 |" in table
        and table.count("\n| ") == 2
    )
    assert "embed 2 of 4 pairs, embed_equal 2 of 4 pairs" in table and "commit abc" in table


def test_prompts_are_read_once_and_give_what_embed_gives(monkeypatch):
    model = anytoken.load("mini", device="cpu")
    plain, once = model.embed, retrieval.ReadOnce(model)
    shades = [Image(np.full((64, 64, 3), shade, np.uint8)) for shade in (0, 120, 250)]
    prompts = ["a fox", [*shades[:1], "and a fox"], *shades, "a fox"]
    heads = [model.embedding_head, EmbeddingHead.untrained(256, model.kinds)]
    wanted = []
    for head in heads:
        model.embedding_heads[None] = head
        wanted.append(plain(prompts))
    for number, head in enumerate(heads):
        model.embedding_heads[None] = head
        np.testing.assert_allclose(once(prompts), wanted[number], atol=1e-6)
        monkeypatch.setattr(retrieval, "read_states", None)  # nothing is read a second time
