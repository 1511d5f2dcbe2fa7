"""Export to stock Qwen3-MoE: a folder that serving engines load without our code.

With our additions off, the model is a Qwen3-MoE (arXiv 2505.09388) weight for weight. The folder holds that model
under its standard per-expert names, a tokenizer that AutoTokenizer opens and whose ids are the token space's, and the
parts that turn ids into media again (`Processor.from_pretrained`): ids go in, ids come out, codes are decoded
outside. docs/serving.md says how.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from anytoken.model.configuration import AnyTokenConfig
from anytoken.processor import Processor
from anytoken.token_space import TokenSpace
from anytoken.utils.errors import CheckpointError

# Ours, and without a say in the logits: they act in training, or tell expert groups (which block the export) apart.
NO_EFFECT = {
    "code_layout", "modality_boundaries", "modality_index", "modality_names", "output_z_loss_coef",
    "router_jitter_noise", "router_modality_aux_loss_coef", "router_z_loss_coef",
}  # fmt: skip
# The sequence format of `Processor.encode_chat`, for texts; media go in as ids.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] != 'text' %}{{ raise_exception('Media go in as token ids: see docs/serving.md.') }}{% endif %}"
    "{{ part['text'] }}{% endfor %}{% endif %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# Where a reply begins and ends in the decoded text: `transformers serve` would look for Qwen's own marks otherwise.
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>",
    "fields": {"content": {"close": "<|end|>", "content": "text"}},
}


def export_qwen3_moe(checkpoint: Path, out: Path) -> None:
    """Write the model of a checkpoint folder to the empty folder `out` as a stock Qwen3-MoE, in its stored dtype.

    CheckpointError names the settings that Qwen3-MoE lacks, before any weight is read.
    """
    config = plain_config(AutoConfig.from_pretrained(checkpoint))
    processor = Processor.from_pretrained(checkpoint)
    tokenizer = serving_tokenizer(checkpoint, processor.token_space)
    lm = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    stock_model(lm, config).save_pretrained(out)
    tokenizer.save_pretrained(out)
    _name_for_older_readers(out, config)
    processor.save_pretrained(out)
    for name in ("sampling.json", "chains.json", "best_of.json", "README.md"):
        if (checkpoint / name).is_file():
            shutil.copy(checkpoint / name, out)


def plain_config(config: AnyTokenConfig) -> Qwen3MoeConfig:
    """The settings as a Qwen3-MoE configuration; CheckpointError if a setting that it lacks is on."""
    if not isinstance(config, AnyTokenConfig):
        raise CheckpointError(
            f"The checkpoint holds a {config.model_type} model, which engines load as it is; "
            "only model type anytoken is exported."
        )
    default = AnyTokenConfig()
    ours = {field.name for field in fields(AnyTokenConfig)} - {field.name for field in fields(Qwen3MoeConfig)}
    ours -= {"head_dim"}  # Qwen3-MoE reads it without declaring it
    on = {name: value for name in sorted(ours - NO_EFFECT) if (value := getattr(config, name))}
    blocking = [f"{name}={value!r}" for name, value in on.items() if value != getattr(default, name)]
    if blocking:
        way = "Serve this one with vLLM and the plugin that comes with anytoken"
        if config.grid_positions:  # the embeddings depend on all earlier ids
            way = "No other engine can carry grid positions: serve this one with anytoken serve, or train without them"
        raise CheckpointError(
            f"Qwen3-MoE has no {', '.join(blocking)}; it can express a model with these at their defaults "
            f"only. {way}: see docs/serving.md."
        )
    drop = ours | {"model_type", "architectures", "transformers_version"}
    return Qwen3MoeConfig(**{key: value for key, value in config.to_dict().items() if key not in drop})


def stock_model(lm: PreTrainedModel, config: Qwen3MoeConfig) -> Qwen3MoeForCausalLM:
    """A Qwen3MoeForCausalLM that shares the weights of `lm`."""
    with torch.device("meta"):
        stock = Qwen3MoeForCausalLM(config)
    stock.load_state_dict(lm.state_dict(), assign=True)
    stock.tie_weights()
    stock.generation_config = lm.generation_config
    return stock


def serving_tokenizer(checkpoint: Path, space: TokenSpace) -> PreTrainedTokenizerFast:
    """The text tokenizer with every other id as a special token named by `serving_name`; ids are the space's.

    Text that contains such a name is read as that id, as with any model's special tokens: send ids where users
    write the text. CheckpointError if the ids of text and the token space do not meet.
    """
    bpe = Tokenizer.from_file(str(checkpoint / "text_tokenizer" / "tokenizer.json"))
    first = bpe.get_vocab_size()
    names = [serving_name(space, token) for token in range(first, space.vocab_size)]
    bpe.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    clash = [name for token, name in enumerate(names, first) if bpe.token_to_id(name) != token]
    if clash:
        raise CheckpointError(
            f"The text tokenizer of {checkpoint} has a {clash[0]} of its own, so the ids after it would move; "
            "there is no way to export it under these names."
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=serving_name(space, space.bos),
        eos_token=serving_name(space, space.end),
        pad_token=serving_name(space, space.pad),
        chat_template=CHAT_TEMPLATE,
        response_template=RESPONSE_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def serving_name(space: TokenSpace, token: int) -> str:
    """The name of an id that is not text: <|bos|>, <|size:8|>, <|image|>, <|image:17|>, <|tone[1]:3|>.

    Ids that a foreign language model keeps free after its text are <|text:151700|> and the like.
    """
    known = space.token_name(token)
    return known if known.startswith("<|") else f"<|{known}|>"


def _name_for_older_readers(out: Path, config: Qwen3MoeConfig) -> None:
    """Add the names of transformers 4, since engines pin either version."""
    for file, more in {
        "config.json": {
            "num_experts": config.num_experts,
            "rope_theta": config.rope_parameters["rope_theta"],
        },
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
    }.items():
        path = out / file
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | more, indent=2) + "\n")
