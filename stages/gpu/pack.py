"""Pack what the recipes of this folder read into one tar: the tokenizers, and of the shards the sets they name.

    python stages/gpu/pack.py data/shards runs/tokenizers out/gpu.tar

Codes have to be stored as uint16, and the shards to be at most 60 MB: the archive is refused otherwise, with the size
of each set.
"""

from __future__ import annotations

import argparse
import tarfile
from pathlib import Path

from safetensors import safe_open

from anytoken.data.shards import read_manifest
from anytoken.training.config import TrainConfig
from anytoken.utils.errors import DataError

LIMIT = 60_000_000  # bytes of all shards


def named_sets() -> list[str]:
    """The sets that the recipes beside this file read."""
    found = set()
    for path in sorted(Path(__file__).parent.glob("*.yaml")):
        stage = TrainConfig.load(path)
        for source in [*stage.data, *stage.eval.data]:
            found |= {source.path} | (
                {source.pair_with.path} if source.pair_with and source.pair_with.path else set()
            )
    return sorted(found)


def checked_size(folder: Path) -> int:
    """Bytes of a shard folder; an error for one that is missing, unfinished or stored wider than uint16."""
    try:
        read_manifest(folder)
    except DataError as error:
        raise SystemExit(str(error)) from None
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "np") as part:
            for name in part.keys():  # noqa: SIM118
                if name.endswith(".values") and part.get_slice(name).get_dtype() != "U16":
                    raise SystemExit(f"{path}: {name} is not uint16; tokenize {folder.name} again.")
    return sum(path.stat().st_size for path in folder.iterdir())


def pack(shards: Path, tokenizers: Path, out: Path, limit: int = LIMIT) -> int:
    """Write the archive; the bytes of its shards. An error if they are over the limit."""
    sizes = {name: checked_size(shards / name) for name in named_sets()}
    total = sum(sizes.values())
    if total > limit:
        table = ", ".join(
            f"{name} {size / 1e6:.1f}" for name, size in sorted(sizes.items(), key=lambda one: -one[1])
        )
        raise SystemExit(
            f"The shards are {total / 1e6:.1f} MB, over the limit of {limit / 1e6:.1f} MB: tokenize fewer records of a "
            f"large set, or remove it from the recipes. MB by set: {table}."
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(out, "w") as archive:
        for name in sizes:
            archive.add(shards / name, f"data/shards/{name}")
        archive.add(tokenizers, "runs/tokenizers")
    return total


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shards", type=Path)
    parser.add_argument("tokenizers", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    total = pack(given.shards, given.tokenizers, given.out)
    print(f"{given.out}: shards of {total / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
