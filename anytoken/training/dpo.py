"""A preference step after instruction tuning: DPO (arXiv 2305.18290) on pairs of answers in any modality.

The loop is that of `trl` (optional: ``anytoken[preference]``), on our ids. An adapter is trained, so the model without
it is the reference and no second copy is needed. A line of the pairs' JSONL holds the conversation so far and two
answers to it, in the chat convention; paths start at the file's folder:

    {"messages": [{"role": "user", "content": "Draw a fox."}],
     "chosen": [{"type": "image", "image": "a.png"}], "rejected": [{"type": "image", "image": "b.png"}]}
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from anytoken.data.forms import to_record
from anytoken.data.records import bad_record, media_parts, open_media, validate_message
from anytoken.processor import Processor
from anytoken.training.config import LoraSpec
from anytoken.training.initialize import checkpoint_folder
from anytoken.training.lora import lora_config
from anytoken.training.metrics import MetricsLog
from anytoken.utils.errors import ConfigError
from anytoken.utils.json_lines import load_json, numbered_lines

KEYS = ("messages", "chosen", "rejected")


@dataclass(frozen=True)
class DPOArgs:
    """How to train: `beta` holds the model to its reference, `batch` counts pairs."""

    steps: int = 100
    batch: int = 8
    lr: float = 1e-4
    beta: float = 0.1
    lora: LoraSpec = field(default_factory=LoraSpec)
    seed: int = 0


def prefer(init_from: str, pairs: Path, output: Path, spec: DPOArgs | None = None) -> Path:
    """Train an adapter on pairs and write it with ``metrics.jsonl``.

    ConfigError for pairs that do not fit, or where trl is not installed.
    """
    spec = spec or DPOArgs()
    try:
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer
    except ImportError as error:
        raise ConfigError(
            f"a preference step needs trl ({error}); pip install 'anytoken[preference]'"
        ) from error

    class IdsTrainer(DPOTrainer):
        """DPO on ids that are there already."""

        def _prepare_dataset(self, dataset: Any, *unused: Any) -> Any:
            return dataset

    folder = checkpoint_folder(init_from)
    processor = Processor.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    limit = model.config.max_position_embeddings
    arguments = DPOConfig(
        output_dir=str(output / "state"), max_steps=spec.steps, per_device_train_batch_size=spec.batch,
        learning_rate=spec.lr, beta=spec.beta, seed=spec.seed, max_length=limit, logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=False, use_cpu=not torch.cuda.is_available(),
        bf16=False, gradient_checkpointing=False, router_aux_loss_coef=0.0,
    )  # fmt: skip
    trainer = IdsTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(list(pair_ids(pairs, processor, limit))),
        processing_class=_padding(processor.token_space.pad),
        peft_config=lora_config(spec.lora, model, processor.token_space),
    )
    trainer.train()
    trainer.model.save_pretrained(str(output))
    log = MetricsLog(output / "metrics.jsonl")
    log.rewind(0)
    for entry in trainer.state.log_history:
        if "loss" in entry:
            log.write(entry)
    return output


def pair_ids(path: Path, processor: Processor, limit: int) -> Iterator[dict[str, list[int]]]:
    """Each line as the ids of its prompt and of its two answers; ConfigError names a line that does not fit."""
    if not path.is_file():
        raise ConfigError(
            f"{path} does not exist; give a .jsonl file with messages, chosen and rejected a line"
        )
    for number, line in numbered_lines(path):
        try:
            yield _pair(load_json(line), path.parent, processor, limit)
        except Exception as error:  # of media, as many kinds as there are libraries that decode
            raise ConfigError(f"{path} line {number}: {bad_record(error)}") from error


def _pair(pair: Any, root: Path, processor: Processor, limit: int) -> dict[str, list[int]]:
    if not isinstance(pair, dict) or not set(KEYS) <= set(pair):
        found = ", ".join(sorted(pair)) if isinstance(pair, dict) else type(pair).__name__
        raise ConfigError(f"a pair has the keys {', '.join(KEYS)}; received {found}")
    asked = _opened(pair["messages"], root, processor)
    prompt = processor.encode_chat(asked)
    found_ids = {"prompt_ids": prompt}
    for key in KEYS[1:]:
        answer = _opened([{"role": "assistant", "content": pair[key]}], root, processor)
        ids = processor.encode_chat([*asked, *answer], add_generation_prompt=False)
        if len(ids) > limit:
            raise ConfigError(f"{key} makes {len(ids)} ids; the model's context is {limit}")
        found_ids[key + "_ids"] = ids[len(prompt) :]
    if found_ids["chosen_ids"] == found_ids["rejected_ids"]:
        raise ConfigError("chosen and rejected are the same ids, so there is no preference; remove the pair")
    return found_ids


def _opened(messages: Any, root: Path, processor: Processor) -> list[dict[str, Any]]:
    """Messages of a record with their media opened: files are below the folder of the pairs, and nowhere else."""
    if not isinstance(messages, list) or not messages:
        raise ConfigError(f"messages must be a non-empty list, got {messages!r:.80}")
    record = to_record({"messages": messages})
    for message in record["messages"]:
        validate_message(message)
    media = {id(part): open_media(value, processor.kinds[kind], root)
             for kind, value, part in media_parts(record, processor.tokenizers)}  # fmt: skip
    return [
        {**message, "content": [media.get(id(part), part) for part in message["content"]]}
        if isinstance(message["content"], list)
        else message
        for message in record["messages"]
    ]


def _padding(pad: int) -> PreTrainedTokenizerFast:
    """What trl wants for a tokenizer and asks for the padding id alone."""
    words = Tokenizer(WordLevel({"<pad>": pad}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>")
