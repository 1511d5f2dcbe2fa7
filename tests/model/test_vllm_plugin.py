"""vLLM's documented rules for models of its Transformers modelling backend, held to without vLLM.

vLLM is not installed where these tests run: they check the structure that it relies on, and call the decoder as it
does (all sequences packed in one row, an attention function of its own). Whether vLLM serves the model is checked on a
machine that has it: docs/serving.md.
"""

import inspect
import re
import sys
import tomllib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from anytoken import AnyToken
from anytoken.model import vllm_plugin
from anytoken.model.configuration import (
    AnyTokenConfig,
)
from anytoken.model.modeling import AnyTokenModel
from anytoken.model.moe import AnyTokenExperts, AnyTokenMoE
from anytoken.model.vllm_plugin import ServedModel, register
from anytoken.utils.errors import ConfigError

Make = Callable[..., AnyToken]
GROUPS = {"expert_groups": {"common": 2, "text": 1, "image": 1}}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shared": {"shared_expert_intermediate_size": 16},
    "groups": GROUPS,
    "bias": {"expert_bias": True},
    "dense": {"mlp_only_layers": [0], "qk_norm": "none"},
}


class Registry:
    """What `register` needs of vLLM's ModelRegistry."""

    models: dict[str, str] = {}

    @classmethod
    def get_supported_archs(cls) -> list[str]:
        return list(cls.models)

    @classmethod
    def register_model(cls, architecture: str, model: str) -> None:
        assert architecture not in cls.models
        cls.models[architecture] = model


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> type[Registry]:
    vllm = ModuleType("vllm")
    vllm.__spec__ = import_module("importlib.machinery").ModuleSpec("vllm", None)
    vllm.ModelRegistry = Registry
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setattr(Registry, "models", {})
    yield Registry
    AutoModel.register(AnyTokenConfig, AnyTokenModel, exist_ok=True)


@pytest.fixture(params=VARIANTS)
def served(request: pytest.FixtureRequest, make_whole_model: Make) -> tuple[AnyTokenModel, ServedModel]:
    """The decoder, and the same weights as vLLM builds it."""
    ours = make_whole_model(**VARIANTS[request.param]).lm.model
    theirs = ServedModel(ours.config).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def test_the_entry_point_is_declared_and_does_nothing_without_vllm() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, name = project["entry-points"]["vllm.general_plugins"]["anytoken"].split(":")
    assert getattr(import_module(module), name) is register
    assert "vllm" not in sys.modules
    register()
    assert "vllm" not in sys.modules


def test_registering_twice_is_registering_once(registry: type[Registry]) -> None:
    register()
    register()
    assert registry.models == {"AnyTokenForCausalLM": vllm_plugin.BACKEND}


def test_the_backend_builds_our_decoder_from_config_json(
    registry: type[Registry], make_whole_model: Make, tmp_path: Path
) -> None:
    folder = make_whole_model().save_pretrained(tmp_path / "model")
    register()
    config = AutoConfig.from_pretrained(folder)
    assert config.architectures == ["AnyTokenForCausalLM"] and config.get_text_config() is config
    with torch.device("meta"):
        assert type(AutoModel.from_config(config)) is ServedModel


def test_the_model_declares_what_the_backend_asks_for(served: tuple[AnyTokenModel, ServedModel]) -> None:
    model = served[1]
    assert model.is_backend_compatible() and model._supports_attention_backend
    assert {"input_ids", "inputs_embeds", "position_ids"} <= set(inspect.signature(model.forward).parameters)
    plan = model.config.base_model_pp_plan
    children = dict(model.named_children())
    assert list(plan) == [name for name, child in children.items() if any(True for _ in child.parameters())]
    assert [name for name, child in children.items() if isinstance(child, nn.ModuleList)] == ["layers"]
    patterns = [name.replace("*", r"\d+") for name in model.config.base_model_tp_plan]
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    unplanned = [name for name in linear if not any(re.fullmatch(one, name) for one in patterns)]
    assert all(
        ".shared_expert." in name for name in unplanned
    )  # a gated MLP, which is recognised by its form


