"""A network as a language model of EleutherAI's lm-evaluation-harness; needs the package `lm_eval`."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from duo_jax import api, progress
from duo_jax.errors import UserError
from duo_jax.evaluation import likelihood
from duo_jax.evaluation import rows as rows_lib
from duo_jax.models.network import Params

try:
    from lm_eval import simple_evaluate as simple_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager as TaskManager
    from lm_eval.utils import make_table as make_table
except ImportError as error:
    raise UserError(f"the harness needs lm_eval ({error}); install it: pip install -e '.[harness]'.") from error

# Token ids, BOS first, and where the scored part of them begins.
Row = tuple[list[int], int]


class Model(LM):
    """Answers the harness's requests with a network.

    Likelihoods are those of `likelihood.continuation`. For a diffusion network they are estimates of a lower bound, so that
    the wrong one of two close choices sometimes wins; more samples make that rarer.
    """

    def __init__(self, params: Params, *, n_samples: int = 128, n_steps: int = 32, seed: int = 0) -> None:
        """Takes a network.

        Args:
            params: what `duo_jax.load` returned.
            n_samples: draws of time and noise per likelihood.
            n_steps: steps of the sampler, for tasks that generate.
            seed: seed of both.
        """
        super().__init__()
        self._params, self._n_samples, self._n_steps, self._seed = params, n_samples, n_steps, seed
        self._tokenizer = api.tokenizer_of(params.tokenizer)

    @property
    def tokenizer_name(self) -> str:
        """The name of the tokenizer, by which the harness tells caches of requests apart."""
        return self._tokenizer.name

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Returns, for each (context, continuation), its log-likelihood in nats and whether a greedy step writes it."""
        found = self._scored([list(self._rows(*self._split(*request.args))) for request in requests])
        for request, result in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, result)
        return found

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Returns each text's log-likelihood in nats, summed over rows BOS ... EOS as in training, EOS included."""

        def rows(text: str) -> list[Row]:
            rows = rows_lib.of_text(self._tokenizer.encode(text), self._tokenizer, self._params.network.length)
            return [(row, 1) for row in rows] if text else []

        found = [nats for nats, _ in self._scored([rows(*request.args) for request in requests])]
        for request, value in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return found

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Returns how each context goes on until one of the strings `until`, EOS, or `max_gen_toks` tokens."""
        if not requests:
            return []
        network, tokenizer = self._params.network, self._tokenizer
        known, held, starts = (np.zeros((len(requests), network.length), dtype) for dtype in (np.int32, bool, np.int32))
        room = [int(request.args[1].get("max_gen_toks") or network.length // 2) for request in requests]
        for i, request in enumerate(requests):
            if not 1 <= room[i] < network.length:
                raise UserError(f"a task asks for {room[i]} tokens; the network writes up to {network.length - 1}.")
            context = tokenizer.encode(request.args[0])
            row = [tokenizer.bos_id, *context[max(len(context) - (network.length - 1 - room[i]), 0) :]]
            known[i, : len(row)], held[i, : len(row)], starts[i] = row, True, len(row)
        with progress.bar(total=len(requests), desc="generating", unit=" texts") as bar:
            written = api.sample(
                self._params,
                self._n_steps,
                seed=self._seed,
                batch_size=len(requests),
                infill=(known, held),
                each=lambda batch: bar.update(len(batch.tokens)),
            ).tokens
        texts = []
        for request, tokens, start, most in zip(requests, written, starts[:, 0], room, strict=True):
            end = tokens[start : start + most].tolist()
            end = end[: end.index(tokenizer.eos_id)] if tokenizer.eos_id in end else end
            texts.append(_until(tokenizer.decode(end), request.args[1].get("until") or []))
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    def _split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Returns the tokens of both; space between them belongs to the continuation, as tokens begin with their space."""
        bare = context.rstrip()
        before = self._tokenizer.encode(bare)
        return before, self._tokenizer.encode(bare + context[len(bare) :] + continuation)[len(before) :]

    def _rows(self, before: Sequence[int], end: Sequence[int]) -> Iterator[Row]:
        """Yields rows, usually one, of BOS, as much of the end of the context as fits, and the continuation.

        A continuation that does not fit is scored in pieces of half a row, each given what precedes it.
        """
        room = self._params.network.length - 1
        size = len(end) if len(end) <= room else max(room // 2, 1)
        for i in range(0, len(end), max(size, 1)):
            piece, past = end[i : i + size], [*before, *end[:i]]
            row = [self._tokenizer.bos_id, *past[max(len(past) + len(piece) - room, 0) :]]
            yield [*row, *piece], len(row)

    def _scored(self, texts: Sequence[Sequence[Row]]) -> list[tuple[float, bool]]:
        """Returns each text's sum over its rows and whether all are greedy; with the same noise, so that texts compare."""
        network, key = self._params.network, jax.random.key(self._seed)
        owners = [(i, row) for i, rows in enumerate(texts) for row in rows]
        found, queue = [(0.0, True)] * len(texts), collections.deque()

        def read() -> None:
            i, result = queue.popleft()
            nll, greedy = jax.device_get(result)
            found[i] = found[i][0] - float(nll), found[i][1] and bool(greedy)
            bar.update()

        with progress.bar(total=len(owners), desc="scoring", unit=" texts") as bar:
            for i, (tokens, first) in sorted(owners, key=lambda owner: len(owner[1][0])):
                row = rows_lib.filled(tokens, network.length)
                result = likelihood.continuation(
                    self._params.weights, row, first, len(tokens), key, network=network, n_samples=self._n_samples
                )
                queue.append((i, result))
                if len(queue) > 1:  # the device works on this one while the previous one is read
                    read()
            while queue:
                read()
        return found


def _until(text: str, stops: str | Sequence[str]) -> str:
    """Returns a text up to the first of the stops."""
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.split(stop)[0] if stop else text
    return text
