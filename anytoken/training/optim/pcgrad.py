"""PCGrad: measure conflicts between the gradients of the modalities and remove them by projection.

PCGrad (arXiv 2001.06782): if the gradients of two losses have a negative cosine, the component of each along the other
is removed. Without conflicts the step is unchanged. It costs one backward pass per modality of a batch plus one, and a
copy of the gradient for each: off by default, for runs whose log shows conflicts.

Shapes: G losses, P parameters.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def project(gradients: Tensor) -> Tensor:
    """Gradients [G, P] to [G, P]: the components of each that conflict with another are removed, in random order."""
    projected = gradients.clone()
    for row, own in enumerate(projected):
        for other in torch.randperm(len(gradients)).tolist():
            along = own @ gradients[other]
            if other != row and along < 0:
                own -= along / gradients[other].square().sum() * gradients[other]
    return projected


def cosines(gradients: Tensor) -> Tensor:
    """Cosine of every pair of gradients [G, P], float [G (G - 1) / 2]."""
    unit = gradients / gradients.norm(dim=1, keepdim=True).clamp(min=1e-30)
    rows, columns = torch.triu_indices(len(unit), len(unit), offset=1)
    return (unit @ unit.T)[rows, columns]


def backward(model: nn.Module, total: Tensor, parts: Sequence[Tensor], scale: float) -> dict[str, float]:
    """Add the projected gradient of ``total`` to the parameters; ``parts`` are the modalities' shares of it.

    The rest of ``total`` (the router losses) is not projected. scale: on the gradient. Returns the
    mean cosine of the parts' gradients and the share of pairs that conflict; {} if there is only one part.
    """
    parameters = [one for one in model.parameters() if one.requires_grad]
    own = torch.stack([_gradient(part, parameters, keep=True) for part in parts])
    rest = _gradient(total, parameters, keep=False) - own.sum(0)
    flat = scale * (project(own).sum(0) + rest)
    start = 0
    for one in parameters:
        piece = flat[start : start + one.numel()].view_as(one).to(one.dtype)
        one.grad = piece.clone() if one.grad is None else one.grad + piece
        start += one.numel()
    pairs = cosines(own)
    if not len(pairs):
        return {}
    return {"gradient_cosine": float(pairs.mean()), "gradient_conflict": float((pairs < 0).float().mean())}


def _gradient(loss: Tensor, parameters: list[nn.Parameter], keep: bool) -> Tensor:
    """The gradient of one loss, float32 [P]."""
    found = torch.autograd.grad(loss, parameters, retain_graph=keep, allow_unused=True)
    pairs = zip(found, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).float().reshape(-1) for g, p in pairs])
