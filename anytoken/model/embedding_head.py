"""The embedding head: hidden states of a prompt to one unit vector, next to the LM head, which does not change.

A prompt's content tokens are averaged by modality, and the state that would predict the reply joins them: it has read
the whole prompt (PromptEOL, arXiv 2307.16645; E5-V embeds images so, 2407.12580). Each modality has a linear map of
its own, as each tower of CLIP has (2103.00020), and a prompt of several modalities mixes their maps by their shares of
its tokens. Vectors have unit norm, and their first dimensions are vectors too where the head was trained so
(Matryoshka, 2205.13147). Nothing of the language model is changed: its outputs keep every bit.

Shapes: B batch, T tokens, H hidden, M modalities, W width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from anytoken import moved
from anytoken.model.attention import usable_attention
from anytoken.token_space import TokenSpace
from anytoken.utils.atomic import write_file
from anytoken.utils.errors import RequestError

FILE = "embedding.safetensors"  # next to model.safetensors, or in an adapter folder
CONTROL, UNKNOWN = -1, -2  # in a table of ids: not pooled; of a modality that the head has no map for
BATCH_TOKENS = 8192  # of one forward pass, with padding
SLACK = 1.25  # of the lengths in a batch
PROBE = 64  # ids that a fingerprint is of
MAX_SCALE = 100.0  # of similarities, as in CLIP


class Pooled(NamedTuple):
    """Inputs of the head: mean [B, M, H] of each modality's states over all content tokens, its share [B, M] of them,
    and the last state [B, H]; all float32."""

    mean: Tensor
    share: Tensor
    last: Tensor


class EmbeddingHead(nn.Module):
    """A linear map per modality from pooled states to a unit vector; the temperature is learned."""

    def __init__(
        self,
        hidden_size: int,
        modalities: Sequence[str],
        width: int = 256,
        widths: Sequence[int] = (),
        temperature: float = 0.07,
        old_width: int = 0,
    ) -> None:
        """widths: prefixes of a vector that are vectors too; `width` always is one. old_width: of an older head whose
        vectors `to_old` gives."""
        super().__init__()
        self.hidden_size, self.modalities, self.width = int(hidden_size), tuple(modalities), int(width)
        self.widths = tuple(sorted({*map(int, widths), self.width}))
        self.old_width = int(old_width)
        if self.widths[0] < 1 or self.widths[-1] > self.width:
            raise RequestError(f"widths are from 1 to the width, {width}; received {list(widths)}.")
        shape = len(self.modalities), self.width, self.hidden_size
        self.mean_weight = nn.Parameter(torch.randn(shape) / math.sqrt(self.hidden_size))
        self.last_weight = nn.Parameter(torch.randn(shape) / math.sqrt(self.hidden_size))
        self.bias = nn.Parameter(torch.zeros(shape[:2]))
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        self.old_weight = nn.Parameter(torch.eye(self.old_width, self.width)) if old_width else None
        self.register_buffer("old_probe", torch.zeros(self.old_width))

    old_probe: Tensor  # the older head's fingerprint, see inference/embed.py

    @classmethod
    def untrained(cls, hidden_size: int, modalities: Sequence[str]) -> EmbeddingHead:
        """The mean of the last states: the embedding without training."""
        head = cls(hidden_size, modalities, hidden_size)
        with torch.no_grad():
            head.mean_weight.copy_(torch.eye(hidden_size).expand_as(head.mean_weight))
            head.last_weight.zero_()
        return head

    @property
    def scale(self) -> Tensor:
        """The factor on similarities: 1 / temperature, at most 100."""
        return self.log_scale.exp().clamp(max=MAX_SCALE)

    def forward(self, pooled: Pooled) -> Tensor:
        """Unit vectors [B, W]."""
        vectors = torch.einsum("bmh,mwh->bw", pooled.mean, self.mean_weight) + pooled.share @ self.bias
        for place in range(len(self.modalities)):
            share = pooled.share[:, place, None]
            vectors = vectors + share * F.linear(pooled.last, self.last_weight[place])
        return F.normalize(vectors, dim=-1)

    def token_vectors(self, states: Tensor, modality: Tensor) -> Tensor:
        """A unit vector for each content token: states [B, T, H] and modality [B, T] to [B, T, W], 0 elsewhere."""
        vectors = states.new_zeros(*modality.shape, self.width, dtype=torch.float32)
        for place in range(len(self.modalities)):
            where = modality == place
            mapped = F.linear(states[where].float(), self.mean_weight[place], self.bias[place])
            vectors = vectors.masked_scatter(where[..., None], F.normalize(mapped, dim=-1))
        return vectors

    def to_old(self, vectors: Tensor) -> Tensor:
        """Map vectors [B, W] to those of the older head, [B, old_width], to query its indexes."""
        if self.old_weight is None:
            raise RequestError("This head was not trained to be compatible with an older one.")
        return F.normalize(F.linear(vectors, self.old_weight), dim=-1)

    def table(self, space: TokenSpace) -> Tensor:
        """The index of each id's modality in this head: int64 [V]; CONTROL and UNKNOWN are negative."""
        places = [self.modalities.index(n) if n in self.modalities else UNKNOWN for n in space.modality_names]
        table = torch.tensor(places)[space.modality_of(torch.arange(space.vocab_size))]
        for span in space.ranges:
            if span.kind == "control":
                table[span.start : span.stop] = CONTROL
        return table

    def pick_width(self, width: int | None) -> int:
        """A width of vectors, by default the head's; RequestError for one that was not trained."""
        if width is None:
            return self.width
        if isinstance(width, bool) or width not in self.widths:
            raise RequestError(
                f"width is one of {', '.join(map(str, self.widths))}, which the head was trained for; received "
                f"{width!r}."
            )
        return width

    def prefix(self, vectors: Tensor, width: int | None) -> Tensor:
        """The first `width` dimensions [..., width] as unit vectors; RequestError for one that was not trained."""
        width = self.pick_width(width)
        return vectors if width == self.width else F.normalize(vectors[..., :width], dim=-1)

    def save(self, folder: str | Path) -> Path:
        """Write FILE into a folder."""
        config = {
            "hidden_size": self.hidden_size, "modalities": self.modalities, "width": self.width,
            "widths": self.widths, "old_width": self.old_width,
        }  # fmt: skip
        tensors = {name: one.detach().cpu().contiguous() for name, one in self.state_dict().items()}
        metadata = {"format": "pt", "config": json.dumps(config)}
        return write_file(Path(folder) / FILE, lambda scratch: save_file(tensors, scratch, metadata))

    @classmethod
    def load(cls, folder: str | Path) -> EmbeddingHead:
        """Read FILE of a folder; RequestError if it is missing or damaged."""
        path = Path(folder) / FILE
        if not path.is_file():
            raise RequestError(f"{path} is missing: {folder} holds no embedding head.")
        try:
            with safe_open(path, "pt") as file:
                head = cls(**json.loads(file.metadata()["config"]))
                names = file.keys()
                head.load_state_dict({name: file.get_tensor(name) for name in names})
        except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError) as error:
            raise RequestError(f"{path} is damaged ({error}); copy it again.") from error
        return head.eval()


