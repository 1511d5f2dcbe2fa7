"""What FlashAttention is given in generation, and that the replies are those of other attention implementations."""

import logging
from typing import Any

import pytest
import torch
from reference_loop import asked
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import anytoken
from anytoken.inference.api import AnyToken
from anytoken.inference.engine import Engine
from anytoken.model import attention
from anytoken.model.attention import (
    flash_obstacle,
    use_attention,
)
from anytoken.tokenizers.base import ModalityTokenizer
from anytoken.utils.errors import ConfigError

FLASH = "flash_attention_2"
PROMPTS = ["red apple", "a", "What is this? green pear"]
CPU = torch.device("cpu")


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Stand in for the flash kernels with the plain formula; returns what each call is given, checked."""
    calls: list[dict[str, Any]] = []

    def kernel(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        scaling: float,
        **given: Any,
    ) -> tuple[Tensor, None]:
        assert attention_mask is None and query.dtype == key.dtype == value.dtype
        calls.append({"dtype": query.dtype, "device": query.device, "queries": query.shape, **given})
        if "cu_seq_lens_q" not in given:  # one sample a row, after a cache that all share
            ones = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool)
            mask = ones.tril(key.shape[2] - query.shape[2])
            found = F.scaled_dot_product_attention(query, key, value, mask, scale=scaling, enable_gqa=True)
            return found.transpose(1, 2), None
        edges_q, edges_k = given["cu_seq_lens_q"], given["cu_seq_lens_k"]
        counts, lengths = edges_q.diff().tolist(), edges_k.diff().tolist()
        assert edges_q.dtype == edges_k.dtype == torch.int32 and edges_q.device == query.device
        assert len(query) == 1 and query.shape[2] == sum(counts) and key.shape[2] == sum(lengths)
        assert (given["max_length_q"], given["max_length_k"]) == (max(counts), max(lengths))
        window = given.get("sliding_window")
        found = []
        for q, k, v in zip(
            query.split(counts, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True
        ):
            ones = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
            mask = ones.tril(k.shape[2] - q.shape[2])  # aligned at the end, as the kernels do
            if window is not None:
                mask &= ~ones.tril(k.shape[2] - q.shape[2] - window)
            found.append(
                F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=True)
            )
        return torch.cat(found, 2).transpose(1, 2), None

    monkeypatch.setitem(AttentionInterface._global_mapping, FLASH, kernel)
    monkeypatch.setattr(attention, "flash_obstacle", lambda *_: "")
    monkeypatch.setattr(attention, "HALF", (torch.float32, torch.bfloat16))  # so that numbers can be compared
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(
        PreTrainedModel, "_check_and_adjust_attn_implementation", lambda self, name, *_, **__: name
    )
    return calls


@pytest.mark.parametrize("output", ["text", ["image", "tone"]])
@pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 3, "cfg_scale": 3.0}])
def test_replies_are_the_same(
    own_model: AnyToken, passed: list[dict[str, Any]], output: Any, options: dict[str, Any]
) -> None:
    """In a batch of unequal prompts, alone, in chunks, and in a chat that goes on from what it has read."""
    options = {"max_new_tokens": 40, **options}
    prompts = [*PROMPTS, " ".join(PROMPTS * 4)]

    def replies() -> list[list[int]]:
        chat = own_model.chat()
        said = [chat.send(prompt, output, **options).ids for prompt in PROMPTS]
        together = own_model.generate(prompts, output, batch=True, **options)
        return [*said, *(reply.ids for reply in together), own_model.generate("a", output, **options).ids]

    expected = replies()
    use_attention(own_model.lm, FLASH, CPU, torch.float32)
    assert not passed and replies() == expected
    packed = [call for call in passed if "cu_seq_lens_q" in call]
    assert any(len(call["cu_seq_lens_q"]) > 3 and call["max_length_q"] > 1 for call in packed)
    assert own_model.engine.head().decoder is not None  # single ids go through the flat step


@pytest.mark.parametrize("name", [FLASH, "flex_attention"])
def test_answers_are_scored_the_same(own_model: AnyToken, passed: list[dict[str, Any]], name: str) -> None:
    answers = ["red apple", "a", "green pear and a red apple"]
    expected = own_model.score("What is this?", answers)
    use_attention(own_model.lm, name, CPU, torch.float32)
    assert own_model.score("What is this?", answers) == pytest.approx(expected, abs=1e-4)
    assert bool(passed) == (name == FLASH)


def test_a_chunked_prompt_is_read_the_same(
    own_model: AnyToken, passed: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anytoken.inference.batch.CHUNK", 7)
    expected = [reply.ids for reply in own_model.generate(PROMPTS, "image", batch=True, seed=1)]
    use_attention(own_model.lm, FLASH, CPU, torch.float32)
    assert [reply.ids for reply in own_model.generate(PROMPTS, "image", batch=True, seed=1)] == expected
    assert {call["max_length_q"] for call in passed if "max_length_q" in call} >= {7}


@pytest.mark.parametrize(
    "settings", [{"qk_norm": "projection"}, {"use_sliding_window": True, "sliding_window": 9}]
)
def test_a_model_without_the_flat_step_decodes_the_same(
    own_model: AnyToken, passed: list[dict[str, Any]], settings: dict[str, Any]
) -> None:
    config = type(own_model.lm.config)(**{**own_model.lm.config.to_dict(), **settings})
    torch.manual_seed(0)
    model = AnyToken(type(own_model.lm)(config).eval(), own_model.processor)
    expected = [reply.ids for reply in model.generate(PROMPTS, ["text", "image"], batch=True, temperature=0)]
    use_attention(model.lm, FLASH, CPU, torch.float32)
    found = [reply.ids for reply in model.generate(PROMPTS, ["text", "image"], batch=True, temperature=0)]
    assert found == expected and model.engine.head().decoder is None
    assert any(call.get("max_length_q") == 1 and len(call["cu_seq_lens_q"]) == 4 for call in passed)


def test_another_architecture_and_an_adapted_model_decode_the_same(
    own_model: AnyToken, passed: list[dict[str, Any]]
) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=own_model.token_space.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=32, max_position_embeddings=256, initializer_range=0.2,
    )  # fmt: skip
    llama = LlamaForCausalLM(config).eval()
    wrapped = get_peft_model(own_model.lm, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for lm in (llama, wrapped):
        engine = Engine(lm, own_model.processor.grammar)
        prompts = [own_model.encode_prompt(prompt) for prompt in PROMPTS]
        expected = engine.generate(asked(prompts, [["image"]] * 3, seed=2))
        base = lm.get_base_model() if lm is wrapped else lm
        use_attention(base, FLASH, CPU, torch.float32)
        passed.clear()
        assert engine.generate(asked(prompts, [["image"]] * 3, seed=2)) == expected and passed


def test_a_prompt_is_read_with_sdpa_where_flex_is_asked_for(own_model: AnyToken) -> None:
    expected = [reply.ids for reply in own_model.generate(PROMPTS, "image", batch=True, seed=1)]
    assert use_attention(own_model.lm, "flex_attention", CPU, torch.float32) == "flex_attention"
    assert [reply.ids for reply in own_model.generate(PROMPTS, "image", batch=True, seed=1)] == expected
    assert own_model.lm.config._attn_implementation == "flex_attention"


def test_bfloat16_is_what_the_kernel_gets(own_model: AnyToken, passed: list[dict[str, Any]]) -> None:
    own_model.lm.bfloat16()
    use_attention(own_model.lm, FLASH, CPU, torch.bfloat16)
    assert own_model.generate("red apple", "image", seed=0).images
    assert passed and {(call["dtype"], call["device"]) for call in passed} == {(torch.bfloat16, CPU)}


def test_float32_weights_never_meet_the_kernel(
    own_model: AnyToken, passed: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As while training under autocast: samples for the report are made with sdpa, and training goes on with flash."""
    expected = own_model.generate(PROMPTS, "image", batch=True, seed=0)
    use_attention(own_model.lm, FLASH, CPU, torch.bfloat16)
    monkeypatch.setattr(attention, "HALF", (torch.bfloat16,))
    found = own_model.generate(PROMPTS, "image", batch=True, seed=0)
    assert [one.ids for one in found] == [one.ids for one in expected] and not passed
    assert own_model.lm.config._attn_implementation == FLASH


