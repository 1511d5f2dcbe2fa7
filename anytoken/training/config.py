"""The recipe schema: a stage of training as data.

A stage names where the weights come from, what data in which views, what is trained, and where the checkpoint
goes. Unknown keys are errors. Any value can be overridden from the command line as ``a.b=value``
(``data.0.weight=2``). Relative paths start at the working directory (those of data at ``data_root``), so
recipes can be copied anywhere.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from anytoken import moved
from anytoken.data.mixture import SamplingSpec, SourceSpec
from anytoken.utils.errors import ConfigError
from anytoken.utils.hints import explain

# What a stage of pairs has no use for.
PACKED_ONLY = (
    "tokens_per_batch", "gradient_accumulation_steps", "cfg_dropout", "loss", "moe", "pcgrad", "samples", "reference",
)  # fmt: skip
AUTO = "auto"  # the view that stands for all that a set's records can teach


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class OptimizerSpec(_Part):
    """AdamW, or Muon for hidden matrices and AdamW for the rest. Norms, biases and embeddings have no weight decay."""

    kind: Literal["adamw", "muon"] = Field(
        default="adamw", description="adamw, or muon for hidden matrices and AdamW for the rest"
    )
    lr: float = Field(default=1e-3, gt=0, description="peak learning rate of AdamW")
    muon_lr: float = Field(
        default=0.02,
        gt=0,
        description="of hidden matrices [A, B]: times sqrt(max(1, A / B)); the same schedule",
    )
    weight_decay: float = Field(
        default=0.1, ge=0, description="of matrices; norms, biases and embeddings have none"
    )
    betas: tuple[float, float] = Field(default=(0.9, 0.95), description="AdamW's moment coefficients")
    eps: float = Field(default=1e-8, description="AdamW's epsilon")
    grad_clip: float = Field(default=1.0, ge=0, description="maximum gradient norm; 0: no clipping")


class ScheduleSpec(_Part):
    """Learning rate over the steps, or over ``max_minutes`` where they are over first: warm-up, then cosine, WSD (flat,
    then linear decay) or constant."""

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


class LossSpec(_Part):
    """How the losses of the modalities become one number."""

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


class MoeSpec(_Part):
    """What keeps the experts' load even: losses, over all tokens and within each modality, or a bias."""

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


class EvalSpec(_Part):
    """Held-out loss per modality."""

    every: int = Field(default=0, ge=0, description="steps between evaluations; 0: only at the end")
    first: bool = Field(default=False, description="also before the first step: what training has to beat")
    modality_integration_rate: bool = Field(
        default=False, description="also how far each modality's hidden states lie from text's (MIR)"
    )
    batches: int = Field(default=8, ge=1, description="batches per evaluation and source")
    data: list[SourceSpec] = Field(default=[], description="held-out sources")


class SamplePrompt(_Part):
    """One prompt (text, or content parts as in a conversation) and the kinds of the reply (null: the model decides)."""

    prompt: str | list[dict[str, str]] = Field(description="text, or content parts as in a conversation")
    output: str | list[str] | None = Field(
        default=None, description="kind or kinds of the reply; null: the model decides"
    )


class SampleSpec(_Part):
    """Replies for the report, within a share of the training time."""

    every: int = Field(default=0, ge=0, description="steps between samples; 0: only at the end")
    prompts: list[SamplePrompt] = Field(default=[], description="prompts to answer in the report")
    share_of_time: float = Field(
        default=0.05, gt=0, le=1, description="maximum fraction of the run's time spent on samples"
    )


class LoraSpec(_Part):
    """A LoRA adapter instead of full training; see ``lora.py``."""

    r: int = Field(default=16, ge=1, description="rank")
    alpha: int = Field(default=32, ge=1, description="scale: alpha / r")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout on the adapter's input")
    rslora: bool = Field(default=False, description="scale by alpha / sqrt(r), arXiv 2312.03732")
    dora: bool = Field(default=False, description="magnitude apart from direction, arXiv 2402.09353")
    start: str | None = Field(
        default=None, description="an adapter folder with the same settings to start from"
    )
    attention: bool = Field(default=True, description="adapt attention projections")
    experts: bool = Field(default=True, description="adapt expert matrices")
    router: bool = Field(default=False, description="adapt routers")
    new_rows: list[str] = Field(
        default=[], description="modalities, or text, whose vocabulary rows are trained in full"
    )


