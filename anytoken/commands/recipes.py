"""`anytoken recipes`: the recipes and programs that come with the library."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anytoken import recipes
from anytoken.commands.options import examples

app = typer.Typer(no_args_is_help=True, help="The recipes and programs that come with the library.")


@app.command("list", epilog=examples("anytoken recipes list"))
def recipes_list() -> None:
    """Show the names of all recipes and programs."""
    for name in recipes.names():
        print(f"{name:36} {recipes.summary(name)}".rstrip())


@app.command("copy", epilog=examples("anytoken recipes copy stages/lora.yaml my.yaml"))
def recipes_copy(
    name: Annotated[str, typer.Argument(help="A name from `anytoken recipes list`, or its folder.")],
    to: Annotated[Path | None, typer.Argument(help="A new file or folder, or a folder to put it in.")] = None,
) -> None:
    """Copy a recipe to change it."""
    print(recipes.copy(name, to))
