"""AnyToken: any-to-any multimodal tokens. One language model reads and writes text and discrete codes alike.

    import anytoken
    reply = anytoken.load("mini").generate("a red apple, 3d", output="image", seed=0)

Names are imported on first use, so `import anytoken` is quick. As soon as transformers' Auto classes are there
they know `model_type: anytoken`, whichever of the two was imported first.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anytoken.inference.api import AnyToken, load
    from anytoken.inference.chat import Chat
    from anytoken.inference.reply import Reply
    from anytoken.inference.sampling import Sampling
    from anytoken.segments import DNA, Image, Segment, Speech, Text, Video
    from anytoken.tokenizers.base import ModalityTokenizer, register_modality

__version__ = "0.1.0"

_HOME = {
    "AnyToken": "inference.api",
    "Chat": "inference.chat",
    "DNA": "segments",
    "Image": "segments",
    "ModalityTokenizer": "tokenizers.base",
    "Reply": "inference.reply",
    "Sampling": "inference.sampling",
    "Segment": "segments",
    "Speech": "segments",
    "Text": "segments",
    "Video": "segments",
    "load": "inference.api",
    "register_modality": "tokenizers.base",
}
__all__ = [
    "DNA", "AnyToken", "Chat", "Image", "ModalityTokenizer", "Reply", "Sampling", "Segment", "Speech", "Text",
    "Video", "load", "register_modality",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'anytoken' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"anytoken.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


_AUTO_CLASSES = "transformers.models.auto.modeling_auto"


class _RegisterWithTransformers(MetaPathFinder, Loader):
    """Loads transformers' Auto classes as usual, then registers our model with them."""

    def find_spec(
        self, fullname: str, path: Any = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _AUTO_CLASSES or self not in sys.meta_path:
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
        import_module("anytoken.model")


if _AUTO_CLASSES in sys.modules:
    import_module("anytoken.model")
else:
    sys.meta_path.insert(0, _RegisterWithTransformers())
