"""Training with FlashAttention: what the kernel is given, and that the losses are those of sdpa."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, modeling_flash_attention_utils

from anytoken.model import attention
from anytoken.training.config import (
    TrainConfig,
)
from anytoken.training.initialize import build_model, choose_attention
from anytoken.training.trainer import train
from anytoken.utils.errors import ConfigError

FLASH = "flash_attention_2"


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A stand-in for the kernel of packed samples, which is all that training may call; what it was given."""
    calls: list[dict[str, Any]] = []

    def varlen(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
        max_seqlen_q: int, max_seqlen_k: int, softmax_scale: float, causal: bool, dropout_p: float = 0.0,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:  # fmt: skip
        lengths = cu_seqlens_q.diff().tolist()
        assert causal and torch.equal(cu_seqlens_q, cu_seqlens_k) and cu_seqlens_q.dtype == torch.int32
        assert max_seqlen_q == max_seqlen_k == max(lengths) and sum(lengths) == len(q)
        calls.append({"dtypes": {q.dtype, k.dtype, v.dtype}, "device": q.device, "lengths": lengths})
        parts = zip(*(one[None].transpose(1, 2).split(lengths, 2) for one in (q, k, v)), strict=True)
        found = [
            F.scaled_dot_product_attention(*part, is_causal=True, scale=softmax_scale, enable_gqa=True)
            for part in parts
        ]
        return torch.cat(found, 2).transpose(1, 2)[0]

    process = modeling_flash_attention_utils._lazy_define_process_function(varlen)
    loaded = ((None, varlen, None, None, None), (process, None))
    monkeypatch.setattr(
        modeling_flash_attention_utils, "lazy_import_flash_attention", lambda *_, **__: loaded
    )
    monkeypatch.setattr(attention, "flash_obstacle", lambda *_: "")
    monkeypatch.setattr(
        PreTrainedModel, "_check_and_adjust_attn_implementation", lambda self, name, *_, **__: name
    )
    return calls


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_flash_trains_as_sdpa_does(
    recipe: dict[str, Any], tmp_path: Path, passed: list[dict[str, Any]], precision: str
) -> None:
    """Packed rows with the lengths of their samples, in the precision of the recipe; samples of the report too."""
    recipe |= {"steps": 3, "precision": precision}
    plain = train(TrainConfig.from_dict(recipe | {"attention": "sdpa", "output": str(tmp_path / "sdpa")}))
    assert not passed
    folder = train(TrainConfig.from_dict(recipe | {"attention": FLASH}))
    assert losses(folder) == pytest.approx(losses(plain), abs=1e-5 if precision == "fp32" else 2e-2)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert all(call["dtypes"] == {dtype} and call["device"].type == "cpu" for call in passed)
    assert all(len(call["lengths"]) > 3 for call in passed)
    assert json.loads((folder / "run.json").read_text())["attention"] == FLASH
    assert json.loads((plain / "run.json").read_text())["attention"] == "sdpa"


def test_auto_says_what_it_takes(recipe: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "anytoken")
    train(TrainConfig.from_dict(recipe | {"steps": 1}))
    [line] = [record.message for record in caplog.records if record.message.startswith("attention:")]
    assert line.startswith("attention: sdpa on ") and "no FlashAttention" in line


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (FLASH, r"precision fp32: flash_attention_2 cannot run here.*auto or sdpa"),
        ("flex_attention", "no backward pass on a CPU"),
        ("flash", r"attention must be 'auto', 'eager', 'sdpa', .*got 'flash'"),
    ],
)
def test_what_cannot_run_is_said_before_training(recipe: dict[str, Any], name: str, message: str) -> None:
    if torch.cuda.is_available() and name == "flex_attention":
        pytest.skip("it trains on a GPU")
    with pytest.raises(ConfigError, match=message):
        train(TrainConfig.from_dict(recipe | {"attention": name}))
    assert not (Path(recipe["output"]) / "metrics.jsonl").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"])
def test_losses_agree_on_a_gpu(recipe: dict[str, Any], tmp_path: Path, name: str) -> None:
    available = attention.FLASH.get(name, (lambda: True, ""))[0]
    if not available():
        pytest.skip(f"{name} is not installed")
    recipe |= {"steps": 4, "precision": "bf16"}
    plain = train(TrainConfig.from_dict(recipe | {"attention": "sdpa", "output": str(tmp_path / "sdpa")}))
    found = train(TrainConfig.from_dict(recipe | {"attention": name}))
    assert losses(found) == pytest.approx(losses(plain), abs=3e-2)


@pytest.mark.parametrize(
    ("wanted", "precision", "context", "expected"),
    [
        ("auto", "bf16", 256, "eager"), ("auto", "bf16", 1024, "sdpa"), ("auto", "fp32", 256, "sdpa"),
        ("sdpa", "bf16", 256, "sdpa"), ("eager", "fp32", 1024, "eager"),
    ],
)  # fmt: skip
def test_short_contexts_in_bf16_train_with_eager_attention_on_a_cpu(
    recipe: dict[str, Any], wanted: str, precision: str, context: int, expected: str
) -> None:
    sizes = {"context": context, "tokens_per_batch": 2048}
    stage = TrainConfig.from_dict(recipe | sizes | {"attention": wanted, "precision": precision})
    _, lm = build_model(stage)
    choose_attention(lm, stage, torch.device("cpu"))
    assert lm.config._attn_implementation == expected
