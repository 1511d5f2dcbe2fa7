"""Speech to a line of codes and back: 50 frames per second of 16 kHz audio, one or two frames per code.

Log-mel frames every 20 ms go through 1-D ConvNeXt blocks and a quantiser; the decoder predicts magnitude and phase of
a short-time spectrum and inverts it, which is cheap and makes the waveform directly (Vocos, arXiv 2306.00814). Trained
with multi-resolution spectral losses, without a discriminator. `frames_per_code: 2` halves the sequence
length; residual codebooks with dropout then serve 25 and 50 codes per second with one set of weights. Global codes
describe the speaker and the channel once, before the frames (as in BiCodec, 2503.01710): frames need not repeat it, and
a language model sees the same codes for a word from any speaker. With `num_candidates`, codes are chosen by the
quality of the decoded audio.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anytoken.segments import Segment, Speech
from anytoken.tokenizers.base import (
    Codes,
    CodeSequence,
    ModalityTokenizer,
    TokenizerError,
    loss_weights,
    register_modality,
)
from anytoken.tokenizers.losses.audio import (
    FRAME,
    TERMS,
    cepstral_loss,
    envelope_loss,
    log_mel,
    perceptual_distance,
    power,
    spectral_loss,
)
from anytoken.tokenizers.losses.speech_content import TERMS as CONTENT_TERMS
from anytoken.tokenizers.losses.speech_content import SpellingHead, SpokenPairs, agreement_loss
from anytoken.tokenizers.modules.code_search import analysis_by_synthesis, check_candidates
from anytoken.tokenizers.modules.convnext import (
    AT_ONCE,
    ChannelLinear,
    ChannelNorm,
    Conv1dAsConv2d,
    ConvNeXtStack,
    Patchify,
    Unpatchify,
    group_by_shape,
)
from anytoken.tokenizers.modules.quantizer import LEARNED, Quantizer, QuantizerConfig

SAMPLE_RATE_HZ, HOP, WINDOW, MELS = 16_000, 320, 1280, 80
KERNEL = 7
MAX_FRAMES = 400  # eight seconds
SPECTRA_PER_FRAME = 1, 2  # of 80 or 40 ms: a window of 20 ms has empty mel bands
SPECTRA = {"mel": 2.0, "spectral": 1.0}


class LogMel(nn.Module):
    """Log-mel frames [B, 80, T] of samples [B, T * 320]; frame t is centred on its 320 samples."""

    filters: Tensor
    window: Tensor

    def __init__(self, window: int = WINDOW, hop: int = HOP, mels: int = MELS) -> None:
        super().__init__()
        from torchaudio.functional import melscale_fbanks

        self.window_size, self.hop = window, hop
        filters = melscale_fbanks(
            window // 2 + 1, 0.0, SAMPLE_RATE_HZ / 2, mels, SAMPLE_RATE_HZ, norm="slaney"
        )
        self.register_buffer("filters", filters, persistent=False)
        self.register_buffer("window", torch.hann_window(window), persistent=False)

    def forward(self, samples: Tensor) -> Tensor:
        """Samples in [-1, 1] to natural log of mel energy, floored at 1e-5."""
        padded = F.pad(samples, ((self.window_size - self.hop) // 2,) * 2)
        spectrum = torch.stft(
            padded, self.window_size, self.hop, window=self.window, center=False, return_complex=True
        )
        with torch.autocast(samples.device.type, enabled=False):  # soft audio is lost in fewer bits
            energy = power(spectrum).clamp_min(1e-14).sqrt().transpose(1, 2) @ self.filters
        return energy.clamp_min(1e-5).log().transpose(1, 2)


class ISTFTHead(nn.Module):
    """Magnitude and phase of `spectra` short spectra a frame, overlap-added into samples by an inverse transform."""

    window: Tensor

    def __init__(self, width: int, spectra: int = 1) -> None:
        super().__init__()
        self.spectra, self.size, self.hop = spectra, WINDOW // spectra, HOP // spectra
        self.project = ChannelLinear(width, spectra * (self.size + 2))
        self.register_buffer("window", torch.hann_window(self.size), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, D, T] to samples [B, T * 320]."""
        parts = self.project(x).movedim(1, -1).float().unflatten(-1, (self.spectra, -1)).flatten(1, 2)
        log_magnitude, phase = parts.chunk(2, dim=-1)
        magnitude = log_magnitude.clamp_max(6.0).exp()
        # As torch.polar, which takes four times as long.
        spectrum = torch.complex(magnitude * phase.cos(), magnitude * phase.sin())
        frames = torch.fft.irfft(spectrum, self.size) * self.window
        weight = _overlap_add(self.window.square().expand(1, frames.shape[1], -1), self.hop)
        edge = (self.size - self.hop) // 2
        samples = _overlap_add(frames, self.hop) / weight.clamp_min(1e-3)
        return samples[:, edge : edge + x.shape[2] * HOP]


