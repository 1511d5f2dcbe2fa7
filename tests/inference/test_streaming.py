"""Events: joined they are the reply, and text is cut between characters only."""

import gc
from collections.abc import Generator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anytoken.inference.api import AnyToken
from anytoken.inference.kv_cache import KVCache
from anytoken.inference.model_runner import ModelRunner
from anytoken.inference.outputs import GenerationOutput, Usage
from anytoken.inference.streaming import (
    CHUNK,
    Event,
    SegmentDelta,
    SegmentFinished,
    SegmentPreview,
    SegmentProgress,
    SegmentStarted,
    SegmentStream,
    TextDelta,
    finish,
)
from anytoken.processor import Processor
from anytoken.segments import DNA, Image
from anytoken.token_space import TokenSpace
from anytoken.tokenizers.base import CodeGrid, Codes, ModalityTokenizer
from anytoken.tokenizers.dna.vq import DNATokenizer
from anytoken.tokenizers.speech import HOP, SpeechTokenizer
from anytoken.tokenizers.text import TextTokenizer


def collect(events: Generator[Event, None, GenerationOutput]) -> tuple[list[Event], GenerationOutput]:
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
    text = "schön 漢字 🍎 👩‍🚀!"
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


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_deltas_of_any_ids_are_the_text(model: AnyToken, data: st.DataObject) -> None:
    """Whatever bytes a model writes: joined they read as the whole does, and no delta ends in half a character."""
    tokenizer = model.processor.text_tokenizer
    written = data.draw(st.text()).encode() + data.draw(st.binary(max_size=9))
    byte_ids = {tokenizer.id_bytes(id_): id_ for id_ in range(tokenizer.vocab_size)}
    ids = [byte_ids[bytes([byte])] for byte in written]
    ids += data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    stream = SegmentStream(model.processor)
    deltas = [event.text for token in ids for event in stream.push(token) if isinstance(event, TextDelta)]
    deltas += [event.text for event in stream.push(model.token_space.end) if isinstance(event, TextDelta)]
    assert "".join(deltas) == tokenizer.decode(ids)


