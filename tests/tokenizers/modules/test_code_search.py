"""Codes chosen by what they decode to: the best of each turn, judged with what the turns before chose."""

import pytest
import torch

from anytoken.tokenizers.modules.code_search import analysis_by_synthesis

CODES, POSITIONS = 5, 6


@pytest.fixture
def landscape():
    """Errors that hang on a code and on the sum with its neighbour to the left, and choices [1, 6, 3, 1]."""
    generator = torch.Generator().manual_seed(0)
    alone = torch.rand(POSITIONS, CODES, generator=generator)
    beside = torch.rand(POSITIONS, CODES, CODES, generator=generator)
    choices = torch.stack([torch.randperm(CODES, generator=generator)[:3] for _ in range(POSITIONS)])
    place = torch.arange(POSITIONS)

    def error(trials):
        codes = trials[..., 0]
        return alone[place, codes] + beside[place, codes.roll(1, -1), codes]

    return choices[None, ..., None], error


def test_a_turn_takes_the_best_of_its_choices_given_the_others(landscape):
    choices, error = landscape
    turns = torch.arange(POSITIONS) % 2
    found = analysis_by_synthesis(choices, turns, error)
    expected = choices[:, :, 0].clone()
    for turn in (0, 1):
        start = expected.clone()
        for n in range(turn, POSITIONS, 2):
            trials = []
            for kind in range(3):
                trial = start.clone()
                trial[:, turn::2] = choices[:, turn::2, kind]
                trials.append(error(trial[None])[0, 0, n].item())
            expected[0, n] = choices[0, n, trials.index(min(trials))]
    assert torch.equal(found, expected)
    assert not torch.equal(found, choices[:, :, 0])


@pytest.mark.parametrize("at_once", [1, 2, 7])
def test_how_many_trials_share_a_call_changes_nothing(landscape, at_once):
    choices, error = landscape
    turns, sizes = torch.arange(POSITIONS) % 2, []

    def counted(trials):
        sizes.append(len(trials))
        return error(trials)

    assert torch.equal(
        analysis_by_synthesis(choices, turns, counted, at_once), analysis_by_synthesis(choices, turns, error)
    )
    assert max(sizes) == min(at_once, 3) and sum(sizes) == 2 * 3


def test_of_equal_errors_the_nearest_stays(landscape):
    choices, _ = landscape
    found = analysis_by_synthesis(
        choices, torch.zeros(POSITIONS), lambda trials: torch.zeros(trials.shape[:3])
    )
    assert torch.equal(found, choices[:, :, 0])