def probe_ids(table: Tensor) -> list[int]:
    """Ids across the vocabulary, of modalities that a head supports: their vector is a model's fingerprint."""
    ids = torch.linspace(0, len(table) - 1, PROBE).long()
    return ids[table[ids.to(table.device)].cpu() != UNKNOWN].tolist()


def has_head(folder: str | Path) -> bool:
    """Whether a checkpoint or adapter folder has an embedding head."""
    return (Path(folder) / FILE).is_file()


def decoder_of(lm: nn.Module) -> Any:
    """The decoder below the LM head, also of a model that PEFT wraps."""
    base: Any = lm.get_base_model() if hasattr(lm, "get_base_model") else lm  # type: ignore[operator]
    return base.base_model


def read_states(lm: nn.Module, ids: Tensor) -> Tensor:
    """Inputs of the LM head [B, T, H] for ids [B, T] padded on the right.

    No mask is needed: a causal model's states before the padding do not depend on it.
    """
    decoder = decoder_of(lm)
    with usable_attention(decoder):
        return decoder(input_ids=ids, use_cache=False).last_hidden_state


def similar_lengths(lengths: Sequence[int], most: int = BATCH_TOKENS) -> list[list[int]]:
    """Rows in batches of at most `most` ids with padding; the longest is at most SLACK times, or 8 ids more than, the
    shortest."""
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        first = lengths[batches[-1][0]] if batches else 0
        close = lengths[row] <= max(SLACK * first, first + 8)
        if batches and close and (len(batches[-1]) + 1) * lengths[row] <= most:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def pool(states: Tensor, modality: Tensor, lengths: Tensor, count: int) -> Pooled:
    """Inputs of the head from states [B, T, H]; modality [B, T] as from `table`, lengths [B] of the prompts."""
    inside = torch.arange(modality.shape[1], device=lengths.device) < lengths[:, None]
    places = torch.arange(count, device=modality.device)
    member = ((modality[..., None] == places) & inside[..., None]).float()  # [B, T, M]
    total = member.sum((1, 2)).clamp(min=1)
    mean = torch.einsum("btm,bth->bmh", member, states.float()) / total[:, None, None]
    last = states[torch.arange(len(states), device=states.device), lengths - 1].float()
    return Pooled(mean, member.sum(1) / total[:, None], last)


if not TYPE_CHECKING:
    __getattr__ = moved.old_names(__name__)
