"""The recipes and programs of `tokenizers/`, `stages/` and `inference/`, for a checkout and for an installed wheel.

In a checkout they lie at its top level; the wheel carries the same files as data inside this folder. A recipe's name
is its path: `stages/1_alignment.yaml`, `tokenizers/image/recipe.yaml`; a folder such as `tokenizers/image` is a
recipe too.
"""

import shutil
from difflib import get_close_matches
from pathlib import Path

from anytoken.utils.errors import ConfigError

ROOMS = ("tokenizers", "stages", "inference")
FIGURES = {"figures.json", "compare.json", "config.json"}  # a card's and its weights', not recipes
SUFFIXES = {".yaml", ".sh", ".py", ".json", ".ipynb"}


def root() -> Path:
    """The folder that holds tokenizers/, stages/ and inference/."""
    here = Path(__file__).parent
    return here if (here / "stages").is_dir() else here.parents[1]


def assets() -> Path:
    """The folder of small held-out real files that the demo reads."""
    here = Path(__file__).parent
    return here / "assets" if root() == here else root() / "tests" / "assets"


def names() -> list[str]:
    """The names of all recipe and program files, sorted."""
    files = (path for room in ROOMS for path in (root() / room).rglob("*"))
    return sorted(
        path.relative_to(root()).as_posix()
        for path in files
        if path.suffix in SUFFIXES and path.name not in FIGURES and "__pycache__" not in path.parts
    )


def summary(name: str) -> str:
    """The first line a recipe says of itself, or an empty string."""
    for line in find(name).read_text(encoding="utf-8").splitlines():
        text = line.lstrip("#").strip().strip('"').strip()
        if text and not line.startswith("#!") and line.startswith(("#", '"""')):
            return text
        if text and not line.startswith("#!"):
            return ""
    return ""


def find(name: str | Path) -> Path:
    """A path of the user's own, or else the recipe of that name; ConfigError lists the nearest names."""
    own = Path(name)
    if own.exists():
        return own
    known = [*names(), *sorted({Path(one).parent.as_posix() for one in names()})]
    if Path(name).as_posix() in known:
        return root() / name
    near = get_close_matches(str(name), known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else "`anytoken recipes list` shows all."
    raise ConfigError(f"{name} is neither a file nor a recipe; {hint}")


def copy(name: str, to: Path | None = None) -> Path:
    """Copy a recipe (file or folder) to `to`, by default its own name in the working directory; returns the copy.

    ConfigError if the target exists: nothing is overwritten.
    """
    source = find(name)
    target = to or Path(source.name)
    if target.is_dir() and to is not None:
        target = target / source.name
    if target.exists():
        raise ConfigError(f"{target} exists; give another place to copy {name} to.")
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy2(source, target)
    return target
