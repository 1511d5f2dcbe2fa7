"""Contrastive training on pairs: trains an embedding head, and optionally an adapter or weights of the model.

    anytoken train stages/embed.yaml

The loop of ``trainer.py`` steps, saves, resumes and stops; this module defines a step on pairs. Features of a frozen
model are computed once and cached (``feature_cache.py``); those of a trained one are computed in chunks
(``grad_cache.py``). The output is an adapter folder with the head, or a checkpoint where weights of the model are
trained.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, TrainingArguments

from anytoken.data.mixture import SourceSpec
from anytoken.model.embedding_head import EmbeddingHead, Pooled, has_head, probe_ids
from anytoken.processor import FINGERPRINTS, Processor
from anytoken.training import contrastive as losses
from anytoken.training.callbacks import TrainingCallback
from anytoken.training.config import ContrastiveSpec, TrainConfig
from anytoken.training.contrastive import Options, Side
from anytoken.training.feature_cache import MB, FeatureCache, plan_cache
from anytoken.training.grad_cache import Columns, add_up_gradients, backward_in_chunks, gather_rows
from anytoken.training.initialize import checkpoint_folder
from anytoken.training.lora import LanguageModel, base_model
from anytoken.training.losses.balanced import LossParts
from anytoken.training.metrics import LossMeter
from anytoken.training.pair_encoder import Chunk, PairEncoder
from anytoken.training.pairs import PairMixture, PairStream, collate
from anytoken.training.trainer import StageTrainer
from anytoken.utils.distributed import sum_over_processes
from anytoken.utils.errors import ConfigError

MOMENTUM = "momentum.safetensors"  # the momentum teacher's weights, in a state
HELD_OUT = 2000  # pairs of a view that retrieval is measured on


def make_pair_trainer(
    stage: TrainConfig,
    arguments: TrainingArguments,
    processor: Processor,
    lm: LanguageModel,
    data: list[SourceSpec],
    held_out: list[SourceSpec],
) -> PairTrainer:
    """The trainer of a stage with ``contrastive``; ConfigError for folders in the recipe that do not fit."""
    spec = stage.contrastive
    assert spec is not None
    mixture = _pairs(stage, data, processor)
    trained = PairEncoder(lm, *_head(stage, spec, lm, mixture, processor), tokenwise=spec.tokenwise > 0)
    trained.cache, chosen = plan_cache(spec, trained.frozen, trained.feature_bytes, mixture, stage.steps)
    trainer = PairTrainer(stage, arguments, processor, trained, mixture)
    trainer.cache_choice = chosen
    if spec.teacher not in (None, "momentum"):
        trainer.teacher = _reference(stage, str(spec.teacher), "teacher", trained, processor)
    if spec.compatible is not None:
        trainer.older = _reference(stage, spec.compatible, "compatible", trained, processor)
        _remember_probe(trained.head, trainer.older, processor)
    trainer.held_out = _pairs(stage, held_out, processor) if held_out else None
    return trainer


def _pairs(stage: TrainConfig, sources: list[SourceSpec], processor: Processor) -> PairMixture:
    spec = stage.contrastive
    assert spec is not None
    return PairMixture(
        sources, processor, stage.context, stage.seed, 0.0, sampling=stage.sampling, tokens_per_step=1,
        positives=spec.positives, weight_by=spec.weight_by,
    )  # fmt: skip


def _head(
    stage: TrainConfig, spec: ContrastiveSpec, lm: LanguageModel, mixture: PairMixture, processor: Processor
) -> tuple[EmbeddingHead, Tensor]:
    """The head to train, new or the checkpoint's own if it has the recipe's shape, and its table of ids."""
    hidden = base_model(lm).config.get_text_config().hidden_size
    older = 0 if spec.compatible is None else EmbeddingHead.load(spec.compatible).width
    head = EmbeddingHead(hidden, mixture.kinds(), spec.width, spec.widths, spec.temperature, older)
    folder = None if stage.init_from == "scratch" else checkpoint_folder(stage.init_from)
    if folder is not None and has_head(folder) and not older:
        before = EmbeddingHead.load(folder)
        if before.modalities == head.modalities and before.width == head.width and not before.old_width:
            head.load_state_dict(before.state_dict())
    return head, head.table(processor.token_space)


def _reference(
    stage: TrainConfig, folder: str, key: str, trained: PairEncoder, processor: Processor
) -> PairEncoder:
    """A frozen model with a head, from a checkpoint, or from a head alone on the weights of ``init_from``."""
    path = Path(folder)
    if not has_head(path):
        raise ConfigError(f"contrastive.{key}: {folder} holds no embedding head")
    if (path / "adapter_config.json").is_file():
        raise ConfigError(
            f"contrastive.{key}: {folder} is an adapter; make a checkpoint of it (anytoken merge-adapter)"
        )
    head = EmbeddingHead.load(path).requires_grad_(False)
    missing = set(trained.head.modalities) - set(head.modalities)
    if missing:
        raise ConfigError(
            f"contrastive.{key}: the head of {folder} does not know {', '.join(sorted(missing))}"
        )
    whole = (path / "config.json").is_file()
    if (
        whole
        and (path / FINGERPRINTS).is_file()
        and Processor.from_pretrained(path).fingerprints() != (processor.fingerprints())
    ):
        raise ConfigError(f"contrastive.{key}: {folder} has other tokenizers, so the ids are not the same")
    lm = base_model(trained.lm)
    if whole or not trained.frozen:
        source = path if whole else checkpoint_folder(stage.init_from)
        lm = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).requires_grad_(False)
    found = PairEncoder(lm, head, head.table(processor.token_space)).eval()
    spec = stage.contrastive
    if spec is not None and spec.cache_states is not False:
        found.cache = FeatureCache(spec.cache_mb * MB)
    return found.to(base_model(trained.lm).device)


def _remember_probe(head: EmbeddingHead, older: PairEncoder, processor: Processor) -> None:
    """Store the fingerprint of the older model, which identifies its indexes."""
    ids = torch.tensor([probe_ids(older.table)], device=older.table.device)
    with torch.no_grad():
        vector = older.side(older(ids, torch.tensor([ids.shape[1]], device=ids.device))).vectors[0]
    head.old_probe.copy_(vector)


class PairTrainer(StageTrainer):
    """Diff with `StageTrainer`: a step is on pairs, and the head is saved."""

    stream: PairStream

    def __init__(
        self,
        stage: TrainConfig,
        arguments: TrainingArguments,
        processor: Processor,
        model: PairEncoder,
        mixture: PairMixture,
    ) -> None:
        assert stage.contrastive is not None
        self.spec = stage.contrastive
        names = Options.__dataclass_fields__
        self.options = Options(**{name: getattr(self.spec, name) for name in names})
        self.teacher: PairEncoder | None = None
        self.older: PairEncoder | None = None
        self.momentum: dict[str, Tensor] = {}
        self.cache_choice = ""  # for the log
        super().__init__(stage, arguments, processor, model, mixture)

    def group_names(self, model: Any) -> list[str]:
        return self.stream.views

    def make_loop(self) -> TrainingCallback:
        return PairLoop(self)

    def make_stream(self, mixture: Any, arguments: TrainingArguments) -> PairStream:
        stage, pad = self.stage, self.processor.token_space.pad
        split = arguments.world_size, arguments.process_index
        return PairStream(mixture, stage.batch_size, stage.context, pad, *split, 0, stage.sampling.max_bad)

    def collate(self, batch: Any) -> dict[str, Tensor]:
        return batch

    @property
    def encoder(self) -> PairEncoder:
        """What is trained."""
        return self.accelerator.unwrap_model(self.model)

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """The groups of the model and of the head, whose matrices have weight decay."""
        decay, head = self.stage.optimizer.weight_decay, list(self.encoder.head.parameters())
        matrices = {"params": [one for one in head if one.ndim == 3], "weight_decay": decay}
        rest = {"params": [one for one in head if one.ndim != 3], "weight_decay": 0.0}
        return [*super().optimizer_groups(), matrices, rest]

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward of one batch of pairs; gradients are those of the global batch."""
        encoder = self.encoder.train()
        self._follow(encoder)
        batch = self._prepare_inputs(inputs)
        self.finite.keep(self.state.global_step, batch)
        scored: list[LossParts] = []

        def loss(left: Columns, right: Columns) -> Tensor:
            scored.append(self._scored(encoder, batch, left, right))
            return scored[0].loss

        with self.compute_loss_context_manager():
            value = backward_in_chunks(encoder.features, self._sides(batch), loss, encoder.frozen)
        self._watch("loss", torch.as_tensor(value).detach())
        add_up_gradients(self.lm.parameters())
        add_up_gradients(encoder.head.parameters(), 1 / self.args.world_size)
        tokens = sum_over_processes((batch["left_lengths"].sum() + batch["right_lengths"].sum()).float())
        self.meter.add(scored[0], int(tokens))
        return value

    @torch.no_grad()
    def fill_cache(self) -> None:
        """Compute the features of a frozen model that the steps need, if the recipe's limit allows; logs the choice."""
        encoder, first = self.encoder, self.is_world_process_zero()
        if first:
            tqdm.write(self.cache_choice, sys.stderr)
        if encoder.cache is None:
            return
        encoder.train()
        with self.compute_loss_context_manager():
            encoder.cache.fill(
                encoder,
                self.args.device,
                self.processor.token_space.pad,
                self.spec.chunk,
                lambda: self.stop.any_rank_requested(self.args.device, self.args.world_size),
                show=first,
            )

    def _sides(self, batch: dict[str, Tensor]) -> list[list[Chunk]]:
        """Both sides of a batch in chunks."""
        size = self.spec.chunk
        return [
            list(zip(batch[f"{name}_ids"].split(size), batch[f"{name}_lengths"].split(size), strict=True))
            for name in ("left", "right")
        ]

    def _scored(
        self, encoder: PairEncoder, batch: dict[str, Tensor], left: Columns, right: Columns
    ) -> LossParts:
        """The loss of the global batch from its features, and its metrics."""
        spec, head = self.spec, encoder.head
        sides = encoder.side(left), encoder.side(right)
        targets = self._targets(batch, left, right)
        scale = head.scale
        teacher = self._teacher(encoder, batch, (left, right))
        weights = gather_rows(batch["weights"])
        found = losses.contrastive_loss(*sides, scale, self.options, targets, weights, teacher)
        loss, terms = found.loss, {**found.terms, "temperature": 1 / scale.detach()}
        if self.older is not None:
            old = self._other_sides(self.older, encoder, batch, (left, right))
            new = head.to_old(sides[0].vectors), head.to_old(sides[1].vectors)
            terms["compatible"] = losses.compatibility_loss(
                new, (old[0].vectors, old[1].vectors), self.older.head.scale, targets
            )
            loss = loss + spec.compatible_weight * terms["compatible"]
            terms["compatible"] = terms["compatible"].detach()
        return _parts(loss, found, batch["view"], len(self.stream.views), terms)

    def _targets(self, batch: dict[str, Tensor], left: Columns, right: Columns) -> tuple[Tensor, Tensor]:
        """Retrieval targets of each side: its partner and items of its group, or all items by similarity."""
        if self.spec.graded:
            states = (Pooled(*columns[:3]).mean.sum(1) for columns in (left, right))
            first, second = (losses.graded_targets(one, self.spec.graded) for one in states)
            return first, second
        targets = losses.equal_targets(gather_rows(batch["groups"]))
        return targets, targets

    @torch.no_grad()
    def _teacher(
        self, encoder: PairEncoder, batch: dict[str, Tensor], columns: tuple[Columns, Columns]
    ) -> tuple[Tensor, Tensor] | None:
        """The teacher's retrieval distributions on the global batch, in both directions; None without a teacher."""
        if self.spec.teacher is None:
            return None
        if self.teacher is not None:
            found = self._other_sides(self.teacher, encoder, batch, columns)
            scale = self.teacher.head.scale
        else:
            with _weights_of(encoder, self.momentum):
                if encoder.frozen:
                    found = encoder.side(columns[0]), encoder.side(columns[1])
                else:
                    found = self._encoded(encoder, batch)
                scale = encoder.head.scale.clone()
        logits = scale * found[0].vectors @ found[1].vectors.T
        return logits.softmax(1), logits.T.softmax(1)

    @torch.no_grad()
    def _other_sides(
        self,
        other: PairEncoder,
        encoder: PairEncoder,
        batch: dict[str, Tensor],
        columns: tuple[Columns, Columns],
    ) -> tuple[Side, Side]:
        """Vectors of the global batch by another head, over the same features if it shares the frozen model."""
        same = other.lm is base_model(encoder.lm) and other.head.modalities == encoder.head.modalities
        if same:
            return other.side(columns[0][:3]), other.side(columns[1][:3])
        return self._encoded(other, batch)

    def _encoded(self, encoder: PairEncoder, batch: dict[str, Tensor]) -> tuple[Side, Side]:
        """Vectors of the global batch, chunk by chunk."""
        sides = []
        for chunks in self._sides(batch):
            parts = zip(*(encoder.features(chunk) for chunk in chunks), strict=True)
            sides.append(encoder.side(tuple(gather_rows(torch.cat(column)) for column in parts)))
        return sides[0], sides[1]

    @torch.no_grad()
    def _follow(self, encoder: PairEncoder) -> None:
        """Move the momentum teacher's weights towards those that are trained (MoCo, arXiv 1911.05722)."""
        if self.spec.teacher != "momentum":
            return
        for name, one in _trained(encoder).items():
            if name not in self.momentum:
                self.momentum[name] = one.detach().clone()
            self.momentum[name].lerp_(one.detach(), 1 - self.spec.momentum)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not self.encoder.frozen:
            super()._save(output_dir)
        self.encoder.head.save(folder)
        if self.momentum and folder.name.startswith("checkpoint-"):
            save_file({name: one.cpu() for name, one in self.momentum.items()}, folder / MOMENTUM)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder, encoder = Path(resume_from_checkpoint), self.encoder
        if not encoder.frozen:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        encoder.head.load_state_dict(EmbeddingHead.load(folder).state_dict())
        if (folder / MOMENTUM).is_file():
            device = encoder.table.device
            self.momentum = {name: one.to(device) for name, one in load_file(folder / MOMENTUM).items()}


