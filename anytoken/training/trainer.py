"""The training loop: transformers' Trainer with packed data, losses on hidden states, and metrics per
modality.

``train(stage)`` runs a recipe and leaves a checkpoint folder that ``anytoken.load`` opens. A killed run goes
on from its last saved step and meets the same losses as one that was never killed. Checkpoints are written to
a temporary folder and renamed.
"""

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.training_args import ParallelMode

from anytoken.data.mixture import Mixture, SourceSpec
from anytoken.data.packing import PackedStream, PackState
from anytoken.model.modeling import AnyTokenForCausalLM
from anytoken.model.moe import expert_counts, router_losses
from anytoken.processor import Processor
from anytoken.training.lora import LanguageModel, add_lora, base_model, head_weight
from anytoken.training.losses import BalancedLoss, LossParts
from anytoken.training.metrics import GroupMeter, MetricsLog
from anytoken.training.report import write_report
from anytoken.training.schedule import Schedule
from anytoken.training.stage import Stage, StageError
from anytoken.training.start import balance_by_bias, checkpoint_folder, load_start
from anytoken.training.trainable import parameter_groups, select_trainable

STATE_FOLDER = "state"
KEPT_CHECKPOINTS = 2
# Settings that may differ when a run goes on: they do not change what is learnt at a step.
FREE_SETTINGS = {"save_every", "log_every", "threads", "eval", "max_minutes"}


class ModelWithLoss(nn.Module):
    """A causal LM and its loss as one module, so that wrappers for many devices see the whole step."""

    def __init__(self, lm: LanguageModel, loss: BalancedLoss, stage: Stage) -> None:
        super().__init__()
        self.lm, self.loss, self.moe = lm, loss, stage.moe
        self.routed = isinstance(base_model(lm), AnyTokenForCausalLM)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, loss_index: Tensor, targets: Tensor
    ) -> dict[str, Any]:
        """One packed batch (see ``packing.pack``) to {"loss", "parts", "load"}."""
        base = base_model(self.lm)
        outputs = base.model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, output_router_logits=self.routed
        )
        hidden = outputs.last_hidden_state.flatten(0, 1)[loss_index]
        flat = input_ids.flatten()
        parts: LossParts = self.loss(hidden, head_weight(base), targets, flat[loss_index])
        load = None
        if self.routed and outputs.router_choices:
            router = router_losses(outputs.router_logits, outputs.router_choices, outputs.modality)
            weight = self.moe
            parts.loss = (
                parts.loss
                + weight.router_aux_loss * router.balance
                + weight.router_modality_aux_loss * router.modality_balance
                + weight.router_z_loss * router.z
            )
            parts.terms |= {
                "load_balance": router.balance.detach(),
                "modality_load_balance": router.modality_balance.detach(),
                "router_z": router.z.detach(),
            }
            groups = self.loss.table[flat]
            load = expert_counts(
                outputs.router_choices, groups, len(self.loss.names), base.config.num_experts
            )
        return {"loss": parts.loss, "parts": parts, "load": load}


