"""The commit of the checkout that the code runs from, for figures."""

import subprocess
from pathlib import Path


def commit() -> str | None:
    """The commit of the checkout, with "-dirty" if the library differs from it; None outside one or without git."""
    head = _git("rev-parse", "--short=12", "HEAD")
    changed = _git("status", "--porcelain", "--", "anytoken")
    return head and (f"{head}-dirty" if changed else head)


def _git(*words: str) -> str | None:
    root = Path(__file__).parents[2]
    if not (root / "pyproject.toml").is_file():
        return None
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
