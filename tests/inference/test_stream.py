"""Events: joined they are the reply, and text is cut between characters only."""

from collections.abc import Generator
from typing import Any

import pytest

from anytoken.inference.api import AnyToken
from anytoken.inference.reply import Reply, Usage
from anytoken.inference.stream import Event, SegmentFinished, SegmentStarted, SegmentStream, TextDelta


def collect(events: Generator[Event, None, Reply]) -> tuple[list[Event], Reply]:
    found = []
    while True:
        try:
            found.append(next(events))
        except StopIteration as end:
            return found, end.value


@pytest.mark.parametrize("output", [None, "text", "image", ["text", "image", "text", "tone"]])
@pytest.mark.parametrize("seed", range(3))
def test_stream_is_generate(model: AnyToken, output: Any, seed: int) -> None:
    options = {"seed": seed, "max_new_tokens": 80}
    events, reply = collect(model.stream("red apple", output, **options))
    expected = model.generate("red apple", output, **options)
    assert (reply.segments, reply.ids, reply.finish_reason) == (
        expected.segments,
        expected.ids,
        expected.finish_reason,
    )
    assert [event.segment for event in events if isinstance(event, SegmentFinished)] == expected.segments
    assert "".join(event.text for event in events if isinstance(event, TextDelta)) == expected.text
    started = [event.kind for event in events if isinstance(event, SegmentStarted)]
    assert started == [segment.kind for segment in expected.segments]
    assert isinstance(events[-1], Usage) and events[-1] is reply.usage
    assert events[-1].tokens == expected.usage.tokens


def test_text_is_cut_between_characters(model: AnyToken) -> None:
    text = "schön 漢字 🍎!"
    text_tokenizer = model.processor.text_tokenizer
    ids = text_tokenizer.encode(text)
    assert any(len(text_tokenizer.id_bytes(token)) == 1 for token in ids)
    stream = SegmentStream(model.processor)
    deltas = [event.text for token in ids for event in stream.push(token) if isinstance(event, TextDelta)]
    assert "".join(deltas) == text and all("\ufffd" not in delta for delta in deltas)
    stream.push(model.token_space.end)
    assert stream.segments[0].text == text


def test_text_that_ends_inside_a_character_is_marked(model: AnyToken) -> None:
    ids = model.processor.text_tokenizer.encode("a漢")[:-1]
    stream = SegmentStream(model.processor)
    events = [event for token in [*ids, model.token_space.end] for event in stream.push(token)]
    assert stream.segments == model.detokenize(ids)
    assert "".join(event.text for event in events if isinstance(event, TextDelta)) == "a\ufffd"


def test_errors_come_before_the_first_event(model: AnyToken) -> None:
    with pytest.raises(ValueError, match="smell"):
        model.stream("a", "smell")
