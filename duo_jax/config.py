"""Every setting there is, with its default and what it does.

The files in `configs/` start from `default()` and change what their recipe changes, so no recipe is written twice.
A setting is overridden on the command line as `--config.train.steps=1000`. `check` refuses impossible values with one
sentence before any work begins.

The knobs that papers rarely explain:

* **schedule** `alpha_t` is the share of a token that is still signal. `log_linear` makes `alpha = 1 - (1-eps) t`; with
  `algo.eps = 1e-3`, `alpha_1 = 1e-3` and not 0, so that `log alpha`, which the network is told, stays finite.
* **eps_t**: times are drawn from `[eps_t, 1]`; the sliver of nearly clean texts below it has next to no loss and a large
  variance.
* **EMA**: the average of the parameters over about `1/(1-ema)` steps; evaluation and sampling use it. It warms up as
  `min(ema, (1+n)/(10+n))`, so short runs may keep the long-run value, but a run much shorter than `1/(1-ema)` steps is
  better off with a smaller one (0.999 for 5,000 steps).
* **gamma range**: Duo's curriculum and distillation run on the Gaussian side, where gamma_t moves from `gamma_min` to
  `gamma_max` and alpha_t = T(gamma_t) falls; T depends on the vocabulary's size. The paper's [-3.55, -1.85] at K = 50,257
  means alpha from 0.945 to 0.049: what lies outside is nearly clean or nearly noise and teaches little. Left empty, the
  range is found for the vocabulary from `alpha_max` and `alpha_min`, as the recipes do; a range that is given is for one
  vocabulary only.
* **tau**: in the curriculum the network reads softmax(w_t / tau) in place of the one-hot argmax. The larger tau, the
  easier the task and the further it is from the real one; at 1e-3 only near ties are visible.
* **T, dt**: distillation compares the network at times t and t - dt. dt starts at 1/T (`n_steps` = 512) and doubles every
  `round_length` steps, so one round teaches steps twice as long as the one before; the teacher is renewed with it.
* **noise removal**: what happens at the end of sampling, when a little noise is left: `ancestral` draws from the
  posterior at `alpha = 1`, `greedy` takes the most probable token (cleaner and less diverse), `none` leaves it as it is.
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
# As in `diffusion.operators.NAMES`, which the mathematics keeps for itself; a test compares the two.
OPERATORS = ("exact", "series", "sigmoid", "sigmoid-edge-corrected", "poly3", "poly5", "poly7", "poly9")
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
PACKINGS = ("packed", "padded")
SAMPLERS = ("ancestral", "psi", "ancestral_cache", "analytic", "autoregressive")
NOISE_REMOVALS = ("ancestral", "greedy", "none")

# What a run may change when it goes on from a checkpoint; all else must be as it was, or it is another run.
FREE_ON_RESUME = (
    "mode", "distributed", "train.steps", "train.lr", "train.warmup", "train.accumulate", "train.log_every",
    "eval", "sample", "checkpoint",
    "mesh", "data.dir", "data.path", "data.workers", "model.head_mib", "model.attention", "model.remat", "model.scan",
    "init_from",
)  # fmt: skip
# What of this changes what is learnt from then on, and is therefore told.
TOLD_ON_RESUME = ("train.lr", "train.warmup", "train.accumulate")


def default() -> ConfigDict:
    """Returns a fresh, unlocked config with the recipe of the paper's OpenWebText run (`small`, 1M steps)."""
    config = ConfigDict()
    config.mode = "train"  # train | eval | sample
    config.seed = 0  # seeds initialisation, data order, noise and dropout
    # The type of the blocks' and the head's products: float32 | bfloat16 | float16 (loss scaled) | auto (by device).
    # Parameters, norms, softmaxes and losses are float32. An accelerator rounds the factors of float32 products, to TF32
    # or bfloat16, unless JAX_DEFAULT_MATMUL_PRECISION=highest is set.
    config.precision = "auto"

    config.init_from = ""  # a workdir or checkpoint whose EMA weights training starts from; needed by dcd

    config.algo = ConfigDict()
    # duo: curriculum, then the discrete NELBO | duo_base: the discrete NELBO throughout | dcd: few-step distillation of a
    # trained Duo (see init_from) | baselines: mdlm, sedd, d3pm (absorbing state), ar (autoregressive)
    config.algo.name = "duo"
    config.algo.schedule = "log_linear"  # alpha_t: log_linear | cosine
    config.algo.eps = 1e-3  # alpha at t = 1
    config.algo.eps_t = 1e-3  # smallest t drawn in training and evaluation
    config.algo.gamma_min = config_dict.placeholder(float)  # range of gamma_t; empty: found from alpha_max, alpha_min
    config.algo.gamma_max = config_dict.placeholder(float)
    config.algo.alpha_max = 0.945
    config.algo.alpha_min = 0.049
    config.algo.operator = "exact"  # T(gamma): exact | series | sigmoid | sigmoid-edge-corrected | poly3 | 5 | 7 | 9
    config.algo.d3pm_steps = 1_000  # T of D3PM's chain

    config.algo.curriculum = ConfigDict()  # of duo
    config.algo.curriculum.kind = "full"  # full: the whole softmax (paper I) | topk: its k largest entries (paper II)
    config.algo.curriculum.start = 0  # steps between which tau anneals
    config.algo.curriculum.end = 500_000  # from here on the discrete NELBO
    config.algo.curriculum.tau_log10_start = -3.0
    config.algo.curriculum.tau_log10_end = -3.0
    config.algo.curriculum.k = 5  # of topk

    config.algo.distillation = ConfigDict()  # of dcd
    config.algo.distillation.dt = "doubling"  # doubling: 2^round / T | linear: from dt_start to dt_end over all steps
    config.algo.distillation.round_length = 10_000  # steps after which the teacher is renewed
    config.algo.distillation.n_steps = 512  # T
    config.algo.distillation.dt_start = 1e-3
    config.algo.distillation.dt_end = 0.25
    config.algo.distillation.kl = "backward"  # backward: KL(student || teacher) | forward: KL(teacher || student)
    config.algo.distillation.teacher = "ema"  # what the teacher becomes at each round: ema | student

    config.model = ConfigDict()
    config.model.size = "small"  # nano | tiny | small | medium; the four below override what the size says
    config.model.dim = config_dict.placeholder(int)
    config.model.blocks = config_dict.placeholder(int)
    config.model.heads = config_dict.placeholder(int)
    config.model.cond_dim = config_dict.placeholder(int)
    config.model.length = 1024  # tokens in a row, BOS and EOS included
    config.model.dropout = 0.1  # on the two residual branches of every block
    config.model.attention = "auto"  # auto | xla | cudnn
    # MiB for a chunk of logits on a device, as the vocabulary is visited in chunks; empty: 160 on a CPU, whose caches like
    # it small, and a thirty-second of an accelerator's memory
    config.model.head_mib = config_dict.placeholder(int)
    # What the backward pass computes anew to save memory: none | dots (all but matrix products) | blocks (all but what goes
    # from block to block)
    config.model.remat = "none"
    config.model.scan = False  # blocks as one loop: compiles in the time of one block

    config.data = ConfigDict()
    config.data.source = "wiki"  # wiki | text | openwebtext | lm1b
    config.data.path = ""  # local files for `text`, or a local copy of a hub data set
    config.data.field = "text"  # what its .jsonl or .parquet rows call the text
    # gpt2 | bert-base-uncased | bpe (trained on the training split) | a path: of a run's WORKDIR/tokenizer, of a
    # tokenizer.json of Hugging Face (byte-level BPE or word pieces), of another BERT vocab.txt
    config.data.tokenizer = "gpt2"
    config.data.bpe_size = 512  # vocabulary of `bpe`, special tokens included
    config.data.dir = "data"  # where token shards are kept, one folder a data set
    config.data.packing = "packed"  # packed: documents joined and cut | padded: one document a row
    config.data.workers = 0  # grain worker processes; 0 reads in threads

    config.train = ConfigDict()
    config.train.steps = 1_000_000
    config.train.batch_size = 512  # rows of a step, over all devices
    config.train.accumulate = 1  # parts in which a step's rows are computed one after the other, to save memory
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
    # Draws of times and noise for each batch. A diffusion network's bound is noisy: that of 84,000 tokens, drawn once, by
    # about 0.03 nats, which 16 draws make 0.008. `ar` is exact. Reports tell the noise if there is more than one.
    config.eval.draws = 1
    # Of mode = eval, zero-shot: the whole of a text of any origin (a file or folder) in place of the run's held-out split
    config.eval.path = ""
    config.eval.field = "text"  # what its .jsonl or .parquet rows call the text
    config.eval.detokenizer = "none"  # none | ptb | wikitext | lm1b | lambada | scientific_papers
    config.eval.document_ends = True  # put EOS after each of its documents; published zero-shot figures are without

    config.sample = ConfigDict()
    config.sample.every = 10_000  # 0: only at the end
    config.sample.n_steps = 128
    config.sample.batch_size = 4  # texts sampled together; bounds the memory
    config.sample.num = 0  # texts in all, of mode = sample; 0: one batch
    config.sample.length = config_dict.placeholder(int)  # empty: the network's length; longer texts grow in strides
    config.sample.stride = 0  # new tokens a window of such a text; 0: half the network's length
    config.sample.sampler = "ancestral"  # ancestral | psi | ancestral_cache | analytic | autoregressive
    config.sample.noise_removal = "ancestral"  # ancestral | greedy | none
    config.sample.top_p = 1.0  # nucleus: a token is kept if the probabilities above its own sum to at most this
    config.sample.temperature = 1.0  # below 1 makes probable tokens more so
    config.sample.prompt = ""  # how the texts begin
    config.sample.negative_prompt = ""  # of mode = sample: what guidance leads away from instead of no prompt
    config.sample.trajectory = False  # of mode = sample: write the tokens after every step, too
    config.sample.infill = ""  # a text with gaps, ___, to be filled
    config.sample.guidance = 1.0  # of mode = sample: lead away from what is said without the prompt; 1: not at all
    config.sample.early_stop = 0  # steps without a change after which a uniform-state text is finished; 0: never
    config.sample.seed = 0

    config.sample.psi = ConfigDict()  # of psi: kappa modes, as in max-capped-0.02; see docs/sampling.md
    config.sample.psi.high = "max-capped-0.02"
    config.sample.psi.middle = "max-capped-0.02"
    config.sample.psi.low = "max-capped-0.02"
    config.sample.psi.high_frac = 0.0  # shares of the time grid
    config.sample.psi.middle_frac = 0.0
    config.sample.psi.time_profile = "linear"  # linear | linear-constant-linear-C | linear-constant-linear-C-inv

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 5_000
    config.checkpoint.keep = 2  # the newest so many; older ones are deleted

    config.distributed = False  # several hosts: each runs the same command, and JAX finds the others (README)

    config.mesh = ConfigDict()
    config.mesh.data = -1  # devices that split the batch; -1: all that are left
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


