"""Run a stage given as JSON, with the toy modalities registered: what torchrun starts in the tests.

run_stage.py STAGE [STEP]: asked to stop during the step after STEP finished ones, as by Ctrl-C.
"""

import contextlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch

from anytoken.training.config import TrainConfig
from anytoken.training.interrupts import Interrupted
from anytoken.training.trainer import StageTrainer, train

spec = importlib.util.spec_from_file_location("toys", Path(__file__).with_name("conftest.py"))
assert spec is not None and spec.loader is not None
spec.loader.exec_module(importlib.util.module_from_spec(spec))
torch.set_num_threads(1)
if len(sys.argv) > 2:
    inner = StageTrainer.compute_loss

    def stopping(self: StageTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == int(sys.argv[2]) and self.args.process_index == 0:
            self.stop.asked = True
        return inner(self, *args, **kwargs)

    StageTrainer.compute_loss = stopping  # type: ignore[method-assign]
with contextlib.suppress(Interrupted):
    train(TrainConfig.from_dict(json.loads(Path(sys.argv[1]).read_text())))
