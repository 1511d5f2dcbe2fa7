"""Noise on codes that a model reads: how much, where, and that targets stay exact."""

import copy
from typing import Any

import pytest
import torch

from anytoken.token_space import TokenSpace
from anytoken.tokenizers.base import CodeSequence
from anytoken.training.config import TrainConfig
from anytoken.training.context_noise import ContextNoise
from anytoken.training.trainer import StageTrainer, train
from anytoken.utils.errors import ConfigError

SPACE = TokenSpace(40)
SPACE.append_modality("beep", [500, 30], CodeSequence(1, 9, 2))
SPACE.append_modality("tile", [70], CodeSequence(1, 9))


def test_the_share_of_a_modality_is_replaced_within_its_codebook() -> None:
    torch.manual_seed(0)
    noise = ContextNoise(SPACE, {"beep": 0.25}).train()
    for book in (0, 1):
        span = SPACE.code_range("beep", book)
        ids = torch.arange(span.start, span.stop).repeat(20_000 // len(span))
        noisy = noise(ids)
        assert noisy.min() == span.start and noisy.max() == span.stop - 1
        changed = (noisy != ids).double().mean().item()
        assert changed == pytest.approx(0.25 * (1 - 1 / len(span)), abs=0.02)
        assert (
            noisy[noisy != ids].bincount()[span.start :].double().std()
            < 0.5 * len(ids) * 0.25 / len(span) ** 0.5
        )


def test_nothing_else_changes() -> None:
    codes = [SPACE.code_range("beep", book) for book in (0, 1)]
    others = torch.tensor(
        [one for one in range(SPACE.vocab_size) if not any(s.start <= one < s.stop for s in codes)]
    )
    noise = ContextNoise(SPACE, {"beep": 0.99})
    assert torch.equal(noise.train()(others), others)
    everything = torch.arange(SPACE.vocab_size)
    assert torch.equal(noise.eval()(everything), everything)
    assert not noise.state_dict()


def test_an_unknown_modality_is_an_error() -> None:
    with pytest.raises(ConfigError, match="context_noise names smell; the model's modalities are beep, tile"):
        ContextNoise(SPACE, {"smell": 0.1})


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_outside_its_range_is_an_error(recipe: dict[str, Any], share: float) -> None:
    with pytest.raises(ConfigError, match=r"context_noise\.tile"):
        TrainConfig.from_dict(copy.deepcopy(recipe) | {"context_noise": {"tile": share}})


def test_the_model_reads_noise_and_learns_exact_targets(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    inner = StageTrainer.compute_loss

    def spy(
        self: StageTrainer, model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        keep = model.lm.model.embed_tokens.register_forward_pre_hook(
            lambda _, read: seen.append((inputs, read[0]))
        )
        loss = inner(self, model, inputs, *args, **kwargs)
        keep.remove()
        return loss

    monkeypatch.setattr(StageTrainer, "compute_loss", spy)
    train(TrainConfig.from_dict(recipe | {"steps": 2, "context_noise": {"tile": 0.5}}))
    assert len(seen) == 2
    for inputs, read in seen:
        exact = inputs["input_ids"]
        assert (read != exact).any()
        following = exact.flatten()[inputs["loss_index"] + 1]
        assert torch.equal(following, inputs["targets"])
