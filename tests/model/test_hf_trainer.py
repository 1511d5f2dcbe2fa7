"""Under transformers' own Trainer the model trains as stock Qwen3-MoE does, however a batch is cut into parts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Trainer, TrainingArguments

from anytoken.model import AnyTokenConfig, AnyTokenForCausalLM

TINY = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 16, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
NO_TERMS = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0, "output_z_loss_coef": 0.0}
MODALITIES = {
    "modality_boundaries": [32, 64],
    "modality_index": [0, 1, 2],
    "modality_names": ["text", "a", "b"],
}
CUTS = [(4, 1), (2, 2), (1, 4)]  # rows at once and accumulation
LENGTHS = (16, 9, 5, 12)


def samples(padded: bool) -> list[dict[str, Tensor]]:
    """Eight rows of 16 ids; padded: real tokens are fewer, with padding on the right."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for row in range(8):
        ids = torch.randint(96, (16,), generator=generator)
        real = torch.arange(16) < (LENGTHS[row % 4] if padded else 16)
        one = {"input_ids": ids * real, "labels": ids.where(real, -100)}
        found.append(one | ({"attention_mask": real.long()} if padded else {}))
    return found


def ours(**settings: Any) -> AnyTokenForCausalLM:
    torch.manual_seed(0)
    return AnyTokenForCausalLM(AnyTokenConfig(**{**TINY, **settings}))


def stock() -> Qwen3MoeForCausalLM:
    made = ours(**NO_TERMS)
    known = Qwen3MoeConfig().to_dict()
    settings = {k: v for k, v in made.config.to_dict().items() if k in known and k != "model_type"}
    other = Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings))
    other.load_state_dict(made.state_dict())
    return other


