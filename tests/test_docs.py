"""Pages of docs/ are run, block by block, in an empty folder: what they show works."""

import re
import shlex
import tomllib
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from anytoken.benchmarks.serve import running_server
from anytoken.cli import app

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHORT = {"tokenizer train": "steps=20", "train ": "steps=2"}  # a test need not wait for what is learnt


def run_line(line: str) -> None:
    """One `anytoken` command in this process; trainings are cut short."""
    more = next((override for command, override in SHORT.items() if f" {command}" in line), None)
    words = [*shlex.split(line)[1:], *([more] if more else [])]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, f"{line}\n{done.output}\n{done.stderr}"


PAGES = [
    page for page in sorted(DOCS.glob("*.md")) if page.stem != "serving"
]  # which shows commands of servers


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    text = page.read_text(encoding="utf-8")
    with ExitStack() as stack:
        if "\nanytoken serve " in text:  # on a free port, and for as long as the page is read
            url, _ = stack.enter_context(
                running_server("mini", "--set", "max_rows=2", "--set", "max_waiting=8")
            )
            text = text.replace("http://127.0.0.1:8000", url)
        run_blocks(BLOCK.findall(text), page.name, names)


def run_blocks(blocks, name, names):
    assert blocks
    for language, text in blocks:
        path = re.match(r"# ([\w/]+\.\w+)\n", text)
        if path:  # a file that the page has the reader write
            Path(path[1]).parent.mkdir(exist_ok=True)
            Path(path[1]).write_text(text)
        elif language == "python":
            exec(compile(text, name, "exec"), names)
        elif language == "bash":
            for line in text.splitlines():
                if not line.startswith(("pip install", "anytoken serve", "anytoken web")):
                    run_line(line)
        elif language != "mermaid":  # diagrams are drawn when the site is built
            assert (tomllib.loads if language == "toml" else yaml.safe_load)(text), language


def test_links_of_the_pages_lead_somewhere():
    for page in DOCS.glob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
