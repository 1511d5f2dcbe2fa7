"""Commands that build a model from other models: init, export, merge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from anytoken.commands.options import ModelArgument, Out, Overwrite, examples, load

app = typer.Typer()


@app.command(
    epilog=examples("anytoken init --backbone Qwen/Qwen3-0.6B --tokenizers runs/tokenizers --out runs/start")
)
def init(
    backbone: Annotated[
        str, typer.Option(help="Causal language model: a folder, a hub id, or a .gguf file.")
    ],
    tokenizers: Annotated[
        list[Path],
        typer.Option(help="A tokenizer folder, or a folder of them such as a checkpoint's; repeatable."),
    ],
    out: Out,
    upcycle: Annotated[
        int, typer.Option(min=0, help="Upcycle every dense layer into this many experts; 0 is off.")
    ] = 0,
    top_k: Annotated[int, typer.Option(min=1, help="Experts per token, with --upcycle.")] = 2,
    overwrite: Overwrite = False,
) -> None:
    """Extend a language model's vocabulary with modality tokens; its text outputs stay unchanged until training."""
    from anytoken.data.shards import load_tokenizers
    from anytoken.inference.api import AnyToken
    from anytoken.inference.checkpoint import CHECKPOINT
    from anytoken.model.backbone import adopt_backbone
    from anytoken.tokenizers.base import ModalityTokenizer, load_tokenizer
    from anytoken.utils.atomic import check_target

    check_target(out, CHECKPOINT, overwrite)
    found: dict[str, ModalityTokenizer] = {}
    for folder in tokenizers:
        one = (folder / "config.json").is_file()
        found |= {load.name: load for load in [load_tokenizer(folder)]} if one else load_tokenizers(folder)
    made = AnyToken(*adopt_backbone(backbone, found, upcycle, top_k))
    made.card = f"# {Path(backbone).name} with {', '.join(found)}\n\nThe new ids are untrained.\n"
    print(made.save_pretrained(out, overwrite=overwrite))


@app.command(epilog=examples("anytoken export mini out/qwen --to qwen3_moe"))
def export(
    checkpoint: ModelArgument,
    out: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to write.")],
    to: Annotated[
        Literal["qwen3_moe"],
        typer.Option(help="qwen3_moe: a stock Qwen3-MoE, for vLLM, SGLang and transformers."),
    ],
    overwrite: Overwrite = False,
) -> None:
    """Export a model and tokenizer in a format that serving engines load (docs/serving.md)."""
    from transformers.utils import logging

    from anytoken.inference.checkpoint import CHECKPOINT, check_folder, find_checkpoint
    from anytoken.model.export import export_qwen3_moe
    from anytoken.utils.atomic import check_target, write_folder

    logging.disable_progress_bar()
    folder = find_checkpoint(checkpoint)
    check_folder(folder)
    check_target(out, CHECKPOINT, overwrite)
    with write_folder(out, CHECKPOINT, overwrite) as scratch:
        export_qwen3_moe(folder, scratch)
    print(out)


@app.command(epilog=examples("anytoken push runs/4_instruct owner/name"))
def push(
    checkpoint: ModelArgument,
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="A hub repository; made if not there.")],
    private: Annotated[
        bool, typer.Option("--private", help="Visible to its owner only, if it is new.")
    ] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
) -> None:
    """Upload a checkpoint and its card to the Hugging Face hub (or the one that HF_ENDPOINT names)."""
    from anytoken.inference import hub

    print(hub.push(checkpoint, repo, private, message))


@app.command(epilog=examples("anytoken pull owner/name models/name"))
def pull(
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="A hub repository with a checkpoint.")],
    out: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to write.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Download a checkpoint from the hub into a folder; `-m OWNER/NAME` elsewhere uses the hub's cache instead."""
    from anytoken.inference import hub

    print(hub.pull(repo, out, revision, overwrite))


@app.command(epilog=examples("anytoken merge runs/a runs/b --weights 0.5 0.5 --out runs/ab"))
def merge(
    one: ModelArgument,
    other: ModelArgument,
    out: Out,
    weights: Annotated[
        tuple[float, float], typer.Option(help="Weights of the two models; they sum to 1.")
    ] = (0.5, 0.5),
    overwrite: Overwrite = False,
) -> None:
    """Average the weights of two fine-tunes of one model, to combine what they learned."""
    from transformers import AutoConfig

    from anytoken.inference.api import AnyToken
    from anytoken.inference.checkpoint import CHECKPOINT, find_checkpoint
    from anytoken.model.merge import check_mergeable, merge_weights
    from anytoken.utils.atomic import check_target

    check_target(out, CHECKPOINT, overwrite)
    models = [load(name, "cpu") for name in (one, other)]
    check_mergeable([(model.lm, model.processor) for model in models])
    lm = merge_weights([model.lm for model in models], weights)
    lm.to(AutoConfig.from_pretrained(find_checkpoint(one)).dtype)  # on a CPU it was opened in float32
    merged = AnyToken(lm, models[0].processor, models[0].sampling)
    names = " and ".join(Path(name).name for name in (one, other))
    merged.card = (
        f"# Merge of {names}\n\nWeights averaged with the shares {weights[0]:g} and {weights[1]:g}.\n"
    )
    print(merged.save_pretrained(out, overwrite=overwrite))
