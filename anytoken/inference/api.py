"""The front door: a model that takes typed segments and answers with typed segments."""

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
from anytoken.inference.chat import Chat
from anytoken.inference.checkpoint import (
    CHECKPOINT,
    find_checkpoint,
    is_bare_head,
    load_folder,
    pick_device,
)
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
    """A language model over all modalities, `lm`, with its `processor`: segments in, segments out."""

    def __init__(
        self, lm: PreTrainedModel, processor: Processor, sampling: Mapping[str, Sampling] | None = None
    ) -> None:
        self.lm = lm
        self.processor = processor
        self.sampling = dict(sampling or {})
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

        `adapter` is a PEFT folder; it is merged into the weights. quantize="int8" keeps a byte a weight: less
        memory, for inference only (model/quantize.py). `compile` compiles the decoding step now, which takes a
        minute or so the first time and says so; later loads find it in torch's cache. attn_implementation: "sdpa",
        "flex_attention", "flash_attention_2", "flash_attention_3" or "eager"; "auto" takes FlashAttention where its
        package, a CUDA device and half-precision weights are there, and sdpa elsewhere (the log says which).
        media_root: the folder whose files strings in message parts may name (`{"type": "image", "image": "a.png"}`);
        without it they name none, since messages may come from elsewhere, and only a pathlib.Path does.
        ValueError (CheckpointError, ConfigError and the like) names the file that is missing or damaged, the
        unknown name, or the device that cannot be used.
        """
        chosen = pick_device(device)
        folder = find_checkpoint(name_or_path)
        lm, processor = load_folder(folder, chosen, adapter, quantize, attn_implementation)
        processor.media_root = media_root
        model = cls(lm, processor, load_sampling(folder / "sampling.json"))
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
        """A segment as ids; ValueError for a kind this model has no tokenizer for."""
        return self.processor.tokenize(segment)

    def detokenize(self, ids: Sequence[int]) -> list[Segment]:
        """Ids as segments; ValueError for ids that are no legal sequence."""
        if not isinstance(ids, Iterable):
            raise RequestError(f"detokenize takes a list of ids; received {ids!r}.")
        return self.processor.detokenize(list(ids))

    # ---- comparing ----

    def score_details(
        self, prompt: Prompt, answers: Sequence[Any], normalize: Normalize = "none"
    ) -> list[Score]:
        """The log-likelihood of each answer as the whole reply to a prompt, by token and by segment.

        answers: each a string, a segment, or a list of both; the prompt is read once for all of them. With
        normalize="pmi" each also has its likelihood after an empty prompt. RequestError for no
        answers, an empty one, a kind that the model lacks, or more than the context holds.
        """
        if isinstance(answers, str | Segment) or not isinstance(answers, Sequence) or not answers:
            raise RequestError(f"score takes a list of answers, at least one; received {answers!r:.80}.")
        replies = [self.processor.encode_reply(answer) for answer in answers]
        return drain(self.score_steps(self.encode_prompt(prompt), replies, normalize))

    def score_steps(
        self, prompt: Sequence[int], replies: Sequence[Sequence[int]], normalize: Normalize = "none"
    ) -> Steps[list[Score]]:
        """`score_details` for ids of a prompt and of replies, in parts; others may use the model between two."""
        check_normalize(normalize)
        prior = self.processor.null_prompt() if normalize == "pmi" else None
        return (yield from score_steps(self.engine, prompt, replies, prior))

    def score(self, prompt: Prompt, answers: Sequence[Any], normalize: Normalize = "none") -> list[float]:
        """How likely each answer is as the whole reply to a prompt: log-likelihoods in nats.

        normalize: "none" for the sum over tokens, "tokens" for the mean, "pmi" for the sum less that after an empty
        prompt. Everything else as for `score_details`.
        """
        return [one.value(normalize) for one in self.score_details(prompt, answers, normalize)]

    def classify(
        self, prompt: Prompt, labels: Sequence[Any], normalize: Normalize = "none"
    ) -> Classification:
        """Which of the labels answers a prompt best, with their probabilities among themselves.

        labels: as `answers` of `score`.
        """
        return classify(labels, self.score(prompt, labels, normalize))

    def rerank(
        self, prompt: Prompt, candidates: Sequence[Any], normalize: Normalize = "tokens"
    ) -> list[tuple[int, float]]:
        """Index and score of each candidate, best first; arguments as for `score`."""
        scores = self.score(prompt, candidates, normalize)
        return sorted(enumerate(scores), key=itemgetter(1), reverse=True)

    def perplexity(self, segments: Any, prompt: Prompt | None = None) -> float:
        """exp of the mean negative log-likelihood per token of segments, after an empty prompt by default.

        Tokens without an alternative, such as close ids, are not counted.
        """
        ids = self.processor.encode_reply(segments)
        start = self.processor.null_prompt() if prompt is None else self.encode_prompt(prompt)
        return perplexity(self.engine.grammar, score_ids(self.engine, start, [ids])[0])

    def embed(
        self, prompts: Any, *, tokens: bool = False, width: int | None = None, untrained: bool = False
    ) -> Any:
        """Prompts of any kinds as unit vectors, float32 [N, W]; with tokens=True a list of [T, W], one per prompt.

        prompts: a list, each one a string, a segment, a list of both (one vector for all of it) or messages; or a
        single one, which is a list of one. tokens: a vector per content token instead. width: the first N
        dimensions, one of the head's `widths`. A checkpoint without a trained head is an error, unless untrained=True:
        then vectors are means of the last hidden states. ValueError (RequestError) says what does not fit.
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
        """`embed` for prompts that are ids already, as `encode_prompt` gives them."""
        with self.embedder(untrained) as embedder:
            return embedder.token_vectors(prompts, width) if tokens else embedder.vectors(prompts, width)

    def embedding_probe(self, untrained: bool = False) -> np.ndarray:
        """A vector that tells this model's embeddings from another's, float32 [W]."""
        with self.embedder(untrained) as embedder:
            return embedder.probe()

    @property
    def embedding_head(self) -> EmbeddingHead:
        """The trained head that `embed` uses; RequestError if there is none."""
        return self._embedding_head(False)[1]

    @contextmanager
    def embedder(self, untrained: bool = False) -> Iterator[Embedder]:
        """The head over the model, with the adapter that it was trained with in the weights."""
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
        """The head to embed with, and the adapter that it needs: the active one's, or else the model's own."""
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
        """Hidden states of a prompt's ids (`encode_prompt`) at every depth, float32 [L + 1, T, H] on the CPU.

        The first are the embeddings, the last are what the LM head reads.
        """
        return hidden_states(self.lm, self.encode_prompt(prompt))

    def chat(self, system: str | None = None) -> Chat:
        """A conversation that remembers, with an optional system text."""
        return Chat(self, system)

    def add_modality(self, tokenizer: ModalityTokenizer) -> None:
        """Append a modality: new ids at the end, new rows from the codebook; nothing old moves.

        ValueError if the model has a modality of that name. The new rows are to be trained before they mean
        anything; what is generated is well-formed from the start.
        """
        active = self.adapters.active
        self.use_adapter(None)
        try:
            self.processor = add_modality(self.lm, self.processor, tokenizer)
            tokenizer.to(self.lm.device)
        finally:
            self.use_adapter(active)

    def swap_global(self, segment: Segment, other: Segment) -> Segment:
        """`segment` with the global codes of `other`: recolours an image, converts a voice.

        No language model is asked: both are encoded, and the local codes of the first decoded with the header of the
        second. RequestError or TokenizerError for segments of different kinds, and a kind
        without tokenizer or global codes.
        """
        kinds = [one.kind if isinstance(one, Segment) else type(one).__name__ for one in (segment, other)]
        if kinds[0] != kinds[1]:
            raise RequestError(
                f"swap_global takes two segments of one kind; received {kinds[0]} and {kinds[1]}."
            )
        return self.processor.tokenizer_of(kinds[0]).swap_global(segment, other)

    @property
    def adapters(self) -> Adapters:
        """The adapters that `load_adapter` read for the present weights."""
        if self._adapters is None or self._adapters.lm is not self.lm:
            self._adapters = Adapters(self.lm)
        return self._adapters

    def load_adapter(self, path: str | Path, name: str) -> None:
        """Read a PEFT adapter folder under a name, for `use_adapter`; a modality it brings is added.

        ValueError (CheckpointError and the like) for a folder that is none or does not fit, or a name that is taken.
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
        """Forget an adapter; one in use is taken off first. CheckpointError for an unknown name.

        Ids of a modality that it brought stay, as other adapters and replies may hold them.
        """
        self.adapters.unload(name)

    def use_adapter(self, name: str | None) -> None:
        """Answer with an adapter from now on, or with the bare model (None); CheckpointError for an unknown name."""
        self.adapters.use(name)

    def save_pretrained(
        self, path: str | Path, dtype: torch.dtype | None = None, overwrite: bool = False
    ) -> Path:
        """Write a checkpoint folder that `load` opens, whole or not at all.

        An older state of this model there (loaded from, or saved to the same folder before) is replaced; files there
        that are no part of a checkpoint are kept. dtype: how weights are stored, such as torch.bfloat16 for half the
        size; by default as they are. CheckpointError if the path holds another checkpoint or something else and
        `overwrite` is False, or if `lm` carries an adapter or is quantised.
        """
        target = Path(path)
        self._check_saveable()
        check_target(target, CHECKPOINT, overwrite)
        lm = self.lm if dtype is None else copy.deepcopy(self.lm).to(dtype)
        with write_folder(target, CHECKPOINT, overwrite, own=target.resolve() in self._homes) as folder:
            lm.save_pretrained(folder)
            self.processor.save_pretrained(folder, dtype)
            save_sampling(self.sampling, folder / "sampling.json")
            if None in self.embedding_heads:
                self.embedding_heads[None].save(folder)
            if self.card is not None:
                (folder / "README.md").write_text(self.card, encoding="utf-8")
        self._homes.add(target.resolve())
        return target

    def push_to_hub(self, repo: str, private: bool = False, message: str | None = None) -> str:
        """Upload this model to a hub repository ("owner/name"); the commit's address. `load(repo)` opens it again.

        CheckpointError if the model cannot be saved as it is, or the hub refuses.
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
                f"The weights are quantised ({self.lm.quantized}) and rounded for good: open the checkpoint without "
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
