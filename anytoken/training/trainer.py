"""The training loop: transformers' Trainer with packed data, losses on hidden states, and metrics per
modality.

``train(stage)`` runs a recipe and writes a checkpoint folder that ``anytoken.load`` opens. A killed run resumes from
its last saved step with the same losses as an uninterrupted one (``checkpoint.py``); Ctrl-C saves first, and a
non-finite loss stops the run (``interrupts.py``).
"""

import dataclasses
import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainerControl, TrainingArguments
from transformers.integrations import TensorBoardCallback, is_deepspeed_zero3_enabled
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from anytoken.data.mixture import Mixture, SourceSpec
from anytoken.data.packing import PackedStream, PackState
from anytoken.model.extend_vocab import save_modalities
from anytoken.processor import Processor
from anytoken.training.arguments import make_resumable, settled, training_arguments
from anytoken.training.callbacks import TrainingCallback
from anytoken.training.checkpoint import (
    PROGRESS,
    SAVE_ERRORS,
    commit_checkpoint,
    is_finished,
    partial_folder,
    read_progress,
    save_error,
    saved_states,
    step_of,
)
from anytoken.training.config import TrainConfig
from anytoken.training.context_noise import ContextNoise
from anytoken.training.distributed.deepspeed import load_buffers, no_zero3_init, restore_adamw_groups
from anytoken.training.distributed.fsdp import (
    full_tensor,
    is_sharded,
    load_full_state_dict,
    load_optimizer,
    parallelize,
    param_groups_by_mesh,
    read_mesh,
    save_optimizer,
)
from anytoken.training.early_stopping import EarlyStopping, check_measured, check_metric
from anytoken.training.ema import WeightAverage
from anytoken.training.initialize import build_init_checkpoint, build_model, choose_attention, make_trainable
from anytoken.training.interrupts import FiniteCheck, GracefulStop, Interrupted, Noted, dump_divergence
from anytoken.training.lora import SAVE_ADAPTER, LanguageModel, base_model, load_weights
from anytoken.training.loss_guard import LossGuard
from anytoken.training.metrics import LossMeter, MetricsLog
from anytoken.training.optim import pcgrad
from anytoken.training.optim.lr_schedule import Schedule
from anytoken.training.optim.muon import make_optimizer
from anytoken.training.optim.param_groups import parameter_groups
from anytoken.training.portable_state import load_schedule_alone, read_portable, write_portable
from anytoken.training.prepare_data import build_mixture, prepare_sources
from anytoken.training.report.html import HtmlReport
from anytoken.training.report.samples import Answer, Sampler
from anytoken.training.report.trackers import check_trackers, scalars, summary_writer
from anytoken.training.run_folder import begin, export
from anytoken.training.step import ModelWithLoss, build_loss, with_layout
from anytoken.utils.atomic import write_file
from anytoken.utils.distributed import all_processes

CHECKED_STEPS = 20  # of a GPU, whose losses are looked at together: looking makes the host wait


