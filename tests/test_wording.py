"""The wording of pages, cards, help and code: the field's terms, not private ones (see CONTRIBUTING.md, Wording)."""

import io
import json
import re
import tokenize
from pathlib import Path

import pytest
from typer.main import get_command

from anytoken import recipes
from anytoken.cli import app
from anytoken.evaluation.tokenizers.card import render
from anytoken.terminal.repl import HELP
from tests.test_help import walk

ROOT = Path(__file__).parents[1]
PATTERNS = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "docs/*.md",
    "stages/**/*.md",
    "tokenizers/**/*.md",
    "anytoken/pretrained/*/README.md",
)
PAGES = [page.relative_to(ROOT).as_posix() for pattern in PATTERNS for page in sorted(ROOT.glob(pattern))]
COUNTED = "bases|bits|bytes|codes|experts|frames|hours|ids|items|letters|pairs|prompts|queries|residues|rows|samples"
REFUSED = {
    r"what (?:comes|came|goes|went) (?:back|in|out)|\b(?:come|comes|came) back\b": "reconstruction, output",
    r"\bbeside\b": "next to, against; for a score: baseline",
    r"\b(?:go|goes|going|went) on\b": "resume, continue",
    r"\banew\b": "again; of a file: update",
    r"\bso (?:many|much)\b": "N, at most N",
    r"\bpictures?\b": "image",
    r"(?<![-\w])sounds?\b": "audio",
    r"\bthroats?\b": "voice",
    r"\b(?:heard|told)\b": "recognized, given",
    r"\blearnt\b": "learned",
    r"\blikeliest\b": "most likely",
    r"\b(?:as it goes|as they go|on the way)\b": "during training",
    r"\bin the place of\b": "instead of",
    r"\b(?:letter for letter|there and back)\b": "exactly; encode and decode",
    r"\bthe same command\b": "rerun the command",
    r"\bwhere (?:that|it) is (?:enabled|installed)\b": "if",
    rf"\b(?:{COUNTED}|seconds|tokens|words) an? (?!time\b)\w+\b": "per",
}


def prose(markdown: str) -> str:
    """A page without code blocks, code in lines, link targets and comments."""
    return re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)|<!--.*?-->", " ", markdown, flags=re.DOTALL)


def refused(text: str) -> list[str]:
    found = [
        (match, use) for pattern, use in REFUSED.items() for match in re.findall(pattern, text, re.IGNORECASE)
    ]
    return [f"{match!r}: write {use}" for match, use in found]


@pytest.mark.parametrize("page", PAGES)
def test_pages_and_cards(page):
    assert refused(prose((ROOT / page).read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "figures", sorted(ROOT.glob("tokenizers/**/figures.json")), ids=lambda path: path.parent.name
)
def test_a_committed_card_is_what_its_figures_render_to(figures):
    page = figures.with_name("README.md").read_text(encoding="utf-8")
    assert page == render(json.loads(figures.read_text(encoding="utf-8")))


# Docstrings, comments and messages of the code; these files hold what users say, or prompts.
SPOKEN = ("emoji_world/instruct.py", "emoji_world/phrases.py", "inference/zero_shot.py")
MODULES = [
    path.relative_to(ROOT).as_posix()
    for path in sorted(ROOT.glob("anytoken/**/*.py"))
    if not path.as_posix().endswith(SPOKEN)
]


def written(code: str) -> str:
    """Comments and strings with more than one word, without names in backquotes and options."""
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    kinds = (tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING))
    texts = [one.string for one in tokens if one.type in kinds and " " in one.string]
    return "\n".join(re.sub(r"`[^`]*`|--\w+ \S+", " ", text) for text in texts)


@pytest.mark.parametrize("module", MODULES)
def test_docstrings_comments_and_messages(module):
    assert refused(written((ROOT / module).read_text(encoding="utf-8"))) == []


def test_help_of_all_commands():
    top = get_command(app)
    for words, command in [((), top), *walk(top)]:
        helps = [command.help, *(getattr(param, "help", None) for param in command.params)]
        assert refused(" \n".join(text for text in helps if text)) == [], " ".join(words)


def test_help_of_the_chat_and_the_list_of_recipes():
    assert refused(HELP) == []
    assert [(name, found) for name in recipes.names() if (found := refused(recipes.summary(name)))] == []


@pytest.mark.parametrize(
    "text",
    [
        "64 codes a picture",
        "50 codes a second",
        "What comes back",
        "PSNR beside a baseline",
        "the run goes on",
        "Two bits a base",
    ],
)
def test_private_words_are_found(text):
    assert refused(text)


def test_code_and_names_of_files_are_not_prose():
    assert (
        refused(
            prose(
                "`go_on` [page](pictures/a.md)\n```bash\nls pictures\n```\n50 codes per second, two at a time"
            )
        )
        == []
    )
