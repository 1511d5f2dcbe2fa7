"""AnyToken: any-to-any multimodal tokens. One language model reads and writes text and discrete codes.

    import anytoken
    reply = anytoken.load("mini").generate("a red apple, 3d", output="image", seed=0)

Names are imported on first use, so `import anytoken` is fast. Importing `anytoken.model`, as `load` does, registers
`model_type: anytoken` with transformers' Auto classes.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from anytoken import moved

if TYPE_CHECKING:
    from anytoken.inference.api import AnyToken, load
    from anytoken.inference.chat import Chat
    from anytoken.inference.index import Index
    from anytoken.inference.outputs import GenerationOutput
    from anytoken.inference.sampling import Sampling
    from anytoken.segments import DNA, Image, Segment, Speech, Text, Video
    from anytoken.tokenizers.base import ModalityTokenizer, register_modality
    from anytoken.tokenizers.registry import load_modality
    from anytoken.utils.errors import MediaLimitError
    from anytoken.utils.limits import MediaLimits, media_limits

__version__ = "0.1.0"

_HOME = {
    "AnyToken": "inference.api",
    "Chat": "inference.chat",
    "DNA": "segments",
    "GenerationOutput": "inference.outputs",
    "Image": "segments",
    "Index": "inference.index",
    "MediaLimitError": "utils.errors",
    "MediaLimits": "utils.limits",
    "ModalityTokenizer": "tokenizers.base",
    "Sampling": "inference.sampling",
    "Segment": "segments",
    "Speech": "segments",
    "Text": "segments",
    "Video": "segments",
    "load": "inference.api",
    "load_modality": "tokenizers.registry",
    "media_limits": "utils.limits",
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
