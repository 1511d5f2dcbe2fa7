"""Several PEFT adapters on one model, switched at run time, each as fast as the bare model.

An adapter is merged once and what it makes of the weights it changes is kept on the CPU; switching copies those back
in. That works for every adapter PEFT can merge (LoRA on attention, experts and router, DoRA, trained vocabulary rows),
whereas PEFT's own switching asks that all of them adapt the same experts, and costs time in every token. The price is
memory: a copy of the changed weights an adapter.
"""

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from anytoken.inference.checkpoint import merge_adapter
from anytoken.model.modalities import add_saved_modalities
from anytoken.processor import Processor


class AdapterError(ValueError):
    """An adapter's name that is unknown or taken."""


class Adapters:
    """The adapters of one model; `active` is the name of the one in its weights, or None."""

    def __init__(self, lm: PreTrainedModel) -> None:
        self.lm = lm
        self.active: str | None = None
        self._plain: dict[str, Tensor] = {}
        self._merged: dict[str, dict[str, Tensor]] = {}

    @property
    def names(self) -> list[str]:
        """All that were loaded, in order."""
        return list(self._merged)

    def load(self, folder: Path, name: str, processor: Processor) -> Processor:
        """Read an adapter; the weights stay as they are, but for rows of modalities that it brings.

        Returns the processor that knows those. AdapterError for a taken name, CheckpointError for a bad folder.
        """
        if name in self._merged:
            raise AdapterError(f"There is an adapter {name!r} already; there are {', '.join(self.names)}.")
        active = self.active
        self.use(None)
        processor = add_saved_modalities(self.lm, processor, folder)
        before = {key: one.detach().to("cpu", copy=True) for key, one in self.lm.named_parameters()}
        merge_adapter(self.lm, folder)
        after = dict(self.lm.named_parameters())
        changed = [key for key, one in before.items() if not torch.equal(one, after[key].detach().cpu())]
        self._merged[name] = {key: after[key].detach().to("cpu", copy=True) for key in changed}
        self._plain |= {key: before[key] for key in changed}
        self._write({key: before[key] for key in changed})
        self.use(active)
        return processor

    def use(self, name: str | None) -> None:
        """Put an adapter into the weights in place of the present one; None for the bare model."""
        if name is not None and name not in self._merged:
            raise AdapterError(f"There is no adapter {name!r}; there are {', '.join(self.names) or 'none'}.")
        if self.active is not None:
            self._write({key: self._plain[key] for key in self._merged[self.active]})
        if name is not None:
            self._write(self._merged[name])
        self.active = name

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        parameters = dict(self.lm.named_parameters())
        for key, value in values.items():
            parameters[key][: len(value)] = value.to(parameters[key])  # the vocabulary may have grown since
