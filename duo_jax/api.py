"""The Python interface: load, train and export a network, sample from it and replay that, score texts."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import numbers
import operator
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from duo_jax import convert, files, sampling
from duo_jax import progress as progress_lib
from duo_jax.data import tokenizers
from duo_jax.errors import UserError
from duo_jax.evaluation import likelihood
from duo_jax.evaluation import rows as rows_lib
from duo_jax.models.network import Network, Params
from duo_jax.results import Samples, Score
from duo_jax.training import checkpoint

# What a writer of `train` must have.
_WRITER = ("write_scalars", "write_texts", "write_hparams", "flush", "close")
# How many texts one call of the sampler writes at once on each device, by default.
_ROWS_PER_DEVICE = 64


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
        ema: whether to load the averaged weights, which are better than the last ones.
        algo, heads, length, tokenizer: for the reference's files, if they do not say; tokenizer is `gpt2`,
            `bert-base-uncased` or a tokenizer's folder.

    Raises:
        UserError: there is no checkpoint, it cannot be read, or a fact about the network is missing.
    """
    if not isinstance(path_or_name, str | Path):
        raise UserError(f"path_or_name is {path_or_name!r}; give a path or a name.")
    return checkpoint.load(path_or_name, ema=ema, algo=algo, heads=heads, length=length, tokenizer=tokenizer)


def train(config: ConfigDict, workdir: str | Path, *, writers: Sequence[Any] = ()) -> None:
    """Trains as a config says, and keeps everything in a folder, from which `load` reads the network.

    The same call resumes from the newest checkpoint. This is what the command line does, and works in a loop over configs:

        config = configs.quickstart.get_config()  # a recipe, in the clone's folder
        config.train.lr = 1e-3
        duo_jax.train(config, "runs/mine")

    Args:
        config: every setting. A recipe starts from `duo_jax.config.default()`, which describes a network of 170M parameters.
        workdir: the run's folder.
        writers: receive all numbers and texts, as the run's own files do, and are closed at the end, also after an error:
            objects with these methods of `clu.metric_writers`: `write_scalars(step, scalars)`, `write_texts(step, texts)`,
            `write_hparams(hparams)`, `flush()` and `close()`.

    Raises:
        UserError: a mistake that the user can correct, such as a `config.mode` other than `train`.
        KeyboardInterrupt: a signal stopped the run, after it was saved.
    """
    from duo_jax.training import loop

    with contextlib.ExitStack() as stack:
        if not isinstance(writers, Sequence):
            raise UserError(f"writers is {writers!r}; give a list of writers.")
        for writer in writers:
            if absent := [name for name in _WRITER if not callable(getattr(writer, name, None))]:
                raise UserError(f"the writer {writer!r} has no {absent[0]}(); see duo_jax.train.")
            stack.callback(writer.close)
        if isinstance(config, ConfigDict) and config.get("mode", "train") != "train":
            raise UserError(f"config.mode is {config.mode!r}, and duo_jax.train trains; set it to 'train'.")
        if not isinstance(workdir, str | Path):
            raise UserError(f"workdir is {workdir!r}; give a folder for the run.")
        if loop.train(config, str(Path(workdir).expanduser()), writers) is not None:
            raise KeyboardInterrupt


def export(params: Params, to: str | Path, *, step: int = 0) -> None:
    """Writes a network to a new folder that `load` reads back bit for bit, and that can be uploaded to the hub as it is.

    It holds `model.safetensors` under the reference's names, `config.json`, the tokenizer and a model card.

    Args:
        params: what `load` returned.
        to: a new or empty folder; or a `.ckpt` file for the PyTorch reference, which needs PyTorch to be written.
        step: the training step of the weights, for the record.

    Raises:
        UserError: the place is taken or cannot be written, or the tokenizer or PyTorch is not available.
    """
    _network_of(params)
    if Path(to).suffix == ".ckpt":
        convert.write_lightning(params, to, step=step)
    else:
        convert.write(params, to, tokenizer_of(params.tokenizer).save, step=step)


@functools.lru_cache(maxsize=4)
def tokenizer_of(name: str) -> tokenizers.Tokenizer:
    """Returns the tokenizer that `params.tokenizer` names; it is read once."""
    return tokenizers.load(name)


