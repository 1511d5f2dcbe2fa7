"""The training loop: transformers' Trainer with packed data, losses on hidden states, and metrics per
modality.

``train(stage)`` runs a recipe and leaves a checkpoint folder that ``anytoken.load`` opens. A killed run goes
on from its last saved step and meets the same losses as one that was never killed (``checkpoint.py``); Ctrl-C saves
first, and a loss that is not finite stops the run (``interrupts.py``).
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.training_args import ParallelMode

from anytoken.data.mixture import Mixture, SourceSpec
from anytoken.data.packing import PackedStream, PackState
from anytoken.model.extend_vocab import save_modalities
from anytoken.processor import Processor
from anytoken.training.callbacks import TrainingCallback
from anytoken.training.checkpoint import (
    SaveError,
    begin_from,
    clear_partial,
    commit_checkpoint,
    is_finished,
    move_final,
    partial_folder,
    saved_states,
    step_of,
)
from anytoken.training.config import (
    TrainConfig,
)
from anytoken.training.distributed.deepspeed import (
    convert,
    load_buffers,
    load_deepspeed_config,
    no_zero3_init,
    restore_adamw_groups,
)
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
from anytoken.training.initialize import (
    build_init_checkpoint,
    build_model,
    checkpoint_folder,
    choose_attention,
    enable_expert_bias,
)
from anytoken.training.interrupts import FiniteCheck, GracefulStop, Interrupted, Noted, dump_divergence
from anytoken.training.lora import SAVE_ADAPTER, LanguageModel, add_lora, base_model, load_weights
from anytoken.training.losses.balanced import BalancedLoss
from anytoken.training.metrics import LossMeter, MetricsLog, read_metrics
from anytoken.training.optim import pcgrad
from anytoken.training.optim.lr_schedule import Schedule
from anytoken.training.optim.muon import make_optimizer
from anytoken.training.optim.param_groups import parameter_groups, select_trainable
from anytoken.training.precision import choose_precision
from anytoken.training.prepare_data import prepare_sources
from anytoken.training.report.adapter_card import adapter_card
from anytoken.training.report.html import FACTS, HtmlReport
from anytoken.training.report.markdown import write_report
from anytoken.training.report.samples import Answer, Sampler
from anytoken.training.run_metadata import check_same_data, run_facts
from anytoken.training.step import ModelWithLoss, compile_layers, with_layout, worth_compiling
from anytoken.utils.atomic import write_file
from anytoken.utils.errors import ConfigError

SAVE_ERRORS = (OSError, RuntimeError, SafetensorError)  # what torch and safetensors say of a full disk
CHECKED_STEPS = 20  # of a GPU, whose losses are looked at together: looking makes the host wait
PROGRESS = "progress.json"  # the place in the data, in the meter and in the log: the same for every process


class StageTrainer(Trainer):
    """transformers' Trainer for one stage; see the module's docstring for what it adds."""

    optimizer: torch.optim.Optimizer | None
    lr_scheduler: Any

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
        self.flops_share = 0.0  # of the measured peak, that one token a second takes
        self.page = HtmlReport(stage)
        lm: LanguageModel = model.lm
        context = base_model(lm).config.get_text_config().max_position_embeddings
        self.sampler = Sampler(stage.samples, self.folder, processor, answer, context)
        self.loop = self.make_loop()
        super().__init__(model=model, args=arguments, callbacks=[self.loop])
        if arguments.process_index:  # its tokens get noise of their own
            torch.manual_seed(stage.seed + arguments.process_index)
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)

    @property
    def weights_are_sharded(self) -> bool:
        """Whether no process has the whole model."""
        return is_sharded(self.model) or is_deepspeed_zero3_enabled()

    def make_stream(self, mixture: Mixture, arguments: TrainingArguments) -> PackedStream:
        """A mixture's packed batches; of the rows of all processes, those of this one."""
        stage, pad = self.stage, self.processor.token_space.pad
        split = arguments.world_size, arguments.process_index
        sampling = stage.sampling.workers, stage.sampling.max_bad
        kept = (
            64 + stage.gradient_accumulation_steps
        )  # the Trainer draws all batches of a step before the first is used
        return PackedStream(mixture.sample, stage.batch_size, stage.context, pad, *split, *sampling, kept)

    def group_names(self, model: Any) -> list[str]:
        """What losses are reported for."""
        return model.loss.names

    def make_loop(self) -> TrainingCallback:
        """What happens around the steps."""
        return TrainingCallback(self)

    @property
    def lm(self) -> LanguageModel:
        """The language model that is trained (a PeftModel with LoRA)."""
        return self.accelerator.unwrap_model(self.model).lm

    def get_train_dataloader(self) -> DataLoader:
        """The packed stream as it is: every process takes its own rows of the same batches."""
        pinned = self.args.device.type == "cuda"
        # Iterating draws a seed: not from the random numbers that a state keeps, or a resumed run meets others.
        own = torch.Generator()
        return DataLoader(
            self.stream, batch_size=None, collate_fn=self.collate, pin_memory=pinned, generator=own
        )

    def collate(self, batch: Any) -> dict[str, Tensor]:
        """A batch as the model takes it."""
        return with_layout(batch, grammar=self.processor.grammar)

    def _prepare_input(self, data: Any) -> Any:
        """To the device; the host does not wait for it."""
        if isinstance(data, Tensor):
            return data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW, fused, with weight decay on matrices only; or Muon for the hidden matrices."""
        if self.optimizer is None:
            spec = self.stage.optimizer
            groups = param_groups_by_mesh(parameter_groups(base_model(self.lm), spec.weight_decay))
            self.weight_decays = [group["weight_decay"] for group in groups]
            self.optimizer = make_optimizer(spec, base_model(self.lm), groups)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """The stage's schedule; its numbers are saved with the optimizer."""
        if self.lr_scheduler is None:
            self.lr_scheduler = LambdaLR(optimizer or self.create_optimizer(), self.schedule)
        return self.lr_scheduler

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward of one micro-batch; harmonised if the recipe wants it."""
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
        """The batch's loss; its parts go to the meter. DivergenceError if it is not finite, on a GPU steps later."""
        outputs = model(**inputs)
        self.finite.keep(self.state.global_step, inputs)
        self._watch("loss", outputs["loss"].detach())
        self.meter.add(outputs["parts"], self.micro_batch, outputs["load"])
        self.shares = outputs["shares"]
        return outputs["loss"]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The gradient's norm, known before the weights are touched: on a CPU a bad one is stopped here."""
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
        """Look at all losses and norms that were noted; DivergenceError for the first that is not finite."""
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
        entry = {"step": self.state.global_step, **logs, **self.meter.report()}
        if self.stream.skipped:
            entry["skipped"] = {"drawn": self.stream.drawn, **self.stream.skipped}
        if self.flops_share:
            entry["share_of_peak"] = entry["tokens_per_second"] * self.flops_share
        self.meter.reset()
        if self.is_world_process_zero():
            self.metrics_log.write(entry)
        super().log(entry, start_time)

    def _get_output_dir(self, trial: Any) -> str:
        return str(partial_folder(self.folder))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save everything to a temporary folder, then rename it and drop the oldest; SaveError if that fails."""
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
                write_file(written / PROGRESS, json.dumps(self._progress()))
                commit_checkpoint(self.folder, step)
        except SAVE_ERRORS as error:
            raise _save_error(self.folder, f"the state of step {step}", error) from error
        self.accelerator.wait_for_everyone()

    def _progress(self) -> dict[str, Any]:
        step = self.state.global_step
        return {
            "stream": dataclasses.asdict(self.stream.state(step * self.args.gradient_accumulation_steps)),
            "meter": self.meter.state(),
            "log_bytes": self.metrics_log.position(),
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
            if self.is_deepspeed_enabled:
                load_buffers(base_model(self.lm), Path(checkpoint))
                restore_adamw_groups(inner.optimizer.optimizer, self.weight_decays)
            self._restore_progress(Path(checkpoint))

    def _restore_progress(self, state: Path) -> None:
        progress = read_progress(state)
        taken = step_of(state) * self.args.gradient_accumulation_steps
        self.stream.restore(taken, PackState(**progress["stream"]))
        self.meter.restore(progress["meter"])
        if self.is_world_process_zero():
            self.metrics_log.rewind(progress["log_bytes"])

    def run(self) -> None:
        """Train from the last state, or from the start, to the end. Interrupted if asked to stop before it."""
        states = saved_states(self.folder)
        if not states and self.is_world_process_zero():
            self.metrics_log.rewind(0)
        if states and read_progress(states[-1])["finished"]:  # killed after the last step
            self._load_from_checkpoint(str(states[-1]))
            self._restore_progress(states[-1])
            self.loop.evaluate(step_of(states[-1]))
            return
        with self.stop:
            self.train(resume_from_checkpoint=str(states[-1]) if states else None)
        if self.state.global_step < self.schedule.total:
            raise Interrupted(
                f"stopped at step {self.state.global_step} of {self.schedule.total} and saved in "
                f"{saved_states(self.folder)[-1]}; the same command resumes from there"
            )


def read_progress(state: Path) -> dict[str, Any]:
    """What was noted beside a state."""
    return json.loads((state / PROGRESS).read_text())


def train(stage: TrainConfig, answer: Answer | None = None) -> Path:
    """Run a stage and return its output folder; a finished run is kept, an unfinished one is resumed.

    answer: answers the recipe's ``samples`` for the report, (model, processor, prompt, output) -> HTML.
    ConfigError if the output folder holds a run with other settings or data; Interrupted if it was asked to stop,
    and saved; DivergenceError for a loss that is not finite; SaveError if the disk does not take a state.
    """
    folder = Path(stage.output)
    if is_finished(stage):
        return folder
    if stage.threads is not None:
        torch.set_num_threads(stage.threads)
    recipe, stage = stage, _settled(stage)
    arguments, mesh = _training_arguments(stage), read_mesh(stage)
    with no_zero3_init(arguments):
        with arguments.main_process_first(local=False):
            build_init_checkpoint(stage)
            if saved_states(folder):
                _suit(stage, saved_states(folder)[-1])
        processor, start = build_model(stage)
    choose_attention(start, stage, arguments.device)
    with arguments.main_process_first(local=False):  # the others find the sets tokenized
        data = prepare_sources(stage, stage.data, processor)
        held_out = prepare_sources(stage, stage.eval.data, processor)
    torch.manual_seed(stage.seed)
    lm = _adapted(start, stage, processor)
    if stage.contrastive is not None:
        from anytoken.training.pair_trainer import make_pair_trainer

        trainer = make_pair_trainer(stage, arguments, processor, lm, data, held_out)
    else:
        mixture = _mixture(stage, data, processor, stage.cfg_dropout)
        model = ModelWithLoss(lm, build_loss(stage, processor), stage.moe, stage.pcgrad)
        if mesh is not None:
            parallelize(model, mesh)
        trainer = StageTrainer(stage, arguments, processor, model, mixture, answer)
        trainer.held_out = _mixture(stage, held_out, processor, cfg_dropout=0.0) if held_out else None
    if trainer.is_world_process_zero():
        _begin(trainer, recipe, [*data, *held_out])
    trainer.accelerator.wait_for_everyone()
    trainer.run()
    try:
        _finish(trainer)
    except SAVE_ERRORS as error:
        raise _save_error(folder, "the final checkpoint", error) from error
    return folder


def _mixture(
    stage: TrainConfig, sources: list[SourceSpec], processor: Processor, cfg_dropout: float
) -> Mixture:
    learn_all = stage.loss.loss_on == "all"
    drawn = stage.seed, cfg_dropout, learn_all, stage.sampling, stage.tokens_per_batch
    return Mixture(sources, processor, stage.context, *drawn)


def _adapted(start: PreTrainedModel, stage: TrainConfig, processor: Processor) -> LanguageModel:
    """The model with what the stage trains unfrozen, or in an adapter."""
    lm: LanguageModel = start
    if stage.moe.expert_bias_rate:
        enable_expert_bias(start)
    if stage.lora is not None:
        lm = add_lora(start, stage.lora, processor.token_space, stage.init_from)
    else:
        select_trainable(start, stage.trainable, processor.token_space)
    if stage.gradient_checkpointing:
        start.gradient_checkpointing_enable({"use_reentrant": False})
    if worth_compiling(stage.compile, stage.steps, start.device):
        compile_layers(start)
    return lm


def build_loss(stage: TrainConfig, processor: Processor) -> BalancedLoss:
    """The loss of a recipe over a processor's token space."""
    spec = stage.loss
    return BalancedLoss(
        processor.grammar, spec.modality_weights, spec.control_weight, spec.grammar_restricted, spec.z_loss
    )


