"""The language model against Qwen3-MoE, against itself cut into pieces, and against stored goldens."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from anytoken.model import AnyTokenConfig, AnyTokenForCausalLM
from anytoken.model.moe import group_mask
from anytoken.utils.errors import ConfigError

GOLDEN = Path(__file__).parents[1] / "goldens" / "model_tiny.safetensors"
TINY = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 16, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
MODALITIES = {
    "modality_boundaries": [32, 64], "modality_index": [0, 1, 2], "modality_names": ["text", "image", "speech"]
}  # fmt: skip
VARIANTS = {
    "plain": {},
    "shared": {"shared_expert_intermediate_size": 16},
    "top1_untied": {"num_experts_per_tok": 1, "tie_word_embeddings": False},
    "groups": {
        "expert_groups": {"common": 1, "text": 1, "image": 1, "speech": 1}, "num_experts_per_tok": 1, **MODALITIES
    },
    "null": {"num_null_experts": 2, "norm_topk_prob": True},
    "bias": {"expert_bias": True, "expert_groups": {"common": 2, "text": 2}, **MODALITIES},
    "dense": {"mlp_only_layers": [0, 1], "qk_norm": "none"},
    "sliding": {"use_sliding_window": True, "sliding_window": 7, "qk_norm": "projection", "mlp_only_layers": [0]},
    "mqa": {"num_attention_heads": 4, "num_key_value_heads": 1},
    "all_heads": {"num_key_value_heads": 2},
}  # fmt: skip


def tiny(**changes: object) -> AnyTokenForCausalLM:
    """A small random model, the same each time."""
    torch.manual_seed(0)
    return AnyTokenForCausalLM(AnyTokenConfig(**{**TINY, **changes})).eval()


def ids(rows: int = 2, length: int = 24, seed: int = 1) -> Tensor:
    """Random ids over the whole vocabulary."""
    return torch.randint(0, TINY["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=VARIANTS, name="lm")
def variant(request: pytest.FixtureRequest) -> AnyTokenForCausalLM:
    """Every kind of configuration goes through the same battery."""
    return tiny(**VARIANTS[request.param])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"norm_topk_prob": True, "tie_word_embeddings": False},
        {"mlp_only_layers": [1]},
        {"decoder_sparse_step": 2},
    ],
)
def test_plain_settings_are_a_qwen3_moe(settings: dict[str, object]) -> None:
    ours = tiny(**settings)
    settings = {
        k: v
        for k, v in ours.config.to_dict().items()
        if k in Qwen3MoeConfig().to_dict() and k != "model_type"
    }
    stock = Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings)).eval()
    stock.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(ids()).logits, stock(ids()).logits, rtol=0, atol=0)
    for lm in (ours, stock):
        lm.loss_function(lm(ids()).logits, ids(), 96).backward()
    gradients = [{name: p.grad for name, p in lm.named_parameters()} for lm in (ours, stock)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-7)


def test_later_ids_change_nothing_before_them(lm: AnyTokenForCausalLM) -> None:
    one, other = ids(), ids()
    other[:, 12:] = (other[:, 12:] + 7) % 96
    torch.testing.assert_close(lm(one).logits[:, :12], lm(other).logits[:, :12], rtol=0, atol=1e-6)
    assert not torch.allclose(lm(one).logits[:, 12:], lm(other).logits[:, 12:])


def test_cache_gives_what_no_cache_gives(lm: AnyTokenForCausalLM) -> None:
    full, cache, steps = lm(ids()).logits, None, []
    for position in range(ids().shape[1]):
        output = lm(ids()[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1), full, rtol=0, atol=1e-5)


def test_packed_samples_equal_separate_ones(lm: AnyTokenForCausalLM) -> None:
    row = ids(1)
    positions = torch.cat([torch.arange(9), torch.arange(15)])[None]
    packed = lm(row, position_ids=positions, use_cache=False).logits
    separate = torch.cat([lm(row[:, :9]).logits, lm(row[:, 9:]).logits], 1)
    torch.testing.assert_close(packed, separate, rtol=0, atol=1e-5)


def test_left_padding_changes_nothing(lm: AnyTokenForCausalLM) -> None:
    row = ids(1)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), row], 1)
    mask = (torch.arange(29) >= 5).long()[None]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    shifted = lm(padded, attention_mask=mask, position_ids=positions).logits[:, 5:]
    torch.testing.assert_close(shifted, lm(row).logits, rtol=0, atol=1e-5)


def test_save_and_load_with_the_auto_class(lm: AnyTokenForCausalLM, tmp_path: Path) -> None:
    lm.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    dense = 0 in lm.config.mlp_only_layers
    assert (
        f"model.layers.0.mlp.{'' if dense else 'experts.0.'}gate_proj.weight" in names
    )  # as serving engines expect
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert isinstance(loaded, AnyTokenForCausalLM)
    torch.testing.assert_close(loaded(ids()).logits, lm(ids()).logits, rtol=0, atol=0)


def test_generate_of_transformers_is_greedy_decoding(lm: AnyTokenForCausalLM) -> None:
    row = ids(1, 6)
    expected = row
    for _ in range(5):
        expected = torch.cat([expected, lm(expected).logits[:, -1:].argmax(-1)], 1)
    lm.generation_config.eos_token_id = None
    assert torch.equal(lm.generate(row, max_new_tokens=5, do_sample=False), expected)


def test_grouped_matrix_product_equals_the_plain_reference(lm: AnyTokenForCausalLM) -> None:
    results = []
    for implementation in ("eager", "grouped_mm"):
        lm.set_experts_implementation(implementation)
        lm.zero_grad()
        output = lm(ids(), labels=ids())
        output.loss.backward()
        grads = [
            p.grad.clone() for name, p in lm.named_parameters() if "experts" in name and p.grad is not None
        ]
        results.append([output.logits.detach(), *grads])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_one_batch_is_learnt_by_heart(lm: AnyTokenForCausalLM) -> None:
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-2)
    for _ in range(60):
        loss = lm(ids(), labels=ids()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    predicted = lm(ids()).logits[:, :-1].argmax(-1)
    assert (predicted == ids()[:, 1:]).float().mean() > 0.9


def test_a_token_reaches_only_its_own_groups() -> None:
    use = tiny(**VARIANTS["groups"])(ids(8, 64), output_expert_use=True).expert_use
    assert list(use) == ["text", "image", "speech"]
    for index, one in enumerate(use.values()):
        closed = [e for e in range(4) if e not in (0, 1 + index)]
        assert one.load[closed].sum() == 0 and one.load.sum() == pytest.approx(1.0)
        assert 0 <= one.entropy <= 1 and one.dropped == 0


def test_the_modality_is_looked_up_once_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    bucketize = torch.bucketize
    monkeypatch.setattr(torch, "bucketize", lambda *a, **k: calls.append(1) or bucketize(*a, **k))
    tiny(**VARIANTS["groups"])(ids(), labels=ids(), output_expert_use=True)
    assert len(calls) == 1


def test_groups_of_one_are_modality_ffns() -> None:
    """One expert a modality and no common one: each token goes through its modality's SwiGLU, weight 1."""
    lm = tiny(
        num_experts=3, num_experts_per_tok=1, num_hidden_layers=1,
        expert_groups={"text": 1, "image": 1, "speech": 1}, **MODALITIES,
    )  # fmt: skip
    mlp, states = lm.model.layers[0].mlp, torch.randn(2, 24, 32)
    modality = lm.model.modality_of(ids())
    expected = torch.empty_like(states)
    for index in range(3):
        gate, up = F.linear(states[modality == index], mlp.experts.gate_up_proj[index]).chunk(2, -1)
        expected[modality == index] = F.linear(F.silu(gate) * up, mlp.experts.down_proj[index])
    got = mlp(states, group_mask(lm.config)[modality.flatten()])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_null_experts_compute_nothing() -> None:
    """A token whose choices are all null passes the layer unchanged; one with a real choice gets just that."""
    mlp = tiny(num_null_experts=4, norm_topk_prob=True).model.layers[0].mlp
    states = torch.randn(3, 1, 32)
    bias = torch.zeros(8)
    bias[4:] = 9  # the router's own logits are small beside it
    mlp.gate.add_bias()
    mlp.gate.expert_bias += bias
    assert torch.equal(mlp(states), torch.zeros_like(states))
    mlp.gate.expert_bias[2] = 99
    gate, up = F.linear(states, mlp.experts.gate_up_proj[2]).chunk(2, -1)
    torch.testing.assert_close(mlp(states), F.linear(F.silu(gate) * up, mlp.experts.down_proj[2]))


