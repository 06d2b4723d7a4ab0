"""Each algorithm trains from the command's own entry: its loss falls, and its checkpoint evaluates."""

import json
import shutil

import jax
import numpy as np
import pytest
from helpers import make_config, tiny_settings, trained_settings

import duo_jax
from duo_jax import config as config_lib
from duo_jax.errors import UserError
from duo_jax.training import checkpoint, loop, partition, writers

STEPS = 50
CHANGES = {
    "duo full": {"algo.name": "duo", "algo.curriculum.end": STEPS // 2},
    "duo topk": {"algo.name": "duo", "algo.curriculum.end": STEPS // 2, "algo.curriculum.kind": "topk"},
    "mdlm": {"algo.name": "mdlm"},
    "sedd": {"algo.name": "sedd"},
    "d3pm": {"algo.name": "d3pm"},
    "ar": {"algo.name": "ar"},
}


def settings_for(text_folder, name):
    # No samples: what a sampler makes of each algorithm is tested elsewhere.
    quick = {"train.steps": STEPS, "eval.every": 0, "sample.every": 0, "eval.batches": 2, "checkpoint.every": STEPS}
    return {**tiny_settings(text_folder), "train.batch_size": 16, "train.log_every": 10, **quick, **CHANGES[name]}


def losses(config, steps, workdir, until=None):
    """Takes train steps as the loop does; returns their losses and how often the step was compiled."""
    with loop.Run.open(config, str(workdir)) as run:
        initial, step, _ = loop.compile_step(config, run.network, run.mesh)
        state, values = initial(run.start_from()), []
        for _ in range(steps):
            state, metrics = step(state, partition.put(next(run.batches), run.mesh))
            values.append(float(metrics["loss"]))
        return np.array(values), step._cache_size(), state


@pytest.mark.parametrize("name", CHANGES)
def test_an_algorithm_trains(text_folder, tmp_path, name):
    values, compiled, _ = losses(make_config(settings_for(text_folder, name)), STEPS, tmp_path)
    assert np.isfinite(values).all()
    # The curriculum's loss and the discrete one are not on one scale: Duo is judged within its first phase.
    values = values[: STEPS // 2] if name.startswith("duo") else values
    fifth = len(values) // 5
    assert values[-fifth:].mean() < 0.97 * values[:fifth].mean()
    assert compiled == 1, "the end of the curriculum compiles nothing anew"


def test_distillation_starts_from_a_trained_network_and_renews_its_teacher(trained, text_folder, tmp_path):
    settings = {
        **trained_settings(text_folder),
        "algo.name": "dcd",
        "init_from": str(trained),
        "algo.distillation.round_length": 10,
        "algo.distillation.n_steps": 8,
        "algo.gamma_min": -4.0,
        "algo.gamma_max": 0.0,
        "train.lr": 1e-3,
    }
    start, _ = checkpoint.read(trained)
    constant = {"algo.distillation.round_length": 1000, "algo.distillation.n_steps": 4, "train.warmup": 0}
    values, _, _ = losses(make_config({**settings, **constant, "model.dropout": 0.0}), 60, tmp_path)
    assert values[-20:].mean() < 0.97 * values[:20].mean(), "with a constant dt and teacher the divergence falls"
    values, compiled, state = losses(make_config(settings), 9, tmp_path)
    assert (values > 0).all()  # a divergence, and dropout keeps student and teacher apart
    assert compiled == 1
    jax.tree.map(np.testing.assert_array_equal, state.teacher, start.weights)
    assert not np.array_equal(state.params["head"]["kernel"], start.weights["head"]["kernel"])
    _, _, state = losses(make_config(settings), 10, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, state.teacher, state.ema)


def test_distillation_resumes_with_its_teacher(trained, text_folder, tmp_path):
    settings = {
        **trained_settings(text_folder),
        "algo.name": "dcd",
        "init_from": str(trained),
        "algo.distillation.round_length": 6,
        "train.steps": 10,
        "eval.every": 0,
        "sample.every": 0,
    }
    loop.train(make_config(settings), str(tmp_path / "whole"))
    loop.train(make_config({**settings, "train.steps": 5}), str(tmp_path / "parts"))
    loop.train(make_config(settings), str(tmp_path / "parts"))
    one, two = (checkpoint.read(tmp_path / name, ema=False)[0] for name in ("whole", "parts"))
    jax.tree.map(np.testing.assert_array_equal, one.weights, two.weights)
    assert one.network.algo == "dcd"
    assert writers.read_jsonl(tmp_path / "parts" / "metrics.jsonl")[-1]["heldout/ppl"] > 1


def test_a_network_is_trained_on_with_other_text_and_its_own_tokenizer(trained, tmp_path):
    """Also after the run that it came from is gone."""
    run = tmp_path / "base"
    shutil.copytree(trained, run)
    text = tmp_path / "other.jsonl"
    text.write_text(
        "\n".join(json.dumps({"body": f"The river {i} lies in the north of the country."}) for i in range(400))
    )
    settings = {
        **trained_settings(tmp_path), "data.path": str(text), "data.field": "body",
        "data.tokenizer": str(run / "tokenizer"), "init_from": str(run), "train.steps": 10, "sample.every": 0,
    }  # fmt: skip
    loop.train(make_config(settings), str(tmp_path / "on"))
    run.rename(tmp_path / "gone")
    loop.train(make_config({**settings, "train.steps": 20}), str(tmp_path / "on"))
    before, after = duo_jax.load(trained), duo_jax.load(tmp_path / "on")
    sentence = "The river 7 lies in the north of the country."
    assert duo_jax.score(after, sentence, n_samples=64).nll < duo_jax.score(before, sentence, n_samples=64).nll - 0.5


@pytest.mark.parametrize("ema", [True, False])
def test_which_weights_a_run_starts_from_is_told(trained, text_folder, tmp_path, capsys, ema):
    duo_jax.export(duo_jax.load(trained, ema=ema), tmp_path / "out")
    settings = {**trained_settings(text_folder), "init_from": str(tmp_path / "out")}
    with loop.Run.open(make_config(settings), str(tmp_path / "run")) as run:
        jax.tree.map(np.testing.assert_array_equal, run.start_from(), checkpoint.read(trained, ema=ema)[0].weights)
    kind = "EMA" if ema else "last"
    assert f"Starting from the {kind} weights in {tmp_path / 'out'}." in capsys.readouterr().out


def test_another_tokenizer_of_the_same_size_is_refused(trained, tmp_path):
    (tmp_path / "text.jsonl").write_text(
        "\n".join(json.dumps({"text": f"Nous sommes {i} et bien d'autres, quelque part."}) for i in range(400))
    )
    settings = {**trained_settings(tmp_path), "data.bpe_size": 300, "init_from": str(trained)}
    with loop.Run.open(make_config(settings), str(tmp_path / "run")) as run:
        assert run.network.vocab_size == 300
        with pytest.raises(
            UserError, match=r"its tokenizer is another one\. Use it here too, --config\.data\.tokenizer="
        ):
            run.start_from()


def test_what_does_not_fit_is_refused(trained, text_folder, tmp_path):
    base = {**tiny_settings(text_folder), "algo.name": "dcd"}
    with pytest.raises(UserError, match=r"give its workdir as config\.init_from"):
        config_lib.check(make_config(base))
    with pytest.raises(UserError, match="dim is 64, there 32"):
        loop.train(make_config({**base, "init_from": str(trained), "model.dim": 64}), str(tmp_path / "a"))
    # Before the data are prepared, which may take hours.
    nowhere = {
        "init_from": str(trained),
        "model.dim": 64,
        "data.path": str(tmp_path / "no.jsonl"),
        "data.bpe_size": 310,
    }
    with pytest.raises(UserError, match=r"dim is 64, there 32.*Use the settings that it was trained with"):
        loop.train(make_config({**base, **nowhere}), str(tmp_path / "a"))
    with pytest.raises(UserError, match="algo is ar, there duo_base"):
        loop.train(make_config({**base, "init_from": str(trained), "algo.name": "ar"}), str(tmp_path / "b"))
    with pytest.raises(UserError, match="does not exist"):
        loop.train(make_config({**base, "init_from": str(tmp_path / "nothing")}), str(tmp_path / "c"))
    settings = {**base, "init_from": str(trained), "model.blocks": 2, "algo.gamma_min": 1.0, "algo.gamma_max": 0.0}
    with pytest.raises(UserError, match=r"gamma_min = 1\.000 must lie below"):
        loop.train(make_config(settings), str(tmp_path / "d"))
