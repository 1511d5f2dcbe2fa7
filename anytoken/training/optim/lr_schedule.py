"""Learning-rate schedules with warm-up: cosine, WSD (warm-up, stable, decay; arXiv 2404.06395), constant.

A schedule is a function of progress in steps or minutes, whichever is further along: if `max_minutes` do not suffice
for all steps, the same curve is compressed to fewer steps and still reaches its end. Its few numbers are saved with the
optimizer.
"""

import math

from anytoken.training.config import ScheduleSpec


class Schedule:
    """Factor on the learning rate at each step; also decides how many steps there are."""

    def __init__(self, spec: ScheduleSpec, steps: int) -> None:
        self.kind, self.warmup, self.final = spec.kind, spec.warmup_steps, spec.final_fraction
        self.decay_fraction = spec.decay_fraction
        self.planned = self.total = steps
        self.expected = float(steps)  # steps that will be done, as far as the clock tells
        self.seconds = 0.0

    def __call__(self, step: int) -> float:
        """The factor for the update after ``step`` finished ones, in [0, 1]."""
        factor = min(1.0, (step + 1) / max(self.warmup, 1))
        if self.kind == "constant":
            return factor
        if self.kind == "cosine":
            level = (1 + math.cos(math.pi * min(step / self.expected, 1.0))) / 2
        else:
            decay = self.expected * self.decay_fraction
            decay = math.ceil(decay) if self.expected == self.planned else decay
            level = min(max((self.expected - step) / decay, 0.0), 1.0)
        return factor * (self.final + (1 - self.final) * level)

    def tick(self, step: int, seconds: float, max_minutes: float | None) -> None:
        """Account for the time of step ``step``; sets ``total`` to ``step`` if no time is left for another one.

        The next step is estimated to take as long as this one or the average, whichever is shorter, so a slow first
        step (compilation) or a step with an evaluation does not end a run early. A run overshoots by less than one
        step.
        """
        self.seconds += seconds
        if max_minutes is None:
            self.expected = float(self.planned)
            return
        budget, mean = 60 * max_minutes, self.seconds / step
        self.expected = min(float(self.planned), budget / mean) if mean else float(self.planned)
        if self.seconds + min(mean, seconds) > budget:
            self.total = min(self.planned, step)
