"""The interface of a modality tokenizer: raw input to discrete codes and back, and the shape of its codes.

A language model needs little from a tokenizer: `encode`, `decode`, the number and sizes of its codebooks, and which
code sequences are legal. The latter is declared as data (`CodeGrid` or `CodeSequence`), and the grammar is derived
from it, so a new modality needs no decoding rules of its own. What holds for a whole item, such as a base color or a
voice, can be coded once in a header of global codes (like the global tokens of BiCodec, arXiv 2503.01710), so the
local codes need not repeat it. Shapes in this package: N positions of local codes, Q codebooks, G global codes,
K codebook size, D codebook dimension.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from anytoken import moved
from anytoken.segments import Segment
from anytoken.tokenizers.codes import (
    NO_HEADER,
    CodeGrid,
    Codes,
    CodeSequence,
    CodeShape,
    TokenizerError,
    code_shape_from_dict,
    codebook_pattern,
)

__all__ = [
    "BUILTIN", "MODALITIES", "NO_HEADER", "PLUGIN", "CodeGrid", "CodeSequence", "CodeShape", "Codes",
    "ModalityTokenizer", "TokenizerError", "class_source", "code_shape_from_dict", "codebook_pattern",
    "load_tokenizer", "loss_weights", "register_modality",
]  # fmt: skip
if not TYPE_CHECKING:
    __getattr__ = moved.old_names(__name__)


SUMS = ".embed_avg"  # of vector-quantize-pytorch's moving averages


def loss_weights(
    weights: Mapping[str, float], terms: Sequence[str], default: Mapping[str, float]
) -> dict[str, float]:
    """A recipe's `loss`, or the default; TokenizerError if it has unknown terms or no weight above 0."""
    weights = weights or default
    if set(weights) - set(terms) or min(weights.values()) < 0 or not any(weights.values()):
        raise TokenizerError(
            f"loss weighs {', '.join(terms)}, each 0 or more and one above; received {dict(weights)}."
        )
    return dict(weights)


