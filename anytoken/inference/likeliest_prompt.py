"""Rank replies by how well the model itself can read the text of the prompt back from them.

``generate("a fox", output="image", best_of=8, rerank="prompt")`` keeps the image with the highest log p(text | image).
Noisy-channel translation (arXiv 1908.05731) ranks with a reverse model and DALL-E (2102.12092) with CLIP; here one
model knows both directions.
"""

from __future__ import annotations

from collections.abc import Sequence

from anytoken.grammar import Piece
from anytoken.inference.engine import Engine
from anytoken.inference.score import score_ids
from anytoken.processor import Processor
from anytoken.segments import Image
from anytoken.utils.errors import RequestError


def prompt_likelihood(
    engine: Engine, processor: Processor, prompt: Sequence[int], reply: Sequence[int], num_steps: int
) -> float:
    """Log-likelihood, in nats, of the text of the prompt as the answer to the reply's media.

    prompt, reply: their ids. The text is the last step of a chain, if that is a text, else that of the prompt's last
    user turn. RequestError if there is no text, or no medium in the reply.
    """
    made = processor.grammar.parse(reply)
    steps, media = made[:num_steps], [one for one in made[num_steps:] if one.kind != "text"]
    text = [*steps[-1].values] if steps and steps[-1].kind == "text" else _asked(processor, prompt)
    if not text or not media:
        missing = "medium" if text else "text"
        raise RequestError(
            f'rerank="prompt" compares generated media with the text of the prompt; there is no {missing} here. Leave '
            "rerank out, or pass a function of the reply."
        )
    space = processor.token_space
    asked: list[int] = []
    for one in media:
        own = processor.codes_to_ids(one.kind, one.codes)
        if processor.first_frames and one.kind == "video":
            [video] = processor.detokenize(own)
            asked += processor.segment_ids(Image(video.frames[0]))  # type: ignore[attr-defined]
        asked += own
    start = [space.bos, space.user, *asked, space.end, space.assistant]
    return score_ids(engine, start, [[*map(int, text), space.end]])[0].total


def _asked(processor: Processor, prompt: Sequence[int]) -> list[int]:
    """The text ids of the last user turn."""
    ids, space = list(prompt), processor.token_space
    last = max((place for place, token in enumerate(ids) if token == space.user), default=len(ids))
    pieces: list[Piece] = processor.grammar.parse(ids[last:-1]) if last < len(ids) else []
    return [int(token) for piece in pieces if piece.kind == "text" for token in piece.values]
