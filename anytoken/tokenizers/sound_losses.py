"""What a decoded sound is held against: mel energies, spectra at several resolutions, and envelopes of bands.

The first two make it sound alike, frame by frame. Envelopes are what intelligibility hangs on: how the energy of each
third of an octave rises and falls over syllables (the measure of Taal et al. 2011, as a loss: Fu et al. 2018, arXiv
1709.03658). A recipe weighs them: `loss: {mel: 2, spectral: 1, envelope: 3}`; without a word it is mel and spectral.

Sounds are [B, samples] at 16 kHz.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

TERMS = ("mel", "spectral", "envelope")
LOSS_WINDOWS = (256, 512, 1024, 2048)
BANDS, LOWEST_HZ, RATE_HZ = 15, 150.0, 16_000
BAND_WINDOW, BAND_HOP = 512, 205  # samples; frames 12.8 ms apart
SYLLABLE_FRAMES = 30  # 384 ms
QUIET = 1e-4  # of the loudest syllable's energy: below it is silence


def power(spectrum: Tensor) -> Tensor:
    """|z|^2, several times faster than through `abs`, whose gradient is slow."""
    real, imaginary = torch.view_as_real(spectrum).unbind(-1)
    return torch.addcmul(real * real, imaginary, imaginary)


def _energies(sound: Tensor, size: int, hop: int) -> Tensor:
    window = torch.hann_window(size, device=sound.device)
    return power(torch.stft(sound, size, hop, window=window, return_complex=True))


def spectral_loss(output: Tensor, target: Tensor) -> Tensor:
    """Log-magnitude and convergence error at several resolutions.

    Windows overlap by half, which is enough for a loss over random crops.
    """
    loss = output.new_zeros(())
    for size in LOSS_WINDOWS:
        a, b = (_energies(x, size, size // 2).clamp_min(1e-10) for x in (output, target))
        loss = loss + 0.5 * F.l1_loss(a.log(), b.log())
        loss = loss + (a.sqrt() - b.sqrt()).norm() / b.sum().sqrt().clamp_min(1e-3)
    return loss / len(LOSS_WINDOWS)


def envelope_loss(output: Tensor, target: Tensor) -> Tensor:
    """One less the mean correlation of both sounds' band envelopes over 384 ms; of what is not silence in the target.

    Sounds shorter than that have none: 0.
    """
    heard, wanted = (_syllables(x) for x in (output, target))
    if not heard.shape[2]:
        return output.new_zeros(())
    loudness = wanted.square().sum((1, 3))
    counted = (loudness > QUIET * loudness.amax().clamp_min(1e-8))[:, None]
    a, b = (x - x.mean(-1, keepdim=True) for x in (heard, wanted))
    likeness = (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1) + 1e-8).sqrt()
    return 1 - (likeness * counted).sum() / (counted.sum() * BANDS).clamp_min(1)


def _syllables(sound: Tensor) -> Tensor:
    """Envelopes [B, 15, S, 30] of third-octave bands, of pieces of 30 frames every 5."""
    if sound.shape[1] <= BAND_WINDOW:
        return sound.new_zeros(len(sound), BANDS, 0, SYLLABLE_FRAMES)
    energies = _bands().to(sound.device) @ _energies(sound, BAND_WINDOW, BAND_HOP)
    envelopes = energies.clamp_min(1e-8).sqrt()
    if envelopes.shape[2] < SYLLABLE_FRAMES:
        return envelopes.new_zeros(len(sound), BANDS, 0, SYLLABLE_FRAMES)
    return envelopes.unfold(2, SYLLABLE_FRAMES, 5)


@cache
def _bands() -> Tensor:
    """Which bins [15, 257] of a spectrum are in each third of an octave, from 150 Hz on."""
    bins = torch.arange(BAND_WINDOW // 2 + 1) * (RATE_HZ / BAND_WINDOW)
    centres = LOWEST_HZ * 2 ** (torch.arange(BANDS)[:, None] / 3)
    return ((bins >= centres * 2 ** (-1 / 6)) & (bins < centres * 2 ** (1 / 6))).float()
