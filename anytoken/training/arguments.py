"""Convert a stage to transformers' TrainingArguments, adjusted to the state that it resumes from."""

from pathlib import Path

import torch
from transformers import TrainingArguments
from transformers.training_args import ParallelMode

from anytoken.training.checkpoint import begin_from, read_progress, saved_states
from anytoken.training.config import TrainConfig
from anytoken.training.distributed.deepspeed import convert, load_deepspeed_config
from anytoken.training.early_stopping import best_metric
from anytoken.training.precision import choose_precision
from anytoken.utils.errors import ConfigError


def training_arguments(stage: TrainConfig) -> TrainingArguments:
    """The stage as transformers' arguments; ConfigError if the number of processes is not ``world_size``."""
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
        report_to=stage.report_to,
        run_name=Path(stage.output).name,
        project="anytoken",
        metric_for_best_model=best_metric(stage),
        greater_is_better=False,
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


def settled(stage: TrainConfig) -> TrainConfig:
    """The stage with ``precision: auto`` resolved: that of the state it resumes from, or the faster one here."""
    if stage.precision != "auto":
        return stage
    states = saved_states(Path(stage.output))
    if states:
        chosen = read_progress(states[-1])["precision"]
    else:
        arguments = training_arguments(stage)  # joins the other processes, so that all choose the same
        chosen = choose_precision(arguments.device)
    return stage.model_copy(update={"precision": chosen})


def make_resumable(stage: TrainConfig, state: Path) -> None:
    """Adapt a state to the recipe's engine and number of processes; ConfigError if that is impossible."""
    before, engine = read_progress(state), stage.distributed.engine
    if before["engine"] != engine:
        raise ConfigError(
            f"{state} was saved by distributed.{before['engine']}, and {engine} cannot resume from its optimizer; take "
            f"that again, or start another run{begin_from(stage, [state])}"
        )
    if _is_converted(stage):
        convert(state)


def _is_converted(stage: TrainConfig) -> bool:
    """Whether the run resumes from a DeepSpeed state saved by another number of processes."""
    states = saved_states(Path(stage.output))
    if stage.distributed.engine != "deepspeed" or not states:
        return False
    return read_progress(states[-1])["processes"] != stage.distributed.world_size
