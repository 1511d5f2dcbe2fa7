"""Training by recipe: it learns, resumes exactly, and says what is wrong with a recipe."""

import json

import pytest
import torch
import yaml

from anytoken.tokenizers.base import TokenizerError, load_tokenizer
from anytoken.tokenizers.text import TextTokenizer
from anytoken.training.tokenizer import trainer
from anytoken.training.tokenizer.recipe import TokenizerRecipe
from anytoken.training.tokenizer.trainer import train_tokenizer

CONFIG = {"width": 16, "encoder_depth": 1, "decoder_depth": 1, "refine_width": 8, "refine_depth": 1}
IMAGE = {
    "kind": "image", "config": {**CONFIG, "levels": [5, 5, 4]}, "data": "emoji/sprites.npy", "steps": 30,
    "batch_size": 4, "lr": 0.003, "warmup_steps": 3, "threads": 1, "save_every": 7, "log_every": 5,
}  # fmt: skip


class Killed(Exception):
    """Stands for a kill in the middle of a step."""


@pytest.fixture
def recipe(tmp_path):
    """Write a recipe file with some keys changed; None leaves a key out."""

    def write(**changes):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in {**IMAGE, **changes}.items() if v is not None}))
        return path

    return write


@pytest.fixture
def killed_at(monkeypatch):
    """Make training fail at a step, once."""

    def arm(step):
        run = trainer._Loop._train_step

        def fail(loop):
            if loop.step == step:
                monkeypatch.setattr(trainer._Loop, "_train_step", run)
                raise Killed
            return run(loop)

        monkeypatch.setattr(trainer._Loop, "_train_step", fail)

    return arm


def log_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["image", "video", "speech"])
def test_training_on_a_gpu_begins_as_on_the_cpu(recipe, sets, tmp_path, kind):
    sizes = {k: v for k, v in CONFIG.items() if kind == "image" or not k.startswith("refine")}
    sizes |= {"num_global_codes": 2} if kind == "speech" else {}
    data = {"image": "emoji/sprites.npy", "video": "emoji/animations.npy", "speech": "speech/train_audio.npy"}
    plan = {"kind": kind, "config": sizes, "data": data[kind], "steps": 5, "log_every": 1, "save_every": 2}
    logs = {}
    for device in ("cpu", "cuda"):
        folder = train_tokenizer(recipe(**plan, device=device), sets, tmp_path / device)
        logs[device] = [line["loss"] for line in log_of(folder)]
        load_tokenizer(folder)
    assert logs["cuda"] == pytest.approx(logs["cpu"], rel=0.02)
    assert "NVIDIA" in json.loads((tmp_path / "cuda" / "training.json").read_text())["machine"]


def test_a_device_that_is_not_there_is_named(recipe, sets, tmp_path):
    for name in ("cuda:99", "abacus"):
        with pytest.raises(TokenizerError, match=f"device '{name}' is not usable here.*Use 'auto' or 'cpu'"):
            train_tokenizer(recipe(device=name), sets, tmp_path / "out")


def test_the_loss_falls_and_the_folder_is_whole(recipe, sets, tmp_path):
    out = train_tokenizer(recipe(), sets, tmp_path / "out")
    log = log_of(out)
    assert [line["step"] for line in log] == [5, 10, 15, 20, 25, 30]
    assert log[-1]["loss"] < 0.8 * log[0]["loss"] and log[-1]["psnr_db"] > log[0]["psnr_db"]
    said = json.loads((out / "training.json").read_text())
    assert said["steps"] == 30 and said["recipe"]["lr"] == 0.003 and said["last"]["loss"] == log[-1]["loss"]
    tokenizer = load_tokenizer(out)
    assert said["parameters"] == sum(p.numel() for p in tokenizer.parameters())
    assert {path.name for path in out.iterdir()} == {
        "config.json", "model.safetensors", "training.json", "metrics.jsonl", "tensorboard",
    }  # fmt: skip
    assert list((out / "tensorboard").glob("events.*"))


@pytest.mark.parametrize(("quantizer", "step"), [("fsq", 3), ("fsq", 7), ("fsq", 13), ("vq", 13)])
def test_interrupted_and_resumed_equals_uninterrupted(quantizer, step, recipe, sets, tmp_path, killed_at):
    path = recipe(config={**IMAGE["config"], "quantizer": quantizer, "codebook_size": 16}, steps=14)
    whole = train_tokenizer(path, sets, tmp_path / "whole")
    killed_at(step)
    with pytest.raises(Killed):
        train_tokenizer(path, sets, tmp_path / "parts")
    parts = train_tokenizer(path, sets, tmp_path / "parts")
    assert load_tokenizer(parts).fingerprint() == load_tokenizer(whole).fingerprint()
    assert log_of(parts) == log_of(whole), "no step is logged twice"
    assert not (parts / "checkpoint.pt").exists()


