"""The callback around the steps of a run: progress bar, time limit, held-out losses, samples, report."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast
from torch import Tensor
from tqdm import tqdm
from transformers import TrainerCallback

from anytoken.model.attention import usable_attention
from anytoken.training.lora import base_model
from anytoken.training.losses.balanced import CONTROL
from anytoken.training.losses.modality_integration_rate import integration_rates
from anytoken.training.metrics import LossMeter
from anytoken.training.step import ModelWithLoss, packed_inputs

if TYPE_CHECKING:
    from anytoken.training.trainer import StageTrainer


class TrainingCallback(TrainerCallback):
    """Progress bar, time limit, samples and held-out losses."""

    def __init__(self, trainer: StageTrainer) -> None:
        self.trainer = trainer
        self.unsaved = 0.0  # seconds since the last state

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        stage = self.trainer.stage
        self.bar = tqdm(
            total=stage.steps, initial=state.global_step, desc=self.trainer.folder.name, unit="step"
        )
        self.bar.disable = self.bar.disable or not state.is_world_process_zero
        # A resumed run brings the intervals that it was started with; those of the recipe count.
        state.logging_steps, state.save_steps = args.logging_steps, args.save_steps
        if self.trainer.stage.eval.first and state.global_step == 0:
            self.evaluate(0)
        self.trainer.meter.start_clock()
        self.last = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now, schedule, stage = time.monotonic(), self.trainer.schedule, self.trainer.stage
        seconds = now - self.last
        timed = stage.max_minutes is not None or stage.save_minutes is not None
        # All must stop and save at the same step: the first one's clock counts.
        if timed and args.world_size > 1:
            seconds = float(broadcast(torch.tensor(seconds, device=args.device)))
        if stage.moe.expert_bias_rate:
            base_model(self.trainer.lm).update_expert_bias(stage.moe.expert_bias_rate)
        schedule.tick(state.global_step, seconds, stage.max_minutes)
        self.last = now
        stopping = self.trainer.stop.any_rank_requested(args.device, args.world_size)
        if state.global_step >= schedule.total or stopping:
            control.should_training_stop = control.should_save = True
        self.unsaved = 0.0 if control.should_save else self.unsaved + seconds
        if stage.save_minutes is not None and self.unsaved >= 60 * stage.save_minutes:
            control.should_save, self.unsaved = True, 0.0
        last = state.global_step >= schedule.total
        due = last or bool(stage.eval.every and state.global_step % stage.eval.every == 0)
        control.should_evaluate = due and self.trainer.held_out is not None
        control.should_log = control.should_log or last or (due and stage.early_stopping is not None)
        with self.trainer.meter.clock_stopped():
            self.sample(state.global_step)
        if schedule.total < stage.steps and state.is_world_process_zero:
            tqdm.write(
                f"max_minutes {stage.max_minutes:g} are over: the run ends here, at step {schedule.total} of "
                f"{stage.steps}, and is saved as finished",
                sys.stderr,
            )
        self.bar.total = min(schedule.total, round(schedule.expected))
        self.bar.update()

    def show(self, entry: dict[str, Any]) -> None:
        """Show a line of the log in the progress bar and the report."""
        shown = {name: f"{group['loss']:.3f}" for name, group in entry["groups"].items() if name != "control"}
        self.bar.set_postfix(shown | {"tok/s": f"{entry['tokens_per_second']:.0f}"})
        if self.trainer.is_world_process_zero():
            self.trainer.page.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()

    def sample(self, step: int) -> None:
        """Generate replies for the report, in the first process, if it holds the whole model."""
        trainer = self.trainer
        if trainer.weights_are_sharded:
            return
        due = trainer.sampler.due(step, last=step >= trainer.schedule.total)
        if due and trainer.is_world_process_zero():
            with trainer.averaged():
                trainer.sampler.take(step, base_model(trainer.lm))

    def evaluate(self, step: int) -> dict[str, float]:
        """Log the losses on the held-out sources, always over the same batches; returns them under flat names."""
        if self.trainer.held_out is None:
            return {}
        return self.trainer.log_held_out(step, self.held_out_report())

    def held_out_report(self) -> dict[str, Any]:
        """Metrics of the held-out batches."""
        trainer = self.trainer
        assert isinstance(trainer.model, ModelWithLoss) and trainer.held_out is not None
        meter = LossMeter(trainer.meter.names)
        batches = iter(trainer.make_stream(trainer.held_out, trainer.args))
        model = trainer.model.eval()
        with torch.no_grad():
            for _ in range(trainer.stage.eval.batches):
                batch = {name: value.to(trainer.args.device) for name, value in next(batches).items()}
                outputs = model(**batch)
                meter.add(outputs["parts"], trainer.micro_batch)
        report = meter.report()
        if trainer.stage.eval.modality_integration_rate:
            report["modality_integration_rate"] = self.modality_integration_rate(batch)
        model.train()
        return report

    def modality_integration_rate(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """Modality Integration Rate over one packed batch; of several processes, the rows of the first."""
        trainer = self.trainer
        base, loss = base_model(trainer.lm), trainer.model.loss
        with torch.no_grad(), usable_attention(base):  # no autocast here
            outputs = base.model(
                input_ids=batch["input_ids"],
                output_hidden_states=True,
                **packed_inputs(base, batch["position_ids"]),
            )
        hidden = [layer.flatten(0, 1) for layer in outputs.hidden_states[1:]]
        names = [name for name in loss.names if name != CONTROL]
        return integration_rates(hidden, loss.table[batch["input_ids"].flatten()], names)
