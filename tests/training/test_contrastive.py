"""Contrastive terms by hand, exact gradients in chunks and over processes, and the stage that uses them."""

import json
import os
import signal
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from anytoken.model.embedding_head import EmbeddingHead
from anytoken.processor import Processor
from anytoken.training import contrastive as losses
from anytoken.training import feature_cache, pair_trainer
from anytoken.training.checkpoint import saved_states
from anytoken.training.config import (
    TrainConfig,
)
from anytoken.training.contrastive import Options, Side, contrastive_loss
from anytoken.training.grad_cache import backward_in_chunks
from anytoken.training.interrupts import Interrupted
from anytoken.training.metrics import read_metrics
from anytoken.training.pair_encoder import PairEncoder
from anytoken.training.pair_trainer import PairTrainer
from anytoken.training.pairs import PairMixture
from anytoken.training.trainer import train
from anytoken.utils.errors import ConfigError, DataError

N, W = 6, 8


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


LEFT, RIGHT, SCALE = Side(unit(N, W)), Side(unit(N, W, seed=1)), torch.tensor(5.0)


def loss_of(left: Side = LEFT, right: Side = RIGHT, **settings: Any) -> float:
    return float(contrastive_loss(left, right, SCALE, Options(**settings)).loss)


# ---- terms ----


def test_the_base_is_info_nce_both_ways() -> None:
    logits, labels = SCALE * LEFT.vectors @ RIGHT.vectors.T, torch.arange(N)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    found = contrastive_loss(LEFT, RIGHT, SCALE, Options())
    assert float(found.loss) == pytest.approx(float(expected), abs=1e-6)
    assert float(found.nll.mean()) == pytest.approx(float(expected), abs=1e-6)
    perfect = contrastive_loss(LEFT, LEFT, SCALE, Options())
    assert perfect.right.tolist() == [1.0] * N and perfect.loss < expected


def test_several_positives_share_what_is_wanted() -> None:
    targets = losses.equal_targets(torch.tensor([0, 1, 0]))
    assert targets.tolist() == [[0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]]
    twins = Side(unit(2, W)[[0, 1, 0]])
    alike = contrastive_loss(twins, twins, SCALE * 20, Options(), (targets, targets)).loss
    assert float(alike) == pytest.approx(2 * np.log(2) / 3, abs=1e-3)  # of each two one cannot do better
    assert contrastive_loss(twins, twins, SCALE, Options(), (targets, targets)).right.tolist() == [1.0] * 3


def test_graded_targets_follow_the_likeness_of_the_questions() -> None:
    states = (
        torch.tensor([[1.0, 0.0], [0.9, 0.1], [-1.0, 0.5], [-0.9, -0.6]]) + 100
    )  # one direction in common
    targets = losses.graded_targets(states, 4.0)
    assert torch.allclose(targets.sum(1), torch.ones(4))
    assert targets[0, 0] > targets[0, 1] > targets[0, 2] and targets[0, 2] < 0.02
    sharper = losses.graded_targets(states, 50.0)
    assert sharper[2, 2] > targets[2, 2] and sharper.diagonal().min() > 0.45


def test_matryoshka_is_the_mean_over_prefixes() -> None:
    cut = [Side(F.normalize(side.vectors[:, :3], dim=1)) for side in (LEFT, RIGHT)]
    assert loss_of(widths=[3, W]) == pytest.approx((loss_of() + loss_of(*cut)) / 2, abs=1e-6)


def test_token_similarity_is_the_mean_of_the_best_matches() -> None:
    left, right = unit(2, 3, W), unit(2, 4, W, seed=1)
    left[1, 2] = 0  # shorter by a token
    right[0, 1:] = 0
    found = losses.token_similarity(Side(left[:, 0], left), Side(right[:, 0], right))
    for i, one in enumerate((left[0], left[1, :2])):
        for j, other in enumerate((right[0, :1], right[1])):
            similar = one @ other.T
            expected = (similar.amax(1).mean() + similar.amax(0).mean()) / 2
            assert float(found[i, j]) == pytest.approx(float(expected), abs=1e-6)
    sides = Side(left[:, 0], left), Side(right[:, 0], right)
    scored = contrastive_loss(*sides, SCALE, Options(tokenwise=0.5))
    bare = contrastive_loss(*sides, SCALE, Options())
    assert float(scored.loss) == pytest.approx(float(bare.loss + 0.5 * scored.terms["tokenwise"]), abs=1e-6)