class ContrastiveSpec(_Part):
    """An embedding head, trained on pairs; see ``contrastive.py`` for the terms. A view's two sides are a pair."""

    batch: int = Field(default=256, ge=2, description="pairs of one step, of all processes")
    chunk: int = Field(default=64, ge=1, description="sequences of one forward pass (GradCache)")
    width: int = Field(default=256, ge=1, description="dimensions of the vectors")
    widths: list[int] = Field(default=[], description="prefixes that are vectors too (Matryoshka)")
    temperature: float = Field(default=0.07, gt=0, description="initial value; it is learned")
    positives: str | None = Field(default=None, description="a key: records with equal values are positives")
    graded: float = Field(default=0.0, ge=0, description="sharpness of graded targets (CWCL); 0: none")
    tokenwise: float = Field(default=0.0, ge=0, description="weight of token-wise similarity (FILIP)")
    intra_modal: float = Field(
        default=0.0, ge=0, description="weight of consistency within modalities (CyCLIP)"
    )
    hard_negatives: float = Field(
        default=0.0, ge=0, description="how much nearer negatives count for; 0: alike"
    )
    noise: float = Field(
        default=0.0, ge=0, description="how much unlikely pairs are distrusted; 0: not at all"
    )
    weight_by: str | None = Field(
        default=None, description="a key: how much a record's pair counts, 0 or more"
    )
    teacher: str | None = Field(
        default=None, description="'momentum', or a folder with a head; its retrieval is learned too"
    )
    teacher_weight: float = Field(default=0.4, ge=0, le=1, description="weight of the teacher's loss")
    momentum: float = Field(default=0.995, ge=0, lt=1, description="of the momentum teacher, per step")
    compatible: str | None = Field(
        default=None, description="a folder with an older head, whose indexes stay usable (XBT)"
    )
    compatible_weight: float = Field(
        default=1.0, gt=0, description="weight of the backward-compatibility loss"
    )


class CodecSpec(_Part):
    """A codec of transformers as a tokenizer; see ``tokenizers/pretrained.py``."""

    source: str = Field(description="a folder or hub id, of the codec or of a model that holds it")
    config: dict[str, Any] = Field(
        description="its model_type and the sizes that are not transformers' own, to plan with it without a download"
    )
    settings: dict[str, Any] = Field(default={}, description="of the tokenizer: num_codebooks, side_px, ...")


class BackboneSpec(_Part):
    """A language model and codecs from which the checkpoint ``init_from`` is built if it does not exist."""

    model: str = Field(description="a causal language model: a folder or hub id")
    config: str = Field(description="its configuration, a .json, to plan with it without a download")
    codecs: dict[str, CodecSpec] = Field(min_length=1, description="codec per modality")


class DistributedSpec(_Part):
    """What the launcher must have started (torchrun); a different world size is an error, never ignored."""

    world_size: int = Field(default=1, ge=1, description="processes the launcher must have started")
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
        """What shares the work; the states of one are not for another."""
        return "deepspeed" if self.deepspeed else "ddp" if self.mesh is None else "mesh"