def test_a_critic_is_resumed_with_its_tokenizer(recipe, sets, tmp_path, killed_at):
    path = recipe(loss={"pixel": 1.0, "feature": 0.1, "adversarial": 0.1}, steps=14)
    whole = train_tokenizer(path, sets, tmp_path / "whole")
    killed_at(9)
    with pytest.raises(Killed):
        train_tokenizer(path, sets, tmp_path / "cut")
    cut = train_tokenizer(path, sets, tmp_path / "cut")
    assert load_tokenizer(cut).fingerprint() == load_tokenizer(whole).fingerprint()
    assert log_of(cut) == log_of(whole) and "adversarial" in log_of(cut)[0]


def test_training_goes_on_from_the_weights_of_another(recipe, sets, tmp_path):
    first = train_tokenizer(recipe(), sets, tmp_path / "first")
    further = train_tokenizer(recipe(init_from=str(first), steps=5, lr=1e-5), sets, tmp_path / "further")
    assert log_of(further)[0]["loss"] < 0.9 * log_of(first)[0]["loss"]  # of the same batch
    wider = recipe(init_from=str(first), config={**IMAGE["config"], "width": 24})
    with pytest.raises(TokenizerError, match=r"init_from: the weights of .*first do not fit config"):
        train_tokenizer(wider, sets, tmp_path / "wider")


def test_weights_that_begin_anew_are_not_taken_over(recipe, sets, tmp_path):
    first = train_tokenizer(recipe(), sets, tmp_path / "first")
    other = {"init_from": str(first), "steps": 1, "warmup_steps": 0, "lr": 1e-9}
    config = {**IMAGE["config"], "refine_depth": IMAGE["config"].get("refine_depth", 2) + 1}
    with pytest.raises(TokenizerError, match="`reinit_prefixes` names weights to reinitialize"):
        train_tokenizer(recipe(**other, config=config), sets, tmp_path / "strict")
    path = recipe(**other, config=config, reinit_prefixes=["refine.", "decoder.2."])
    was, now = (
        load_tokenizer(one).state_dict() for one in (first, train_tokenizer(path, sets, tmp_path / "anew"))
    )
    assert torch.equal(now["encoder.0.weight"], was["encoder.0.weight"])
    assert not torch.equal(now["decoder.2.weight"], was["decoder.2.weight"])


def test_parts_are_taken_from_another_tokenizer(recipe, sets, tmp_path):
    """A clip's matte is an image's, here over trunks that begin by chance."""
    sizes = {"width": 16, "encoder_depth": 1, "decoder_depth": 1, "levels": [5, 5, 4], "matte_depth": 1,
             "matte_width": 16}  # fmt: skip
    first = train_tokenizer(recipe(kind="layered_image", config=sizes, steps=2), sets, tmp_path / "first")
    other = {"kind": "layered_video", "data": "emoji/animations.npy", "steps": 1, "batch_size": 2, "lr": 1e-9}
    path = recipe(**other, config=sizes, init_parts={"matte.": str(first)})
    begun = train_tokenizer(path, sets, tmp_path / "begun")
    was, now = (load_tokenizer(one).state_dict() for one in (first, begun))
    assert all(torch.equal(now[name], was[name]) for name in was if name.startswith("matte."))
    assert not torch.equal(now["decoder.0.0.up.weight"], was["decoder.0.0.up.weight"])
    for part, shapes in (("encoder.", r"encoder\.0\.weight \[16, 1024\]"), ("nose.", "none")):
        path = recipe(**other, config=sizes, init_parts={part: str(first)})
        with pytest.raises(TokenizerError, match=rf"init_parts: .*first has no weights that fit .*{shapes}"):
            train_tokenizer(path, sets, tmp_path / "wrong")


def test_a_kind_without_terms_says_so(recipe, sets, tmp_path):
    path = recipe(kind="video", data="emoji/animations.npy", loss={"feature": 1.0}, config={"width": 16})
    with pytest.raises(TokenizerError, match="loss of video has no terms to weigh"):
        train_tokenizer(path, sets, tmp_path / "out")


def test_the_caller_s_threads_are_as_they_were(recipe, sets, tmp_path):
    train_tokenizer(recipe(steps=2, threads=2), sets, tmp_path / "image")
    assert torch.get_num_threads() == 1
    with pytest.raises(TokenizerError, match=r"init_from|not a folder|missing"):
        train_tokenizer(recipe(threads=2, init_from=str(tmp_path / "none")), sets, tmp_path / "other")
    assert torch.get_num_threads() == 1


def test_another_seed_trains_another_tokenizer(recipe, sets, tmp_path):
    path = recipe(steps=2)
    folders = [train_tokenizer(path, sets, tmp_path / str(seed), [f"seed={seed}"]) for seed in (0, 1)]
    assert len({load_tokenizer(folder).fingerprint() for folder in folders}) == 2


