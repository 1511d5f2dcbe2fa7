"""The losses of sounds: zero for equal sounds only, and what each hears and does not; envelopes beside pystoi."""

from pathlib import Path

import numpy as np
import pytest
import torch

from anytoken.segments import Speech
from anytoken.tokenizers.base import TokenizerError
from anytoken.tokenizers.losses.audio import (
    _bands,
    _cepstra,
    _cepstral,
    cepstral_loss,
    envelope_loss,
    log_mel,
    perceptual_distance,
    spectral_loss,
)
from anytoken.tokenizers.speech import SpeechTokenizer

ASSETS = Path(__file__).parents[2] / "assets"
SETTINGS = {"width": 16, "encoder_depth": 1, "decoder_depth": 1, "levels": [5, 5, 4], "max_frames": 50}


def sounds(seed: int = 0, seconds: float = 1.0) -> torch.Tensor:
    """Noise whose level rises and falls, in three bands at three rates: [2, samples]."""
    generator = torch.Generator().manual_seed(seed)
    samples = int(seconds * 16_000)
    time = torch.arange(samples) / 16_000
    total = torch.zeros(2, samples)
    for hz, rate in ((300, 3.0), (1_000, 5.0), (2_500, 7.0)):
        phases = 2 * np.pi * torch.rand(2, 1, generator=generator)
        total += torch.sin(2 * np.pi * hz * time) * (1 + torch.sin(2 * np.pi * rate * time + phases))
    return 0.1 * total + 0.001 * torch.randn(2, samples, generator=generator)


def noisy(seed: int = 0) -> torch.Tensor:
    """Such sounds with no quiet band: [2, 16000]."""
    return sounds(seed) + 0.05 * torch.randn(2, 16_000, generator=torch.Generator().manual_seed(seed + 9))


def test_losses_are_zero_for_equal_sounds_only():
    a, b = sounds(0), sounds(1)
    assert spectral_loss(a, a) == 0 and envelope_loss(a, a).item() == pytest.approx(0, abs=1e-3)
    assert spectral_loss(b, a) > spectral_loss(0.9 * a, a) > 0
    assert envelope_loss(b, a) > 0.3


def test_envelopes_do_not_hear_level_or_phase():
    a = sounds()
    assert envelope_loss(-0.5 * a, a).item() == pytest.approx(0, abs=5e-3)


def test_cepstra_do_not_hear_level_or_phase_but_every_other_sound():
    a, b = noisy(0), noisy(1)
    assert cepstral_loss(-0.5 * a, a).item() == pytest.approx(0, abs=0.02)
    noise = torch.randn(a.shape, generator=torch.Generator().manual_seed(1))
    near, far = (cepstral_loss(a + level * noise, a).item() for level in (0.02, 0.2))
    assert 0.05 < near < far and cepstral_loss(b, a) > near


def test_cepstra_are_those_of_torchaudio_liftered_and_less_their_mean():
    from torchaudio.transforms import MFCC

    a = noisy()
    melkwargs = {"n_fft": 512, "hop_length": 160, "n_mels": 40, "f_min": 100.0, "f_max": 7_000.0}
    theirs = MFCC(16_000, 13, log_mels=True, melkwargs=melkwargs)(a).double()
    theirs = theirs - theirs.mean(-1, keepdim=True)
    theirs = theirs * (1 + 11 * torch.sin(torch.pi * torch.arange(13) / 22))[:, None] / 12
    ours = _cepstra(log_mel(a)).double()
    torch.testing.assert_close(ours[:, 0], theirs, atol=1e-3, rtol=0)
    torch.testing.assert_close(ours[:, 1, :, 2:-2], ours[:, 0, :, 4:] - ours[:, 0, :, :-4])
    torch.testing.assert_close(ours[:, 2, :, 3:-3], ours[:, 1, :, 4:-2] - ours[:, 1, :, 2:-4])