class TrainConfig(_Part):
    """One training run.

    ``tokens_per_batch`` counts all ids of one optimizer step: of all processes, and of all its
    ``gradient_accumulation_steps`` micro-batches. It does not change with the number of processes, which share the rows
    of each micro-batch.
    """

    init_from: str = Field(description="'scratch', 'mini', or a checkpoint folder")
    output: str = Field(description="folder of the run: states, metrics, report and the final checkpoint")
    backbone: BackboneSpec | None = None
    tokenizers: dict[str, str] = Field(
        default={}, description="for scratch: text and each modality -> tokenizer folder"
    )
    model: dict[str, Any] = Field(default={}, description="for scratch: overrides of AnyTokenConfig")
    modalities: dict[str, str] = Field(
        default={}, description="to add to a checkpoint: new modality -> tokenizer folder"
    )
    replace_tokenizers: dict[str, str] = Field(
        default={},
        description="tokenizers to change in a checkpoint: modality -> folder; its new codes are reinitialized",
    )
    data_root: str = Field(default="", description="where relative paths of data and eval.data start")
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
    loss: LossSpec = LossSpec()
    pcgrad: bool = Field(
        default=False,
        description="project conflicting gradients of modalities (PCGrad); a backward pass for each",
    )
    moe: MoeSpec = MoeSpec()
    eval: EvalSpec = EvalSpec()
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
        description="of matrix products (weights stay float32); auto: bf16 if it is faster on this machine",
    )
    attention: Literal["auto", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"] = Field(
        default="auto",
        description="auto: FlashAttention where its package, a CUDA device and precision bf16 are there, else sdpa",
    )
    seed: int = Field(default=0, description="of data order, initialization and dropout")
    compile: bool = Field(
        default=False,
        description="compile the decoder layers with torch.compile: a minute of compilation, then faster steps",
    )
    save_every: int = Field(default=500, gt=0, description="steps between saved states")
    save_minutes: float | None = Field(
        default=None, gt=0, description="also save every N minutes of training"
    )
    log_every: int = Field(default=20, gt=0, description="steps between lines of metrics.jsonl")
    threads: int | None = Field(
        default=None, ge=1, description="CPU threads; by default PyTorch's own choice"
    )

    @model_validator(mode="before")
    @classmethod
    def _old_keys(cls, recipe: Any) -> Any:
        return with_todays_keys(recipe) if isinstance(recipe, dict) else recipe

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
        self._check_muon()
        self._check_contrastive()
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

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> "TrainConfig":
        """Read a recipe and apply ``a.b=value`` overrides; ConfigError names whatever is wrong."""
        path = Path(path)
        if not path.is_file():
            raise ConfigError(f"{path} is not a recipe file; give the path of a stage .yaml")
        try:
            recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ConfigError(f"{path} is not valid YAML: {error}") from None
        if not isinstance(recipe, dict):
            raise ConfigError(f"{path} holds no mapping of stage settings")
        return cls.from_dict(apply_overrides(recipe, overrides), source=str(path))

    @classmethod
    def from_dict(cls, recipe: dict[str, Any], source: str = "stage") -> "TrainConfig":
        """Validate a mapping; ConfigError lists every offending key with the value received."""
        try:
            return cls.model_validate(recipe)
        except ValidationError as error:
            raise ConfigError(f"{source}: {explain(error, cls)}") from None


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


def with_todays_keys(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe with the keys of `moved.RECIPE_KEYS` under their names of today, and a FutureWarning for each."""
    for old, new in moved.RECIPE_KEYS.items():
        group, _, key = old.rpartition(".")
        part = recipe.get(group) if group else recipe
        if not isinstance(part, dict) or key not in part:
            continue
        today = new.rpartition(".")[2]
        if today in part:
            raise ValueError(f"{old} is now {new}, and the recipe has both; remove {old}")
        _warn_of(old)
        part = {today if name == key else name: value for name, value in part.items()}
        recipe = {**recipe, group: part} if group else part
    return recipe


def _warn_of(old: str) -> None:
    message = f"the recipe key {old} is now {moved.RECIPE_KEYS[old]}; the old name goes in the next version"
    warnings.warn(message, FutureWarning, stacklevel=2)


def apply_overrides(recipe: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Set ``a.b.0.c=value`` entries in a copy of a nested recipe; values are read as YAML."""
    recipe = yaml.safe_load(yaml.safe_dump(recipe, sort_keys=False))  # order is meaning: of ids, for one
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals or not name:
            raise ConfigError(f"cannot read override {override!r}; write key=value, for example steps=10")
        if old := next((one for one in moved.RECIPE_KEYS if f"{name}.".startswith(f"{one}.")), None):
            _warn_of(old)
            recipe, name = with_todays_keys(recipe), moved.RECIPE_KEYS[old] + name.removeprefix(old)
        *parents, last = name.split(".")
        node: Any = recipe
        for key in parents:
            node = _child(node, key, override)
        if isinstance(node, list):
            node[_index(node, last, override)] = yaml.safe_load(value)
        else:
            node[last] = yaml.safe_load(value)
    return recipe


def _child(node: Any, key: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, key, override)]
    child = node.setdefault(key, {})
    if child is None:
        child = node[key] = {}
    if not isinstance(child, (dict, list)):
        raise ConfigError(f"override {override!r}: {key} is a value ({child!r}), not a group of settings")
    return child


def _index(node: list[Any], key: str, override: str) -> int:
    if not key.isdigit() or int(key) >= len(node):
        raise ConfigError(f"override {override!r}: {key!r} is not an index into a list of {len(node)}")
    return int(key)


if not TYPE_CHECKING:
    __getattr__ = moved.old_names(__name__)
