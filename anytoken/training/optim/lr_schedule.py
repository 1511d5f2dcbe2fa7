"""Learning-rate schedules with warm-up: cosine, WSD (warm-up, stable, decay; arXiv 2404.06395), constant.

The schedule is an object whose few numbers are saved with the optimizer, because a time limit may shorten it:
once the flat part has had its share of the minutes, the decay starts at once and takes the rest.
"""

import math

from anytoken.training.config import ScheduleSpec


class Schedule:
    """Factor on the learning rate at each step; also decides how many steps there are."""

    def __init__(self, spec: ScheduleSpec, steps: int) -> None:
        self.kind, self.warmup, self.final = spec.kind, spec.warmup_steps, spec.final_fraction
        self.decay_fraction = spec.decay_fraction if spec.kind != "constant" else 0.0
        self.planned = self.total = steps
        self.decay_start = steps - math.ceil(steps * spec.decay_fraction) if spec.kind == "wsd" else -1
        self.shortened = False
        self.seconds = 0.0

    def __call__(self, step: int) -> float:
        """The factor for the update after ``step`` finished ones, in [0, 1]."""
        factor = min(1.0, (step + 1) / max(self.warmup, 1))
        if self.kind == "cosine":
            progress = min(step / max(self.planned, 1), 1.0)
            factor *= self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2
        if 0 <= self.decay_start <= step:
            left = (self.total - step) / max(self.total - self.decay_start, 1)
            factor *= self.final + (1 - self.final) * max(left, 0.0)
        return factor

    def tick(self, step: int, seconds: float, max_minutes: float | None) -> None:
        """Account for the time of step number ``step``; shorten the schedule if time runs out."""
        self.seconds += seconds
        if max_minutes is None or self.shortened:
            return
        budget = 60 * max_minutes
        if self.seconds >= budget * (1 - self.decay_fraction) and not 0 <= self.decay_start < step:
            self.shortened = True
            steps_left = int((budget - self.seconds) / (self.seconds / step))
            self.total = min(self.total, step + max(steps_left, 0))
            self.decay_start = step