def train(
    model: Any, folder: Path, cut: tuple[int, int], padded: bool
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of two steps of four rows, as the Trainer logs them, and the weights after."""
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=cut[0], gradient_accumulation_steps=cut[1], max_steps=2,
        learning_rate=1e-3, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=samples(padded))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("padded", [False, True])
def test_every_cut_trains_as_stock_qwen3_moe(tmp_path: Path, padded: bool) -> None:
    expected, weights = train(stock(), tmp_path, CUTS[0], padded)
    for cut in CUTS:
        losses, found = train(ours(**NO_TERMS), tmp_path, cut, padded)
        assert losses == pytest.approx(expected, abs=2e-4)  # the log rounds
        torch.testing.assert_close(found, weights, rtol=0, atol=2e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_further_terms_count_once_for_every_cut(tmp_path: Path, padded: bool) -> None:
    """Load balance is a product of two means, so that of parts differs a little from that of the whole."""
    whole, *parts = (
        train(
            ours(router_aux_loss_coef=0.1, router_z_loss_coef=0.1, output_z_loss_coef=0.1),
            tmp_path,
            cut,
            padded,
        )[0]
        for cut in CUTS
    )
    assert whole[0] > train(ours(**NO_TERMS), tmp_path, CUTS[0], padded)[0][0] + 0.1
    for part in parts:
        assert part == pytest.approx(whole, rel=1e-2)


def loss(lm: AnyTokenForCausalLM, rows: list[dict[str, Tensor]], **more: Any) -> Tensor:
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return lm(**batch, **more).loss


@pytest.mark.parametrize("padded", [False, True])
def test_parts_add_up_to_the_whole(padded: bool) -> None:
    """Exactly where rows are alike; otherwise means over tokens are weighted by targets, which are one fewer."""
    lm, rows = ours(**{**NO_TERMS, "output_z_loss_coef": 1.0, "router_z_loss_coef": 1.0}), samples(padded)
    total = sum(int((row["labels"][1:] != -100).sum()) for row in rows)
    parts = sum(loss(lm, rows[start : start + 2], num_items_in_batch=total) for start in range(0, 8, 2))
    torch.testing.assert_close(parts, loss(lm, rows), rtol=2e-3 if padded else 1e-6, atol=0)
    torch.testing.assert_close(loss(lm, rows, num_items_in_batch=torch.tensor(total)), loss(lm, rows))


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("name", [*NO_TERMS, "router_modality_aux_loss_coef"])
def test_padding_counts_in_no_term(name: str, left: bool) -> None:
    lm = ours(**{**NO_TERMS, **MODALITIES, name: 1.0})
    ids = samples(False)[0]["input_ids"][None]
    expected = lm(ids, labels=ids, output_expert_use=True)
    filler = torch.full((1, 7), 95)  # of a modality of its own
    order = (filler, ids) if left else (ids, filler)
    mask = torch.cat([torch.zeros_like(one) if one is filler else torch.ones_like(one) for one in order], 1)
    padded = torch.cat(order, 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    labels = padded.where(mask.bool(), -100)
    if left:
        labels[0, 7] = -100  # the first real token follows padding
    got = lm(padded, attention_mask=mask, position_ids=positions, labels=labels, output_expert_use=True)
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.aux_loss, expected.aux_loss, rtol=1e-4, atol=1e-5)
    assert got.expert_use.keys() == expected.expert_use.keys()
    for kind, use in expected.expert_use.items():
        torch.testing.assert_close(got.expert_use[kind].load, use.load, rtol=0, atol=1e-6)


def test_padding_does_not_move_the_balancing_bias() -> None:
    lm = ours(expert_bias=True).train()
    ids = samples(False)[0]["input_ids"][None]
    mask = torch.cat([torch.ones(1, 16), torch.zeros(1, 30)], 1).long()
    lm(torch.nn.functional.pad(ids, (0, 30)), attention_mask=mask)
    assert [int(layer.mlp.gate.load.sum()) for layer in lm.model.layers] == [16 * 2] * 2


def test_embeddings_train_without_groups_and_are_refused_with() -> None:
    lm = ours(**MODALITIES)
    ids = samples(False)[0]["input_ids"][None]
    embedded = lm.get_input_embeddings()(ids)
    torch.testing.assert_close(lm(inputs_embeds=embedded, labels=ids).loss, lm(ids, labels=ids).loss)
    assert lm(inputs_embeds=embedded, output_router_logits=True).router_logits
    with pytest.raises(ValueError, match=r"give input_ids.*output_expert_use"):
        lm(inputs_embeds=embedded, output_expert_use=True)
    with pytest.raises(ValueError, match="router_modality_aux_loss_coef"):
        ours(**MODALITIES, router_modality_aux_loss_coef=0.1)(inputs_embeds=embedded, labels=ids)
    grouped = ours(**MODALITIES, expert_groups={"common": 2, "text": 1, "a": 1})
    with pytest.raises(ValueError, match=r"Expert groups.*input_ids"):
        grouped(inputs_embeds=embedded, labels=ids)


def test_labels_that_are_shifted_already() -> None:
    lm, ids = ours(), samples(False)[0]["input_ids"][None]
    shifted = torch.nn.functional.pad(ids, (0, 1), value=-100)[:, 1:]
    torch.testing.assert_close(lm(ids, labels=ids, shift_labels=shifted).loss, lm(ids, labels=ids).loss)


def resumable(model: Any, folder: Path, steps: int = 4, **settings: Any) -> Trainer:
    """A Trainer of one row a step that saves every second step."""
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=1, max_steps=steps, learning_rate=1e-2, logging_steps=1,
        report_to="none", use_cpu=True, disable_tqdm=True, train_sampling_strategy="sequential",
        save_steps=2, lr_scheduler_type="constant", **settings,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=samples(False), eval_dataset=samples(False)[4:])


def shard(state: Path) -> None:
    """Split a state's weights into files that cut layers, and even experts, apart."""
    lm = AnyTokenForCausalLM.from_pretrained(state)
    (state / "model.safetensors").unlink()
    lm.save_pretrained(state, max_shard_size="9KB")
    assert len(list(state.glob("model-*.safetensors"))) > 5


@pytest.mark.parametrize("sharded", [False, True])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, sharded: bool) -> None:
    """transformers loads a state with `load_state_dict`, under the names of the file: one by one for experts."""
    whole = resumable(ours(), tmp_path)
    whole.train()
    state = tmp_path / "checkpoint-2"
    if sharded:
        shard(state)
    torch.manual_seed(1)
    again = resumable(AnyTokenForCausalLM(AnyTokenConfig(**TINY)), tmp_path / "again")
    again.train(resume_from_checkpoint=str(state))
    losses = [[entry["loss"] for entry in one.state.log_history if "loss" in entry] for one in (whole, again)]
    assert losses[0] == losses[1]
    torch.testing.assert_close(again.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)


def test_the_best_model_comes_back_with_its_experts(tmp_path: Path) -> None:
    """The default metric is the loss, of which the checkpoint with the higher one is asked for here."""
    trainer = resumable(
        ours(), tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    first, second = (entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    assert first > second
    best = tmp_path / "checkpoint-2"
    assert trainer.state.best_model_checkpoint == str(best)
    expected = AnyTokenForCausalLM.from_pretrained(best).state_dict()
    torch.testing.assert_close(trainer.model.state_dict(), expected, rtol=0, atol=0)


def test_a_saved_state_loads_strictly_and_what_lacks_is_named(tmp_path: Path) -> None:
    untied = {"tie_word_embeddings": False}
    lm, other = ours(**untied), AnyTokenForCausalLM(AnyTokenConfig(**TINY, **untied))
    lm.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert not other.load_state_dict(saved).missing_keys
    torch.testing.assert_close(other.state_dict(), lm.state_dict(), rtol=0, atol=0)
    lost = "model.layers.1.mlp.experts.3.up_proj.weight"
    part = {name: one for name, one in saved.items() if name != lost}
    assert other.load_state_dict(part, strict=False).missing_keys == [lost]
    with pytest.raises(RuntimeError, match=r"experts\.3\.up_proj"):
        other.load_state_dict(part)
    with pytest.raises(RuntimeError, match=r"size mismatch for .*experts.3.up_proj.*\(24, 32\) in the model"):
        other.load_state_dict(saved | {lost: torch.zeros(5, 32)})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*experts.4.up_proj"):
        other.load_state_dict(saved | {lost.replace("experts.3", "experts.4"): torch.zeros(24, 32)})
