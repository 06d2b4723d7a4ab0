"""All settings, with their defaults and meanings.

The files in `configs/` start from `default()` and change only what their recipe needs. On the command line, a setting is
overridden as `--config.train.steps=1000`. `check` refuses impossible values with one sentence before any work begins.

The knobs that papers rarely explain:

* **schedule** `alpha_t` is the share of a token that is still signal. `log_linear` is `alpha = 1 - (1-eps) t`; with
  `algo.eps = 1e-3`, `alpha_1` is 1e-3 rather than 0, so that `log alpha`, an input of the network, stays finite.
* **eps_t**: times are drawn from `[eps_t, 1]`; the nearly clean texts below it have little loss and a large variance.
  docs/evaluation.md tells what a bound lacks for it.
* **EMA**: the average of the parameters over about `1/(1-ema)` steps; evaluation and sampling use it. It warms up as
  `min(ema, (1+n)/(10+n))`, so short runs may keep the long-run value, but a run much shorter than `1/(1-ema)` steps
  needs a smaller one (0.999 for 5,000 steps).
* **gamma range**: Duo's curriculum and distillation run on the Gaussian side, where gamma_t moves from `gamma_min` to
  `gamma_max` and alpha_t = T(gamma_t) falls; T depends on the vocabulary's size. The paper's [-3.55, -1.85] at K = 50,257
  means alpha from 0.945 to 0.049: outside it, text is nearly clean or nearly noise and teaches little. If the range is
  left empty, as in the recipes, it is computed for the vocabulary from `alpha_max` and `alpha_min`; a range that is given
  fits one vocabulary only.
* **tau**: in the curriculum the network reads softmax(w_t / tau) instead of the one-hot argmax. A larger tau makes the
  task easier and further from the real one; at 1e-3 only near ties are visible.
* **T, dt**: distillation compares the network at times t and t - dt. dt starts at 1/T (`n_steps` = 512) and doubles every
  `round_length` steps, so each round teaches steps twice as long as the one before; the teacher is renewed at each round.
* **noise removal**: the last step of sampling, when a little noise is left: `ancestral` draws from the posterior at
  `alpha = 1`, `greedy` takes the most probable token (cleaner and less diverse), `none` leaves the noise in.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from duo_jax.errors import UserError

MODES = ("train", "eval", "sample")
ALGORITHMS = ("duo", "duo_base", "dcd", "mdlm", "sedd", "d3pm", "ar")
# Equal to `diffusion.operators.NAMES`, as a test checks: diffusion/ and this file do not import each other.
OPERATORS = ("exact", "series", "sigmoid", "sigmoid-edge-corrected", "poly3", "poly5", "poly7", "poly9")
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
PACKINGS = ("packed", "padded")
SAMPLERS = ("ancestral", "psi", "ancestral_cache", "analytic", "autoregressive")
NOISE_REMOVALS = ("ancestral", "greedy", "none")

# The settings, and groups of settings, that may change when a run resumes; all others must stay as they were.
FREE_ON_RESUME = (
    "mode", "distributed", "train.steps", "train.lr", "train.warmup", "train.accumulate", "train.log_every",
    "eval", "sample", "checkpoint",
    "mesh", "data.dir", "data.path", "data.workers", "model.head_mib", "model.attention", "model.remat", "model.scan",
    "init_from",
)  # fmt: skip
# Those that change what is learnt from then on, and are therefore printed.
ANNOUNCED_ON_RESUME = ("train.lr", "train.warmup", "train.accumulate")


def default() -> ConfigDict:
    """Returns a fresh, unlocked config with the recipe of the paper's OpenWebText run (`small`, 1M steps)."""
    config = ConfigDict()
    config.mode = "train"  # train | eval | sample
    config.seed = 0  # seeds initialisation, data order, noise and dropout
    # Type of the matrix products in the blocks and the head: float32 | bfloat16 | float16 (loss scaled) | auto (by device).
    # Parameters, norms, softmaxes and losses are float32. Accelerators round the factors of float32 products to TF32 or
    # bfloat16 unless JAX_DEFAULT_MATMUL_PRECISION=highest is set.
    config.precision = "auto"

    config.init_from = ""  # a workdir or checkpoint whose EMA weights training starts from; needed by dcd

    config.algo = ConfigDict()
    # duo: curriculum, then the discrete NELBO | duo_base: the discrete NELBO throughout | dcd: few-step distillation of a
    # trained Duo (see init_from) | baselines: mdlm, sedd, d3pm (absorbing state), ar (autoregressive)
    config.algo.name = "duo"
    config.algo.schedule = "log_linear"  # alpha_t: log_linear | cosine
    config.algo.eps = 1e-3  # alpha at t = 1
    config.algo.eps_t = 1e-3  # smallest t drawn in training and evaluation
    config.algo.gamma_min = config_dict.placeholder(float)  # range of gamma_t; empty: from alpha_max, alpha_min
    config.algo.gamma_max = config_dict.placeholder(float)
    config.algo.alpha_max = 0.945
    config.algo.alpha_min = 0.049
    config.algo.operator = "exact"  # T(gamma): exact | series | sigmoid | sigmoid-edge-corrected | poly3 | 5 | 7 | 9
    config.algo.d3pm_steps = 1_000  # T of D3PM's chain

    config.algo.curriculum = ConfigDict()  # for duo
    config.algo.curriculum.kind = "full"  # full: the whole softmax (paper I) | topk: its k largest entries (paper II)
    config.algo.curriculum.start = 0  # steps between which tau anneals
    config.algo.curriculum.end = 500_000  # from here on the discrete NELBO
    config.algo.curriculum.tau_log10_start = -3.0
    config.algo.curriculum.tau_log10_end = -3.0
    config.algo.curriculum.k = 5  # for topk

    config.algo.distillation = ConfigDict()  # for dcd
    config.algo.distillation.dt = "doubling"  # doubling: 2^round / T | linear: from dt_start to dt_end over all steps
    config.algo.distillation.round_length = 10_000  # steps after which the teacher is renewed
    config.algo.distillation.n_steps = 512  # T
    config.algo.distillation.dt_start = 1e-3
    config.algo.distillation.dt_end = 0.25
    config.algo.distillation.kl = "backward"  # backward: KL(student || teacher) | forward: KL(teacher || student)
    config.algo.distillation.teacher = "ema"  # what the teacher becomes at each round: ema | student

    config.model = ConfigDict()
    config.model.size = "small"  # nano | tiny | small | medium; the four below override it
    config.model.dim = config_dict.placeholder(int)
    config.model.blocks = config_dict.placeholder(int)
    config.model.heads = config_dict.placeholder(int)
    config.model.cond_dim = config_dict.placeholder(int)
    config.model.length = 1024  # tokens in a row, BOS and EOS included
    config.model.dropout = 0.1  # on the two residual branches of every block
    config.model.attention = "auto"  # auto | xla | cudnn
    # MiB of logits that a device computes at once; empty: 160 on a CPU, so that they fit its caches, and 1/32 of the memory
    # of an accelerator
    config.model.head_mib = config_dict.placeholder(int)
    # What the backward pass recomputes to save memory: none | dots (all but matrix products) | blocks (all but the inputs
    # of the blocks)
    config.model.remat = "none"
    config.model.scan = False  # the blocks as one loop, which compiles in the time of one block

    config.data = ConfigDict()
    config.data.source = "wiki"  # wiki | text | openwebtext | lm1b
    config.data.path = ""  # local files for `text`, or a local copy of a hub data set
    config.data.field = "text"  # the text's field in its .jsonl or .parquet rows
    # gpt2 | bert-base-uncased | bpe (trained on the training split) | a path: a run's WORKDIR/tokenizer, a Hugging Face
    # tokenizer.json (byte-level BPE or word pieces), or another BERT vocab.txt
    config.data.tokenizer = "gpt2"
    config.data.bpe_size = 512  # vocabulary of `bpe`, special tokens included
    config.data.dir = "data"  # where token shards are kept, one folder per data set
    config.data.packing = "packed"  # packed: documents joined and cut | padded: one document per row
    config.data.workers = 0  # grain worker processes; 0 reads in threads

    config.train = ConfigDict()
    config.train.steps = 1_000_000
    config.train.batch_size = 512  # rows per step, over all devices
    config.train.accumulate = 1  # parts into which a step's rows are split, computed one after the other to save memory
    config.train.lr = 3e-4
    config.train.warmup = 2_500  # steps of linear warm-up, constant afterwards
    config.train.beta1 = 0.9
    config.train.beta2 = 0.999
    config.train.adam_eps = 1e-8
    config.train.weight_decay = 0.0
    config.train.clip = 1.0  # global gradient norm
    config.train.ema = 0.9999
    config.train.log_every = 100

    config.eval = ConfigDict()
    config.eval.every = 10_000  # 0: only at the end
    config.eval.batch_size = 512
    config.eval.batches = 0  # held-out batches to evaluate; 0: all of them
    # Draws of times and noise per batch. A diffusion network's bound is noisy: over 84,000 tokens by about 0.03 nats with
    # one draw and 0.008 with 16. `ar` is exact. With two draws or more, reports state the noise.
    config.eval.draws = 1
    # For mode = eval: evaluate on all of this text (a file or folder; zero-shot) instead of the run's held-out split
    config.eval.path = ""
    config.eval.field = "text"  # the text's field in its .jsonl or .parquet rows
    config.eval.detokenizer = "none"  # none | ptb | wikitext | lm1b | lambada | scientific_papers
    config.eval.document_ends = True  # put EOS after each of its documents; published zero-shot figures do not

    config.sample = ConfigDict()
    config.sample.every = 10_000  # 0: only at the end
    config.sample.n_steps = 128
    config.sample.batch_size = 4  # texts sampled together; bounds the memory
    config.sample.num = 0  # for mode = sample: texts in all; 0: one batch
    config.sample.length = config_dict.placeholder(int)  # empty: the network's length; longer texts grow in strides
    config.sample.stride = 0  # new tokens per window of such a text; 0: half the network's length
    config.sample.sampler = "ancestral"  # ancestral | psi | ancestral_cache | analytic | autoregressive
    config.sample.noise_removal = "ancestral"  # ancestral | greedy | none
    config.sample.top_p = 1.0  # nucleus: a token is kept if the probabilities above its own sum to at most this
    config.sample.temperature = 1.0  # below 1 makes probable tokens more probable
    config.sample.prompt = ""  # how the texts begin
    config.sample.negative_prompt = ""  # for mode = sample: guidance leads away from this instead of from no prompt
    config.sample.trajectory = False  # for mode = sample: also keep every step, and write a page to replay them
    config.sample.infill = ""  # a text with gaps to fill, each written ___
    config.sample.guidance = 1.0  # for mode = sample: above 1 leads away from predictions without the prompt; 1: off
    config.sample.early_stop = 0  # a uniform-state text is finished after this many steps without a change; 0: never
    config.sample.seed = 0

    config.sample.psi = ConfigDict()  # for psi: kappa modes such as max-capped-0.02; see docs/sampling.md
    config.sample.psi.high = "max-capped-0.02"
    config.sample.psi.middle = "max-capped-0.02"
    config.sample.psi.low = "max-capped-0.02"
    config.sample.psi.high_frac = 0.0  # shares of the time grid
    config.sample.psi.middle_frac = 0.0
    config.sample.psi.time_profile = "linear"  # linear | linear-constant-linear-C | linear-constant-linear-C-inv

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 5_000
    config.checkpoint.keep = 2  # number of newest checkpoints to keep; older ones are deleted

    config.distributed = False  # several hosts: each runs the same command, and JAX finds the others (README)

    config.mesh = ConfigDict()
    config.mesh.data = -1  # devices that split the batch; -1: all the remaining ones
    config.mesh.fsdp = 1  # devices that also split parameters, EMA and optimizer state
    return config


