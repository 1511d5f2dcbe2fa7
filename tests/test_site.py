"""The documentation site leaves out no page and no public name; `make docs` builds it and checks its links."""

import pkgutil
import re
from pathlib import Path

import pytest
import yaml

import anytoken
from tests.test_wording import prose, refused

DOCS = Path(__file__).parents[1] / "docs"
API = re.findall(r"^::: ([\w.]+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)


def pages(entry) -> list[str]:
    """The pages below an entry of the navigation: a path, {title: entry} or a list of entries."""
    if isinstance(entry, str):
        return [entry]
    return [page for one in (entry.values() if isinstance(entry, dict) else entry) for page in pages(one)]


def test_every_page_is_in_the_navigation():
    text = (DOCS / "site" / "mkdocs.yml").read_text(encoding="utf-8")
    listed = pages(yaml.safe_load(text)["nav"])
    assert len(set(listed)) == len(listed)
    assert {f"docs/{page.name}" for page in DOCS.glob("*.md")} <= set(listed)
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md"} <= set(listed)


def test_every_public_name_is_in_the_api_reference():
    assert {f"anytoken.{name}" for name in anytoken.__all__} - set(API) == set()


@pytest.mark.parametrize("name", API)
def test_the_api_reference_is_worded_like_the_other_pages(name):
    thing = pkgutil.resolve_name(name)
    members = vars(thing).items() if isinstance(thing, type) else ()
    docs = [thing.__doc__, *(one.__doc__ for name, one in members if not name.startswith("_"))]
    assert thing.__doc__ and refused(prose("\n\n".join(doc for doc in docs if doc))) == []
