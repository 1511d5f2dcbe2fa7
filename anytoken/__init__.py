"""AnyToken: any-to-any multimodal tokens. One language model reads and writes text and discrete codes alike.

    import anytoken
    reply = anytoken.load("mini").generate("a red apple, 3d", output="image", seed=0)

Names are imported on first use, so `import anytoken` is quick. transformers' Auto classes know
`model_type: anytoken`, whichever of the two was imported first.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from anytoken import moved

if TYPE_CHECKING:
    from anytoken.inference.api import AnyToken, load
    from anytoken.inference.chat import Chat
    from anytoken.inference.index import Index
    from anytoken.inference.outputs import GenerationOutput
    from anytoken.inference.sampling import Sampling
    from anytoken.limits import MediaLimitError, MediaLimits, media_limits
    from anytoken.segments import DNA, Image, Segment, Speech, Text, Video
    from anytoken.tokenizers.base import ModalityTokenizer, register_modality
    from anytoken.tokenizers.registry import load_modality

__version__ = "0.1.0"

_HOME = {
    "AnyToken": "inference.api",
    "Chat": "inference.chat",
    "DNA": "segments",
    "GenerationOutput": "inference.outputs",
    "Image": "segments",
    "Index": "inference.index",
    "MediaLimitError": "limits",
    "MediaLimits": "limits",
    "ModalityTokenizer": "tokenizers.base",
    "Sampling": "inference.sampling",
    "Segment": "segments",
    "Speech": "segments",
    "Text": "segments",
    "Video": "segments",
    "load": "inference.api",
    "load_modality": "tokenizers.registry",
    "media_limits": "limits",
    "register_modality": "tokenizers.base",
}
__all__ = [
    "DNA", "AnyToken", "Chat", "GenerationOutput", "Image", "Index", "MediaLimitError", "MediaLimits",
    "ModalityTokenizer", "Sampling", "Segment", "Speech", "Text", "Video", "load", "load_modality", "media_limits",
    "register_modality",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in moved.RENAMED[""]:
        return moved.old_names(__name__)(name)
    if name not in _HOME:
        raise AttributeError(f"module 'anytoken' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"anytoken.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


moved.install()

_AUTO_CONFIG = "transformers.models.auto.configuration_auto"


def _announce(configuration_auto: ModuleType) -> None:
    """Let AutoConfig know `anytoken`: who first asks for it imports the model, which registers all its classes.

    Nothing of ours is imported before, because transformers' modules import each other in circles.
    """
    mapping = configuration_auto.CONFIG_MAPPING

    class WithAnyToken(type(mapping)):  # type: ignore[misc]
        def __contains__(self, key: object) -> bool:
            return key == "anytoken" or super().__contains__(key)

        def __getitem__(self, key: str) -> Any:
            if key == "anytoken":
                import_module("anytoken.model")
            return super().__getitem__(key)

    mapping.__class__ = WithAnyToken


class _AnnounceWhenLoaded(MetaPathFinder, Loader):
    """Loads transformers' configuration_auto as usual, then announces our model type there."""

    def find_spec(
        self, fullname: str, path: Any = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _AUTO_CONFIG or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _announce(module)


if _AUTO_CONFIG in sys.modules:
    _announce(sys.modules[_AUTO_CONFIG])
else:
    sys.meta_path.insert(0, _AnnounceWhenLoaded())
