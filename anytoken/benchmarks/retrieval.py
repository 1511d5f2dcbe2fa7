"""Retrieval by embeddings: the heads of stages/embed*.yaml, trained here, against untrained states and a dual encoder
from scratch (next to a head trained on as many pairs), on the held-out items of the bundled `retrieval` tasks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anytoken import recipes
from anytoken.benchmarks.harness import Figures
from anytoken.evaluation.suite.metric_base import Tools
from anytoken.evaluation.suite.runner import model_fingerprint, read_scores, run_tasks
from anytoken.evaluation.suite.schema import Task, load_tasks
from anytoken.inference.api import AnyToken
from anytoken.inference.embed import Embedder
from anytoken.model.embedding_head import EmbeddingHead, pool, read_states
from anytoken.training.config import TrainConfig
from anytoken.training.trainer import train

UNTRAINED = "untrained"
HEADS = {  # recipe: the tokenized sets that it reads
    "stages/embed.yaml": ["data.train={shards}/images", "data.test={shards}/images"],
    "stages/embed_all.yaml": ["data_root={shards}"],
}
SCRATCH = "stages/embed_scratch.yaml"


def bench_retrieval(
    model: AnyToken,
    data: Path,
    shards: Path,
    runs: Path,
    scratch_steps: int | None = None,
    threads: int = 1,
    overrides: Sequence[str] = (),
    count: int | None = None,
) -> Figures:
    """Rows by task and head: R@1, R@5 and MRR with 95 % intervals; and each head's steps and seconds of training.

    data: the built sets. shards: those sets, tokenized with the model's tokenizers. runs: where heads are trained, in a
    folder of this model, which a later call resumes. scratch_steps: of the dual encoder from scratch, by default its
    recipe's; 0 leaves it out. overrides: of all recipes. count: held-out prompts per task, all by default.
    """
    folder = runs / model_fingerprint(model)[:12]
    base, results = folder / "model", folder / "results"
    model.embedding_heads.clear()
    if not base.exists():
        model.save_pretrained(base)
    tasks = [one.model_copy(update={"count": count} if count else {}) for one in load_tasks(["retrieval"])]
    hidden = model.lm.config.get_text_config().hidden_size
    model.embedding_heads[None] = EmbeddingHead.untrained(hidden, model.kinds)
    model.embed = ReadOnce(model)  # type: ignore[method-assign, assignment]
    rows = list(_rows(model, UNTRAINED, tasks, data, results))
    trained: Figures = {}
    common = [f"threads={threads}", *overrides]
    jobs = [(recipe, Path(recipe).stem, places, list[str]()) for recipe, places in HEADS.items()]
    changed = [f"steps={scratch_steps}"] if scratch_steps else []
    pairs = HEADS["stages/embed.yaml"]
    if scratch_steps != 0:  # and a head that sees as many pairs as the dual encoder does
        stage = TrainConfig.load(recipes.find(SCRATCH), changed)
        assert stage.contrastive is not None
        equal = [f"steps={stage.steps}", f"contrastive.batch={stage.contrastive.batch}"]
        jobs.append(("stages/embed.yaml", "embed_equal", pairs, equal))
    for recipe, name, places, extra in jobs:
        given = [f"init_from={base}", *(place.format(shards=shards) for place in places), *extra]
        trained[name] = _train(recipe, [*given, *common], folder / name)
        model.embedding_heads[None] = EmbeddingHead.load(folder / name)
        rows += _rows(model, name, tasks, data, results)
    if scratch_steps != 0:
        name = Path(SCRATCH).stem if scratch_steps is None else f"{Path(SCRATCH).stem}_{scratch_steps}"
        given = [place.format(shards=shards) for place in pairs]
        given += [f"tokenizers.text={base}/text_tokenizer", f"tokenizers.image={base}/tokenizers/image"]
        trained[name] = _train(SCRATCH, [*given, *changed, *common], folder / name)
        rows += _rows(AnyToken.from_pretrained(folder / name), name, tasks, data, results)
    return {"model": folder.name, "trained": trained, "rows": rows}


class ReadOnce:
    """`model.embed` that tokenizes and reads every prompt once, for all heads of a frozen model."""

    def __init__(self, model: AnyToken) -> None:
        self.model = model
        self.ids: dict[Any, list[int]] = {}  # by prompt
        self.states: dict[tuple[int, ...], Tensor] = {}  # [T, H], by ids

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[Any]) -> np.ndarray:
        """Unit vectors, float32 [N, W], of the head that the model has now."""
        keys = [tuple(one) if isinstance(one, list) else one for one in prompts]
        new = {key: one for key, one in zip(keys, prompts, strict=True) if key not in self.ids}
        self.ids |= (
            zip(new, self.model.processor.encode_chats(list(new.values())), strict=True) if new else {}
        )
        asked = [tuple(self.ids[key]) for key in keys]
        with self.model.embedder() as embedder:
            unread = list(dict.fromkeys(one for one in asked if one not in self.states))
            for rows, ids, lengths in embedder.batches(unread):
                states = read_states(embedder.lm, ids)
                for place, row in enumerate(rows):
                    self.states[unread[row]] = states[place, : lengths[place]].clone()
            return np.concatenate([self._vector(embedder, ids) for ids in asked])

    def _vector(self, embedder: Embedder, ids: tuple[int, ...]) -> np.ndarray:
        embedder.check(ids)
        asked = torch.tensor([ids], device=embedder.lm.device)
        modality, length = embedder.table[asked], torch.tensor([len(ids)], device=embedder.lm.device)
        pooled = pool(self.states[ids][None], modality, length, len(embedder.head.modalities))
        return embedder.head(pooled).float().cpu().numpy()


def _train(recipe: str, overrides: Sequence[str], output: Path) -> Figures:
    """Train a recipe, or keep what an earlier call has trained: its steps, pairs per step, and this call's seconds."""
    stage = TrainConfig.load(recipes.find(recipe), [*overrides, f"output={output}"])
    start = time.monotonic()
    train(stage)
    assert stage.contrastive is not None
    return {
        "steps": stage.steps, "pairs_per_step": stage.contrastive.batch, "seed": stage.seed,
        "seconds_of_this_call": round(time.monotonic() - start, 1),
    }  # fmt: skip


