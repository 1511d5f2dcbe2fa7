"""The generation engine: ids and the grammar, independent of media.

Every row of a batch has its own grammar state, output kinds, budget and random numbers (`scheduler.py`). The grammar
says which ids may come next; only their logits are computed (`model_runner.py`); a forced id is appended without
running the model. A reply is therefore well-formed by construction, for any weights, any sampling and any budget.
Classifier-free guidance gives a row a second sequence, the reply so far after an empty prompt, with its own cache row
in the same forward pass; it joins when the first guided kind begins.

Drafts by prompt lookup (arXiv 2304.04487 and transformers' prompt_lookup_num_tokens) are left out: texts, speech and
DNA repeat nothing of what came before; images and videos repeat their plain areas, so that a step would decide
nearly two ids when greedy and one and a half as sampled by default, but on a CPU a step of four ids costs about two
of one id.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from anytoken.grammar import Grammar
from anytoken.inference.model_runner import ModelRunner
from anytoken.inference.request import GenerationRequest, Token
from anytoken.inference.scheduler import Scheduler
from anytoken.inference.weights import storage_key


@dataclass(frozen=True)
class GeneratedIds:
    """One finished reply: its ids including the end token, and the finish reason, as in `Token`."""

    ids: list[int]
    finish_reason: str


class Engine:
    """Batched generation with a causal language model whose vocabulary is the grammar's token space."""

    def __init__(
        self, lm: PreTrainedModel, grammar: Grammar, compiled: bool = False, cuda_graphs: bool = False
    ) -> None:
        self.grammar = grammar
        self.compiled, self.cuda_graphs = compiled, cuda_graphs
        self.lm = lm
        self._head: ModelRunner | None = None
        self._objects: list[object] = []
        self._facts: list[object] = []

    @property
    def context(self) -> int:
        """The maximum length of prompt and reply together."""
        return int(self.lm.config.get_text_config().max_position_embeddings)

    def head(self) -> ModelRunner:
        """The model for decoding, rebuilt when views of its weights become stale."""
        objects, facts = storage_key(self.lm)
        if facts != self._facts or any(a is not b for a, b in zip(objects, self._objects, strict=True)):
            self._head = ModelRunner(self.lm, self.compiled, self.cuda_graphs)
            self._objects, self._facts = objects, facts
        assert self._head is not None
        return self._head

    def scheduler(self, max_rows: int | None = None, max_prefill_tokens: int | None = None) -> Scheduler:
        """A new, empty batch of this model.

        max_rows: maximum number of replies decoded together. max_prefill_tokens: prompt tokens of new requests that are
        read between two decoding steps of the others; None reads whole prompts before further decoding.
        """
        return Scheduler(self.grammar, self.context, self.head, max_rows, max_prefill_tokens)

    def generate(self, requests: Sequence[GenerationRequest]) -> list[GeneratedIds]:
        """The replies to some requests, in order; errors as for `stream`."""
        replies: list[list[int]] = [[] for _ in requests]
        reasons = [""] * len(requests)
        for token in self.stream(requests):
            replies[token.row].append(token.id)
            reasons[token.row] = token.finish_reason or ""
        return [GeneratedIds(ids, reason) for ids, reason in zip(replies, reasons, strict=True)]

    def stream(self, requests: Sequence[GenerationRequest]) -> Generator[Token, None, None]:
        """Yield the ids of all replies as they are generated; a row's ids come in order.

        RequestError or TokenSpaceError before the first token if something does not fit.
        """
        scheduler = self.scheduler()
        for request in requests:
            scheduler.submit(request)
        return scheduler.drain()