class World:
    """Speech and DNA, which decode span by span, beside a text tokenizer."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        text = TextTokenizer.train(["a"], 256)
        self.tokenizers = {
            "speech": SpeechTokenizer(16, 1, 2, levels=[5, 5, 4], max_frames=80).eval(),
            "dna": DNATokenizer(width=8, code_dim=4).eval(),
        }
        space = TokenSpace(text.vocab_size)
        for kind, tokenizer in self.tokenizers.items():
            space.append_modality(kind, tokenizer.codebook_sizes, tokenizer.shape)
        self.processor = Processor(space, text, self.tokenizers)


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def codes_of(kind: str, count: int) -> Codes:
    size = {"speech": 100, "dna": 256}[kind]
    return Codes(np.random.default_rng(count).integers(0, size, (count, 1)))


@pytest.mark.parametrize("count", [1, 7, CHUNK, 25, 64])
def test_sound_comes_in_chunks_that_are_the_clip(world: World, count: int) -> None:
    """A chunk comes as soon as the decoder cannot see beyond it; only rounding differs from the offline decode."""
    codes, stream, tokenizer = (
        codes_of("speech", count),
        SegmentStream(world.processor),
        world.tokenizers["speech"],
    )
    chunks: list[np.ndarray] = []
    for written, token in enumerate(world.processor.codes_to_ids("speech", codes)):
        for event in stream.push(token):
            if isinstance(event, SegmentDelta):
                chunks.append(event.segment.samples)
                settled = count if written > count else written - tokenizer.lookahead
                assert sum(map(len, chunks)) == settled * HOP
    whole = tokenizer.decode(codes).samples
    assert np.abs(np.concatenate(chunks) - whole).max() < 1e-5 < np.abs(whole).max()
    assert len(chunks) == 1 + max(0, count - tokenizer.lookahead) // CHUNK
    assert np.array_equal(stream.segments[0].samples, whole)


def test_a_voice_of_many_global_codes_streams() -> None:
    """As many codes as a chunk come before the first frame, and no sound with them."""
    torch.manual_seed(0)
    tokenizer = SpeechTokenizer(8, 1, 1, levels=[5, 5, 4], max_frames=80, num_global_codes=CHUNK + 2).eval()
    space = TokenSpace(256)
    space.append_modality("speech", tokenizer.codebook_sizes, tokenizer.shape, tokenizer.global_codebook_size)
    processor = Processor(space, TextTokenizer.train(["a"], 256), {"speech": tokenizer})
    rng = np.random.default_rng(0)
    codes = Codes(rng.integers(0, 100, (40, 1)), header=rng.integers(0, 16, CHUNK + 2))
    stream = SegmentStream(processor)
    events = [event for token in processor.codes_to_ids("speech", codes) for event in stream.push(token)]
    assert [event.done for event in events if isinstance(event, SegmentProgress)] == [10, 20, 30, 40]
    chunks = [event.segment.samples for event in events if isinstance(event, SegmentDelta)]
    whole = tokenizer.decode(codes).samples
    assert len(chunks) > 2 and np.abs(np.concatenate(chunks) - whole).max() < 1e-5
    assert np.array_equal(stream.segments[0].samples, whole)


def test_a_preview_of_a_grid_keeps_its_global_codes() -> None:
    class Dyed(ModalityTokenizer):
        """Its global code is the colour of every pixel."""

        kind, segment_type = "image", Image

        def __init__(self) -> None:
            super().__init__(
                shape=CodeGrid(("rows", "cols"), (1, 1), (4, 4), num_global_codes=1),
                codebook_sizes=[3],
                config={},
                global_codebook_size=256,
            )

        def decode_batch(self, codes: Any) -> Any:
            return [Image(np.full((*one.size, 3), one.header[0], np.uint8)) for one in codes]

    space = TokenSpace(256)
    space.append_modality("image", [3], Dyed().shape, 256)
    processor = Processor(space, TextTokenizer.train(["a"], 256), {"image": Dyed()})
    stream = SegmentStream(processor)
    ids = processor.codes_to_ids("image", Codes(np.zeros((16, 1)), (4, 4), [200]))
    events = [event for token in ids for event in stream.push(token)]
    previews = [event.segment for event in events if isinstance(event, SegmentPreview)]
    assert len(previews) == 3 and all((one.pixels == 200).all() for one in [*previews, *stream.segments])


def test_a_chunk_needs_its_whole_reach(world: World) -> None:
    """The lookahead is tight: the code just inside it changes the chunk, and the one beyond it does not."""
    tokenizer, codes = world.tokenizers["speech"], codes_of("speech", 60)
    whole = tokenizer.decode(codes).samples[: 10 * HOP]
    for distance, same in ((tokenizer.lookahead - 1, False), (tokenizer.lookahead, True)):
        changed = codes.values.copy()
        changed[10 + distance :] = (changed[10 + distance :] + 37) % 100
        assert np.allclose(tokenizer.decode(Codes(changed)).samples[: 10 * HOP], whole, atol=1e-7) == same


def test_bases_come_as_they_are_written(world: World) -> None:
    codes, stream = codes_of("dna", 25), SegmentStream(world.processor)
    ids = world.processor.codes_to_ids("dna", codes)
    parts = [e.segment for token in ids for e in stream.push(token) if isinstance(e, SegmentDelta)]
    assert len(parts) == 3 and DNA("".join(part.bases for part in parts)) == stream.segments[0]


def test_a_picture_is_previewed_at_quarters(model: AnyToken) -> None:
    tokenizer = model.processor.tokenizers["image"]
    codes = Codes(np.arange(8 * 6)[:, None] % 12, (8, 6))
    stream = SegmentStream(model.processor)
    ids = model.processor.codes_to_ids("image", codes)
    events = [event for token in ids for event in stream.push(token)]
    progress = [(event.done, event.total) for event in events if isinstance(event, SegmentProgress)]
    assert progress == [(6 * row, 48) for row in range(1, 9)]
    previews = [event for event in events if isinstance(event, SegmentPreview)]
    assert len(previews) == 3
    values = codes.values.reshape(8, 6)
    for quarter, preview in enumerate(previews, 1):
        rows = values[[*range(2 * quarter), *[2 * quarter - 1] * (8 - 2 * quarter)]]
        assert preview.segment == tokenizer.decode(Codes(rows.reshape(-1, 1), (8, 6)))
        assert preview.segment is preview.segment


def test_a_preview_of_a_clip_holds_the_last_whole_step(model: AnyToken) -> None:
    """A grid of three axes repeats steps once there is one, rows before."""
    from anytoken.tokenizers.video import VideoTokenizer

    tokenizer = VideoTokenizer(width=8, encoder_depth=1, decoder_depth=1, levels=[4, 3], side_px=16).eval()
    values = np.arange(8) % 12
    for known, filled in {3: [0, 1, 2, 1, 2, 1, 2, 1], 5: [0, 1, 2, 3, 4, 1, 2, 3], 8: range(8)}.items():
        found = tokenizer.preview(Codes(values[:known, None], (2, 2, 2)))
        assert found == tokenizer.decode(Codes(np.array(filled)[:, None] % 12, (2, 2, 2)))


def test_parts_are_decoded_only_when_looked_at(model: AnyToken, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []
    tokenizer = model.processor.tokenizers["image"]
    original = tokenizer.decode_batch
    monkeypatch.setattr(tokenizer, "decode_batch", lambda codes: looked.append(1) or original(codes))
    events, _ = collect(model.stream("a", "image", sizes={"image": (4, 2)}, seed=0))
    assert len(looked) == 1
    previews = [event for event in events if isinstance(event, SegmentPreview)]
    assert [preview.segment.pixels.shape for preview in previews] == [(32, 16, 3)] * 3
    assert len(looked) == 4


def test_a_tokenizer_that_cannot_stream_delivers_at_the_end(model: AnyToken) -> None:
    events, _ = collect(model.stream("a", "tone", seed=0))
    assert [type(event).__name__ for event in events] == ["SegmentStarted", "SegmentFinished", "Usage"]
    with pytest.raises(ValueError, match="lookahead"):
        model.processor.tokenizers["tone"].decode_span(Codes(np.zeros((2, 2))), 0, 1)


def cached_bytes() -> int:
    caches = [one for one in gc.get_objects() if issubclass(type(one), KVCache)]
    return sum(layer.nbytes for cache in caches for layer in cache.keys)


@pytest.mark.parametrize("cancel", ["close", "interrupt"])
def test_cancelling_frees_the_cache_at_once(
    model: AnyToken, monkeypatch: pytest.MonkeyPatch, cancel: str
) -> None:
    """Also while a traceback, as a notebook keeps it, still holds the frames of the loop."""
    gc.collect()
    before = cached_bytes()
    chat = model.chat()
    events = chat.stream("red apple", "image", seed=0)
    gc.disable()
    try:
        for _ in range(3):
            next(events)
        assert cached_bytes() > before
        if cancel == "close":
            events.close()
        else:
            original, steps = ModelRunner.features, iter([False, True])

            def interrupted(self: ModelRunner, *inputs: Any) -> torch.Tensor:
                features = original(self, *inputs)
                if next(steps):
                    raise KeyboardInterrupt
                return features

            monkeypatch.setattr(ModelRunner, "features", interrupted)
            with pytest.raises(KeyboardInterrupt) as held:
                finish(events)
            assert held.tb is not None
        assert cached_bytes() == before
        assert len(chat) == 0 and chat.ids == [model.token_space.bos]
    finally:
        gc.enable()


def test_errors_come_before_the_first_event(model: AnyToken) -> None:
    with pytest.raises(ValueError, match="smell"):
        model.stream("a", "smell")
