"""Nobody is left out: every kind that is built in, every codec and every folder of tokenizers/ runs the battery."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from batteries import TokenizerBattery

from anytoken.tokenizers.base import BUILTIN
from anytoken.tokenizers.pretrained import CODECS

HERE = Path(__file__).parent
RECIPES = sorted((HERE.parents[1] / "tokenizers").rglob("*.yaml"))


def batteries() -> Iterator[type[TokenizerBattery]]:
    """The test classes of this folder and below that inherit the battery and are collected."""
    for path in sorted(HERE.rglob("test_*.py")):
        if path.name == Path(__file__).name or "Battery" not in path.read_text(encoding="utf-8"):
            continue
        spec = importlib.util.spec_from_file_location(f"batteries_of_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for name, one in vars(module).items():
            if name.startswith("Test") and isinstance(one, type) and issubclass(one, TokenizerBattery):
                yield one


@pytest.fixture(scope="module")
def tried() -> list[type[TokenizerBattery]]:
    return list(batteries())


def test_every_kind_that_is_built_in_runs_the_battery(tried):
    assert set(BUILTIN) <= {one.tokenizer_class.kind for one in tried}


def test_every_codec_of_transformers_runs_the_battery(tried):
    codecs = {(one.tokenizer_class.segment_type.kind, getattr(one, "codec", None)) for one in tried}
    assert {(kind, name) for name, codec in CODECS.items() for kind in codec.kinds} <= codecs


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.relative_to(HERE.parents[1]).as_posix())
def test_what_a_recipe_trains_runs_the_battery(path, tried):
    kind = yaml.safe_load(path.read_text(encoding="utf-8"))["kind"]
    if kind != "text":  # which has no codes but ids; tests/tokenizers/test_text.py
        assert kind in {one.tokenizer_class.kind for one in tried}


def test_a_test_is_left_out_only_where_a_codec_has_no_such_part(tried):
    for one in tried:
        left_out = {
            name for name in dir(TokenizerBattery) if name.startswith("test_") and getattr(one, name) is None
        }
        assert not left_out or one.tokenizer_class.kind.startswith(("pretrained_", "dna_")), one
