"""The Python door: load a network, sample from it, score a text."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import numbers
import operator
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from duo_jax import convert, sampling
from duo_jax import progress as progress_lib
from duo_jax.data import tokenizers
from duo_jax.errors import UserError
from duo_jax.evaluation import likelihood
from duo_jax.evaluation import rows as rows_lib
from duo_jax.models.network import Network, Params
from duo_jax.training import checkpoint

# Texts that one call of the sampler writes at once on a device, unless said otherwise.
_ROWS_A_DEVICE = 64


@dataclasses.dataclass(frozen=True)
class Samples:
    """What `sample` returns.

    Attributes:
        tokens: int32 `[B, L]`.
        text: the decoded rows, special tokens left out.
        entropy: `[B]`, each row's unigram entropy in nats; low means that it repeats itself.
        network_calls: how often the network was evaluated for a batch; the most, where batches differ. Guidance evaluates
            it twice a step; an autoregressive network reads one position a call.
        trajectory: int32 `[n, B, L]`, the tokens after every step, if asked for.
    """

    tokens: np.ndarray
    text: list[str]
    entropy: np.ndarray
    network_calls: int
    trajectory: np.ndarray | None = None


class _Estimate(NamedTuple):
    nll: float
    stderr: float


class Score(_Estimate):
    """What `score` returns: the pair (nll, stderr), which also tells of how many tokens it is.

    Attributes:
        nll: nats per token, an upper bound estimated by Monte Carlo.
        stderr: the standard error of that estimate.
        tokens: how many tokens were scored, BOS and EOS included (but for the given BOS of an autoregressive network).
    """

    tokens: int = 0  # of what is made of the pair alone, as `jax.tree.map` does

    def __new__(cls, nll: float, stderr: float, tokens: int = 0) -> Score:
        """Makes the pair."""
        pair = super().__new__(cls, nll, stderr)
        pair.tokens = tokens
        return pair

    def __getnewargs__(self) -> tuple[float, float, int]:
        """What a copy is made of."""
        return self.nll, self.stderr, self.tokens

    def __float__(self) -> float:
        """Returns nats per token."""
        return self.nll

    def __repr__(self) -> str:
        """Returns all three."""
        return f"Score(nll={self.nll}, stderr={self.stderr}, tokens={self.tokens})"


def load(
    path_or_name: str | Path,
    *,
    ema: bool = True,
    algo: str | None = None,
    heads: int | None = None,
    length: int | None = None,
    tokenizer: str | None = None,
) -> Params:
    """Returns a trained network.

    Args:
        path_or_name: a run's workdir (its newest checkpoint); the folder of one checkpoint, `WORKDIR/checkpoints/STEP`; a
            folder that `export` wrote; or the reference's files: a Lightning `.ckpt`, a state dict (`.pt`, `.bin`,
            `.safetensors`), a Hugging Face folder, or a hub id such as `s-sahoo/duo`; or `quickstart`, which comes with
            the package.
        ema: the averaged weights, which are the better ones, rather than the last ones.
        algo, heads, length, tokenizer: of the reference's files, where they do not tell; tokenizer is `gpt2`,
            `bert-base-uncased` or a tokenizer's folder.

    Raises:
        UserError: there is no checkpoint, it cannot be read, or it does not tell what it must.
    """
    if not isinstance(path_or_name, str | Path):
        raise UserError(f"path_or_name is {path_or_name!r}; give a path or a name.")
    return checkpoint.load(path_or_name, ema=ema, algo=algo, heads=heads, length=length, tokenizer=tokenizer)


def train(config: ConfigDict, workdir: str | Path, *, writers: Sequence[Any] = ()) -> None:
    """Trains as a config says, and leaves everything in a folder, from which `load` takes the network.

    The same call goes on from the newest checkpoint. What the command line does, also in a loop over configs:

        config = duo_jax.config.default()  # or a recipe's get_config()
        config.train.lr = 1e-4
        duo_jax.train(config, "runs/mine")

    Args:
        config: every setting; see `duo_jax.config`.
        workdir: the run's folder.
        writers: are given all numbers and texts, beside the run's own files, and closed at the end, also after an error:
            objects with methods of `clu.metric_writers`, `write_scalars(step, scalars)`, `write_texts(step, texts)`,
            `write_hparams(hparams)`, `flush()` and `close()`.

    Raises:
        UserError: what a user can put right, in one sentence.
        KeyboardInterrupt: a signal stopped the run, after it was saved.
    """
    from duo_jax.training import loop

    with contextlib.ExitStack() as stack:
        for writer in writers:
            stack.callback(writer.close)
        if not isinstance(workdir, str | Path):
            raise UserError(f"workdir is {workdir!r}; give a folder for the run.")
        if loop.train(config, str(Path(workdir).expanduser()), writers) is not None:
            raise KeyboardInterrupt


def export(params: Params, to: str | Path, *, step: int = 0) -> None:
    """Writes a network to a new folder that `load` reads back bit for bit, and that can be put on the hub as it is.

    It holds `model.safetensors` under the reference's names, `config.json`, the tokenizer and a model card.

    Args:
        params: what `load` returned.
        to: a folder, which must not exist or be empty; or a file `.ckpt`, for the PyTorch reference, which needs PyTorch.
        step: the training step of the weights, for the record.

    Raises:
        UserError: the place is taken or cannot be written, or the tokenizer or PyTorch cannot be had.
    """
    _network_of(params)
    if Path(to).suffix == ".ckpt":
        convert.write_lightning(params, to, step=step)
    else:
        convert.write(params, to, tokenizer_of(params.tokenizer).save, step=step)


@functools.lru_cache(maxsize=4)
def tokenizer_of(name: str) -> tokenizers.Tokenizer:
    """Returns the tokenizer of `params.tokenizer`, read once."""
    return tokenizers.load(name)


def sample(
    params: Params,
    n_steps: int = 4,
    *,
    seed: int = 0,
    batch_size: int = 1,
    length: int | None = None,
    sampler: str = "ancestral",
    noise_removal: str = "ancestral",
    top_p: float = 1.0,
    prompt: str | Sequence[str] | None = None,
    infill: str | Sequence[str] | tuple[Any, Any] | None = None,
    temperature: float = 1.0,
    psi: sampling.Psi | str | None = None,
    guidance: float = 1.0,
    negative_prompt: str | None = None,
    early_stop: int = 0,
    stride: int | None = None,
    rows_at_once: int | None = None,
    trajectory: bool = False,
    until_eos: bool = False,
    progress: bool = False,
    mesh: Mesh | None = None,
    each: Callable[[Samples], None] | None = None,
) -> Samples:
    """Returns texts sampled from a network; docs/sampling.md tells what each option does to quality and diversity.

    No other seed, prompt, temperature, guidance or `top_p` below 1 compiles anew; `top_p` = 1 is a program of its own.

    Args:
        params: what `load` returned.
        n_steps: steps of the sampler; more is better and slower. The noise removal is one more network call. An
            autoregressive network takes one call a token, whatever this is.
        seed: the same seed gives the same texts (for the same `rows_at_once` and number of devices).
        batch_size: how many texts.
        length: tokens in each, BOS and EOS included; the network's own length if None. Longer texts are written in strides.
        sampler: `ancestral`; `psi`, which also draws tokens anew; for mdlm, sedd and d3pm also `ancestral_cache`, the same
            texts with fewer calls; for sedd also `analytic`; `autoregressive` for ar, where `ancestral` is the same.
        noise_removal: the last call: `ancestral` (a draw), `greedy` (the most probable tokens: cleaner, less
            diverse), `none`.
        top_p: nucleus: at each step a token is kept if the probabilities above its own sum to at most this; 1 keeps all.
        prompt: how the texts begin, after BOS: one string for all, or one for each.
        infill: texts with gaps, `___` (three or more underscores), which share evenly what the rest leaves of the length,
            one for all or one for each; or a pair of arrays (tokens, mask), `[L]` or `[B, L]`, true where a token is held.
        temperature: below 1 makes probable tokens more so.
        psi: of the psi sampler: one kappa mode for all steps, such as "constant-0.9", or a `sampling.Psi`.
        guidance: how far to lead away from what the network says without the prompt; 1 is not at all. Doubles the calls.
        negative_prompt: lead away from what it says with this prompt instead.
        early_stop: a uniform-state text is taken as finished when so many steps in a row have not changed it; 0: never.
        stride: new tokens a window, for texts longer than the network's length; half of that length if None.
        rows_at_once: texts sampled together, which bounds the memory; at most 64 a device if None.
        trajectory: whether to keep the tokens of every step.
        until_eos: whether `.text` ends where the first EOS stands, as networks are trained on rows of several documents;
            `.tokens` and `.entropy` are of the whole row. Otherwise EOS reads as an empty line.
        progress: whether to show a progress bar; where it shows steps, that is a program of its own, too.
        mesh: whose devices share the texts, for several hosts; this process's devices if None.
        each: given every batch as it comes.

    Raises:
        UserError: a setting that cannot be, or a prompt that does not fit or that the tokenizer cannot encode.
    """
    network = _network_of(params)
    length = network.length if length is None else length
    rows_at_once = _ROWS_A_DEVICE * jax.local_device_count() if rows_at_once is None else rows_at_once
    n_steps, batch_size, rows_at_once, early_stop = (
        _whole(name, value)
        for name, value in (("n_steps", n_steps), ("batch_size", batch_size), ("rows_at_once", rows_at_once),
                            ("early_stop", early_stop))
    )  # fmt: skip
    seed = _seed(seed)
    length, stride = _whole("length", length), None if stride is None else _whole("stride", stride)
    least = 2 if network.algo == "ar" else 1  # its first token is given
    if batch_size < 1 or length < least:
        raise UserError(f"batch_size is {batch_size} and length {length}; they must be at least 1 and {least}.")
    if rows_at_once < 1:
        raise UserError(f"rows_at_once is {rows_at_once}; it must be at least 1.")
    for name, value in (("top_p", top_p), ("temperature", temperature), ("guidance", guidance)):
        if not isinstance(value, numbers.Real):
            raise UserError(f"{name} is {value!r}; it must be a number.")
    sampling.check_temperature(temperature)
    sampling.check_guidance(guidance)
    if guidance == 1.0 and negative_prompt is not None:
        raise UserError("negative_prompt was given, but guidance is 1, which does not use it; give a guidance above 1.")
    if guidance != 1.0 and prompt is None and infill is None:
        raise UserError(f"guidance is {guidance}, but there is no prompt or infill to be guided by.")
    settings = sampling.Settings.for_network(
        network,
        n_steps,
        sampler=sampler,
        noise_removal=noise_removal,
        top_p=top_p,
        psi=sampling.as_psi(psi, sampler),
        guided=guidance != 1.0,
        early_stop=early_stop,
        trajectory=trajectory,
    )
    tokenizer = tokenizer_of(params.tokenizer)
    shape = (batch_size, length)
    known = tokens, held = sampling.prompts.known(tokenizer, shape, prompt=prompt, infill=infill)
    if network.algo == "ar":  # a text of which nothing is held begins with BOS
        free = ~held.any(axis=1)
        tokens[free, 0], held[free, 0] = tokenizer.bos_id, True
    unconditional = None
    if settings.guided:
        unconditional = sampling.prompts.known(tokenizer, shape, prompt=negative_prompt or "")
        if negative_prompt is None:  # outside what the texts hold the two must be alike
            unconditional = unconditional[0], unconditional[1] & held

    def samples(texts: sampling.texts.Texts) -> Samples:
        return Samples(
            tokens=texts.tokens,
            text=[
                tokenizer.decode(sampling.until_end(row, tokenizer.eos_id)[0] if until_eos else row)
                for row in texts.tokens
            ],
            entropy=sampling.unigram_entropy(texts.tokens),
            network_calls=texts.network_calls,
            trajectory=texts.trajectory,
        )

    with _bar(batch_size, progress, mesh) as (tells, planned, came):

        def done(texts: sampling.texts.Texts) -> None:
            if each is not None:
                each(samples(texts))
            came(len(texts.tokens))

        texts = sampling.texts.sample(
            params.weights,
            network,
            dataclasses.replace(settings, reports_steps=tells),
            jax.random.key(seed),
            known,
            # One type, whatever was given: 1 and 1.0 would be two programs.
            knobs=sampling.Knobs(*(np.float32(value) for value in (top_p, temperature, guidance))),
            bos_id=tokenizer.bos_id,
            unconditional=unconditional,
            stride=stride,
            rows_at_once=rows_at_once,
            mesh=mesh,
            planned=planned,
            done=done,
        )
    return samples(texts)


@contextlib.contextmanager
def _bar(
    number: int, shown: bool, mesh: Mesh | None
) -> Iterator[tuple[bool, Callable[[int], None], Callable[[int], None]]]:
    """Shows how far the sampling of so many texts is: in steps where one device alone can tell of them, else in texts.

    Gives whether the program is to tell of its steps; what takes their number beforehand; and what takes the number of texts
    in each batch that has come.
    """
    finished = 0

    def planned(steps: int) -> None:
        bar.total = steps if tells else number

    def came(texts: int) -> None:
        nonlocal finished
        finished += texts
        if not tells:
            bar.update(texts)
        elif number > texts:
            bar.set_postfix_str(f"{finished:,} of {number:,} texts", refresh=False)

    with contextlib.ExitStack() as stack:
        tells = stack.enter_context(
            progress_lib.own_step_reports(shown and mesh is None and jax.local_device_count() == 1)
        )
        unit = " steps" if tells else " texts"
        bar = stack.enter_context(progress_lib.bar(total=0, desc="sampling", unit=unit, disable=not shown))
        if tells:
            progress_lib.listen(bar.update)
        yield tells, planned, came
        if tells:
            jax.effects_barrier()


def _network_of(params: Any) -> Network:
    """Returns a network's settings, or raises UserError if what is given is none."""
    if not isinstance(params, Params):
        raise UserError(f"params is {type(params).__name__}; give what duo_jax.load returns.")
    return params.network


