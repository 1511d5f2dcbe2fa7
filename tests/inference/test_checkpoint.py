"""Checkpoint folders: written whole, read back the same, refused when damaged."""

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from anytoken.inference.api import AnyToken, load
from anytoken.inference.checkpoint import (
    find_checkpoint,
    pick_device,
)
from anytoken.utils.errors import CheckpointError

MINI_GOLDEN = Path(__file__).parents[1] / "goldens" / "mini.safetensors"


@pytest.fixture(scope="module")
def folder(toys: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = toys.make_model()
    model.card = "# A card\n"
    return model.save_pretrained(tmp_path_factory.mktemp("models") / "tiny")


def test_saved_and_loaded_answer_the_same(folder: Path, toys: SimpleNamespace) -> None:
    first, second = toys.make_model(), AnyToken.from_pretrained(folder, device="cpu")
    assert second.sampling == first.sampling and second.card == "# A card\n"
    assert second.token_space == first.token_space
    for output in ("text", ["tone", "image"], None):
        options = {"seed": 3, "max_new_tokens": 40}
        old, new = first.generate("a", output, **options), second.generate("a", output, **options)
        assert old.ids == new.ids and old.segments == new.segments


@pytest.mark.gpu
@pytest.mark.parametrize("output", ["text", "image"])
def test_mini_answers_on_a_gpu_as_on_the_cpu(output: str) -> None:
    """In float32, greedily: as likely an id may be another one, so the first ids are compared."""
    prompt, options = "a red apple, 3d, blue background", {"temperature": 0, "cfg_scale": 1, "seed": 0}
    here, there = (
        load("mini", device=device).generate(prompt, output, **options) for device in ("cpu", "cuda")
    )
    assert there.ids[:8] == here.ids[:8] and there.segments


def test_saving_over_its_own_checkpoint_replaces_it(
    folder: Path, tmp_path: Path, toys: SimpleNamespace
) -> None:
    target = AnyToken.from_pretrained(folder).save_pretrained(tmp_path / "copy")
    model = AnyToken.from_pretrained(target)  # and one that was opened there
    (target / "model-00001-of-00002.safetensors").write_bytes(b"of an older version")
    (target / "tokenizers/tone/notes.txt").write_text("mine")
    model.add_modality(toys.HumTokenizer())
    for _ in range(2):
        model.save_pretrained(target)
        assert not list(target.glob("model-*")) and [path.name for path in tmp_path.iterdir()] == ["copy"]
        assert AnyToken.from_pretrained(target).kinds == model.kinds
    assert (target / "tokenizers/tone/notes.txt").read_text() == "mine"


def test_another_checkpoint_is_replaced_only_if_asked(
    folder: Path, tmp_path: Path, toys: SimpleNamespace
) -> None:
    target = AnyToken.from_pretrained(folder).save_pretrained(tmp_path / "run")
    for name in (".git/HEAD", "report.html", "metrics.jsonl"):
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_text("mine")
    AnyToken.from_pretrained(folder).save_pretrained(target)  # the same bits: nothing is lost
    before = {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}
    other = toys.make_model(seed=5)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors would change.*overwrite=True.*--overwrite"
    ):
        other.save_pretrained(target)
    assert {path: path.read_bytes() for path in target.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    other.save_pretrained(target, overwrite=True)
    assert torch.equal(AnyToken.from_pretrained(target).lm.lm_head.weight, other.lm.lm_head.weight)
    assert all(
        (target / name).read_text() == "mine" for name in (".git/HEAD", "report.html", "metrics.jsonl")
    )


def test_saving_over_something_else_is_refused(model: AnyToken, tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"sun")
    with pytest.raises(CheckpointError, match=r"holds something else \(holiday\.jpg\).*--overwrite"):
        model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]
    assert AnyToken.from_pretrained(model.save_pretrained(tmp_path, overwrite=True)).kinds == model.kinds
    assert (tmp_path / "holiday.jpg").read_bytes() == b"sun"
    with pytest.raises(CheckpointError, match="is a file"):
        model.save_pretrained(tmp_path / "holiday.jpg", overwrite=True)


