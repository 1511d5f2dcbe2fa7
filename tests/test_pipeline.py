"""stages/run_all.sh: every command it gives is one that exists and finds what the ones before it made; and a real run.

The quick tests put a stand-in for `python` on PATH, which notes its arguments, and hand those to the command line
with the work taken out. The slow one trains everything, in miniature, and generates with what comes out.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import anytoken
from anytoken import cli
from anytoken.data import shards
from anytoken.data.mixture import SourceSpec, matches
from anytoken.emoji_world import instruct
from anytoken.tokenizers.base import MODALITIES
from anytoken.training import trainer as stage_trainer
from anytoken.training.config import TrainConfig
from anytoken.training.tokenizer import trainer as tokenizer_trainer
from anytoken.training.tokenizer.recipe import TokenizerRecipe

ROOT = Path(__file__).parents[1]
SCRIPT, TINY = ROOT / "stages" / "run_all.sh", ROOT / "tests" / "assets" / "tiny"
KINDS = ("text", "image", "speech", "video", "dna")
STAGES = ("1_alignment", "2_interleaved", "3_speech", "4_instruct", "5_more", "6_speech", "lora")
Script = Callable[..., tuple[int, list[list[str]]]]


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """Runs the script with a `python` that only notes its arguments; gives the exit code and what was noted."""
    (tmp_path / "bin").mkdir()
    python, notes = tmp_path / "bin" / "python", tmp_path / "calls"
    python.write_text(
        f"#!/bin/sh\nprintf '%s\\037' \"$@\" >> {notes}\necho >> {notes}\n"
        'case "$*" in *"$FAIL_AT"*) exit 1 ;; esac\n'
    )
    python.chmod(0o755)

    def run(*arguments: str, **environment: str) -> tuple[int, list[list[str]]]:
        path = f"{tmp_path / 'bin'}:/usr/bin:/bin"
        base = {"PATH": path, "RUNS": str(tmp_path / "runs"), "FAIL_AT": "nothing fails"}
        done = subprocess.run(
            ["bash", str(SCRIPT), *arguments],
            env={**base, **environment},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        lines = notes.read_text().splitlines() if notes.is_file() else []
        return done.returncode, [line.split("\x1f")[:-1] for line in lines]

    return run


@dataclass
class Done:
    """What the command line was asked to do."""

    sets: list[str] = field(default_factory=list)
    tokenizers: dict[str, Path] = field(default_factory=dict)  # kind -> where it goes
    plans: dict[str, Any] = field(default_factory=dict)
    files: set[Path] = field(default_factory=set)  # conversations that were made
    shards: dict[Path, Path] = field(default_factory=dict)  # shard folder -> records
    stages: list[TrainConfig] = field(default_factory=list)


@pytest.fixture
def follow(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[list[str]]], Done]:
    """Hands noted commands to the real command line, whose rooms only note what they would do."""
    done = Done()

    def train_tokenizer(recipe: Path, data: Path, out: Path, overrides: list[str]) -> Path:
        kind = recipe.parent.name
        done.tokenizers[kind] = out
        if kind != "text":
            done.plans[kind] = TokenizerRecipe.load(recipe, overrides)
        return out

    def tokenize(records: str, tokenizers: Path, out: Path, workers: int, **options: object) -> Path:
        assert tokenizers in {folder.parent for folder in done.tokenizers.values()}
        done.shards[out] = Path(records)
        return out

    def converse(sets: Path, out: Path, count: int, seed: int) -> Path:
        done.files.add(out / "conversations.jsonl")
        return out

    monkeypatch.setattr(tokenizer_trainer, "train_tokenizer", train_tokenizer)
    monkeypatch.setattr(shards, "load_tokenizers", lambda folder: folder)
    monkeypatch.setattr(shards, "tokenize_records", tokenize)
    monkeypatch.setattr(instruct, "build_instruct", converse)
    monkeypatch.setattr(stage_trainer, "train", lambda stage, answer: done.stages.append(stage))
    for name in ("emoji", "speech", "dna"):
        room = import_module(f"anytoken.emoji_world.{name}")
        monkeypatch.setattr(room, f"build_{name}", lambda out, *_, _name=name, **__: done.sets.append(_name))
    monkeypatch.chdir(ROOT)  # as the script does

    def run(calls: list[list[str]]) -> Done:
        for words in calls:
            if words[:2] == ["-m", "anytoken"]:
                with pytest.raises(SystemExit) as end:
                    cli.app(words[2:])
                assert not end.value.code, words
        return done

    return run


@pytest.mark.parametrize("tiny", [True, False], ids=["tiny", "full"])
def test_every_command_finds_what_it_needs(
    script: Script, follow: Callable[[list[list[str]]], Done], tmp_path: Path, tiny: bool
) -> None:
    code, calls = script("--tiny", STEPS="7") if tiny else script()
    assert code == 0
    done, runs = follow(calls), tmp_path / "runs"
    data = TINY.relative_to(ROOT) if tiny else Path("data/sets")
    assert done.sets == ([] if tiny else ["emoji", "speech", "dna"])
    first = {kind: runs / "tokenizers" / kind for kind in KINDS}
    assert done.tokenizers == {**first, "25hz": runs / "next" / "tokenizers" / "speech"}
    assert {path.resolve() for path in (runs / "next" / "tokenizers").glob("[!s]*")} == {
        folder for kind, folder in first.items() if kind != "speech"
    }
    for records in done.shards.values():
        assert records in done.files or (ROOT / TINY / records.relative_to(data)).is_file()
    assert [Path(stage.output) for stage in done.stages] == [runs / name for name in STAGES]
    assert done.stages[0].tokenizers == {kind: str(folder) for kind, folder in first.items()}
    assert done.stages[-2].replace_tokenizers == {"speech": str(done.tokenizers["25hz"])}
    starts = [stage.init_from for stage in done.stages]
    assert starts == ["scratch", *(stage.output for stage in done.stages[:-1])]
    for stage in done.stages:
        for source in stage.sources([*stage.data, *stage.eval.data]):
            assert Path(source.path).resolve() in done.shards
            assert source.pair_with is None or Path(source.pair_with.path).resolve() in done.shards
    assert calls[-1] == ["-", str(runs / "6_speech")]


def test_tiny_shrinks_sizes_and_steps_only(script: Script, follow: Callable[[list[list[str]]], Done]) -> None:
    done = follow(script("--tiny", STEPS="7")[1])
    assert {stage.steps for stage in done.stages} == {7}
    for kind in ("image", "speech", "video"):
        import_module(f"anytoken.tokenizers.{kind}")
        assert done.plans[kind].steps == 7
        tokenizer = MODALITIES[kind](**done.plans[kind].config)  # the recipe's settings and ours go together
        assert sum(one.numel() for one in tokenizer.parameters()) < 1_500_000
    for name, stage in zip(STAGES, done.stages, strict=True):
        full = TrainConfig.load(ROOT / "stages" / f"{name}.yaml")
        assert drawn(stage) == drawn(full)
        assert (stage.loss, stage.lora, stage.trainable) == (full.loss, full.lora, full.trainable)


def test_the_full_run_is_the_recipes_as_they_are(
    script: Script, follow: Callable[[list[list[str]]], Done]
) -> None:
    paths = {"init_from", "output", "tokenizers", "data_root", "data", "replace_tokenizers"}
    for name, stage in zip(STAGES, follow(script()[1]).stages, strict=True):
        full = TrainConfig.load(ROOT / "stages" / f"{name}.yaml")
        assert stage.model_dump(exclude=paths) == full.model_dump(exclude=paths)
        assert drawn(stage) == drawn(full)


def drawn(stage: TrainConfig) -> list[dict[str, Any]]:
    """What is drawn from which sets, wherever they lie."""
    return [one.model_dump() | {"path": Path(one.path).name} for one in stage.data]


def test_every_view_finds_records_in_the_tiny_set(
    script: Script, follow: Callable[[list[list[str]]], Done]
) -> None:
    for stage in follow(script("--tiny")[1]).stages:
        for source in [*stage.data, *stage.eval.data]:
            if Path(source.path).name != "conversations":
                assert usable(source), f"{stage.output}: {source}"


def usable(source: SourceSpec) -> int:
    """How many records of the tiny set a source can draw, partners considered."""
    records = [one for one in tiny_records(source.path) if matches(one, source.split, source.where)]
    pair = source.pair_with
    if pair is None:
        return len(records)
    partners = [one for one in tiny_records(pair.path) if matches(one, pair.split, pair.where)]
    if pair.by is None:
        return min(len(records), len(partners))
    keys = {one[pair.by] for one in partners}
    return sum(one[pair.by] in keys for one in records)


def tiny_records(name: str) -> list[dict[str, Any]]:
    (path,) = TINY.rglob(f"{name}.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_step_that_fails_ends_it(script: Script) -> None:
    code, calls = script("--tiny", FAIL_AT="data instruct")
    assert code != 0 and calls[-1][2:4] == ["data", "instruct"]


@pytest.mark.parametrize("arguments", [("--big",), ("--tiny", "more"), ("",)])
def test_other_arguments_are_refused(script: Script, arguments: tuple[str, ...]) -> None:
    assert script(*arguments) == (2, [])


# ---- the real thing ----


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_from_raw_files_to_a_model_and_an_adapter(tmp_path: Path) -> None:
    run_script(tmp_path)
    model = anytoken.load(tmp_path / "6_speech", device="cpu")
    assert model.kinds == list(KINDS)
    for kind in KINDS:
        reply = model.generate("an apple", output=kind, seed=0)
        assert [segment.kind for segment in reply.segments] == [kind]
    adapted = anytoken.load(tmp_path / "6_speech", device="cpu", adapter=tmp_path / "lora")
    assert adapted.generate("an apple", output="image", seed=0).images[0].pixels.shape[2] == 3
    changed = {
        name.rsplit(".", 2)[-2]
        for (name, before), (_, after) in zip(
            model.lm.named_parameters(), adapted.lm.named_parameters(), strict=True
        )
        if not before.equal(after)
    }
    assert {"q_proj", "v_proj", "experts"} <= changed and not {"embed_tokens", "norm"} & changed
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    run_script(tmp_path)  # everything is complete, so nothing is made again
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == finished


def run_script(runs: Path) -> None:
    """The whole pipeline on the tiny set, three steps of each training."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    small = {"PATH": path, "RUNS": str(runs), "STEPS": "3", "WORKERS": "1", "DATA": str(TINY)}
    done = subprocess.run(
        ["bash", str(SCRIPT), "--tiny"], env={**os.environ, **small}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Image(" in done.stdout.splitlines()[-1]
