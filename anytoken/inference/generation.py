"""Generation with a model: from prompts and options to replies or events.

The part of `AnyToken` (`api.py`) that builds `GenerationRequest`s and turns the engine's tokens into segments.
"""

import logging
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cache
from itertools import islice
from operator import itemgetter
from typing import Any, Literal, TypedDict, Unpack, overload

from transformers import PreTrainedModel

from anytoken import moved
from anytoken.inference.best_of import BestOfDefaults, several
from anytoken.inference.chains import Cascade, Chains, default_chains
from anytoken.inference.engine import Engine
from anytoken.inference.kv_cache import PrefixCache
from anytoken.inference.likeliest_prompt import prompt_likelihood
from anytoken.inference.logits_processor import lm_inputs
from anytoken.inference.outputs import GenerationOutput, count_usage
from anytoken.inference.request import GenerationRequest, Token
from anytoken.inference.sampling import NAMES, Sampling, merge_sampling
from anytoken.inference.streaming import Event, SegmentStream
from anytoken.model.extend_vocab import longest_segment
from anytoken.processor import Processor
from anytoken.token_space import TokenSpace
from anytoken.utils.errors import RequestError
from anytoken.utils.hints import choices

log = logging.getLogger(__name__)
TEXT_TOKENS = 256  # how long the text of a reply may get unless the caller says otherwise
Output = str | Sequence[str] | None
Rerank = Callable[[GenerationOutput], float] | Literal["prompt"]
Prompt = Any  # str | Segment | list of both | chat messages; Processor.messages refuses anything else


class Options(TypedDict, total=False):
    """Generation options: the settings of `Sampling` for all kinds, and those below. None means the default.

    sampling: settings per kind, {"image": Sampling(...)} or {"image": {"top_k": 50}}; they take precedence.
    max_new_tokens: limit for the whole reply, control ids included; the reply is complete within it.
    seed: an integer from 0; the same seed and prompt give the same reply in any batch. Without a seed, equal
        prompts get different replies.
    sizes: fixes the grid of a kind, {"image": (8, 8)} in codes.
    via: kinds that are generated first, as steps towards an `output` of one kind: "text", or a list; they are in the
        reply's `steps`. By default as the checkpoint says for the kind of the prompt (`model.chains`), unless one of
        these kinds is in the prompt already; [] is the direct way.
    cascade: with `via`, whether each step is the whole prompt of what follows it; otherwise all of the prompt and the
        steps is read.
    """

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    cfg_scale: float | None
    sampling: Mapping[str, Sampling | Mapping[str, Any]] | None
    max_new_tokens: int | None
    seed: int | None
    sizes: Mapping[str, tuple[int, ...]] | None
    via: Output
    cascade: bool | None


