"""The groups of settings in a stage's recipe; `config.py` puts them together."""

from typing import Any, Literal

from pydantic import Field, field_validator

from anytoken.data.mixture import SourceSpec
from anytoken.training.settings import Settings


class OptimizerSpec(Settings):
    """AdamW, or Muon for hidden matrices and AdamW for the rest. Norms, biases and embeddings have no weight decay."""

    kind: Literal["adamw", "muon"] = Field(
        default="adamw", description="adamw, or muon for hidden matrices and AdamW for the rest"
    )
    lr: float = Field(default=1e-3, gt=0, description="peak learning rate of AdamW")
    muon_lr: float = Field(
        default=0.02,
        gt=0,
        description="learning rate of hidden matrices [A, B], scaled by sqrt(max(1, A / B)); same schedule",
    )
    weight_decay: float = Field(
        default=0.1, ge=0, description="weight decay of matrices; norms, biases and embeddings have none"
    )
    betas: tuple[float, float] = Field(default=(0.9, 0.95), description="AdamW's moment coefficients")
    eps: float = Field(default=1e-8, description="AdamW's epsilon")
    grad_clip: float = Field(default=1.0, ge=0, description="maximum gradient norm; 0: no clipping")


class ScheduleSpec(Settings):
    """Learning rate over the steps, or over ``max_minutes`` if they end first: warm-up, then cosine, WSD (flat, then
    linear decay) or constant."""

    kind: Literal["cosine", "wsd", "constant"] = Field(
        default="wsd", description="shape after warm-up: cosine, wsd (flat, then linear decay) or constant"
    )
    warmup_steps: int = Field(default=100, ge=0, description="steps of linear warm-up")
    decay_fraction: float = Field(
        default=0.2, gt=0, le=1, description="wsd: fraction of the steps that decay"
    )
    final_fraction: float = Field(
        default=0.0, ge=0, le=1, description="learning rate at the end, as a fraction of the peak"
    )


class LossSpec(Settings):
    """How the losses of the modalities are combined."""

    modality_weights: Literal["equal", "tokens"] | dict[str, float] = Field(
        default="equal",
        description="equal: each modality counts the same; tokens: each id counts the same; or a weight per modality",
    )
    control_weight: float = Field(default=0.1, ge=0, description="weight of control ids")
    grammar_restricted: bool = Field(
        default=True, description="softmax over the ids the grammar allows, not the whole vocabulary"
    )
    loss_on: Literal["assistant", "all"] = Field(
        default="assistant", description="assistant: replies only; all: prompts too"
    )
    z_loss: float = Field(default=1e-4, ge=0, description="coefficient of the logit z-loss")

    @field_validator("loss_on", mode="before")
    @classmethod
    def _old_value(cls, value: Any) -> Any:
        return "all" if value == "everything" else value  # as version 0.1 had it


class MoeSpec(Settings):
    """Load balancing of the experts: losses over all tokens and within each modality, or a bias."""

    router_aux_loss: float = Field(
        default=0.01, ge=0, description="coefficient of the load-balance loss over all tokens"
    )
    router_modality_aux_loss: float = Field(
        default=0.0, ge=0, description="coefficient of the load-balance loss within each modality"
    )
    router_z_loss: float = Field(default=1e-3, ge=0, description="coefficient of the router z-loss")
    expert_bias_rate: float = Field(
        default=0.0, ge=0, description="step of the balancing bias (arXiv 2408.15664: 0.001); 0: no bias"
    )


class EvalSpec(Settings):
    """Held-out loss per modality."""

    every: int = Field(default=0, ge=0, description="steps between evaluations; 0: only at the end")
    first: bool = Field(default=False, description="also evaluate before the first step, as a baseline")
    modality_integration_rate: bool = Field(
        default=False,
        description="also report the distance of each modality's hidden states from those of text (MIR)",
    )
    batches: int = Field(default=8, ge=1, description="batches per evaluation and source")
    data: list[SourceSpec] = Field(default=[], description="held-out sources")


class EarlyStoppingSpec(Settings):
    """End a run once its held-out bits no longer improve."""

    metric: str = Field(
        default="bits",
        pattern=r"^bits(/.+)?$",
        description="bits: the mean over modalities; bits/KIND: one modality, or one view with contrastive",
    )
    patience: int = Field(default=3, ge=1, description="evaluations in a row without improvement")
    min_delta: float = Field(default=0.0, ge=0, description="smallest decrease that counts, in bits")


class LossGuardSpec(Settings):
    """Stop a run whose training loss explodes; null: never."""

    factor: float = Field(
        default=2.0,
        gt=1,
        description="ratio of the smoothed loss to its minimum that counts as exploded (and 0.5 nats above it)",
    )
    steps: int = Field(
        default=200, ge=1, description="steps in a row above that ratio; the smoothing spans half as many"
    )


class SamplePrompt(Settings):
    """One prompt (text, or content parts as in a conversation) and the kinds of the reply (null: the model decides)."""

    prompt: str | list[dict[str, str]] = Field(description="text, or content parts as in a conversation")
    output: str | list[str] | None = Field(
        default=None, description="kind or kinds of the reply; null: the model decides"
    )


