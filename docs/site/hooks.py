"""What the documentation site adds to MkDocs: pages from all over the repository, and diagrams without JavaScript.

Pages keep their path in the repository, so a link that works in a checkout works on the site. Links to files that are
not on the site, such as recipes, become their path.
"""

import re
from pathlib import Path
from posixpath import dirname, join, normpath
from typing import Any
from zlib import crc32

import mmdr
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.superfences import SuperFencesException

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LOG.md", "anytoken/pretrained/*/README.md",
    "docs/*.md", "docs/**/*.png", "docs/**/*.css", "docs/**/*.json", "stages/**/*.md", "stages/**/*.svg",
    "tokenizers/**/*.md", "tokenizers/**/*.png", "tokenizers/**/*.svg",
)  # fmt: skip
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s#:]+)\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Render ```mermaid blocks while building: GitHub shows them too, and no script is loaded from elsewhere."""
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {})
    fences["custom_fences"] = [{"name": "mermaid", "class": "mermaid", "format": diagram}]
    return config


def diagram(source: str, *_: Any, **__: Any) -> str:
    """A mermaid diagram as SVG; the build fails if it cannot be drawn."""
    try:
        svg = mmdr.render(source, backend="merman").svg()
        name = f"diagram-{crc32(source.encode())}"  # of its ids, which are to be unique on a page
        return f'<div class="diagram">{svg.replace("merman", name)}</div>'
    except Exception as error:
        raise SuperFencesException(f"{error} in the diagram\n{source}") from error


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The files of the repository that the site shows, next to those of the theme."""
    paths = sorted({path for pattern in PAGES for path in ROOT.glob(pattern)})
    shown = [path.relative_to(ROOT).as_posix() for path in paths]
    theme = [file for file in files if Path(file.src_dir or "") != Path(config.docs_dir)]
    return Files([*theme, *(_file(path, config) for path in shown)])


def _file(path: str, config: MkDocsConfig) -> File:
    """A file under its path in the repository; pages of docs/ have addresses without the folder."""
    file = File(path, str(ROOT), config.site_dir, config.use_directory_urls)
    file.dest_uri = file.dest_uri.removeprefix("docs/")
    return file


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to folders lead to their README; links to files that the site lacks become paths."""

    def link(match: re.Match[str]) -> str:
        text, target = match.groups()
        path = normpath(join(dirname(page.file.src_uri), target))
        if files.get_file_from_path(path) or not (ROOT / path).exists():
            return match[0]
        if files.get_file_from_path(f"{path}/README.md"):
            return f"[{text}]({target}/README.md)"
        return f"`{path}`" if text in (path, target) else f"{text} (`{path}`)"

    return LINK.sub(link, markdown)
