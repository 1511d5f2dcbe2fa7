"""Run a stage given as JSON, with the toy modalities registered: what torchrun starts in the tests."""

import importlib.util
import json
import sys
from pathlib import Path

import torch

from anytoken.training.stage import Stage
from anytoken.training.trainer import train

spec = importlib.util.spec_from_file_location("toys", Path(__file__).with_name("conftest.py"))
assert spec is not None and spec.loader is not None
spec.loader.exec_module(importlib.util.module_from_spec(spec))
torch.set_num_threads(1)
train(Stage.from_dict(json.loads(Path(sys.argv[1]).read_text())))
