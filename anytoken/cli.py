"""The `anytoken` command: each command, in `commands/`, is a thin call into one room.

A mistake of the user (ValueError, a file that cannot be read, a wrong option) is one red line on stderr and exit
code 2; `--debug`, anywhere on the line, shows the traceback instead. Rooms are imported inside the commands, so
that `anytoken --help` answers at once. `--install-completion` completes commands and options in the shell.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup
from typer.exceptions import Abort, TyperException

from anytoken.commands import (
    bench,
    data,
    evaluation,
    inference,
    model,
    recipes,
    score,
    search,
    serving,
    tokenizer,
    training,
    web,
)
from anytoken.commands.options import examples


class OneLineErrors(TyperGroup):
    """The top command group: turns a user's mistake into one line and exit code 2."""

    def main(self, args: Sequence[str] | None = None, *unused: Any, **extra: Any) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        debug = "--debug" in words
        if debug:
            words.remove("--debug")
        if not debug:
            quiet()
        try:
            code = super().main(words, **{**extra, "standalone_mode": False})
        except BrokenPipeError:  # `anytoken ... | head`: whoever read has seen enough
            # The last flush has to go somewhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 1
        except (ValueError, OSError, TyperException) as error:
            if debug:
                raise
            complain(error)
            code = 2
        except (Abort, KeyboardInterrupt):
            code = 130
        sys.exit(code)


def quiet() -> None:
    """Libraries warn their callers of what will change in them: nothing that a user of the command can mend."""
    for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
        warnings.simplefilter("ignore", category)
    # processes that a command starts (loaders, tokenizing workers) take their filters from here
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning,ignore::DeprecationWarning")
    # where torchao is installed, transformers imports it and torch warns of it
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)


def complain(error: Exception) -> None:
    """One red line on stderr; nothing for a bare `anytoken`, which has already printed its help."""
    message = (
        error.format_message() if isinstance(error, TyperException) else str(error) or type(error).__name__
    )
    if message:
        line = " ".join(message.split())
        line = re.sub(r"Input should be (.*?), unable to parse .*", r"it must be \1", line)
        Console(stderr=True, soft_wrap=True).print(
            f"anytoken: {line}", style="red", markup=False, highlight=False
        )


app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples('anytoken generate "a red apple, 3d" -o image', "anytoken train --help"),
)
for group in (inference, score, search, serving, web, training, evaluation, model):
    app.add_typer(group.app)
for name, group in {"tokenizer": tokenizer, "data": data, "recipes": recipes, "bench": bench}.items():
    app.add_typer(group.app, name=name)


def show_version(wanted: bool) -> None:
    """Print the version and end."""
    if wanted:
        print(f"anytoken {version('anytoken')}")
        raise typer.Exit


@app.callback()
def top(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    modality: Annotated[
        list[Path] | None,
        typer.Option(help="Load a modality by running this file, or the one in this folder; repeatable."),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=show_version, is_eager=True)
    ] = False,
) -> None:
    """One language model that reads and writes text, images, speech, video and DNA as tokens."""
    if modality:
        from anytoken.tokenizers.registry import load_modality

        for path in modality:
            load_modality(path)


def main() -> None:
    """Run the command line."""
    app()