class GenerationMixin:
    """Generation methods of a model."""

    lm: PreTrainedModel
    processor: Processor
    sampling: dict[str, Sampling]
    chains: Chains
    best_of: BestOfDefaults
    compiled: bool
    _engine: Engine | None

    @property
    def token_space(self) -> TokenSpace:
        """The meaning of every id."""
        return self.processor.token_space

    @property
    def kinds(self) -> list[str]:
        """The kinds of segments this model reads and writes: "text" and its modalities."""
        return list(self.token_space.modality_names)

    @property
    def engine(self) -> Engine:
        """The generation loop for the current weights and grammar."""
        engine, grammar = self._engine, self.processor.grammar
        if engine is None or engine.lm is not self.lm or engine.grammar is not grammar:
            engine = self._engine = Engine(self.lm, grammar, self.compiled)
        return engine

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """A prompt as ids, ending with the assistant's opening; RequestError says what is wrong with it."""
        return self.processor.encode_chat(self.processor.messages(prompt), add_generation_prompt=True)

    @overload
    def generate(
        self,
        prompt: Prompt,
        output: Output = None,
        *,
        batch: Literal[False] = False,
        num_return: Literal[1] = 1,
        best_of: int | None = None,
        rerank: Rerank | None = None,
        **options: Unpack[Options],
    ) -> GenerationOutput: ...

    @overload
    def generate(
        self,
        prompt: Prompt,
        output: Output = None,
        *,
        batch: bool = False,
        num_return: int = 1,
        best_of: int | None = None,
        rerank: Rerank | None = None,
        **options: Unpack[Options],
    ) -> Any: ...

    def generate(
        self,
        prompt: Prompt,
        output: Output = None,
        *,
        batch: bool = False,
        num_return: int = 1,
        best_of: int | None = None,
        rerank: Rerank | None = None,
        **options: Unpack[Options],
    ) -> Any:
        """Generate a reply to a prompt, as a GenerationOutput.

        prompt: a string, a Segment, a list of both, or a list of {"role", "content"} messages; with batch=True
        a list of prompts, for a list of replies. output: a kind ("image"), a list of kinds in order, or None to let
        the model decide. num_return > 1 returns a list of this number of replies for each prompt. best_of generates
        this number and returns the best `num_return` of them, best first: by the mean log-probability of their ids
        (0 for ids without an alternative), or by `rerank`: a function of the output where higher is better, or
        "prompt" for how well this model reads the text of the prompt back from the generated media. By default a
        prompt of text alone, or a chain by way of text, gets the best of as many as the checkpoint says for the output
        (`model.best_of`), by "prompt"; best_of=1 is a single reply, and the one that `stream` gives.
        Options: see `Options`. RequestError says what is wrong.
        """
        _check_count("num_return", num_return)
        samples = num_return if best_of is None else _check_count("best_of", best_of)
        if samples > 1:
            self._check_random(samples, output, options)
        if samples < num_return:
            raise RequestError(
                f"best_of={best_of} is less than num_return={num_return}: make at least as many."
            )
        if isinstance(rerank, str) and rerank != "prompt":
            raise RequestError(f'rerank is "prompt" or a function of the reply; received {rerank!r}.')
        if rerank is not None and best_of is None:
            raise RequestError("rerank chooses among several replies: say how many with best_of.")
        prompts = self._encode_prompts(prompt, batch)
        requests = [
            replace(self.request(ids, output, **options), scored=best_of is not None) for ids in prompts
        ]
        if best_of is None and samples == 1:
            own = options.get("temperature") is not None or options.get("sampling") is not None
            groups = [several(one, self.best_of, self.token_space, own) for one in requests]
            rerank = "prompt"
        else:
            groups = [[replace(one, draw=draw) for draw in range(samples)] for one in requests]
        scored = iter(self._replies([one for group in groups for one in group]))
        found = []
        for drawn in groups:
            group = list(islice(scored, len(drawn)))
            if rerank is not None and len(group) > 1:
                group = [(one, self._rank(rerank, drawn[0], one)) for one, _ in group]
            if best_of is not None or len(group) > samples:
                group = sorted(group, key=itemgetter(1), reverse=True)
            replies = [reply for reply, _ in group[:num_return]]
            if len({tuple(reply.ids) for reply, _ in group}) == 1 < samples:
                _warn_of_copies(samples)
            found.append(replies if num_return > 1 else replies[0])
        return found if batch else found[0]

    def _rank(self, rerank: Rerank, request: GenerationRequest, reply: GenerationOutput) -> float:
        if rerank != "prompt":
            return rerank(reply)
        return prompt_likelihood(self.engine, self.processor, request.prompt, reply.ids, len(reply.steps))

    def _check_random(self, samples: int, output: Output, options: Mapping[str, Any]) -> None:
        """RequestError if several replies would be identical because all kinds are greedy."""
        settings, kinds = self._sampling(options), self._output_kinds(output) or self.kinds
        if all(settings[kind].greedy for kind in kinds):
            raise RequestError(
                f"{samples} replies would be {samples} copies: {', '.join(kinds)} is decoded greedily here "
                "(temperature 0 or top_k 1). Set temperature=1.0 or so, or ask for one reply."
            )

    def _encode_prompts(self, prompt: Prompt, batch: bool) -> list[list[int]]:
        if batch and not (isinstance(prompt, list | tuple) and prompt):
            raise RequestError(f"batch=True takes a list of prompts; received {prompt!r}.")
        return [self.encode_prompt(one) for one in (prompt if batch else [prompt])]

    @moved.renamed_argument("rows", "sample_indices")
    def generate_ids(
        self,
        prompts: Sequence[Sequence[int]],
        output: Output = None,
        sample_indices: Sequence[int] | None = None,
        prefixes: PrefixCache | None = None,
        **options: Unpack[Options],
    ) -> list[GenerationOutput]:
        """`generate` for prompts as ids, one reply each.

        The random numbers of a reply depend on the seed and its entry in `sample_indices`, by default
        0, so that a prompt gets the same reply as on its own. Without a seed every reply has different
        random numbers. Parts of a prompt that are in `prefixes` are not computed again. RequestError for an empty
        prompt and for invalid ids.
        """
        numbers = [0] * len(prompts) if sample_indices is None else sample_indices
        asked = [
            replace(self.request(ids, output, **options), prefixes=prefixes, draw=number)
            for ids, number in zip(prompts, numbers, strict=True)
        ]
        return [reply for reply, _ in self._replies(asked)]

    def _replies(self, requests: Sequence[GenerationRequest]) -> list[tuple[GenerationOutput, float]]:
        """Replies, each with the mean log-probability of its ids (0 if the request is not `scored`)."""
        began = time.perf_counter()
        collected: list[list[Token]] = [[] for _ in requests]
        ends: dict[int, tuple[str, float]] = {}
        for token in self.engine.stream(requests):
            collected[token.row].append(token)
            if token.finish_reason is not None:
                ends[token.row] = (token.finish_reason, time.perf_counter() - began)
        replies = []
        for row, (request, tokens) in enumerate(zip(requests, collected, strict=True)):
            segments = SegmentStream(self.processor)
            for token in tokens:
                segments.push(token.id, token.step)
            reason, seconds = ends[row]
            ids = [token.id for token in tokens]
            usage = count_usage(self.token_space, len(request.prompt), ids, seconds)
            reply = GenerationOutput(segments.segments, ids, usage, reason, segments.steps)
            replies.append((reply, sum(token.logprob for token in tokens) / len(tokens)))
        return replies

    def stream(
        self, prompt: Prompt, output: Output = None, **options: Unpack[Options]
    ) -> Generator[Event, None, GenerationOutput]:
        """Generate a reply to one prompt as events, emitted as soon as available (see `anytoken.inference.streaming`).

        SegmentStarted, TextDelta, SegmentProgress, SegmentDelta (audio before the clip ends), SegmentPreview (an
        unfinished image), SegmentFinished, and Usage at the end. The generator returns the GenerationOutput. Invalid
        requests raise an error before the first event. Closing the generator stops generation and frees its memory.
        """
        return self.stream_ids(self.encode_prompt(prompt), output, **options)

    def stream_ids(
        self,
        prompt: Sequence[int],
        output: Output = None,
        prefixes: PrefixCache | None = None,
        **options: Unpack[Options],
    ) -> Generator[Event, None, GenerationOutput]:
        """`stream` for a prompt as ids; `prefixes` as in `generate_ids`."""
        request = replace(self.request(prompt, output, **options), prefixes=prefixes)
        return self._events(request, self.engine.stream([request]))

    def _events(
        self, request: GenerationRequest, tokens: Generator[Token, None, None]
    ) -> Generator[Event, None, GenerationOutput]:
        began, ids, reason = time.perf_counter(), [], "stop"
        segments = SegmentStream(self.processor)
        with closing(tokens):
            for token in tokens:
                ids.append(token.id)
                reason = token.finish_reason or reason
                yield from segments.push(token.id, token.step)
        usage = count_usage(self.token_space, len(request.prompt), ids, time.perf_counter() - began)
        yield usage
        return GenerationOutput(segments.segments, ids, usage, reason, segments.steps)

    def request(
        self, prompt: Sequence[int], output: Output = None, **options: Unpack[Options]
    ) -> GenerationRequest:
        """A request for the scheduler: one reply to a prompt's ids. Output and `Options` are checked, ids are not."""
        unknown = sorted(set(options) - set(Options.__annotations__))
        if unknown:
            raise RequestError(
                f"Unknown option {unknown[0]!r}{choices(unknown[0], Options.__annotations__)}."
            )
        sizes, limit = options.get("sizes"), options.get("max_new_tokens")
        if not isinstance(sizes or {}, Mapping) or not all(map(_is_size, (sizes or {}).values())):
            raise RequestError(
                f'sizes is {{kind: whole numbers}}, as {{"image": (8, 8)}}; received {sizes!r}.'
            )
        output_kinds = self._output_kinds(output)
        steps, planned = self._steps(prompt, output_kinds, options.get("via"), options.get("cascade"), limit)
        if output_kinds is not None:
            output_kinds = (*steps, *output_kinds)
        return GenerationRequest(
            prompt,
            output_kinds,
            self._sampling(options),
            self._limit(output_kinds) if limit is None else limit,
            options.get("seed"),
            null_prompt=self.processor.null_prompt(),
            sizes=sizes,
            num_steps=len(steps),
            cascade=isinstance(steps, Cascade),
            planned_chains=planned,
        )

    def _steps(
        self,
        prompt: Sequence[int],
        output_kinds: tuple[str, ...] | None,
        via: Output,
        cascade: bool | None,
        limit: int | None,
    ) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
        """The kinds before the output, and without an output those before each kind that the model may choose.

        Steps are those asked for, else those of the checkpoint for the kinds of this prompt and output, if they fit
        into `limit` and the context. Where the model chooses the output, steps of text are left to it.
        """
        direct = isinstance(via, list | tuple) and not via
        if via and not output_kinds:
            raise RequestError(f'via={via!r} needs an output, such as output="image".')
        if cascade and not via:
            raise RequestError('cascade=True needs steps, such as via="image".')
        if via:
            steps = self._output_kinds(via) or ()
            if cascade and "video" in steps and self.processor.first_frames:
                raise RequestError(
                    "cascade=True cannot pass on a video in a model that also reads the first frames of videos in "
                    "prompts; leave cascade out, or call generate twice."
                )
            return (Cascade(steps) if cascade else steps), {}
        if direct or not self.chains or (output_kinds is not None and len(output_kinds) > 1):
            return (), {}
        chains = default_chains(self.chains, prompt, self.token_space)
        room = self.engine.context - len(prompt)
        room = min(room, limit) if isinstance(limit, int) else room
        ends = {end: steps for (_, end), steps in chains.items() if self._media_tokens((*steps, end)) <= room}
        if output_kinds is None:
            return (), {end: steps for end, steps in ends.items() if steps[0] != "text"}
        return ends.get(output_kinds[0], ()), {}

    def _sampling(self, options: Mapping[str, Any]) -> dict[str, Sampling]:
        """The settings of each kind."""
        overrides = {name: options.get(name) for name in NAMES}
        return merge_sampling(self.kinds, self.sampling, overrides, options.get("sampling"))

    def _output_kinds(self, output: Output) -> tuple[str, ...] | None:
        if output is None:
            return None
        output_kinds = tuple(output) if isinstance(output, list | tuple) else (output,)
        if not output_kinds:
            raise RequestError(f"output is empty; allowed: {', '.join(self.kinds)}, a list of them, or None.")
        for kind in output_kinds:
            if kind not in self.kinds:
                raise RequestError(
                    f"Unknown output {kind!r}{choices(kind, self.kinds)}, a list of them, or None."
                )
        return output_kinds

    def _limit(self, output_kinds: tuple[str, ...] | None) -> int | None:
        """Room for TEXT_TOKENS per text segment and any size of each medium; None is the rest of the context."""
        if output_kinds is None:
            return None
        return TEXT_TOKENS * output_kinds.count("text") + self._media_tokens(output_kinds)

    def _media_tokens(self, output_kinds: Sequence[str]) -> int:
        """The most ids that the media of a reply take, with its end."""
        tokenizers = self.processor.tokenizers
        return 1 + sum(longest_segment(tokenizers[kind]) for kind in output_kinds if kind != "text")

    def lm_inputs(
        self,
        prompt: Prompt,
        output: Output = None,
        *,
        batch: bool = False,
        max_new_tokens: int | None = None,
        sizes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> dict[str, Any]:
        """Inputs for transformers' `model.lm.generate(**inputs)`, whose replies then follow the grammar.

        Left-padded ids, their mask, the grammar as a LogitsProcessor, and the limits, for a single call. Sampling is
        transformers' own: add do_sample=True, top_k=50 or num_beams=4. With do_sample=False the ids equal those of
        `generate` at temperature 0. ValueError as in `generate`.
        """
        prompts, output_kinds = self._encode_prompts(prompt, batch), self._output_kinds(output)
        room = self.engine.context - max(map(len, prompts))
        wanted = self._limit(output_kinds) if max_new_tokens is None else max_new_tokens
        limit = room if wanted is None else min(room, wanted)
        return lm_inputs(self.processor.grammar, prompts, self.lm.device, output_kinds, limit, sizes)

    def max_reply_tokens(
        self,
        output: Output,
        max_new_tokens: int | None = None,
        prompt: Sequence[int] = (),
        via: Output = None,
    ) -> int:
        """The number of tokens to reserve for a reply with this output; RequestError for an unknown kind.

        prompt: ids of the user's turn; with `via`, they decide on steps before the output.
        """
        output_kinds = self._output_kinds(output)
        steps, _ = self._steps(prompt, output_kinds, via, None, max_new_tokens)
        limit = self._limit(output_kinds and (*steps, *output_kinds)) or TEXT_TOKENS
        return min(limit, max_new_tokens) if isinstance(max_new_tokens, int) else limit


@cache
def _warn_of_copies(samples: int) -> None:
    """Warn once that all replies are identical despite sampling."""
    log.warning(
        "All %d replies are equal: the kinds they hold are decoded greedily, or hardly at random. A higher "
        "temperature (for text too: sampling={'text': {'temperature': 1.0}}) makes them differ.",
        samples,
    )


def _check_count(name: str, count: object) -> int:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise RequestError(f"{name} must be an integer of at least 1; received {count!r}.")
    return count


def _is_size(size: object) -> bool:
    return isinstance(size, list | tuple) and all(hasattr(one, "__index__") for one in size)
