"""Sample replies during training: the same prompts every N steps, stored as parts of the report.

``train`` receives the function that generates, since this package must not import ``inference``. The random state of
training is not changed, and samples that would take too much of the run's time are skipped.
"""

import html
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from anytoken.processor import Processor
from anytoken.training.config import SampleSpec
from anytoken.utils.atomic import write_file
from anytoken.utils.errors import ConfigError
from anytoken.utils.hints import nearest

logger = logging.getLogger(__name__)
FOLDER = "samples"
Answer = Callable[[PreTrainedModel, Processor, Any, Any], str]  # (model, processor, prompt, output) -> HTML


class Sampler:
    """Answers a recipe's prompts and writes ``samples/step-N.json`` in the run's folder."""

    def __init__(
        self, spec: SampleSpec, folder: Path, processor: Processor, answer: Answer | None, context: int
    ) -> None:
        """ConfigError for prompts that the model's context of this many ids cannot hold, or that nothing can answer.

        ValueError (RequestError, TokenizerError) for those that the processor cannot take.
        """
        if spec.prompts and answer is None:
            raise ConfigError(
                "samples.prompts need train(stage, answer): a function that answers; `anytoken train` has one"
            )
        for number, one in enumerate(spec.prompts):
            kinds = [one.output] if isinstance(one.output, str) else one.output
            for kind in kinds or []:
                if kind not in processor.kinds:
                    raise ConfigError(
                        f"samples: output {kind!r} is not a kind of the model"
                        f"{nearest(kind, processor.kinds)}; there are {', '.join(processor.kinds)}"
                    )
            length = len(processor.encode_chat(_as_prompt(one.prompt)))
            least = processor.grammar.min_remaining(processor.grammar.reply(kinds))
            if length + least > context:
                raise ConfigError(
                    f"samples.prompts.{number} has {length} ids and its shortest reply {least}, but the model's "
                    f"context is {context}; shorten the prompt or ask for less"
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
        """Answer all prompts with the model as it is; one that fails costs its sample, not the run."""
        assert self.answer is not None
        start, was_training = time.monotonic(), model.training
        found = []
        model.eval()
        with torch.random.fork_rng():
            for one in self.spec.prompts:
                try:
                    shown = self.answer(model, self.processor, _as_prompt(one.prompt), one.output)
                except Exception as error:  # of any library that decodes what was generated
                    logger.warning("step %d has no sample of %r: %s", step, one.prompt, error)
                    shown = f"<i>{html.escape(f'no sample: {error}')}</i>"
                found.append({"prompt": one.prompt, "output": one.output, "html": shown})
        model.train(was_training)
        write_file(self.folder / FOLDER / f"step-{step:08d}.json", json.dumps(found))
        self.spent += time.monotonic() - start


def _as_prompt(prompt: str | list[dict[str, str]]) -> Any:
    """A prompt of a recipe, whose paths are its owner's own."""
    if isinstance(prompt, str):
        return prompt
    content = [
        {key: Path(value) if key not in ("type", "text") and os.path.exists(value) else value
         for key, value in part.items()}
        for part in prompt
    ]  # fmt: skip
    return [{"role": "user", "content": content}]


def read_samples(folder: Path) -> list[tuple[int, list[dict[str, Any]]]]:
    """All samples of a run: (step, one entry a prompt), oldest first."""
    files = sorted((folder / FOLDER).glob("step-*.json"))
    return [(int(path.stem.split("-")[1]), json.loads(path.read_text(encoding="utf-8"))) for path in files]
