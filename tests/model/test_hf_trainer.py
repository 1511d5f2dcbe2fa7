"""Under transformers' own Trainer the model trains as stock Qwen3-MoE does, however a batch is cut into parts."""

from pathlib import Path
from typing import Any

import pytest
import torch
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