class StageTrainer(Trainer):
    """transformers' Trainer for one stage; see the module's docstring for what it adds."""

    optimizer: torch.optim.Optimizer | None
    lr_scheduler: Any

    def __init__(
        self,
        stage: Stage,
        arguments: TrainingArguments,
        processor: Processor,
        model: ModelWithLoss,
        mixture: Mixture,
    ) -> None:
        self.stage, self.processor = stage, processor
        self.stream = self.make_stream(mixture, arguments)
        self.schedule = Schedule(stage.schedule, stage.steps)
        self.meter = GroupMeter(model.loss.names)
        self.folder = Path(stage.output)
        self.metrics_log = MetricsLog(self.folder / "metrics.jsonl")
        super().__init__(model=model, args=arguments, callbacks=[_Loop(self)])
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)

    def make_stream(self, mixture: Mixture, arguments: TrainingArguments) -> PackedStream:
        """Packed batches of this process's share of a mixture."""
        stage, pad = self.stage, self.processor.token_space.pad
        split = arguments.world_size, arguments.process_index
        return PackedStream(mixture.sample, stage.rows, stage.context, pad, *split)

    @property
    def lm(self) -> LanguageModel:
        """The language model that is trained (a PeftModel with LoRA)."""
        return self.accelerator.unwrap_model(self.model).lm

    def get_train_dataloader(self) -> DataLoader:
        """The packed stream as it is: every process draws its own samples."""
        return DataLoader(self.stream, batch_size=None)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW, fused, with weight decay on matrices only."""
        if self.optimizer is None:
            spec = self.stage.optimizer
            groups = parameter_groups(base_model(self.lm), spec.weight_decay)
            self.optimizer = torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps, fused=True)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """The stage's schedule; its numbers are saved with the optimizer."""
        if self.lr_scheduler is None:
            self.lr_scheduler = LambdaLR(optimizer or self.create_optimizer(), self.schedule)
        return self.lr_scheduler

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], *unused: Any, **ignored: Any
    ) -> Tensor:
        """The batch's loss; its parts go to the meter."""
        outputs = model(**inputs)
        self.meter.add(outputs["parts"], inputs["input_ids"].numel(), outputs["load"])
        return outputs["loss"]

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Write one line of metrics for the interval since the last."""
        if "loss" not in logs:
            return
        entry = {"step": self.state.global_step, **logs, **self.meter.report()}
        self.meter.reset()
        if self.is_world_process_zero():
            self.metrics_log.write(entry)
        super().log(entry, start_time)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.folder / STATE_FOLDER / "partial")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save everything to a temporary folder, then rename it and drop the oldest."""
        super()._save_checkpoint(model, trial)
        step = self.state.global_step
        partial = Path(self._get_output_dir(trial)) / f"checkpoint-{step}"
        stream = dataclasses.asdict(self.stream.state(step * self.args.gradient_accumulation_steps))
        (partial / self._stream_file).write_text(json.dumps(stream))
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            final = self.folder / STATE_FOLDER / partial.name
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            for old in saved_states(self.folder)[:-KEPT_CHECKPOINTS]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    @property
    def _stream_file(self) -> str:
        return f"stream-{self.args.process_index}.json"

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.folder)
        if state_dict is not None:  # a sharding wrapper gathered it, with this module's prefix
            state_dict = {key.removeprefix("lm."): value for key, value in state_dict.items()}
        self.lm.save_pretrained(str(folder), state_dict=state_dict)
        if self.stage.lora is None:
            self.processor.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        if self.stage.lora is not None:
            self.lm.load_adapter(str(folder), "default", is_trainable=True)
        else:
            saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            self.lm.load_state_dict(saved.state_dict())
        step = int(folder.name.split("-")[1])
        state = PackState(**json.loads((folder / self._stream_file).read_text()))
        self.stream.restore(step * self.args.gradient_accumulation_steps, state)
        self.metrics_log.rewind(step)


class _Loop(TrainerCallback):
    """Progress bar, time limit and held-out losses."""

    def __init__(self, trainer: StageTrainer) -> None:
        self.trainer = trainer
        self.eval_mixture: Mixture | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        stage = self.trainer.stage
        if stage.eval.data:
            self.eval_mixture = _mixture(stage, stage.eval.data, self.trainer.processor, prompt_drop=0.0)
        self.bar = tqdm(
            total=stage.steps, initial=state.global_step, desc=self.trainer.folder.name, unit="step"
        )
        self.bar.disable = self.bar.disable or not state.is_world_process_zero
        self.trainer.meter.reset()
        self.last = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now, schedule, stage = time.monotonic(), self.trainer.schedule, self.trainer.stage
        if stage.moe.expert_bias_rate:
            base_model(self.trainer.lm).update_expert_bias(stage.moe.expert_bias_rate)
        schedule.tick(state.global_step, now - self.last, stage.max_minutes)
        self.last = now
        if state.global_step >= schedule.total:
            control.should_training_stop = control.should_log = True
        if stage.eval.every and state.global_step % stage.eval.every == 0:
            self.evaluate(state.global_step)
        self.bar.total = schedule.total
        self.bar.update()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if logs and "groups" in logs:
            shown = {
                name: f"{group['loss']:.3f}" for name, group in logs["groups"].items() if name != "control"
            }
            self.bar.set_postfix(shown | {"tok/s": f"{logs['tokens_per_second']:.0f}"})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        stage = self.trainer.stage
        if not (stage.eval.every and state.global_step % stage.eval.every == 0):
            self.evaluate(state.global_step)
        self.bar.close()

    def evaluate(self, step: int) -> None:
        """Losses on the held-out sources, over the same batches every time."""
        if self.eval_mixture is None:
            return
        trainer, stage = self.trainer, self.trainer.stage
        meter = GroupMeter(trainer.meter.names)
        batches = iter(trainer.make_stream(self.eval_mixture, trainer.args))
        assert isinstance(trainer.model, ModelWithLoss)
        model = trainer.model.eval()
        with torch.no_grad():
            for _ in range(stage.eval.batches):
                batch = {name: value.to(trainer.args.device) for name, value in next(batches).items()}
                outputs = model(**batch)
                meter.add(outputs["parts"], batch["input_ids"].numel())
        model.train()
        if trainer.is_world_process_zero():
            trainer.metrics_log.write({"step": step, "eval": meter.report()})


