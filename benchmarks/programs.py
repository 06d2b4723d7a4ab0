"""The programs that are measured: the train step and the sampler, as training and `duo_jax.sample` compile them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from duo_jax import config as config_lib
from duo_jax import sampling
from duo_jax.data import tokenizers
from duo_jax.diffusion.arrays import numbered_keys
from duo_jax.errors import UserError
from duo_jax.models.network import Network
from duo_jax.sampling import engine
from duo_jax.training import loop, partition

# A step that no run reaches: a curriculum that ends there always goes on, and one that ends at 0 is over.
_NEVER = 2**30
PHASES = ("full", "topk", "discrete")


def vocabulary(config: ConfigDict, asked: int | None) -> int:
    """Returns K: as asked, or the size of the config's tokenizer.

    Raises:
        UserError: K leaves no room for two tokens and a mask.
    """
    size = tokenizers.vocab_size(config.data.tokenizer, config.data.bpe_size) if asked is None else asked
    if size < 3:
        raise UserError(f"--vocab_size is {size}; it must be at least 3: two tokens, and one to mask with.")
    return size


def changed(config: ConfigDict, settings: Mapping[str, Any]) -> ConfigDict:
    """Returns a copy of the config with some settings changed, `{"train.batch_size": 8, ...}`."""
    config = copy.deepcopy(config).unlock()
    config.update_from_flattened_dict(dict(settings))
    config_lib.check(_checkable(config))
    return config.lock()


def _checkable(config: ConfigDict) -> ConfigDict:
    """A distillation that is only measured needs no weights to start from."""
    config = copy.deepcopy(config)
    config.init_from = config.init_from or "random weights"
    return config


@dataclasses.dataclass(frozen=True)
class Case:
    """What is trained: an algorithm, and for `duo` the phase: `full` or `topk` curriculum, or `discrete` after it."""

    algo: str
    phase: str | None = None

    @classmethod
    def parse(cls, text: str) -> Case:
        """Returns the case that `duo:topk` or `mdlm` names.

        Raises:
            UserError: there is no case of that name.
        """
        algo, _, phase = text.partition(":")
        if algo not in config_lib.ALGORITHMS or (algo == "duo") != (phase in PHASES) or (algo != "duo" and phase):
            names = ", ".join(map(str, all_cases()))
            raise UserError(f"--cases: there is no case {text!r}; choose from {names}, or all.")
        return cls(algo, phase or None)

    def __str__(self) -> str:
        return self.algo if self.phase is None else f"{self.algo}:{self.phase}"

    def apply(self, config: ConfigDict) -> ConfigDict:
        """Returns the config, changed so that its first step is in this phase."""
        settings: dict[str, Any] = {"algo.name": self.algo}
        if self.phase is not None:
            settings |= {"algo.curriculum.start": 0, "algo.curriculum.end": 0 if self.phase == "discrete" else _NEVER}
        if self.phase in ("full", "topk"):
            settings["algo.curriculum.kind"] = self.phase
        return changed(config, settings)


def all_cases() -> list[Case]:
    """Returns every case there is."""
    duo = [Case("duo", phase) for phase in PHASES]
    return duo + [Case(algo) for algo in config_lib.ALGORITHMS if algo != "duo"]


def usual_cases(config: ConfigDict) -> list[Case]:
    """Returns the cases that a run of the config goes through."""
    if config.algo.name != "duo":
        return [Case(config.algo.name)]
    return [Case("duo", config.algo.curriculum.kind), Case("duo", "discrete")]


def define_flags(usual: Sequence[str]) -> None:
    """Defines `--programs`, which is `usual` if not given, and `--cases`, as `chosen` takes them."""
    flags.DEFINE_list("programs", usual, "Which programs: train, sample.")
    flags.DEFINE_list("cases", [], "What to train, as for benchmarks.train; the config's first phase if not given.")


def chosen(config: ConfigDict, which: Sequence[str], cases: Sequence[str]) -> list[Case | None]:
    """Returns the programs that the flags ask for: cases to train (by default the first phase), and None for sampling.

    Raises:
        UserError: there is no such program or case.
    """
    if unknown := set(which) - {"train", "sample"}:
        raise UserError(f"--programs: there is no program {unknown.pop()!r}; choose from train, sample.")
    training = [Case.parse(name) for name in cases] or usual_cases(config)[:1]
    return [case for case in training if "train" in which] + ([None] if "sample" in which else [])


@dataclasses.dataclass(frozen=True)
class Training:
    """A train step, not compiled yet.

    Attributes:
        network: what is trained.
        mesh: the devices.
        initial: makes the first state; see `loop.compile_step`.
        lowered: the step for a batch of the config's size.
    """

    network: Network
    mesh: Mesh
    initial: Any
    lowered: jax.stages.Lowered


def training(config: ConfigDict, vocab_size: int, devices: Sequence[jax.Device] | None = None) -> Training:
    """Returns the train step of a config on all devices or the given ones, from shapes alone: nothing is allocated.

    Raises:
        UserError: the config describes no network, or a batch that the devices do not divide.
    """
    mesh = partition.create_mesh(config.mesh, devices)
    batch_size = config.train.batch_size
    partition.check_batch(mesh, "train.batch_size", batch_size, config.train.accumulate)
    network = Network.from_config(config, vocab_size)
    initial, step, state = loop.compile_step(config, network, mesh)
    rows = jax.ShapeDtypeStruct((batch_size, network.length), np.int32, sharding=partition.batch_sharding(mesh))
    return Training(network, mesh, initial, step.lower(state, {"tokens": rows, "mask": rows}))


def batch(config: ConfigDict, plan: Training) -> dict[str, jax.Array]:
    """Returns random text on the devices: what a batch holds makes no difference to its cost."""
    shape = (config.train.batch_size, plan.network.length)
    tokens = np.random.default_rng(0).integers(0, plan.network.vocab_size - 1, shape, dtype=np.int32)
    return partition.put({"tokens": tokens, "mask": np.ones(shape, np.int32)}, plan.mesh)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """A sampler, not compiled yet; `lowered` takes `(weights, keys, given, knobs, None)`."""

    network: Network
    settings: sampling.Settings
    rows: NamedSharding
    lowered: jax.stages.Lowered

    @property
    def whole(self) -> NamedSharding:
        """The sharding of what every device holds whole, such as the weights."""
        return NamedSharding(self.rows.mesh, PartitionSpec())

    @property
    def devices(self) -> int:
        """How many devices share the texts."""
        return self.rows.mesh.size


def sampler(config: ConfigDict, vocab_size: int, devices: Sequence[jax.Device] | None = None) -> Sampling:
    """Returns the sampler of `config.sample` on all of this process's devices or the given ones, from shapes alone.

    Raises:
        UserError: a setting that does not fit the network, or a batch that the devices do not divide.
    """
    network, sample_config = Network.from_config(config, vocab_size), config.sample
    settings = sampling.Settings.from_config(sample_config, network)
    mesh = Mesh(np.asarray(jax.local_devices() if devices is None else devices), ("rows",))
    partition.check_batch(mesh, "sample.batch_size", sample_config.batch_size)
    rows, whole = NamedSharding(mesh, PartitionSpec("rows")), NamedSharding(mesh, PartitionSpec())
    weights = jax.eval_shape(network.init, key())
    weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), weights)
    shape = (sample_config.batch_size, _length(config))
    given = engine.Given(*(jax.ShapeDtypeStruct(shape, kind, sharding=rows) for kind in (np.int32, np.bool_)))
    keys = jax.ShapeDtypeStruct(shape[:1], jax.eval_shape(key).dtype, sharding=rows)
    lowered = sampling.sample_tokens.lower(
        weights,
        keys,
        given,
        knobs(config),
        None,
        network=network,
        settings=settings,
        mesh=mesh,
    )
    return Sampling(network, settings, rows, lowered)


def _length(config: ConfigDict) -> int:
    """The length of a text, or of its windows if it is longer than the network's length."""
    return min(config.sample.length or config.model.length, config.model.length)


