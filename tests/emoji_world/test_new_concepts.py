"""The control of stages/new_concepts.py: captions that say nothing of their pictures."""

import runpy
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "stages" / "new_concepts.py"


def test_the_control_deals_out_training_captions_and_leaves_held_out_ones() -> None:
    lines = [
        {"text": f"thing {n}", "image": f"{n}.png", "split": "train" if n % 5 else "test"} for n in range(40)
    ]
    dealt = runpy.run_path(str(PROGRAM))["shuffled"](lines)
    assert [(one["image"], one["split"]) for one in dealt] == [(one["image"], one["split"]) for one in lines]
    pairs = list(zip(lines, dealt, strict=True))
    assert all(old == new for old, new in pairs if old["split"] == "test")
    assert sorted(one["text"] for one in dealt) == sorted(one["text"] for one in lines)
    assert sum(old["text"] == new["text"] for old, new in pairs if old["split"] == "train") < 8