def test_dropped_is_the_share_of_null_choices() -> None:
    lm = tiny(num_null_experts=2, num_hidden_layers=1)
    output = lm(ids(), output_router_logits=True, output_expert_use=True)
    null = (output.router_logits[0].topk(2).indices >= 4).float().mean().item()
    assert 0 < null < 1
    assert output.expert_use["text"].dropped == pytest.approx(null)
    assert output.expert_use["text"].load.sum().item() == pytest.approx(1 - null)


def test_jitter_moves_training_only() -> None:
    lm = tiny(router_jitter_noise=0.3)
    assert torch.equal(lm(ids()).logits, tiny()(ids()).logits)
    routed = lm.train()(ids(), output_router_logits=True).router_logits[0]
    still = tiny().train()(ids(), output_router_logits=True).router_logits[0]
    assert not torch.equal(routed, still)
    assert ((routed - still).abs() <= 0.3 * 0.02 * 32 * 5).all()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_bias_evens_the_load_without_touching_weights(checkpointing: bool) -> None:
    lm = tiny(num_experts_per_tok=1, num_hidden_layers=1)
    with torch.no_grad():
        lm.model.layers[0].mlp.gate.weight[0] += 0.2  # one expert is chosen far too often
    lm.add_expert_bias()
    if checkpointing:
        lm.gradient_checkpointing_enable()
    before = lm(ids(16), output_expert_use=True).expert_use["text"]
    lm.train()
    for _ in range(40):
        lm.model(ids(16)).last_hidden_state.sum().backward()
        lm.update_expert_bias(0.005)
    after = lm.eval()(ids(16), output_expert_use=True, output_router_logits=True)
    assert after.expert_use["text"].entropy > max(before.entropy, 0.97)
    router = lm.model.layers[0].mlp.gate
    logits, weights, choices = router(torch.randn(5, 32))
    assert torch.equal(weights, logits.softmax(-1).gather(1, choices))


