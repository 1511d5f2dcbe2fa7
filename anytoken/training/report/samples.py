"""What a model says along the way: the same prompts every so many steps, kept as pieces of the report.

The room that generates lies to the right of this one, so ``train`` is handed a function that does. Random numbers of
the training are left as they were, and a run that spends too much of its time on samples skips some.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from anytoken.processor import Processor
from anytoken.training.config import (
    SampleSpec,
)
from anytoken.utils.atomic import write_file
from anytoken.utils.errors import ConfigError

FOLDER = "samples"
Answer = Callable[[PreTrainedModel, Processor, Any, Any], str]  # (model, processor, prompt, output) -> HTML


class Sampler:
    """Answers a recipe's prompts and writes ``samples/step-N.json`` in the run's folder."""

    def __init__(self, spec: SampleSpec, folder: Path, processor: Processor, answer: Answer | None) -> None:
        """ConfigError for prompts that the processor cannot take, or that nothing can answer."""
        if spec.prompts and answer is None:
            raise ConfigError(
                "samples.prompts need train(stage, answer): a function that answers; `anytoken train` has one"
            )
        for one in spec.prompts:
            processor.messages(_as_prompt(one.prompt))
            for kind in [one.output] if isinstance(one.output, str) else one.output or []:
                if kind not in processor.kinds:
                    raise ConfigError(
                        f"samples: output {kind!r} is no kind of the model; there are {', '.join(processor.kinds)}"
                    )
        self.processor = processor
        self.spec, self.folder, self.answer = spec, folder, answer
        self.began, self.spent = time.monotonic(), 0.0

    def due(self, step: int, last: bool) -> bool:
        """Whether step ``step`` is one to sample at and there is time; the last step always is."""
        if self.answer is None or not self.spec.prompts:
            return False
        if last:
            return True
        on_time = self.spent <= self.spec.share_of_time * (time.monotonic() - self.began)
        return bool(self.spec.every) and step % self.spec.every == 0 and on_time

    def take(self, step: int, model: PreTrainedModel) -> None:
        """Answer all prompts with the model as it is."""
        assert self.answer is not None
        start, was_training = time.monotonic(), model.training
        found = []
        model.eval()
        with torch.random.fork_rng():
            for one in self.spec.prompts:
                shown = self.answer(model, self.processor, _as_prompt(one.prompt), one.output)
                found.append({"prompt": one.prompt, "output": one.output, "html": shown})
        model.train(was_training)
        write_file(self.folder / FOLDER / f"step-{step:08d}.json", json.dumps(found))
        self.spent += time.monotonic() - start


def _as_prompt(prompt: str | list[dict[str, str]]) -> Any:
    return prompt if isinstance(prompt, str) else [{"role": "user", "content": prompt}]


def read_samples(folder: Path) -> list[tuple[int, list[dict[str, Any]]]]:
    """All samples of a run: (step, one entry a prompt), oldest first."""
    files = sorted((folder / FOLDER).glob("step-*.json"))
    return [(int(path.stem.split("-")[1]), json.loads(path.read_text(encoding="utf-8"))) for path in files]
