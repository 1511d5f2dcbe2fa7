"""int8 weights for inference: one byte a weight instead of four, one float32 scale an output row.

Symmetric and of weights only, by torchao; activations keep their precision, so the error is that of rounding a weight
(after LLM.int8, arXiv 2208.07339, without its outlier path). Experts are 3-D parameters, which is most of a model, and
are split into one parameter an expert for it: torchao's tensors cannot be sliced in inference mode. The embedding, the
head (generation reads single rows of it), norms and routers keep their precision. `anytoken bench quantize` measures
what it saves and costs.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from anytoken.utils.errors import ConfigError

KINDS = ("int8",)


def quantize_weights(lm: PreTrainedModel, kind: str) -> None:
    """Quantise a model in place, for inference only; ConfigError for an unknown kind or without torchao."""
    if kind not in KINDS:
        raise ConfigError(f"quantize must be one of {', '.join(KINDS)}, or None; received {kind!r}.")
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ConfigError("quantize needs torchao: pip install 'anytoken[quantize]'.") from error
    config, head = Int8WeightOnlyConfig(), lm.get_output_embeddings()
    lm.requires_grad_(False)
    quantize_(lm, config, lambda module, _: isinstance(module, nn.Linear) and module is not head)
    for module in list(lm.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim == 3:
                matrices = nn.ModuleList(_as_linear(matrix) for matrix in parameter.data)
                quantize_(matrices, config)
                delattr(module, name)  # a loop over experts indexes a list just the same
                setattr(module, name, nn.ParameterList(linear.weight for linear in matrices))
    if lm._can_set_experts_implementation():
        lm.set_experts_implementation("eager")  # that loop; grouped products take no quantised weights
    lm.quantized = kind


def _as_linear(matrix: Tensor) -> nn.Linear:
    """matrix [out, in] as the layer that torchao knows how to quantise."""
    linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(matrix, requires_grad=False)
    return linear


def weight_bytes(lm: PreTrainedModel) -> int:
    """Bytes of memory that the parameters take, a quantised one with its scales."""
    parts: list[Tensor] = []
    for parameter in lm.parameters():
        names = getattr(parameter, "tensor_data_names", None)  # torchao's tensors are several
        parts += [parameter] if names is None else [getattr(parameter, name) for name in names]
    return sum(part.numel() * part.element_size() for part in parts)