def test_what_lies_beside_a_checkpoint_does_not_damage_it(folder: Path, tmp_path: Path) -> None:
    mixed = shutil.copytree(folder, tmp_path / "mixed")
    for name in (
        "notes.json",
        "logs/run.json",
        "tokenizers/image/old.json",
        "tokenizers/image/old.safetensors",
    ):
        (mixed / name).parent.mkdir(exist_ok=True)
        (mixed / name).write_text("no JSON")
    assert AnyToken.from_pretrained(mixed).kinds == ["text", "image", "tone"]


FILES = [
    "config.json",
    "model.safetensors",
    "token_space.json",
    "text_tokenizer/tokenizer.json",
    "sampling.json",
    "tokenizers/image/config.json",
    "tokenizers/image/model.safetensors",
]


def remove(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", [remove, truncate, empty])
def test_a_missing_or_truncated_file_is_named(
    folder: Path, tmp_path: Path, name: str, harm: Callable[[Path], None]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    harm(broken / name)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        AnyToken.from_pretrained(broken)


def test_damaged_sampling_is_named(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "sampling.json").write_text('{"image": {"heat": 1}}')
    with pytest.raises(ValueError, match="heat"):
        AnyToken.from_pretrained(broken)


def test_a_config_of_another_model_is_one_error(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for number, change in enumerate(
        ({"num_hidden_layers": 1}, {"hidden_size": 64}, {"vocab_size": "many"}, {"num_attention_heads": 0})
    ):
        broken = shutil.copytree(folder, tmp_path / str(number))
        config = json.loads((broken / "config.json").read_text())
        (broken / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match="different checkpoints"):
            AnyToken.from_pretrained(broken)
    assert "LOAD REPORT" not in capfd.readouterr().err


def test_a_damaged_header_of_weights_is_named(folder: Path, tmp_path: Path) -> None:
    for number, harm in enumerate(
        (lambda data: data.replace(b"F32", b"Q32", 1), lambda data: (2).to_bytes(8, "little") + b"[]")
    ):
        broken = shutil.copytree(folder, tmp_path / str(number))
        path = broken / "model.safetensors"
        path.write_bytes(harm(path.read_bytes()))
        with pytest.raises(CheckpointError, match=str(broken)):
            AnyToken.from_pretrained(broken)


def test_a_saved_checkpoint_is_readable_by_all(folder: Path) -> None:
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in folder.rglob("*"))


def test_files_of_different_checkpoints_do_not_mix(
    folder: Path, toys: SimpleNamespace, tmp_path: Path
) -> None:
    bigger = toys.make_model()
    bigger.add_modality(toys.HumTokenizer())
    bigger.save_pretrained(tmp_path / "bigger")
    shutil.copytree(folder, tmp_path / "mixed")
    shutil.copy(tmp_path / "bigger" / "token_space.json", tmp_path / "mixed")
    with pytest.raises(ValueError, match=r"tokenizer|token_space"):
        AnyToken.from_pretrained(tmp_path / "mixed")


def test_an_added_modality_is_saved(toys: SimpleNamespace, tmp_path: Path) -> None:
    model = toys.make_model()
    model.add_modality(toys.HumTokenizer())
    loaded = AnyToken.from_pretrained(model.save_pretrained(tmp_path / "grown"))
    assert loaded.kinds[-1] == "hum"
    assert loaded.generate("a", "hum", seed=0).ids == model.generate("a", "hum", seed=0).ids
    assert torch.equal(loaded.lm.get_input_embeddings().weight, model.lm.get_input_embeddings().weight)


def test_an_adapter_changes_the_answers_and_is_merged(folder: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = AnyToken.from_pretrained(folder)
    space = base.token_space
    config = LoraConfig(
        r=2,
        target_modules=["q_proj", "v_proj"],
        target_parameters=["mlp.experts.down_proj"],
        trainable_token_indices=[space.open_token("image"), space.close_token("image")],
    )
    before = base.generate("a", "image", temperature=0).ids
    wrapped = get_peft_model(base.lm, config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name or "trainable_tokens" in name:
                parameter.normal_(std=0.5)
    wrapped.save_pretrained(tmp_path / "adapter")
    adapted = base.generate("a", "image", temperature=0).ids
    loaded = AnyToken.from_pretrained(folder, adapter=tmp_path / "adapter")
    assert loaded.generate("a", "image", temperature=0).ids == adapted != before
    assert not any("lora" in name for name, _ in loaded.lm.named_parameters())


def test_a_model_in_an_adapter_answers_but_is_no_checkpoint(toys: SimpleNamespace, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = toys.make_model()
    before = model.generate("a", "image", temperature=0).ids
    wrapped = get_peft_model(model.lm, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.lm = wrapped
    assert model.generate("a", "image", temperature=0).ids == before  # an untrained adapter adds nothing
    with pytest.raises(CheckpointError, match="adapter"):
        model.save_pretrained(tmp_path / "mixed")
    assert not list(tmp_path.iterdir())
    model.lm = wrapped.merge_and_unload()
    assert AnyToken.from_pretrained(model.save_pretrained(tmp_path / "merged")).kinds == model.kinds


def test_a_damaged_adapter_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        AnyToken.from_pretrained(folder, adapter=tmp_path)


def test_names_that_lead_nowhere(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    with pytest.raises(CheckpointError, match="is a file"):
        find_checkpoint(folder / "config.json")
    with pytest.raises(CheckpointError, match=r"no such model.*bundled name"):
        find_checkpoint("no such model")
    import huggingface_hub

    def unreachable(*_: object, **__: object) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(CheckpointError, match=r"owner/name.*Without a network"):
        find_checkpoint("owner/name")


def test_a_mistyped_folder_is_no_hub_id(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "runs/4_instruct")
    for name, says in {
        "runs/4_instuct": r"no folder runs/4_instuct \(did you mean 'runs/4_instruct'\?\)",
        "./typo": "no folder ./typo; give one that exists.*mini",
        "no/such/place": "no folder no/such/place",
        "~/no-such-place": "no folder /",
        "minni": r"'minni' \(did you mean 'mini'\?\)",
    }.items():
        with pytest.raises(CheckpointError, match=says):
            find_checkpoint(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_checkpoint("~/runs/4_instruct") == tmp_path / "runs/4_instruct"


def test_hub_ids_are_downloaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(folder))
    assert AnyToken.from_pretrained("owner/name").kinds == ["text", "image", "tone"]


def test_devices() -> None:
    assert pick_device("auto").type in ("cpu", "cuda")
    with pytest.raises(CheckpointError, match="abacus"):
        pick_device("abacus")


def mini_as_it_loads() -> dict[str, Tensor]:
    """A digest of every weight's bits, and some logits, of the bundled checkpoint."""
    lm = load("mini", device="cpu").lm
    digest = sha256()
    for name, tensor in sorted(lm.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    ids = torch.randint(0, lm.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = lm(ids, use_cache=False).logits[:, ::6, ::64].contiguous()
    return {"weights": torch.tensor(list(digest.digest()), dtype=torch.uint8), "logits": logits}


def test_mini_loads_as_it_always_did() -> None:
    """Weights to the bit; logits to what kernels of other machines differ by. No code change may renew this file."""
    fresh, golden = mini_as_it_loads(), load_file(MINI_GOLDEN)
    assert torch.equal(fresh["weights"], golden["weights"])
    torch.testing.assert_close(fresh["logits"], golden["logits"], rtol=0, atol=1e-4)


if __name__ == "__main__":  # after a new checkpoint: python tests/inference/test_checkpoint.py
    save_file(mini_as_it_loads(), MINI_GOLDEN)
