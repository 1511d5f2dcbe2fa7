"""The host never waits for the device in a training step: nothing in it reads a number, or copies a table to it.

On a CPU there is nothing to wait for, so what would wait is told by the operations themselves; the test on a GPU asks
CUDA. What the host knows beforehand, and what it looks at later, gives the same numbers bit for bit.
"""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from anytoken.data.packing import pack
from anytoken.data.views import TrainingSequence
from anytoken.grammar import Grammar
from anytoken.model import AnyTokenConfig, AnyTokenForCausalLM
from anytoken.model.packed_attention import packed_mask
from anytoken.token_space import TokenSpace
from anytoken.tokenizers.base import CodeGrid, CodeSequence
from anytoken.training import step as training_step
from anytoken.training import trainer
from anytoken.training.config import MoeSpec, TrainConfig
from anytoken.training.interrupts import FiniteCheck, Noted
from anytoken.training.losses.balanced import BalancedLoss
from anytoken.training.metrics import LossMeter, read_metrics
from anytoken.training.step import ModelWithLoss, compile_layers, with_layout
from anytoken.training.trainer import train
from anytoken.utils.errors import DivergenceError

WAITS = {  # operations that need a number of the device, or copy one to it (torch.tensor ends in lift_fresh)
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::bincount", "aten::_unique2",
    "aten::equal", "aten::lift_fresh",
}  # fmt: skip