def test_intra_modal_consistency_is_zero_for_sides_of_one_shape() -> None:
    turn = torch.linalg.qr(torch.randn(W, W, generator=torch.Generator().manual_seed(3)))[0]
    assert float(losses.intra_modal_consistency(LEFT.vectors, LEFT.vectors)) < 1e-10
    assert float(losses.intra_modal_consistency(LEFT.vectors, LEFT.vectors @ turn)) > 0.01  # lie apart
    assert float(losses.intra_modal_consistency(LEFT.vectors, RIGHT.vectors)) > 0.01
    assert loss_of(intra_modal=2.0) > loss_of()


def test_hard_negatives_count_for_more() -> None:
    logits = torch.tensor([[0.0, 2.0, -2.0], [0, 0, 0], [0, 0, 0]])
    eye, positive = torch.eye(3), torch.eye(3).bool()
    plain = losses.cross_entropy(logits, eye, positive)
    assert torch.allclose(plain, F.cross_entropy(logits, torch.arange(3), reduction="none"))
    hard = losses.cross_entropy(logits, eye, positive, 1.0)
    importance = 2 * torch.softmax(torch.tensor([2.0, -2.0]), 0)
    expected = torch.log(1 + importance[0] * np.exp(2.0) + importance[1] * np.exp(-2.0))
    assert float(hard[0]) == pytest.approx(float(expected), abs=1e-5) and hard[0] > plain[0]
    assert torch.allclose(hard[1:], plain[1:])  # equally near ones count alike


def test_pairs_that_do_not_belong_together_count_for_less() -> None:
    wrong = Side(LEFT.vectors[[0, 1, 2, 3, 5, 4]])  # the last two are swapped
    weights = losses.noise_weights(SCALE * LEFT.vectors @ wrong.vectors.T, 1.0)
    assert weights[4:].max() < 0.5 * weights[:4].min()
    assert loss_of(right=wrong, noise=1.0) < loss_of(right=wrong)
    counted = contrastive_loss(LEFT, wrong, SCALE, Options(), weights=torch.tensor([1.0, 1, 1, 1, 0, 0]))
    assert counted.loss < loss_of(right=wrong)


def test_a_teacher_moves_the_targets() -> None:
    teacher = torch.full((N, N), 1 / N)
    found = losses.distilled(torch.eye(N), teacher, Options(teacher_weight=0.4))
    assert torch.allclose(found, 0.6 * torch.eye(N) + 0.4 / N)
    own = (SCALE * LEFT.vectors @ RIGHT.vectors.T).softmax(1)
    back = (SCALE * RIGHT.vectors @ LEFT.vectors.T).softmax(1)
    left = LEFT.vectors.clone().requires_grad_()
    loss = contrastive_loss(
        Side(left), RIGHT, SCALE, Options(teacher_weight=1.0), teacher=(own, back)
    ).loss  # who is its own teacher is at its minimum
    assert torch.autograd.grad(loss, left)[0].abs().max() < 1e-6


def test_recall() -> None:
    left = unit(20, W)
    assert losses.retrieval_recall(left, left, torch.eye(20).bool()) == {"R@1": 1.0, "R@5": 1.0}
    shifted = losses.retrieval_recall(left, left.roll(1, 0), torch.eye(20).bool())
    assert shifted["R@1"] == 0.0


# ---- gradients ----


