"""The recipe schema: what it refuses, how overrides reach any value; every shipped recipe is valid."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from anytoken.training.config import (
    TrainConfig,
)
from anytoken.utils.errors import ConfigError

STAGES = Path(__file__).parents[2] / "stages"
RECIPES = sorted(set(STAGES.rglob("*.yaml")) - set((STAGES / "gpu" / "tokenizers").glob("*.yaml")))


def recipe(**changes: Any) -> dict[str, Any]:
    return {
        "init_from": "somewhere",
        "output": "out",
        "steps": 4,
        "data": [{"path": "a", "views": {"text->image": 1}}],
        **changes,
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path: Path) -> None:
    assert TrainConfig.load(path).batch_size >= 1


def test_stages_follow_each_other() -> None:
    stages = [
        TrainConfig.load(STAGES / f"{name}.yaml")
        for name in ("1_alignment", "2_interleaved", "3_speech", "4_instruct", "5_more", "6_speech")
    ]
    assert [stage.init_from for stage in stages] == ["scratch", *(stage.output for stage in stages[:-1])]


def test_the_edition_is_one_run_at_a_constant_rate_that_ends_with_a_decay() -> None:
    names = ("1_alignment", "2_interleaved", "3_speech", "4_instruct", "decay")
    stages = [TrainConfig.load(STAGES / "edition" / f"{name}.yaml") for name in names]
    assert [stage.init_from for stage in stages] == ["scratch", *(stage.output for stage in stages[:-1])]
    assert [stage.schedule.kind for stage in stages] == ["constant"] * 4 + ["wsd"]
    assert stages[-1].schedule.decay_fraction == 1.0 and stages[-1].data == stages[-2].data
    assert 150e6 <= sum(stage.steps * stage.tokens_per_batch for stage in stages) <= 300e6
    assert stages[0].model["shared_expert_intermediate_size"] == 0  # what stock engines can run


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stepz": 3}, r"unknown key 'stepz' \(did you mean 'steps'\?\)$"),
        ({"lr": 3}, r"unknown key 'lr' \(did you mean 'optimizer.lr'\?\)$"),
        ({"every": 3}, r"unknown key 'every' \(did you mean 'eval.every' or 'samples.every'\?\)$"),
        ({"optimzer": {"lr": 3}}, r"unknown key 'optimzer' \(did you mean 'optimizer'\?\)$"),
        ({"steps": 0}, "steps must be greater than 0, got 0$"),
        ({"steps": "many"}, "steps must be a valid integer, got 'many'$"),
        ({"optimizer": {"rate": 1}}, "'optimizer.rate'; allowed: kind, lr, muon_lr"),
        (
            {"schedule": {"xyz": 1}},
            "'schedule.xyz'; allowed: kind, warmup_steps, decay_fraction, final_fraction$",
        ),
        (
            {"optimizer": {"kind": "mount"}},
            r"must be 'adamw' or 'muon', got 'mount' \(did you mean 'muon'\?\)$",
        ),
        (
            {"samples": {"prompts": [{"prompt": 3}]}},
            "samples.prompts.0.prompt must be a valid string or a valid list, got 3$",
        ),
        ({"data": []}, "data"),
        ({"data": {"tran": "x"}}, "train, test, views, replay and replay_share; got tran"),
        ({"data": {"train": "x", "replay_share": 1}}, "replay_share is 1; .*between 0 and 1"),
        ({"data": {"train": "x", "replay": [3]}}, "replay lists files, or sources .*; got 3"),
        ({"data": {"train": "x", "replay": {"path": "y", "weight": "much"}}}, "replay lists files.*much"),
        (
            {"data": {"train": "x", "replay": {"path": "y", "wieght": 2}}},
            r"unknown key 'data.1.wieght' \(did you mean 'weight'\?\)$",
        ),
        ({"init_from": "scratch", "tokenizers": {"text": "t"}, "modalities": {"a": "b"}}, "under tokenizers"),
        ({"data": [{"path": "a", "views": {"text->image": 1}, "wieght": 2}]}, "data.0.wieght"),
        ({"schedule": {"kind": "step"}}, "'cosine', 'wsd' or 'constant'"),
        ({"tokens_per_batch": 1000, "context": 512}, "not a multiple"),
        ({"init_from": "scratch"}, "text tokenizer"),
        ({"model": {"hidden_size": 8}}, "belong to init_from"),
        ({"lora": {}, "trainable": ["*.gate.*"]}, "no effect"),
        ({"loss": {"modality_weights": "fair"}}, "modality_weights"),
        ({"distributed": {"world_size": 3}}, "3 processes cannot share its rows evenly"),
        ({"distributed": {"mesh": "a.json", "deepspeed": "b.json"}}, "exclude each other"),
        ({"distributed": {"mesh": "a.json"}, "trainable": ["rows:image"]}, "no single rows"),
        ({"backbone": {"model": "a", "config": "b", "codecs": {}}}, "backbone.codecs"),
    ],
)
def test_bad_recipes_say_what_is_wrong(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TrainConfig.from_dict(recipe(**changes))


def test_overrides_reach_everywhere_and_leave_the_recipe_alone() -> None:
    before = recipe()
    changed = TrainConfig.overridden(
        before, ["steps=9", "data.0.weight=2.5", "optimizer.lr=1e-4", "trainable=['*.gate.*']"]
    )
    stage = TrainConfig.from_dict(changed)
    assert (stage.steps, stage.data[0].weight, stage.optimizer.lr) == (9, 2.5, 1e-4)
    assert stage.trainable == ["*.gate.*"] and before == recipe()
    tokenizers = {kind: kind for kind in ("text", "image", "dna")}
    kept = TrainConfig.overridden(recipe(tokenizers=tokenizers), ["steps=9"])["tokenizers"]
    assert list(kept) == list(tokenizers)  # ids are laid out in this order


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("steps", "key=value"),
        ("steps.x=1", "not a group"),
        ("data.7.path=x", "not an index"),
        ("data.x.path=x", "not an index"),
    ],
)
def test_bad_overrides(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TrainConfig.overridden(recipe(), [override])


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml is not a file"):
        TrainConfig.load(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected a mapping"):
        TrainConfig.load(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        TrainConfig.load(tmp_path / "broken.yaml")


def test_data_root_applies_to_partners_too() -> None:
    pair = {"path": "b", "take": {"speech": "speech"}}
    data = [{"path": "a", "views": {"text->image": 1}, "pair_with": pair}]
    stage = TrainConfig.from_dict(recipe(data=data, data_root="root"))
    (spec,) = stage.sources(stage.data)
    assert spec.path == "root/a" and spec.pair_with is not None and spec.pair_with.path == "root/b"


def test_data_in_short() -> None:
    short = TrainConfig.from_dict(recipe(data={"train": "my.jsonl", "test": "held.jsonl"}, eval={"every": 5}))
    assert [(one.path, one.views, one.split) for one in short.data] == [("my.jsonl", {"auto": 1}, "train")]
    assert [(one.path, one.split) for one in short.eval.data] == [
        ("held.jsonl", None)
    ] and short.eval.every == 5
    both = recipe(data={"train": "my.jsonl", "test": "my.jsonl", "views": {"text->image": 2}})
    [held_out] = TrainConfig.from_dict(both).eval.data
    assert (held_out.path, held_out.views, held_out.split) == ("my.jsonl", {"text->image": 2}, "test")
    assert TrainConfig.from_dict(
        TrainConfig.from_dict(both).model_dump(mode="json")
    ) == TrainConfig.from_dict(both)
    replayed = TrainConfig.from_dict(recipe(data={"train": "my.jsonl", "replay": ["old.jsonl", "older"]}))
    assert [(one.path, one.weight) for one in replayed.data] == [
        ("my.jsonl", 1),
        ("old.jsonl", 0.5),
        ("older", 0.5),
    ]
    old = [{"path": "old", "weight": 3, "views": {"image->text": 1}}, "older"]
    weighed = TrainConfig.from_dict(recipe(data={"train": "my.jsonl", "replay": old, "replay_share": 0.8}))
    assert [(one.weight, one.views) for one in weighed.data] == [
        (1, {"auto": 1}),
        (pytest.approx(3), {"image->text": 1}),
        (pytest.approx(1), {"auto": 1}),
    ]
    changed = TrainConfig.load(
        STAGES / "lora.yaml", ["data.train=my.jsonl", "init_from=mini", "output=out/my"]
    )
    assert changed.sources(changed.data)[0].path == "my.jsonl"


def test_dump_is_a_recipe_again() -> None:
    stage = TrainConfig.load(STAGES / "1_alignment.yaml")
    assert TrainConfig.from_dict(yaml.safe_load(yaml.safe_dump(stage.model_dump(mode="json")))) == stage
