"""Reconstruction losses of audio: mel energies, spectra, band envelopes, cepstra.

The first two compare audio frame by frame. Envelopes determine intelligibility: how the energy of each third of an
octave rises and falls over syllables (the measure of Taal et al. 2011, as a loss: Fu et al. 2018, arXiv 1709.03658).
Cepstra and their changes are the features of speech recognizers (Davis and Mermelstein 1980; Furui 1986). A recipe
weights them: `loss: {mel: 2, spectral: 1, envelope: 3}`; the default is mel and spectral.

Audio is [B, samples] at 16 kHz. All losses are computed in float32, also under autocast: energies span more than
16 bits.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from anytoken import moved
from anytoken.utils.autocast import in_float32

TERMS = ("mel", "spectral", "envelope", "cepstral")
LOSS_WINDOWS = (256, 512, 1024, 2048)
BANDS, LOWEST_HZ, RATE_HZ = 15, 150.0, 16_000
BAND_WINDOW, BAND_HOP = 512, 205  # samples; frames 12.8 ms apart
SYLLABLE_FRAMES = 30  # 384 ms
FRAME = 160  # samples, 10 ms: from one `log_mel` to the next
CEPSTRAL_WINDOW, CEPSTRA = 512, 13
FAINT = 1e-3  # energy of a band, 60 dB below that of loud speech
QUIET = 1e-4  # of the loudest syllable's energy: below it is silence


def power(spectrum: Tensor) -> Tensor:
    """|z|^2, several times faster than through `abs`, whose gradient is slow."""
    real, imaginary = torch.view_as_real(spectrum).unbind(-1)
    return torch.addcmul(real * real, imaginary, imaginary)


def _energies(audio: Tensor, size: int, hop: int) -> Tensor:
    window = torch.hann_window(size, device=audio.device)
    return power(torch.stft(audio, size, hop, window=window, return_complex=True))


@in_float32
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


@in_float32
def envelope_loss(output: Tensor, target: Tensor) -> Tensor:
    """One minus the mean correlation of the band envelopes over 384 ms, where the target is not silent.

    0 for shorter audio.
    """
    found, wanted = (_syllables(x) for x in (output, target))
    if not found.shape[2]:
        return output.new_zeros(())
    loudness = wanted.square().sum((1, 3))
    counted = (loudness > QUIET * loudness.amax().clamp_min(1e-8))[:, None]
    a, b = (x - x.mean(-1, keepdim=True) for x in (found, wanted))
    likeness = (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1) + 1e-8).sqrt()
    return 1 - (likeness * counted).sum() / (counted.sum() * BANDS).clamp_min(1)


@in_float32
def cepstral_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean distance of the cepstra, as in `perceptual_distance`; 0 for audio shorter than a window."""
    if output.shape[1] < CEPSTRAL_WINDOW:
        return output.new_zeros(())
    return _distance(*(_cepstra(log_mel(x)) for x in (output, target))).mean()


@in_float32
def log_mel(audio: Tensor) -> Tensor:
    """Natural logarithm [B, 40, T] of the energies in mel bands, in frames 10 ms apart; the first is centered on 0."""
    filters, _ = (x.to(audio.device) for x in _cepstral())
    return (filters @ _energies(audio, CEPSTRAL_WINDOW, FRAME)).clamp_min(FAINT).log()


@in_float32
def perceptual_distance(output: Tensor, target: Tensor) -> Tensor:
    """Perceptual distance of two clips at each frame [..., T], from their `log_mel` [..., 40, T].

    The mean difference of amplitudes, plus the distance of a speech recognizer's features: liftered cepstra minus
    their mean, which are independent of level and pitch, and their changes over time.
    """
    return 0.5 * (output - target).abs().mean(-2) + _distance(_cepstra(output), _cepstra(target))


def _distance(found: Tensor, wanted: Tensor) -> Tensor:
    return (found - wanted).square().mean((-3, -2)).add(1e-6).sqrt()


def _cepstra(bands: Tensor) -> Tensor:
    """Cepstra [..., 3, 13, T] of log bands [..., 40, T] with their first and second differences over 40 ms."""
    still = _cepstral()[1].to(bands.device) @ bands
    still = still - still.mean(-1, keepdim=True)
    first, last = (still[..., one].expand(*still.shape[:-1], 3) for one in (slice(1), slice(-1, None)))
    padded = torch.cat([first, still, last], -1)
    moving = padded[..., 4:] - padded[..., :-4]  # two frames more than audio has
    turning = moving[..., 2:] - moving[..., :-2]
    return torch.stack([still, moving[..., 1:-1], turning], -3)


@cache
def _cepstral() -> tuple[Tensor, Tensor]:
    """Mel filters [40, 257], and the liftered cosines [13, 40] of their logarithms."""
    from torchaudio.functional import create_dct, melscale_fbanks

    with torch.inference_mode(False):  # whoever asks first, gradients may pass later
        filters = melscale_fbanks(CEPSTRAL_WINDOW // 2 + 1, 100.0, 7_000.0, 40, RATE_HZ)
        lifter = 1 + 11 * torch.sin(torch.pi * torch.arange(CEPSTRA) / 22)
        return filters.T, create_dct(CEPSTRA, 40, "ortho").T * lifter[:, None] / 12


def _syllables(audio: Tensor) -> Tensor:
    """Envelopes [B, 15, S, 30] of third-octave bands, in pieces of 30 frames every 5."""
    if audio.shape[1] <= BAND_WINDOW:
        return audio.new_zeros(len(audio), BANDS, 0, SYLLABLE_FRAMES)
    energies = _bands().to(audio.device) @ _energies(audio, BAND_WINDOW, BAND_HOP)
    envelopes = energies.clamp_min(1e-8).sqrt()
    if envelopes.shape[2] < SYLLABLE_FRAMES:
        return envelopes.new_zeros(len(audio), BANDS, 0, SYLLABLE_FRAMES)
    return envelopes.unfold(2, SYLLABLE_FRAMES, 5)


@cache
def _bands() -> Tensor:
    """Which bins [15, 257] of a spectrum are in each third of an octave, from 150 Hz."""
    with torch.inference_mode(False):
        bins = torch.arange(BAND_WINDOW // 2 + 1) * (RATE_HZ / BAND_WINDOW)
        centres = LOWEST_HZ * 2 ** (torch.arange(BANDS)[:, None] / 3)
        return ((bins >= centres * 2 ** (-1 / 6)) & (bins < centres * 2 ** (1 / 6))).float()


if not TYPE_CHECKING:
    __getattr__ = moved.old_names(__name__)