def test_the_bias_stays_within_groups() -> None:
    """A modality with few tokens must not lift its own experts without end: groups are balanced inside."""
    lm = tiny(**VARIANTS["bias"]).train()
    text_only = ids() % 32
    for _ in range(3):
        lm(text_only)
        lm.update_expert_bias(1.0)
    bias = lm.model.layers[0].mlp.gate.expert_bias
    assert bias[:2].sum() == 0 and bias[2:].sum() == 0 and bias.abs().sum() > 0


def test_gradient_checkpointing_changes_no_gradient(lm: AnyTokenForCausalLM) -> None:
    gradients = []
    for on in (False, True):
        if on:
            lm.gradient_checkpointing_enable()
        lm.train().zero_grad()
        lm(ids(), labels=ids(), use_cache=False).loss.backward()
        gradients.append([p.grad.clone() for p in lm.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-7)


@pytest.mark.parametrize("training", [False, True])
def test_the_decoder_compiles_without_a_graph_break(training: bool) -> None:
    torch._dynamo.reset()
    settings = {**VARIANTS["bias"], "num_null_experts": 1, "use_sliding_window": True, "sliding_window": 7}
    lm = tiny(**settings, num_hidden_layers=2, mlp_only_layers=[1]).train(training)
    report = torch._dynamo.explain(lm.model)(input_ids=ids(), use_cache=False)
    assert (report.graph_count, report.graph_break_count) == (1, 0), report.break_reasons


@pytest.mark.slow
def test_compiled_is_the_same(lm: AnyTokenForCausalLM) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lm.model, backend="aot_eager", fullgraph=True)
    same = compiled(input_ids=ids(), use_cache=False).last_hidden_state
    torch.testing.assert_close(same, lm.model(ids()).last_hidden_state, rtol=0, atol=1e-6)


