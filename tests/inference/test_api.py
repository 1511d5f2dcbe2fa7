"""The public API: every way to call generate, what a reply holds, and what is refused."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from anytoken.inference.api import AnyToken
from anytoken.inference.generation import _warn_of_copies
from anytoken.inference.outputs import GenerationOutput
from anytoken.inference.sampling import Sampling
from anytoken.segments import Image, Speech, Text
from anytoken.tokenizers.base import Codes
from anytoken.tokenizers.speech import SpeechTokenizer

COLD = {"temperature": 1e-6}
PICTURE = Image(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3))


def test_a_reply_holds_segments_ids_and_usage(model: AnyToken, toys: SimpleNamespace) -> None:
    reply = model.generate(
        [PICTURE, "What is this?"], output=["text", "image", "tone"], seed=0, max_new_tokens=60
    )
    assert [segment.kind for segment in reply.segments] == ["text", "image", "tone"]
    assert reply.text == reply.segments[0].text and reply.images == [reply.segments[1]]
    assert reply.of(toys.Tone) == [reply.segments[2]] and reply.speech == reply.videos == reply.dna == []
    assert model.detokenize(reply.ids) == reply.segments
    assert reply.usage.new_tokens == len(reply.ids) == sum(reply.usage.tokens.values())
    assert set(reply.usage.tokens) == {"text", "image", "tone"}
    rows, cols = (side // 8 for side in reply.images[0].pixels.shape[:2])
    assert reply.usage.tokens["image"] == rows * cols
    assert reply.usage.prompt_tokens == len(model.encode_prompt([PICTURE, "What is this?"]))
    assert reply.usage.seconds > 0 and reply.usage.tokens_per_second > 0
    assert "data:image/png" in reply._repr_html_() and "Tone" in reply._repr_html_()


@pytest.mark.parametrize(
    "prompt",
    [
        "red apple",
        PICTURE,
        ["red", PICTURE, "and", PICTURE],
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "what?"}],
            }
        ],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "red apple"}],
    ],
)
@pytest.mark.parametrize("output", [None, "text", "image", ["tone", "image"]])
def test_every_form_of_prompt_and_output(model: AnyToken, prompt: Any, output: Any) -> None:
    reply = model.generate(prompt, output=output, seed=1, max_new_tokens=40)
    assert isinstance(reply, GenerationOutput)
    if output is not None:
        wanted = [output] if isinstance(output, str) else output
        assert [segment.kind for segment in reply.segments] == wanted


def test_batch_equals_single_and_num_return_varies(model: AnyToken) -> None:
    prompts = ["red apple", [PICTURE, "What is this?"], "a"]
    together = model.generate(prompts, "image", batch=True, num_return=2, seed=7)
    for prompt, group in zip(prompts, together, strict=True):
        alone = model.generate(prompt, "image", num_return=2, seed=7)
        assert [reply.ids for reply in alone] == [reply.ids for reply in group]
        assert group[0].ids == model.generate(prompt, "image", seed=7).ids != group[1].ids
        assert alone[0].segments == group[0].segments


def test_without_a_seed_equal_prompts_differ(model: AnyToken) -> None:
    """With one, each prompt of a batch gets the reply it would get alone."""
    options = {"sizes": {"image": (2, 2)}, "temperature": 2.0, "top_k": 0}
    prompts = ["red apple"] * 4
    for _ in range(2):
        batch = model.generate(prompts, "image", batch=True, **options)
        assert len({tuple(reply.ids) for reply in batch}) == 4
        batch = model.generate(prompts, "image", batch=True, num_return=2, **options)
        assert len({tuple(reply.ids) for group in batch for reply in group}) == 8
    ids = model.encode_prompt("red apple")
    assert len({tuple(reply.ids) for reply in model.generate_ids([ids] * 4, "image", **options)}) == 4
    alone = model.generate("red apple", "image", seed=5, **options).ids
    assert [r.ids for r in model.generate(prompts, "image", batch=True, seed=5, **options)] == [alone] * 4
    assert [r.ids for r in model.generate_ids([ids] * 4, "image", seed=5, **options)] == [alone] * 4
    drawn = model.generate_ids([ids] * 2, "image", sample_indices=[0, 1], seed=5, **options)
    assert drawn[0].ids == alone != drawn[1].ids
    with pytest.warns(FutureWarning, match="rows of .*generate_ids is now sample_indices"):
        renamed = model.generate_ids([ids] * 2, "image", rows=[0, 1], seed=5, **options)
    assert [one.ids for one in renamed] == [one.ids for one in drawn]


def test_several_greedy_replies_are_never_silent_copies(
    own_model: AnyToken, caplog: pytest.LogCaptureFixture
) -> None:
    for options in ({"temperature": 0}, {"top_k": 1}, {"sampling": {"image": {"temperature": 0}}}):
        for many in ({"num_return": 2}, {"best_of": 3}):
            with pytest.raises(ValueError, match=r"[23] copies: image is decoded greedily.*temperature=1"):
                own_model.generate("a", "image", **many, **options)
    own_model.sampling = {"text": Sampling(temperature=0), "image": Sampling(temperature=0)}
    with pytest.raises(ValueError, match="text, image is decoded"):
        own_model.generate("a", ["text", "image"], num_return=2, max_new_tokens=80)
    _warn_of_copies.cache_clear()
    for _ in range(2):  # the tone could differ, but is at a temperature that leaves no choice
        own_model.generate("a", ["text", "tone"], num_return=2, max_new_tokens=40, sampling={"tone": COLD})
    assert [record.message for record in caplog.records if "replies are equal" in record.message][1:] == []
    assert "All 2 replies are equal" in caplog.text


def test_best_of_by_likelihood(model: AnyToken) -> None:
    """The likeliest of the same replies that num_return gives, best first, in a batch too."""
    options = {"seed": 3, "sizes": {"image": (2, 2)}, "temperature": 2.0}
    every = model.generate("red apple", "image", num_return=5, **options)
    prompt, grammar = model.encode_prompt("red apple"), model.processor.grammar

    @torch.no_grad()
    def likelihood(reply: GenerationOutput) -> float:
        logits = model.lm(torch.tensor([prompt + reply.ids])).logits[0, len(prompt) - 1 : -1]
        state, total = grammar.reply(("image",), sizes=options["sizes"]), 0.0
        for token, row in zip(reply.ids, logits, strict=True):
            allowed = grammar.mask(grammar.allowed(state))
            total += row[: len(allowed)].masked_fill(~allowed, -torch.inf).log_softmax(-1)[token].item()
            state = grammar.advance(state, token)
        return total / len(reply.ids)

    ranked = [reply.ids for reply in sorted(every, key=likelihood, reverse=True)]
    assert model.generate("red apple", "image", best_of=5, **options).ids == ranked[0] != every[0].ids
    two = model.generate(["a", "red apple"], "image", batch=True, best_of=5, num_return=2, **options)[1]
    assert [reply.ids for reply in two] == ranked[:2]


def test_best_of_by_a_callable(model: AnyToken) -> None:
    every = model.generate("a", "text", num_return=4, seed=0, max_new_tokens=30)
    best = model.generate(
        "a", "text", best_of=4, rerank=lambda reply: -len(reply.text), seed=0, max_new_tokens=30
    )
    assert best.ids == min(every, key=lambda reply: len(reply.text)).ids


def test_sampling_per_kind_and_for_all(model: AnyToken, toys: SimpleNamespace) -> None:
    greedy = model.generate("a", ["tone", "image"], temperature=0).ids
    assert model.generate("a", ["tone", "image"], temperature=0, seed=9).ids == greedy
    mixed = [
        model.generate(
            "a", ["tone", "image"], temperature=0, sampling={"image": {"temperature": 1.5}}, seed=seed
        )
        for seed in range(3)
    ]
    assert all(reply.of(toys.Tone) == mixed[0].of(toys.Tone) for reply in mixed)
    assert len({tuple(reply.ids) for reply in mixed}) > 1
    guided = model.generate("a", "image", temperature=0, cfg_scale=4.0)
    assert guided.ids != model.generate("a", "image", temperature=0).ids


def test_defaults_of_the_checkpoint_count(own_model: AnyToken) -> None:
    own_model.sampling = {kind: Sampling(temperature=0) for kind in own_model.kinds}
    assert own_model.generate("a", "tone", seed=1).ids == own_model.generate("a", "tone", seed=2).ids
    assert own_model.generate("a", "tone", seed=1).ids == own_model.generate("a", "tone", temperature=0).ids


def test_sizes_pin_a_grid(model: AnyToken) -> None:
    assert model.generate("a", "image", sizes={"image": (2, 1)}, seed=0).images[0].pixels.shape == (16, 8, 3)


def test_text_alone_has_a_sensible_limit(toys: SimpleNamespace) -> None:
    long = toys.make_model(context=600)
    reply = long.generate("a", "text", seed=0)
    assert len(reply.ids) <= 257


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "smell"}, "'smell'.*text, image, tone"),
        ({"output": "images"}, "'images'.*did you mean 'image'"),
        ({"output": ["text", "imgae"]}, "'imgae'.*did you mean 'image'"),
        ({"output": []}, "empty"),
        ({"output": 3}, "3"),
        ({"temprature": 1}, "'temprature'.*did you mean 'temperature'"),
        ({"temperature": -1}, "temperature.*-1"),
        ({"num_return": 0}, "num_return"),
        ({"num_return": "2"}, "num_return.*'2'"),
        ({"best_of": 0}, "best_of.*0"),
        ({"best_of": 2, "num_return": 3}, "best_of=2.*num_return=3"),
        ({"rerank": len}, "best_of"),
        ({"min_p": 2}, "min_p.*2"),
        ({"max_new_tokens": "9"}, "max_new_tokens.*'9'"),
        ({"sizes": {"image": 3}}, "sizes.*3"),
        ({"sampling": Sampling()}, "sampling is.*received Sampling"),
        ({"sampling": {"image": 3}}, "image.*3"),
        ({"max_new_tokens": 0}, "max_new_tokens.*0"),
        ({"seed": -3}, "seed.*-3"),
        ({"sampling": {"smell": Sampling()}}, "'smell'"),
        ({"batch": True}, "list of prompts"),
        ({"output": "image", "max_new_tokens": 4}, "4"),
    ],
)
def test_bad_requests_say_what_is_allowed(model: AnyToken, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate("red apple", **options)


@pytest.mark.parametrize("prompt", [None, 3, [], "", [None], [{"role": "judge", "content": "x"}]])
def test_bad_prompts_are_value_errors(model: AnyToken, prompt: Any) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        model.generate(prompt, "text")


def test_a_segment_outside_its_shape_is_a_value_error(model: AnyToken, toys: SimpleNamespace) -> None:
    for segment in (toys.Tone([(1, 1)]), toys.Hum([(1, 1)] * 2)):  # too short; a kind the model lacks
        with pytest.raises(ValueError, match=segment.kind):
            model.generate(segment, "text")


def test_prompt_longer_than_the_context(model: AnyToken) -> None:
    with pytest.raises(ValueError, match="context"):
        model.generate("xyz " * 200, "text")


@pytest.mark.parametrize("ids", [[], [10**9], [-1], [1.5], ["a"], [True], np.zeros(0, int)])
def test_prompts_of_no_ids_or_bad_ones_are_value_errors(model: AnyToken, ids: Any) -> None:
    with pytest.raises(ValueError, match=r"prompt is empty|whole numbers from 0 to"):
        model.generate_ids([[0, 1], ids], "text", max_new_tokens=4)
    with pytest.raises(ValueError, match=r"prompt is empty|whole numbers from 0 to"):
        next(model.stream_ids(ids, "text", max_new_tokens=4))
    assert model.generate_ids([], "text") == []


@pytest.mark.parametrize("ids", [[10**9], [-1], [1.5], ["a"], [[1]], 5, None])
def test_bad_ids_are_value_errors(model: AnyToken, ids: Any) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        model.detokenize(ids)


def test_ids_that_stop_inside_a_picture_are_a_value_error(model: AnyToken) -> None:
    with pytest.raises(ValueError, match="image"):
        model.detokenize([model.token_space.open_token("image")])


def test_added_modality_moves_nothing(own_model: AnyToken, toys: SimpleNamespace) -> None:
    space = own_model.token_space
    before = {
        "names": [space.token_name(token) for token in range(space.vocab_size)],
        "greedy": own_model.generate("red apple", ["text", "image"], temperature=0, max_new_tokens=50).ids,
    }
    ids = torch.tensor([own_model.encode_prompt("red apple")])
    with torch.no_grad():
        old_logits = own_model.lm(ids).logits
    own_model.add_modality(toys.HumTokenizer())
    with torch.no_grad():
        new_logits = own_model.lm(ids).logits
    space, old = own_model.token_space, len(before["names"])
    assert (
        own_model.kinds == ["text", "image", "tone", "hum"] and space.vocab_size == new_logits.shape[-1] > old
    )
    assert torch.equal(new_logits[..., :old], old_logits)
    assert [space.token_name(token) for token in range(old)] == before["names"]
    again = own_model.generate("red apple", ["text", "image"], temperature=0, max_new_tokens=50).ids
    assert again == before["greedy"]
    reply = own_model.generate("red apple", "hum", seed=0)
    assert [segment.kind for segment in reply.segments] == ["hum"]
    assert own_model.lm.config.vocab_size == space.vocab_size


def test_added_rows_come_from_the_codebook(own_model: AnyToken, toys: SimpleNamespace) -> None:
    """Codes that are near in the codebook get near rows, at the scale of the rows there are."""

    class Graded(toys.HumTokenizer):
        def codebook_vectors(self, codebook: int = 0) -> torch.Tensor:
            return torch.arange(float(self.codebook_sizes[codebook]))[:, None].expand(-1, 4).contiguous()

    old = own_model.lm.get_input_embeddings().weight.clone()
    own_model.add_modality(Graded())
    span = own_model.token_space.code_range("hum", 0)
    rows = own_model.lm.get_input_embeddings().weight[span.start : span.stop]
    assert torch.dist(rows[0], rows[1]) < torch.dist(rows[0], rows[6])
    assert 0.2 < rows.std() / old.std() < 5


@pytest.mark.parametrize("tied", [True, False])
def test_added_ids_take_a_small_share_until_they_are_trained(
    own_model: AnyToken, toys: SimpleNamespace, tied: bool
) -> None:
    """Less than their number would, also where the embedding spreads far more than the head."""
    lm, size = own_model.lm, own_model.token_space.vocab_size
    if not tied:
        lm.config.tie_word_embeddings, lm.all_tied_weights_keys = False, {}
        lm.lm_head.weight = torch.nn.Parameter(lm.lm_head.weight.detach().clone())
        lm.get_input_embeddings().weight.data *= 30
    lm.model.norm.weight.data *= 3  # as confident as a trained model
    ids = torch.tensor([own_model.encode_prompt("What is this? red apple")])
    before = lm(ids).logits
    own_model.add_modality(toys.HumTokenizer())
    tables = [lm.get_input_embeddings().weight, lm.lm_head.weight]
    assert (tables[0] is tables[1]) == tied
    logits = lm(ids).logits
    assert torch.equal(logits[..., :size], before)
    added = logits.shape[-1] - size
    assert logits.softmax(-1)[..., size:].sum(-1).max() < added / size
    for table in tables:
        assert 0.1 < table[size:].std() / table[:size].std() < 1.5


def test_the_rows_of_global_codes_come_from_their_vectors_and_they_are_exchanged(own_model: AnyToken) -> None:
    class Voiced(SpeechTokenizer):
        def global_vectors(self) -> torch.Tensor:
            return torch.arange(64.0)[:, None].expand(-1, 4).contiguous()

    torch.manual_seed(0)
    tokenizer = Voiced(8, 1, 1, levels=[5, 5, 4], max_frames=20, num_global_codes=3).eval()
    own_model.add_modality(tokenizer)
    span = own_model.token_space.global_range("speech")
    rows = own_model.lm.get_input_embeddings().weight[span.start : span.stop]
    assert len(rows) == 64 and torch.dist(rows[0], rows[1]) < torch.dist(rows[0], rows[63])
    reply = own_model.generate("a", "speech", seed=0)
    assert own_model.detokenize(own_model.tokenize(reply.speech[0]))[0].kind == "speech"
    low, high = (Speech(np.sin(np.arange(6_400) * pitch).astype(np.float32)) for pitch in (0.05, 0.3))
    swapped = own_model.swap_global(low, high)
    one, other = tokenizer.encode(low), tokenizer.encode(high)
    assert swapped == tokenizer.decode(Codes(one.values, header=other.header))
    with pytest.raises(ValueError, match="two segments of one kind; received speech and image"):
        own_model.swap_global(low, PICTURE)
    with pytest.raises(ValueError, match=r"image tokenizer.*no global codes to exchange"):
        own_model.swap_global(PICTURE, PICTURE)
    with pytest.raises(ValueError, match="No tokenizer for 'text'"):
        own_model.swap_global(Text("a"), Text("b"))


def test_what_is_no_tokenizer_is_not_added(own_model: AnyToken) -> None:
    with pytest.raises(ValueError, match=r"ModalityTokenizer.*'hum'"):
        own_model.add_modality("hum")  # type: ignore[arg-type]
    assert own_model.kinds == ["text", "image", "tone"]


def test_a_modality_is_added_once(own_model: AnyToken, toys: SimpleNamespace) -> None:
    size = own_model.token_space.vocab_size
    with pytest.raises(ValueError, match="tone"):
        own_model.add_modality(toys.ToneTokenizer())
    assert own_model.token_space.vocab_size == own_model.lm.config.vocab_size == size
    assert own_model.generate("a", "tone", seed=0).of(toys.Tone)


def test_text_of_two_segments_is_joined() -> None:
    reply = GenerationOutput([Text("a "), PICTURE, Text("b")], [], None, "stop")  # type: ignore[arg-type]
    assert reply.text == "a b" and reply.images == [PICTURE]