def _settled(stage: TrainConfig) -> TrainConfig:
    """The stage with a precision instead of auto: that of the state it goes on from, or the quicker one here."""
    if stage.precision != "auto":
        return stage
    states = saved_states(Path(stage.output))
    if states:
        chosen = read_progress(states[-1])["precision"]
    else:
        arguments = _training_arguments(stage)  # joins the other processes, so that all choose the same
        chosen = choose_precision(arguments.device)
    return stage.model_copy(update={"precision": chosen})


def _begin(trainer: StageTrainer, recipe: TrainConfig, sources: list[SourceSpec]) -> None:
    """Write the recipe and the facts of the run; ConfigError if it would go on with other data."""
    stage, folder = trainer.stage, trainer.folder
    clear_partial(folder)
    write_file(folder / "stage.yaml", yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    dtype = torch.bfloat16 if trainer.args.bf16 else torch.float32
    facts = run_facts(base_model(trainer.lm), sources, trainer.args.world_size, stage.context, dtype)
    if saved_states(folder):
        check_same_data(json.loads((folder / FACTS).read_text()), facts)
    write_file(folder / FACTS, json.dumps(facts, indent=1) + "\n")
    if stage.contrastive is None:  # a frozen model's features are computed once and kept
        trainer.flops_share = facts["flops_per_token"] / facts["measured_peak_flops"]


def _suit(stage: TrainConfig, state: Path) -> None:
    """Make a state one that the recipe's engine and number of processes can go on from; ConfigError if it cannot be."""
    before, engine = read_progress(state), stage.distributed.engine
    if before["engine"] != engine:
        raise ConfigError(
            f"{state} was saved by distributed.{before['engine']}, and {engine} cannot go on from its optimizer; take "
            f"that again, or begin another run{begin_from(stage, [state])}"
        )
    if _is_converted(stage):
        convert(state)


def _is_converted(stage: TrainConfig) -> bool:
    """Whether the run goes on from a state of DeepSpeed's that another number of processes saved."""
    states = saved_states(Path(stage.output))
    if stage.distributed.engine != "deepspeed" or not states:
        return False
    return read_progress(states[-1])["processes"] != stage.distributed.world_size


def _training_arguments(stage: TrainConfig) -> TrainingArguments:
    """The stage as transformers' arguments; ConfigError if other than ``world_size`` processes run."""
    arguments = TrainingArguments(
        output_dir=stage.output,
        max_steps=stage.steps,
        per_device_train_batch_size=stage.batch_size // stage.distributed.world_size,
        gradient_accumulation_steps=stage.gradient_accumulation_steps,
        max_grad_norm=stage.optimizer.grad_clip,
        learning_rate=stage.optimizer.lr,
        logging_steps=stage.log_every,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=stage.save_every,
        save_only_model=stage.distributed.mesh is not None,  # what it says of its optimizer: we do that
        seed=stage.seed,
        use_cpu=not torch.cuda.is_available(),  # said outright, or processes on CPUs train apart, unnoticed
        bf16=stage.precision == "bf16",
        deepspeed=load_deepspeed_config(stage.distributed.deepspeed, _is_converted(stage)),
        ddp_backend=stage.distributed.ddp_backend,
        ddp_broadcast_buffers=False,  # expert loads are counted apart, and summed when the bias moves
        ignore_data_skip=True,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
    )
    wanted, running = stage.distributed.world_size, arguments.world_size
    together = running == 1 or arguments.parallel_mode == ParallelMode.DISTRIBUTED
    if running != wanted or not together:
        raise ConfigError(
            f"distributed.world_size is {wanted} but {running} processes run"
            f"{'' if together else ' apart from each other'}; "
            f"launch with torchrun --nproc_per_node {wanted} or change the recipe"
        )
    return arguments


def _finish(trainer: StageTrainer) -> None:
    """Leave the final checkpoint and the report in the output folder; the state is no longer needed."""
    final = partial_folder(trainer.folder) / "final"
    trainer.save_model(str(final))
    if not trainer.is_world_process_zero():
        return
    if trainer.stage.lora is None and trainer.stage.trainable:
        write_file(final / "sampling.json", _sampling_defaults(trainer.stage))
    elif trainer.stage.lora is not None:
        facts = json.loads((trainer.folder / FACTS).read_text(encoding="utf-8"))
        entries = read_metrics(trainer.folder / "metrics.jsonl")
        write_file(final / "README.md", adapter_card(trainer.stage, facts, entries))
    write_report(trainer.folder)
    trainer.page.update(finished=True)
    move_final(trainer.folder)


def _save_error(folder: Path, what: str, error: Exception) -> SaveError:
    """What to say of a save that failed, after making room by removing its half."""
    clear_partial(folder)
    states = saved_states(folder)
    last = f"the last whole state is {states[-1]}" if states else "there is no whole state yet"
    return SaveError(
        f"{what} could not be saved in {folder} ({error}); {last}. Free some space and run the same command again"
    )


def _sampling_defaults(stage: TrainConfig) -> str:
    """How to sample each modality: kept from the checkpoint the run began with, else left to the engine."""
    if stage.init_from != "scratch":
        path = checkpoint_folder(stage.init_from) / "sampling.json"
        if path.is_file():
            return path.read_text(encoding="utf-8")
    return "{}"
