"""Every command that README, CONTRIBUTING and two lists of recipes show exists, spelled right; checked offline."""

import math
import re
import shlex
import subprocess
import traceback
from pathlib import Path

import pytest
from safetensors import safe_open
from typer.main import get_command

import anytoken
from anytoken.cli import app
from anytoken.inference.sampling import sample

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "tokenizers/README.md", "stages/gpu/README.md")


def command_lines() -> list[str]:
    lines = []
    for page in PAGES:
        blocks = re.findall(
            r"^```(?:bash|sh)\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL
        )
        for block in blocks:
            joined = block.replace("\\\n", " ")
            lines += [
                line.strip() for line in joined.splitlines() if line.strip() and not line.startswith("#")
            ]
    return lines


def parse_anytoken(words: list[str]) -> None:
    """Parse a command line down to its last option without running it; raises what the command would."""
    command = get_command(app)
    context = command.make_context("anytoken", words)
    while hasattr(command, "commands"):
        name, command, words = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, list(words), parent=context)


def check_make(words: list[str]) -> None:
    subprocess.run(["make", "--dry-run", *words], cwd=ROOT, check=True, capture_output=True)


def check_pip(words: list[str]) -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert words[0] == "install"
    for extra in re.findall(r"\[([\w,]+)\]", " ".join(words)):
        assert set(extra.split(",")) <= set(extras)


@pytest.mark.parametrize("line", command_lines())
def test_a_shown_command_exists(line):
    program, *words = shlex.split(line, comments=True)
    if program == "timeout":
        _, program, *words = words
    if program == "anytoken":
        parse_anytoken(words)
    elif program == "make":
        check_make(words)
    elif program == "pytest":
        assert words[0] == "-m" and f'"{words[1]}: ' in (ROOT / "pyproject.toml").read_text()
    elif program == "pip":
        check_pip(words)
    elif program == "python":
        assert (ROOT / words[0]).is_file()
    elif program.endswith(".sh"):
        subprocess.run(["bash", "-n", ROOT / program], check=True)
        assert all(word in (ROOT / program).read_text() for word in words)
    else:
        assert program == ".venv/bin/pre-commit" and (ROOT / ".pre-commit-config.yaml").is_file()


def test_a_misspelled_option_would_be_found():
    with pytest.raises(Exception, match="--no-such-option"):
        parse_anytoken(["generate", "hello", "--no-such-option", "1"])


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text()):
        assert ((ROOT / page).parent / target).exists(), target


def test_shown_files_exist():
    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"`((?:anytoken|stages|tokenizers|inference|tests)/[\w./]+)`", text):
        assert (ROOT / name).exists(), name


def block_after(text: str, opening: str, start: int) -> tuple[str, int]:
    """The content of the next fenced block that begins with `opening`, and where it ends."""
    begin = text.index(f"{opening}\n", start) + len(opening) + 1
    end = text.index("```", begin)
    return text[begin:end], end


def test_the_first_example_prints_what_the_page_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "README.md").read_text()
    code, end = block_after(page, "```python", 0)
    shown, _ = block_after(page, "```text", end)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out == shown
    assert (tmp_path / "fox.png").is_file()


def test_the_path_to_the_line_that_samples_is_what_runs(monkeypatch):
    """A newcomer reads the listed files in this order; the calls of a real generation go through them."""
    text = (ROOT / "README.md").read_text().split("From `model.generate()`")[1].split("## ")[0]
    shown = re.findall(r"^\d\. `(\w+\.py)`", text, re.MULTILINE)
    stacks = []

    def spied(*arguments):
        stacks.append([Path(frame.filename) for frame in traceback.extract_stack()])
        return sample(*arguments)

    monkeypatch.setattr("anytoken.inference.scheduler.sample", spied)
    anytoken.load("mini").generate("a fox", output="text", max_new_tokens=4)
    room = ROOT / "anytoken" / "inference"
    passed = dict.fromkeys(path.name for path in stacks[0] if path.parent == room)
    assert [*passed, Path(sample.__code__.co_filename).name] == shown and len(shown) <= 4


def test_the_table_of_models_has_the_sizes_of_the_checkpoint():
    folder = ROOT / "anytoken/pretrained/mini"
    with safe_open(folder / "model.safetensors", "pt") as weights:
        parameters = sum(math.prod(weights.get_slice(key).get_shape()) for key in weights.keys())  # noqa: SIM118
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    [row] = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `mini` |")]
    assert [cell.strip() for cell in row.split("|")[2:4]] == [
        f"{parameters / 1e6:.1f} M",
        f"{size / 1e6:.0f} MB",
    ]
