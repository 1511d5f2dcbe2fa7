"""EleutherAI's lm-evaluation-harness on our models: its text tasks, with `pip install 'anytoken[harness]'`.

    python -m anytoken.evaluation.suite.lm_harness run --model anytoken --model_args pretrained=mini --tasks TASK

Importing this module registers the model "anytoken", so `lm_eval.simple_evaluate(model="anytoken", ...)` works, too.
A context is a user's turn and its continuation the assistant's reply, as in everything else that the model does;
``plain=true`` puts both behind each other after bos, as base models are measured. Likelihoods are over the ids that
the grammar allows. Rolling likelihoods are of plain text, in windows that use the whole context.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anytoken import moved
from anytoken.inference.api import AnyToken
from anytoken.inference.score import score_ids
from anytoken.segments import Text
from anytoken.utils.errors import EvaluationError

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise ImportError("The harness needs lm-eval: pip install 'anytoken[harness]'.") from error


@register_model("anytoken")
class AnyTokenLM(LM):
    """A checkpoint as a model of the harness: loglikelihood, loglikelihood_rolling, generate_until."""

    def __init__(
        self,
        pretrained: str | Path | AnyToken = "mini",
        device: str | None = None,
        adapter: str | None = None,
        plain: bool | str = False,
        max_gen_toks: int = 256,
        **unused: Any,
    ) -> None:
        """pretrained: a bundled name, folder, hub id, or a loaded model. EvaluationError for an unknown argument."""
        super().__init__()
        unknown = sorted(set(unused) - {"batch_size", "max_batch_size"})
        if unknown:
            raise EvaluationError(
                f"Unknown model argument {unknown[0]!r}; allowed: pretrained, device, adapter, plain, max_gen_toks."
            )
        if not isinstance(pretrained, AnyToken):
            pretrained = AnyToken.from_pretrained(pretrained, device or "auto", adapter)
        self.model: AnyToken = pretrained
        self.plain = str(plain).lower() == "true"
        self.max_gen_toks = max_gen_toks

    @property
    def tokenizer_name(self) -> str:
        """Distinguishes cached requests of different checkpoints."""
        return f"anytoken-{self.model.processor.fingerprints()['text'][:12]}"

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation after its context, and whether greedy decoding would give it."""
        groups: dict[str, list[tuple[int, str]]] = defaultdict(list)
        for place, request in enumerate(requests):
            context, continuation = request.args
            groups[context].append((place, continuation))
        found: dict[int, tuple[float, bool]] = {}
        for context, wanted in groups.items():  # a prompt is read once for all of its continuations
            answers = [self._answer(context, one) for _, one in wanted]
            longest = max(map(len, answers))
            prompt = self._fit(self._prompt(context), longest + 1)
            # one more than is compared, since a reply that reaches its limit is ended there
            [greedy] = self.model.generate_ids([prompt], "text", temperature=0.0, max_new_tokens=longest + 1)
            scores = score_ids(self.model.engine, prompt, answers)
            for (place, _), ids, score in zip(wanted, answers, scores, strict=True):
                found[place] = (score.total, greedy.ids[: len(ids)] == ids)
        return [found[place] for place in range(len(requests))]

    def _prompt(self, context: str) -> list[int]:
        if self.plain:
            return [self.model.token_space.bos, *self.model.tokenize(Text(context))]
        return self.model.encode_prompt(context) if context else self.model.processor.null_prompt()

    def _answer(self, context: str, continuation: str) -> list[int]:
        """Ids of a continuation; a reply starts after the space that the harness prepends, and has an end id."""
        if not self.plain:
            return self.model.processor.encode_reply(continuation.lstrip() or continuation)
        whole = self.model.tokenize(Text(context + continuation))
        before = self.model.tokenize(Text(context))
        if whole[: len(before)] == before and len(whole) > len(before):
            return whole[len(before) :]
        return self.model.tokenize(Text(continuation))  # the border is inside a token

    def _fit(self, prompt: list[int], length: int) -> list[int]:
        """A prompt, truncated on the left if it does not fit the context; its control ids at the start are kept."""
        room = self.model.engine.context - length
        if room < 4:
            raise EvaluationError(
                f"A continuation of {length} tokens does not fit the context of {self.model.engine.context}."
            )
        head = 1 if self.plain else 2
        return prompt if len(prompt) <= room else [*prompt[:head], *prompt[len(prompt) - room + head :]]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood of whole texts after bos, each id with as much context as fits."""
        return [self._rolling(self.model.tokenize(Text(request.args[0]))) for request in requests]

    def _rolling(self, ids: list[int]) -> float:
        context, total = self.model.engine.context, 0.0
        bos, start = self.model.token_space.bos, 0
        while start < len(ids):
            stop = min(len(ids), start + context - 1) if not start else min(len(ids), start + context // 2)
            before = [bos, *ids[max(0, stop - context + 1) : start]]
            total += score_ids(self.model.engine, before, [ids[start:stop]])[0].total
            start = stop
        return total

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Greedy replies (or as gen_kwargs say), cut before the first of the `until` strings."""
        found: list[str] = []
        for request in requests:
            context, given = request.args
            options = dict(given)
            until = options.pop("until", None) or []
            until = [until] if isinstance(until, str) else until
            sample = options.pop("do_sample", float(options.get("temperature") or 0) > 0)
            limit = int(options.pop("max_gen_toks", self.max_gen_toks))
            limit = min(limit, self.model.engine.context // 2)
            settings = {
                name: options[name] for name in ("top_k", "top_p", "min_p") if options.get(name) is not None
            }
            settings["temperature"] = float(options.get("temperature") or 1.0) if sample else 0.0
            prompt = self._fit(self._prompt(context), limit)
            [reply] = self.model.generate_ids([prompt], "text", max_new_tokens=limit, seed=0, **settings)
            text = reply.text
            for stop in until:
                text = text.split(stop)[0] if stop else text
            found.append(text)
        return found


def main() -> None:
    """The harness's own command line, with our model registered."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()


if not TYPE_CHECKING:
    __getattr__ = moved.old_names(__name__)
