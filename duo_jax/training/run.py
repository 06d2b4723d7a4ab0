"""A run outside its loop: its data, network and devices, and the folder where it writes its results.

WORKDIR/config.json             all settings
WORKDIR/metrics.jsonl           one line per logging step or evaluation; if a step has several, the last one counts
WORKDIR/tensorboard/            the same for TensorBoard
WORKDIR/perplexity.png          held-out perplexity against steps
WORKDIR/samples/STEP.txt        texts sampled during training
WORKDIR/checkpoints/STEP/       see `training.checkpoint`
WORKDIR/tokenizer/              the tokenizer, so that sampling needs only this folder
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from duo_jax import config as config_lib
from duo_jax import hardware, progress, sampling
from duo_jax.data import pipeline, prepare, tokenizers
from duo_jax.data.packing import Store
from duo_jax.errors import UserError
from duo_jax.evaluation import likelihood, plots
from duo_jax.models import network as network_lib
from duo_jax.models.network import Network, Params, Weights
from duo_jax.training import checkpoint, partition, writers
from duo_jax.training import workdir as workdir_lib

# Enough rows to estimate token frequencies; a training set may have billions of tokens.
_UNIGRAM_ROWS = 100_000


def prepared(config: ConfigDict) -> Path:
    """Returns the folder of token shards; if it is missing, the first process makes it while the others wait."""
    if jax.process_count() > 1:
        mistake = None
        if jax.process_index() == 0:
            try:
                prepare.prepare(config.data)
            except Exception as error:  # any kind: otherwise the others would wait for ever
                mistake = error
        if multihost_utils.broadcast_one_to_all(np.asarray(mistake is not None)):
            raise mistake or UserError("the first process could not prepare the data; its message says why.")
    return prepare.prepare(config.data)


def heldout(config: ConfigDict, text: Path | Store) -> pipeline.HeldoutBatches:
    """Returns this process's share of the held-out batches in a folder of shards, or of all batches of a text."""
    asked = config.eval.batches or None  # 0: all of them
    batches = asked if isinstance(text, Path) else None  # a text is read to its end
    return pipeline.heldout_batches(
        text,
        length=config.model.length,
        batch_size=config.eval.batch_size,
        packing=config.data.packing,
        max_batches=batches,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def measure(
    weights: Any,
    network: Network,
    batches: pipeline.HeldoutBatches,
    mesh: Mesh,
    draws: int,
    between: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> likelihood.Likelihood:
    """Returns the likelihood of held-out batches, with a progress bar.

    Args:
        weights: on the mesh.
        network: the network they belong to.
        batches: from `heldout`.
        mesh: the devices over which each batch is split.
        draws: draws of times and noise per batch.
        between: wraps the iteration over the batches; what it raises ends the evaluation.
    """
    shown = progress.passing(
        between(batches), len(batches), "evaluating", unit=" batches", show=jax.process_index() == 0
    )
    put = functools.partial(partition.put, mesh=mesh)
    return likelihood.evaluate(weights, network, shown, put, mesh=mesh, draws=draws)


def levels(config: ConfigDict, folder: Path, vocab_size: int) -> dict[str, float]:
    """Returns two baseline perplexities of the same held-out tokens: `unigram`, from token frequencies, and `uniform`."""
    show = jax.process_index() == 0
    everything = pipeline.heldout_batches(
        folder,
        length=config.model.length,
        batch_size=config.eval.batch_size,
        packing=config.data.packing,
        max_batches=config.eval.batches or None,
    )
    counts = pipeline.unigram_counts(
        folder, config.model.length, config.data.packing, max_rows=_UNIGRAM_ROWS, verbose=show
    )
    given = int(config.algo.name == "ar")  # an autoregressive network does not predict its first token, BOS
    shown = progress.passing(everything, len(everything), "reading held-out rows", unit=" batches", show=show)
    return {"unigram": likelihood.unigram(counts, shown, given).ppl, "uniform": float(vocab_size)}


def _first_says(answer: bool) -> bool:
    """Returns the first process's answer: all must act alike, and a shared disk may show the others an older state."""
    return answer if jax.process_count() == 1 else bool(multihost_utils.broadcast_one_to_all(np.asarray(answer)))


_SHAPE = ("dim", "blocks", "heads", "cond_dim")


def _check_fit(config: ConfigDict, network: Network, start: Network, names: tuple[str, ...]) -> None:
    """Raises UserError if `network` cannot start from the weights of `start`."""
    different = [
        f"{name} is {getattr(network, name)}, there {getattr(start, name)}"
        for name in names
        if getattr(network, name) != getattr(start, name)
    ]
    # The outputs of all uniform-state algorithms have one meaning; those of each other algorithm have their own.
    if network.algo != start.algo and not network.process == start.process == "uniform":
        different.append(f"algo is {network.algo}, there {start.algo}")
    if different:
        raise UserError(
            f"config.init_from = {config.init_from} does not fit the config: {'; '.join(different)}. Use the settings "
            "that it was trained with."
        )


def _starting_point(config: ConfigDict) -> Params:
    """Returns the network of `config.init_from`.

    Raises:
        UserError: it cannot be read, or its sizes or algorithm do not fit the config.
    """
    params = checkpoint.load(config.init_from)
    start = params.network
    _check_fit(config, Network.from_config(config, start.vocab_size, start.mask_id), start, _SHAPE)
    return params


@dataclasses.dataclass
class Run:
    """One training run, as the loop uses it."""

    config: ConfigDict
    workdir: Path
    mesh: Mesh
    network: Network
    tokenizer: tokenizers.Tokenizer
    batches: pipeline.TrainIterator
    heldout: pipeline.HeldoutBatches
    initial: Params | None = None  # the network of `config.init_from`, until training has started from it
    others: Sequence[Any] = ()
    levels: dict[str, float] = dataclasses.field(default_factory=dict)
    files: writers.MultiWriter = dataclasses.field(default_factory=writers.MultiWriter)
    writer: writers.MultiWriter = dataclasses.field(default_factory=writers.MultiWriter)

    @classmethod
    @contextlib.contextmanager
    def open(cls, config: ConfigDict, workdir: str, others: Sequence[Any] = ()) -> Iterator[Run]:
        """Prepares the data and all else that the first step needs, and closes everything at the end.

        `others` are writers besides those of the run's own files; the caller closes them.

        Raises:
            UserError: a mistake that the user can correct; raised before the work that it would spoil.
        """
        hardware.agree()  # here too, for training that is called from Python
        mesh = partition.create_mesh(config.mesh)
        partition.check_batch(mesh, "train.batch_size", config.train.batch_size, config.train.accumulate)
        partition.check_batch(mesh, "eval.batch_size", config.eval.batch_size)
        Network.from_config(config, vocab_size=2)  # wrong sizes show now
        place = workdir_lib.check(workdir)
        # Read now, so that a typing mistake shows before the data are prepared.
        initial = _starting_point(config) if config.init_from and not checkpoint.steps(place) else None
        with workdir_lib.held(place), contextlib.ExitStack() as stack:
            folder = prepared(config)
            tokenizer = prepare.load_tokenizer(folder)
            network = Network.from_config(config, tokenizer.vocab_size, tokenizer.mask_id)
            batches = pipeline.train_iterator(
                folder,
                length=config.model.length,
                batch_size=config.train.batch_size,
                seed=config.seed,
                packing=config.data.packing,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
                workers=config.data.workers,
            )
            stack.callback(batches.close)
            run = cls(
                config=config,
                workdir=place,
                mesh=mesh,
                network=network,
                tokenizer=tokenizer,
                batches=batches,
                heldout=heldout(config, folder),
                initial=initial,
                others=others,
            )
            del initial  # so that its memory is free once training has started from it
            run.sampler()  # so that a mistake in config.sample shows now, not at the first text
            run.levels = levels(config, folder, network.vocab_size)
            stack.callback(lambda: run.files.close())
            yield run

    @property
    def primary(self) -> bool:
        """Whether this is the process that prints and writes."""
        return jax.process_index() == 0

    def say(self, text: str) -> None:
        """Prints a line, in the first process only."""
        if self.primary:
            progress.say(text)

    def check_record(self, record: Mapping[str, Any], where: str) -> None:
        """Raises UserError if a checkpoint's record is of another run, naming the settings that differ."""
        if record.get("format") != checkpoint.FORMAT:
            raise UserError(
                f"{where} has format {record.get('format')}, not {checkpoint.FORMAT}; use another --workdir."
            )
        if different := config_lib.changed(record["config"], self.config):
            raise UserError(
                f"{where} is of another run: {'; '.join(different)}. Set it back, or use another --workdir "
                f"(with --config.init_from={self.workdir} and its tokenizer to start from these weights)."
            )

    def start_from(self) -> Weights | None:
        """Returns the weights of `config.init_from`, averaged if it has such, or None to start from fresh ones.

        Raises:
            UserError: their network has another shape or another tokenizer.
        """
        if not self.config.init_from:
            return None
        params, self.initial = self.initial or _starting_point(self.config), None
        _check_fit(self.config, self.network, params.network, ("vocab_size", *_SHAPE))
        if not tokenizers.load(params.tokenizer).same_as(self.tokenizer):
            raise UserError(
                f"config.init_from = {self.config.init_from} does not fit the config: its tokenizer is another one. Use it "
                f"here too, --config.data.tokenizer={params.tokenizer}."
            )
        kind = {True: "EMA weights", False: "last weights", None: "weights"}[params.averaged]
        self.say(f"Starting from the {kind} in {self.config.init_from}.")
        return partition.replicate(params.weights, self.mesh)

    def start(self, step: int, params: Any) -> None:
        """Opens the files of the run, and prints what is about to be trained."""
        self._started, self._first = time.monotonic(), step
        config, net = self.config, self.network
        if not self.primary:
            return
        self.files = writers.MultiWriter(
            writers.JsonlWriter(self.workdir / workdir_lib.METRICS, step),
            writers.TensorBoardWriter(self.workdir / workdir_lib.TENSORBOARD, step),
        )
        self.writer = writers.MultiWriter(self.files, *self.others)
        self.writer.write_hparams(config_lib.flatten(config))
        (self.workdir / workdir_lib.CONFIG).write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
        self.tokenizer.save(self.workdir / checkpoint.TOKENIZER)
        table = parameter_overview.get_parameter_overview(params, include_stats=False)
        (self.workdir / workdir_lib.PARAMETERS).write_text(table + "\n", encoding="utf-8")
        for path in (self.workdir / workdir_lib.SAMPLES).glob("*.txt"):
            if path.stem.isdigit() and int(path.stem) > step:
                path.unlink()  # these steps will be taken again; their metrics were dropped above
        if step >= config.train.steps:
            self.say(
                f"No steps are left: the run is at step {step:,}, and config.train.steps is {config.train.steps:,}."
            )
            return
        devices = self.mesh.devices.flatten()
        self.say(
            f"Training {net.algo}, {network_lib.count(params) / 1e6:.2f}M parameters (D = {net.dim}, {net.blocks} blocks, "
            f"K = {net.vocab_size:,}, L = {net.length}) in {net.dtype.name} on {devices.size} x {devices[0].device_kind}, "
            f"batch {config.train.batch_size}, steps {step:,} to {config.train.steps:,}."
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Records numbers for a step."""
        self.writer.write_scalars(step, scalars)

    def evaluation(self, step: int) -> dict[str, Any] | None:
        """Returns a step's evaluation from the metrics file, if it has one, as it may after a resume."""
        rows = writers.read_jsonl(self.workdir / workdir_lib.METRICS)
        found = [row for row in rows if row["step"] == step and "heldout/nll" in row]
        return found[-1] if found else None

    def evaluated(self, step: int) -> bool:
        """Whether the metrics file has an evaluation of this step; all processes get the same answer."""
        return _first_says(self.evaluation(step) is not None)

    def evaluate(
        self, step: int, ema: Any, between: Callable[[Iterable[Any]], Iterable[Any]] = iter
    ) -> likelihood.Likelihood:
        """Measures held-out likelihood with the averaged weights, records it and redraws the plot.

        `between` is that of `measure`.
        """
        result = measure(ema, self.network, self.heldout, self.mesh, self.config.eval.draws, between)
        before = self.evaluation(step)
        # A resumed run may evaluate a step again: recorded only if the result differs, as with other batches.
        if before is None or not math.isclose(before["heldout/nll"], result.nll, rel_tol=1e-6):
            scalars = result.figures() | {f"{name}_ppl": level for name, level in self.levels.items()}
            self.write(step, {f"heldout/{name}": value for name, value in scalars.items()})
        self.say(f"step {step:,}: held-out {describe(result, self.levels)}")
        if self.primary:
            self.writer.flush()
            rows = writers.read_jsonl(self.workdir / workdir_lib.METRICS)
            curves = [
                list({row["step"]: value(row) for row in rows if name in row}.items())  # the last row of each step
                for name, value in (
                    ("heldout/ppl", lambda row: row["heldout/ppl"]),
                    ("train/loss", lambda row: float(np.exp(min(row["train/loss"], 20.0)))),
                )
            ]
            title = f"{self.workdir.name}: {self.network.algo} on {self.config.data.source}"
            end = self.config.algo.curriculum.end
            in_sight = self.network.algo == "duo" and 0 < end < self.config.train.steps
            marks = {"end of the curriculum": end} if in_sight else {}
            plots.perplexity(self.workdir / workdir_lib.PICTURE, *curves, self.levels, title, marks)
        return result

    def sampler(self) -> tuple[sampling.Settings, sampling.prompts.Known]:
        """Returns the sampler's settings and the tokens that are known from the start, for samples during training.

        Raises:
            UserError: `config.sample` does not fit the network.
        """
        config = self.config.sample
        if self.network.algo == "ar" and config.length is not None and config.length < 2:
            raise UserError(
                "config.sample.length is 1, but an autoregressive network's first token is given; set it to 2 or more."
            )
        settings = sampling.Settings.from_config(config, self.network)
        # An empty prompt makes an autoregressive text begin with BOS, as every prompt does.
        known = sampling.prompts.known(
            self.tokenizer,
            (config.batch_size, self.network.length if config.length is None else config.length),
            prompt=config.prompt or ("" if self.network.algo == "ar" and not config.infill else None),
            infill=config.infill or None,
        )
        sampling.texts.check_known(*known, self.network)
        sampling.texts.window(self.network, known[0].shape[1], config.stride or None)
        return settings, known

    def _texts(self, step: int) -> Path:
        """The file for the texts of a step."""
        return self.workdir / workdir_lib.SAMPLES / f"{step:08d}.txt"

    def sampled(self, step: int) -> bool:
        """Whether this step's texts were written; all processes get the same answer."""
        return _first_says(self._texts(step).exists())

    def sample(self, step: int, ema: Any) -> str:
        """Samples texts with the averaged weights, writes them to a file, and returns the first."""
        config = self.config.sample
        settings, known = self.sampler()
        tokens = sampling.texts.sample(
            ema,
            self.network,
            settings,
            sampling.texts.origins_of(config.seed, len(known[0])),
            known,
            knobs=sampling.Knobs(config.top_p, config.temperature),
            bos_id=self.tokenizer.bos_id,
            stride=config.stride or None,
            mesh=self.mesh,
        ).tokens
        texts = [self.tokenizer.decode(row) for row in tokens]
        whole = "\n\n".join(f"--- {i + 1} ---\n{text}" for i, text in enumerate(texts)) + "\n"
        if self.primary:
            path = self._texts(step)
            path.parent.mkdir(exist_ok=True)
            aside = path.with_suffix(".tmp")  # renamed when complete, so that a kill leaves no partial file
            aside.write_text(whole, encoding="utf-8")
            aside.replace(path)
            self.writer.write_texts(step, {"samples": whole})
        self.say(f"step {step:,}: {settings.n_steps}-step sample: {' '.join(texts[0].split())[:160]} ...")
        return texts[0]

    def finish(self, step: int, ema: Any) -> None:
        """Evaluates and samples a last time, and prints the results and their paths."""
        seconds = time.monotonic() - self._started
        result = self.evaluate(step, ema)
        text = self.sample(step, ema)
        tokens = (step - self._first) * self.config.train.batch_size * self.network.length
        rate = f", {tokens / seconds:,.0f} tokens/s with evaluations" if tokens else ""
        self.say(
            f"\nDone: {step:,} steps, {step - self._first:,} of them now in {seconds / 60:.1f} min{rate}.\n"
            f"  held-out   {describe(result, self.levels)}\n"
            f"  plot       {self.workdir / workdir_lib.PICTURE}\n"
            f"  samples    {self.workdir / workdir_lib.SAMPLES}\n"
            f"  checkpoint {self.workdir / checkpoint.FOLDER / str(step)}\n"
            f"\nA text sampled in {self.config.sample.n_steps} steps:\n\n{text}\n"
        )


def describe(result: likelihood.Likelihood, levels: Mapping[str, float]) -> str:
    """Returns a line such as `PPL 60.12 ± 0.60 (NLL 4.0963 ± 0.0100 nats/token, BPD 5.9097; unigram 213.0, uniform 512.0)`.

    If the noise is known, it follows the NLL: `± 0.0100 nats/token, 0.0030 by the noise`.
    """
    known = not math.isnan(result.stderr)
    ppl, nll = (
        f" ± {error}" if known else "" for error in (f"{result.ppl * result.stderr:.2f}", f"{result.stderr:.4f}")
    )
    noise = "" if math.isnan(result.noise) else f", {result.noise:.4f} by the noise"
    beside = ", ".join(f"{name} {level:,.1f}" for name, level in levels.items())
    return f"PPL {result.ppl:.2f}{ppl} (NLL {result.nll:.4f}{nll} nats/token{noise}, BPD {result.bpd:.4f}; {beside})"
