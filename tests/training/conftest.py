"""A toy world for the training tests: text, tiles of 2x2 codes and beeps, and a recipe that learns them."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from anytoken.data.shards import tokenize_records
from anytoken.segments import Segment
from anytoken.tokenizers.base import CodeGrid, Codes, CodeSequence, ModalityTokenizer, register_modality
from anytoken.tokenizers.text import TextTokenizer
from anytoken.training.config import TrainConfig
from anytoken.training.trainer import StageTrainer, train

NAMES = ("ant", "bee", "cow", "dog", "elk")


class Beep(Segment):
    """A sound named by a number."""

    kind: ClassVar[str] = "beep"

    def __init__(self, number: int) -> None:
        self.number = number

    @classmethod
    def open(cls, source: Any) -> "Beep":
        return cls(int(Path(source).name))


class Tile(Beep):
    """A picture named by a number."""

    kind: ClassVar[str] = "tile"


class _Toy(ModalityTokenizer):
    def codebook_vectors(self, codebook: int = 0) -> Tensor:
        return torch.eye(self.codebook_sizes[codebook])


@register_modality
class BeepTokenizer(_Toy):
    """Number n is n + 1 frames of two codebooks."""

    kind = "beep"
    segment_type = Beep

    def __init__(self) -> None:
        super().__init__(shape=CodeSequence(1, 8, num_codebooks=2), codebook_sizes=[10, 6], config={})

    def encode(self, segment: Segment) -> Codes:
        assert isinstance(segment, Beep)
        return Codes(np.tile([[segment.number, segment.number % 6]], (segment.number + 1, 1)))


@register_modality
class TileTokenizer(_Toy):
    """Number n is a grid of 2 x 2 codes n."""

    kind = "tile"
    segment_type = Tile

    def __init__(self) -> None:
        super().__init__(shape=CodeGrid(("rows", "cols"), (1, 1), (4, 4)), codebook_sizes=[12], config={})

    def encode(self, segment: Segment) -> Codes:
        assert isinstance(segment, Tile)
        return Codes(np.full((4, 1), segment.number), (2, 2))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokenizers/{text,tile,beep} and shards things and talk."""
    root = tmp_path_factory.mktemp("world")
    tokenizers: dict[str, ModalityTokenizer] = {"tile": TileTokenizer(), "beep": BeepTokenizer()}
    for kind, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(root / "tokenizers" / kind)
    TextTokenizer.train([*NAMES, "What is this?"], 280).save_pretrained(root / "tokenizers" / "text")
    things = [
        {"text": name, "tile": str(i), "beep": str(i), "split": "test" if name == "elk" else "train"}
        for i, name in enumerate(NAMES)
    ]
    question = [{"type": "tile", "tile": "2"}, {"type": "text", "text": "What is this?"}]
    talk = [{"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "cow"}]}]
    for name, records in {"things": things, "talk": talk}.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        tokenize_records(root / f"{name}.jsonl", tokenizers, root / name, progress=False)
    return root


@pytest.fixture(scope="session")
def toy_recipe() -> Callable[[Path, Path], dict[str, Any]]:
    """Makes a recipe of 8 steps from scratch, of the world and the folder its output goes to."""
    return _recipe


@pytest.fixture
def recipe(world: Path, tmp_path: Path) -> dict[str, Any]:
    """A recipe of 8 steps from scratch."""
    return _recipe(world, tmp_path)


def _recipe(world: Path, folder: Path) -> dict[str, Any]:
    views = {"text->tile": 1, "tile->text": 1, "text->beep": 1, "beep->tile": 1}
    return {
        "init_from": "scratch",
        "output": str(folder / "out"),
        "tokenizers": {kind: str(world / "tokenizers" / kind) for kind in ("text", "tile", "beep")},
        "model": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 32,
            "max_position_embeddings": 128,
        },
        "data_root": str(world),
        "data": [{"path": "things", "views": views, "weight": 4}, {"path": "talk", "views": {"messages": 1}}],
        "optimizer": {"lr": 1e-2},
        "schedule": {"warmup_steps": 2},
        "steps": 8,
        "tokens_per_batch": 256,
        "context": 64,
        "save_every": 4,
        "log_every": 1,
    }


@pytest.fixture
def killed_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, dict[str, Any]], None]:
    """Trains a recipe until the step after `step` finished ones begins, and no further."""

    class Killed(Exception):
        """Stands for a crash."""

    def run(step: int, recipe: dict[str, Any]) -> None:
        inner = StageTrainer.compute_loss

        def crash(self: StageTrainer, *args: Any, **kwargs: Any) -> Tensor:
            if self.state.global_step == step:
                raise Killed
            return inner(self, *args, **kwargs)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(StageTrainer, "compute_loss", crash)
            train(TrainConfig.from_dict(deepcopy(recipe)))

    return run
