"""Find a tokenizer's class: in this package, in another installed one, or in a file that the user names.

Another package provides a class through an entry point, and then only has to be installed:

    [project.entry-points."anytoken.modalities"]
    protein = "my_package.protein:ProteinTokenizer"

A file is loaded by `load_modality("tokenizers/protein")`, which is the user's consent to run it. A checkpoint with
such a tokenizer contains a copy of the file, so that it works on other machines. Loading the checkpoint never runs the
copy; only calling `load_modality` on it does: weights are data, code is not.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from anytoken.tokenizers.base import (
    BUILTIN,
    MODALITIES,
    PLUGIN,
    ModalityTokenizer,
    TokenizerError,
    register_modality,
)
from anytoken.utils.hints import nearest

GROUP = "anytoken.modalities"


def modality_class(
    kind: str, header: Mapping[str, Any] | None = None, folder: Path | None = None
) -> type[ModalityTokenizer]:
    """The class of a kind: registered, built in, or from an installed package's entry point.

    header, folder: the tokenizer folder that needs it, for an error that says where its class is. TokenizerError for
    an unknown kind.
    """
    if kind not in MODALITIES and kind in BUILTIN:
        import_module(f"anytoken.tokenizers.{BUILTIN[kind]}")
    offered = {entry.name: entry for entry in entry_points(group=GROUP)}
    if kind not in MODALITIES and kind in offered:
        _load_entry_point(offered[kind])
    if kind in MODALITIES:
        return MODALITIES[kind]
    all_kinds = sorted({*BUILTIN, *MODALITIES, *offered})
    known = f"known: {', '.join(all_kinds)}."
    if header is None or folder is None:
        raise TokenizerError(f"Unknown tokenizer kind {kind!r}{nearest(kind, all_kinds)}; {known}")
    what = f"{folder} holds a {kind!r} tokenizer, whose class is not registered here"
    if header.get("code"):
        path = folder / Path(str(header["code"])).name
        raise TokenizerError(
            f"{what}. It comes with the folder, but code is run only if you say so: read {path}, then call "
            f"anytoken.load_modality({str(path)!r}) first, or give the command --modality {path}."
        )
    raise TokenizerError(
        f"{what}: import {header['class']}, install the package that has it, or call anytoken.load_modality(file) "
        f"first; {known}"
    )


def _load_entry_point(entry: Any) -> None:
    where = (
        f"The entry point {entry.name} = {entry.value!r} of {entry.dist.name if entry.dist else 'a package'}"
    )
    try:
        cls = entry.load()
    except (ImportError, AttributeError) as error:
        raise TokenizerError(f"{where} does not load: {error}. Update or remove that package.") from error
    if not (isinstance(cls, type) and issubclass(cls, ModalityTokenizer) and cls.kind == entry.name):
        raise TokenizerError(f"{where} is not a ModalityTokenizer of that kind: {cls!r:.80}.")
    register_modality(cls)


def load_modality(path: str | Path) -> type[ModalityTokenizer]:
    """Run a file that defines one modality, register its tokenizer class and return it.

    path: a .py file, or a folder that contains exactly one. Calling this is consent to run that code: read it first.
    Equal files are run only once. TokenizerError if there is no such file, if it fails, or if it registers no class
    or several.
    """
    file = _one_file(Path(path))
    return _class_of(file, file.read_bytes())


def rebuild(file: str, source: bytes, state: dict[str, Any]) -> ModalityTokenizer:
    """A pickled or copied tokenizer of a class from a file; pickles are code in any case, and only our own are read."""
    cls = _class_of(Path(file), source)
    tokenizer = cls.__new__(cls)
    tokenizer.__setstate__(state)
    return tokenizer


def _class_of(file: Path, source: bytes) -> type[ModalityTokenizer]:
    name = f"{PLUGIN}{hashlib.sha256(source).hexdigest()[:16]}"
    if name not in sys.modules:
        _execute(name, file, source)
    return next(cls for cls in MODALITIES.values() if cls.__module__ == name)


def _one_file(path: Path) -> Path:
    files = [path] if path.suffix == ".py" else sorted(path.glob("*.py"))
    if len(files) != 1 or not files[0].is_file():
        found = ", ".join(file.name for file in files if file.is_file()) or "none"
        raise TokenizerError(f"{path} is to be a .py file, or a folder with exactly one; found {found}.")
    return files[0]


def _execute(name: str, file: Path, source: bytes) -> None:
    module = ModuleType(name)
    module.__file__, module.__source__ = str(file.resolve()), source  # type: ignore[attr-defined]
    sys.modules[name] = module
    try:
        exec(compile(source, file, "exec"), module.__dict__)
        found = [kind for kind, cls in MODALITIES.items() if cls.__module__ == name]
        if len(found) != 1:
            raise TokenizerError(
                f"it registers {', '.join(found) or 'no class'}; put @register_modality on one"
            )
    except Exception as error:  # whatever the user's code raises
        del sys.modules[name]
        for kind in [kind for kind, cls in MODALITIES.items() if cls.__module__ == name]:
            del MODALITIES[kind]
        raise TokenizerError(
            f"{file} does not load as a modality: {type(error).__name__}: {error}."
        ) from error