class NoWaiting(TorchDispatchMode):
    """An error for every operation that would make the host wait for a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split(".")[0]
        bools = name in ("aten::index", "aten::index_put_") and any(
            one is not None and one.dtype == torch.bool for one in args[1]
        )
        if name in WAITS or bools:
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


def space() -> TokenSpace:
    found = TokenSpace(40)
    found.append_modality("tile", [12], CodeGrid(("rows", "cols"), (1, 1), (4, 4)))
    found.append_modality("beep", [7, 5], CodeSequence(1, 9, num_codebooks=2))
    return found


def made(**settings: Any) -> ModelWithLoss:
    own = space()
    torch.manual_seed(0)
    config = AnyTokenConfig.from_token_space(
        own, hidden_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        **({"num_hidden_layers": 2} | settings),
    )  # fmt: skip
    moe = MoeSpec(router_aux_loss=1, router_modality_aux_loss=1, router_z_loss=1)
    return ModelWithLoss(AnyTokenForCausalLM(config), BalancedLoss(Grammar(own)), moe).train()


def batch(model: ModelWithLoss) -> dict[str, Tensor]:
    """Two packed rows: text, codes, and the padded end of each."""
    generator = torch.Generator().manual_seed(1)

    def sequence(low: int, high: int, length: int) -> TrainingSequence:
        ids = torch.randint(low, high, (length,), generator=generator).int().numpy()
        return TrainingSequence(ids, ids >= 0)

    own = model.loss.grammar.token_space
    code, tone = own.code_range("tile"), own.code_range("beep", 1)
    bins = [
        [sequence(0, 40, 9), sequence(code.start, code.stop, 14)],
        [sequence(tone.start, tone.stop, 11), sequence(0, 40, 6)],
    ]
    return pack(bins, 32, own.pad)


SETTINGS = {
    "plain": {},
    "bias": {"expert_bias": True},
    "null experts": {"num_null_experts": 2},
    "groups": {"expert_groups": {"common": 2, "tile": 1, "beep": 1}},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_what_the_host_knows_beforehand_changes_no_bit(settings: dict[str, Any]) -> None:
    found = []
    for known in (False, True):
        model = made(**settings)
        one = batch(model)
        outputs = model(**(with_layout(one, model.loss.grammar) if known else one))
        outputs["loss"].backward()
        gradients = {name: weight.grad for name, weight in model.named_parameters()}
        meter = LossMeter(model.loss.names)
        for _ in range(3):
            meter.add(outputs["parts"], 64, outputs["load"])
        state = meter.state() | {"seconds": 0}
        found.append((outputs["loss"].detach(), gradients, outputs["parts"].terms, outputs["load"], state))
    torch.testing.assert_close(*[one[:4] for one in found], rtol=0, atol=0)
    assert found[0][4] == found[1][4]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_nothing_of_a_step_waits(settings: dict[str, Any]) -> None:
    model = made(**settings)
    laid_out = with_layout(batch(model), model.loss.grammar)
    meter, check = LossMeter(model.loss.names), FiniteCheck(20)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        outputs = model(**laid_out)
        check.note(Noted(0, "loss", outputs["loss"].detach(), 1e-3))
        meter.add(outputs["parts"], 64, outputs["load"])
        outputs["loss"].backward()
        optimizer.step()
        if model.lm.config.expert_bias:
            model.lm.update_expert_bias(1e-3)
        optimizer.zero_grad()

    step()  # tables that stay are made
    with NoWaiting():
        step()
    assert check.first_bad() is None and meter.report()["mean_over_tokens"] > 0


def test_waiting_would_be_found() -> None:
    model = made()
    ones, one = torch.ones(3), batch(model)
    for wait in (lambda: float(ones.sum()), lambda: ones[ones > 0], lambda: model(**one)):
        with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():
            wait()


def test_the_mask_shows_each_token_its_sample_up_to_itself() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]])
    mask = packed_mask(positions)
    sample = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]])
    for row in range(2):
        for one in range(5):
            for other in range(5):
                assert mask[row, 0, one, other] == (other <= one and sample[row, one] == sample[row, other])


def test_numbers_are_looked_at_together_and_the_first_bad_one_is_named() -> None:
    check, looked = FiniteCheck(3), []
    for step, value in enumerate([1.0, 2.0, math.nan, math.inf, 1.0, 1.0]):
        check.keep(step, {"input_ids": torch.tensor([step])})
        check.note(Noted(step, "loss", torch.tensor(value), 0.1))
        if check.due:
            looked.append((step, check.first_bad()))
            if looked[-1][1] is not None:
                break
        check.end_step()
    assert [step for step, _ in looked] == [2]
    bad = looked[0][1]
    assert (bad.step, bad.what) == (2, "loss") and math.isnan(bad.value)
    assert [one["input_ids"].item() for one in check.batches_of(2)] == [2]


def losses(folder: Path) -> list[Any]:
    clock = {"tokens_per_second", "mfu", "train_runtime"}
    return [
        {key: value for key, value in entry.items() if key not in clock}
        for entry in read_metrics(folder / "metrics.jsonl")
        if "loss" in entry
    ]


def test_looking_later_gives_the_same_run(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = train(TrainConfig.from_dict(recipe | {"log_every": 4}))
    monkeypatch.setattr(trainer, "FiniteCheck", lambda steps: FiniteCheck(5))
    later = train(TrainConfig.from_dict(recipe | {"log_every": 4, "output": str(tmp_path / "later")}))
    assert losses(now) == losses(later)
    assert (now / "model.safetensors").read_bytes() == (later / "model.safetensors").read_bytes()


def test_a_bad_loss_is_found_before_a_state_is_saved(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "FiniteCheck", lambda steps: FiniteCheck(100))
    real, steps = ModelWithLoss.forward, iter(range(100))

    def breaks(self: ModelWithLoss, *args: Any, **kwargs: Any) -> dict[str, Any]:
        outputs = real(self, *args, **kwargs)
        if self.training and next(steps) == 2:
            outputs["loss"] = outputs["loss"] * math.nan
        return outputs

    monkeypatch.setattr(ModelWithLoss, "forward", breaks)
    with pytest.raises(DivergenceError, match="loss is nan at step 3"):
        train(TrainConfig.from_dict(recipe | {"log_every": 100}))  # a state is due after step 4
    folder = Path(recipe["output"])
    assert not list(folder.glob("state/*")) and (folder / "diverged" / "step-3.safetensors").is_file()
    assert json.loads((folder / "diverged" / "step-3.json").read_text())["stream_before"]["next_index"] > 0


def test_minutes_between_states(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []
    real = trainer.StageTrainer._save_checkpoint
    monkeypatch.setattr(
        trainer.StageTrainer,
        "_save_checkpoint",
        lambda self, *args: (saved.append(self.state.global_step), real(self, *args)),
    )
    train(TrainConfig.from_dict(recipe | {"save_every": 100, "save_minutes": 1e-9, "steps": 3}))
    assert saved == [1, 2, 3]


def test_compiled_layers_compute_the_same() -> None:
    plain = made(num_hidden_layers=4)
    compiled, graphs = copy.deepcopy(plain), []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compile_layers(compiled.lm, backend=count)
    one = with_layout(batch(plain), plain.loss.grammar)
    found = []
    for model in (plain, compiled):
        loss = model(**one)["loss"]
        loss.backward()
        found.append((loss.detach(), {name: weight.grad for name, weight in model.named_parameters()}))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    assert 0 < len(graphs) <= 4  # the pieces of one layer around its router, which serve all four


def test_auto_compiles_long_runs_where_there_is_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    monkeypatch.setattr(training_step, "which", lambda name: f"/usr/bin/{name}")
    assert training_step.worth_compiling("auto", 1000, device) and not training_step.worth_compiling(
        "auto", 999, device
    )
    monkeypatch.setattr(training_step, "which", lambda name: None)
    assert not training_step.worth_compiling("auto", 1000, device)
    assert training_step.worth_compiling(True, 1, device) and not training_step.worth_compiling(
        False, 10_000, device
    )


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_training_step_never_waits_for_a_gpu(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    """From the third step on, when what stays is made and compiled; the log and the states may wait."""
    real, taken = trainer.StageTrainer.training_step, []

    def watched(self: trainer.StageTrainer, *args: Any, **kwargs: Any) -> Tensor:
        taken.append(self.state.global_step)
        torch.cuda.set_sync_debug_mode("error" if len(taken) > 3 else "default")
        try:
            return real(self, *args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(trainer.StageTrainer, "training_step", watched)
    more = {"log_every": 50, "steps": 8, "precision": "bf16", "attention": "sdpa", "compile": compiled}
    folder = train(TrainConfig.from_dict(recipe | more))
    assert len(taken) == 8 and (folder / "model.safetensors").is_file()