def flatten(config: ConfigDict | Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns `{"train.steps": 1000, ...}` for a nested config."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict | Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _differences(old: Mapping[str, Any], new: ConfigDict) -> dict[str, tuple[Any, Any]]:
    """Returns `{key: (before, after)}`; a setting that the version of `old` did not have counts as its default."""
    before, after = flatten(default()) | flatten(old), flatten(new)
    return {
        key: (before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    }


def changed(old: Mapping[str, Any], new: ConfigDict) -> list[str]:
    """Returns `"config.name was A, is B"` for each setting that must not change when a checkpoint of `old` is resumed."""
    differences = {key: f"config.{key} was {a}, is {b}" for key, (a, b) in _differences(old, new).items()}
    refused = [
        text
        for key, text in differences.items()
        if not any(key == free or key.startswith(free + ".") for free in FREE_ON_RESUME)
    ]
    if "train.steps" in differences and new.algo.name == "dcd" and new.algo.distillation.dt == "linear":
        refused.append(f"{differences['train.steps']}, over which config.algo.distillation.dt = linear is stretched")
    return refused


def announced(old: Mapping[str, Any], new: ConfigDict) -> list[str]:
    """Returns `"config.name changes from A to B"` for each setting that may change, but changes what is learnt."""
    return [
        f"config.{key} changes from {before} to {after}"
        for key, (before, after) in _differences(old, new).items()
        if key in ANNOUNCED_ON_RESUME
    ]


def check_names(config: Any) -> None:
    """Raises UserError if a config lacks a setting or has one that does not exist, usually a typing mistake."""
    known = flatten(default()).keys()
    has = flatten(config).keys() if isinstance(config, ConfigDict) else set()
    if strange := sorted(has - known):
        near = difflib.get_close_matches(strange[0], known, n=1)
        raise UserError(
            f"the config sets {strange[0]}, which is no setting{f'; did you mean {near[0]}?' if near else '.'}"
        )
    if missing := sorted(known - has):
        raise UserError(f"the config lacks {', '.join(missing[:3])}; start from duo_jax.config.default().")


# The allowed values of the settings that are names.
_CHOICES = {
    "mode": MODES,
    "precision": PRECISIONS,
    "algo.name": ALGORITHMS,
    "algo.schedule": ("log_linear", "cosine"),
    "algo.operator": OPERATORS,
    "algo.curriculum.kind": ("full", "topk"),
    "algo.distillation.dt": ("doubling", "linear"),
    "algo.distillation.kl": ("backward", "forward"),
    "algo.distillation.teacher": ("ema", "student"),
    "model.attention": ("auto", "xla", "cudnn"),
    "model.remat": ("none", "dots", "blocks"),
    "data.packing": PACKINGS,
    "sample.sampler": SAMPLERS,
    "sample.noise_removal": NOISE_REMOVALS,
}
# The allowed ranges of numbers, in code and in words; an empty setting is always allowed.
_RANGES: tuple[tuple[Callable[[float], bool], str, tuple[str, ...]], ...] = (
    (lambda x: x >= 1, "it must be at least 1", (
        "train.steps", "train.batch_size", "train.accumulate", "train.log_every", "eval.batch_size", "eval.draws",
        "sample.n_steps", "sample.batch_size", "sample.length", "checkpoint.every", "checkpoint.keep", "mesh.fsdp",
        "model.head_mib", "algo.curriculum.k", "algo.d3pm_steps", "algo.distillation.round_length",
        "algo.distillation.n_steps",
    )),
    (lambda x: x >= 3, "a row needs BOS, EOS and a token: at least 3", ("model.length",)),
    (lambda x: x >= 0, "it must not be negative", (
        "algo.curriculum.start", "algo.curriculum.end", "algo.distillation.dt_start", "algo.distillation.dt_end",
        "train.warmup", "eval.every", "eval.batches", "sample.every", "train.weight_decay", "data.workers", "sample.num",
        "sample.stride", "sample.early_stop",
    )),
    (lambda x: 0 <= x < 2**32, "it must be from 0 to 2^32 - 1", ("seed", "sample.seed")),
    (lambda x: 0 <= x < 1, "it must be in [0, 1)", ("model.dropout", "train.ema", "train.beta1", "train.beta2")),
    (lambda x: 0 < x < 1, "it must be strictly between 0 and 1", ("algo.eps", "algo.eps_t")),
    (lambda x: x > 0, "it must be positive", ("train.lr", "train.clip", "train.adam_eps", "sample.temperature")),
    (lambda x: 0 < x <= 1, "it must be in (0, 1], where 1 keeps every token", ("sample.top_p",)),
    (lambda x: x == -1 or x > 0, "give a number of devices, or -1 for all the remaining ones", ("mesh.data",)),
)  # fmt: skip


def check(config: ConfigDict) -> None:
    """Checks all that can be checked without data or devices.

    Raises:
        UserError: a name or value cannot work.
    """
    check_names(config)
    flat = flatten(config)
    for name, allowed in _CHOICES.items():
        if flat[name] not in allowed:
            raise UserError(f"config.{name} is {flat[name]!r}; choose one of {', '.join(allowed)}.")
    for name, value in flat.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"config.{name} is {value}; it must be a finite number.")
    for fits, advice, names in _RANGES:
        for name in names:
            if flat[name] is not None and not fits(flat[name]):
                raise UserError(f"config.{name} is {flat[name]}; {advice}.")
    _check_together(config)


def _check_together(config: ConfigDict) -> None:
    """Raises UserError if two settings contradict each other."""
    if config.train.batch_size % config.train.accumulate:
        raise UserError(
            f"config.train.batch_size = {config.train.batch_size} must be a multiple of config.train.accumulate = "
            f"{config.train.accumulate}, the number of parts it is split into."
        )
    distil = config.algo.distillation
    if distil.dt == "linear" and not 0 < distil.dt_start <= distil.dt_end <= 1:
        raise UserError(
            f"config.algo.distillation.dt_start = {distil.dt_start} and dt_end = {distil.dt_end} must rise within (0, 1]."
        )
    if config.algo.name == "d3pm" and config.algo.schedule != "log_linear":
        raise UserError(
            f"config.algo.schedule is {config.algo.schedule!r}, but the chain of d3pm is defined for alpha = 1 - t only; "
            "leave it at log_linear."
        )
    if config.sample.prompt and config.sample.infill:
        raise UserError(
            "config.sample.prompt and config.sample.infill are both given; write the prompt into infill, followed by ___."
        )
    if config.sample.sampler != "psi":
        usual = flatten(default().sample.psi)
        if idle := [key for key, value in flatten(config.sample.psi).items() if value != usual[key]]:
            raise UserError(
                f"config.sample.psi.{idle[0]} is set, but config.sample.sampler is {config.sample.sampler!r}; choose psi."
            )
    if config.data.field != default().data.field and not config.data.path:
        raise UserError(
            "config.data.field is set, but config.data.path is empty; give the path of the text that has this field (to "
            "evaluate on another text, set config.eval.path and config.eval.field)."
        )
    if not config.eval.path:
        usual = flatten(default().eval)
        if idle := [key for key in ("field", "detokenizer", "document_ends") if config.eval[key] != usual[key]]:
            raise UserError(
                f"config.eval.{idle[0]} is set, but config.eval.path is empty; give the path of the text it applies to."
            )
    if config.algo.curriculum.end < config.algo.curriculum.start:
        raise UserError("config.algo.curriculum.end is before config.algo.curriculum.start; give the steps in order.")
    if config.mode == "train" and config.algo.name == "dcd" and not config.init_from:
        raise UserError(
            "config.algo.name is 'dcd', which distils a trained network; give its workdir as config.init_from."
        )