@pytest.mark.parametrize("chunk", [1, 4, 5])
def test_gradients_in_chunks_are_those_of_the_whole_batch(chunk: int) -> None:
    torch.manual_seed(0)
    encoder, scale = (
        nn.Sequential(nn.Linear(5, W), nn.Dropout(0.3), nn.Tanh(), nn.Linear(W, W)),
        SCALE.clone(),
    )
    scale.requires_grad_()
    items = [torch.randn(8, 5), torch.randn(8, 5)]

    def loss(left: tuple[torch.Tensor], right: tuple[torch.Tensor]) -> torch.Tensor:
        sides = (Side(F.normalize(one[0], dim=1)) for one in (left, right))
        return contrastive_loss(*sides, scale, Options(widths=[3], intra_modal=0.5)).loss

    torch.manual_seed(1)
    chunks = [one.split(chunk) for one in items]
    whole = loss(*((torch.cat([encoder(part) for part in parts]),) for parts in chunks))
    parameters = [*encoder.parameters(), scale]
    expected = torch.autograd.grad(whole, parameters)
    torch.manual_seed(1)
    found = backward_in_chunks(lambda one: (encoder(one),), chunks, loss)
    assert float(found) == pytest.approx(whole.item(), abs=1e-6)
    for one, gradient in zip(parameters, expected, strict=True):
        assert one.grad is not None and (one.grad - gradient).abs().max() < 1e-5


# ---- the stage ----


