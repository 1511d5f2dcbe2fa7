"""The recipes of tokenizers; `trainer.py` runs them."""

import json
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator

from anytoken import moved
from anytoken.tokenizers.base import BUILTIN, ModalityTokenizer, TokenizerError
from anytoken.training.settings import Recipe, Settings
from anytoken.utils.atomic import write_file
from anytoken.utils.device import device_name


class TokenizerRecipe(Recipe):
    """How a tokenizer is trained; an unknown key is an error."""

    error: ClassVar = TokenizerError
    old_keys: ClassVar = moved.TOKENIZER_RECIPE_KEYS

    kind: str
    code: str = Field(
        "", description="a .py file next to the recipe with the modality's class; training runs it"
    )
    config: dict[str, Any] = Field(default_factory=dict, description="settings of its class")
    init_from: str = Field(
        "", description="a tokenizer folder to start from; its config must be the same or compatible"
    )
    init_parts: dict[str, str] = Field(
        default_factory=dict,
        description="beginning of the names of weights: the tokenizer folder to take these from",
    )
    reinit_prefixes: list[str] = Field(
        default_factory=list, description="beginnings of the names of weights that init_from is not asked for"
    )
    freeze: list[str] = Field(
        default_factory=list,
        description="beginnings of the names of weights that are not trained; codebooks among them keep their averages",
    )
    data: str = ""
    pairs: list[str] = Field(
        default_factory=list,
        description="JSON lines of recordings with text and voice, under the folder of the sets: three of four batches "
        "hold texts by two voices, for the loss terms spelling and agreement of speech",
    )
    loss: dict[str, float] = Field(
        default_factory=dict, description="weights of its terms, where a kind has them"
    )
    steps: int = Field(2000, ge=1)
    batch_size: int = Field(32, ge=1)
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    warmup_steps: int = Field(100, ge=0)
    seed: int = 0
    threads: int = Field(2, ge=1)
    device: str = Field("auto", description="auto: a GPU where there is one; or cpu, cuda, cuda:1")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the products; weights are float32")
    compile: bool = Field(
        False,
        description="compile the trunks: a minute's wait, then faster where a GPU waits for its next kernel",
    )
    save_every: int = Field(500, ge=1)
    log_every: int = Field(50, ge=1)

    @field_validator("config")
    @classmethod
    def _current_settings(cls, config: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        return moved.current_settings(config) if info.data.get("kind") in BUILTIN else config


class CorpusSpec(Settings):
    """A file that a text tokenizer learns from."""

    file: str = Field(description=".jsonl or .json, under the folder of the sets or else among the recipes")
    fields: list[str] = Field(description="whose strings, or lists of strings, are read")
    weight: int = Field(1, ge=1, description="how often each counts")


class TextRecipe(Recipe):
    """How a text tokenizer is trained."""

    error: ClassVar = TokenizerError

    kind: Literal["text"] = "text"
    vocab_size: int
    corpus: list[CorpusSpec] = Field(default_factory=list)
    texts: list[str] = Field(default_factory=list, description="strings given in place")
    texts_weight: int = Field(1, ge=0, description="how often each of `texts` counts")
    always: list[str] = Field(default_factory=list, description="strings that are one id each")


def write_report(
    out: Path,
    plan: TokenizerRecipe,
    tokenizer: ModalityTokenizer,
    steps: int,
    seconds: float,
    last: dict[str, float],
    **more: Any,
) -> None:
    """Write training.json: the recipe, results and environment of a tokenizer's training."""
    report = {
        "recipe": plan.model_dump(), "steps": steps, "seconds": round(seconds, 1), "last": last,
        "parameters": sum(p.numel() for p in tokenizer.parameters()), **more,
        "threads": plan.threads, "machine": device_name(tokenizer.device), "torch": torch.__version__,
    }  # fmt: skip
    write_file(out / "training.json", json.dumps(report, indent=2) + "\n")
