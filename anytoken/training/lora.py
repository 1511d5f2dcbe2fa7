"""LoRA adapters (arXiv 2106.09685) through PEFT: attention, experts, router, whole vocabulary rows.

Experts are three-dimensional parameters, so they are adapted by name (``target_parameters``); new vocabulary
rows are trained in full through ``trainable_token_indices``, which stays small and keeps a tied head tied.
"""

from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from anytoken.token_space import TokenSpace
from anytoken.training.config import LoraSpec
from anytoken.training.optim.param_groups import modality_rows
from anytoken.utils.errors import ConfigError

LanguageModel = PreTrainedModel | PeftModel
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ROUTER = "mlp.gate.weight"
# PEFT would add the whole embedding of a model that has grown; the new rows that are trained are in the adapter.
SAVE_ADAPTER = {"save_embedding_layers": False}


def lora_config(spec: LoraSpec, model: PreTrainedModel, space: TokenSpace) -> LoraConfig:
    """The PEFT configuration of a ``lora`` section; ConfigError for settings that PEFT cannot combine."""
    names = [name for name, _ in model.named_parameters()]
    parameters = [*(EXPERTS if spec.experts else []), *([ROUTER] if spec.router else [])]
    parameters = [target for target in parameters if any(name.endswith(target) for name in names)]
    if parameters and spec.dropout:
        raise ConfigError(
            "lora.dropout cannot be combined with experts or router; set it to 0 or both to false"
        )
    if not (spec.attention or parameters):
        raise ConfigError(
            "lora trains nothing; enable attention, experts or router. New rows alone are trained without lora: "
            "trainable: ['rows:NAME']"
        )
    rows = modality_rows(space, spec.new_rows)
    tied = model.config.tie_word_embeddings
    if spec.dora and parameters:
        raise ConfigError(
            "PEFT has no DoRA for experts and router; set lora.experts and lora.router to false"
        )
    return LoraConfig(
        r=spec.r,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        use_rslora=spec.rslora,
        use_dora=spec.dora,
        target_modules=ATTENTION if spec.attention else [],
        target_parameters=parameters or None,
        trainable_token_indices=(rows if tied else {"embed_tokens": rows, "lm_head": rows}) if rows else None,
        task_type="CAUSAL_LM",
    )


def add_lora(model: PreTrainedModel, spec: LoraSpec, space: TokenSpace, base: str | None = None) -> PeftModel:
    """Wrap a model in an adapter, new or with the weights of ``spec.start``; only the adapter is trainable.

    base: the model's name in the adapter's configuration, where PEFT would write a local path.
    """
    adapted = get_peft_model(model, lora_config(spec, model, space))
    if base is not None:
        adapted.peft_config["default"].base_model_name_or_path = portable_name(base)
    if spec.start is not None:
        load_weights(adapted, Path(spec.start))
    return adapted


def portable_name(path: str) -> str:
    """A portable name of a model: a bundled name, a relative path, or the last part of any other path."""
    return Path(path).name if Path(path).is_absolute() or ".." in Path(path).parts else path


def load_weights(adapted: PeftModel, folder: Path) -> None:
    """Load the weights of a saved adapter; ConfigError if it has other settings."""
    if not (folder / "adapter_model.safetensors").is_file():
        raise ConfigError(f"{folder} is not an adapter folder (no adapter_model.safetensors)")
    saved, wanted = (
        load_file(folder / "adapter_model.safetensors"),
        get_peft_model_state_dict(adapted, **SAVE_ADAPTER),
    )
    given, own = ({name: tuple(one.shape) for name, one in state.items()} for state in (saved, wanted))
    if given != own:
        odd = sorted(name for name in {*given, *own} if given.get(name) != own.get(name))
        raise ConfigError(
            f"the adapter {folder} has other lora settings: {odd[0]} and {len(odd) - 1} more differ"
        )
    set_peft_model_state_dict(adapted, saved)


def base_model(model: nn.Module) -> PreTrainedModel:
    """The causal LM itself, adapted in place if it is wrapped."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, PreTrainedModel)
    return base


def head_weight(model: PreTrainedModel) -> Tensor:
    """The rows of the output head [V, D], with trained vocabulary rows in place."""
    head = model.get_output_embeddings()
    adapter = getattr(head, "token_adapter", None)
    return head.weight if adapter is None else adapter.get_merged_weights(adapter.active_adapters)