def test_what_is_heard_apart_is_heard_where_it_is():
    a = noisy()
    b = a.clone()
    b[:, 8_000:10_000] += 0.2 * torch.randn(2, 2_000, generator=torch.Generator().manual_seed(2))
    apart = perceptual_distance(log_mel(b), log_mel(a))
    assert apart.shape == (2, 101)
    assert apart[:, 50:62].min() > 4 * apart[:, [*range(40), *range(75, 101)]].max()
    trials = torch.stack([log_mel(a), log_mel(b)])
    torch.testing.assert_close(perceptual_distance(trials, log_mel(a))[1], apart)


def test_losses_have_gradients_after_sounds_were_heard_without():
    for tables in (_bands, _cepstral):
        tables.cache_clear()
    with torch.inference_mode():
        cepstral_loss(noisy(0), noisy(1)), envelope_loss(noisy(0), noisy(1))
    output = noisy(0).requires_grad_()
    (cepstral_loss(output, noisy(1)) + envelope_loss(output, noisy(1))).backward()
    assert output.grad.abs().max() > 0


def test_cepstra_of_silence_have_finite_gradients():
    output = (1e-3 * torch.randn(2, 16_000)).requires_grad_()
    cepstral_loss(output, torch.zeros(2, 16_000)).backward()
    assert torch.isfinite(output.grad).all()


def test_silence_has_no_envelopes_and_no_gradient_that_is_not_finite():
    a = torch.zeros(2, 16_000)
    output = (1e-3 * torch.randn(2, 16_000)).requires_grad_()
    envelope_loss(output, a).backward()
    assert torch.isfinite(output.grad).all()
    half = sounds()
    half[:, 8_000:] = 0
    noisy = half.clone()
    noisy[:, 12_000:] = 1e-5 * torch.randn(2, 4_000)
    assert envelope_loss(noisy, half) < 0.05


@pytest.mark.parametrize("samples", [0, 100, 1_000, 5_000])
def test_a_sound_too_short_for_a_syllable_has_no_envelope_loss(samples):
    a = torch.randn(2, samples)
    assert envelope_loss(a, -a) == 0
    assert cepstral_loss(a[:, :500], -a[:, :500]) == 0


def test_envelopes_rank_sounds_as_stoi_does():
    """Speech under ever more noise: both measures fall together."""
    stoi = pytest.importorskip("pystoi").stoi
    clean = Speech.open(ASSETS / "audio" / "rms" / "2708-100.flac").resample(16_000).samples
    rng = np.random.default_rng(0)
    scores = []
    for level in (0.0, 0.005, 0.01, 0.02):
        noisy = (clean + rng.normal(0, level, len(clean))).astype(np.float32)
        loss = envelope_loss(torch.from_numpy(noisy)[None], torch.from_numpy(clean)[None]).item()
        scores.append((1 - loss, stoi(clean, noisy, 16_000)))
    ours, theirs = zip(*scores, strict=True)
    assert list(ours) == sorted(ours, reverse=True) and list(theirs) == sorted(theirs, reverse=True)
    np.testing.assert_allclose(ours, theirs, atol=0.05)


def test_a_recipe_weighs_the_terms():
    torch.manual_seed(0)
    tokenizer = SpeechTokenizer(**SETTINGS)
    batch = sounds()
    assert set(tokenizer.training_loss(batch)[1]) == {"mel", "spectral"}
    tokenizer.configure_losses({"envelope": 2.0, "mel": 0})
    loss, seen = tokenizer.training_loss(batch)
    assert set(seen) == {"envelope"} and loss.item() == pytest.approx(2 * seen["envelope"], rel=1e-5)
    loss.backward()
    assert all(one.grad is not None for one in tokenizer.decoder.parameters())
    for wrong in ({"loud": 1}, {"mel": -1}, {"mel": 0}):
        with pytest.raises(TokenizerError, match="loss weighs mel, spectral, envelope, cepstral"):
            tokenizer.configure_losses(wrong)
