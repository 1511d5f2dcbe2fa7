"""`anytoken recipes`: the recipes and programs that come with the library."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anytoken import recipes
from anytoken.commands.options import examples

app = typer.Typer(no_args_is_help=True, help="List and copy the bundled recipes and programs.")


@app.command("list", epilog=examples("anytoken recipes list"))
def recipes_list() -> None:
    """List all recipes and programs."""
    for name in recipes.names():
        print(f"{name:36} {recipes.summary(name)}".rstrip())


@app.command("copy", epilog=examples("anytoken recipes copy stages/lora.yaml my.yaml"))
def recipes_copy(
    name: Annotated[str, typer.Argument(help="A name from `anytoken recipes list`, or its folder.")],
    to: Annotated[Path | None, typer.Argument(help="Target file or folder.")] = None,
) -> None:
    """Copy a recipe for editing."""
    print(recipes.copy(name, to))


@app.command("reference", epilog=examples("anytoken recipes reference > recipe_reference.md"))
def recipes_reference() -> None:
    """Print every recipe key with its type, default and meaning, as Markdown."""
    from anytoken.training.config_reference import reference

    print(reference(), end="")
