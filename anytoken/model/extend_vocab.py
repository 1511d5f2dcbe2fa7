"""Add a modality to a trained model: new ids after the old ones, rows from the codebook, old ids unchanged.

Or replace the tokenizer of a modality: its codes are reinitialized, all other rows are unchanged.
"""

import copy
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from anytoken.grammar_tables import longest, segment_length
from anytoken.model.embedding_init import appended_rows, replaced_rows
from anytoken.model.grid_positions import code_layout
from anytoken.processor import Processor
from anytoken.token_space import TokenSpace
from anytoken.tokenizers.base import ModalityTokenizer, load_tokenizer
from anytoken.utils.errors import CheckpointError

SAVED = "modalities.json"  # next to an adapter: {"palette": first id}


def add_modality(lm: PreTrainedModel, processor: Processor, tokenizer: ModalityTokenizer) -> Processor:
    """Extend the model's vocabulary in place; returns a new processor with the modality.

    ValueError, before anything is changed, if the modality exists or has no experts to route to.
    """
    if not isinstance(tokenizer, ModalityTokenizer):
        raise CheckpointError(f"A modality is added by its ModalityTokenizer; received {tokenizer!r:.80}.")
    _check_experts(lm, tokenizer.name)
    space = copy.deepcopy(processor.token_space)
    first = space.vocab_size
    space.append_modality(
        tokenizer.name, tokenizer.codebook_sizes, tokenizer.shape, tokenizer.global_codebook_size
    )
    _write_rows(lm, first, appended_rows(lm, space, {tokenizer.name: tokenizer}, first))
    return _grown(lm, processor, space, tokenizer)


def replace_modality(lm: PreTrainedModel, processor: Processor, tokenizer: ModalityTokenizer) -> Processor:
    """Replace the tokenizer of a modality in place; returns a new processor.

    Modalities keep their order and all other rows their values, but later ids move if the number of codes changes:
    shards and adapters of the old model do not fit the new one. The new codes are meaningless until they are trained.
    CheckpointError, before anything is changed, if the model has no such modality.
    """
    name, old = tokenizer.name, processor.token_space
    if name not in processor.tokenizers:
        raise CheckpointError(
            f"The model has no {name} to replace; it has {', '.join(processor.tokenizers)}. Add it instead."
        )
    tokenizers = {**processor.tokenizers, name: tokenizer}
    space = TokenSpace(old.text_size, old.max_size_token, old.text_ranges)
    for kind in old.modalities:
        one = tokenizers[kind]
        space.append_modality(kind, one.codebook_sizes, one.shape, one.global_codebook_size)
    layers = (lm.get_input_embeddings(), lm.get_output_embeddings())
    tables = [replaced_rows(layer.weight, old, space, name, tokenizer) for layer in layers]
    lm.resize_token_embeddings(space.vocab_size, mean_resizing=False)
    if hasattr(lm.base_model, "vocab_size"):
        lm.base_model.vocab_size = space.vocab_size
    for layer, rows in zip((lm.get_input_embeddings(), lm.get_output_embeddings()), tables, strict=True):
        with torch.no_grad():
            layer.weight.copy_(rows)
    return _grown(lm, processor, space, tokenizer)


def _grown(
    lm: PreTrainedModel, processor: Processor, space: TokenSpace, tokenizer: ModalityTokenizer
) -> Processor:
    """The processor of a new space, which is entered in the model's configuration."""
    if hasattr(lm.config, "modality_boundaries"):
        lm.config.modality_boundaries = space.bucket_boundaries()
        lm.config.modality_index = space.bucket_modalities()
        lm.config.modality_names = space.modality_names
    if getattr(lm.config, "grid_positions", None):
        lm.config.code_layout = code_layout(space)
    tokenizers = {**processor.tokenizers, tokenizer.name: tokenizer}
    return Processor(space, processor.text_tokenizer, tokenizers, processor.first_frames)


def save_modalities(folder: Path, processor: Processor, names: Sequence[str]) -> None:
    """Save the tokenizers of modalities that the base model lacks next to an adapter's weights."""
    for name in names:
        processor.tokenizers[name].save_pretrained(folder / "tokenizers" / name)
    firsts = {name: processor.token_space.open_token(name) for name in names}
    (folder / SAVED).write_text(json.dumps(firsts, indent=1) + "\n", encoding="utf-8")


def add_saved_modalities(lm: PreTrainedModel, processor: Processor, folder: Path) -> Processor:
    """Extend a model by the modalities saved next to an adapter, if any; returns the processor.

    CheckpointError if the ids would not be those that the adapter was trained with.
    """
    path = folder / SAVED
    firsts: dict[str, int] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for name, first in firsts.items():
        grown = processor
        if name not in processor.tokenizers:
            if first != processor.token_space.vocab_size:
                raise CheckpointError(
                    f"The adapter {folder} was trained with {name} from id {first} on, but this model has "
                    f"{processor.token_space.vocab_size} ids: load it on the model it was trained on, before any "
                    "other modality is added."
                )
            grown = add_modality(lm, processor, load_tokenizer(folder / "tokenizers" / name))
        if grown.token_space.open_token(name) != first:
            raise CheckpointError(f"The adapter {folder} has {name} at other ids than this model.")
        processor = grown
    return processor


def _check_experts(lm: PreTrainedModel, name: str) -> None:
    """With expert groups the new ids route to the common group; which must have enough experts."""
    groups = getattr(lm.config, "expert_groups", None)
    if groups and groups.get("common", 0) < lm.config.num_experts_per_tok:
        raise CheckpointError(
            f"{name} would have no experts: the model's groups are {groups} and tokens take "
            f"{lm.config.num_experts_per_tok}; only a model with a common group that large can grow."
        )


@torch.no_grad()
def _write_rows(lm: PreTrainedModel, first: int, tables: tuple[Tensor, Tensor]) -> None:
    """Put rows [N, D] at ids first, first + 1, ... of the embedding and of the head; older rows are unchanged."""
    size = first + len(tables[0])
    if size > lm.config.get_text_config().vocab_size:
        grow = getattr(lm, "extend_vocabulary", None) or partial(
            lm.resize_token_embeddings, mean_resizing=False
        )
        grow(size)
    for layer, rows in zip((lm.get_input_embeddings(), lm.get_output_embeddings()), tables, strict=True):
        layer.weight[first:size] = rows.to(layer.weight)


def longest_segment(tokenizer: ModalityTokenizer) -> int:
    """The maximum number of ids of one segment of this kind, with open id, header and close id."""
    return segment_length(tokenizer.shape, longest(tokenizer.shape))
