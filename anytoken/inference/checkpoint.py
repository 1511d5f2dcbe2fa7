"""Checkpoint folders: find, check, load and save them.

A folder holds config.json, model.safetensors, token_space.json, text_tokenizer/, tokenizers/<kind>/ and
sampling.json. A truncated weights file is detected from its header before anything is loaded, so the error names the
file and the fix. Weights are safetensors only; nothing is unpickled, and only `anytoken.load_modality` runs the code of
a plug-in modality.
"""

import json
import logging
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

import anytoken.model  # noqa: F401  (registers the architecture with the Auto classes)
from anytoken.inference.best_of import FILE as BEST_OF
from anytoken.inference.chains import FILE as CHAINS
from anytoken.model.attention import use_attention
from anytoken.model.embedding_head import FILE as EMBEDDING
from anytoken.model.embedding_head import has_head
from anytoken.model.extend_vocab import add_saved_modalities
from anytoken.model.quantize import quantize_weights
from anytoken.processor import PROMPTS, Processor
from anytoken.tokenizers.base import TokenizerError
from anytoken.utils.atomic import FolderKind
from anytoken.utils.device import usable_device
from anytoken.utils.errors import CheckpointError
from anytoken.utils.hints import nearest

ADAPTER_CONFIG = "adapter_config.json"
PRETRAINED = Path(__file__).parent.parent / "pretrained"
REQUIRED = ("config.json", "token_space.json", "text_tokenizer/tokenizer.json", "sampling.json")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
log = logging.getLogger(__name__)


CHECKPOINT = FolderKind(
    "checkpoint",
    "token_space.json",
    (
        "config.json", "generation_config.json", "model.safetensors", "model-*-of-*.safetensors",
        "model.safetensors.index.json", "token_space.json", "fingerprints.json", "sampling.json", PROMPTS, CHAINS,
        BEST_OF, EMBEDDING,
        "text_tokenizer/tokenizer.json", "tokenizers/*/config.json", "tokenizers/*/model.safetensors",
        "tokenizers/*/*.py",
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",  # an export's
    ),
    CheckpointError,
)  # fmt: skip


def find_checkpoint(name_or_path: str | Path) -> Path:
    """The folder behind a bundled name, a local folder or a hub id; CheckpointError if there is none.

    A bundled name takes precedence; write ./mini for a local folder of that name.
    """
    name = os.path.expanduser(name_or_path)
    if name.isidentifier() and (PRETRAINED / name / "config.json").is_file():
        return PRETRAINED / name
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists():
        raise CheckpointError(f"{name} is a file; give the folder of the checkpoint.")
    known = sorted(path.parent.name for path in PRETRAINED.glob("*/config.json"))
    bundled = ", ".join(known) or "none"
    if _names_a_path(name):
        folders = [str(path.parent) for path in Path(name).parent.glob("*/config.json")]
        hint = nearest(name, folders) or f"; give one that exists, or a bundled name ({bundled})"
        raise CheckpointError(f"There is no folder {name}{hint}.")
    if not HUB_ID.fullmatch(name):
        raise CheckpointError(
            f"No checkpoint {name!r}{nearest(name, known)}: give a bundled name ({bundled}), a local folder, "
            "or a hub id like owner/name."
        )
    from huggingface_hub import snapshot_download  # only who asks for a hub id needs it
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.md", "*.py"]))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise CheckpointError(
            f"There is no folder {name} and no bundled name like it ({bundled}), and the hub did not give a model "
            f"of that id ({type(error).__name__}). Without a network, pass the path of a downloaded folder."
        ) from error


def _names_a_path(name: str) -> bool:
    """Whether a missing name is meant as a folder: then the hub, which may take minutes, is not queried."""
    parent = Path(name).parent
    return os.sep in name and (not HUB_ID.fullmatch(name) or parent.is_dir())


def check_folder(folder: Path) -> None:
    """CheckpointError naming the first file of the model that is missing, truncated or not JSON.

    Files of tokenizers are checked when they are loaded; other files are ignored.
    """
    for name in REQUIRED:
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder / name} is missing: {folder} is not a complete checkpoint; copy it again."
            )
    for path in (folder / name for name in CHECKPOINT.own_files(folder)):
        if path.suffix != ".json" or path.parent.parent.name == "tokenizers":
            continue
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{path} is damaged ({error}); copy the checkpoint again.") from error
    for path in _weight_files(folder):
        _check_safetensors(path)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [folder / "model.safetensors"]
    try:
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} is not an index of weights ({error!r}); copy the checkpoint again."
        ) from error