def _whole(name: str, value: Any) -> int:
    """Returns a value as the int that it is, or raises UserError."""
    try:
        return operator.index(value)
    except TypeError as error:
        raise UserError(f"{name} is {value!r}; it must be a whole number.") from error


def _seed(value: Any) -> int:
    """Returns a seed as the int that it is, or raises UserError."""
    seed = _whole("seed", value)
    if not 0 <= seed < 2**32:
        raise UserError(f"seed is {seed}; it must be from 0 to 2^32 - 1.")
    return seed


def _checked_tokens(given: Any, network: Network) -> np.ndarray:
    """Returns token ids as the rows `[B, L]` that they are, or raises UserError if the network cannot read them."""
    try:
        tokens = np.atleast_2d(np.asarray(given))
    except ValueError as error:
        raise UserError("the rows of tokens differ in length; score them one by one.") from error
    if tokens.ndim != 2 or not tokens.size or not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(f"tokens must be whole numbers of shape [L] or [B, L], not {tokens.dtype} {tokens.shape}.")
    if tokens.min() < 0 or tokens.max() >= network.vocab_size:
        raise UserError(
            f"token ids must lie in [0, {network.vocab_size}); these reach {tokens.min()} to {tokens.max()}."
        )
    if network.process != "uniform" and (tokens == network.mask_id).any():
        raise UserError(
            f"a token id is {network.mask_id}, the mask, which no text holds; score rows that are padded one by one, cut."
        )
    if tokens.shape[1] > network.length:
        raise UserError(
            f"the rows have {tokens.shape[1]} tokens, and the network reads {network.length}; cut them, or score a "
            "string, which is cut."
        )
    return tokens