def train(stage: Stage) -> Path:
    """Run a stage and return its output folder; a finished run is kept, an unfinished one goes on.

    Raises StageError if the output folder holds a run with other settings.
    """
    folder = Path(stage.output)
    if _is_finished(folder, stage):
        return folder
    arguments = _training_arguments(stage)
    if stage.threads is not None:
        torch.set_num_threads(stage.threads)
    processor, start = load_start(stage)
    lm: LanguageModel = start
    mixture = _mixture(stage, stage.data, processor, stage.prompt_drop)
    torch.manual_seed(stage.seed)
    if stage.moe.expert_bias_rate:
        balance_by_bias(start)
    if stage.lora is not None:
        lm = add_lora(start, stage.lora, processor.token_space)
    else:
        select_trainable(start, stage.trainable, processor.token_space)
    if stage.gradient_checkpointing:
        start.gradient_checkpointing_enable({"use_reentrant": False})
    loss = BalancedLoss(
        processor.grammar,
        stage.loss.modality_weights,
        stage.loss.control_weight,
        stage.loss.grammar_restricted,
        stage.loss.z_loss,
    )
    trainer = StageTrainer(stage, arguments, processor, ModelWithLoss(lm, loss, stage), mixture)
    states = saved_states(folder)
    if trainer.is_world_process_zero():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "stage.yaml").write_text(yaml.safe_dump(stage.model_dump(mode="json"), sort_keys=False))
    trainer.train(resume_from_checkpoint=str(states[-1]) if states else None)
    _finish(trainer)
    return folder


def saved_states(folder: Path) -> list[Path]:
    """The states a run can go on from, oldest first."""
    found = (folder / STATE_FOLDER).glob("checkpoint-*")
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def _mixture(stage: Stage, sources: list[SourceSpec], processor: Processor, prompt_drop: float) -> Mixture:
    learn_all = stage.loss.learn == "everything"
    return Mixture(stage.sources(sources), processor, stage.context, stage.seed, prompt_drop, learn_all)


def _training_arguments(stage: Stage) -> TrainingArguments:
    """The stage as transformers' arguments; StageError if other than ``world_size`` processes run."""
    arguments = TrainingArguments(
        output_dir=stage.output,
        max_steps=stage.steps,
        per_device_train_batch_size=stage.rows,
        gradient_accumulation_steps=stage.accumulate,
        max_grad_norm=stage.optimizer.grad_clip,
        learning_rate=stage.optimizer.lr,
        logging_steps=stage.log_every,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=stage.save_every,
        seed=stage.seed,
        use_cpu=not torch.cuda.is_available(),  # said outright, or processes on CPUs train apart, unnoticed
        bf16=stage.precision == "bf16",
        deepspeed=stage.distributed.deepspeed,
        ddp_backend=stage.distributed.ddp_backend,
        ignore_data_skip=True,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
    )
    wanted, running = stage.distributed.world_size, arguments.world_size
    together = running == 1 or arguments.parallel_mode == ParallelMode.DISTRIBUTED
    if running != wanted or not together:
        raise StageError(
            f"distributed.world_size is {wanted} but {running} processes run"
            f"{'' if together else ' apart from each other'}; "
            f"launch with torchrun --nproc_per_node {wanted} or change the recipe"
        )
    return arguments


def _is_finished(folder: Path, stage: Stage) -> bool:
    """Whether the output folder holds this run's end; StageError if it holds a run with other settings."""
    path = folder / "stage.yaml"
    if not path.is_file():
        return False
    before, recipe = yaml.safe_load(path.read_text()), stage.model_dump(mode="json")
    changed = sorted(key for key in recipe if before.get(key) != recipe[key] and key not in FREE_SETTINGS)
    if changed:
        raise StageError(
            f"{folder} holds a run with another {', '.join(changed)}; remove it or change output"
        )
    return (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file()


def _finish(trainer: StageTrainer) -> None:
    """Move the final checkpoint into the output folder, the file that marks it complete last."""
    folder = trainer.folder
    partial = folder / STATE_FOLDER / "final"
    trainer.save_model(str(partial))
    if not trainer.is_world_process_zero():
        return
    if trainer.stage.lora is None:
        (partial / "sampling.json").write_text(_sampling_defaults(trainer.stage))
    last = {"config.json", "adapter_config.json"}
    for path in sorted(partial.iterdir(), key=lambda path: path.name in last):
        target = folder / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    write_report(folder)
    shutil.rmtree(folder / STATE_FOLDER)


def _sampling_defaults(stage: Stage) -> str:
    """How to sample each modality: kept from the checkpoint the run began with, else left to the engine."""
    if stage.init_from != "scratch":
        path = checkpoint_folder(stage.init_from) / "sampling.json"
        if path.is_file():
            return path.read_text(encoding="utf-8")
    return "{}"
