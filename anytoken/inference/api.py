"""The public entry point: a model that reads and generates typed segments."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from anytoken.inference import hub
from anytoken.inference.adapters import Adapters
from anytoken.inference.best_answers import best_answers
from anytoken.inference.best_of import BestOfDefaults, load_best_of, save_best_of
from anytoken.inference.chains import Chains, load_chains, save_chains
from anytoken.inference.chat import Chat
from anytoken.inference.checkpoint import CHECKPOINT, find_checkpoint, is_bare_head, load_folder, pick_device
from anytoken.inference.embed import Embedder, hidden_states, prompts_of
from anytoken.inference.engine import Engine
from anytoken.inference.generation import (  # noqa: F401 (also imported from here)
    GenerationMixin,
    Options,
    Output,
    Prompt,
    Rerank,
)
from anytoken.inference.sampling import Sampling, load_sampling, save_sampling
from anytoken.inference.score import (
    Classification,
    Normalize,
    Score,
    Steps,
    check_normalize,
    classify,
    drain,
    perplexity,
    score_ids,
    score_steps,
)
from anytoken.model.embedding_head import EmbeddingHead, has_head
from anytoken.model.extend_vocab import add_modality
from anytoken.processor import Processor
from anytoken.segments import Segment
from anytoken.tokenizers.base import ModalityTokenizer
from anytoken.utils.atomic import check_target, write_folder
from anytoken.utils.errors import CheckpointError, RequestError


class AnyToken(GenerationMixin):
    """A language model over all modalities (`lm`) and its `processor`: segments in, segments out."""

    def __init__(
        self, lm: PreTrainedModel, processor: Processor, sampling: Mapping[str, Sampling] | None = None
    ) -> None:
        self.lm = lm
        self.processor = processor
        self.sampling = dict(sampling or {})
        self.chains: Chains = {}
        self.best_of: BestOfDefaults = {}
        self.card: str | None = None
        self.compiled = False
        self._engine: Engine | None = None
        self._adapters: Adapters | None = None
        self._homes: set[Path] = set()  # folders that hold an older state of this model
        # by the adapter that they were trained with
        self.embedding_heads: dict[str | None, EmbeddingHead] = {}

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        device: str | torch.device = "auto",
        adapter: str | Path | None = None,
        quantize: str | None = None,
        compile: bool = False,
        attn_implementation: str = "auto",
        media_root: str | Path | None = None,
    ) -> "AnyToken":
        """Open a checkpoint: a bundled name ("mini"), a local folder, or a hub id.

        adapter: a PEFT folder, merged into the weights. quantize="int8" stores one byte per weight: less memory, for
        inference only (model/quantize.py). compile: compile the decoding step now, which takes about a minute the
        first time; later loads use torch's cache. attn_implementation: "sdpa", "flex_attention",
        "flash_attention_2", "flash_attention_3" or "eager"; "auto" uses FlashAttention if its package, a CUDA device
        and half-precision weights are available, otherwise sdpa (the log says which). media_root: the folder whose
        files may be named by strings in message parts (`{"type": "image", "image": "a.png"}`). By default such
        strings name no file, since messages may come from untrusted sources; a pathlib.Path always does.
        ValueError (CheckpointError, ConfigError and others) names a missing or damaged file, an unknown name, or a
        device that cannot be used.
        """
        chosen = pick_device(device)
        folder = find_checkpoint(name_or_path)
        lm, processor = load_folder(folder, chosen, adapter, quantize, attn_implementation)
        processor.media_root = media_root
        model = cls(lm, processor, load_sampling(folder / "sampling.json"))
        model.chains = load_chains(folder)
        model.best_of = load_best_of(folder)
        card = folder / "README.md"
        model.card = card.read_text(encoding="utf-8") if card.is_file() else None
        for source in (folder, *([] if adapter is None else [Path(adapter)])):
            if has_head(source):
                model.embedding_heads[None] = EmbeddingHead.load(source)
        if adapter is None and quantize is None:
            model._homes.add(folder.resolve())
        model.compiled = compile
        if compile:
            model.engine.head()
        return model

    def __repr__(self) -> str:
        millions = sum(parameter.numel() for parameter in self.lm.parameters()) / 1e6
        return f"AnyToken({', '.join(self.kinds)}; {millions:.1f} M parameters, {self.lm.device})"

    def tokenize(self, segment: Segment) -> list[int]:
        """Encode a segment as ids; ValueError for a kind that this model has no tokenizer for."""
        return self.processor.tokenize(segment)

    def detokenize(self, ids: Sequence[int]) -> list[Segment]:
        """Decode ids to segments; ValueError for ids that are not a legal sequence."""
        if not isinstance(ids, Iterable):
            raise RequestError(f"detokenize takes a list of ids; received {ids!r}.")
        return self.processor.detokenize(list(ids))

    # ---- scores and embeddings ----

    def score_details(
        self, prompt: Prompt, answers: Sequence[Any], normalize: Normalize = "none"
    ) -> list[Score]:
        """The log-likelihood of each answer as the whole reply to a prompt, by token and by segment.

        answers: each a string, a segment, or a list of both; the prompt is read only once. With normalize="pmi" each
        also has its likelihood after an empty prompt. RequestError for no answers, an empty answer, a kind that the
        model does not have, or more than fits the context.
        """
        replies = self._answer_ids(answers)
        return drain(self.score_steps(self.encode_prompt(prompt), replies, normalize))

    def score_steps(
        self, prompt: Sequence[int], replies: Sequence[Sequence[int]], normalize: Normalize = "none"
    ) -> Steps[list[Score]]:
        """`score_details` for ids of a prompt and of replies, in parts between which the model can be used."""
        return (yield from score_steps(self.engine, prompt, replies, self._prior_prompt(normalize)))

    def _answer_ids(self, answers: Any) -> list[list[int]]:
        if isinstance(answers, str | Segment) or not isinstance(answers, Sequence) or not answers:
            raise RequestError(f"score takes a list of answers, at least one; received {answers!r:.80}.")
        return [self.processor.encode_reply(answer) for answer in answers]

    def _prior_prompt(self, normalize: Normalize) -> list[int] | None:
        """The empty prompt, if scores are compared with those after it; RequestError for an unknown `normalize`."""
        check_normalize(normalize)
        return self.processor.null_prompt() if normalize == "pmi" else None

    def score(self, prompt: Prompt, answers: Sequence[Any], normalize: Normalize = "none") -> list[float]:
        """Log-likelihoods, in nats, of each answer as the whole reply to a prompt.

        normalize: "none" for the sum over tokens, "tokens" for the mean, "pmi" for the sum minus the sum after an
        empty prompt. Otherwise as `score_details`.
        """
        return [one.value(normalize) for one in self.score_details(prompt, answers, normalize)]

    def classify(
        self, prompt: Prompt, labels: Sequence[Any], normalize: Normalize = "none"
    ) -> Classification:
        """The most likely label as the reply to a prompt, and the probabilities of all labels.

        labels: as `answers` in `score`.
        """
        return classify(labels, self.score(prompt, labels, normalize))

    def rerank(
        self,
        prompt: Prompt,
        candidates: Sequence[Any],
        normalize: Normalize = "tokens",
        top: int | None = None,
    ) -> list[tuple[int, float]]:
        """Index and score of each candidate, best first; arguments as in `score`.

        top: return only the best N, mostly found without scoring the rest. Scores are equal up to rounding.
        """
        if top is None:
            scores = self.score(prompt, candidates, normalize)
            return sorted(enumerate(scores), key=itemgetter(1), reverse=True)
        if not isinstance(top, int) or top < 1:
            raise RequestError(f"top is at least 1, or None for all candidates; received {top!r}.")
        replies, prior = self._answer_ids(candidates), self._prior_prompt(normalize)
        return best_answers(self.engine, self.encode_prompt(prompt), replies, top, normalize, prior)

    def perplexity(self, segments: Any, prompt: Prompt | None = None) -> float:
        """Perplexity per token of segments, after an empty prompt by default.

        Tokens without an alternative, such as close ids, do not count.
        """
        ids = self.processor.encode_reply(segments)
        start = self.processor.null_prompt() if prompt is None else self.encode_prompt(prompt)
        return perplexity(self.engine.grammar, score_ids(self.engine, start, [ids])[0])

    def embed(
        self, prompts: Any, *, tokens: bool = False, width: int | None = None, untrained: bool = False
    ) -> Any:
        """Embed prompts of any kinds: unit vectors, float32 [N, W]; with tokens=True a list of [T, W], one per prompt.

        prompts: a list in which each prompt is a string, a segment, a list of both (one vector for all of it) or
        messages; a single prompt counts as a list of one. tokens: one vector per content token instead. width: use
        only the first dimensions; one of the head's `widths`. A checkpoint without a trained head is an error unless
        untrained=True: vectors are then means of the last hidden states. RequestError (a ValueError) says what is
        wrong.
        """
        return self.embed_ids(
            self.processor.encode_chats(prompts_of(prompts)), tokens=tokens, width=width, untrained=untrained
        )

    def embed_ids(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        tokens: bool = False,
        width: int | None = None,
        untrained: bool = False,
    ) -> Any:
        """`embed` for prompts as ids, as returned by `encode_prompt`."""
        with self.embedder(untrained) as embedder:
            return embedder.token_vectors(prompts, width) if tokens else embedder.vectors(prompts, width)

    def embedding_probe(self, untrained: bool = False) -> np.ndarray:
        """A vector that identifies the embedding space of this model, float32 [W]."""
        with self.embedder(untrained) as embedder:
            return embedder.probe()

    @property
    def embedding_head(self) -> EmbeddingHead:
        """The trained head that `embed` uses; RequestError if there is none."""
        return self._embedding_head(False)[1]

    @contextmanager
    def embedder(self, untrained: bool = False) -> Iterator[Embedder]:
        """The head and the model, with the adapter that it was trained with merged into the weights."""
        name, head = self._embedding_head(untrained)
        active = self.adapters.active
        if name != active:
            self.use_adapter(name)
        try:
            yield Embedder(self.lm, head, self.processor)
        finally:
            if name != active:
                self.use_adapter(active)

    def _embedding_head(self, untrained: bool) -> tuple[str | None, EmbeddingHead]:
        """The head to embed with and the adapter that it needs: the active adapter's head, else the model's own."""
        active, heads = self.adapters.active, self.embedding_heads
        if untrained:
            return active, EmbeddingHead.untrained(self.lm.config.get_text_config().hidden_size, self.kinds)
        if not heads:
            raise RequestError(
                "This checkpoint has no embedding head: train one (anytoken train stages/embed.yaml) and open it with "
                "adapter=, or take the mean of hidden states, which retrieves far less, with untrained=True."
            )
        name = active if active in heads else None if None in heads else next(iter(heads))
        return name, heads[name]

    def hidden_states(self, prompt: Prompt) -> Tensor:
        """Hidden states of a prompt's ids (`encode_prompt`) at every layer, float32 [L + 1, T, H] on the CPU.

        The first are the embeddings, the last are the input of the LM head.
        """
        return hidden_states(self.lm, self.encode_prompt(prompt))

    def chat(self, system: str | None = None) -> Chat:
        """Start a conversation, with an optional system text."""
        return Chat(self, system)

    def add_modality(self, tokenizer: ModalityTokenizer) -> None:
        """Add a modality: new ids at the end, new embedding rows from the codebook; existing ids do not move.

        ValueError if the model has a modality of that name. Generated segments are well-formed from the start, and
        meaningful once the new rows are trained.
        """
        active = self.adapters.active
        self.use_adapter(None)
        try:
            self.processor = add_modality(self.lm, self.processor, tokenizer)
            tokenizer.to(self.lm.device)
        finally:
            self.use_adapter(active)

    def swap_global(self, segment: Segment, other: Segment) -> Segment:
        """`segment` with the global codes of `other`: recolors an image, converts a voice.

        Both are encoded, and the local codes of the first are decoded with the global codes of the second; the language
        model is not used. RequestError or TokenizerError for segments of different kinds, and for a kind without a
        tokenizer or global codes.
        """
        kinds = [one.kind if isinstance(one, Segment) else type(one).__name__ for one in (segment, other)]
        if kinds[0] != kinds[1]:
            raise RequestError(
                f"swap_global takes two segments of one kind; received {kinds[0]} and {kinds[1]}."
            )
        return self.processor.tokenizer_of(kinds[0]).swap_global(segment, other)

    @property
    def adapters(self) -> Adapters:
        """The adapters that `load_adapter` read for the current weights."""
        if self._adapters is None or self._adapters.lm is not self.lm:
            self._adapters = Adapters(self.lm)
        return self._adapters

    def load_adapter(self, path: str | Path, name: str) -> None:
        """Load a PEFT adapter folder under a name, for `use_adapter`; a modality that it contains is added.

        ValueError (such as CheckpointError) for a folder that is not a fitting adapter, or a name that is taken.
        """
        if has_head(path):
            bare = is_bare_head(path)  # trained on the frozen model
            self.embedding_heads[None if bare else name] = EmbeddingHead.load(path)
            if bare:
                return
        self.processor = self.adapters.load(Path(path), name, self.processor)
        for tokenizer in self.processor.tokenizers.values():
            tokenizer.to(self.lm.device)

    def unload_adapter(self, name: str) -> None:
        """Unload an adapter, after switching it off if it is in use. CheckpointError for an unknown name.

        Ids of a modality that it added remain, since other adapters and replies may contain them.
        """
        self.adapters.unload(name)

    def use_adapter(self, name: str | None) -> None:
        """Switch to an adapter, or to the model without one (None); CheckpointError for an unknown name."""
        self.adapters.use(name)

    def save_pretrained(
        self, path: str | Path, dtype: torch.dtype | None = None, overwrite: bool = False
    ) -> Path:
        """Write a checkpoint folder that `load` opens, completely or not at all.

        An older state of this model (loaded from, or saved to this folder before) is replaced; files that are not
        part of a checkpoint are kept. dtype: the stored data type, such as torch.bfloat16 for half the size; by
        default that of the weights. CheckpointError if the path contains another checkpoint or something else and
        `overwrite` is False, or if `lm` has an adapter or is quantized.
        """
        target = Path(path)
        self._check_saveable()
        check_target(target, CHECKPOINT, overwrite)
        lm = self.lm if dtype is None else copy.deepcopy(self.lm).to(dtype)
        with write_folder(target, CHECKPOINT, overwrite, own=target.resolve() in self._homes) as folder:
            lm.save_pretrained(folder)
            self.processor.save_pretrained(folder, dtype)
            save_sampling(self.sampling, folder / "sampling.json")
            save_chains(self.chains, folder)
            save_best_of(self.best_of, folder)
            if None in self.embedding_heads:
                self.embedding_heads[None].save(folder)
            if self.card is not None:
                (folder / "README.md").write_text(self.card, encoding="utf-8")
        self._homes.add(target.resolve())
        return target

    def push_to_hub(self, repo: str, private: bool = False, message: str | None = None) -> str:
        """Upload this model to a hub repository ("owner/name") and return the commit's URL; `load(repo)` opens it.

        CheckpointError if the model cannot be saved in its current state, or the hub rejects it.
        """
        with TemporaryDirectory() as folder:
            name = repo.rpartition("/")[2] or "model"
            return hub.push(self.save_pretrained(Path(folder) / name), repo, private, message)

    def _check_saveable(self) -> None:
        active = self.adapters.active
        if active is not None:
            raise CheckpointError(
                f"The adapter {active!r} is in use, and it is not part of the model: remove it first "
                "(model.use_adapter(None)), or make a checkpoint of both with load(..., adapter=FOLDER) or "
                "anytoken merge-adapter."
            )
        if hasattr(self.lm, "peft_config") or any(".base_layer." in n for n, _ in self.lm.named_parameters()):
            raise CheckpointError(
                "The model carries a PEFT adapter, which is not part of a checkpoint: merge it first "
                "(model.lm = peft_model.merge_and_unload()), or save it alone (peft_model.save_pretrained) and "
                "load it with adapter=."
            )
        if getattr(self.lm, "quantized", None):
            raise CheckpointError(
                f"The weights are quantized ({self.lm.quantized}) and cannot be restored: open the checkpoint without "
                "quantize= to save it."
            )


def load(
    name_or_path: str | Path,
    device: str | torch.device = "auto",
    adapter: str | Path | None = None,
    quantize: str | None = None,
    compile: bool = False,
    attn_implementation: str = "auto",
    media_root: str | Path | None = None,
) -> AnyToken:
    """Open a model by bundled name ("mini"), folder or hub id; see `AnyToken.from_pretrained`."""
    return AnyToken.from_pretrained(
        name_or_path, device, adapter, quantize, compile, attn_implementation, media_root
    )
