"""Adapters that are switched at run time: each answers as PEFT's own model would, and the bare model comes back."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from anytoken import AnyToken
from anytoken.inference.adapters import AdapterError
from anytoken.inference.checkpoint import CheckpointError

IDS = torch.arange(3, 60)[None]


@pytest.fixture
def folder(toys: SimpleNamespace, tmp_path: Path) -> Path:
    return toys.make_model().save_pretrained(tmp_path / "model")


def make_adapter(folder: Path, to: Path, seed: int, **targets: object) -> Path:
    """A random adapter of the model in a folder."""
    wrapped = get_peft_model(AnyToken.from_pretrained(folder).lm, LoraConfig(r=2, **targets))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "trainable_tokens" in name:
                parameter.normal_(std=0.3)
    wrapped.save_pretrained(to)
    return to


def test_adapters_are_switched_and_taken_off(folder: Path, tmp_path: Path) -> None:
    model = AnyToken.from_pretrained(folder)
    token = model.token_space.open_token("image")
    adapters = {
        "attention": make_adapter(folder, tmp_path / "a", 1, target_modules=["q_proj", "v_proj"]),
        "experts": make_adapter(
            folder, tmp_path / "b", 2, target_modules=[], target_parameters=["mlp.experts.down_proj"]
        ),
        "row": make_adapter(
            folder, tmp_path / "c", 3, target_modules=["o_proj"], trainable_token_indices=[token]
        ),
    }
    plain = model.lm(IDS).logits
    for name, path in adapters.items():
        model.load_adapter(path, name)
        assert torch.equal(model.lm(IDS).logits, plain)  # nothing changes before it is used
    assert model.adapters.names == list(adapters)
    for name in ("row", "attention", "experts", "attention", "row"):
        model.use_adapter(name)
        theirs = PeftModel.from_pretrained(AnyToken.from_pretrained(folder).lm, adapters[name]).eval()
        torch.testing.assert_close(model.lm(IDS).logits, theirs(IDS).logits, atol=1e-4, rtol=1e-4)
        assert not torch.equal(model.lm(IDS).logits, plain)
    with_row = model.generate("a", "image", seed=0).ids
    model.use_adapter(None)
    assert torch.equal(model.lm(IDS).logits, plain) and model.adapters.active is None
    model.use_adapter("row")
    assert model.generate("a", "image", seed=0).ids == with_row
    assert AnyToken.from_pretrained(model.save_pretrained(tmp_path / "merged")).kinds == model.kinds


def test_names_that_are_unknown_or_taken(folder: Path, tmp_path: Path) -> None:
    model = AnyToken.from_pretrained(folder)
    adapter = make_adapter(folder, tmp_path / "a", 1, target_modules=["q_proj"])
    model.load_adapter(adapter, "one")
    with pytest.raises(AdapterError, match="already; there are one"):
        model.load_adapter(adapter, "one")
    with pytest.raises(AdapterError, match="no adapter 'two'; there are one"):
        model.use_adapter("two")
    with pytest.raises(CheckpointError, match="no adapter folder"):
        model.load_adapter(tmp_path, "three")
