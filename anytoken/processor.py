"""Segments and messages to ids, and ids back to segments.

A prompt becomes one sequence: bos, then a role id, the content and the end id of every turn. Text is tokenized
separately, so no text can smuggle in a control id. Messages follow the chat convention of transformers: content is a
string or a list of parts such as ``{"type": "image", "image": path}``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image as PILImage

from anytoken.grammar import ROLES, Grammar, Piece
from anytoken.media_io import is_below
from anytoken.segments import Image, Segment, Text, open_segment
from anytoken.token_space import TokenSpace
from anytoken.tokenizers.base import Codes, ModalityTokenizer, codebook_pattern, load_tokenizer
from anytoken.tokenizers.text import TextTokenizer
from anytoken.utils.atomic import write_file
from anytoken.utils.errors import RequestError, TokenSpaceError
from anytoken.utils.hints import choices

SPACE_FILE, FINGERPRINTS, PROMPTS = "token_space.json", "fingerprints.json", "prompts.json"
Message = dict[str, Any]
Open = Callable[[], Segment]  # media are opened only once the whole prompt is known to be well-formed


class Processor:
    """The tokenizers of all kinds, their common token space, and its grammar."""

    def __init__(
        self,
        token_space: TokenSpace,
        text_tokenizer: TextTokenizer,
        tokenizers: Mapping[str, ModalityTokenizer],
        first_frames: bool = False,
    ) -> None:
        """Combine the parts; TokenSpaceError if a tokenizer is missing or does not fit the space.

        first_frames: read the first frame of every video in a user's turn as an image, too, right before the video,
        unless there is an image already. A model that knows many images and few videos then names what it has never
        seen move.
        """
        self.token_space = token_space
        self.text_tokenizer = text_tokenizer
        self.tokenizers = dict(tokenizers)
        self.first_frames = first_frames
        self.media_root: str | Path | None = None  # where strings in messages may name files
        self._check_fit()
        self.grammar = Grammar(token_space)

    def _check_fit(self) -> None:
        space = self.token_space
        if self.first_frames and not {"image", "video"} <= set(self.tokenizers):
            raise TokenSpaceError(
                f"first_frames reads frames of videos as images, and there are tokenizers for {list(self.tokenizers)}; "
                "leave it out, or add image and video."
            )
        if self.text_tokenizer.ranges != space.text_ranges:
            raise TokenSpaceError(
                f"The text tokenizer has {self.text_tokenizer.vocab_size} ids, but the token space keeps "
                f"{space.text_size} for text; use the tokenizer that the space was made for."
            )
        if set(self.tokenizers) != set(space.modalities):
            raise TokenSpaceError(
                f"The token space has {space.modalities}, but there are tokenizers for {list(self.tokenizers)}; "
                "they must be the same."
            )
        for kind, tokenizer in self.tokenizers.items():
            given = (tokenizer.shape, tokenizer.codebook_sizes, tokenizer.global_codebook_size)
            wanted = (space.shapes[kind], space.codebook_sizes(kind), space.global_codebook_size(kind))
            if given != wanted or tokenizer.name != kind:
                raise TokenSpaceError(
                    f"The token space has {kind} with {wanted[0]} and codebooks {_sizes(*wanted[1:])}, but its "
                    f"tokenizer is {tokenizer.name} with {given[0]} and {_sizes(*given[1:])}; use the tokenizer that "
                    "the space was made for."
                )

    @property
    def kinds(self) -> dict[str, type[Segment]]:
        """Every supported kind and its segment type."""
        return {"text": Text, **{kind: one.segment_type for kind, one in self.tokenizers.items()}}

    def __repr__(self) -> str:
        return f"Processor({self.token_space!r})"

    # ---- segments and ids ----

    def segment_ids(self, segment: Segment) -> list[int]:
        """One segment as ids: bare text ids, or open id, size ids, codes, close id.

        RequestError for a kind without a tokenizer; TokenizerError if the tokenizer cannot take the input.
        """
        if not isinstance(segment, Segment):
            raise RequestError(
                f"Expected a segment ({', '.join(self.kinds)}); received {type(segment).__name__}."
            )
        if isinstance(segment, Text):
            return self.text_tokenizer.encode(segment.text)
        tokenizer = self.tokenizer_of(segment.kind)
        with torch.no_grad():
            codes = tokenizer.encode(segment)
        return self.codes_to_ids(segment.kind, codes)

    tokenize = segment_ids

    def tokenizer_of(self, kind: str) -> ModalityTokenizer:
        """The tokenizer of a medium; RequestError for a kind without one, such as text."""
        if kind not in self.tokenizers:
            raise RequestError(f"No tokenizer for {kind!r}{choices(kind, list(self.kinds))}.")
        return self.tokenizers[kind]

    def codes_to_ids(self, kind: str, codes: Codes) -> list[int]:
        """Codes of one segment as ids, with open, size and close ids; TokenizerError if they do not fit its shape."""
        tokenizer, space = self.tokenizer_of(kind), self.token_space
        tokenizer.check_codes(codes)
        segment = self.grammar.segments[kind]
        return [
            segment.open,
            *(space.size_token(n) for n in codes.size),
            *(codes.header + segment.global_start).tolist(),
            *(codes.values + segment.starts).ravel()[codebook_pattern(tokenizer.shape, len(codes))].tolist(),
            segment.close,
        ]

    def detokenize(self, ids: Sequence[int]) -> list[Segment]:
        """Decode the ids of a segment, a reply, a turn, or a whole conversation to segments, in order.

        Bytes that are not UTF-8, as at the end of a truncated text, become U+FFFD. TokenSpaceError for ids that are
        not a legal sequence, or end inside a medium.
        """
        pieces = self.grammar.parse(ids)
        segments: dict[int, Segment] = {}
        for kind in dict.fromkeys(piece.kind for piece in pieces):
            places = [place for place, piece in enumerate(pieces) if piece.kind == kind]
            segments |= zip(places, self._decode(kind, [pieces[place] for place in places]), strict=True)
        return [segments[place] for place in range(len(pieces))]

    def _decode(self, kind: str, pieces: list[Piece]) -> list[Segment]:
        if kind == "text":
            return [Text(self.text_tokenizer.decode(piece.values.tolist())) for piece in pieces]
        with torch.no_grad():
            return self.tokenizers[kind].decode_batch([piece.codes for piece in pieces])

    # ---- prompts and messages ----

    def messages(self, prompt: Any) -> list[Message]:
        """A prompt as messages {"role", "content": [Segment, ...]}, with its media opened.

        prompt: a string, a segment, a list of both, or messages in the chat convention. A list may also hold
        paths (pathlib.Path), PIL images and uint8 [H, W, 3] arrays; a part of a message may give its medium as a
        segment, a Path, bytes, a PIL image or an array. A string in a part may come from an untrusted source (JSON,
        a request), so it can only name a file below `media_root`, which is None by default. RequestError says which
        part is wrong and what is allowed; no file is opened before all parts are checked.
        """
        parts = prompt if isinstance(prompt, list | tuple) else [prompt]
        if any(isinstance(part, Mapping) and "role" in part for part in parts):
            turns = [self._turn(message, number) for number, message in enumerate(parts)]
        else:
            turns = [("user", self._content(prompt, "The prompt"))]
        return [{"role": role, "content": [open_() for open_ in content]} for role, content in turns]

    def _turn(self, message: Any, number: int) -> tuple[str, list[Open]]:
        where = f"Message {number}"
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise RequestError(
                f'{where} of the prompt needs "role" and "content"; received {message!r:.80}. '
                "A list must hold only messages, or none."
            )
        role = message["role"]
        if role not in ROLES:
            raise RequestError(f"{where} has the role {role!r}{choices(role, ROLES)}.")
        return role, self._content(message["content"], f"{where} ({role})")

    def _content(self, content: Any, where: str) -> list[Open]:
        parts = content if isinstance(content, list | tuple) else [content]
        opens = [self._part(part, where) for part in parts if not _is_empty_text(part)]
        if not opens:
            raise RequestError(f"{where} is empty; give it a text, or a segment of {', '.join(self.kinds)}.")
        return opens

    def _part(self, part: Any, where: str) -> Open:
        """A function that returns the segment of one content part."""
        if isinstance(part, Mapping):
            return self._typed_part(part, where)
        if isinstance(part, str):
            return partial(Text, part)
        if isinstance(part, Segment):
            if part.kind not in self.kinds:
                raise RequestError(
                    f"{where}: no tokenizer for {part.kind!r}{choices(part.kind, list(self.kinds))}."
                )
            return lambda: part
        if isinstance(part, os.PathLike):
            return partial(open_segment, Path(part))
        if isinstance(part, PILImage | np.ndarray):
            return partial(Image.open, part)
        raise RequestError(
            f"{where} holds {part!r:.80} ({type(part).__name__}); allowed: a string, a segment, a path, a PIL image, "
            'an array, or a part such as {"type": "image", "image": "cat.png"}.'
        )

    def _typed_part(self, part: Mapping[str, Any], where: str) -> Open:
        kind = part.get("type")
        if not isinstance(kind, str) or kind not in self.kinds:
            raise RequestError(f"{where}: content of type {kind!r}{choices(kind, list(self.kinds))}.")
        value = part.get(kind, part.get("path"))
        if value is None:
            raise RequestError(
                f'{where}: a part of type {kind} holds its content under "{kind}"; '
                f"received the keys {', '.join(map(str, part))}."
            )
        if kind == "text" and isinstance(part.get("text"), str):
            return partial(Text, value)
        segment_type = self.kinds[kind]
        if isinstance(value, str) and not (kind == "dna" and value.isalpha()):
            value = self._find_file(value, where)
        if isinstance(value, segment_type):
            return lambda: value
        if isinstance(value, Segment):
            raise RequestError(f"{where}: a part of type {kind} holds a segment of kind {value.kind!r}.")
        settings = {key: one for key, one in part.items() if key not in ("type", kind, "path")}
        return partial(_open_medium, segment_type, value, settings, where)

    def _find_file(self, value: str, where: str) -> Path:
        """The file that a string in a message names; RequestError unless it is a regular file below `media_root`."""
        if self.media_root is None:
            raise RequestError(
                f"{where}: {value!r:.80} is a string, and strings in messages open no files, since messages may come "
                "from elsewhere; give pathlib.Path(...), a segment or bytes, or allow a folder with "
                'anytoken.load(..., media_root="folder").'
            )
        path = Path(self.media_root) / value
        if "\0" in value or not is_below(path, [self.media_root]):
            raise RequestError(f"{where}: {value!r:.80} is outside of media_root, {self.media_root}.")
        if not path.is_file():
            raise RequestError(f"{where}: there is no regular file {value!r:.80} in {self.media_root}.")
        return path

    def encode_chat(self, messages: Any, add_generation_prompt: bool = True) -> list[int]:
        """A conversation (or anything `messages` takes) as ids, from bos; with the assistant's opening at the end.

        Adjacent texts of a message are joined, as in training.
        """
        return self._chat_ids(self._as_read(self.messages(messages)), add_generation_prompt)

    def _as_read(self, messages: Sequence[Message]) -> list[Message]:
        """Messages with the first frames of the user's videos, where the model reads them."""
        return [
            {**one, "content": with_first_frames(one["content"])}
            if self.first_frames and one["role"] == "user"
            else one
            for one in messages
        ]

    def encode_chats(self, prompts: Sequence[Any], add_generation_prompt: bool = True) -> list[list[int]]:
        """`encode_chat` for many prompts, in order; their media are tokenized together, kind by kind."""
        chats = [self._as_read(self.messages(prompt)) for prompt in prompts]
        media: dict[str, dict[int, Segment]] = {}
        for segment in (one for chat in chats for message in chat for one in message["content"]):
            if not isinstance(segment, Text):
                media.setdefault(segment.kind, {})[id(segment)] = segment
        known: dict[int, list[int]] = {}
        for kind, segments in media.items():
            with torch.no_grad():
                found = self.tokenizer_of(kind).encode_batch(list(segments.values()))
            known |= {key: self.codes_to_ids(kind, one) for key, one in zip(segments, found, strict=True)}
        return [self._chat_ids(chat, add_generation_prompt, known) for chat in chats]

    def _chat_ids(
        self, messages: Sequence[Message], add_generation_prompt: bool, known: Mapping[int, list[int]] = {}
    ) -> list[int]:
        ids = [self.token_space.bos]
        for message in messages:
            ids += self._turn_ids(message, known)
        return [*ids, self.token_space.assistant] if add_generation_prompt else ids

    def _turn_ids(self, message: Message, known: Mapping[int, list[int]] = {}) -> list[int]:
        """known: ids of segments that were tokenized already, by identity."""
        ids, text = [getattr(self.token_space, message["role"])], ""
        for segment in message["content"]:
            if isinstance(segment, Text):
                text += segment.text
                continue
            own = known[id(segment)] if id(segment) in known else self.segment_ids(segment)
            ids += [*self.text_tokenizer.encode(text), *own]
            text = ""
        return [*ids, *self.text_tokenizer.encode(text), self.token_space.end]

    def encode_reply(self, content: Any) -> list[int]:
        """The ids of an assistant's turn after its opening id: its content and the end id.

        content: a string, a segment, or a list of both. RequestError if it is empty or cannot be encoded.
        """
        opens = self._content(content, "The reply")
        return self._turn_ids({"role": "assistant", "content": [open_() for open_ in opens]})[1:]

    def encode_training(self, messages: Any) -> tuple[list[int], list[bool]]:
        """A conversation as ids, and for each id whether it is a target: the assistant's content and end ids."""
        ids, learn = [self.token_space.bos], [False]
        for message in self._as_read(self.messages(messages)):
            turn = self._turn_ids(message)
            ids += turn
            learn += [False, *[message["role"] == "assistant"] * (len(turn) - 1)]
        return ids, learn

    def null_prompt(self) -> list[int]:
        """The empty prompt, for classifier-free guidance (arXiv 2207.12598)."""
        space = self.token_space
        return [space.bos, space.user, space.null, space.end, space.assistant]

    # ---- saving and loading ----

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> Path:
        """Write token_space.json, text_tokenizer/ and tokenizers/<kind>/; weights as `dtype` if given.

        Their fingerprints are saved as well, to detect another tokenizer with the same shape.
        """
        folder = Path(folder)
        self.text_tokenizer.save_pretrained(folder / "text_tokenizer")
        for kind, tokenizer in self.tokenizers.items():
            tokenizer.save_pretrained(folder / "tokenizers" / kind, dtype)
        lines = json.dumps(self.fingerprints(dtype), indent=1) + "\n"
        write_file(folder / FINGERPRINTS, lines)
        write_file(folder / PROMPTS, json.dumps({"first_frames": self.first_frames}) + "\n")
        self.token_space.save(folder / SPACE_FILE)  # last: a folder that has it is whole
        return folder

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Processor:
        """Load a folder written by `save_pretrained`.

        ValueError (TokenSpaceError or TokenizerError) names a file that is missing, truncated or from another
        checkpoint.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise TokenSpaceError(
                f"{folder} is not a folder; give a checkpoint folder, which holds {SPACE_FILE}."
            )
        space = TokenSpace.load(folder / SPACE_FILE)
        text = TextTokenizer.from_pretrained(folder / "text_tokenizer")
        tokenizers = {kind: load_tokenizer(folder / "tokenizers" / kind) for kind in space.modalities}
        try:
            processor = cls(space, text, tokenizers, saved_first_frames(folder / PROMPTS))
            processor._check_fingerprints(folder / FINGERPRINTS)
        except TokenSpaceError as error:
            raise TokenSpaceError(f"{folder} mixes files of different checkpoints: {error}") from None
        return processor

    def fingerprints(self, dtype: torch.dtype | None = None) -> dict[str, str]:
        """The fingerprint of each kind's tokenizer, as saved in `dtype`."""
        media = {kind: tokenizer.fingerprint(dtype) for kind, tokenizer in self.tokenizers.items()}
        return {"text": self.text_tokenizer.fingerprint(), **media}

    def _check_fingerprints(self, path: Path) -> None:
        """TokenSpaceError names a tokenizer that differs from the saved one; checkpoints without fingerprints pass."""
        if not path.is_file():
            return
        try:
            saved: dict[str, str] = dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise TokenSpaceError(f"{path.name} is damaged ({error})") from None
        for kind, found in self.fingerprints().items():
            if saved.get(kind) != found:
                raise TokenSpaceError(
                    f"its {kind} tokenizer has the fingerprint {found[:12]}, the one it was saved with "
                    f"{str(saved.get(kind))[:12]}; copy the checkpoint again"
                )