class ModalityTokenizer(nn.Module):
    """Encodes one kind of segment to codes and decodes codes. Subclass it, declare `shape`, and register it.

    A subclass sets the class variables `kind` (its registered name) and `segment_type`, stores every constructor
    argument in `self.config` (JSON-ready), sets `shape` and `codebook_sizes`, and implements `encode` and `decode`.
    The batched versions are loops by default; override them if batching is faster. A trainable tokenizer also
    implements `training_loss` and, unless it is built in, `training_batches`; `held_out` and `distortion` let
    `anytoken tokenizer eval` measure it. A shape with global codes needs a `global_codebook_size`, shared by all of
    them. docs/add_a_modality.md is a complete example.
    """

    kind: ClassVar[str]
    segment_type: ClassVar[type[Segment]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = moved.takes_old_settings(cls.__init__)  # type: ignore[method-assign]

    def __init__(
        self,
        *,
        shape: CodeShape,
        codebook_sizes: Sequence[int],
        config: dict[str, Any],
        global_codebook_size: int = 0,
    ) -> None:
        super().__init__()
        if len(codebook_sizes) != shape.num_codebooks:
            raise TokenizerError(
                f"{type(self).__name__} declares {shape.num_codebooks} codebooks in its shape "
                f"but {len(codebook_sizes)} codebook sizes."
            )
        if bool(shape.num_global_codes) != (global_codebook_size > 0):
            raise TokenizerError(
                f"{type(self).__name__} declares {shape.num_global_codes} global codes in its shape but a "
                f"global_codebook_size of {global_codebook_size}; both or neither are 0."
            )
        self.shape = shape
        self.codebook_sizes = tuple(int(k) for k in codebook_sizes)
        self.global_codebook_size = int(global_codebook_size)
        self.config = dict(config)
        self.frame_rate_hz: float | None = None
        self._saves_sums = True

    @property
    def name(self) -> str:
        """The modality's name in the token space; several kinds of tokenizer may serve one modality."""
        return self.segment_type.kind

    def encode(self, segment: Segment) -> Codes:
        """Encode a segment; TokenizerError for another kind or an input outside the declared limits."""
        return self.encode_batch([segment])[0]

    def decode(self, codes: Codes) -> Segment:
        """Decode codes; TokenizerError for codes outside the declared shape or range."""
        return self.decode_batch([codes])[0]

    def encode_batch(self, segments: Sequence[Segment]) -> list[Codes]:
        """`encode` for many segments, in order."""
        if type(self).encode is ModalityTokenizer.encode:
            raise TypeError(f"{type(self).__name__} must implement encode or encode_batch.")
        return [self.encode(segment) for segment in segments]

    def decode_batch(self, codes: Sequence[Codes]) -> list[Segment]:
        """`decode` for many code arrays, in order."""
        if type(self).decode is ModalityTokenizer.decode:
            raise TypeError(f"{type(self).__name__} must implement decode or decode_batch.")
        return [self.decode(one) for one in codes]

    def swap_global(self, segment: Segment, other: Segment) -> Segment:
        """`segment` with the global codes of `other`: recolors an image, converts a voice.

        The local codes stay the same. TokenizerError for a tokenizer without global codes, or a segment of another
        kind.
        """
        if not self.shape.num_global_codes:
            raise TokenizerError(
                f"This {self.name} tokenizer ({self.kind}) has no global codes to exchange; train one with "
                "num_global_codes."
            )
        codes, source = self.encode_batch([segment, other])
        return self.decode(replace(codes, header=source.header))

    # ---- decoding incomplete segments, for streaming ----

    @property
    def lookahead(self) -> int | None:
        """The number of later codes that decoding a code depends on; None if only complete segments can be decoded."""
        return None

    def decode_span(self, codes: Codes, start: int, stop: int) -> Segment:
        """The part of the decoded sequence that codes `start` to `stop` stand for; `codes` are the codes so far.

        Valid once `lookahead` codes after `stop` are available, or the sequence has ended. Joined spans are the
        complete segment.
        """
        raise TokenizerError(f"{type(self).__name__} decodes whole segments only: its lookahead is None.")

    def preview(self, codes: Codes) -> Segment:
        """A preview of a grid from its first codes [N, Q], at least one.

        Missing codes repeat the last complete slice of the grid: the latest row of an image, or step of a clip.
        """
        if not isinstance(self.shape, CodeGrid):
            raise TokenizerError(f"Only a grid has a preview; {self.name} is a run.")
        slices = (math.prod(codes.size[axis:]) for axis in range(1, len(codes.size) + 1))
        period = next(length for length in slices if length <= len(codes))
        tail, missing = codes.values[-period:], math.prod(codes.size) - len(codes)
        filled = np.concatenate([codes.values, *[tail] * math.ceil(missing / period)])
        return self.decode(replace(codes, values=filled[: math.prod(codes.size)]))

    def training_loss(self, batch: Tensor) -> tuple[Tensor, dict[str, float]]:
        """The loss of a prepared batch, and metrics to log. Only trainable tokenizers implement it."""
        raise TokenizerError(f"{type(self).__name__} has nothing to train.")

    def configure_losses(self, weights: Mapping[str, float]) -> nn.Module | None:
        """Set the weights of a recipe's `loss`; returns a module to train as well, such as a discriminator."""
        old = getattr(self, "weigh_losses", None)  # what a plug-in of version 0.1 calls this
        if old is not None:
            message = f"{type(self).__name__}: weigh_losses is now configure_losses"
            warnings.warn(message, DeprecationWarning, stacklevel=2)
            return old(weights)
        if weights:
            raise TokenizerError(f"The loss of {self.kind} has no terms to weigh; received {dict(weights)}.")
        return None

    def adapted_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Convert the weights of the tokenizer that a recipe's `init_from` names to this kind of tokenizer."""
        return state

    def fit(self, source: Path, seed: int) -> None:
        """Learn from data without gradients, before the training steps; does nothing by default.

        source: the recipe's `data`, in the folder of the data sets.
        """

    def training_batches(self, source: Path, batch_size: int, seed: int) -> Callable[[int], Tensor]:
        """A function from a step to the batch for `training_loss`. Batch n depends only on `seed` and n, so that an
        interrupted run resumes exactly.

        source: as in `fit`. TokenizerError if there is nothing to read.
        """
        raise TokenizerError(
            f"{type(self).__name__} does not say what it is trained on; write its training_batches."
        )

    def held_out(self, source: Path) -> list[tuple[str, Segment]]:
        """Group (or "") and segment of each held-out item; `source` as in `fit`."""
        raise TokenizerError(f"{type(self).__name__} does not say what is held out; write its held_out.")

    def distortion(self, original: Segment, decoded: Segment) -> dict[str, float]:
        """Distortion of a reconstruction, in this modality's own metrics."""
        return {"exact": float(decoded == original)}

    def codebook_vectors(self, codebook: int = 0) -> Tensor:
        """Codebook entries [K, D], used to initialise a language model's new embedding rows."""
        size = self.codebook_sizes[codebook]
        return torch.randn(size, 8, generator=torch.Generator().manual_seed(codebook))

    def global_vectors(self) -> Tensor:
        """As `codebook_vectors`, for the global codes: [global_codebook_size, D]."""
        generator = torch.Generator().manual_seed(len(self.codebook_sizes))
        return torch.randn(self.global_codebook_size, 8, generator=generator)

    @property
    def device(self) -> torch.device:
        """The device of the weights (CPU for a tokenizer without weights)."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    # ---- checks shared by every tokenizer ----

    def check_segment(self, segment: Segment) -> None:
        """TokenizerError unless the segment is of this tokenizer's kind."""
        if not isinstance(segment, self.segment_type):
            raise TokenizerError(
                f"The {self.name} tokenizer encodes {self.segment_type.__name__} segments; "
                f"received {type(segment).__name__}."
            )

    def check_codes(self, codes: Codes) -> None:
        """TokenizerError unless the codes fit the declared shape and codebook sizes."""
        count, books = codes.values.shape
        if books != self.shape.num_codebooks:
            raise TokenizerError(
                f"{self.name} codes have {self.shape.num_codebooks} codebooks; received {books}."
            )
        if isinstance(self.shape, CodeGrid):
            limits = list(zip(self.shape.min_size, self.shape.max_size, strict=True))
            fits = len(codes.size) == len(limits) and all(
                lo <= n <= hi for n, (lo, hi) in zip(codes.size, limits, strict=True)
            )
            if not fits or count != math.prod(codes.size):
                raise TokenizerError(
                    f"{self.name} codes need a size {dict(zip(self.shape.axes, limits, strict=True))} "
                    f"with one position per cell; received size {codes.size} with {count} positions."
                )
        elif not self.shape.min_length <= count <= self.shape.max_length:
            raise TokenizerError(
                f"{self.name} takes {self.shape.min_length} to {self.shape.max_length} frames; received {count}."
            )
        low, high = codes.values.min(axis=0), codes.values.max(axis=0)
        for book, size in enumerate(self.codebook_sizes):
            if low[book] < 0 or high[book] >= size:
                raise TokenizerError(
                    f"{self.name} codebook {book} has codes 0 to {size - 1}; "
                    f"received values from {low[book]} to {high[book]}."
                )
        header = codes.header
        if len(header) != self.shape.num_global_codes:
            raise TokenizerError(
                f"{self.name} codes have {self.shape.num_global_codes} global codes; received {len(header)}."
            )
        if len(header) and (header.min() < 0 or header.max() >= self.global_codebook_size):
            raise TokenizerError(
                f"{self.name} global codes are 0 to {self.global_codebook_size - 1}; "
                f"received values from {header.min()} to {header.max()}."
            )

    # ---- saving and loading ----

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As any object; a class that came from a file goes along as its source, for worker processes."""
        source = class_source(type(self))
        if source is None:
            return super().__reduce_ex__(protocol)
        from anytoken.tokenizers.registry import rebuild

        return rebuild, (*source, self.__dict__)

    def drop_ema_buffers(self) -> ModalityTokenizer:
        """Save without the moving averages of learned codebooks, which only training needs; returns the tokenizer."""
        self._saves_sums = False
        return self

    def _weights(self) -> dict[str, Tensor]:
        state = self.state_dict()
        return {key: value for key, value in state.items() if self._saves_sums or not key.endswith(SUMS)}

    def fingerprint(self, dtype: torch.dtype | None = None) -> str:
        """sha256 of configuration and weights: tokenizers with equal fingerprints give equal codes.

        dtype: as in `save_pretrained`. The fingerprint is the same before saving and after loading.
        """
        config = moved.fingerprinted_settings(self.config) if self.kind in BUILTIN else self.config
        digest = hashlib.sha256(json.dumps([self.kind, config], sort_keys=True).encode())
        for key, tensor in sorted(self._weights().items()):
            digest.update(key.encode())
            saved = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
            digest.update(saved.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> Path:
        """Write config.json and model.safetensors; floating tensors are cast to `dtype` if given.

        Files are written to a temporary folder and renamed, so an interrupted save leaves none incomplete.
        TokenizerError if the folder has the config.json of something else, such as a language model.
        """
        folder = Path(folder)
        _check_replaceable(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            tensors = {
                key: value.detach()
                .cpu()
                .to(dtype if dtype and value.is_floating_point() else value.dtype)
                .contiguous()
                for key, value in self._weights().items()
            }
            save_file(tensors, scratch / "model.safetensors", metadata={"format": "pt"})
            header = {
                "kind": self.kind,
                "class": f"{type(self).__module__}:{type(self).__qualname__}",
                "shape": self.shape.to_dict(),
                "codebook_sizes": list(self.codebook_sizes),
                **({"global_codebook_size": self.global_codebook_size} if self.global_codebook_size else {}),
                "config": self.config,
            }
            if source := class_source(type(self)):
                name, code = source
                header["code"] = name
                (scratch / name).write_bytes(code)
            (scratch / "config.json").write_text(json.dumps(header, indent=2) + "\n")
            folder.mkdir(exist_ok=True)
            for path in scratch.iterdir():
                os.replace(path, folder / path.name)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return folder

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ModalityTokenizer:
        """Load a folder written by `save_pretrained`, in float32 and evaluation mode.

        TokenizerError names a file that is missing, truncated or does not fit.
        """
        header, weights = _read_header(Path(folder)), Path(folder) / "model.safetensors"
        if not weights.is_file():
            raise TokenizerError(f"{weights} is missing: the tokenizer folder is incomplete; copy it again.")
        try:
            config = header["config"]
            tokenizer = cls(**(moved.current_settings(config, warn=False) if cls.kind in BUILTIN else config))
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            raise TokenizerError(
                f"{Path(folder) / 'config.json'} does not describe a {cls.__name__}: {error}"
            ) from error
        try:
            state = {k: v.float() if v.is_floating_point() else v for k, v in load_file(weights).items()}
            if sums := {name for name in tokenizer.state_dict() if name.endswith(SUMS)} - set(state):
                tokenizer.drop_ema_buffers().load_state_dict(_with_sums(state, sums))
            else:
                tokenizer.load_state_dict(state)
        except (SafetensorError, RuntimeError, ValueError, OSError) as error:
            raise TokenizerError(f"{weights} does not load as {cls.__name__}: {error}") from error
        return tokenizer.eval()


def _with_sums(state: dict[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """The state with the sums it was saved without, nearly as they were, so that training can continue."""
    for name in names:
        mean, count = (state.get(name.replace(SUMS, one)) for one in (".embed", ".cluster_size"))
        if mean is not None and count is not None:
            state[name] = mean * count[..., None]
    return state


MODALITIES: dict[str, type[ModalityTokenizer]] = {}
BUILTIN = {  # kind: module of this package
    "image": "image", "layered_image": "layered", "layered_video": "layered", "speech": "speech", "video": "video",
    "dna": "dna.vq", "dna_context": "dna.context", "dna_kmer": "dna.kmer_bpe", "dna_bpe": "dna.kmer_bpe",
    "pretrained_speech": "pretrained", "pretrained_image": "pretrained", "pretrained_video": "pretrained",
}  # fmt: skip
PLUGIN = "anytoken_modality_"  # begins the name of a module that `load_modality` made of a file


def register_modality(cls: type[ModalityTokenizer]) -> type[ModalityTokenizer]:
    """Register a tokenizer class under its `kind`, so that recipes and checkpoints can refer to it.

    Use it as a decorator. TokenizerError if the name belongs to another class.
    """
    kind = getattr(cls, "kind", None)
    if not isinstance(kind, str) or not kind.isidentifier():
        raise TokenizerError(f"{cls.__name__}.kind must be an identifier such as 'protein'; got {kind!r}.")
    known = MODALITIES.get(kind)
    if known is not None:
        holder = f"{known.__module__}.{known.__qualname__}"
    else:
        holder = f"{__package__}.{BUILTIN[kind]}.{cls.__qualname__}" if kind in BUILTIN else ""
    if holder and holder != f"{cls.__module__}.{cls.__qualname__}":
        raise TokenizerError(f"Modality {kind!r} is already registered by {holder}.")
    MODALITIES[kind] = cls
    return cls


def class_source(cls: type) -> tuple[str, bytes] | None:
    """File name and content of the file that `load_modality` took a class from; None for a class of a package."""
    if not cls.__module__.startswith(PLUGIN):
        return None
    module = sys.modules[cls.__module__]
    return Path(str(module.__file__)).name, module.__source__


def _read_header(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise TokenizerError(
            f"{path} is missing: expected a tokenizer folder with config.json and model.safetensors."
        )
    try:
        header = json.loads(path.read_text())
        return {"code": None, **header, **{key: header[key] for key in ("kind", "class", "config")}}
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise TokenizerError(
            f"{path} is not a tokenizer configuration ({error!r}); copy the folder again."
        ) from error


def _check_replaceable(folder: Path) -> None:
    """TokenizerError if a save would replace files that are no tokenizer's."""
    if (folder / "config.json").is_file():
        try:
            _read_header(folder)
        except TokenizerError as error:
            raise TokenizerError(
                f"{folder} holds something else: {folder / 'config.json'} is not a tokenizer's, and saving would "
                "replace it; choose another folder."
            ) from error


def load_tokenizer(folder: str | Path) -> ModalityTokenizer:
    """Load the tokenizer in a folder. Its class is built in, registered, or provided by an installed package.

    A folder cannot make this import code: if it contains the file of its class, call `load_modality` on that file
    first, as the error says.
    """
    from anytoken.tokenizers.registry import modality_class

    header = _read_header(Path(folder))
    return modality_class(header["kind"], header, Path(folder)).from_pretrained(folder)