def test_a_finished_training_is_left_as_it_is(recipe, sets, tmp_path, monkeypatch):
    out = train_tokenizer(recipe(steps=2), sets, tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert train_tokenizer(recipe(steps=2), sets, out) == out
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    train_tokenizer(recipe(steps=3), sets, out)
    assert json.loads((out / "training.json").read_text())["steps"] == 3
    assert [line["step"] for line in log_of(out)] == [3], "the log is of this training"


def test_a_checkpoint_of_another_recipe_is_not_gone_on_with(recipe, sets, tmp_path, killed_at):
    killed_at(8)
    with pytest.raises(Killed):
        train_tokenizer(recipe(), sets, tmp_path / "out")
    with pytest.raises(TokenizerError, match="belongs to another recipe"):
        train_tokenizer(recipe(), sets, tmp_path / "out", ["lr=0.001"])


@pytest.mark.parametrize("kind", ["speech", "video"])
def test_speech_and_video_train_by_the_same_loop(kind, recipe, sets, tmp_path):
    data = {"speech": "speech/train_audio.npy", "video": "emoji/animations.npy"}[kind]
    config = {"width": 8, "encoder_depth": 1, "decoder_depth": 1, "levels": [4, 3]}
    out = train_tokenizer(
        recipe(kind=kind, config=config, data=data, steps=2, batch_size=2), sets, tmp_path / kind
    )
    assert load_tokenizer(out).kind == kind and (out / "training.json").is_file()


def test_products_in_bfloat16_train_nearly_the_same(recipe, sets, tmp_path):
    ends = {}
    for precision in ("fp32", "bf16"):
        ends[precision] = log_of(train_tokenizer(recipe(precision=precision), sets, tmp_path / precision))[-1]
    assert ends["bf16"] != ends["fp32"]
    assert ends["bf16"]["loss"] == pytest.approx(ends["fp32"]["loss"], rel=0.1)


def test_text_trains_by_its_own_recipe(sets, tmp_path):
    path = tmp_path / "text.yaml"
    corpus = [{"file": "emoji/images.jsonl", "fields": ["text"]}]
    path.write_text(yaml.safe_dump({"kind": "text", "vocab_size": 400, "corpus": corpus}))
    out = train_tokenizer(path, sets, tmp_path / "out", ["steps=5", "vocab_size=270"])
    assert TextTokenizer.from_pretrained(out).vocab_size == 270
    with pytest.raises(TokenizerError, match="unknown key 'vocab'"):
        train_tokenizer(path, sets, tmp_path / "other", ["vocab=290"])


def test_overrides_reach_into_the_config(recipe):
    plan = TokenizerRecipe.load(
        recipe(), ["lr=0.5", "config.width=24", "config.levels=[3, 3]", "data=mine/*.png"]
    )
    assert (plan.lr, plan.config["width"], plan.config["levels"], plan.data) == (
        0.5,
        24,
        [3, 3],
        "mine/*.png",
    )
    assert plan.config["refine_width"] == 8


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["stepz=3"], r"unknown key 'stepz' \(did you mean 'steps'\?\)"),
        (["steps=0"], "steps must be greater than or equal to 1, got 0"),
        (["lr=fast"], "lr must be a valid number, got 'fast'"),
        (["steps"], "Overrides are key=value; received 'steps'"),
        (["steps=["], r"steps=\[ is not valid YAML"),
        (
            ["config.quantizer=fsq", "config.quantizer.kind=vq"],
            r"quantizer is 'fsq', not a group of settings; .* config.quantizer={kind: vq}",
        ),
        (["kind=smell"], r"Unknown tokenizer kind 'smell'; known: .*\bdna, .*\bimage\b"),
        (["config.widht=3"], "config of a image tokenizer: .*widht"),
        (["config.quantizer=rvq"], "Unknown quantizer 'rvq'"),
        (["data=nowhere/sprites.npy"], r"nowhere/sprites\.npy is missing"),
        (["data=nowhere/*.png"], "holds no image files"),
    ],
)
def test_a_wrong_recipe_is_an_error_that_says_what(overrides, says, recipe, sets, tmp_path):
    with pytest.raises(TokenizerError, match=says):
        train_tokenizer(recipe(), sets, tmp_path / "out", overrides)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "says"), [("kind: [", "is not valid YAML"), ("- a\n- b\n", "holds list"), ("", "holds NoneType")]
)
def test_a_file_that_is_no_recipe_is_an_error(text, says, tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(TokenizerError, match=rf"broken\.yaml {says}"):
        TokenizerRecipe.load(path)
    with pytest.raises(TokenizerError, match=r"no-such\.yaml is not a file"):
        TokenizerRecipe.load(tmp_path / "no-such.yaml")


def test_a_loss_that_is_no_number_stops_the_training(recipe, sets, tmp_path, monkeypatch):
    from anytoken.tokenizers.image import ImageTokenizer

    monkeypatch.setattr(ImageTokenizer, "training_loss", lambda self, batch: (torch.tensor(float("nan")), {}))
    with pytest.raises(TokenizerError, match=r"The loss is nan at step 0: lower lr \(now 0.003\)"):
        train_tokenizer(recipe(), sets, tmp_path / "out")


@pytest.mark.parametrize("kind", ["image", "speech", "video", "dna"])
def test_the_recipes_that_come_along_load(kind):
    from anytoken import recipes

    plan = TokenizerRecipe.load(recipes.find(f"tokenizers/{kind}/recipe.yaml"))
    assert plan.kind == kind
