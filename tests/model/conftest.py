"""A tiny model of text and pictures, whole with its tokenizers, under any settings."""

from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from anytoken.inference.api import AnyToken
from anytoken.model.configuration import AnyTokenConfig
from anytoken.model.modeling import AnyTokenForCausalLM
from anytoken.processor import Processor
from anytoken.segments import Segment
from anytoken.token_space import TokenSpace
from anytoken.tokenizers.base import CodeGrid, ModalityTokenizer, register_modality
from anytoken.tokenizers.image import ImageTokenizer
from anytoken.tokenizers.text import TextTokenizer


def whole_model(
    seed: int = 0, texts: tuple[str, ...] = ("a red apple", "what is this?"), **settings: object
) -> AnyToken:
    """A random model; `seed` is its weights', never its tokenizers'."""
    text = TextTokenizer.train(texts, 280)
    torch.manual_seed(0)
    image = ImageTokenizer(
        width=8, encoder_depth=1, decoder_depth=1, refine_width=4, refine_depth=1, levels=[4, 3], side_px=16
    ).eval()
    space = TokenSpace(text.vocab_size)
    space.append_modality("image", image.codebook_sizes, image.shape)
    tiny = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
        "intermediate_size": 32, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2,
        "max_position_embeddings": 128, "initializer_range": 0.2,
    }  # fmt: skip
    config = AnyTokenConfig.from_token_space(
        space,
        **{**tiny, **settings},
    )
    torch.manual_seed(seed)
    return AnyToken(AnyTokenForCausalLM(config).eval(), Processor(space, text, {"image": image}))


@pytest.fixture(scope="session")
def make_whole_model() -> Callable[..., AnyToken]:
    """`whole_model`, for tests."""
    return whole_model


class Board(Segment):
    """A modality that is added later."""

    kind: ClassVar[str] = "board"


@register_modality
class BoardTokenizer(ModalityTokenizer):
    """Grids of up to 4 x 4 codes."""

    kind = "board"
    segment_type = Board

    def __init__(self) -> None:
        super().__init__(shape=CodeGrid(("rows", "cols"), (1, 1), (4, 4)), codebook_sizes=[6], config={})

    def codebook_vectors(self, codebook: int = 0) -> Tensor:
        return torch.eye(6)


@pytest.fixture
def grid_tokenizer() -> ModalityTokenizer:
    """A tokenizer of a modality that `whole_model` lacks."""
    return BoardTokenizer()
