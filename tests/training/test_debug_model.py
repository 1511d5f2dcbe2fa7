"""Recipes for many GPUs run in miniature, from the command line, with nothing but what is made on the spot."""

import os
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import anytoken
from anytoken import recipes
from anytoken.cli import app
from anytoken.data.shards import tokenize_records
from anytoken.tokenizers.base import load_tokenizer
from anytoken.training.config import TrainConfig
from anytoken.training.debug_model import OWN_STEPS, STEPS
from anytoken.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]
GPU = [f"stages/gpu/{path.name}" for path in sorted((ROOT / "stages" / "gpu").glob("*.yaml"))]
SCALE = [f"stages/scale/{path.name}" for path in sorted((ROOT / "stages" / "scale").glob("*.yaml"))]


def assert_trained(recipe: str, folder: Path) -> None:
    """What the recipe names was trained, and generates every kind of segment that its codecs make."""
    stage = TrainConfig.load(recipes.find(recipe))
    output = folder / f"{stage.output}-tiny"
    entries = read_metrics(output / "metrics.jsonl")
    assert [entry["step"] for entry in entries if "loss" in entry] == list(range(1, STEPS + 1))
    assert stage.backbone is not None
    kinds = {kind for entry in entries if "loss" in entry for kind in entry["groups"]}
    assert kinds >= {"text", *stage.backbone.codecs}
    assert entries[-1]["eval"]["groups"]
    model = anytoken.load(output)
    assert model.kinds == ["text", *stage.backbone.codecs]
    for kind in stage.backbone.codecs:
        assert [one.kind for one in model.generate("ant", output=kind, seed=0).segments] == [kind]


@pytest.mark.parametrize(
    "recipe", [one if "30b" in one else pytest.param(one, marks=pytest.mark.slow) for one in SCALE]
)
def test_a_recipe_runs_in_miniature(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["train", recipe, "--tiny"])
    assert result.exit_code == 0, result.output
    assert_trained(recipe, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("recipe", SCALE)
def test_and_with_its_engine_on_two_processes(recipe: str, tmp_path: Path) -> None:
    if TrainConfig.load(ROOT / recipe).distributed.deepspeed:
        pytest.importorskip("deepspeed", reason="the extra [deepspeed] is not installed")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*start, "-m", "anytoken", "train", recipe, "--tiny"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert_trained(recipe, tmp_path)


@pytest.mark.parametrize(
    "recipe",
    [
        one if "1_alignment" in one or "smol" in one else pytest.param(one, marks=pytest.mark.slow)
        for one in GPU
    ],
)
def test_a_recipe_for_one_gpu_runs_in_miniature(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps over its own views, from tokenizers and files of every kind to a checkpoint that loads."""
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["train", recipe, "--tiny"])
    assert result.exit_code == 0, result.output
    stage = TrainConfig.load(recipes.find(recipe))
    output = tmp_path / f"{stage.output}-tiny"
    entries = read_metrics(output / "metrics.jsonl")
    assert [entry["step"] for entry in entries if "loss" in entry] == list(range(1, OWN_STEPS + 1))
    assert entries[-1]["eval"]["groups"]
    files = list((tmp_path / f"{stage.weights_folder}-tiny").iterdir())
    assert files and max(file.stat().st_size for file in files) <= 15 * 2**20
    if stage.lora is None:
        assert set(anytoken.load(output).kinds) == {"text", "image", "speech", "video", "dna"}
    else:
        assert anytoken.load("mini", adapter=output).generate("ant", output="text", seed=0).text is not None


@pytest.mark.parametrize("recipe", GPU)
def test_a_recipe_for_one_gpu_fits_its_nine_minutes(recipe: str) -> None:
    """It saves every minute, so that a command that is ended at nine loses one at most, and the next goes on."""
    stage = TrainConfig.load(ROOT / recipe)
    assert stage.save_minutes == 1 and stage.max_minutes is not None and stage.max_minutes % 8 == 0
    assert stage.weights_folder == f"runs/gpu/weights/{Path(recipe).stem}"
    assert stage.precision == "bf16" and stage.attention == "auto" and stage.compile
    words = [line for line in (ROOT / recipe).read_text().splitlines() if line.startswith("# anytoken train")]
    assert words == [f"# anytoken train {recipe}"]
    assert f"anytoken train {recipe}" in (ROOT / "stages" / "gpu" / "README.md").read_text()


def test_shards_for_one_gpu_are_packed_within_their_limit(tmp_path: Path) -> None:
    pack = runpy.run_path(str(ROOT / "stages" / "gpu" / "pack.py"))
    tokenizer = load_tokenizer(ROOT / "anytoken" / "pretrained" / "mini" / "tokenizers" / "dna")
    (tmp_path / "tokenizers").mkdir()
    records = tmp_path / "records.jsonl"
    records.write_text('{"text": "a", "dna": "ACGTACGT"}\n' * 3)
    for name in pack["named_sets"]():
        tokenize_records(records, {"dna": tokenizer}, tmp_path / "shards" / name, progress=False)
    given = tmp_path / "shards", tmp_path / "tokenizers", tmp_path / "gpu.tar"
    size = pack["pack"](*given)
    assert size == sum(path.stat().st_size for path in (tmp_path / "shards").rglob("*") if path.is_file())
    with tarfile.open(given[2]) as archive:
        assert {"data/shards/images/manifest.json", "runs/tokenizers"} <= set(archive.getnames())
    with pytest.raises(SystemExit, match=r"over the limit of 0\.0 MB.*images 0\.0"):
        pack["pack"](*given, limit=size - 1)
    part = tmp_path / "shards" / "images" / "part-00000.safetensors"
    save_file({name: one.int() for name, one in load_file(part).items()}, part)
    with pytest.raises(SystemExit, match=r"dna\.values is not uint16; tokenize images again"):
        pack["pack"](*given)
    assert pack["LIMIT"] == 60_000_000
    (given[0] / pack["named_sets"]()[0] / "manifest.json").unlink()
    with pytest.raises(SystemExit, match="is not a shard folder"):
        pack["pack"](*given)


def test_the_stages_for_one_gpu_follow_each_other_and_have_the_editions_data() -> None:
    names = ("1_alignment", "2_interleaved", "3_speech", "4_instruct")
    stages = [TrainConfig.load(ROOT / "stages" / "gpu" / f"{name}.yaml") for name in names]
    assert [stage.init_from for stage in stages] == ["scratch", *(stage.output for stage in stages[:-1])]
    edition = [TrainConfig.load(ROOT / "stages" / "edition" / f"{name}.yaml") for name in names]
    assert [stage.data for stage in stages] == [stage.data for stage in edition]
    assert stages[0].model == edition[0].model
