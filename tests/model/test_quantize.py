"""int8 weights: what is quantised, how near the answers stay, how much memory is saved."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import anytoken
from anytoken import AnyToken
from anytoken.model.quantize import (
    quantize_weights,
    weight_bytes,
)
from anytoken.utils.errors import CheckpointError, ConfigError

pytest.importorskip("torchao")
Make = Callable[..., AnyToken]


def test_logits_stay_near_and_memory_shrinks(make_whole_model: Make, tmp_path: Path) -> None:
    folder = make_whole_model(shared_expert_intermediate_size=32).save_pretrained(tmp_path / "model")
    whole, small = (anytoken.load(folder, "cpu", quantize=kind) for kind in (None, "int8"))
    ids = torch.randint(300, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, got = whole.lm(ids).logits, small.lm(ids).logits
    assert 0 < (got - expected).norm() / expected.norm() < 0.05
    quantised = {name for name, p in small.lm.named_parameters() if hasattr(p, "tensor_data_names")}
    assert all(
        word in " ".join(quantised)
        for word in ("experts.gate_up_proj.3", "shared_expert", "q_proj", "o_proj")
    )
    kept = [p for name, p in small.lm.named_parameters() if name not in quantised]
    assert max(p.numel() for p in kept[1:]) == 4 * 32  # but for the embedding, norms and routers
    total, whole_kept = (sum(p.numel() for p in some) for some in (whole.lm.parameters(), kept))
    rows = sum(len(small.lm.get_parameter(name)) for name in quantised)
    assert weight_bytes(whole.lm) == 4 * total
    assert weight_bytes(small.lm) == 4 * whole_kept + (total - whole_kept) + 4 * rows
    assert len(small.generate("red", "image", seed=0).images) == 1


def test_a_quantised_model_is_not_saved(make_whole_model: Make, tmp_path: Path) -> None:
    model = make_whole_model()
    quantize_weights(model.lm, "int8")
    with pytest.raises(CheckpointError, match="without quantize"):
        model.save_pretrained(tmp_path / "no")
    assert not list(tmp_path.iterdir())


def test_an_unknown_kind_is_refused(make_whole_model: Make) -> None:
    with pytest.raises(ConfigError, match=r"one of int8.*'int3'"):
        quantize_weights(make_whole_model().lm, "int3")