def _overlap_add(frames: Tensor, hop: int) -> Tensor:
    """Frames [B, T, 4 * hop], one every `hop` samples, summed up where they overlap: [B, (T + 3) * hop]."""
    parts = frames.unflatten(-1, (-1, hop))
    count = parts.shape[2]
    total = F.pad(parts[:, :, 0], (0, 0, 0, count - 1))
    for i in range(1, count):
        total[:, i : i + parts.shape[1]] += parts[:, :, i]
    return total.flatten(1)


class GlobalEncoder(nn.Module):
    """What stays as it is through a clip, in `count` codes: pooled over time, each quantised by fsq of four levels.

    size: of each code, the largest power of four up to `codebook_size`.
    """

    def __init__(self, width: int, count: int, codebook_size: int, bands: int = MELS, depth: int = 2) -> None:
        super().__init__()
        levels = [4] * ((codebook_size.bit_length() - 1) // 2)
        self.count, self.size = count, 4 ** len(levels)
        self.listen = nn.Sequential(
            Conv1dAsConv2d(bands, width, 3, padding=1),
            ConvNeXtStack(width, depth, (KERNEL,)),
            ChannelNorm(width),
        )
        self.split = nn.Linear(2 * width, count * width)
        self.quantize = Quantizer(width, "fsq", levels)
        self.join = nn.Linear(count * width, width)

    def forward(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled log-mel frames [B, 80, T] to what a decoder adds to its frames [B, D, 1], and codes [B, count]."""
        heard = self.listen(mel)
        spread = heard.var(2, unbiased=False).add(1e-4).sqrt()
        parts = self.split(torch.cat([heard.mean(2), spread], 1)).unflatten(1, (self.count, -1))
        quantized = self.quantize(parts)
        return self._joined(quantized.vectors), quantized.codes[..., 0]

    def lookup(self, codes: Tensor) -> Tensor:
        """What codes [B, count] add to a decoder's frames [B, D, 1]."""
        return self._joined(self.quantize.lookup(codes[..., None]))

    def _joined(self, vectors: Tensor) -> Tensor:
        return self.join(vectors.flatten(1))[..., None]


@register_modality
class SpeechTokenizer(ModalityTokenizer):
    """16 kHz mono, 20 ms a frame; other rates are resampled, other lengths padded to whole codes.

    frames_per_code: number of frames per code (of each codebook). max_frames: maximum clip length in codes.
    num_global_codes: number of global codes, which describe the voice. Local codes then describe frames without the
    clip's constant part; clips shorter than about 0.3 s are reconstructed less well than without global codes.
    spectra_per_frame: number of spectra per frame, with proportionally shorter windows, which separate
    consonants in time.
    num_candidates: when encoding, decode this number of the nearest codes at each position and keep the one whose audio
    is closest: more words are recognized, and encoding costs twice as many decodings.
    """

    kind = "speech"
    segment_type = Speech

    def __init__(
        self,
        width: int = 256,
        encoder_depth: int = 4,
        decoder_depth: int = 6,
        quantizer: QuantizerConfig = "fsq",
        levels: Sequence[int] = (8, 8, 8, 8),
        codebook_size: int = 4096,
        max_frames: int = MAX_FRAMES,
        frames_per_code: int = 1,
        num_global_codes: int = 0,
        num_candidates: int = 1,
        spectra_per_frame: int = 1,
    ) -> None:
        config = {
            "width": width, "encoder_depth": encoder_depth, "decoder_depth": decoder_depth, "quantizer": quantizer,
            "levels": list(levels), "codebook_size": codebook_size, "max_frames": max_frames,
        }  # fmt: skip
        if not isinstance(frames_per_code, int) or frames_per_code < 1:
            raise TokenizerError(f"frames_per_code is a whole number from 1; received {frames_per_code!r}.")
        if spectra_per_frame not in SPECTRA_PER_FRAME:
            raise TokenizerError(
                f"spectra_per_frame is one of {', '.join(map(str, SPECTRA_PER_FRAME))}; received {spectra_per_frame!r}."
            )
        # Files from before there was a choice do not write it.
        config |= {"frames_per_code": frames_per_code} if frames_per_code != 1 else {}
        config |= {"num_global_codes": num_global_codes} if num_global_codes else {}
        config |= {"num_candidates": num_candidates} if num_candidates != 1 else {}
        config |= {"spectra_per_frame": spectra_per_frame} if spectra_per_frame != 1 else {}
        quantize = Quantizer(width, quantizer, levels, codebook_size)
        check_candidates(num_candidates, quantize)
        shape = CodeSequence(1, max_frames, quantize.num_codebooks, quantize.order, num_global_codes)
        bands, smallest = MELS * spectra_per_frame, min(quantize.codebook_sizes)
        voice = GlobalEncoder(width, num_global_codes, smallest, bands) if num_global_codes else None
        super().__init__(
            shape=shape,
            codebook_sizes=quantize.codebook_sizes,
            config=config,
            global_codebook_size=voice.size if voice else 0,
        )
        self.hop = HOP * frames_per_code
        self.frame_rate_hz = SAMPLE_RATE_HZ / self.hop
        self.quantize = quantize
        self.voice = voice
        self.mel = LogMel(WINDOW // spectra_per_frame, HOP // spectra_per_frame)
        self.side_by_side = Patchify((spectra_per_frame,))
        fold: list[nn.Module] = []
        unfold: list[nn.Module] = []
        if frames_per_code > 1:
            fold = [Patchify((frames_per_code,)), ChannelLinear(width * frames_per_code, width)]
            unfold = [ChannelLinear(width, width * frames_per_code), Unpatchify((frames_per_code,))]
        self.encoder = nn.Sequential(
            Conv1dAsConv2d(bands, width, 3, padding=1),
            ConvNeXtStack(width, encoder_depth, (KERNEL,)),
            *fold,
            ChannelNorm(width),
        )
        self.decoder = nn.Sequential(
            *unfold,
            ConvNeXtStack(width, decoder_depth, (KERNEL,)),
            ChannelNorm(width),
            ISTFTHead(width, spectra_per_frame),
        )
        self.mel_for_loss = LogMel(1024, 256, MELS)
        self._losses = SPECTRA

    def _scaled_mel(self, samples: Tensor) -> Tensor:
        """Log-mel spectra [B, 80 * spectra_per_frame, T] of samples [B, T * 320], at a network's scale."""
        return (self.side_by_side(self.mel(samples)) + 5.0) / 4.0

    def _features(self, mel: Tensor) -> Tensor:
        """Scaled log-mel frames to what is quantised [B, T, D].

        With a voice, less what the clip has all along: the mean of its spectrum, and after each part of the encoder
        mean and spread of each feature (instance normalisation, which takes the speaker out: arXiv 1904.05742).
        """
        if self.voice is None:
            return self.encoder(mel).transpose(1, 2)
        found = mel - mel.mean(2, keepdim=True)
        for part in self.encoder:
            found = part(found)
            found = found - found.mean(2, keepdim=True)
            found = found / found.square().mean(2, keepdim=True).add(0.01).sqrt()
        return found.transpose(1, 2)

    def configure_losses(self, weights: Mapping[str, float]) -> nn.Module | None:
        """Train by these terms, by default mel energies and spectra; those of `speech_content` need spoken pairs.

        With `spelling`, returns the head that reads texts from codes. TokenizerError for unknown terms, or for content
        terms without global codes and one learned codebook.
        """
        self._losses = loss_weights(weights, (*TERMS, *CONTENT_TERMS), SPECTRA)
        if not any(self._losses.get(term) for term in CONTENT_TERMS):
            return None
        quantizer = self.quantize
        if self.voice is None or quantizer.kind not in LEARNED or quantizer.residual * quantizer.groups != 1:
            raise TokenizerError(
                f"{' and '.join(CONTENT_TERMS)} need num_global_codes and one codebook of kind "
                f"{' or '.join(LEARNED)}; config is {self.config}."
            )
        if not self._losses.get("spelling"):
            return None
        head = SpellingHead(self.config["width"])
        self._spelling = head.loss  # not a submodule: it is trained along and not saved
        return head

    def training_loss(self, batch: Tensor | SpokenPairs) -> tuple[Tensor, dict[str, float]]:
        """batch: samples [B, T] in [-1, 1], of which an incomplete code at the end is left out, or spoken pairs.

        With global codes the halves of each row are two clips of one voice. Some take it from themselves, as when
        encoding, and some from the other, where nothing else that it could say of its clip is to be had.
        """
        if isinstance(batch, SpokenPairs):
            return self._pair_loss(batch)
        halves = 2 if self.voice else 1
        batch = batch[:, : batch.shape[1] // (halves * self.hop) * halves * self.hop]
        if self.voice:
            batch = torch.cat(batch.chunk(2, 1))
        seen = self._scaled_mel(batch)
        quantized = self.quantize(self._features(seen))
        frames = quantized.vectors.transpose(1, 2)
        if self.voice:
            voice_codes = self.voice(seen)[0]
            own = torch.rand(len(seen), 1, 1, device=voice_codes.device) < 0.5
            frames = frames + torch.where(own, voice_codes, voice_codes.roll(len(seen) // 2, 0))
        losses = self._audio_losses(self.decoder(frames), batch)
        return self._weighted(losses) + quantized.loss, {name: one.item() for name, one in losses.items()}

    def _pair_loss(self, pairs: SpokenPairs) -> tuple[Tensor, dict[str, float]]:
        """As for crops, and by what the codes say: voices are those of other clips in half of the rows."""
        assert self.voice is not None
        batch = pairs.samples[:, : pairs.samples.shape[1] // self.hop * self.hop]
        seen = self._scaled_mel(batch)
        features = self._features(seen)
        quantized = self.quantize(features)
        own_voice, other_clip = self.voice(seen)[0], self.voice(self._scaled_mel(pairs.others))[0]
        use_own = torch.rand(len(seen), 1, 1, device=seen.device) < 0.5
        output = self.decoder(quantized.vectors.transpose(1, 2) + torch.where(use_own, own_voice, other_clip))
        losses = self._audio_losses(output, batch)
        if self._losses.get("spelling"):
            losses["spelling"] = self._spelling(quantized.vectors, [*pairs.texts, *pairs.texts])
        if self._losses.get("agreement"):
            losses["agreement"] = agreement_loss(
                self.quantize.inner.project_in(features.float()), pairs.texts
            )
        return self._weighted(losses) + quantized.loss, {name: one.item() for name, one in losses.items()}

    def _weighted(self, losses: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([self._losses[name] * one for name, one in losses.items()]).sum()

    def _audio_losses(self, output: Tensor, batch: Tensor) -> dict[str, Tensor]:
        terms = {
            "mel": lambda: F.l1_loss(self.mel_for_loss(output), self.mel_for_loss(batch)),
            "spectral": lambda: spectral_loss(output, batch),
            "envelope": lambda: envelope_loss(output, batch),
            "cepstral": lambda: cepstral_loss(output, batch),
        }
        return {name: term() for name, term in terms.items() if self._losses.get(name)}

    def _samples(self, segment: Segment) -> np.ndarray:
        self.check_segment(segment)
        assert isinstance(segment, Speech)
        frames = math.ceil(segment.seconds * SAMPLE_RATE_HZ / self.hop)
        limit = self.config["max_frames"]
        if frames > limit:
            raise TokenizerError(
                f"Speech of {segment.seconds:.1f} s is {frames} codes; at most {limit} "
                f"({limit / self.frame_rate_hz:g} s) are taken: cut it into pieces."
            )
        samples = segment.resample(SAMPLE_RATE_HZ).samples
        return np.pad(samples, (0, -len(samples) % self.hop))

    @torch.inference_mode()
    def encode_batch(self, segments: Sequence[Segment]) -> list[Codes]:
        """Clips to codes; clips of one length share a forward pass, so a batch gives what single clips give."""
        clips = [self._samples(segment) for segment in segments]
        codes: dict[int, Codes] = {}
        frames = [len(clip) // HOP for clip in clips]
        for rows in group_by_shape(frames, frames, self.device):
            batch = torch.from_numpy(np.stack([clips[i] for i in rows])).to(self.device)
            seen = self._scaled_mel(batch)
            voice_codes = self.voice(seen)[1] if self.voice else None
            values = self._chosen(self._features(seen), voice_codes, batch).cpu().numpy()
            headers = np.zeros((len(rows), 0)) if voice_codes is None else voice_codes.cpu().numpy()
            found = zip(rows, values, headers, strict=True)
            codes.update({i: Codes(one, header=header) for i, one, header in found})
        return [codes[i] for i in range(len(clips))]

    def _chosen(self, features: Tensor, voice_codes: Tensor | None, target: Tensor) -> Tensor:
        """Codes [B, N, Q] of features [B, N, D]: the nearest, or of `num_candidates` those closest to target.

        voice_codes [B, count]: global codes. Every second code is tried at once; its error is measured over its own
        span and those of its neighbors.
        """
        if (count := self.config.get("num_candidates", 1)) == 1:
            return self.quantize(features).codes
        wanted, frames = log_mel(target), self.hop // FRAME

        def error(trials: Tensor) -> Tensor:
            kinds = len(trials)
            voice = None if voice_codes is None else voice_codes.repeat(kinds, 1)
            audio = self._audio(trials.flatten(0, 1), voice)
            apart = perceptual_distance(log_mel(audio).unflatten(0, (kinds, -1)), wanted).flatten(0, 1)
            each = F.avg_pool1d(apart, frames)
            return F.avg_pool1d(F.pad(each, (1, 1), mode="replicate"), 3, 1).unflatten(0, (kinds, -1))

        turns = torch.arange(features.shape[1], device=features.device) % 2
        at_once = max(1, AT_ONCE // target.shape[0] // features.shape[1])
        return analysis_by_synthesis(self.quantize.nearest(features, count), turns, error, at_once)

    @torch.inference_mode()
    def decode_batch(self, codes: Sequence[Codes]) -> list[Segment]:
        """Codes to 16 kHz clips of 320 samples per frame."""
        result: dict[int, Segment] = {}
        for one in codes:
            self.check_codes(one)
        lengths = [len(one) for one in codes]
        for rows in group_by_shape(lengths, lengths, self.device):
            values = np.stack([codes[i].values for i in rows])
            samples = self._decode_values(values, np.stack([codes[i].header for i in rows]))
            result.update({i: Speech(one, SAMPLE_RATE_HZ) for i, one in zip(rows, samples, strict=True)})
        return [result[i] for i in range(len(codes))]

    def _decode_values(self, values: np.ndarray, headers: np.ndarray) -> np.ndarray:
        """Codes [B, T, Q] and global codes [B, G] to samples [B, T * hop] in [-1, 1]."""
        local, voice_codes = (torch.from_numpy(one).to(self.device) for one in (values, headers))
        return self._audio(local, voice_codes if self.voice else None).cpu().numpy()

    def _audio(self, codes: Tensor, voice_codes: Tensor | None) -> Tensor:
        """Codes [B, N, Q] of frames and [B, count] of the voice to samples [B, N * hop] in [-1, 1]."""
        frames = self.quantize.lookup(codes).transpose(1, 2)
        if self.voice and voice_codes is not None:
            frames = frames + self.voice.lookup(voice_codes)
        return self.decoder(frames).clamp(-1, 1)

    @property
    def lookahead(self) -> int:
        """The decoder's reach to either side: its convolutions, and the frames whose windows overlap one frame."""
        frames = self.config["decoder_depth"] * (KERNEL // 2) + math.ceil((WINDOW - HOP) / 2 / HOP)
        return math.ceil(frames * HOP / self.hop)

    @torch.inference_mode()
    def decode_span(self, codes: Codes, start: int, stop: int) -> Speech:
        """Codes `start` to `stop` as audio, decoded with the decoder's whole reach around them.

        What lies further away has no part in them, so they are the samples of the whole clip, to the bit where the
        sums of both lengths are taken in one order, else within float32 rounding.
        """
        first, last = max(0, start - self.lookahead), min(len(codes), stop + self.lookahead)
        samples = self._decode_values(codes.values[None, first:last], codes.header[None])[0]
        return Speech(samples[(start - first) * self.hop : (stop - first) * self.hop], SAMPLE_RATE_HZ)

    def first_codebooks(self, count: int) -> SpeechTokenizer:
        """The same weights with the first `count` residual codebooks, if trained with dropout: fewer codes per second.

        TokenizerError if the quantiser was not trained for it.
        """
        choice = self.config["quantizer"]
        choice = {"kind": choice} if isinstance(choice, str) else choice
        coarse = SpeechTokenizer(**{**self.config, "quantizer": {**choice, "num_active_codebooks": count}})
        coarse.load_state_dict(self.state_dict())
        return coarse.to(self.device).train(self.training)

    def codebook_vectors(self, codebook: int = 0) -> Tensor:
        """Quantised vectors [K, width] in the decoder's input space."""
        return self.quantize.codebook(codebook)

    def global_vectors(self) -> Tensor:
        """Quantised vectors [K, width] of the voice, before they are joined."""
        return self.voice.quantize.codebook() if self.voice else super().global_vectors()
