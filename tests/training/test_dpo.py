"""DPO: pairs become the ids that prompts and answers have, and what is preferred becomes likelier."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from anytoken.processor import Processor
from anytoken.training.config import (
    TrainConfig,
)
from anytoken.training.dpo import DPOArgs, pair_ids, prefer
from anytoken.training.metrics import read_metrics
from anytoken.training.trainer import train
from anytoken.utils.errors import ConfigError


@pytest.fixture
def base(recipe: dict[str, Any]) -> Path:
    return train(TrainConfig.from_dict(recipe | {"steps": 1}))


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Pictures 3 are liked, pictures 5 are not."""
    path = tmp_path / "pairs.jsonl"
    line = {
        "messages": [{"role": "user", "content": "ant"}],
        "chosen": [{"type": "tile", "tile": "3"}],
        "rejected": [{"type": "tile", "tile": "5"}, {"type": "text", "text": "cow"}],
    }
    path.write_text((json.dumps(line) + "\n") * 4)
    return path


def test_pairs_are_what_prompts_and_replies_are(base: Path, pairs: Path) -> None:
    processor = Processor.from_pretrained(base)
    first = next(pair_ids(pairs, processor, 64))
    space = processor.token_space
    assert first["prompt_ids"] == processor.encode_chat("ant") and first["prompt_ids"][-1] == space.assistant
    assert first["chosen_ids"][0] == space.open_token("tile") and first["chosen_ids"][-1] == space.end
    codes = [piece.kind for piece in processor.grammar.parse(first["rejected_ids"])]
    assert codes == ["tile", "text"]


@pytest.mark.slow
def test_the_preferred_answer_becomes_likelier(base: Path, pairs: Path, tmp_path: Path) -> None:
    folder = prefer(str(base), pairs, tmp_path / "adapter", DPOArgs(steps=10, batch=4, lr=1e-2))
    entries = read_metrics(folder / "metrics.jsonl")
    assert entries[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # log 2: model and reference are the same
    assert entries[-1]["loss"] < 0.5 and entries[-1]["rewards/margins"] > 0
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    ids = next(pair_ids(pairs, Processor.from_pretrained(base), 64))

    def margin(lm: torch.nn.Module) -> float:
        found = []
        for key in ("chosen_ids", "rejected_ids"):
            whole = torch.tensor([ids["prompt_ids"] + ids[key]])
            scores = lm(whole).logits.log_softmax(-1)[0, :-1].gather(1, whole[0, 1:, None])
            found.append(scores[len(ids["prompt_ids"]) - 1 :].sum().item())
        return found[0] - found[1]

    with torch.no_grad():
        before = margin(model)
        assert margin(PeftModel.from_pretrained(model, folder)) > before + 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 1"),
        ("[]", "has the keys messages, chosen, rejected"),
        ('{"messages": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": ""}', "line 1"),
    ],
)
def test_a_bad_line_is_named(base: Path, tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "bad.jsonl").write_text(line + "\n")
    with pytest.raises(ConfigError, match=said):
        list(pair_ids(tmp_path / "bad.jsonl", Processor.from_pretrained(base), 64))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            '{"chosen": "b", "rejected": "c", "id": 1}',
            "has the keys messages, chosen, rejected; received chosen, id",
        ),
        ('{"messages": [], "chosen": "b", "rejected": "c"}', "non-empty list"),
        (
            '{"messages": [{"role": "user", "content": "a"}], "chosen": "b", "rejectd": "c"}',
            "received chosen, messages, rejectd",
        ),
        (
            '{"messages": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "b"}',
            "there is no preference",
        ),
        (
            '{"messages": [{"role": "user", "content": [{"type": "tile", "tile": "/etc/passwd"}]}], '
            '"chosen": "b", "rejected": "c"}',
            "outside of",
        ),
        ('{"messages": [{"role": "user", "content": "a"}], "chosen": "b", "chosen": "c"}', "appears twice"),
    ],
)
def test_pairs_with_other_keys_or_files_elsewhere_are_named(
    base: Path, tmp_path: Path, line: str, said: str
) -> None:
    good = '{"messages": [{"role": "user", "content": "a\u2028b"}], "chosen": "b", "rejected": "c", "id": 1}'
    (tmp_path / "bad.jsonl").write_text(f"{good}\n{line}\n", encoding="utf-8")
    found = pair_ids(tmp_path / "bad.jsonl", Processor.from_pretrained(base), 64)
    assert next(found)["prompt_ids"]
    with pytest.raises(ConfigError, match="line 2") as error:
        next(found)
    assert said in str(error.value)


def test_a_pair_longer_than_the_context_is_refused(base: Path, pairs: Path) -> None:
    with pytest.raises(ConfigError, match=r"line 1: chosen makes \d+ ids; the model's context is 5"):
        list(pair_ids(pairs, Processor.from_pretrained(base), 5))
    with pytest.raises(ConfigError, match="does not exist"):
        list(pair_ids(Path("nowhere.jsonl"), Processor.from_pretrained(base), 5))