def sample(
    params: Params,
    n_steps: int = 4,
    *,
    seed: int | Sequence[int] = 0,
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
    """Returns texts sampled from a network; docs/sampling.md explains what each option does to quality and diversity.

    Another seed, prompt, temperature, guidance or `top_p` below 1 does not recompile; `top_p` = 1 is a program of its own.

    Args:
        params: what `load` returned.
        n_steps: steps of the sampler; more is better and slower. The noise removal is one more network call. An
            autoregressive network takes one call per token, whatever this is.
        seed: decides all draws. A text depends on its seed and its number in `batch_size`, not on the texts beside it (but
            for rounding; see docs/sampling.md). Several seeds give one text each, the first of that seed.
        batch_size: how many texts; several seeds say it themselves.
        length: tokens in each, BOS and EOS included; the network's own length if None. Longer texts are written in strides.
        sampler: `ancestral`; `psi`, which also redraws tokens; for mdlm, sedd and d3pm also `ancestral_cache`, the same
            texts with fewer calls; for sedd also `analytic`; `autoregressive` for ar, where `ancestral` is the same.
        noise_removal: the last call: `ancestral` (a draw), `greedy` (the most probable tokens: cleaner, less
            diverse), `none`.
        top_p: nucleus: at each step a token is kept if the probabilities above its own sum to at most this; 1 keeps all.
        prompt: how the texts begin, after BOS: one string for all, or one for each.
        infill: texts with gaps, `___` (three or more underscores), one for all or one for each; the gaps share the rest of
            the length evenly. Or a pair of arrays (tokens, mask), `[L]` or `[B, L]`, true where a token is held.
        temperature: below 1 makes probable tokens more probable.
        psi: for the psi sampler: one kappa mode for all steps, such as "constant-0.9", or a `sampling.Psi`.
        guidance: how far to lead away from the prediction without the prompt; 1 is not at all. Doubles the calls.
        negative_prompt: lead away from the prediction with this prompt instead.
        early_stop: a uniform-state text is finished after this many successive steps without a change; 0 turns this off.
        stride: new tokens per window, for texts longer than the network's length; half of that length if None.
        rows_at_once: texts sampled together, which bounds the memory; at most 64 per device if None. If given, fewer texts
            are filled up to it, so that one program serves every batch size.
        trajectory: whether to keep the tokens of every step, which `replay` shows.
        until_eos: whether `.text` ends at the first EOS, since networks are trained on rows of several documents; `.tokens`
            and `.entropy` are of the whole row. Otherwise EOS reads as an empty line.
        progress: whether to show a progress bar; one that counts steps makes a program of its own, too.
        mesh: the devices that share the texts, for several hosts; this process's devices if None.
        each: called with each batch when it is finished.

    Raises:
        UserError: an invalid setting, or a prompt that does not fit or that the tokenizer cannot encode.
    """
    network = _network_of(params)
    length = network.length if length is None else length
    n_steps, batch_size, early_stop = (
        _whole(name, value)
        for name, value in (("n_steps", n_steps), ("batch_size", batch_size), ("early_stop", early_stop))
    )
    seeds, batch_size = _seeds(seed, batch_size)
    length, stride = _whole("length", length), None if stride is None else _whole("stride", stride)
    least = 2 if network.algo == "ar" else 1  # its first token is given
    if batch_size < 1 or length < least:
        raise UserError(f"batch_size is {batch_size} and length {length}; they must be at least 1 and {least}.")
    if rows_at_once is None:
        rows_at_once = min(batch_size, _ROWS_PER_DEVICE * jax.local_device_count())
    elif (rows_at_once := _whole("rows_at_once", rows_at_once)) < 1:
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
        if negative_prompt is None:  # it may hold only what the texts hold
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

    with _bar(batch_size, progress, mesh) as (in_steps, planned, finished):

        def done(texts: sampling.texts.Texts) -> None:
            if each is not None:
                each(samples(texts))
            finished(len(texts.tokens))

        texts = sampling.texts.sample(
            params.weights,
            network,
            dataclasses.replace(settings, reports_steps=in_steps),
            sampling.texts.origins_of(seeds, batch_size),
            known,
            # Always of one type: 1 and 1.0 would be two programs.
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


def replay(params: Params, samples: Samples, path: str | Path) -> None:
    """Writes a web page, complete in one file, that replays step by step how texts came about.

    A character that several tokens share is shown as one `�` for each of them.

    Args:
        params: the network that wrote them.
        samples: what `sample` returned with `trajectory=True`.
        path: the file, such as `replay.html`; one that exists is replaced.

    Raises:
        UserError: there is no trajectory, or the file cannot be written.
    """
    network = _network_of(params)
    if not isinstance(path, str | Path):
        raise UserError(f"path is {path!r}; give a file, such as replay.html.")
    if not isinstance(samples, Samples) or samples.trajectory is None:
        raise UserError("there are no steps to replay; give what duo_jax.sample returns with trajectory=True.")
    mask_id = network.mask_id if network.process == "absorbing" else None
    page = sampling.replay.page(tokenizer_of(params.tokenizer), samples.trajectory, mask_id)
    with files.written(path, "give another path"):
        Path(path).expanduser().write_text(page, encoding="utf-8")


@contextlib.contextmanager
def _bar(
    number: int, shown: bool, mesh: Mesh | None
) -> Iterator[tuple[bool, Callable[[int], None], Callable[[int], None]]]:
    """Shows the progress of sampling a number of texts: in steps if a single device can report them, else in texts.

    Yields whether the program is to report its steps, and two functions to call: `planned` with the number of all steps,
    before the first, and `finished` with the number of texts of each finished batch.
    """
    count = 0

    def planned(steps: int) -> None:
        bar.total = steps if in_steps else number

    def finished(texts: int) -> None:
        nonlocal count
        count += texts
        if not in_steps:
            bar.update(texts)
        elif number > texts:
            bar.set_postfix_str(f"{count:,} of {number:,} texts", refresh=False)

    with contextlib.ExitStack() as stack:
        alone = mesh is None and jax.local_device_count() == 1
        in_steps = stack.enter_context(progress_lib.own_step_reports(shown and alone))
        unit = " steps" if in_steps else " texts"
        bar = stack.enter_context(progress_lib.bar(total=0, desc="sampling", unit=unit, disable=not shown))
        if in_steps:
            progress_lib.listen(bar.update)
        yield in_steps, planned, finished
        if in_steps:
            jax.effects_barrier()


def _network_of(params: Any) -> Network:
    """Returns the network that `params` belong to, or raises UserError if they are none of `load`."""
    if not isinstance(params, Params):
        raise UserError(f"params is {type(params).__name__}; give what duo_jax.load returns.")
    return params.network


def _whole(name: str, value: Any) -> int:
    """Returns a whole number as an int, or raises UserError."""
    try:
        return operator.index(value)
    except TypeError as error:
        raise UserError(f"{name} is {value!r}; it must be a whole number.") from error


def _seeds(value: Any, batch_size: int) -> tuple[int | list[int], int]:
    """Returns one seed or several, and how many texts; or raises UserError."""
    several = value.ndim > 0 if isinstance(value, np.ndarray) else isinstance(value, Sequence)
    if not several or isinstance(value, str | bytes):
        return _seed(value), batch_size
    seeds = [_seed(one) for one in value]
    if not seeds or batch_size not in (1, len(seeds)):
        raise UserError(
            f"batch_size is {batch_size}, but the number of seeds is {len(seeds)}; give one for each text, or one for all."
        )
    return seeds, len(seeds)


def _seed(value: Any) -> int:
    """Returns a seed as an int, or raises UserError."""
    seed = _whole("seed", value)
    if not 0 <= seed < 2**32:
        raise UserError(f"seed is {seed}; it must be from 0 to 2^32 - 1.")
    return seed


def _checked_tokens(ids: Any, network: Network) -> np.ndarray:
    """Returns token ids as rows `[B, L]`, or raises UserError if the network cannot read them."""
    try:
        tokens = np.atleast_2d(np.asarray(ids))
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
            f"a token id is {network.mask_id}, the mask, which no text holds; cut off padding, and score rows one by one."
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
    """Returns a bound on the negative log-likelihood of a text, in nats per token.

    The bound is an expectation over the time t and the noise. The result is the mean of `n_samples` independent estimates,
    with the standard error of that mean.

    Args:
        params: what `load` returned.
        text_or_tokens: a string, which is tokenized and cut into rows BOS ... EOS of at most the network's length; or token
            ids, `[L]` or `[B, L]`, scored as they are.
        prompt: what precedes a string and is given, not scored, as in sampling. The string follows it unchanged, its first
            space included, and both together must fit the network's length.
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


def evaluate(
    params: Params,
    path: str | Path,
    *,
    field: str = "text",
    detokenizer: str = "none",
    document_ends: bool = True,
    packing: str = "packed",
    batch_size: int = 16,
    draws: int = 1,
    progress: bool = False,
) -> likelihood.Likelihood:
    """Returns how well a network predicts a text: `.nll` in nats per token, `.stderr`, `.bpd`, `.ppl`, `.tokens`.

    What `--config.mode=eval --config.eval.path=PATH` measures, with the same draws of noise; docs/evaluation.md tells what
    the figures mean and what they are comparable with. `score` is for single texts.

    Args:
        params: what `load` returned.
        path: a file or folder of `.txt`, `.jsonl` and `.parquet`.
        field: what the rows of the last two call their text.
        detokenizer: undoes what the makers of a set did to its text, such as `wikitext`; see `data.detokenizers`.
        document_ends: whether an EOS follows each document, as in training.
        packing: `packed`, rows that hold several documents, or `padded`, rows of one document.
        batch_size: rows evaluated together.
        draws: the number of draws of times and noise for each row.
        progress: whether to show progress bars.

    Raises:
        UserError: an invalid setting, no text, or too little of it for one row.
    """
    from duo_jax.data import pipeline, text_sets

    network = _network_of(params)
    batch_size, draws = _whole("batch_size", batch_size), _whole("draws", draws)
    if batch_size < 1 or draws < 1:
        raise UserError(f"batch_size is {batch_size} and draws {draws}; both must be at least 1.")
    if not isinstance(path, str | Path):
        raise UserError(f"path is {path!r}; give a text file or folder.")
    about = ConfigDict({"path": str(path), "field": field, "detokenizer": detokenizer, "document_ends": document_ends})
    text = text_sets.read(about, tokenizer_of(params.tokenizer), verbose=progress)
    batches = pipeline.heldout_batches(text, length=network.length, batch_size=batch_size, packing=packing)
    shown = progress_lib.passing(batches, len(batches), "evaluating", unit=" batches", show=progress)
    return likelihood.evaluate(params.weights, network, shown, draws=draws)