def _differences(old: Mapping[str, Any], new: ConfigDict) -> dict[str, str]:
    """Returns `{key: "config.key was A, is B"}`; a setting that the checkpoint's version did not know had its default."""
    before, after = flatten(default()) | flatten(old), flatten(new)
    return {
        key: f"config.{key} was {before.get(key)}, is {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    }


def changed(old: Mapping[str, Any], new: ConfigDict) -> list[str]:
    """Returns `"config.name was A, is B"` for each setting that a run resuming a checkpoint of `old` may not change."""
    differences = _differences(old, new)
    refused = [
        text
        for key, text in differences.items()
        if not any(key == free or key.startswith(free + ".") for free in FREE_ON_RESUME)
    ]
    if "train.steps" in differences and new.algo.name == "dcd" and new.algo.distillation.dt == "linear":
        refused.append(f"{differences['train.steps']}, over which config.algo.distillation.dt = linear is stretched")
    return refused


def told(old: Mapping[str, Any], new: ConfigDict) -> list[str]:
    """Returns the same for each setting that it may change, but that changes what is learnt from there."""
    return [text for key, text in _differences(old, new).items() if key in TOLD_ON_RESUME]


def check_names(config: Any) -> None:
    """Raises UserError unless a config has all settings, and no others, of which most are slips of the pen."""
    known = flatten(default()).keys()
    has = flatten(config).keys() if isinstance(config, ConfigDict) else set()
    if strange := sorted(has - known):
        near = difflib.get_close_matches(strange[0], known, n=1)
        raise UserError(
            f"the config sets {strange[0]}, which is no setting{f'; did you mean {near[0]}?' if near else '.'}"
        )
    if missing := sorted(known - has):
        raise UserError(f"the config lacks {', '.join(missing[:3])}; start from duo_jax.config.default().")


# What those settings may be that are names of something.
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
# What numbers must be, where they are not left empty, in code and in words.
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
    (lambda x: x == -1 or x > 0, "give a number of devices, or -1 for all that are left", ("mesh.data",)),
)  # fmt: skip


