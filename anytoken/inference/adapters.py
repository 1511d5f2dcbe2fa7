"""Several PEFT adapters on one model, switched at run time, each as fast as the bare model.

An adapter is merged once, on a copy of the model, and the changed weights are kept on the CPU; switching copies them
in, and the previous weights back out. That works for every adapter PEFT can merge (LoRA on attention, experts and
router, DoRA, trained vocabulary rows), whereas PEFT's own switching requires that all adapt the same experts, and costs
time for every token. The price is memory: a copy of the changed weights per adapter, and a copy of the model while one
is loaded.
"""

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from anytoken.inference.checkpoint import merge_adapter
from anytoken.inference.weights import checksum
from anytoken.model.extend_vocab import add_saved_modalities
from anytoken.processor import Processor
from anytoken.utils.errors import CheckpointError
from anytoken.utils.hints import nearest


class Adapters:
    """The adapters of one model; `active` is the name of the one in its weights, or None."""

    def __init__(self, lm: PreTrainedModel) -> None:
        self.lm = lm
        self.active: str | None = None
        self._merged: dict[str, dict[str, Tensor]] = {}
        self._made_from: dict[str, int] = {}  # checksums of the bare weights that an adapter changes
        self._bare: dict[str, Tensor] = {}  # values that the active one replaced
        self._tied: dict[str, nn.Parameter] = {}  # parameters that it replaced

    @property
    def names(self) -> list[str]:
        """Names of the loaded adapters, in order."""
        return list(self._merged)

    def load(self, folder: Path, name: str, processor: Processor) -> Processor:
        """Load an adapter; the weights do not change, except for rows of modalities that it adds.

        Returns the processor with these modalities. CheckpointError for a used name, a model that cannot take adapters,
        or a folder that does not fit; then nothing has changed.
        """
        if name in self._merged:
            raise CheckpointError(f"There is an adapter {name!r} already; there are {', '.join(self.names)}.")
        self._check_model()
        active = self.active
        self.use(None)
        try:
            trial = _copy_on_cpu(self.lm)
            add_saved_modalities(trial, processor, folder)
            names = _parameters(trial).keys()
            merged = _parameters(merge_adapter(trial, folder))
            if merged.keys() != names:
                odd = min(merged.keys() ^ names)
                raise CheckpointError(f"The adapter {folder} adds or removes {odd}; it cannot be switched.")
            processor = add_saved_modalities(self.lm, processor, folder)
            bare = _parameters(self.lm)
            changed = {
                key: value.detach() for key, value in merged.items() if not value.cpu().equal(bare[key].cpu())
            }
            self._made_from[name] = checksum(bare[key] for key in changed)
            self._merged[name] = changed
        finally:
            self.use(active)
        return processor

    def unload(self, name: str) -> None:
        """Unload an adapter, after deactivating it if it is in use; CheckpointError for an unknown name."""
        self._check_known(name)
        if self.active == name:
            self.use(None)
        del self._merged[name], self._made_from[name]

    def _check_known(self, name: str) -> None:
        if name not in self._merged:
            raise CheckpointError(
                f"There is no adapter {name!r}{nearest(name, self.names)}; there are {', '.join(self.names) or 'none'}."
            )

    def use(self, name: str | None) -> None:
        """Switch to an adapter; None restores the bare model exactly.

        CheckpointError for an unknown name, or if the bare weights have changed since the adapter was loaded.
        """
        if name is not None:
            self._check_known(name)
        before = self.active
        self._take_off()
        if name is None:
            return
        bare, changed = _parameters(self.lm), self._merged[name]
        # The vocabulary may have grown.
        shown = {key: bare[key][: len(value)] for key, value in changed.items()}
        if checksum(shown.values()) != self._made_from[name]:
            if before is not None and before != name:
                self.use(before)
            raise CheckpointError(
                f"The weights have changed since the adapter {name!r} was read, and it was merged into those of "
                "then: load it again under another name."
            )
        self._bare = {key: bare[key].detach().to("cpu", copy=True) for key in changed}
        self._put(bare, changed)
        self.active = name

    @torch.no_grad()
    def _put(self, bare: Mapping[str, nn.Parameter], changed: Mapping[str, Tensor]) -> None:
        """Write changed values in place; a tied parameter that is changed under one name only is untied."""
        for key, value in changed.items():
            sharing = [other for other, one in bare.items() if one is bare[key]]
            if all(other in changed and torch.equal(changed[other], value) for other in sharing):
                bare[key][: len(value)] = value.to(bare[key])
                continue
            own = bare[key].detach().clone()
            own[: len(value)] = value.to(own)
            self._tied[key] = bare[key]
            _set(self.lm, key, nn.Parameter(own, requires_grad=bare[key].requires_grad))

    @torch.no_grad()
    def _take_off(self) -> None:
        for key, parameter in self._tied.items():
            _set(self.lm, key, parameter)
        parameters = _parameters(self.lm)
        for key, value in self._bare.items():
            parameters[key][: len(value)] = value.to(parameters[key])
        self._bare, self._tied, self.active = {}, {}, None

    def _check_model(self) -> None:
        quantized = getattr(self.lm, "quantized", None)
        if quantized:
            raise CheckpointError(
                f"The weights are quantized ({quantized}), and adapters are merged before quantization: open the "
                "checkpoint with adapter= and quantize= together, or without quantize=."
            )
        if hasattr(self.lm, "peft_config"):
            raise CheckpointError(
                "The model carries a PEFT adapter already: merge it first (model.lm = "
                "peft_model.merge_and_unload())."
            )


def _parameters(lm: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters by name, a tied one under each of its names."""
    return dict(lm.named_parameters(remove_duplicate=False))


def _set(lm: nn.Module, name: str, parameter: nn.Parameter) -> None:
    module, _, attribute = name.rpartition(".")
    setattr(lm.get_submodule(module), attribute, parameter)


def _copy_on_cpu(lm: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model with its tensors on the CPU, ties kept."""
    copies: dict[int, object] = {}
    for parameter in lm.parameters():
        value = parameter.detach().to("cpu", copy=True)
        copies[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    copies |= {id(buffer): buffer.to("cpu", copy=True) for buffer in lm.buffers()}
    return copy.deepcopy(lm, copies)