def key() -> jax.Array:
    """Returns the PRNG key of all random numbers here."""
    return jax.random.key(0)


def keys(config: ConfigDict, plan: Sampling, number: int = 0) -> jax.Array:
    """Returns the keys of the texts of a batch, on the devices; other batches have other numbers."""
    batch = jax.random.fold_in(key(), number)
    return jax.device_put(numbered_keys(batch, config.sample.batch_size), plan.rows)


def knobs(config: ConfigDict) -> engine.Knobs:
    """Returns the sampler's traced settings."""
    return engine.Knobs(config.sample.top_p, config.sample.temperature)


def nothing_given(config: ConfigDict, plan: Sampling) -> engine.Given:
    """Returns texts on the devices without known tokens, except the first for an autoregressive network."""
    given = engine.Given.nothing((config.sample.batch_size, _length(config)))
    if plan.network.algo == "ar":
        given = given.replace(held=given.held.at[:, 0].set(True))
    return jax.device_put(given, plan.rows)


def random_weights(network: Network, sharding: NamedSharding | None = None, *, seed: int = 0) -> Any:
    """Returns random weights on the devices; unlike new ones, whose head is zero, they prefer some tokens."""

    def make(key: jax.Array) -> Any:
        weights = network.init(key)
        leaves, tree = jax.tree.flatten(weights)
        keys = jax.random.split(key, len(leaves))
        noisy = [x + 0.02 * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
        return jax.tree.unflatten(tree, noisy)

    return jax.jit(make, out_shardings=sharding)(jax.random.key(seed))