class StageTrainer(Trainer):
    """transformers' Trainer for one stage; see the module's docstring for what it adds."""

    optimizer: torch.optim.Optimizer | None
    lr_scheduler: Any
    control: TrainerControl

    def __init__(
        self,
        stage: TrainConfig,
        arguments: TrainingArguments,
        processor: Processor,
        model: nn.Module,
        mixture: Mixture,
        answer: Answer | None = None,
    ) -> None:
        self.stage, self.processor = stage, processor
        self.micro_batch = stage.batch_size * stage.context  # ids, of all processes
        self.stream = self.make_stream(mixture, arguments)
        self.schedule = Schedule(stage.schedule, stage.steps)
        self.meter = LossMeter(self.group_names(model))
        self.stop = GracefulStop()
        kept = 32 // stage.gradient_accumulation_steps  # steps whose place in the stream is known
        checked = 1 if arguments.device.type == "cpu" else min(CHECKED_STEPS, kept)
        self.finite = FiniteCheck(max(1, checked))
        self.folder = Path(stage.output)
        self.metrics_log = MetricsLog(self.folder / "metrics.jsonl")
        self.held_out: Mixture | None = None
        self.shares: list[Tensor] = []  # of the last loss, by modality
        self.mfu_per_rate = 0.0  # of the measured peak, that one token a second takes
        self.page = HtmlReport(stage)
        lm: LanguageModel = model.lm
        context = base_model(lm).config.get_text_config().max_position_embeddings
        self.sampler = Sampler(stage.samples, self.folder, processor, answer, context)
        self.loop, self.guard = self.make_loop(), LossGuard(stage)
        self.ema = None if stage.ema_decay is None else WeightAverage(model, stage.ema_decay)
        self.early = None if stage.early_stopping is None else EarlyStopping(stage, self.schedule)
        self.best_step: int | None = None  # of the evaluations so far
        check_metric(arguments.metric_for_best_model, self.meter.names)
        # The average comes first: the loop evaluates it and samples from it.
        optional = [one for one in (self.ema, self.loop, self.guard, self.early) if one is not None]
        callbacks: list[TrainerCallback] = list(optional)
        super().__init__(model=model, args=arguments, callbacks=callbacks)
        if arguments.process_index:  # its tokens get noise of their own
            torch.manual_seed(stage.seed + arguments.process_index)
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)

    @property
    def weights_are_sharded(self) -> bool:
        """Whether the weights are distributed, so that no process has the whole model."""
        return is_sharded(self.model) or is_deepspeed_zero3_enabled()

    def make_stream(self, mixture: Mixture, arguments: TrainingArguments) -> PackedStream:
        """A mixture's packed batches: this process's rows of them."""
        stage, pad = self.stage, self.processor.token_space.pad
        split = arguments.world_size, arguments.process_index
        sampling = stage.sampling.workers, stage.sampling.max_bad
        # The Trainer draws all batches of a step before the first is used.
        kept = 64 + stage.gradient_accumulation_steps
        return PackedStream(mixture.sample, stage.batch_size, stage.context, pad, *split, *sampling, kept)

    def group_names(self, model: Any) -> list[str]:
        """The names that losses are reported under."""
        return model.loss.names

    def make_loop(self) -> TrainingCallback:
        """The callback for everything around the steps."""
        return TrainingCallback(self)

    @property
    def lm(self) -> LanguageModel:
        """The language model that is trained (a PeftModel with LoRA)."""
        return self.accelerator.unwrap_model(self.model).lm

    def get_train_dataloader(self) -> DataLoader:
        """The packed stream: every process takes its own rows of the same batches."""
        pinned = self.args.device.type == "cuda"
        # Iterating draws a seed: not from the random numbers that a state keeps, or a resumed run meets others.
        own = torch.Generator()
        return DataLoader(
            self.stream, batch_size=None, collate_fn=self.collate, pin_memory=pinned, generator=own
        )

    def collate(self, batch: Any) -> dict[str, Tensor]:
        """A batch in the form that the model expects."""
        return with_layout(batch, grammar=self.processor.grammar)

    def _prepare_input(self, data: Any) -> Any:
        """Copy to the device without waiting for it."""
        if isinstance(data, Tensor):
            return data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """The trained parameters in groups with their weight decay."""
        return parameter_groups(base_model(self.lm), self.stage.optimizer.weight_decay)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW, fused, with weight decay on matrices only; or Muon for the hidden matrices."""
        if self.optimizer is None:
            spec = self.stage.optimizer
            groups = param_groups_by_mesh(self.optimizer_groups())
            self.weight_decays = [group["weight_decay"] for group in groups]
            self.optimizer = make_optimizer(spec, base_model(self.lm), groups, all_processes())
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """The stage's schedule; its numbers are saved with the optimizer."""
        if self.lr_scheduler is None:
            self.lr_scheduler = LambdaLR(optimizer or self.create_optimizer(), self.schedule)
        return self.lr_scheduler

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward pass of one micro-batch, with PCGrad if the recipe sets ``pcgrad``."""
        if not self.stage.pcgrad:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        scale = 1 / self.args.gradient_accumulation_steps
        self.meter.note(pcgrad.backward(model, loss, self.shares, scale))
        return loss.detach() * scale

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], *unused: Any, **ignored: Any
    ) -> Tensor:
        """The batch's loss; its parts go to the meter. DivergenceError on a non-finite loss, on a GPU a few steps
        later."""
        outputs = model(**inputs)
        self.finite.keep(self.state.global_step, inputs)
        self._watch("loss", outputs["loss"].detach())
        self.meter.add(outputs["parts"], self.micro_batch, outputs["load"])
        self.shares = outputs["shares"]
        return outputs["loss"]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The gradient norm, before the weights are updated: on a CPU a non-finite one stops the run here."""
        norm = full_tensor(super()._get_grad_norm(model, grad_norm=grad_norm))
        if norm is not None:
            self._watch("gradient norm", torch.as_tensor(norm).detach())
        self.finite.end_step()
        return norm

    def _watch(self, what: str, value: Tensor) -> None:
        self.finite.note(Noted(self.state.global_step, what, value, self._get_learning_rate()))
        if self.finite.due:
            self.check_finite()

    def check_finite(self) -> None:
        """Check all recorded losses and norms; DivergenceError for the first non-finite one."""
        bad = self.finite.first_bad()
        if bad is None:
            return
        taken = bad.step * self.args.gradient_accumulation_steps
        facts = {
            "step": bad.step + 1,
            "micro_batch": len(self.finite.batches_of(bad.step)),
            "process": self.args.process_index,
            bad.what: str(float(bad.value)),
            "learning_rate": bad.learning_rate,
            "stream_before": dataclasses.asdict(self.stream.state(taken)),
        }
        raise dump_divergence(bad.what, self.stage, self.lm, self.finite.batches_of(bad.step), facts)

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Write one line of metrics for the interval since the last, over all processes."""
        if "loss" not in logs:
            return
        self.check_finite()
        entry = {**logs, **self.meter.report()}
        if self.stream.skipped:
            entry["skipped"] = {"drawn": self.stream.drawn, **self.stream.skipped}
        if self.mfu_per_rate:
            entry["mfu"] = entry["tokens_per_second"] * self.mfu_per_rate
        self.meter.reset()
        if self.is_world_process_zero():
            self.metrics_log.write({"step": self.state.global_step, **entry})
        self.loop.show(entry)
        super().log(scalars(entry), start_time)

    def averaged(self) -> AbstractContextManager[None]:
        """The model with averaged weights, if ``ema_decay`` is set, for evaluation and export."""
        return self.ema.applied() if self.ema else nullcontext()

    def log_held_out(self, step: int, report: dict[str, Any]) -> dict[str, float]:
        """Write one line of held-out metrics; returns them under the flat names of trackers."""
        if self.is_world_process_zero():
            self.metrics_log.write({"step": step, "eval": report})
        metrics = scalars(report, "eval_")
        super().log(dict(metrics))
        return metrics

    def evaluate(self, *unused: Any, **ignored: Any) -> dict[str, float]:
        """Held-out losses, for the log and the callbacks; the Trainer calls this when the callback requests it."""
        with self.meter.clock_stopped(), self.averaged():
            metrics = self.loop.evaluate(self.state.global_step)
        check_measured(self.args.metric_for_best_model, metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        found = super()._determine_best_metric(metrics, trial)
        if found:
            # Noted by us: the Trainer would look for its state where it is only until it is committed.
            self.best_step, self.state.best_global_step = self.state.global_step, None
            self.control.should_save = self.control.should_save or self.stage.keep_best
        return found

    def _get_output_dir(self, trial: Any) -> str:
        return str(partial_folder(self.folder))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save everything to a temporary folder, then rename it and drop the oldest; WriteError if that fails."""
        step = self.state.global_step
        self.check_finite()  # no state is saved that is broken
        try:
            super()._save_checkpoint(model, trial)
            written = partial_folder(self.folder) / f"checkpoint-{step}"
            if self.args.save_only_model:  # where weights are spread, the Trainer leaves the rest to us
                self._save_optimizer_and_scheduler(str(written))
                self._save_rng_state(str(written))
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                if self.ema is not None:
                    self.ema.save(written)
                write_file(written / PROGRESS, json.dumps(self._progress()))
                commit_checkpoint(self.folder, step, self._kept_states())
                if self.stage.weights_folder is not None:
                    write_portable(self.folder, Path(self.stage.weights_folder))
        except SAVE_ERRORS as error:
            raise save_error(self.folder, f"the state of step {step}", error) from error
        self.accelerator.wait_for_everyone()

    def _kept_states(self) -> list[int | None]:
        """Steps of older states to keep."""
        good = self.guard.last_good(self.folder)
        return [self.best_step if self.stage.keep_best else None, None if good is None else step_of(good)]

    def best_state(self) -> Path | None:
        """The state with the best held-out metric, if ``keep_best`` is set; None to use the current weights."""
        if not self.stage.keep_best:
            return None
        return next((one for one in saved_states(self.folder) if step_of(one) == self.best_step), None)

    def load_weights(self, state: Path) -> None:
        """Load the weights of a state into the model."""
        self._load_from_checkpoint(str(state))

    def _progress(self) -> dict[str, Any]:
        step = self.state.global_step
        return {
            "stream": dataclasses.asdict(self.stream.state(step * self.args.gradient_accumulation_steps)),
            "meter": self.meter.state(),
            "log_bytes": self.metrics_log.position(),
            "guard": self.guard.state(),
            "best_step": self.best_step,
            "without_improvement": self.early.count if self.early else 0,
            "finished": step >= self.schedule.total,
            "engine": self.stage.distributed.engine,
            "precision": self.stage.precision,
            "processes": self.args.world_size,
        }

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save and not is_sharded(self.model):
            return
        folder = Path(output_dir or self.folder)
        if state_dict is not None:  # a sharding wrapper gathered it, with this module's prefix
            state_dict = {key.removeprefix("lm."): value for key, value in state_dict.items()}
        extra = {} if self.stage.lora is None else SAVE_ADAPTER
        first = self.args.should_save
        self.lm.save_pretrained(str(folder), state_dict=state_dict, is_main_process=first, **extra)
        if not first:
            return
        if self.stage.lora is None:
            self.processor.save_pretrained(folder)
        elif self.stage.modalities:
            save_modalities(folder, self.processor, list(self.stage.modalities))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        if self.ema is not None:
            self.ema.load(folder)
        if self.stage.lora is not None:
            load_weights(self.lm, folder)
        else:
            with no_zero3_init(self.args):
                saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            load_full_state_dict(self.lm, saved)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.stage.distributed.mesh is None:
            return super()._save_optimizer_and_scheduler(output_dir)
        inner: Any = self.optimizer
        save_optimizer(self.model, inner.optimizer, self.lr_scheduler, output_dir, self.args.should_save)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        inner: Any = self.optimizer
        if checkpoint is not None and self.stage.distributed.mesh is not None:
            load_optimizer(self.model, inner.optimizer, self.lr_scheduler, checkpoint)
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load_schedule_alone(Path(checkpoint), inner, self.lr_scheduler)
            if self.is_deepspeed_enabled:
                load_buffers(base_model(self.lm), Path(checkpoint))
                restore_adamw_groups(inner.optimizer.optimizer, self.weight_decays)
            self._restore_progress(Path(checkpoint))

    def _restore_progress(self, state: Path) -> None:
        progress = read_progress(state)
        taken = step_of(state) * self.args.gradient_accumulation_steps
        self.stream.restore(taken, PackState(**progress["stream"]))
        self.meter.restore(progress["meter"])
        self.guard.restore(progress.get("guard", {}))  # a state of version 0.1 has none of these three
        self.best_step = progress.get("best_step")
        if self.early is not None:
            self.early.count = progress.get("without_improvement", 0)
        if self.is_world_process_zero():
            self.metrics_log.rewind(progress["log_bytes"])

    def run(self) -> None:
        """Train to the end, from the last state if there is one. Interrupted if asked to stop earlier."""
        states = saved_states(self.folder)
        if not states and self.is_world_process_zero():
            self.metrics_log.rewind(0)
        if states and read_progress(states[-1])["finished"]:  # killed after the last step
            self.load_weights(states[-1])
            self._restore_progress(states[-1])
            return
        for one in self.callback_handler.callbacks:
            if isinstance(one, TensorBoardCallback) and self.is_world_process_zero():
                one.tb_writer = summary_writer(self.folder, step_of(states[-1]) if states else 0)
        with self.stop:
            self.train(resume_from_checkpoint=str(states[-1]) if states else None)
        if self.state.global_step < self.schedule.total:
            raise Interrupted(
                f"stopped at step {self.state.global_step} of {self.schedule.total} and saved in "
                f"{saved_states(self.folder)[-1]}; rerun the command to resume from there"
            )


