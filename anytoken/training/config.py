"""The recipe schema: a stage of training as data.

A stage defines the initial weights, the data and its views, the trainable parameters, and where the checkpoint
goes. Unknown keys are errors. Any value can be overridden from the command line as ``a.b=value``
(``data.0.weight=2``). Relative paths start at the working directory (those of data at ``data_root``), so
recipes can be copied anywhere.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from anytoken import moved
from anytoken.data.mixture import SamplingSpec, SourceSpec
from anytoken.training.config_parts import (
    BackboneSpec,
    ContrastiveSpec,
    DistributedSpec,
    EarlyStoppingSpec,
    EvalSpec,
    LoraSpec,
    LossGuardSpec,
    LossSpec,
    MoeSpec,
    OptimizerSpec,
    SampleSpec,
    ScheduleSpec,
)
from anytoken.training.settings import Recipe

# What a stage of pairs has no use for.
PACKED_ONLY = (
    "tokens_per_batch", "gradient_accumulation_steps", "cfg_dropout", "loss", "moe", "pcgrad", "samples", "reference",
    "ema_decay", "context_noise",
)  # fmt: skip
AUTO = "auto"  # the view that stands for all that a set's records can teach


class TrainConfig(Recipe):
    """One training run.

    ``tokens_per_batch`` counts all ids of one optimizer step, over all processes and all
    ``gradient_accumulation_steps`` micro-batches. It does not depend on the number of processes, which share the rows
    of each micro-batch.
    """

    old_keys: ClassVar[Mapping[str, str]] = moved.RECIPE_KEYS

    init_from: str = Field(description="'scratch', 'mini', or a checkpoint folder")
    output: str = Field(description="folder of the run: states, metrics, report and the final checkpoint")
    backbone: BackboneSpec | None = None
    tokenizers: dict[str, str] = Field(
        default={}, description="for scratch: text and each modality -> tokenizer folder"
    )
    model: dict[str, Any] = Field(default={}, description="for scratch: overrides of AnyTokenConfig")
    modalities: dict[str, str] = Field(
        default={}, description="modalities to add to a checkpoint: name -> tokenizer folder"
    )
    replace_tokenizers: dict[str, str] = Field(
        default={},
        description="tokenizers to change in a checkpoint: modality -> folder; its new codes are reinitialized",
    )
    data_root: str = Field(default="", description="where relative paths of data and eval.data start")
    first_frames: bool | None = Field(
        default=None,
        description="read the first frame of every video in a prompt as an image, too; default: as the checkpoint does",
    )
    limits: dict[str, float] = Field(
        default={}, description="media limits to change, such as max_seconds: 7200 (utils/limits.py)"
    )
    data: list[SourceSpec] = Field(
        min_length=1,
        description="training sources; or a mapping with train, test, views, replay and replay_share",
    )
    sampling: SamplingSpec = SamplingSpec()
    trainable: list[str] = Field(
        default=["*"],
        description="patterns of parameter names to train; rows:KIND trains vocabulary rows of one modality",
    )
    optimizer: OptimizerSpec = OptimizerSpec()
    schedule: ScheduleSpec = ScheduleSpec()
    steps: int = Field(gt=0, description="optimizer steps")
    max_minutes: float | None = Field(
        default=None,
        gt=0,
        description="time limit of the run, interruptions included; the schedule is compressed to end within it",
    )
    tokens_per_batch: int = Field(
        default=8192, gt=0, description="token ids per optimizer step, over all processes and micro-batches"
    )
    gradient_accumulation_steps: int = Field(default=1, ge=1, description="micro-batches per optimizer step")
    context: int = Field(default=1024, gt=0, description="ids per packed row")
    cfg_dropout: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="fraction of samples trained without their prompt, for classifier-free guidance",
    )
    context_noise: dict[str, Annotated[float, Field(ge=0, lt=1)]] = Field(
        default={},
        description="modality -> share of its codes that the model reads as random codes in training, such as "
        "{speech: 0.15}; targets stay exact",
    )
    loss: LossSpec = LossSpec()
    pcgrad: bool = Field(
        default=False,
        description="project conflicting gradients of modalities (PCGrad); one backward pass per modality",
    )
    moe: MoeSpec = MoeSpec()
    eval: EvalSpec = EvalSpec()
    early_stopping: EarlyStoppingSpec | None = None
    keep_best: bool = Field(
        default=False,
        description="export the weights with the lowest held-out bits, of early_stopping.metric if set",
    )
    ema_decay: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="evaluate and export an exponential moving average of the weights, such as 0.999",
    )
    loss_guard: LossGuardSpec | None = LossGuardSpec()
    samples: SampleSpec = SampleSpec()
    reference: str | None = Field(
        default=None, description="metrics.jsonl of a run whose curves the report shows as a reference"
    )
    lora: LoraSpec | None = None
    contrastive: ContrastiveSpec | None = Field(
        default=None,
        description="train an embedding head on the two sides of every view instead of the next token",
    )
    distributed: DistributedSpec = DistributedSpec()
    gradient_checkpointing: bool = Field(
        default=False,
        description="keep one hidden state per layer and recompute the rest in the backward pass",
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="fp32",
        description="data type of matrix products (weights stay float32); auto: bf16 if faster on this machine",
    )
    attention: Literal[
        "auto", "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"
    ] = Field(
        default="auto",
        description="auto: FlashAttention if its package, a CUDA device and precision bf16 are available; eager on a "
        "CPU with bf16 and short contexts; else sdpa",
    )
    seed: int = Field(default=0, description="random seed of data order, initialization and dropout")
    compile: bool | Literal["auto"] = Field(
        default=False,
        description="compile the decoder layers with torch.compile: a minute of compilation, then faster steps; auto: "
        "if the run is long and a compiler is installed",
    )
    save_every: int = Field(default=500, gt=0, description="steps between saved states")
    save_minutes: float | None = Field(
        default=None, gt=0, description="also save every N minutes of training"
    )
    weights_folder: str | None = Field(
        default=None,
        description="folder that also receives every state, without the optimizer: bfloat16 matrices, files of at most "
        "15 MiB; a run without a state resumes from them",
    )
    log_every: int = Field(default=20, gt=0, description="steps between lines of metrics.jsonl")
    report_to: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = Field(
        default=[], description="experiment trackers to which metrics are also sent"
    )
    threads: int | None = Field(
        default=None, ge=1, description="CPU threads; by default PyTorch's own choice"
    )

    @model_validator(mode="before")
    @classmethod
    def _short_data(cls, recipe: Any) -> Any:
        """``data: {train: FILE, test: FILE, views: {...}, replay: ...}`` is short for a list of sources.

        test: held out of the same views. replay: old data, a file, a source (``{path: ..., weight: 3, views: ...}``)
        or a list of them, of which replay_share (0.5) of all samples are drawn, shared out by their weights.
        """
        data = recipe.get("data") if isinstance(recipe, dict) else None
        if not isinstance(data, dict):
            return recipe
        unknown = set(data) - {"train", "test", "views", "replay", "replay_share"}
        if unknown or "train" not in data:
            raise ValueError(
                f"data is a list of sources, or train, test, views, replay and replay_share; got {', '.join(data)}"
            )
        train = {"path": data["train"], "views": data.get("views") or {AUTO: 1}}
        replay = _replayed(data.get("replay") or [], data.get("replay_share", 0.5))
        recipe = {**recipe, "data": [train, *replay]}
        if data.get("test"):
            test = {**train, "path": data["test"], "split": "test" if data["test"] == data["train"] else None}
            recipe["eval"] = {**recipe.get("eval", {}), "data": [test]}
        return recipe

    @field_validator("report_to", mode="before")
    @classmethod
    def _trackers(cls, value: Any) -> Any:
        listed = value if isinstance(value, list) else [value]
        return [one for one in listed if one not in (None, "none")]

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        if self.init_from == "scratch" and "text" not in self.tokenizers:
            raise ValueError("init_from: scratch needs tokenizers, with at least a text tokenizer's folder")
        if self.init_from == "scratch" and (self.modalities or self.replace_tokenizers):
            raise ValueError(
                "modalities are added to a checkpoint, or replaced in one; from scratch, name all under tokenizers"
            )
        if self.lora is not None and self.replace_tokenizers:
            raise ValueError(
                "replace_tokenizers moves ids that an adapter's base model has; train without lora first"
            )
        if self.backbone is not None and self.init_from in ("scratch", "mini"):
            raise ValueError(
                f"backbone is made into a checkpoint folder that init_from names; got {self.init_from!r}"
            )
        if self.init_from != "scratch" and (self.tokenizers or self.model):
            raise ValueError(
                f"tokenizers and model belong to init_from: scratch; {self.init_from!r} brings its own"
            )
        share = self.context * self.gradient_accumulation_steps * self.distributed.world_size
        if self.contrastive is None and self.tokens_per_batch % share:
            raise ValueError(
                f"tokens_per_batch {self.tokens_per_batch} is not a multiple of {share}, which is context x "
                f"gradient_accumulation_steps x world_size: {self.distributed.world_size} processes cannot share its "
                "rows evenly"
            )
        if self.lora is not None and self.moe.expert_bias_rate:
            raise ValueError("moe.expert_bias_rate is not part of a lora adapter; set it to 0")
        if self.pcgrad and (self.distributed.world_size > 1 or self.distributed.deepspeed):
            raise ValueError("pcgrad works in one process only; set it to false")
        spread = self.distributed.mesh is not None
        if spread and self.distributed.deepspeed:
            raise ValueError(
                "distributed.mesh and distributed.deepspeed exclude each other; remove one of them"
            )
        if spread and (self.lora is not None or any(one.startswith("rows:") for one in self.trainable)):
            raise ValueError("distributed.mesh trains no lora and no single rows; take distributed.deepspeed")
        if spread and self.eval.modality_integration_rate:
            raise ValueError(
                "eval.modality_integration_rate needs whole weights; set it to false, or leave distributed.mesh out"
            )
        if self.weights_folder is not None and (
            spread or share != self.context * self.gradient_accumulation_steps
        ):
            raise ValueError("weights_folder is for runs of one process; leave it out, or distributed")
        self._check_muon()
        self._check_contrastive()
        self._check_best()
        if self.ema_decay and self.distributed.engine != "ddp":
            raise ValueError(
                f"ema_decay averages whole weights, which distributed.{self.distributed.engine} shares out; leave one "
                "of them out"
            )
        if self.lora is not None and self.trainable != ["*"]:
            raise ValueError("trainable has no effect together with lora; remove one of them")
        return self

    def _check_contrastive(self) -> None:
        spec = self.contrastive
        if spec is None:
            return
        for name in PACKED_ONLY:
            if getattr(self, name) != type(self).model_fields[name].get_default(call_default_factory=True):
                raise ValueError(f"{name} has no effect with contrastive, which learns pairs; leave it out")
        if self.modalities or self.replace_tokenizers or self.backbone:
            raise ValueError(
                "contrastive trains the modalities of init_from; leave modalities, replace_tokenizers and backbone out"
            )
        if self.distributed.engine != "ddp":
            raise ValueError("contrastive keeps whole weights in every process; leave deepspeed and mesh out")
        if self.sampling.workers:
            raise ValueError("sampling.workers has no effect with contrastive; leave it out")
        if spec.batch % self.distributed.world_size:
            raise ValueError(
                f"contrastive.batch {spec.batch} is not a multiple of world_size {self.distributed.world_size}"
            )
        if spec.graded and spec.positives:
            raise ValueError(
                "contrastive.graded and contrastive.positives both define the targets; use one of them"
            )
        if any(not 1 <= width <= spec.width for width in spec.widths):
            raise ValueError(f"contrastive.widths are from 1 to the width {spec.width}; got {spec.widths}")

    def _check_best(self) -> None:
        for name in ("early_stopping", "keep_best"):
            if getattr(self, name) and not (self.eval.data and self.eval.every):
                raise ValueError(
                    f"{name} compares held-out losses: it needs eval.data, got {len(self.eval.data)} sources, and "
                    f"eval.every, got {self.eval.every}; set both, for example data.test=FILE eval.every=100"
                )
        if self.keep_best and self.distributed.deepspeed:
            raise ValueError("keep_best does not work with distributed.deepspeed; leave one of them out")

    def _check_muon(self) -> None:
        if self.optimizer.kind != "muon":
            return
        if self.distributed.engine != "ddp":
            raise ValueError(
                f"optimizer.kind muon needs whole matrices, which distributed.{self.distributed.engine} shares out; "
                "use kind: adamw, or leave it out so that every process keeps all weights"
            )
        if self.lora is not None:
            raise ValueError(
                "optimizer.kind muon is for full matrices, not for a lora adapter; use kind: adamw"
            )

    @property
    def batch_size(self) -> int:
        """Rows of ``context`` ids in one micro-batch, or pairs, of all processes together."""
        if self.contrastive is not None:
            return self.contrastive.batch
        return self.tokens_per_batch // (self.context * self.gradient_accumulation_steps)

    def sources(self, specs: Sequence[SourceSpec]) -> list[SourceSpec]:
        """The sources with their paths under ``data_root``."""
        resolved = []
        for spec in specs:
            pair = spec.pair_with
            if pair is not None:
                pair = pair.model_copy(update={"path": str(Path(self.data_root) / pair.path)})
            path = str(Path(self.data_root) / spec.path)
            resolved.append(spec.model_copy(update={"path": path, "pair_with": pair}))
        return resolved


def _replayed(old: Any, share: Any) -> list[Any]:
    """Sources of old data that together are this share of all samples, if the new weighs 1."""
    if not isinstance(share, (int, float)) or not 0 < share < 1:
        raise ValueError(f"data.replay_share is {share!r}; it is the share of old samples, between 0 and 1")
    listed = old if isinstance(old, list) else [old]
    sources: list[dict[str, Any]] = [{"path": one} if isinstance(one, str) else one for one in listed]
    for one in sources:
        if not isinstance(one, dict) or not isinstance(one.get("weight", 1), (int, float)):
            raise ValueError(
                f"data.replay lists files, or sources such as {{path: FILE, weight: 3}}; got {one!r}"
            )
    total = sum(one.get("weight", 1) for one in sources) * (1 - share) / share
    return [{"views": {AUTO: 1}, **one, "weight": one.get("weight", 1) / total} for one in sources]


if not TYPE_CHECKING:
    __getattr__ = moved.old_names(__name__)