class PairLoop(TrainingCallback):
    """Diff with `TrainingCallback`: the states of a frozen model are computed first, and held-out pairs also measure
    retrieval among all items of a view."""

    trainer: PairTrainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        start = time.monotonic()
        self.trainer.fill_cache()
        super().on_train_begin(args, state, control, **kwargs)
        self.last = start  # max_minutes counts the time that the states took

    @torch.no_grad()
    def held_out_report(self) -> dict[str, Any]:
        """Losses on batches of held-out pairs, and recall over all pairs of each view, in both directions."""
        trainer = self.trainer
        assert trainer.held_out is not None
        encoder = trainer.encoder.eval()
        stream = trainer.make_stream(trainer.held_out, trainer.args)
        meter, batches = LossMeter(stream.views), iter(stream)
        for _ in range(trainer.stage.eval.batches):
            batch = {name: one.to(trainer.args.device) for name, one in next(batches).items()}
            left, right = trainer._encoded(encoder, batch)
            targets = losses.equal_targets(gather_rows(batch["groups"]))
            found = losses.contrastive_loss(left, right, encoder.head.scale, Options(), (targets, targets))
            meter.add(_parts(found.loss, found, batch["view"], len(stream.views), {}), 0)
        report = meter.report() | {"retrieval": self._retrieval(trainer.held_out, encoder)}
        encoder.train()
        return report

    def _retrieval(self, held_out: Any, encoder: PairEncoder) -> dict[str, dict[str, float]]:
        """R@1, R@5 and the number of items by direction, over the first `HELD_OUT` pairs of each view."""
        found: dict[str, dict[str, float]] = {}
        for choice in held_out.choices:
            rng = np.random.default_rng(0)
            pairs = [held_out.pair(choice, int(row), rng) for row in choice.rows[:HELD_OUT]]
            pairs = [one for one in pairs if max(len(one.left), len(one.right)) <= held_out.context]
            batch = collate(pairs, self.trainer.processor.token_space.pad)
            batch = {name: one.to(self.trainer.args.device) for name, one in batch.items()}
            vectors = []
            for chunks in self.trainer._sides(batch):
                parts = zip(*(encoder.features(chunk) for chunk in chunks), strict=True)
                vectors.append(encoder.side(tuple(map(torch.cat, parts))).vectors)
            positive = batch["groups"][:, None] == batch["groups"][None, :]
            there, back = choice.view.name, "->".join(reversed(choice.view.name.split("->")))
            recall = losses.retrieval_recall
            found[there] = {**recall(vectors[0], vectors[1], positive), "items": len(pairs)}
            found[back] = {**recall(vectors[1], vectors[0], positive), "items": len(pairs)}
        return found


def _parts(
    loss: Tensor, found: losses.Scored, view: Tensor, views: int, terms: dict[str, Tensor]
) -> LossParts:
    """Sums over a batch of pairs, in the column of its view."""
    sums = torch.stack(
        [found.nll.sum(), found.right.sum(), torch.tensor(float(len(found.nll))).to(loss.device)]
    )
    nll, right, count = (
        torch.zeros(views, device=loss.device).index_fill(0, view, float(one)) for one in sums
    )
    return LossParts(loss, nll, right, count, terms)


def _trained(encoder: nn.Module) -> dict[str, nn.Parameter]:
    return {name: one for name, one in encoder.named_parameters() if one.requires_grad}


@contextmanager
def _weights_of(encoder: nn.Module, values: dict[str, Tensor]) -> Iterator[None]:
    """Temporarily set the trained parameters to these values."""
    parameters = _trained(encoder)
    before = {name: one.data for name, one in parameters.items()}
    for name, value in values.items():
        parameters[name].data = value
    try:
        yield
    finally:
        for name, value in before.items():
            parameters[name].data = value
