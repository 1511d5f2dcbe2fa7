"""The flat step gives what the model's own forward gives, for every configuration that it takes."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_loop import asked, reference
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from anytoken.inference import fast_decode as flat_module
from anytoken.inference.api import AnyToken
from anytoken.inference.batch import Batch, BatchSequence
from anytoken.inference.engine import Engine
from anytoken.inference.fast_decode import blocked, flat_decoder, product
from anytoken.inference.kv_cache import KVCache
from anytoken.inference.model_runner import ModelRunner
from anytoken.inference.sampling import Sampling
from anytoken.model.configuration import AnyTokenConfig
from anytoken.model.modeling import AnyTokenForCausalLM

MODALITIES: dict[str, Any] = {
    "modality_names": ["text", "image"], "modality_boundaries": [50], "modality_index": [0, 1],
}  # fmt: skip
TAKEN: dict[str, dict[str, Any]] = {
    "plain": {},
    "one of each": {"num_attention_heads": 2, "num_key_value_heads": 2, "shared_expert_intermediate_size": 24},
    "shared heads": {"num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": False},
    "several experts": {"num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": True},
    "null experts": {"num_null_experts": 3, "num_experts_per_tok": 2, "norm_topk_prob": True},
    "bias": {"expert_bias": True},
    "groups": {"num_experts": 4, "expert_groups": {"common": 2, "image": 2}, "num_experts_per_tok": 2, **MODALITIES},
    "dense layer": {"mlp_only_layers": [0]},
    "no qk-norm": {"qk_norm": "none"},
    "another activation": {"hidden_act": "gelu"},
    "stretched positions": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
}  # fmt: skip


def make_lm(**settings: Any) -> AnyTokenForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 40, "moe_intermediate_size": 32,
        "num_experts": 4, "initializer_range": 0.2, "max_position_embeddings": 512,
    }  # fmt: skip
    lm = AnyTokenForCausalLM(AnyTokenConfig(**(sizes | settings))).eval()
    for name, buffer in lm.named_buffers():
        if name.endswith("expert_bias"):
            buffer.normal_(std=0.3)
    return lm


@torch.inference_mode()
def step_and_forward(
    lm: AnyTokenForCausalLM, lengths: list[int], steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states of rows of these lengths after so many single steps, and what plain forwards give."""
    torch.manual_seed(1)
    batch = Batch(ModelRunner(lm))
    sequences = [torch.randint(lm.config.vocab_size, (length + steps,)).tolist() for length in lengths]
    slots = [batch.add(ids[:length]) for ids, length in zip(sequences, lengths, strict=True)]
    batch.forward()
    rows = [sequences[slots.index(slot)] for slot in batch.slots]
    for _ in range(steps):
        for slot, ids in zip(batch.slots, rows, strict=True):
            slot.ids.append(ids[len(slot.ids)])
        found = batch.forward()
    expected = [lm.model(torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1] for ids in rows]
    return found, torch.stack(expected)


@pytest.mark.parametrize("large", [flat_module.LARGE, 1])
@pytest.mark.parametrize("settings", TAKEN.values(), ids=TAKEN)
def test_a_step_equals_the_forward(
    settings: dict[str, Any], large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flat_module, "LARGE", large)
    lm = make_lm(**settings)
    decoder, reason = flat_decoder(lm)
    assert decoder is not None, reason
    for lengths in ([5], [4, 9], [3, 70, 1, 9], [2] * 20):
        found, expected = step_and_forward(lm, lengths, 4)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_it_earns_its_lines_by_the_figures_that_it_quotes() -> None:
    path = Path(__file__).parents[2] / "docs/bench/decode.json"
    ratios = [row["ratio"] for row in json.loads(path.read_text())["rows"]]
    quoted = re.findall(r"\b\d\.\d\d\b", str(flat_module.__doc__))
    assert quoted == [f"{ratio:.2f}" for ratio in ratios]
    assert min(ratios[:2]) >= 1.15, "the bundled model's, at batch 1 and 8"