def check(config: ConfigDict) -> None:
    """Checks what can be checked without data or devices.

    Raises:
        UserError: one sentence about the first name or value that cannot work.
    """
    check_names(config)
    flat = flatten(config)
    for name, allowed in _CHOICES.items():
        if flat[name] not in allowed:
            raise UserError(f"config.{name} is {flat[name]!r}; choose one of {', '.join(allowed)}.")
    for name, value in flat.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"config.{name} is {value}; it must be a finite number.")
    for fits, told, names in _RANGES:
        for name in names:
            if flat[name] is not None and not fits(flat[name]):
                raise UserError(f"config.{name} is {flat[name]}; {told}.")
    _check_together(config)


def _check_together(config: ConfigDict) -> None:
    """Raises UserError where a setting does not go with another."""
    if config.train.batch_size % config.train.accumulate:
        raise UserError(
            f"config.train.batch_size = {config.train.batch_size} must be a multiple of config.train.accumulate = "
            f"{config.train.accumulate}, the number of its parts."
        )
    distil = config.algo.distillation
    if distil.dt == "linear" and not 0 < distil.dt_start <= distil.dt_end <= 1:
        raise UserError(
            f"config.algo.distillation.dt_start = {distil.dt_start} and dt_end = {distil.dt_end} must rise within (0, 1]."
        )
    if config.algo.name == "d3pm" and config.algo.schedule != "log_linear":
        raise UserError(
            f"config.algo.schedule is {config.algo.schedule!r}, but the chain of d3pm has alpha = 1 - t and no other; "
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
            "config.data.field is set, but config.data.path is empty; give the text that it is about (for evaluation on a "
            "text of its own there is config.eval.field)."
        )
    if not config.eval.path:
        usual = flatten(default().eval)
        if idle := [key for key in ("field", "detokenizer", "document_ends") if config.eval[key] != usual[key]]:
            raise UserError(
                f"config.eval.{idle[0]} is set, but config.eval.path is empty; give the text that it is about."
            )
    if config.algo.curriculum.end < config.algo.curriculum.start:
        raise UserError("config.algo.curriculum.end lies before config.algo.curriculum.start; give steps in order.")
    if config.mode == "train" and config.algo.name == "dcd" and not config.init_from:
        raise UserError(
            "config.algo.name is 'dcd', which distils a trained network; give its workdir as config.init_from."
        )
