"""Initialize a run: load or build the processor and the model that a stage's ``init_from`` names."""

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from anytoken.model.attention import use_attention
from anytoken.model.backbone import adopt_backbone
from anytoken.model.configuration import AnyTokenConfig
from anytoken.model.embedding_init import initialise_code_rows
from anytoken.model.extend_vocab import add_modality, replace_modality
from anytoken.model.modeling import AnyTokenForCausalLM
from anytoken.processor import SPACE_FILE, Processor
from anytoken.token_space import TokenSpace
from anytoken.tokenizers.base import ModalityTokenizer, load_tokenizer
from anytoken.tokenizers.pretrained import pretrained_tokenizer
from anytoken.tokenizers.text import TextTokenizer
from anytoken.training.config import TrainConfig
from anytoken.training.lora import LanguageModel, add_lora
from anytoken.training.optim.param_groups import select_trainable
from anytoken.training.step import compile_layers, worth_compiling
from anytoken.utils.atomic import FolderKind, check_target, write_folder
from anytoken.utils.errors import ConfigError
from anytoken.utils.hints import choices, nearest

MINI = Path(__file__).parent.parent / "pretrained" / "mini"
SHORT = 512  # ids; up to here eager attention in bf16 trains faster on a CPU than sdpa, whose backward pass is slow
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # what the matrix products of a precision compute in


def build_processor(folders: Mapping[str, str]) -> Processor:
    """Assemble a processor from folders {"text": ..., "image": ..., ...}; ids follow that order."""
    missing = [f"{kind}: {folder}" for kind, folder in folders.items() if not Path(folder).is_dir()]
    if missing or "text" not in folders:
        raise ConfigError(
            f"tokenizers need existing folders, with text among them; missing {missing or 'text'}"
        )
    text = TextTokenizer.from_pretrained(folders["text"])
    tokenizers = {kind: load_tokenizer(folder) for kind, folder in folders.items() if kind != "text"}
    space = TokenSpace(text.vocab_size, text_ranges=text.ranges)
    for kind, tokenizer in tokenizers.items():
        space.append_modality(kind, tokenizer.codebook_sizes, tokenizer.shape, tokenizer.global_codebook_size)
    return Processor(space, text, tokenizers)


def checkpoint_folder(init_from: str) -> Path:
    """The folder that ``init_from`` names; ConfigError if it holds no checkpoint."""
    folder = MINI if init_from == "mini" else Path(init_from)
    if not (folder / "token_space.json").is_file():
        beside = folder.parent.glob(f"*/{SPACE_FILE}") if folder.parent.is_dir() else ()
        known = ["mini", "scratch", *(str(path.parent) for path in beside)]
        raise ConfigError(
            f"init_from {init_from!r} is not a checkpoint folder (no token_space.json){nearest(init_from, known)}"
        )
    return folder


def build_init_checkpoint(stage: TrainConfig) -> None:
    """Create the checkpoint of a recipe's ``backbone`` if it is missing; one process calls this while others wait.

    ConfigError if the folder holds something else.
    """
    folder = Path(stage.init_from)
    if stage.backbone is None or (folder / SPACE_FILE).is_file():
        return
    start = FolderKind("checkpoint", SPACE_FILE, (), ConfigError)
    check_target(folder, start)
    codecs = stage.backbone.codecs
    tokenizers = {
        kind: pretrained_tokenizer(one.source, kind, **one.settings) for kind, one in codecs.items()
    }
    lm, processor = adopt_backbone(stage.backbone.model, tokenizers)
    with write_folder(folder, start) as scratch:
        lm.save_pretrained(scratch)
        processor.save_pretrained(scratch)


def build_model(stage: TrainConfig) -> tuple[Processor, PreTrainedModel]:
    """The processor and the model (float32) a stage starts from."""
    processor, model = _model_before(stage)
    if stage.first_frames is not None:
        processor = Processor(
            processor.token_space, processor.text_tokenizer, processor.tokenizers, stage.first_frames
        )
    return processor, model


def _model_before(stage: TrainConfig) -> tuple[Processor, PreTrainedModel]:
    if stage.init_from != "scratch":
        folder = checkpoint_folder(stage.init_from)
        processor = Processor.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for name, tokenizer in stage.replace_tokenizers.items():
            processor = replace_modality(
                model, processor, _tokenizer(tokenizer, f"replace_tokenizers.{name}", name)
            )
        for name, tokenizer in stage.modalities.items():
            processor = add_modality(model, processor, _tokenizer(tokenizer, f"modalities.{name}", name))
        return processor, model
    default = AnyTokenConfig()
    unknown = [key for key in stage.model if not hasattr(default, key)]
    if unknown:
        raise ConfigError(
            f"model.{unknown[0]} is not a setting of AnyTokenConfig{choices(unknown[0], sorted(default.to_dict()))}"
        )
    processor = build_processor(stage.tokenizers)
    space = processor.token_space
    config = AnyTokenConfig.from_token_space(space, **stage.model)
    torch.manual_seed(stage.seed)
    model = AnyTokenForCausalLM(config)
    initialise_code_rows(model, processor)
    return processor, model


def _tokenizer(folder: str, key: str, name: str) -> ModalityTokenizer:
    tokenizer = load_tokenizer(folder)
    if tokenizer.name != name:
        raise ConfigError(f"{key}: {folder} holds a tokenizer of {tokenizer.name}")
    return tokenizer


def make_trainable(model: PreTrainedModel, stage: TrainConfig, processor: Processor) -> LanguageModel:
    """The model with the trained parameters unfrozen, or with an adapter."""
    lm: LanguageModel = model
    if stage.moe.expert_bias_rate:
        if not isinstance(model, AnyTokenForCausalLM) or not model.has_experts:
            raise ConfigError(
                f"moe.expert_bias_rate has no effect on {type(model).__name__} without experts; set it to 0"
            )
        model.add_expert_bias()
    if stage.lora is not None:
        lm = add_lora(model, stage.lora, processor.token_space, stage.init_from)
    else:
        select_trainable(model, stage.trainable, processor.token_space)
    if stage.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if worth_compiling(stage.compile, stage.steps, model.device):
        compile_layers(model)
    return lm


def choose_attention(model: PreTrainedModel, stage: TrainConfig, device: torch.device) -> None:
    """Switch a model to the recipe's attention implementation; ConfigError if it cannot train here."""
    if stage.attention == "flex_attention" and device.type == "cpu":
        raise ConfigError("attention: flex_attention has no backward pass on a CPU; take auto or sdpa")
    wanted = stage.attention
    short = stage.context <= SHORT and DTYPES[stage.precision] == torch.bfloat16
    if wanted == "auto" and device.type == "cpu" and short and isinstance(model, AnyTokenForCausalLM):
        wanted = "eager"
    try:
        use_attention(model, wanted, device, DTYPES[stage.precision])
    except ConfigError as error:
        raise ConfigError(f"attention with precision {stage.precision}: {error}") from error
