"""What holds for every test: no network, and one math thread a process, as `make test` runs two processes."""

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported, so before any test module
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# For batteries.py, built_sets.py and reference_loop.py; at the end, or tests/data would shadow a package.
sys.path.append(str(Path(__file__).parent))
pytest.register_assert_rewrite("batteries")
pytest_plugins = ["built_sets"]


@pytest.fixture(autouse=True)
def one_math_thread() -> None:
    """A test that computes on more leaves no other's last bits to chance."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def save_tiny() -> Callable[..., Path]:
    """A function that saves a random model of text and the kinds of these tokenizers as a checkpoint folder."""

    def save(folder: Path, tokenizers: Mapping[str, Any], context: int) -> Path:
        import torch

        from anytoken import AnyToken
        from anytoken.model.configuration import AnyTokenConfig
        from anytoken.model.modeling import AnyTokenForCausalLM
        from anytoken.processor import Processor
        from anytoken.token_space import TokenSpace
        from anytoken.tokenizers.text import TextTokenizer

        torch.manual_seed(0)
        text = TextTokenizer.train(["a red apple", "what is this?"], 280)
        space = TokenSpace(text.vocab_size)
        for kind, tokenizer in tokenizers.items():
            space.append_modality(
                kind, tokenizer.eval().codebook_sizes, tokenizer.shape, tokenizer.global_codebook_size
            )
        config = AnyTokenConfig.from_token_space(
            space,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=16,
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=0,
            max_position_embeddings=context,
        )
        lm = AnyTokenForCausalLM(config).eval()
        return AnyToken(lm, Processor(space, text, dict(tokenizers))).save_pretrained(folder)

    return save
