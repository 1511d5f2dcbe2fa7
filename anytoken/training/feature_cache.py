"""Features of prompts that a frozen model has read, kept on the CPU: the steps then train the head alone.

`plan_cache` looks at what a run can draw. If all of it fits the limit of memory, it is computed before the first step,
in batches of similar length; else features are computed as prompts come, and kept while there is room. What is kept
was computed in a batch of other prompts, so losses differ from those without a cache, by rounding alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from anytoken.model.embedding_head import BATCH_TOKENS, similar_lengths
from anytoken.training.config_parts import ContrastiveSpec
from anytoken.training.grad_cache import Columns, gather_rows
from anytoken.training.pairs import PairMixture
from anytoken.utils.distributed import num_processes
from anytoken.utils.errors import ConfigError

MB = 1 << 20
OVERHEAD = 1 << 11  # bytes that Python needs for a prompt's tensors
POOLED = 3  # columns with one row for a prompt; others have one for each of its ids
Encode = Callable[[Tensor, Tensor], Columns]  # ids [n, T], lengths [n]


def key_of(ids: Sequence[int] | np.ndarray) -> bytes:
    """The cache key of a prompt."""
    return np.asarray(ids, np.int32).tobytes()


class FeatureCache:
    """Features of prompts, up to a limit of bytes. planned: keys of prompts to read before the first step."""

    def __init__(self, limit: int, planned: Sequence[bytes] = ()) -> None:
        self.limit, self.planned, self.bytes = limit, planned, 0
        self._kept: dict[bytes, Columns] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def __call__(self, encode: Encode, ids: Tensor, lengths: Tensor) -> Columns:
        """Features of ids [n, T]; only uncached ones are computed."""
        sizes = lengths.tolist()
        keys = [key_of(row[:size]) for row, size in zip(ids.cpu().numpy(), sizes, strict=True)]
        new = {key: place for place, key in enumerate(keys) if key not in self._kept}
        fresh: dict[bytes, Columns] = {}
        if new:
            places = list(new.values())
            longest = max(sizes[place] for place in places)
            columns = encode(ids[places, :longest], lengths[places])
            fresh = dict(zip(new, _rows(columns, [sizes[place] for place in places]), strict=True))
        parts = [fresh[key] if key in fresh else self._kept[key] for key in keys]
        for key, features in fresh.items():
            self._keep(key, features)
        return tuple(
            _stacked(column, ids.shape[1] if number >= POOLED else None).to(ids.device)
            for number, column in enumerate(zip(*parts, strict=True))
        )

    def fill(
        self,
        encode: Encode,
        device: torch.device,
        pad: int,
        chunk: int,
        stopped: Callable[[], bool],
        show: bool,
    ) -> None:
        """Compute the planned prompts, in batches of similar length shared by the processes; can be stopped.

        chunk: prompts of the longest's length that memory has room for; batches of shorter ones hold more.
        """
        prompts = [np.frombuffer(key, np.int32) for key in self.planned]
        count = num_processes()
        rank = torch.distributed.get_rank() if count > 1 else 0
        with tqdm(
            total=len(prompts), desc="states of the frozen model", unit="prompt", disable=not show
        ) as bar:
            sizes = [len(one) for one in prompts]
            most = min(BATCH_TOKENS, chunk * max(sizes, default=0))
            for rows in similar_lengths(sizes, most):
                if stopped():
                    return
                equal = [*rows, *[rows[-1]] * (-len(rows) % count)]  # all processes gather as many
                own = equal[rank * len(equal) // count : (rank + 1) * len(equal) // count]
                ids = torch.full((len(own), max(sizes[row] for row in rows)), pad)
                for place, row in enumerate(own):
                    ids[place, : sizes[row]] = torch.from_numpy(prompts[row].astype(np.int64))
                lengths = torch.tensor([sizes[row] for row in own])
                columns = tuple(gather_rows(one) for one in encode(ids.to(device), lengths.to(device)))
                for row, features in zip(equal, _rows(columns, [sizes[row] for row in equal]), strict=True):
                    self._keep(self.planned[row], features)
                bar.update(len(rows))
        self.planned = ()

    def _keep(self, key: bytes, features: Columns) -> None:
        size = len(key) + OVERHEAD + sum(one.nbytes for one in features)
        if key not in self._kept and self.bytes + size <= self.limit:
            self._kept[key] = features
            self.bytes += size


def _rows(columns: Columns, sizes: Sequence[int]) -> list[Columns]:
    """Copies of each prompt's features, so that its batch can be freed."""
    here = [column.cpu() for column in columns]
    return [
        tuple((one[row] if number < POOLED else one[row, :size]).clone() for number, one in enumerate(here))
        for row, size in enumerate(sizes)
    ]


def _stacked(rows: Sequence[Tensor], length: int | None) -> Tensor:
    """Stacked rows; with a length, padded to it with 0, or with -1 for modality indices."""
    if length is None:
        return torch.stack(list(rows))
    value = 0.0 if rows[0].is_floating_point() else -1
    found = pad_sequence(list(rows), batch_first=True, padding_value=value)
    missing = length - found.shape[1]
    return torch.nn.functional.pad(found, [0, 0] * (found.ndim - 2) + [0, missing], value=value)


def plan_cache(
    spec: ContrastiveSpec, frozen: bool, bytes_of: Callable[[int], int], mixture: PairMixture, steps: int
) -> tuple[FeatureCache | None, str]:
    """The cache of a run, and the choice for the log; ConfigError if `cache_states: true` is impossible.

    bytes_of: memory in bytes for the states of a prompt with this many ids.
    """
    wanted, limit = spec.cache_states, spec.cache_mb * MB
    if wanted is False:
        return None, "states are recomputed in every step: contrastive.cache_states is false"
    if not frozen:
        if wanted is True:
            raise ConfigError(
                "contrastive.cache_states is true, but the model itself is trained, so its states change in every "
                "step; set trainable: [] and leave lora out, or set cache_states: auto"
            )
        return None, "states are recomputed in every step: the model itself is trained"
    if wanted == "auto" and mixture.num_pairs > steps * spec.batch:
        few = f"the run draws {steps * spec.batch:,} of {mixture.num_pairs:,} pairs"
        return FeatureCache(
            limit
        ), f"states are computed when first needed and kept up to {spec.cache_mb:,} MB: {few}"
    prompts, needed = _distinct(mixture.all_prompts(), bytes_of, limit)
    if needed > limit:
        if wanted is True:
            raise ConfigError(
                f"contrastive.cache_states is true, but the states of all prompts need more than contrastive.cache_mb, "
                f"{spec.cache_mb:,} MB, which {len(prompts):,} prompts fill; raise it, or set cache_states: auto"
            )
        more = "those of all prompts need more (contrastive.cache_mb)"
        return FeatureCache(limit), f"states are kept up to {spec.cache_mb:,} MB: {more}"
    said = f"states of {len(prompts):,} prompts ({needed / MB:,.1f} MB) are computed once, for all steps"
    return FeatureCache(limit, prompts), said


def _distinct(
    prompts: Iterable[Sequence[int]], bytes_of: Callable[[int], int], limit: int
) -> tuple[list[bytes], int]:
    """The distinct prompts and their bytes; stops once they exceed the limit."""
    found: dict[bytes, None] = {}
    needed = 0
    for prompt in prompts:
        key = key_of(prompt)
        if key not in found:
            found[key] = None
            needed += bytes_of(len(prompt)) + len(key) + OVERHEAD
        if needed > limit:
            break
    return list(found), needed
