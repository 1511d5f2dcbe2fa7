"""Help that helps: every command says what it does and shows a line to type, every option says what it is."""

import os
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from anytoken.cli import app

TOP = get_command(app)


def walk(group, words=()):
    """(words, command) of every group and command below a group."""
    for name, command in sorted(group.commands.items()):
        yield (*words, name), command
        if hasattr(command, "commands"):
            yield from walk(command, (*words, name))


ALL = list(walk(TOP))
COMMANDS = [(words, command) for words, command in ALL if not hasattr(command, "commands")]
each = pytest.mark.parametrize(("words", "command"), COMMANDS, ids=[" ".join(words) for words, _ in COMMANDS])


def lines_of(command):
    return [line for line in (command.epilog or "").split("\n\n") if not line.startswith("Example")]


def parse(words):
    """The contexts of a line as click reads it, without running anything; it raises for what it does not know."""
    context = TOP.make_context("anytoken", list(words))
    while getattr(context.command, "commands", None):
        name, command, rest = context.command.resolve_command(context, context._protected_args + context.args)
        context = command.make_context(name, rest, parent=context)
    return context


def test_there_are_commands():
    assert len(COMMANDS) > 30


@each
def test_every_option_has_help(words, command):
    silent = [one.name for one in command.params if not (one.help or "").strip() and not one.hidden]
    assert not silent, f"anytoken {' '.join(words)}: no help for {', '.join(silent)}"
    assert command.help and command.help.strip()


@each
def test_every_command_has_examples_that_it_understands(words, command):
    lines = lines_of(command)
    assert lines, f"anytoken {' '.join(words)} has no example: epilog=examples(...)"
    for line in lines:
        program, *typed = shlex.split(line.split(" > ")[0])
        assert program == "anytoken" and tuple(typed[: len(words)]) == words, line
        assert parse(typed).command is command, line


def test_the_examples_name_recipes_that_there_are():
    from anytoken import recipes

    named = {word for _, command in COMMANDS for line in lines_of(command) for word in shlex.split(line)}
    files = {word for word in named if word.startswith(("stages/", "tokenizers/"))}
    assert len(files) > 3 and all(recipes.find(one).exists() for one in files)


@pytest.mark.parametrize("words", [(), *(words for words, _ in ALL)], ids=lambda words: " ".join(words))
def test_short_and_long_help_are_the_same(words):
    short, long = (CliRunner().invoke(app, [*words, flag]) for flag in ("-h", "--help"))
    assert short.exit_code == 0 and "Usage" in short.stdout and short.stdout == long.stdout


def test_the_version_is_the_package():
    found = CliRunner().invoke(app, ["--version"])
    assert found.exit_code == 0 and found.stdout == f"anytoken {version('anytoken')}\n"


def complete(line):
    """What bash is offered at the end of a line."""
    words = line.split(" ")
    asked = {"_ANYTOKEN_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    code = "import sys; sys.argv = ['anytoken']; from anytoken.cli import main; main()"
    root = str(Path(__file__).parents[1])
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | asked, cwd=root
    )
    return found.stdout.split()


def test_the_shell_completes_commands_and_options():
    assert complete("anytoken tok") == ["tokenize", "tokenizer"]
    assert "--card" in complete("anytoken tokenizer eval --c")
    assert {"--install-completion", "--show-completion"} <= {
        one for param in TOP.params for one in param.opts
    }


def test_what_libraries_will_change_is_not_told_to_the_user():
    code = (
        "import sys, warnings, typer; from anytoken.cli import app\n"
        "@app.command()\n"
        "def warn():\n    warnings.warn('soon', FutureWarning); warnings.warn('mine', UserWarning)\n"
        "app(sys.argv[1:])"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONWARNINGS"}
    for more, told in (([], False), (["--debug"], True)):
        found = subprocess.run(
            [sys.executable, "-c", code, "warn", *more],
            capture_output=True, text=True, cwd=Path(__file__).parents[1], env=environment,
        )  # fmt: skip
        assert found.returncode == 0 and "mine" in found.stderr
        assert ("soon" in found.stderr) is told