def test_storage_grows_without_loss() -> None:
    found, expected = step_and_forward(make_lm(), [250, 3], 20)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def no_recompiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled step that would run as it is, since nothing compiled fits, fails."""
    stance = torch.compiler.set_stance
    monkeypatch.setattr(torch.compiler, "set_stance", lambda _: stance("fail_on_recompile"))


@pytest.mark.slow
@pytest.mark.usefixtures("no_recompiling")
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_the_compiled_step_is_the_same_and_never_compiled_again(kv_heads: int) -> None:
    lm = make_lm(shared_expert_intermediate_size=24, num_key_value_heads=kv_heads)
    (compiled, _), (plain, _) = flat_decoder(lm), flat_decoder(lm)
    assert compiled is not None and plain is not None
    compiled.compile()
    with torch.inference_mode():
        for rows in (1, 2, 5):
            caches = [KVCache(torch.device("cpu"), torch.float32) for _ in range(2)]
            for position in range(300):
                ids, places = [position % 100] * rows, [position] * rows
                for cache in caches:
                    cache.reserve(rows, position + 1)
                    if not position:
                        empty = torch.zeros(kv_heads, 0, 16)
                        cache.write_row(0, [(empty, empty)] * 2, 0)
                found = compiled.step(ids, places, caches[0], 0)
                expected = plain.step(ids, places, caches[1], 0)
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("no_recompiling")
def test_a_compiled_engine_never_falls_back(model: AnyToken) -> None:
    greedy = {"image": Sampling(temperature=0)}
    prompts = [model.encode_prompt(words) for words in ("a", "a longer prompt", "b")]
    plain = Engine(model.lm, model.processor.grammar)
    compiled = Engine(model.lm, model.processor.grammar, compiled=True)
    for rows in (1, 2, 3):
        requests = asked(prompts[:rows], [("image",)] * rows, greedy)
        assert compiled.generate(requests) == plain.generate(requests)


def test_weights_changed_in_place_are_seen() -> None:
    lm = make_lm()
    head = ModelRunner(lm)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.mul_(0.7)
    assert head.decoder is not None
    with torch.inference_mode():
        batch = Batch(head)
        slot: BatchSequence = batch.add([1, 2, 3])
        batch.forward()
        slot.ids.append(4)
        found = batch.forward()
        expected = lm.model(torch.tensor([[1, 2, 3, 4]]), use_cache=False).last_hidden_state[:, -1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_what_is_not_known_is_left_to_the_model(caplog: pytest.LogCaptureFixture) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(make_lm(), LoraConfig(target_modules=["q_proj"]))
    assert flat_decoder(adapted.base_model.model) == (None, "model.layers.0.self_attn.q_proj is a Linear")
    hooked = make_lm()
    hooked.model.layers[0].register_forward_hook(lambda *_: None)
    assert flat_decoder(hooked) == (None, "model.layers.0 has hooks")
    changed = make_lm()
    changed.model.layers[0].self_attn.scaling *= 2  # taken from the first layer, so the second disagrees
    assert flat_decoder(changed)[0] is None
    assert flat_decoder(make_lm(qk_norm="projection"))[0] is None
    assert flat_decoder(make_lm(attention_bias=True))[0] is None
    with caplog.at_level(logging.INFO):
        assert ModelRunner(hooked).decoder is None
    assert "own forward: model.layers.0 has hooks" in caplog.text


def backbones(vocab_size: int) -> list[PreTrainedModel]:
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128, "initializer_range": 0.3,
    }  # fmt: skip
    torch.manual_seed(0)
    return [
        MistralForCausalLM(MistralConfig(**sizes, sliding_window=7)).eval(),
        Qwen2ForCausalLM(
            Qwen2Config(**sizes, use_sliding_window=True, sliding_window=7, max_window_layers=1)
        ).eval(),
    ]


@pytest.mark.parametrize("which", [0, 1])
def test_a_backbone_that_looks_back_only_so_far(model: AnyToken, which: int) -> None:
    """Models of transformers decode by their own forward, with the masks of their layers, in one batch."""
    lm = backbones(model.token_space.vocab_size)[which]
    engine, grammar = Engine(lm, model.processor.grammar), model.processor.grammar
    greedy = {kind: Sampling(temperature=0) for kind in model.kinds}
    prompts, plan = [[5, 6, 7], [9] * 12], ("image", "tone")
    found = engine.generate(asked(prompts, [plan] * 2, greedy, 60))
    assert [one.ids for one in found] == [reference(lm, grammar, prompt, plan, 60) for prompt in prompts]


@pytest.mark.parametrize("shape", [(8, 6), (9, 6), (512, 520), (514, 520)])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_blocked_product_is_a_product(shape: tuple[int, int], rows: int) -> None:
    weight, states = torch.randn(shape, dtype=torch.float64), torch.randn(rows, shape[1], dtype=torch.float64)
    matrix = blocked(weight)
    assert matrix.data_ptr() == weight.data_ptr() and matrix.ndim == (3 if shape == (512, 520) else 2)
    torch.testing.assert_close(product(states, matrix), states @ weight.T)
