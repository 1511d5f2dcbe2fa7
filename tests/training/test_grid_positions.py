"""A recipe with grid positions trains them, and its checkpoint generates."""

from typing import Any

import anytoken
from anytoken.training.config import TrainConfig
from anytoken.training.trainer import train


def test_a_recipe_trains_grid_positions(recipe: dict[str, Any]) -> None:
    recipe["model"]["grid_positions"] = {"row": 6, "column": 6, "step": 16, "codebook": 4}
    folder = train(TrainConfig.from_dict(recipe | {"optimizer": {"kind": "muon", "lr": 1e-2}}))
    model = anytoken.load(folder)
    tables = model.lm.model.grid_positions.tables
    used = {axis: (table.weight != 0).any(1).tolist() for axis, table in tables.items()}
    assert used["row"] == [False, True, True, *[False] * 4]  # tiles are 2 x 2; 0 is no place
    assert used["step"][:6] == [False, *[True] * 5] and not any(used["step"][6:])  # beeps have up to 5 frames
    assert used["codebook"] == [False, True, True, False, False]
    reply = model.lm.generate(**model.lm_inputs("ant", output="tile", sizes={"tile": (2, 2)}))
    assert model.token_space.open_token("tile") in reply[0].tolist()