def test_a_sliding_window_sees_no_further() -> None:
    lm = tiny(**VARIANTS["sliding"], num_hidden_layers=1)
    other = ids()
    other[:, 0] = (other[:, 0] + 1) % 96
    changed = (lm(ids()).logits != lm(other).logits).any(-1)[0]
    assert torch.equal(changed.nonzero().squeeze(1), torch.arange(7))


def test_the_vocabulary_grows_without_moving_a_row(lm: AnyTokenForCausalLM, tmp_path: Path) -> None:
    before = lm(ids()).logits
    rows = torch.randn(7, 32)
    lm.extend_vocabulary(103, rows)
    torch.testing.assert_close(lm(ids()).logits[..., :96], before, rtol=0, atol=0)
    torch.testing.assert_close(lm.get_input_embeddings().weight[96:], rows)
    tied = lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
    assert tied == lm.config.tie_word_embeddings
    lm.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert again.config.vocab_size == 103
    with pytest.raises(ValueError, match="shrink"):
        lm.extend_vocabulary(50)


def test_active_parameters_leave_out_the_experts_not_chosen() -> None:
    lm = tiny()
    routed = sum(p.numel() for name, p in lm.named_parameters() if ".experts." in name)
    assert lm.num_active_parameters() == sum(p.numel() for p in lm.parameters()) - routed // 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts_per_tok": 5}, "num_experts_per_tok"),
        ({"expert_groups": {"common": 3}, **MODALITIES}, "add up"),
        ({"expert_groups": {"common": 3, "smell": 1}, **MODALITIES}, "smell"),
        ({"expert_groups": {"common": 1, "text": 3}, **MODALITIES}, "may use 1"),
        ({"expert_groups": {"common": 4}}, "needs modality_names"),
        ({"num_null_experts": -1}, "num_null_experts"),
        ({"router_jitter_noise": 1.5}, "router_jitter_noise"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AnyTokenConfig(**{**TINY, **settings})


def test_lora_wraps_saves_and_reloads(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    lm = tiny()
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], task_type="CAUSAL_LM",
    )  # fmt: skip
    wrapped = get_peft_model(lm, config)
    optimizer = torch.optim.AdamW((p for p in wrapped.parameters() if p.requires_grad), lr=1e-2)
    for _ in range(3):
        wrapped(input_ids=ids(), labels=ids()).loss.backward()
        optimizer.step()
    wrapped.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny(), tmp_path).eval()
    tuned = wrapped(input_ids=ids()).logits
    torch.testing.assert_close(again(input_ids=ids()).logits, tuned, rtol=0, atol=1e-6)
    assert not torch.allclose(tuned, tiny()(ids()).logits)


EVERYTHING = {
    **VARIANTS["bias"], "num_null_experts": 1, "router_modality_aux_loss_coef": 0.1, "mlp_only_layers": [1],
    "qk_norm": "projection", "use_sliding_window": True, "sliding_window": 7, "num_hidden_layers": 3,
}  # fmt: skip


def golden_run() -> dict[str, Tensor]:
    """Logits and ten training losses of tiny models: a refactor must reproduce them."""
    return golden_of(tiny(**VARIANTS["shared"]), "") | golden_of(tiny(**EVERYTHING), "everything_")


def golden_of(lm: AnyTokenForCausalLM, prefix: str) -> dict[str, Tensor]:
    logits = lm(ids()).logits.detach()[:, ::6].contiguous()
    lm.train()
    optimizer = torch.optim.SGD(lm.parameters(), lr=0.5)
    losses = []
    for step in range(10):
        loss = lm(ids(seed=step), labels=ids(seed=step)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if lm.config.expert_bias:
            lm.update_expert_bias(0.01)
        losses.append(loss.detach())
    return {f"{prefix}logits": logits, f"{prefix}losses": torch.stack(losses)}


def test_golden_logits_and_losses() -> None:
    """After a change that is meant, renew the file: python tests/model/test_modeling.py"""
    fresh, golden = golden_run(), load_file(GOLDEN)
    assert fresh.keys() == golden.keys()
    for name, expected in golden.items():
        torch.testing.assert_close(fresh[name], expected, rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    save_file(golden_run(), GOLDEN)