def with_first_frames(segments: Sequence[Segment]) -> list[Segment]:
    """Segments with the first frame of every video before it, as an image; an image that is there already stays."""
    places = first_frame_places([one.kind for one in segments])
    return [
        one
        for place, segment in enumerate(segments)
        for one in ([Image(segment.frames[0]), segment] if place in places else [segment])  # type: ignore[attr-defined]
    ]


def first_frame_places(kinds: Sequence[str | None]) -> list[int]:
    """The places of videos, among the kinds of a turn's parts, without an image right before them."""
    pairs = zip([None, *kinds], kinds, strict=False)
    return [place for place, (before, kind) in enumerate(pairs) if kind == "video" and before != "image"]


def saved_first_frames(path: Path) -> bool:
    """Whether a checkpoint reads first frames; those without the file do not."""
    if not path.is_file():
        return False
    try:
        return bool(json.loads(path.read_text())["first_frames"])
    except (ValueError, KeyError, TypeError) as error:
        raise TokenSpaceError(f"{path.name} is damaged ({error!r})") from None


def _sizes(codebooks: tuple[int, ...], global_codes: int) -> str:
    return f"{codebooks}, global codes {global_codes}" if global_codes else str(codebooks)


def _is_empty_text(part: Any) -> bool:
    if isinstance(part, Mapping) and part.get("type") == "text":
        part = part.get("text")
    return isinstance(part, str | Text) and not str(part)


def _open_medium(segment_type: type[Segment], value: Any, settings: Mapping[str, Any], where: str) -> Segment:
    """The segment of a part's value: a path, bytes, a PIL image, an array with its settings, or DNA's letters."""
    kind = segment_type.kind
    build: Callable[..., Segment] = segment_type
    opener: Callable[..., Segment] = getattr(segment_type, "open", build)
    try:
        if isinstance(value, np.ndarray | str):  # a string is DNA's bases: paths are Paths here
            return build(value, **settings)
        return opener(value, **settings)
    except (TypeError, OSError) as error:
        more = f" with {', '.join(settings)}" if settings else ""
        raise RequestError(
            f"{where}: {value!r:.80}{more} cannot be opened as {kind} ({error}); give a path, a segment, or an array "
            f"with what {segment_type.__name__}(...) takes."
        ) from error
