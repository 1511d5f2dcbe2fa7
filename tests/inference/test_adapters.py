"""Adapters that are switched at run time: each answers as PEFT's own model would, and the bare model comes back."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from anytoken import AnyToken
from anytoken.utils.errors import CheckpointError

IDS = torch.arange(3, 60)[None]
TABLES = {  # adapters of one of two tied tables, or of both
    "the embedding saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "the head saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "both saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "lora on the embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "lora on the head": {"target_modules": ["lm_head"]},
    "lora on both": {"target_modules": ["embed_tokens", "lm_head"]},
    "lora on both, tied": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "rows": {"target_modules": ["o_proj"], "trainable_token_indices": [5, 9]},
}


@pytest.fixture
def folder(toys: SimpleNamespace, tmp_path: Path) -> Path:
    return toys.make_model().save_pretrained(tmp_path / "model")


def make_adapter(folder: Path, to: Path, seed: int, **targets: object) -> Path:
    """A random adapter of the model in a folder."""
    wrapped = get_peft_model(AnyToken.from_pretrained(folder).lm, LoraConfig(r=2, **targets))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if any(part in name for part in ("lora_", "trainable_tokens", "modules_to_save")):
                parameter.add_(torch.randn_like(parameter) * 0.3)
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
    with pytest.raises(CheckpointError, match=r"'row' is in use.*use_adapter\(None\)"):
        model.save_pretrained(tmp_path / "merged")
    model.use_adapter(None)
    again = AnyToken.from_pretrained(model.save_pretrained(tmp_path / "bare"))
    assert torch.equal(again.lm(IDS).logits, plain)


def test_names_that_are_unknown_or_taken(folder: Path, tmp_path: Path) -> None:
    model = AnyToken.from_pretrained(folder)
    adapter = make_adapter(folder, tmp_path / "a", 1, target_modules=["q_proj"])
    model.load_adapter(adapter, "one")
    with pytest.raises(CheckpointError, match="already; there are one"):
        model.load_adapter(adapter, "one")
    with pytest.raises(CheckpointError, match="no adapter 'two'; there are one"):
        model.use_adapter("two")
    with pytest.raises(CheckpointError, match="not an adapter folder"):
        model.load_adapter(tmp_path, "three")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", TABLES)
@pytest.mark.parametrize("tied", [True, False])
def test_tied_tables_come_apart_and_together_again(
    toys: SimpleNamespace, tmp_path: Path, what: str, tied: bool
) -> None:
    made = toys.make_model()
    if not tied:
        made.lm.config.tie_word_embeddings = False
        made.lm.lm_head.weight = torch.nn.Parameter(made.lm.lm_head.weight.detach() * 0.5)
        made.lm.all_tied_weights_keys = {}
    folder = made.save_pretrained(tmp_path / "model")
    adapter = make_adapter(folder, tmp_path / "adapter", 1, **TABLES[what])
    theirs = PeftModel.from_pretrained(AnyToken.from_pretrained(folder).lm, adapter).eval()(IDS).logits
    model = AnyToken.from_pretrained(folder)
    plain, head = model.lm(IDS).logits, model.lm.lm_head.weight
    before = model.generate("a", "image", seed=0).ids
    model.load_adapter(adapter, "one")
    for _ in range(2):
        assert torch.equal(model.lm(IDS).logits, plain)
        model.use_adapter("one")
        torch.testing.assert_close(model.lm(IDS).logits, theirs, atol=1e-4, rtol=1e-4)
        with_adapter = model.generate("a", "image", seed=0).ids
        model.use_adapter(None)
    assert torch.equal(model.lm(IDS).logits, plain) and model.lm.lm_head.weight is head
    assert (model.lm.lm_head.weight is model.lm.get_input_embeddings().weight) == tied
    assert model.generate("a", "image", seed=0).ids == before
    merged = AnyToken.from_pretrained(folder, adapter=adapter)
    torch.testing.assert_close(merged.lm(IDS).logits, theirs, atol=1e-4, rtol=1e-4)
    saved = AnyToken.from_pretrained(merged.save_pretrained(tmp_path / "merged"))
    assert torch.equal(saved.lm(IDS).logits, merged.lm(IDS).logits)
    assert saved.generate("a", "image", seed=0).ids == with_adapter


def state(model: AnyToken) -> list[object]:
    """What a refused call must leave alone."""
    return [
        [type(module) for module in model.lm.modules()], model.adapters.active, model.adapters.names, model.kinds,
        model.lm(IDS).logits.flatten().tolist(), model.lm.config.to_dict(),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"hidden_size": 64},
            r"made for another model \(.*other\).*is \[2, 64\] in the adapter and \[2, 32\] in this",
        ),
        ({"num_hidden_layers": 4}, r"layers\.2\..*and absent in this model"),
        ({"num_hidden_layers": 1}, r"layers\.1\..*absent in the adapter and \[2, 32\]"),
    ],
)
def test_an_adapter_of_another_base_changes_nothing(
    toys: SimpleNamespace, folder: Path, tmp_path: Path, change: dict[str, int], message: str
) -> None:
    made = toys.make_model()
    config = made.lm.config.__class__(**{**made.lm.config.to_dict(), **change})
    other = AnyToken(type(made.lm)(config), made.processor).save_pretrained(tmp_path / "other")
    wrong = make_adapter(other, tmp_path / "wrong", 1, target_modules=["q_proj"])
    model = AnyToken.from_pretrained(folder)
    model.load_adapter(make_adapter(folder, tmp_path / "good", 2, target_modules=["q_proj"]), "good")
    for active in ("good", None):
        model.use_adapter(active)
        before = state(model)
        with pytest.raises(CheckpointError, match=message):
            model.load_adapter(wrong, "wrong")
        assert state(model) == before
    with pytest.raises(CheckpointError, match=message):
        AnyToken.from_pretrained(folder, adapter=wrong)


def test_rows_that_the_base_has_not_are_refused(folder: Path, toys: SimpleNamespace, tmp_path: Path) -> None:
    grown = toys.make_model()
    grown.add_modality(toys.HumTokenizer())
    last = grown.token_space.vocab_size - 1
    bigger = grown.save_pretrained(tmp_path / "bigger")
    adapter = make_adapter(
        bigger, tmp_path / "adapter", 1, target_modules=["o_proj"], trainable_token_indices=[last]
    )
    model = AnyToken.from_pretrained(folder)
    before = state(model)
    with pytest.raises(CheckpointError, match=r"does not fit this model"):
        model.load_adapter(adapter, "one")
    assert state(model) == before


def test_a_modality_of_a_refused_adapter_is_not_added(
    folder: Path, toys: SimpleNamespace, tmp_path: Path
) -> None:
    from anytoken.model.extend_vocab import save_modalities

    grown = AnyToken.from_pretrained(folder)
    grown.add_modality(toys.HumTokenizer())
    adapter = make_adapter(folder, tmp_path / "adapter", 1, target_modules=["q_proj"])
    save_modalities(adapter, grown.processor, ["hum"])
    model = AnyToken.from_pretrained(folder)
    plain = model.lm(IDS).logits
    weights = adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4])
    before = state(model)
    with pytest.raises(CheckpointError, match="truncated"):
        model.load_adapter(adapter, "one")
    assert state(model) == before
    weights.write_bytes(whole)
    model.load_adapter(adapter, "one")
    assert model.kinds[-1] == "hum" and torch.equal(model.lm(IDS).logits[..., : plain.shape[-1]], plain)
    model.use_adapter("one")
    assert not torch.equal(model.lm(IDS).logits[..., : plain.shape[-1]], plain)


def test_models_that_take_no_adapters_say_so(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    adapter = make_adapter(folder, tmp_path / "a", 1, target_modules=["q_proj"])
    small = AnyToken.from_pretrained(folder, quantize="int8")
    before = state(small)
    with pytest.raises(CheckpointError, match=r"quantized \(int8\).*adapter= and quantize="):
        small.load_adapter(adapter, "one")
    assert state(small) == before
    wrapped = AnyToken.from_pretrained(folder)
    wrapped.lm = PeftModel.from_pretrained(wrapped.lm, adapter)
    with pytest.raises(CheckpointError, match="merge_and_unload"):
        wrapped.load_adapter(adapter, "one")


def test_an_adapter_of_weights_that_have_changed_is_refused(folder: Path, tmp_path: Path) -> None:
    model = AnyToken.from_pretrained(folder)
    model.load_adapter(make_adapter(folder, tmp_path / "a", 1, target_modules=["q_proj"]), "one")
    projection = model.lm.model.layers[0].self_attn.q_proj.weight
    projection.data = projection.data * 0.9
    before = state(model)
    with pytest.raises(CheckpointError, match="changed since the adapter 'one' was read"):
        model.use_adapter("one")
    assert state(model) == before


def test_a_modality_is_added_under_an_adapter_that_stays(
    folder: Path, toys: SimpleNamespace, tmp_path: Path
) -> None:
    model = AnyToken.from_pretrained(folder)
    model.load_adapter(make_adapter(folder, tmp_path / "a", 1, **TABLES["the head saved"]), "one")
    plain = model.lm(IDS).logits
    model.use_adapter("one")
    adapted, size = model.lm(IDS).logits, plain.shape[-1]
    model.add_modality(toys.HumTokenizer())
    assert torch.equal(model.lm(IDS).logits[..., :size], adapted) and model.adapters.active == "one"
    model.use_adapter(None)
    assert torch.equal(model.lm(IDS).logits[..., :size], plain)
    assert model.lm.lm_head.weight is model.lm.get_input_embeddings().weight