def _rows(model: AnyToken, name: str, tasks: Sequence[Task], data: Path, results: Path) -> Iterator[Figures]:
    """A row for each task whose kinds the model's head embeds."""
    known = set(model.embedding_head.modalities)
    chosen = [one for one in tasks if set(one.name.removeprefix("retrieval:").split("->")) <= known]
    found = read_scores(run_tasks(model, chosen, results, Tools(data), name, overwrite=True))
    for task in chosen:
        report = found[task.name]
        row = {"task": task.name.removeprefix("retrieval:"), "head": name, "prompts": report["samples"]}
        scores = {metric: figures["model"] for metric, figures in report["metrics"].items()}
        yield row | scores | {"chance": report["metrics"]["recall@1"]["shuffled"]["value"]}


def markdown(figures: Figures) -> str:
    """R@1 and R@5 in percent: a row per task, a column per head."""
    heads = list(dict.fromkeys(row["head"] for row in figures["rows"]))
    cells = {
        (row["task"], row["head"]): f"{_percent(row, 1)} / {_percent(row, 5)}" for row in figures["rows"]
    }
    lines = [f"| R@1 / R@5, % | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for task in dict.fromkeys(row["task"] for row in figures["rows"]):
        lines.append(f"| {task} | {' | '.join(cells.get((task, head), '') for head in heads)} |")
    steps = [
        f"{name} {one['steps']} of {one['pairs_per_step']} pairs" for name, one in figures["trained"].items()
    ]
    prompts = sorted({row["prompts"] for row in figures["rows"]})
    return "\n".join([
        *lines, "",
        f"Steps: {', '.join(steps)}. Held-out prompts per task: {', '.join(map(str, prompts))}; "
        f"seed 0, commit {figures['commit']}.",
    ])  # fmt: skip


def _percent(row: Figures, k: int) -> str:
    return f"{100 * row[f'recall@{k}']['value']:.1f}"