@pytest.fixture(scope="module")
def base(world: Path, toy_recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = toy_recipe(world, tmp_path_factory.mktemp("base"))
    return train(TrainConfig.from_dict(recipe | {"steps": 2}))


@pytest.fixture
def pairs(world: Path, base: Path, tmp_path: Path) -> dict[str, Any]:
    """A recipe that learns which tile and which beep a name means."""
    return {
        "init_from": str(base), "output": str(tmp_path / "embed"), "data_root": str(world), "trainable": [],
        "data": [{"path": "things", "views": {"text->tile": 1, "beep->text": 1}, "split": None}],
        "eval": {"batches": 1, "data": [{"path": "things", "views": {"text->tile": 1}, "split": None}]},
        "contrastive": {"batch": 4, "chunk": 3, "width": 16, "widths": [8]},
        "optimizer": {"lr": 2e-2}, "schedule": {"warmup_steps": 2}, "steps": 6, "context": 64, "save_every": 3,
        "log_every": 1,
    }  # fmt: skip


LORA = {"lora": {"r": 4, "alpha": 8, "experts": False, "dropout": 0.1}, "trainable": ["*"]}
BOTH = [pytest.param({}, id="frozen", marks=pytest.mark.slow), pytest.param(LORA, id="lora")]


def state(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    files = ("embedding.safetensors", "adapter_model.safetensors")
    return {
        f"{name} {key}": one
        for name in files
        if (folder / name).is_file()
        for key, one in load_file(folder / name).items()
    }


def test_a_head_learns_to_retrieve_on_a_frozen_model(pairs: dict[str, Any]) -> None:
    pairs |= {"steps": 40}
    folder = train(TrainConfig.from_dict(pairs))
    assert {path.name for path in folder.iterdir()} >= {
        "embedding.safetensors",
        "metrics.jsonl",
        "report.html",
    }
    assert not (folder / "config.json").exists() and not (folder / "state").exists()
    entries = read_metrics(folder / "metrics.jsonl")
    assert entries[-2]["loss"] < 0.3 * entries[0]["loss"] and entries[-2]["temperature"] > 0
    assert {name for entry in entries for name in entry.get("groups", {})} == {"text->tile", "beep->text"}
    assert entries[-1]["eval"]["retrieval"]["text->tile"] == {"R@1": 1.0, "R@5": 1.0, "items": 5}
    assert entries[-1]["eval"]["retrieval"]["tile->text"]["R@1"] == 1.0
    head = EmbeddingHead.load(folder)
    assert head.modalities == ("text", "tile", "beep") and head.widths == (8, 16)
    assert train(TrainConfig.from_dict(pairs)) == folder  # it is finished


def test_an_encoder_from_scratch_learns_to_retrieve(
    pairs: dict[str, Any], world: Path, toy_recipe: Any, tmp_path: Path
) -> None:
    fresh = {name: toy_recipe(world, tmp_path)[name] for name in ("init_from", "tokenizers", "model")}
    changes = {"trainable": ["*"], "steps": 60, "optimizer": {"lr": 1e-2}, "save_every": 60}
    folder = train(TrainConfig.from_dict(pairs | fresh | changes))
    entries = read_metrics(folder / "metrics.jsonl")
    assert entries[-2]["loss"] < 0.5 * entries[0]["loss"]
    assert entries[-1]["eval"]["retrieval"]["text->tile"]["R@5"] == 1.0
    assert (folder / "model.safetensors").is_file() and (folder / "embedding.safetensors").is_file()


@pytest.mark.parametrize(
    "changes",
    [
        {"positives": "text", "tokenwise": 0.5, "intra_modal": 0.1},
        {"graded": 4.0, "hard_negatives": 0.5, "noise": 0.5, "teacher": "momentum"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_option_trains(pairs: dict[str, Any], changes: dict[str, Any]) -> None:
    pairs["contrastive"] |= changes
    entries = read_metrics(train(TrainConfig.from_dict(pairs | {"steps": 3})) / "metrics.jsonl")
    assert len([entry for entry in entries if "loss" in entry]) == 3
    for name in set(changes) & {"tokenwise", "intra_modal"}:
        assert entries[0][name] > 0


def test_an_adapter_is_trained_with_the_head_and_loads_with_it(pairs: dict[str, Any], base: Path) -> None:
    from anytoken.inference.api import AnyToken

    folder = train(TrainConfig.from_dict(pairs | LORA))
    assert (folder / "adapter_model.safetensors").is_file() and (folder / "README.md").is_file()
    model = AnyToken.from_pretrained(base)
    model.load_adapter(folder, "search")
    merged = AnyToken.from_pretrained(base, adapter=folder)
    assert np.abs(model.embed(["ant", "bee"]) - merged.embed(["ant", "bee"])).max() < 1e-5
    assert not np.allclose(
        model.embed(["ant"]), AnyToken.from_pretrained(base).embed(["ant"], untrained=True)[:, :16]
    )


@pytest.mark.slow
def test_weights_that_are_trained_make_a_checkpoint(pairs: dict[str, Any]) -> None:
    from anytoken.inference.api import AnyToken

    folder = train(TrainConfig.from_dict(pairs | {"trainable": ["*layers.1*"]}))
    assert AnyToken.from_pretrained(folder).embed(["ant"]).shape == (1, 16)
    again = pairs | {"init_from": str(folder), "output": pairs["output"] + "2", "optimizer": {"lr": 1e-9}}
    before, after = EmbeddingHead.load(folder), EmbeddingHead.load(train(TrainConfig.from_dict(again)))
    assert torch.allclose(
        before.mean_weight, after.mean_weight, atol=1e-6
    )  # it went on from the head that was there


@pytest.mark.parametrize("changes", BOTH)
def test_a_chunk_size_changes_nothing(pairs: dict[str, Any], changes: dict[str, Any]) -> None:
    if changes:
        changes = changes | {"lora": {**LORA["lora"], "dropout": 0.0}}  # type: ignore[dict-item]
    folders = []
    for size in (1, 100):
        recipe = pairs | changes | {"output": f"{pairs['output']}{size}", "steps": 3}
        recipe["contrastive"] = pairs["contrastive"] | {"chunk": size}
        folders.append(state(train(TrainConfig.from_dict(recipe))))
    assert all(torch.allclose(one, folders[1][name], atol=1e-4) for name, one in folders[0].items())


@pytest.mark.parametrize("changes", BOTH)
def test_resumed_is_uninterrupted(
    pairs: dict[str, Any], changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs["contrastive"] |= {"teacher": "momentum", "momentum": 0.5}
    whole = train(TrainConfig.from_dict(pairs | changes | {"output": pairs["output"] + "-whole"}))
    inner = PairTrainer.training_step

    def stopping(self: PairTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.stop.asked = self.state.global_step == 3
        return inner(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(PairTrainer, "training_step", stopping)
        train(TrainConfig.from_dict(pairs | changes))
    assert saved_states(Path(pairs["output"]))
    resumed = train(TrainConfig.from_dict(pairs | changes))
    losses_of = [
        [entry["loss"] for entry in read_metrics(folder / "metrics.jsonl") if "loss" in entry]
        for folder in (whole, resumed)
    ]
    assert losses_of[0] == pytest.approx(losses_of[1], abs=1e-6) and len(losses_of[0]) == 6
    first, second = state(whole), state(resumed)  # kept features were computed in other batches: rounding
    assert all(torch.allclose(one, second[name], atol=1e-5) for name, one in first.items())


def test_an_old_index_keeps_serving_a_new_head(pairs: dict[str, Any], base: Path) -> None:
    from anytoken.inference.api import AnyToken

    old_folder = train(TrainConfig.from_dict(pairs | {"steps": 40}))
    new = pairs | {"output": pairs["output"] + "-new", "steps": 60, "seed": 1}
    new["contrastive"] = pairs["contrastive"] | {"width": 12, "compatible": str(old_folder)}
    folder = train(TrainConfig.from_dict(new))
    assert read_metrics(folder / "metrics.jsonl")[0]["compatible"] > 0
    old = AnyToken.from_pretrained(base, adapter=old_folder)
    fresh = AnyToken.from_pretrained(base, adapter=folder)
    head = fresh.embedding_heads[None]
    assert head.old_probe.numpy() @ old.embedding_probe() == pytest.approx(1, abs=1e-4)
    names = ["ant", "bee", "cow", "dog", "elk"]
    queries = torch.from_numpy(fresh.embed(names))
    similar = head.to_old(queries).detach().numpy() @ old.embed(names).T
    assert similar.argmax(1).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="not trained to be compatible"):
        old.embedding_heads[None].to_old(queries)


@pytest.mark.slow
def test_a_teacher_of_a_folder(pairs: dict[str, Any], base: Path) -> None:
    teacher = train(TrainConfig.from_dict(pairs | {"steps": 40}))
    student = pairs | {"output": pairs["output"] + "-student", "steps": 40}
    student["contrastive"] = pairs["contrastive"] | {"teacher": str(teacher), "teacher_weight": 1.0}
    entries = read_metrics(train(TrainConfig.from_dict(student)) / "metrics.jsonl")
    assert (
        entries[-1]["eval"]["retrieval"]["text->tile"]["R@1"] == 1.0
    )  # it has learnt from the teacher alone


# ---- the states of a frozen model ----


class Reads:
    """Counts the prompts that go through the model, and how often steps were taken before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.prompts, self.steps, self.in_steps = 0, 0, 0
        forward, step = PairEncoder.forward, PairTrainer.training_step

        def counted(encoder: PairEncoder, ids: torch.Tensor, lengths: torch.Tensor) -> Any:
            self.prompts += len(ids)
            self.in_steps += len(ids) if self.steps else 0
            return forward(encoder, ids, lengths)

        def stepping(trainer: PairTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
            self.steps += 1
            return step(trainer, *args, **kwargs)

        monkeypatch.setattr(PairEncoder, "forward", counted)
        monkeypatch.setattr(PairTrainer, "training_step", stepping)


def losses_of(folder: Path) -> list[float]:
    return [entry["loss"] for entry in read_metrics(folder / "metrics.jsonl") if "loss" in entry]


def with_cache(pairs: dict[str, Any], name: str, **contrastive: Any) -> dict[str, Any]:
    """The recipe into a folder of its own, without evaluations."""
    changed = {**pairs["contrastive"], **contrastive}
    return pairs | {"output": f"{pairs['output']}-{name}", "contrastive": changed, "eval": {}}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tokenwise": 0.5, "positives": "text", "intra_modal": 0.1},
        {"graded": 4.0, "hard_negatives": 0.5, "noise": 0.5, "teacher": "momentum"},
    ],
    ids=["plain", "tokenwise", "graded"],
)
def test_kept_states_give_the_losses_of_computed_ones(
    pairs: dict[str, Any], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    anew = train(TrainConfig.from_dict(with_cache(pairs, "anew", cache_states=False, **options)))
    assert "recomputed in every step: contrastive.cache_states is false" in capsys.readouterr().err
    reads = Reads(monkeypatch)
    kept = train(TrainConfig.from_dict(with_cache(pairs, "kept", cache_states=True, **options)))
    assert (
        reads.steps == 6 and reads.prompts == 15 and not reads.in_steps
    )  # five names, tiles and beeps, once
    assert "states of 15 prompts" in capsys.readouterr().err
    assert losses_of(kept) == pytest.approx(losses_of(anew), abs=1e-5) and len(losses_of(kept)) == 6
    first, second = state(anew), state(kept)
    assert all(torch.allclose(one, second[name], atol=1e-4) for name, one in first.items())


def test_states_beyond_the_limit_are_computed_anew(
    pairs: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    whole = train(TrainConfig.from_dict(with_cache(pairs, "whole")))
    assert "for all steps" in capsys.readouterr().err
    monkeypatch.setattr(feature_cache, "MB", 1 << 13)
    with pytest.raises(
        ConfigError, match=r"true, but the states of all prompts need more than .*cache_mb, 1 MB"
    ):
        train(TrainConfig.from_dict(with_cache(pairs, "all", cache_states=True, cache_mb=1)))
    reads = Reads(monkeypatch)
    part = train(TrainConfig.from_dict(with_cache(pairs, "part", cache_mb=1)))
    assert "kept up to 1 MB: those of all prompts need more" in capsys.readouterr().err
    assert 15 < reads.in_steps < 6 * 8  # some are kept
    assert losses_of(part) == pytest.approx(losses_of(whole), abs=1e-5)


def test_a_run_that_draws_few_pairs_reads_no_others(
    pairs: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    reads = Reads(monkeypatch)
    train(TrainConfig.from_dict(with_cache(pairs, "few") | {"steps": 1}))
    assert "the run draws 4 of 10 pairs" in capsys.readouterr().err
    assert reads.prompts == reads.in_steps == 8


def test_states_of_a_model_that_learns_are_not_kept(pairs: dict[str, Any], capsys: Any) -> None:
    train(TrainConfig.from_dict(with_cache(pairs, "learns") | LORA | {"steps": 1}))
    assert "the model itself is trained" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="true, but the model itself is trained"):
        train(TrainConfig.from_dict(with_cache(pairs, "true", cache_states=True) | LORA))


def test_an_interrupted_reading_is_made_up_for(
    pairs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is asked to stop while it reads saves its first step; the same command reads again."""
    whole = train(TrainConfig.from_dict(with_cache(pairs, "whole")))
    forward = PairEncoder.forward

    def stopping(encoder: PairEncoder, *args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.setattr(PairEncoder, "forward", forward)
        return forward(encoder, *args)

    recipe = with_cache(pairs, "stopped")
    monkeypatch.setattr(PairEncoder, "forward", stopping)
    with pytest.raises(Interrupted, match="stopped at step 1 of 6"):
        train(TrainConfig.from_dict(recipe))
    reads = Reads(monkeypatch)
    recipe["contrastive"]["cache_mb"] = 900  # it may change when a run goes on
    resumed = train(TrainConfig.from_dict(recipe))
    assert reads.steps == 5 and reads.prompts == 15 and not reads.in_steps
    assert losses_of(resumed) == pytest.approx(losses_of(whole), abs=1e-6)


def test_all_prompts_are_those_that_may_be_drawn(world: Path, base: Path) -> None:
    processor = Processor.from_pretrained(base)
    joined = {"path": str(world / "things"), "take": {"beep": "beep"}, "by": "text", "split": None}
    data = [
        {"path": str(world / "things"), "views": {"tile->beep": 1, "text,beep->tile": 1}, "split": None,
         "pair_with": joined},
        {"path": str(world / "things"), "views": {"text->tile": 1}, "split": None,
         "pair_with": {**joined, "by": None}},
    ]  # fmt: skip
    recipe = {
        "init_from": str(base),
        "output": "o",
        "steps": 1,
        "trainable": [],
        "contrastive": {},
        "data": data,
    }
    stage = TrainConfig.from_dict(recipe)
    mixture = pair_trainer._pairs(stage, stage.data, processor)
    known = {tuple(prompt) for prompt in mixture.all_prompts()}
    drawn = {
        tuple(side)
        for batch in range(40)
        for pair in mixture.draw(batch, 5)[1]
        for side in (pair.left, pair.right)
    }
    assert drawn == known and mixture.num_pairs == 5 + 5 + 25


# ---- processes ----


@pytest.mark.parametrize("changes", BOTH)
def test_two_processes_are_one(pairs: dict[str, Any], changes: dict[str, Any]) -> None:
    if changes:
        changes = changes | {"lora": {**LORA["lora"], "dropout": 0.0}}  # type: ignore[dict-item]
    pairs["contrastive"] |= {"positives": "text", "intra_modal": 0.1}
    alone = train(TrainConfig.from_dict(pairs | changes))
    both = (
        pairs
        | changes
        | {"output": pairs["output"] + "-both", "distributed": {"world_size": 2, "ddp_backend": "gloo"}}
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    children = []
    for rank in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            os.environ |= told | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            os._exit(_run(both))
    assert [os.waitstatus_to_exitcode(os.waitpid(one, 0)[1]) for one in children] == [0, 0]
    first, second = state(alone), state(Path(both["output"]))
    assert first.keys() == second.keys()
    assert all(torch.allclose(one, second[name], atol=2e-4) for name, one in first.items())
    lines = [read_metrics(folder / "metrics.jsonl") for folder in (alone, Path(both["output"]))]
    for one, other in zip(*lines, strict=True):
        assert one.get("loss", 0) == pytest.approx(other.get("loss", 0), abs=1e-4)


def _run(recipe: dict[str, Any]) -> int:
    import traceback

    try:
        train(TrainConfig.from_dict(recipe))
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


# ---- what is refused ----


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokens_per_batch": 512}, "tokens_per_batch has no effect with contrastive"),
        ({"loss": {"z_loss": 0.1}}, "loss has no effect"),
        ({"sampling": {"workers": 2}}, "sampling.workers has no effect"),
        ({"distributed": {"world_size": 3}}, "batch 4 is not a multiple of world_size 3"),
        ({"contrastive": {"width": 8, "widths": [16]}}, "widths are from 1 to the width 8"),
        ({"contrastive": {"graded": 1, "positives": "text"}}, "use one of them"),
        ({"contrastive": {"temprature": 1}}, "temprature"),
    ],
)
def test_settings_that_do_not_fit(pairs: dict[str, Any], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TrainConfig.from_dict(pairs | changes)


def test_data_and_folders_that_do_not_fit(pairs: dict[str, Any], base: Path) -> None:
    pairs["data"][0]["views"] = {"->text": 1}
    with pytest.raises(DataError, match="no two sides to pair"):
        train(TrainConfig.from_dict(pairs))
    pairs["data"][0]["views"] = {"text->tile": 1}
    pairs["contrastive"] |= {"positives": "colour"}
    with pytest.raises(DataError, match="without the key 'colour'"):
        train(TrainConfig.from_dict(pairs))
    pairs["contrastive"] |= {"positives": None, "teacher": str(base)}
    with pytest.raises(ConfigError, match=r"contrastive\.teacher: .* holds no embedding head"):
        train(TrainConfig.from_dict(pairs))


def test_batches_are_of_one_view_and_of_the_seed(world: Path, base: Path) -> None:
    processor = Processor.from_pretrained(base)
    stage = TrainConfig.from_dict(
        {"init_from": str(base), "output": "o", "steps": 1, "trainable": [], "contrastive": {"batch": 4},
         "data": [{"path": str(world / "things"), "views": {"text->tile": 1, "beep->text": 1}, "split": None}]}
    )  # fmt: skip
    draws = [pair_trainer._pairs(stage, stage.data, processor) for _ in range(2)]
    assert isinstance(draws[0], PairMixture)
    seen = set()
    for batch in range(12):
        view, found = draws[0].draw(batch, 4)
        assert (view, found) == draws[1].draw(batch, 4)
        assert len({pair.group for pair in found}) == 4  # no record twice
        for pair in found:
            asked = processor.grammar.parse(pair.left[2:-2])
            assert asked[0].kind == view.split("->")[0]
            assert pair.right == [*pair.right[:2], *pair.right[2:-2], *pair.right[-2:]]
        seen.add(view)
    assert seen == {"text->tile", "beep->text"}
    name = processor.encode_chat("ant")
    assert name in [pair.left for pair in draws[0].draw(0, 5)[1]] + [
        pair.right for pair in draws[0].draw(0, 5)[1]
    ]


def test_a_stage_of_pairs_saves_what_it_says(pairs: dict[str, Any], base: Path) -> None:
    """The frozen model's own files are untouched, and its outputs too."""
    before = {path: path.read_bytes() for path in base.iterdir() if path.is_file()}
    train(TrainConfig.from_dict(pairs))
    assert {path: path.read_bytes() for path in base.iterdir() if path.is_file()} == before
    assert isinstance(AutoModelForCausalLM.from_pretrained(base), nn.Module)
    facts = json.loads((Path(pairs["output"]) / "run.json").read_text())
    assert facts["data"][0]["set"].endswith("things")