class SampleSpec(Settings):
    """Sample replies for the report, within a share of the training time."""

    every: int = Field(default=0, ge=0, description="steps between samples; 0: only at the end")
    prompts: list[SamplePrompt] = Field(default=[], description="prompts to answer in the report")
    share_of_time: float = Field(
        default=0.05, gt=0, le=1, description="maximum fraction of the run's time spent on samples"
    )


class LoraSpec(Settings):
    """A LoRA adapter instead of full training; see ``lora.py``."""

    r: int = Field(default=16, ge=1, description="rank")
    alpha: int = Field(default=32, ge=1, description="scale: alpha / r")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout on the adapter's input")
    rslora: bool = Field(default=False, description="scale by alpha / sqrt(r), arXiv 2312.03732")
    dora: bool = Field(
        default=False, description="train magnitude and direction separately, arXiv 2402.09353"
    )
    start: str | None = Field(
        default=None, description="an adapter folder with the same settings to start from"
    )
    attention: bool = Field(default=True, description="adapt attention projections")
    experts: bool = Field(default=True, description="adapt expert matrices")
    router: bool = Field(default=False, description="adapt routers")
    new_rows: list[str] = Field(
        default=[], description="modalities, or text, whose vocabulary rows are trained in full"
    )


class ContrastiveSpec(Settings):
    """An embedding head, trained on pairs; see ``contrastive.py`` for the terms. A view's two sides are a pair."""

    batch: int = Field(default=256, ge=2, description="pairs per step, over all processes")
    chunk: int = Field(default=64, ge=1, description="sequences per forward pass (GradCache)")
    cache_states: bool | Literal["auto"] = Field(
        default="auto",
        description="compute a frozen model's states once, for all steps; auto: as many as fit cache_mb; true: all, "
        "or stop with an error; false: none",
    )
    cache_mb: int = Field(default=1024, ge=1, description="memory that kept states may take, in MB")
    width: int = Field(default=256, ge=1, description="dimension of the vectors")
    widths: list[int] = Field(
        default=[], description="prefix widths that are also trained as vectors (Matryoshka)"
    )
    temperature: float = Field(default=0.07, gt=0, description="initial value; it is learned")
    positives: str | None = Field(default=None, description="a key: records with equal values are positives")
    graded: float = Field(default=0.0, ge=0, description="sharpness of graded targets (CWCL); 0: none")
    tokenwise: float = Field(default=0.0, ge=0, description="weight of token-wise similarity (FILIP)")
    intra_modal: float = Field(
        default=0.0, ge=0, description="weight of consistency within modalities (CyCLIP)"
    )
    hard_negatives: float = Field(
        default=0.0, ge=0, description="additional weight of hard negatives; 0: none"
    )
    noise: float = Field(
        default=0.0, ge=0, description="how much unlikely pairs are down-weighted; 0: not at all"
    )
    weight_by: str | None = Field(default=None, description="a key: the weight of a record's pair, 0 or more")
    teacher: str | None = Field(
        default=None, description="'momentum', or a folder with a head whose retrieval is distilled"
    )
    teacher_weight: float = Field(default=0.4, ge=0, le=1, description="weight of the teacher's loss")
    momentum: float = Field(default=0.995, ge=0, lt=1, description="decay of the momentum teacher per step")
    compatible: str | None = Field(
        default=None, description="a folder with an older head whose indexes stay usable (XBT)"
    )
    compatible_weight: float = Field(
        default=1.0, gt=0, description="weight of the backward-compatibility loss"
    )


class CodecSpec(Settings):
    """A codec of transformers as a tokenizer; see ``tokenizers/pretrained.py``."""

    source: str = Field(description="a folder or hub id of the codec or of a model that contains it")
    config: dict[str, Any] = Field(
        description="its model_type and the sizes that differ from transformers' defaults, to plan without a download"
    )
    settings: dict[str, Any] = Field(
        default={}, description="settings of the tokenizer: num_codebooks, side_px, ..."
    )


class BackboneSpec(Settings):
    """A language model and codecs from which the checkpoint ``init_from`` is built if it does not exist."""

    model: str = Field(description="a causal language model: a folder or hub id")
    config: str = Field(description="its configuration as .json, to plan without a download")
    codecs: dict[str, CodecSpec] = Field(min_length=1, description="codec per modality")


class DistributedSpec(Settings):
    """Distribution over processes, which the launcher (torchrun) starts; another world size is an error."""

    world_size: int = Field(default=1, ge=1, description="number of processes that the launcher starts")
    deepspeed: str | None = Field(default=None, description="a DeepSpeed JSON: stages/scale/deepspeed/*.json")
    mesh: str | dict[str, Any] | None = Field(
        default=None,
        description="FSDP2 and expert parallelism, see ``distributed/fsdp.py``: settings, or stages/scale/mesh/*.json",
    )
    ddp_backend: Literal["gloo", "nccl"] | None = Field(
        default=None, description="process group backend; by default chosen by device"
    )

    @property
    def engine(self) -> Literal["deepspeed", "mesh", "ddp"]:
        """The engine that distributes training; states cannot be resumed with another one."""
        return "deepspeed" if self.deepspeed else "ddp" if self.mesh is None else "mesh"
