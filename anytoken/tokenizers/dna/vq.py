"""DNA to codes and back: three bases per code, lossless, verified exhaustively.

A learned vector quantizer (VQ-VAE, arXiv 1711.00937) over windows of three letters of A C G T N. Its last window may
end in padding, so there are 125 + 25 + 5 = 155 windows, few enough to check all of them:
every window is encoded, decoded and compared, and a tokenizer that fails is not saved. A table
would work as well, but a learned codebook initializes a language model's embedding rows so that windows that share
letters start near each other.

`base.py` defines the alphabet and streams.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from anytoken.tokenizers.base import CodeSequence, TokenizerError, register_modality
from anytoken.tokenizers.dna.base import LETTERS, MAX_TOKENS, DNATokenizerBase, pieces
from anytoken.tokenizers.modules.convnext import mlp
from anytoken.tokenizers.modules.quantizer import Quantizer

PAD = len(LETTERS)
NUM_SYMBOLS = len(LETTERS) + 1
WINDOW = 3
# After a last window of `rest`.
_PADDING = [np.full(-rest % WINDOW, PAD, dtype=np.uint8) for rest in range(WINDOW)]
_PLACES = np.array([NUM_SYMBOLS**2, NUM_SYMBOLS, 1])


def all_windows() -> Tensor:
    """The 155 windows that exist, int64 [155, 3]: indices into A C G T N, with padding (5) only at the end."""
    windows = [
        (*letters, *[PAD] * (WINDOW - length))
        for length in range(WINDOW, 0, -1)
        for letters in product(range(PAD), repeat=length)
    ]
    return torch.tensor(windows)


@dataclass(frozen=True)
class VerificationReport:
    """The result of checking all windows: those that are not reconstructed exactly, and the margin of the codes.

    margin: over all windows, the smallest of 1 - (distance to the nearest code / distance to the second nearest).
    """

    wrong: tuple[str, ...]
    margin: float

    def __bool__(self) -> bool:
        return not self.wrong


@register_modality
class DNATokenizer(DNATokenizerBase):
    """3 bases per code, at most 400 codes (1,200 bases) per segment; `encode_stream` takes sequences of any length.

    Every sequence of codes decodes: unused codes stand for their nearest window, and padding that a model generates
    in the middle is skipped.
    """

    kind = "dna"

    def __init__(self, width: int = 128, code_dim: int = 32, codebook_size: int = 256) -> None:
        if codebook_size < len(all_windows()):
            raise TokenizerError(
                f"{len(all_windows())} windows need a code each; codebook_size is {codebook_size}. Use 256."
            )
        config = {"width": width, "code_dim": code_dim, "codebook_size": codebook_size}
        super().__init__(shape=CodeSequence(1, MAX_TOKENS), codebook_sizes=[codebook_size], config=config)
        self.encoder = mlp(WINDOW * NUM_SYMBOLS, width, code_dim)
        self.quantize = Quantizer(code_dim, "vq", codebook_size=codebook_size)
        self.decoder = mlp(code_dim, width, WINDOW * NUM_SYMBOLS)
        self._tables: tuple[np.ndarray, np.ndarray] | None = None

    # ---- the network ----

    def _encode_windows(self, windows: Tensor) -> Tensor:
        """Windows int64 [B, 3] to latents [B, D]."""
        return self.encoder(F.one_hot(windows, NUM_SYMBOLS).flatten(1).float())

    def _decode_vectors(self, vectors: Tensor) -> Tensor:
        """Vectors [B, D] to logits [B, 3, 6] over the five letters and padding."""
        return self.decoder(vectors).unflatten(1, (WINDOW, NUM_SYMBOLS))

    def training_loss(self, batch: Tensor) -> tuple[Tensor, dict[str, float]]:
        """batch: windows int64 [B, 3], values as in `all_windows`; B many times 155, or codes count as dead."""
        quantized = self.quantize(self._encode_windows(batch)[None])
        logits = self._decode_vectors(quantized.vectors[0])
        loss = F.cross_entropy(logits.flatten(0, 1), batch.flatten()) + quantized.loss
        exact = (logits.argmax(-1) == batch).all(1).float().mean().item()
        return loss, {"exact_windows": exact, "codes_used": float(quantized.codes.unique().numel())}

    @torch.no_grad()
    def freeze_tables(self) -> None:
        """End training: move each window's code to the encoder's exact output, and unused codes out of the way.

        Dead codes are replaced by copies of live ones, so after training many codes nearly coincide, and rounding could
        turn one into another. Weights are rounded to bfloat16 here, so that saving in that type, or on
        another machine, changes no code.
        """
        for tensor in self.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.bfloat16())
        latents = self._encode_windows(all_windows().to(self.device)).bfloat16().float()
        codes = self._distances(latents).argmin(1)
        vectors = self.quantize.codebook().clone()
        unused = torch.ones(len(vectors), dtype=torch.bool)
        unused[codes.cpu()] = False
        rows = unused.nonzero().flatten()
        # Twice as far out as a live code: decoded like it, and the nearest to no window.
        vectors[rows] = 2 * latents[torch.arange(len(rows)) % len(latents)]
        vectors[codes] = latents
        self.quantize.inner.codebook = vectors
        self._tables = None

    # ---- the tables: the network's answers, computed once ----

    def _distances(self, latents: Tensor) -> Tensor:
        """Distances [B, K] from latents to codes; float64, so that the nearest is independent of the thread count."""
        return (latents.double()[:, None] - self.quantize.codebook().double()[None]).square().sum(-1).sqrt()

    @torch.no_grad()
    def network_codes(self) -> Tensor:
        """The code the network gives each of `all_windows()`, int64 [155]."""
        return self._distances(self._encode_windows(all_windows().to(self.device))).argmin(1).cpu()

    @torch.no_grad()
    def network_windows(self) -> Tensor:
        """The most likely of the 155 windows for each code, int64 [K, 3]; no code decodes to padding only."""
        windows = all_windows()
        scores = self._decode_vectors(self.quantize.codebook()).log_softmax(-1).cpu()
        joint = sum(scores[:, place, windows[:, place]] for place in range(WINDOW))
        assert isinstance(joint, Tensor)
        return windows[joint.argmax(1)]

    def tables(self) -> tuple[np.ndarray, np.ndarray]:
        """Code of each window int64 [216] (-1: no such window) and window of each code uint8 [K, 3]."""
        if self._tables is None:
            codes = np.full(NUM_SYMBOLS**WINDOW, -1, dtype=np.int64)
            codes[all_windows().numpy() @ _PLACES] = self.network_codes().numpy()
            self._tables = codes, self.network_windows().numpy().astype(np.uint8)
        return self._tables

    def train(self, mode: bool = True) -> DNATokenizer:
        """As nn.Module.train; the tables are recomputed, since weights may have changed."""
        self._tables = None
        return super().train(mode)

    @torch.no_grad()
    def verify(self) -> VerificationReport:
        """Encode and decode every window through the network and through the tables; report what differs."""
        windows, (codes, decoded) = all_windows(), self.tables()
        distances = self._distances(self._encode_windows(windows.to(self.device))).sort(1).values
        table_codes = torch.from_numpy(codes[windows.numpy() @ _PLACES])
        through_table = torch.from_numpy(decoded.astype(np.int64))[table_codes]
        through_network = self.network_windows()[self.network_codes()]
        same = (through_table == windows).all(1) & (through_network == windows).all(1)
        same &= table_codes == self.network_codes()
        wrong = tuple("".join((LETTERS + "-")[i] for i in window) for window in windows[~same].tolist())
        return VerificationReport(wrong, float((1 - distances[:, 0] / distances[:, 1]).min()))

    # ---- letters ----

    def _lookup_all(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        parts: list[np.ndarray] = []
        for one in sequences:
            parts += one, _PADDING[len(one) % WINDOW]
        codes = self.tables()[0][np.concatenate(parts).reshape(-1, WINDOW) @ _PLACES]
        return pieces(codes, [-(-len(one) // WINDOW) for one in sequences])

    def _spelled(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        symbols = self.tables()[1][codes]
        return symbols, symbols != PAD

    def _whole(self, symbols: np.ndarray) -> int:
        return len(symbols) // WINDOW * WINDOW

    def codebook_vectors(self, codebook: int = 0) -> Tensor:
        """Learned vectors [K, code_dim]."""
        return self.quantize.codebook()

    # ---- saving ----

    def save_pretrained(
        self, folder: str | Path, dtype: torch.dtype | None = None, allow_lossy: bool = False
    ) -> Path:
        """As in the base class, after checking all windows with the weights as stored.

        TokenizerError if a window would be lost, or if `dtype` would change a code; allow_lossy skips the check,
        for checkpoints in the middle of training.
        """
        if not allow_lossy:
            stored = copy.deepcopy(self).eval()
            if dtype is not None:
                stored.to(dtype).float()
            report = stored.verify()
            if not report:
                raise TokenizerError(
                    f"{len(report.wrong)} of {len(all_windows())} DNA windows would be lost, such as "
                    f"{', '.join(report.wrong[:5])}: train for more steps, or save with allow_lossy=True."
                )
            if not torch.equal(stored.network_codes(), self.network_codes()):
                raise TokenizerError(
                    f"Stored as {dtype}, some DNA windows change their code; call freeze_tables() first."
                )
        return super().save_pretrained(folder, dtype)