def test_experts_are_named_packed_and_called_by_the_known_arguments(
    served: tuple[AnyTokenModel, ServedModel],
) -> None:
    blocks = [module for module in served[1].modules() if isinstance(module, AnyTokenMoE)]
    assert blocks
    for block in blocks:
        assert isinstance(block.experts, AnyTokenExperts)
        assert all(parameter.ndim == 3 for parameter in block.experts.parameters())
        names = list(inspect.signature(type(block.experts).forward).parameters)
        assert names[1:4] == ["hidden_states", "top_k_index", "top_k_weights"]
        output = block(torch.randn(1, 3, 32)) if not served[1].config.expert_groups else torch.empty(0)
        assert isinstance(output, Tensor)


def as_vllm_calls_it(model: nn.Module, rows: list[Tensor]) -> list[Tensor]:
    """Last hidden states of sequences packed in one row, by an attention function like vLLM's.

    It gets no mask, finds each layer's instance by the layer's index among the arguments passed down, and returns
    [tokens, heads * D].
    """
    lengths = [len(row) for row in rows]
    seen: list[int] = []

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **kwargs: Any
    ):
        assert mask is None and kwargs["attention_instances"][module.layer_idx] == f"layer {module.layer_idx}"
        seen.append(module.layer_idx)
        pieces = []
        for q, k, v in zip(*(one.split(lengths, 2) for one in (query, key, value)), strict=True):
            pieces.append(
                nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=True, scale=scaling, enable_gqa=True
                )
            )
        return torch.cat(pieces, 2)[0].transpose(0, 1).flatten(1), None

    ALL_ATTENTION_FUNCTIONS.register("vllm", attention)
    model.config._attn_implementation = "vllm"
    positions = torch.cat([torch.arange(length) for length in lengths])
    outputs = model(
        input_ids=torch.cat(rows)[None], inputs_embeds=None, use_cache=False, position_ids=positions[None],
        attention_instances={layer: f"layer {layer}" for layer in range(len(model.layers))}, return_dict=False,
    )  # fmt: skip
    assert seen == list(range(len(model.layers)))
    return list(outputs[0][0].split(lengths))


def test_called_as_vllm_does_it_gives_what_the_model_gives(served: tuple[AnyTokenModel, ServedModel]) -> None:
    ours, theirs = served
    rows = [torch.randint(ours.config.vocab_size, (length,)) for length in (5, 1, 9)]
    expected = [ours(row[None]).last_hidden_state[0] for row in rows]
    theirs.config = AnyTokenConfig(**{**ours.config.to_dict(), "num_experts": 4})
    for module in theirs.modules():
        if hasattr(module, "config"):
            module.config = theirs.config
    for got, want in zip(as_vllm_calls_it(theirs, rows), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_a_block_may_be_replaced_by_one_that_takes_hidden_states_alone(make_whole_model: Make) -> None:
    """vLLM puts a forward of its own in the place of a block whose router is a weight, softmax and top-k."""
    model = make_whole_model(shared_expert_intermediate_size=16).lm.model
    ids = torch.arange(12)[None]
    expected = model(ids).last_hidden_state
    for layer in model.layers:
        forward = layer.mlp.forward
        layer.mlp.forward = MethodType(
            lambda self, hidden_states, forward=forward: forward(hidden_states), layer.mlp
        )
        assert set(dict(layer.mlp.gate.state_dict())) == {"weight"}
    assert torch.equal(model(ids).last_hidden_state, expected)


@pytest.mark.parametrize("variant", ["groups", "bias"])
def test_a_router_that_vllm_would_misread_holds_more_than_a_weight(
    make_whole_model: Make, variant: str
) -> None:
    model = ServedModel(make_whole_model(**VARIANTS[variant]).lm.config)
    for layer in model.layers:
        held = [name for name, _ in [*layer.mlp.gate.named_parameters(), *layer.mlp.gate.named_buffers()]]
        assert "weight" in held and len(held) > 1
    assert not [name for name in model.state_dict() if name.endswith("grouped")]


@pytest.mark.parametrize(
    "settings", [{"num_null_experts": 1}, {"qk_norm": "projection"}, {"grid_positions": {"row": 4}}]
)
def test_what_cannot_be_served_is_refused(make_whole_model: Make, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(settings))}="):
        ServedModel(make_whole_model(**settings).lm.config)


def test_later_pipeline_stages_have_no_ids_for_groups(make_whole_model: Make) -> None:
    model = ServedModel(make_whole_model(**GROUPS).lm.config)
    with pytest.raises(ValueError, match="input_ids"):
        model(inputs_embeds=torch.randn(1, 4, 32))
