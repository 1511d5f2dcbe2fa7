"""Commands that make a model of other models: init, export, merge."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from anytoken.commands.options import ModelArgument, Out, load

app = typer.Typer()


@app.command()
def init(
    backbone: Annotated[
        str, typer.Option(help="A causal language model: a folder, a hub id, or a .gguf file.")
    ],
    tokenizers: Annotated[
        list[Path],
        typer.Option(help="A tokenizer folder, or a folder of them such as a checkpoint's; repeatable."),
    ],
    out: Out,
    upcycle: Annotated[
        int, typer.Option(min=0, help="Make so many experts of every dense layer; 0: none.")
    ] = 0,
    top_k: Annotated[int, typer.Option(min=1, help="Experts a token passes, with --upcycle.")] = 2,
) -> None:
    """Give any language model the ids of other modalities: its text stays as it is until it is trained."""
    from anytoken.data.shards import load_tokenizers
    from anytoken.inference.api import AnyToken
    from anytoken.inference.checkpoint import check_target
    from anytoken.model.upcycle import adopt_backbone
    from anytoken.tokenizers.base import ModalityTokenizer, load_tokenizer

    check_target(out, "token_space.json")
    found: dict[str, ModalityTokenizer] = {}
    for folder in tokenizers:
        one = (folder / "config.json").is_file()
        found |= {load.name: load for load in [load_tokenizer(folder)]} if one else load_tokenizers(folder)
    print(AnyToken(*adopt_backbone(backbone, found, upcycle, top_k)).save_pretrained(out))


class Target(StrEnum):
    """What a model can be exported to."""

    qwen3_moe = "qwen3_moe"


@app.command()
def export(
    checkpoint: ModelArgument,
    out: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to write.")],
    to: Annotated[
        Target, typer.Option(help="qwen3_moe: a stock Qwen3-MoE, for vLLM, SGLang and transformers.")
    ],
) -> None:
    """Write a model as serving engines know it, with a tokenizer whose ids are the model's (docs/serving.md)."""
    from transformers.utils import logging

    from anytoken.inference.checkpoint import check_folder, check_target, find_checkpoint, replacing
    from anytoken.model.export import export_qwen3_moe

    logging.disable_progress_bar()
    folder = find_checkpoint(checkpoint)
    check_folder(folder)
    check_target(out, "token_space.json")
    with replacing(out) as scratch:
        export_qwen3_moe(folder, scratch)
    print(out)


@app.command()
def merge(
    one: ModelArgument,
    other: ModelArgument,
    out: Out,
    weights: Annotated[tuple[float, float], typer.Option(help="Shares of the two; they add up to 1.")] = (
        0.5,
        0.5,
    ),
) -> None:
    """Average the weights of two fine-tunes of one model: the merge often does what each of them learnt."""
    from transformers import AutoConfig

    from anytoken.inference.checkpoint import check_target, find_checkpoint
    from anytoken.model.merge import check_mergeable, merge_weights

    check_target(out, "token_space.json")
    models = [load(name, "cpu") for name in (one, other)]
    check_mergeable([(model.lm, model.processor) for model in models])
    merged = models[0]
    merge_weights([model.lm for model in models], weights)
    merged.lm.to(AutoConfig.from_pretrained(find_checkpoint(one)).dtype)  # on a CPU it was opened in float32
    merged.card = None  # it tells of one of them alone
    print(merged.save_pretrained(out))