def train(stage: TrainConfig, answer: Answer | None = None) -> Path:
    """Run a stage and return its output folder; a finished run is kept, an unfinished one is resumed.

    answer: generates the recipe's ``samples`` for the report, (model, processor, prompt, output) -> HTML.
    ConfigError if the output folder contains a run with other settings or data; Interrupted if the run was stopped
    and saved; DivergenceError for an exploding or non-finite loss; WriteError if a state cannot be written.
    """
    if stage.weights_folder is not None:
        read_portable(Path(stage.weights_folder), Path(stage.output))
    if is_finished(stage):
        return Path(stage.output)
    check_trackers(stage.report_to)
    if stage.threads is not None:
        torch.set_num_threads(stage.threads)
    trainer, sources = build_trainer(settled(stage), answer)
    begin(trainer, stage, sources)
    trainer.run()
    export(trainer)
    return trainer.folder


def build_trainer(stage: TrainConfig, answer: Answer | None) -> tuple[StageTrainer, list[SourceSpec]]:
    """The trainer of a stage, with its model and data, and the tokenized sources of both kinds of data."""
    arguments, mesh = training_arguments(stage), read_mesh(stage)
    with no_zero3_init(arguments):
        with arguments.main_process_first(local=False):
            build_init_checkpoint(stage)
            for state in saved_states(Path(stage.output))[-1:]:
                make_resumable(stage, state)
        processor, start = build_model(stage)
    choose_attention(start, stage, arguments.device)
    with arguments.main_process_first(local=False):  # the others find the sets tokenized
        data = prepare_sources(stage, stage.data, processor)
        held_out = prepare_sources(stage, stage.eval.data, processor)
    torch.manual_seed(stage.seed)
    lm = make_trainable(start, stage, processor)
    if stage.contrastive is not None:
        from anytoken.training.pair_trainer import make_pair_trainer

        return make_pair_trainer(stage, arguments, processor, lm, data, held_out), [*data, *held_out]
    mixture = build_mixture(stage, data, processor, stage.cfg_dropout)
    noise = ContextNoise(processor.token_space, stage.context_noise) if stage.context_noise else None
    model = ModelWithLoss(lm, build_loss(stage, processor), stage.moe, stage.pcgrad, noise)
    if mesh is not None:
        parallelize(model, mesh)
    trainer = StageTrainer(stage, arguments, processor, model, mixture, answer)
    trainer.held_out = build_mixture(stage, held_out, processor, cfg_dropout=0.0) if held_out else None
    return trainer, [*data, *held_out]
