"""Every recipe parses, passes its checks and can be trained, without its data being there."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from helpers import ROOT

from duo_jax import config as config_lib
from duo_jax import gaussian, objectives
from duo_jax.data import tokenizers
from duo_jax.diffusion import operators
from duo_jax.errors import UserError
from duo_jax.models.network import Network, count
from duo_jax.training import optimizer, state

MILLIONS = {
    "owt": 170,
    "lm1b": 139,
    "tiny": 34,
    "quickstart": 1,
    "distill_owt": 170,
    "few_step": 3.95,
    "quickstart_distill": 3.95,
}


def get_config(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_a_recipe_traces(path):
    config = get_config(path)
    if config.algo.name == "dcd":
        with pytest.raises(UserError, match="init_from"):
            config_lib.check(config)
        config.init_from = "somewhere"
    config_lib.check(config.lock())
    network = Network.from_config(config, tokenizers.vocab_size(config.data.tokenizer, config.data.bpe_size))
    adam = optimizer.create(config.train)
    before = jax.eval_shape(lambda: state.create(network, adam, 0))
    shape = (config.train.batch_size, config.model.length)
    batch = {"tokens": jax.ShapeDtypeStruct(shape, jnp.int32), "mask": jax.ShapeDtypeStruct(shape, jnp.float32)}
    make_loss = objectives.training_loss(config, network)
    after, metrics = jax.eval_shape(
        lambda s, b: state.train_step(s, b, make_loss=make_loss, optimizer=adam, ema=config.train.ema), before, batch
    )
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), before)
    assert metrics["loss"].shape == ()
    assert count(before.params) == pytest.approx(
        MILLIONS[path.stem] * 1e6, rel=0.2 if path.stem == "quickstart" else 0.02
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "trian"}, "config.mode is 'trian'; choose one of train"),
        ({"sample.psi.low": "pure-pc"}, "config.sample.psi.low is set, but config.sample.sampler is 'ancestral'"),
        ({"train.steps": 0}, "config.train.steps is 0; it must be at least 1"),
        ({"sample.top_p": 0.0}, "config.sample.top_p"),
        ({"model.dropout": 1.0}, "config.model.dropout"),
        ({"algo.eps": 0.0}, "config.algo.eps"),
        ({"model.length": 2}, "at least 3"),
        ({"train.lr": 0.0}, "config.train.lr is 0.0; it must be positive"),
        ({"algo.schedule": "linear"}, "choose one of log_linear, cosine"),
        ({"mesh.data": 0}, "config.mesh.data"),
        ({"eval.detokenizer": "ptb"}, "config.eval.detokenizer is set, but config.eval.path is empty"),
        ({"eval.batches": -1}, "config.eval.batches"),
        ({"train.lr": float("nan")}, "must be a finite number"),
        ({"algo.curriculum.start": -5}, "must not be negative"),
        ({"sample.length": -1}, "config.sample.length is -1; it must be at least 1"),
        ({"seed": 2**63}, "config.seed is 9223372036854775808; it must be from 0 to 2\\^32 - 1"),
        ({"sample.seed": -1}, "config.sample.seed is -1; it must be from 0"),
        ({"train.accumulate": 3}, "config.train.batch_size = 512 must be a multiple of config.train.accumulate = 3"),
        ({"sample.prompt": "The", "sample.infill": "The ___"}, "config.sample.infill are both given"),
        ({"algo.curriculum.start": 5, "algo.curriculum.end": 4}, "config.algo.curriculum.end is before"),
        ({"algo.distillation.dt": "linear", "algo.distillation.dt_end": 3.0}, "must rise within \\(0, 1\\]"),
        ({"algo.name": "d3pm", "algo.schedule": "cosine"}, "config.algo.schedule is 'cosine', but the chain of d3pm"),
    ],
)
def test_impossible_values_are_refused(settings, message):
    config = config_lib.default()
    config.update_from_flattened_dict(settings)
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        config_lib.check(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model.size": "huge"}, "choose one of nano"),
        ({"model.heads": 5}, "multiple of twice"),
        ({"model.dim": 12, "model.heads": 4}, "multiple of twice"),
        ({"model.dim": 0}, "dim is 0"),
    ],
)
def test_impossible_networks_are_refused(settings, message):
    config = config_lib.default()
    config.update_from_flattened_dict(settings)
    with pytest.raises(UserError, match=message):
        Network.from_config(config, 100)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("owt", -3.55, -1.85), ("tiny", -3.55, -1.85), ("lm1b", -3.5, -1.75), ("distill_owt", -4.0, -1.0)],
)
def test_the_papers_range_of_gamma_fits_every_vocabulary(name, low, high):
    config = get_config(ROOT / "configs" / f"{name}.py")
    k = tokenizers.vocab_size(config.data.tokenizer, config.data.bpe_size)
    paper = gaussian.Gaussian.from_config(config, k)
    assert (paper.gamma_min, paper.gamma_max) == (pytest.approx(low, abs=1e-3), pytest.approx(high, abs=1e-3))
    # With another tokenizer the range moves, and the levels of noise that are learnt from stay.
    other = gaussian.Gaussian.from_config(config, 512)
    for t in (0.0, 1.0):
        now, then = (float(side.alpha(jnp.array(t), size)[0]) for side, size in ((other, 512), (paper, k)))
        assert now == pytest.approx(then, rel=1e-3)
    assert other.gamma_min > low + 0.3


def test_the_operators_of_the_config_are_those_of_the_mathematics():
    assert config_lib.OPERATORS == operators.NAMES


def test_what_a_resumed_run_may_change():
    old = config_lib.default()
    new = config_lib.default()
    new.train.steps, new.sample.n_steps, new.mode = 5, 1, "eval"
    assert config_lib.changed(old.to_dict(), new) == []
    assert config_lib.announced(old.to_dict(), new) == []
    new.train.lr, new.train.warmup, new.train.ema, new.data.source = 1e-5, 9, 0.5, "text"
    assert config_lib.changed(old.to_dict(), new) == [
        "config.data.source was wiki, is text",
        "config.train.ema was 0.9999, is 0.5",
    ]
    assert config_lib.announced(old.to_dict(), new) == [
        "config.train.lr changes from 0.0003 to 1e-05",
        "config.train.warmup changes from 2500 to 9",
    ]
    # A checkpoint from before a setting existed had its default.
    before = old.to_dict()
    del before["train"]["clip"]
    assert config_lib.changed(before, config_lib.default()) == []


def test_the_steps_over_which_dt_grows_are_fixed():
    old, new = config_lib.default(), config_lib.default()
    for config in (old, new):
        config.algo.name = "dcd"
    new.train.steps = 5
    assert config_lib.changed(old.to_dict(), new) == []
    for config in (old, new):
        config.algo.distillation.dt = "linear"
    (refused,) = config_lib.changed(old.to_dict(), new)
    assert refused.startswith("config.train.steps was 1000000, is 5, over which config.algo.distillation.dt = linear")


@pytest.mark.parametrize(("lr", "warmup"), [(1e-3, 0), (1e-5, 7)])
def test_what_may_change_leaves_the_optimizers_state_as_it_is(lr, warmup):
    config, weights = config_lib.default().train, {"w": jnp.zeros((2, 3))}
    before = jax.tree.map(jnp.shape, optimizer.create(config).init(weights))
    config.lr, config.warmup = lr, warmup
    assert jax.tree.map(jnp.shape, optimizer.create(config).init(weights)) == before
