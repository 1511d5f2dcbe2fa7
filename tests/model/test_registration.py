"""`import anytoken` is light; transformers' Auto classes know our model type once `anytoken.model` is imported."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIGHT = """
import sys, anytoken
assert [name for name in sys.modules if name.startswith("anytoken.")] == ["anytoken.moved"]
assert not {"torch", "transformers"} & set(sys.modules)
"""
CONFIG = """
from transformers import AutoConfig, AutoModelForCausalLM
AutoModelForCausalLM.from_config(AutoConfig.for_model("anytoken", num_hidden_layers=1, hidden_size=8))
"""


@pytest.mark.parametrize(
    "first", ["import anytoken.model", "from anytoken.inference.checkpoint import CHECKPOINT"]
)
def test_auto_classes_know_the_model_after_an_import(first: str) -> None:
    found = subprocess.run(
        [sys.executable, "-c", LIGHT + first + CONFIG], capture_output=True, text=True, cwd=ROOT
    )
    assert found.returncode == 0, found.stderr
