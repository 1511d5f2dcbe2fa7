"""What every tokenizer must do: a subclass says which it is and what its input looks like, and inherits the tests.

Test classes here have no instances of their own: pytest collects them only through a subclass in a test module.
"""

import json
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from anytoken.segments import Segment, Text
from anytoken.tokenizers.base import CodeGrid, Codes, ModalityTokenizer, TokenizerError, load_tokenizer
from anytoken.tokenizers.dna.base import DNATokenizerBase
from anytoken.tokenizers.dna.context import DNAContextTokenizer
from anytoken.tokenizers.dna.kmer_bpe import DNABPETokenizer, DNAKmerTokenizer

SEED = 0


def parameters_without_gradient(tokenizer: ModalityTokenizer, batch: Tensor) -> list[str]:
    """Names of trainable parameters that the training loss of a batch does not reach."""
    tokenizer.zero_grad(set_to_none=True)
    loss, _ = tokenizer.training_loss(batch)
    loss.backward()
    named = {name: p for name, p in tokenizer.named_parameters() if p.requires_grad}
    return [name for name, p in named.items() if p.grad is None or not p.grad.abs().sum() > 0]


class TokenizerBattery:
    """A subclass sets `tokenizer_class` and tiny `settings`, and implements the methods that raise below."""

    tokenizer_class: ClassVar[type[ModalityTokenizer]]
    settings: ClassVar[dict[str, Any]] = {}

    def segment(self, seed: int) -> Segment:
        """An ordinary segment, another for each seed."""
        raise NotImplementedError

    def odd(self) -> dict[str, Segment]:
        """Odd sizes and extremes by name: all of them are encoded and decoded."""
        raise NotImplementedError

    def batch(self) -> Tensor:
        """A batch for `training_loss`."""
        raise NotImplementedError

    def check_same_shape(self, segment: Segment, back: Segment) -> None:
        """Assert that what came back of `segment(seed)` has its size."""
        raise NotImplementedError

    def check_close(self, one: Segment, other: Segment) -> None:
        """Assert that two decoded segments are equal but for rounding."""
        raise NotImplementedError

    def build(self, seed: int = SEED) -> ModalityTokenizer:
        """A tokenizer with random weights, the same for the same seed; learned codebooks are set by batches."""
        torch.manual_seed(seed)
        tokenizer = self.tokenizer_class(**self.settings)
        unset = [flag for name, flag in tokenizer.named_buffers() if name.endswith("_codebook.initted")]
        while not all(unset):
            tokenizer.train().training_loss(self.batch())
        return tokenizer.eval()

    def untrained(self) -> ModalityTokenizer:
        """A tokenizer to train; another than `build()` where that one is trained already."""
        return self.build()

    @pytest.fixture
    def tokenizer(self) -> ModalityTokenizer:
        return self.build()

    @pytest.fixture
    def saved(self, tokenizer, tmp_path):
        return tokenizer.save_pretrained(tmp_path / "saved")

    # ---- there and back ----

    def test_round_trip_keeps_kind_and_shape(self, tokenizer):
        segment = self.segment(1)
        back = tokenizer.decode(tokenizer.encode(segment))
        assert type(back) is tokenizer.segment_type
        self.check_same_shape(segment, back)

    def test_codes_are_in_the_declared_shape_and_range(self, tokenizer):
        for seed in range(3):
            codes = tokenizer.encode(self.segment(seed))
            tokenizer.check_codes(codes)
            assert codes.values.dtype == np.int64
            assert codes.values.shape[1] == tokenizer.shape.num_codebooks == len(tokenizer.codebook_sizes)
            assert codes.header.dtype == np.int64 and len(codes.header) == tokenizer.shape.num_global_codes

    def test_different_segments_get_different_codes(self, tokenizer):
        assert tokenizer.encode(self.segment(1)) != tokenizer.encode(self.segment(2))

    def test_encoding_and_decoding_are_deterministic(self, tokenizer):
        again, segment = self.build(), self.segment(1)
        codes = tokenizer.encode(segment)
        assert codes == tokenizer.encode(segment) == again.encode(segment)
        assert tokenizer.decode(codes) == tokenizer.decode(codes) == again.decode(codes)

    def test_a_batch_gives_what_single_segments_give(self, tokenizer):
        segments = [self.segment(1), *self.odd().values(), self.segment(2), self.segment(1)]
        codes = tokenizer.encode_batch(segments)
        assert codes == [tokenizer.encode(segment) for segment in segments]
        for one, back in zip(codes, tokenizer.decode_batch(codes), strict=True):
            self.check_close(tokenizer.decode(one), back)

    def test_nothing_in_nothing_out(self, tokenizer):
        assert tokenizer.encode_batch([]) == [] and tokenizer.decode_batch([]) == []

    def test_odd_sizes_and_extremes(self, tokenizer):
        for name, segment in self.odd().items():
            codes = tokenizer.encode(segment)
            tokenizer.check_codes(codes)
            assert type(tokenizer.decode(codes)) is tokenizer.segment_type, name

    def test_any_legal_codes_decode(self, tokenizer):
        rng = np.random.default_rng(0)
        for size in self.legal_sizes(tokenizer):
            values = [rng.integers(0, k, int(np.prod(size))) for k in tokenizer.codebook_sizes]
            header = rng.integers(0, tokenizer.global_codebook_size or 1, tokenizer.shape.num_global_codes)
            codes = Codes(np.stack(values, 1), size if isinstance(tokenizer.shape, CodeGrid) else (), header)
            assert type(tokenizer.decode(codes)) is tokenizer.segment_type

    def legal_sizes(self, tokenizer: ModalityTokenizer) -> list[tuple[int, ...]]:
        """The smallest and the largest size, and one between."""
        shape = tokenizer.shape
        if isinstance(shape, CodeGrid):
            low, high = shape.min_size, shape.max_size
        else:
            low, high = (shape.min_length,), (shape.max_length,)
        return [low, tuple((a + b) // 2 for a, b in zip(low, high, strict=True)), high]

    # ---- training ----

    def test_the_training_loss_reaches_every_parameter(self):
        assert not parameters_without_gradient(self.untrained().train(), self.batch())

    def test_a_few_steps_lower_the_training_loss(self):
        tokenizer, batch = self.untrained(), self.batch()
        optimizer = torch.optim.Adam(tokenizer.train().parameters(), lr=3e-3)
        losses = []
        for _ in range(12):
            loss, metrics = tokenizer.training_loss(batch)
            assert all(isinstance(value, float) for value in metrics.values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert min(losses[-3:]) < losses[0]

    def test_codebook_vectors_are_one_for_each_code(self, tokenizer):
        for book, size in enumerate(tokenizer.codebook_sizes):
            vectors = tokenizer.codebook_vectors(book)
            assert vectors.ndim == 2 and len(vectors) == size and vectors.isfinite().all()
            assert len(vectors.unique(dim=0)) > 1
        assert tokenizer.global_vectors().shape[0] == tokenizer.global_codebook_size

    def test_global_codes_are_exchanged_and_checked(self, tokenizer):
        codes, other = tokenizer.encode_batch([self.segment(1), self.segment(2)])
        if not tokenizer.shape.num_global_codes:
            with pytest.raises(TokenizerError, match="no global codes to exchange"):
                tokenizer.swap_global(self.segment(1), self.segment(2))
            with pytest.raises(TokenizerError, match="0 global codes; received 1"):
                tokenizer.decode(replace(codes, header=[0]))
            return
        swapped = tokenizer.swap_global(self.segment(1), self.segment(2))
        assert swapped == tokenizer.decode(Codes(codes.values, codes.size, other.header))
        flipped = replace(codes, header=(codes.header + 1) % tokenizer.global_codebook_size)
        assert codes != flipped and tokenizer.decode(codes) != tokenizer.decode(flipped)
        for header in (codes.header[:-1], [*codes.header, 0]):
            with pytest.raises(TokenizerError, match=f"global codes; received {len(header)}"):
                tokenizer.decode(replace(codes, header=header))
        for beyond in (-1, tokenizer.global_codebook_size):
            with pytest.raises(TokenizerError, match=r"global codes are 0 to .*; received values from"):
                tokenizer.decode(replace(codes, header=[*codes.header[:-1], beyond]))

    # ---- mistakes ----

    def test_a_wrong_kind_of_segment_is_an_error(self, tokenizer):
        with pytest.raises(TokenizerError, match="received Text"):
            tokenizer.encode(Text("hello"))
        with pytest.raises(TokenizerError, match="received Text"):
            tokenizer.encode_batch([self.segment(1), Text("hello")])

    def test_a_wrong_number_of_codebooks_is_an_error(self, tokenizer):
        codes = tokenizer.encode(self.segment(1))
        doubled = replace(codes, values=np.concatenate([codes.values, codes.values], 1))
        with pytest.raises(TokenizerError, match=f"codebooks; received {doubled.values.shape[1]}"):
            tokenizer.decode(doubled)

    @pytest.mark.parametrize("beyond", [-1, 0])
    def test_a_code_out_of_range_is_an_error(self, tokenizer, beyond):
        codes = tokenizer.encode(self.segment(1))
        values = codes.values.copy()
        wrong = -1 if beyond else tokenizer.codebook_sizes[0]
        values[-1, 0] = wrong
        with pytest.raises(TokenizerError, match=f"codes 0 to .*received values from .*{wrong}"):
            tokenizer.decode(replace(codes, values=values))

    def test_a_wrong_size_is_an_error(self, tokenizer):
        codes, shape = tokenizer.encode(self.segment(1)), tokenizer.shape
        books = shape.num_codebooks
        if isinstance(shape, CodeGrid):
            too_long = tuple(n + 1 for n in shape.max_size)
            wrong = [
                Codes(codes.values, ()),
                Codes(codes.values[:-1], codes.size),
                Codes(np.zeros((int(np.prod(too_long)), books)), too_long),
                Codes(np.zeros((0, books)), (0,) * len(shape.axes)),
            ]
        else:
            wrong = [Codes(np.zeros((count, books))) for count in (0, shape.max_length + 1)]
        for one in wrong:
            with pytest.raises(TokenizerError, match="received"):
                tokenizer.decode(one)

    # ---- folders ----

    def test_saved_and_loaded_it_gives_the_same_codes(self, tokenizer, saved):
        loaded, segment = load_tokenizer(saved), self.segment(1)
        assert type(loaded) is type(tokenizer) and not loaded.training
        assert loaded.fingerprint() == tokenizer.fingerprint()
        assert loaded.encode(segment) == tokenizer.encode(segment)
        assert loaded.decode(loaded.encode(segment)) == tokenizer.decode(tokenizer.encode(segment))
        assert (loaded.shape, loaded.codebook_sizes) == (tokenizer.shape, tokenizer.codebook_sizes)
        assert {path.name for path in saved.parent.iterdir()} == {"saved"}, "scratch files are left"

    def test_a_model_of_another_kind_is_not_replaced(self, tokenizer, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        (tmp_path / "model.safetensors").write_bytes(b"weights")
        with pytest.raises(TokenizerError, match="holds something else"):
            tokenizer.save_pretrained(tmp_path)
        assert (tmp_path / "model.safetensors").read_bytes() == b"weights"

    def test_the_fingerprint_tells_other_weights(self, tokenizer):
        before = tokenizer.fingerprint()
        assert before == self.build().fingerprint()
        with torch.no_grad():
            next(tokenizer.parameters()).view(-1)[0] += 0.5
        assert tokenizer.fingerprint() != before

    def test_saved_in_bfloat16_it_loads_and_stays_as_it_is(self, tokenizer, tmp_path):
        loaded = load_tokenizer(tokenizer.save_pretrained(tmp_path / "small", dtype=torch.bfloat16))
        assert all(p.dtype == torch.float32 for p in loaded.parameters())
        again = load_tokenizer(loaded.save_pretrained(tmp_path / "again", dtype=torch.bfloat16))
        assert again.fingerprint() == loaded.fingerprint()
        codes = loaded.encode(self.segment(1))
        assert again.encode(self.segment(1)) == codes and type(loaded.decode(codes)) is loaded.segment_type

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
    def test_a_missing_file_is_named(self, saved, name):
        (saved / name).unlink()
        with pytest.raises(TokenizerError, match=f"{name} is missing"):
            load_tokenizer(saved)

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
    @pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
    def test_a_truncated_file_is_named(self, saved, name, share):
        data = (saved / name).read_bytes()
        (saved / name).write_bytes(data[: int(len(data) * share)])
        with pytest.raises(TokenizerError, match=name):
            load_tokenizer(saved)

    def test_a_configuration_of_something_else_is_named(self, saved):
        path = saved / "config.json"
        header = json.loads(path.read_text())
        for wrong in ({"no_such_setting": 1}, {"width": "wide"}):
            path.write_text(json.dumps({**header, "config": {**header["config"], **wrong}}))
            with pytest.raises(TokenizerError, match=r"config\.json"):
                load_tokenizer(saved)
        path.write_text(
            json.dumps({**header, "config": {**header["config"], "width": self.settings["width"] * 2}})
        )
        with pytest.raises(TokenizerError, match=r"model\.safetensors does not load"):
            load_tokenizer(saved)
        path.write_text(json.dumps({**header, "kind": "smell"}))
        with pytest.raises(TokenizerError, match=r"'smell' tokenizer.*not registered"):
            load_tokenizer(saved)


def dna_tokenizers() -> list[DNATokenizerBase]:
    """Small ones of every kind of DNA tokenizer whose codes spell by construction."""
    torch.manual_seed(SEED)
    context = DNAContextTokenizer(k=2, classes=3, reach=5, width=16, code_dim=4)
    context.train().training_loss(torch.randint(0, 4, (400, 12)))  # sets the codebook
    kmers = [DNAKmerTokenizer(k) for k in (1, 3, 6)]
    return [*kmers, DNABPETokenizer(16, ["A C", "G T", "AC GT", "T T"]), context.eval()]
