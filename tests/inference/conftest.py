"""A tiny world for the inference tests: text, pictures, tones of two codebooks, and a random model."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from anytoken.inference.api import AnyToken
from anytoken.inference.model_runner import ModelRunner
from anytoken.inference.sampling import Sampling
from anytoken.model.configuration import AnyTokenConfig
from anytoken.model.embedding_head import EmbeddingHead
from anytoken.model.modeling import AnyTokenForCausalLM
from anytoken.processor import Processor
from anytoken.segments import Segment
from anytoken.token_space import TokenSpace
from anytoken.tokenizers.base import Codes, CodeSequence, ModalityTokenizer, register_modality
from anytoken.tokenizers.image import ImageTokenizer
from anytoken.tokenizers.text import TextTokenizer


class Tone(Segment):
    """A plug-in kind: a list of pairs of numbers, kept in a text file."""

    kind: ClassVar[str] = "tone"

    def __init__(self, pairs: Any) -> None:
        self.pairs = [tuple(int(n) for n in pair) for pair in pairs]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tone) and self.pairs == other.pairs

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def open(cls, source: Any) -> "Tone":
        return cls([pair.split(",") for pair in Path(source).read_text().split()])

    def save(self, path: Any) -> Any:
        Path(path).write_text(" ".join(f"{a},{b}" for a, b in self.pairs))
        return path


@register_modality
class ToneTokenizer(ModalityTokenizer):
    """Two to five frames of two codebooks; lossless."""

    kind = "tone"
    segment_type = Tone

    def __init__(self, books: int = 2) -> None:
        super().__init__(
            shape=CodeSequence(2, 5, num_codebooks=2), codebook_sizes=[7, 5], config={"books": books}
        )

    def encode(self, segment: Segment) -> Codes:
        self.check_segment(segment)
        return Codes(np.array(segment.pairs))

    def decode(self, codes: Codes) -> Segment:
        self.check_codes(codes)
        return Tone(codes.values)

    def codebook_vectors(self, codebook: int = 0) -> Tensor:
        return torch.eye(self.codebook_sizes[codebook])


class Hum(Tone):
    """A modality that is added later."""

    kind: ClassVar[str] = "hum"


@register_modality
class HumTokenizer(ToneTokenizer):
    """The same shape under another name."""

    kind = "hum"
    segment_type = Hum

    def decode(self, codes: Codes) -> Segment:
        return Hum(codes.values)


def make_image_tokenizer() -> ImageTokenizer:
    torch.manual_seed(0)
    return ImageTokenizer(
        width=8, encoder_depth=1, decoder_depth=1, refine_width=4, refine_depth=1, levels=[4, 3], side_px=16
    ).eval()


def make_model(seed: int = 0, context: int = 256, **settings: Any) -> AnyToken:
    """A random model whose logits are spread enough that greedy choices are not ties."""
    text = TextTokenizer.train(["red apple", "green pear", "What is this? Ein Apfel, schön"], 300)
    space = TokenSpace(text.vocab_size)
    tokenizers: dict[str, ModalityTokenizer] = {"image": make_image_tokenizer(), "tone": ToneTokenizer()}
    for kind, tokenizer in tokenizers.items():
        space.append_modality(kind, tokenizer.codebook_sizes, tokenizer.shape)
    torch.manual_seed(seed)
    config = AnyTokenConfig.from_token_space(
        space,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=16,
        max_position_embeddings=context,
        initializer_range=0.2,
        **settings,
    )
    lm = AnyTokenForCausalLM(config).eval()
    return AnyToken(lm, Processor(space, text, tokenizers), {"image": Sampling(temperature=1.0, top_k=8)})


@pytest.fixture(scope="session")
def model() -> AnyToken:
    """The shared model; tests must not change it."""
    return make_model()


@pytest.fixture(scope="session")
def toys() -> SimpleNamespace:
    """The toy classes and `make_model`, for tests that need their own."""
    return SimpleNamespace(
        make_model=make_model, Tone=Tone, ToneTokenizer=ToneTokenizer, Hum=Hum, HumTokenizer=HumTokenizer
    )


@pytest.fixture
def own_model() -> AnyToken:
    """A model that a test may change."""
    return make_model()


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many ids each forward pass of the model is given, as they come."""
    counts: list[int] = []
    original = ModelRunner.features

    def features(self: ModelRunner, ids: list[list[int]], *rest: Any) -> torch.Tensor:
        counts.append(sum(map(len, ids)))
        return original(self, ids, *rest)

    monkeypatch.setattr(ModelRunner, "features", features)
    return counts


@pytest.fixture
def searcher(own_model: AnyToken) -> AnyToken:
    """The random model with a random embedding head for text and images."""
    torch.manual_seed(0)
    own_model.embedding_heads[None] = EmbeddingHead(32, ["text", "image"], 12, widths=[8])
    return own_model