def test_auto_takes_flash_where_it_can_run(
    own_model: AnyToken,
    passed: list[dict[str, Any]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO, "anytoken")
    assert use_attention(own_model.lm, "auto", CPU, torch.bfloat16) == FLASH
    assert "attention: flash_attention_2 on cpu in bfloat16" in caplog.text
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert use_attention(own_model.lm, "auto", CPU, torch.bfloat16) == "flash_attention_3"
    own_model.lm.config._attn_implementation = "sdpa"
    monkeypatch.setattr(attention, "flash_obstacle", flash_obstacle)
    assert use_attention(own_model.lm, "auto", CPU, torch.bfloat16) == "sdpa"
    assert "attention: sdpa on cpu in bfloat16 (no FlashAttention: it needs a CUDA device" in caplog.text


def test_what_stands_in_the_way_is_said(own_model: AnyToken, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, gpu = own_model.lm, torch.device("cuda")
    assert "CUDA device" in flash_obstacle(FLASH, lm, CPU, torch.bfloat16)
    assert "float32" in flash_obstacle(FLASH, lm, gpu, torch.float32)
    assert "flash_attn" in flash_obstacle(FLASH, lm, gpu, torch.float16)
    monkeypatch.setitem(attention.FLASH, FLASH, (lambda: True, "flash_attn"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "T4")
    for major, says in ((7, "Ampere.*T4"), (8, "")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, major=major: (major, 0))
        assert bool(flash_obstacle(FLASH, lm, gpu, torch.bfloat16)) == bool(says)
    lm.config.head_dim = 260
    assert "260" in flash_obstacle(FLASH, lm, gpu, torch.bfloat16)


def test_load_switches_attention_and_says_what_it_knows(own_model: AnyToken, tmp_path: Any) -> None:
    folder = own_model.save_pretrained(tmp_path / "model")
    for name in ("sdpa", "eager", "flex_attention"):
        assert anytoken.load(folder, "cpu", attn_implementation=name).lm.config._attn_implementation == name
    assert anytoken.load(folder, "cpu").lm.config._attn_implementation == "sdpa"
    with pytest.raises(ConfigError, match=r"'flash'; allowed: auto, eager, sdpa"):
        anytoken.load(folder, attn_implementation="flash")
    with pytest.raises(ConfigError, match=r"flash_attention_3 cannot run here.*Choose auto or sdpa"):
        anytoken.load(folder, "cpu", attn_implementation="flash_attention_3")


def test_media_tokenizers_move_with_the_model(
    own_model: AnyToken, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, toys: Any
) -> None:
    folder, moved = own_model.save_pretrained(tmp_path / "model"), []
    original = ModalityTokenizer.to
    monkeypatch.setattr(
        ModalityTokenizer, "to", lambda self, *to: (moved.append((self.name, *to)), original(self, *to))[1]
    )
    model = anytoken.load(folder, "cpu")
    model.add_modality(toys.HumTokenizer())
    assert moved == [("image", CPU), ("tone", CPU), ("hum", CPU)]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"])
def test_mini_reads_prompts_alike_on_a_gpu(name: str) -> None:
    """Log-probabilities of a greedy reply in bfloat16: as near to float32 as twice what eager attention is."""
    plain = anytoken.load("mini", "cuda", attn_implementation="eager")
    if attention.FLASH.get(name) and flash_obstacle(name, plain.lm, plain.lm.device, torch.bfloat16):
        pytest.skip(f"{name} is not installed")
    prompts = [plain.encode_prompt(prompt) for prompt in ("a red apple, 3d", "a fox", "What is this?")]

    def features(dtype: torch.dtype, implementation: str) -> Tensor:
        model = anytoken.load("mini", "cuda")
        model.lm.to(dtype)
        use_attention(model.lm, implementation, model.lm.device, dtype)
        from anytoken.inference.batch import Batch

        batch = Batch(model.engine.head())
        for prompt in prompts:
            batch.add(prompt)
        with torch.inference_mode():
            return batch.forward().float().cpu()

    exact = features(torch.float32, "eager")
    errors = [(features(torch.bfloat16, one) - exact).abs().max() for one in ("eager", name)]
    assert errors[1] <= 2 * errors[0] + 1e-2
    assert all(one.device.type == "cuda" for one in plain.processor.tokenizers["image"].parameters())
