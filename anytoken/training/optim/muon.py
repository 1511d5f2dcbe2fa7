"""Muon for hidden matrices, AdamW for everything else, as one optimizer.

Muon (Jordan et al. 2024; arXiv 2502.16982) replaces the momentum of a matrix by the nearest semi-orthogonal one, so
that all directions of a matrix are updated equally. ``torch.optim.Muon`` does this for single 2-D parameters; here the
same Newton-Schulz iteration (its coefficients, momentum and scale) runs over batches of matrices: the experts of a
layer, the parts of a fused projection, and all parameters of one shape together. Embeddings, the head, norms, biases
and routers stay with AdamW.

Processes that train one model by data parallelism share the iteration out, as in arXiv 2502.16982 (section 2.3): each
orthogonalises some of the batches, and broadcasts what it found in the dtype of the products. Momentum is kept by all
of them, since their gradients are equal: any number of processes resumes a state, and any number takes the same steps
to the last bit.

Shapes: N matrices, A outputs, B inputs, E experts.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from anytoken.training.config import OptimizerSpec
from anytoken.training.optim.param_groups import vocabulary_parameters
from anytoken.training.precision import quicker_dtype

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
EPS = 1e-7
MOMENTUM = 0.95
# Elements of matrices that are orthogonalized together: those that stay in a core's cache.
CHUNK = {"cpu": 2**19}
LARGE_CHUNK = 2**26  # on other devices
ROUTERS = ("gate", "router")  # names of the modules that hold a router's weight


def orthogonalise(matrices: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Map each of [N, A, B] to approximately its nearest semi-orthogonal matrix (singular values from 0.7 to 1.2), in
    ``dtype``.

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


class Chunk(NamedTuple):
    """Matrices [A, B] that are orthogonalized together: views of weights, gradients and momenta."""

    matrices: list[tuple[Tensor, Tensor, Tensor]]
    scale: float
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int, int]:
        """[N, A, B]."""
        outputs, inputs = self.matrices[0][0].shape
        return len(self.matrices), outputs, inputs

    def direction(self) -> Tensor:
        """The orthogonalized updates, [N, A, B]."""
        gradients, momenta = (torch.stack([one[place] for one in self.matrices]) for place in (1, 2))
        return orthogonalise(gradients.lerp_(momenta, MOMENTUM), self.dtype)  # Nesterov

    def move(self, directions: Tensor) -> None:
        """Update the weights."""
        for (weight, _, _), direction in zip(self.matrices, directions, strict=True):
            weight.add_(direction, alpha=-self.scale)


class Muon(torch.optim.AdamW):
    """AdamW whose groups with ``muon: True`` are stepped by Muon; see the module's docstring.

    A Muon group has parameters [A, B] or [E, A, B]. parts: sizes of the matrices that are concatenated along A.
    transposed: parameters are [B, A] (transformers' ``Conv1D``). dtype: name of the Newton-Schulz products' dtype; it
    is saved with the state, so that a run resumes with the same numbers on another machine. processes: the processes
    that share the work; each must call `step` with the same parameters and gradients.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        dtype: torch.dtype = torch.bfloat16,
        processes: dist.ProcessGroup | None = None,
        **adamw: Any,
    ) -> None:
        settings = {"muon": False, "parts": None, "transposed": False, "dtype": str(dtype).split(".")[-1]}
        self.processes = processes
        super().__init__([{**settings, **group} for group in groups], **adamw)

    def _init_group(self, group: dict[str, Any], *lists: Any) -> bool:
        return False if group["muon"] else bool(super()._init_group(group, *lists))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every group."""
        loss: float | None = super().step(closure)
        chunks = [chunk for group in self.param_groups if group["muon"] for chunk in self._chunks(group)]
        if self.processes is None:
            for chunk in chunks:
                chunk.move(chunk.direction())
        else:
            self._step_shared(chunks, self.processes)
        return loss

    def _chunks(self, group: dict[str, Any]) -> Iterator[Chunk]:
        """Update the momenta of a group and decay its weights; returns its matrices in chunks of equal shape."""
        matrices: dict[torch.Size, list[tuple[Tensor, Tensor, Tensor]]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros(())  # AdamW's loader looks for it in every state
                state["momentum_buffer"] = torch.zeros_like(parameter)
            state["step"] += 1
            momentum = state["momentum_buffer"].lerp_(parameter.grad, 1 - MOMENTUM)
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            views = (_matrices(one, group) for one in (parameter, parameter.grad, momentum))
            for weight, gradient, own in zip(*views, strict=True):
                matrices[weight.shape].append((weight, gradient, own))
        for (outputs, inputs), found in matrices.items():
            scale = group["lr"] * max(1.0, outputs / inputs) ** 0.5
            elements = CHUNK.get(found[0][0].device.type, LARGE_CHUNK)
            size = max(1, elements // (outputs * inputs))
            for start in range(0, len(found), size):
                yield Chunk(found[start : start + size], scale, getattr(torch, group["dtype"]))

    @staticmethod
    def _step_shared(chunks: list[Chunk], processes: dist.ProcessGroup) -> None:
        """Update each chunk by the directions from its owner, which are sent while others are computed."""
        rank, sent = dist.get_rank(processes), []
        for chunk, owner in zip(chunks, owners(chunks, dist.get_world_size(processes)), strict=True):
            if owner == rank:
                found = chunk.direction().contiguous()
            else:
                found = torch.empty(chunk.shape, dtype=chunk.dtype, device=chunk.matrices[0][0].device)
            work = dist.broadcast(found, group=processes, group_src=owner, async_op=True)
            assert work is not None  # as for those that are not in the group
            sent.append((chunk, found, work))
        for chunk, found, work in sent:
            work.wait()
            chunk.move(found)


def owners(chunks: Sequence[Chunk], processes: int) -> list[int]:
    """The process that orthogonalizes each chunk: the most expensive first, each to the least loaded process."""
    load, found = [0.0] * processes, [0] * len(chunks)
    costs = []
    for chunk in chunks:
        number, *sides = chunk.shape
        short, long = sorted(sides)
        costs.append(number * short**2 * (2 * long + short))  # of one Newton-Schulz iteration
    for place in sorted(range(len(chunks)), key=lambda place: -costs[place]):
        found[place] = load.index(min(load))
        load[found[place]] += costs[place]
    return found


def _matrices(tensor: Tensor, group: dict[str, Any]) -> list[Tensor]:
    """The single matrices [A, B] of a parameter, as views."""
    tensor = tensor.mT if group["transposed"] else tensor
    parts = tensor.split(group["parts"], dim=-2) if group["parts"] else [tensor]
    return [one for part in parts for one in (part if part.ndim == 3 else [part])]


def make_optimizer(
    spec: OptimizerSpec,
    model: PreTrainedModel,
    groups: list[dict[str, Any]],
    processes: dist.ProcessGroup | None = None,
) -> torch.optim.AdamW:
    """The optimizer of a recipe over a model's parameter groups; processes: the processes with equal gradients."""
    adamw: dict[str, Any] = {"lr": spec.lr, "betas": spec.betas, "eps": spec.eps, "fused": True}
    if spec.kind == "adamw":
        return torch.optim.AdamW(groups, **adamw)
    return Muon(muon_groups(spec, model, groups), quicker_dtype(model.device), processes, **adamw)


def muon_groups(
    spec: OptimizerSpec, model: PreTrainedModel, groups: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Move the hidden matrices from AdamW's groups to groups of their own, one per kind of fusion; AdamW's come first.

    Weight decay per step stays that of AdamW, ``lr`` x weight_decay.
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