def score(
    params: Params, text_or_tokens: Any, *, prompt: str | None = None, seed: int = 0, n_samples: int = 16
) -> Score:
    """Returns how probable a text is: a bound on its negative log-likelihood in nats per token.

    The bound is an expectation over the time t and the noise; it is estimated `n_samples` times, independently, so that
    the standard error is that of their mean.

    Args:
        params: what `load` returned.
        text_or_tokens: a string, which is tokenized and cut into rows BOS ... EOS of at most the network's length; or token
            ids, `[L]` or `[B, L]`, scored as they are.
        prompt: what stands before the text and is given, not scored, as it would be in sampling; of a string only. The
            string then follows it as it stands, its first space included, and both fit the network's length.
        seed: of the noise.
        n_samples: independent estimates; the standard error shrinks with their square root.

    Raises:
        UserError: an empty input, ids outside the vocabulary, rows longer than the network's, a prompt of tokens, or no
            estimates.
    """
    if isinstance(text_or_tokens, list | tuple) and text_or_tokens and all(isinstance(x, str) for x in text_or_tokens):
        raise UserError("score takes one text; for several: [duo_jax.score(params, text) for text in texts].")
    network = _network_of(params)
    n_samples, seed = _whole("n_samples", n_samples), _seed(seed)
    if n_samples < 1:
        raise UserError(f"n_samples is {n_samples}; at least 1 estimate is needed, and 2 for a standard error.")
    given = 0
    if not isinstance(text_or_tokens, str):
        if prompt is not None:
            raise UserError("a prompt was given with token ids; score a string, or leave the prompt out.")
        rows: list[Any] = list(_checked_tokens(text_or_tokens, network))
    elif not text_or_tokens:
        raise UserError("there is nothing to score: the text is empty.")
    else:
        tokenizer = tokenizer_of(params.tokenizer)
        if prompt is None:
            rows = rows_lib.of_text(tokenizer.encode(text_or_tokens), tokenizer, network.length)
        else:
            row, given = rows_lib.after_prompt(prompt, text_or_tokens, tokenizer, network.length)
            rows = [row]
    if network.algo == "ar" and min(len(row) for row in rows) < 2:
        raise UserError("there is nothing to score: an autoregressive network is given the first token of each row.")
    estimates = np.zeros(n_samples)
    count = 0
    key = jax.random.key(seed)
    for i, block in enumerate(rows_lib.batches(rows, given, network.length)):
        batch = jax.device_put(block)
        keys = jax.random.split(jax.random.fold_in(key, i), n_samples)
        sums = jax.device_get([likelihood.nll_sum(params.weights, batch, k, network=network) for k in keys])
        estimates += np.asarray([s["nll"] for s in sums], np.float64)
        count += int(sums[0]["tokens"])
    estimates /= count
    stderr = float(estimates.std(ddof=1) / math.sqrt(n_samples)) if n_samples > 1 else math.nan
    return Score(float(estimates.mean()), stderr, count)