def _check_safetensors(path: Path) -> None:
    """Compare a file's length with its header."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the checkpoint is incomplete; copy it again.")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length)) if 0 < length <= size - 8 else None
            ends = [
                int(entry["data_offsets"][1])
                for key, entry in (header or {}).items()
                if key != "__metadata__"
            ]
        except (ValueError, LookupError, TypeError, AttributeError):
            header, ends = None, []
    expected = None if header is None else 8 + length + max(ends, default=0)
    if expected != size:
        promise = "a readable header" if expected is None else f"{expected:,} bytes"
        raise CheckpointError(
            f"{path} is truncated or damaged: {size:,} bytes, expected {promise}; copy it again."
        )


def is_bare_head(folder: str | Path) -> bool:
    """Whether an adapter folder is an embedding head alone, with no weights of an adapter."""
    return has_head(folder) and not (Path(folder) / ADAPTER_CONFIG).is_file()


def pick_device(device: str | torch.device) -> torch.device:
    """The device to run on; "auto" uses CUDA if available. CheckpointError for an unusable name."""
    try:
        return usable_device(device)
    except TokenizerError as error:
        raise CheckpointError(str(error)) from error


def load_folder(
    folder: Path,
    device: torch.device,
    adapter: str | Path | None = None,
    quantize: str | None = None,
    attention: str = "auto",
) -> tuple[PreTrainedModel, Processor]:
    """The language model of a folder, optionally with an adapter merged or weights quantized, and its processor.

    Both are on the device; attention is one of the choices of `model/attention.py`. Weights are float32 on a CPU, where
    bfloat16 is many times slower, and as stored elsewhere.
    """
    check_folder(folder)
    processor = Processor.from_pretrained(folder)
    lm, info = _load_lm(folder, torch.float32 if device.type == "cpu" else "auto")
    lost = sorted(set(info["missing_keys"]) | {str(key) for key in info["mismatched_keys"]})
    if lost:
        raise CheckpointError(f"{folder} lacks weights for {lost[0]} ({len(lost)} in all); copy it again.")
    if info["unexpected_keys"]:
        raise CheckpointError(
            f"{folder / 'config.json'} has no place for the weights {min(info['unexpected_keys'])} "
            f"({len(info['unexpected_keys'])} in all); the files are of different checkpoints."
        )
    if lm.config.vocab_size < processor.token_space.vocab_size:
        raise CheckpointError(
            f"{folder / 'token_space.json'} has {processor.token_space.vocab_size} ids, "
            f"but the model only {lm.config.vocab_size}; the files are of different checkpoints."
        )
    if adapter is not None and not is_bare_head(adapter):
        processor = add_saved_modalities(lm, processor, Path(adapter))
        lm = merge_adapter(lm, Path(adapter))
    if device.type == "cpu" and lm._can_set_experts_implementation():
        lm.set_experts_implementation("eager")  # grouped products cost 40 ms a token on a CPU, a loop 3
    if quantize is not None:
        quantize_weights(lm, quantize)
    for tokenizer in processor.tokenizers.values():
        tokenizer.to(device)
    use_attention(lm, attention, device, lm.dtype)
    return lm.eval().to(device), processor


def _load_lm(folder: Path, dtype: torch.dtype | str) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model and transformers' loading report, which the caller checks."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except Exception as error:  # a damaged config.json raises nearly anything, down to a division by zero
        said = " ".join(str(error).split())
        raise CheckpointError(
            f"{folder} does not load as a language model: {type(error).__name__}: {said} "
            "Its config.json and weights are damaged or of different checkpoints; copy it again."
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def merge_adapter(lm: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Load a PEFT adapter and merge it into the weights of `lm`, so that generation is as fast as without it.

    A tied head stays tied only if the adapter leaves both tables equal. CheckpointError says what does not fit; `lm`
    must then be discarded.
    """
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict  # a second to import

    for name in (ADAPTER_CONFIG, "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing: {folder} is not an adapter folder.")
    _check_safetensors(folder / "adapter_model.safetensors")
    try:
        weights = load_file(folder / "adapter_model.safetensors")
        config = PeftConfig.from_pretrained(str(folder))
        made_for = config.base_model_name_or_path or "an unnamed model"
        with warnings.catch_warnings():  # of tied weights, which are seen to below
            warnings.simplefilter("ignore")
            adapted = get_peft_model(lm, config)
            misfit = _adapter_misfit(adapted, weights)
            if misfit:
                raise CheckpointError(
                    f"The adapter {folder} was made for another model ({made_for}): {misfit}."
                )
            set_peft_model_state_dict(adapted, weights)
            _untie_adapted_tables(lm)
            merged = adapted.merge_and_unload()
    except CheckpointError:
        raise
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"The adapter {folder} does not fit this model: {error}") from error
    vars(merged).pop("peft_config", None)  # left over: with it the model would pass for an adapted one
    merged.all_tied_weights_keys = merged.get_expanded_tied_weights_keys(all_submodels=True)
    return merged


def _adapter_misfit(adapted: Any, weights: Mapping[str, Tensor]) -> str:
    """The first weight of a saved adapter that the adapted model has no place for, or lacks; "" if all fit."""
    from peft import get_peft_model_state_dict

    own = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    known = adapted.state_dict() | own  # a saved adapter may hold the embedding and the head as well
    for name in sorted({*own, *weights}):
        there, here = (tuple(one[name].shape) if name in one else None for one in (weights, known))
        if there != here:
            words = ["absent" if shape is None else str(list(shape)) for shape in (there, here)]
            return f"{name} is {words[0]} in the adapter and {words[1]} in this model"
    return ""


def _untie_adapted_tables(lm: PreTrainedModel) -> None:
    """Untie the head if an adapter changes only one of two tied tables: merging would change both."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [lm.get_input_embeddings(), lm.get_output_embeddings()]
    if not any(isinstance(layer, BaseTunerLayer) for layer in layers):
        return
    first, head = (one.get_base_layer() if isinstance(one, BaseTunerLayer) else one for one in layers)
    if first.weight is head.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
