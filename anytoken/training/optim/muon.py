"""Muon for hidden matrices, AdamW for everything else, as one optimizer.

Muon (Jordan et al. 2024; arXiv 2502.16982) replaces the momentum of a matrix by the nearest semi-orthogonal one, so
that all directions of a matrix move alike. ``torch.optim.Muon`` does this for single 2-D parameters; here the same
Newton-Schulz iteration (its coefficients, momentum and scale) runs over batches of matrices: the experts of a layer,
the parts of a fused projection, and all parameters of one shape together. Embeddings, the head, norms, biases and
routers stay with AdamW.

Shapes: N matrices, A outputs, B inputs, E experts.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from anytoken.training.config import OptimizerSpec
from anytoken.training.optim.param_groups import vocabulary_parameters
from anytoken.training.precision import quicker_dtype

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
EPS = 1e-7
MOMENTUM = 0.95
# Elements of matrices that are orthogonalised together: those that stay in a core's cache.
CHUNK = {"cpu": 2**19}
LARGE_CHUNK = 2**26  # on other devices
ROUTERS = ("gate", "router")  # names of the modules that hold a router's weight


def orthogonalise(matrices: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Each of [N, A, B] to about its nearest semi-orthogonal matrix (singular values from 0.7 to 1.2), in ``dtype``.

    The quintic Newton-Schulz iteration of ``torch.optim.Muon``; dtype: of the products.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).to(dtype)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.AdamW):
    """AdamW whose groups with ``muon: True`` are stepped by Muon; see the module's docstring.

    A Muon group has parameters [A, B] or [E, A, B]. parts: sizes of the matrices that lie one after the other in A.
    transposed: parameters are [B, A] (transformers' ``Conv1D``). dtype: name of the Newton-Schulz products' dtype; it
    is saved with the state, so that a run resumes with the same numbers on another machine.
    """

    def __init__(
        self, groups: list[dict[str, Any]], dtype: torch.dtype = torch.bfloat16, **adamw: Any
    ) -> None:
        settings = {"muon": False, "parts": None, "transposed": False, "dtype": str(dtype).split(".")[-1]}
        super().__init__([{**settings, **group} for group in groups], **adamw)

    def _init_group(self, group: dict[str, Any], *lists: Any) -> bool:
        return False if group["muon"] else bool(super()._init_group(group, *lists))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every group."""
        loss: float | None = super().step(closure)
        for group in self.param_groups:
            if group["muon"]:
                self._step_muon(group)
        return loss

    def _step_muon(self, group: dict[str, Any]) -> None:
        matrices = defaultdict(list)  # shape -> (weight, update), both views [A, B] of one matrix
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros(())  # AdamW's loader looks for it in every state
                state["momentum_buffer"] = torch.zeros_like(parameter)
            state["step"] += 1
            momentum = state["momentum_buffer"].lerp_(parameter.grad, 1 - MOMENTUM)
            update = parameter.grad.lerp(momentum, MOMENTUM)  # Nesterov
            for pair in zip(_matrices(parameter, group), _matrices(update, group), strict=True):
                matrices[pair[0].shape].append(pair)
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
        for (outputs, inputs), pairs in matrices.items():
            scale = group["lr"] * max(1.0, outputs / inputs) ** 0.5
            elements = CHUNK.get(pairs[0][0].device.type, LARGE_CHUNK)
            size = max(1, elements // (outputs * inputs))
            for chunk in (pairs[start : start + size] for start in range(0, len(pairs), size)):
                updates = torch.stack([update for _, update in chunk])
                found = orthogonalise(updates, getattr(torch, group["dtype"]))
                for (weight, _), update in zip(chunk, found, strict=True):
                    weight.add_(update, alpha=-scale)


def _matrices(tensor: Tensor, group: dict[str, Any]) -> list[Tensor]:
    """The single matrices [A, B] of a parameter, as views."""
    tensor = tensor.mT if group["transposed"] else tensor
    parts = tensor.split(group["parts"], dim=-2) if group["parts"] else [tensor]
    return [one for part in parts for one in (part if part.ndim == 3 else [part])]


def make_optimizer(
    spec: OptimizerSpec, model: PreTrainedModel, groups: list[dict[str, Any]]
) -> torch.optim.AdamW:
    """The optimizer of a recipe over a model's parameter groups."""
    adamw: dict[str, Any] = {"lr": spec.lr, "betas": spec.betas, "eps": spec.eps, "fused": True}
    if spec.kind == "adamw":
        return torch.optim.AdamW(groups, **adamw)
    return Muon(muon_groups(spec, model, groups), quicker_dtype(model.device), **adamw)


def muon_groups(
    spec: OptimizerSpec, model: PreTrainedModel, groups: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Take the hidden matrices out of AdamW's groups, into groups of their own by how they are fused; AdamW's first.

    A step's decay of weights stays that of AdamW, ``lr`` x weight_decay.
    """
    places = _hidden_matrices(model)
    kept, cut = [], []
    for group in groups:
        rest = [one for one in group["params"] if id(one) not in places]
        kept += [{**group, "params": rest}] if rest else []
        fused: dict[tuple[Any, bool], list[nn.Parameter]] = defaultdict(list)
        for one in group["params"]:
            if id(one) in places:
                fused[places[id(one)]].append(one)
        decay = group["weight_decay"] * spec.lr / spec.muon_lr
        shared = {"muon": True, "lr": spec.muon_lr, "weight_decay": decay}
        cut += [
            {"params": some, "parts": parts, "transposed": transposed, **shared}
            for (parts, transposed), some in fused.items()
        ]
    return kept + cut


def _hidden_matrices(model: PreTrainedModel) -> dict[int, tuple[tuple[int, ...] | None, bool]]:
    """Identity of each parameter that Muon steps -> sizes of the matrices it fuses, and whether it is transposed."""
    vocabulary, found = vocabulary_parameters(model), {}
    for name, module in model.named_modules():
        last = name.split(".")[-1]
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.ndim in (2, 3) and id(parameter) not in vocabulary and last not in ROUTERS:
                transposed = isinstance(module, Conv1D)
                weight = parameter.mT if transposed else parameter
                found[id(parameter)] = _parts(model, last if key == "weight" else key, weight), transposed
    return found


def _parts(model: PreTrainedModel, name: str, weight: Tensor) -> tuple[int, ...] | None:
    """Sizes of the matrices that a weight [..., A, B] fuses, None for a single one."""
    config, outputs = model.config, weight.shape[-2]
    if name == "gate_up_proj" and weight.shape[-1] == config.hidden_size and outputs % 2 == 0:
        return outputs // 2, outputs // 2
    if name in ("qkv_proj", "c_attn"):
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        keys = (getattr(config, "num_key_value_heads", None) or heads) * width
        if outputs == heads * width + 2 * keys:
            return heads * width, keys, keys
    return None
