"""Downstream tasks: `python -m duo_jax.evaluation.harness --model=WORKDIR --tasks=hellaswag,piqa`.

Tasks, prompts, few-shot examples and metrics are those of EleutherAI's lm-evaluation-harness; the network answers its
requests (see docs/evaluation.md). `--include_path` names a folder of your own tasks, in the harness's format.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from duo_jax import cli, progress
from duo_jax.errors import UserError, first_line
from duo_jax.files import check_folder

# The parts of the harness's results that are kept; the rest describes the machine.
_KEPT = ("settings", "results", "groups", "versions", "n-shot", "n-samples")


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Returns all that the harness reports on the tasks, such as `results` and `n-samples`, and the settings."""
    from duo_jax import api
    from duo_jax.evaluation.harness_model import Model, TaskManager, simple_evaluate

    tasks = TaskManager(include_path=None if args.include_path is None else str(args.include_path))
    if unknown := [name for name in args.tasks if not tasks.match_tasks([name])]:
        raise UserError(f"the harness knows no task {unknown[0]!r}; `lm-eval ls tasks` lists its own.")
    params = api.load(args.model, ema=args.ema)
    model = Model(params, n_samples=args.n_samples, n_steps=args.n_steps, seed=args.seed)
    try:
        found = simple_evaluate(
            model,
            tasks=args.tasks,
            num_fewshot=args.num_fewshot,
            limit=args.limit,
            task_manager=tasks,
            log_samples=False,
            bootstrap_iters=1_000,
        )
    except (OSError, ConnectionError) as error:  # as the hub's are, where it cannot be reached
        raise UserError(
            f"the data of {', '.join(args.tasks)} cannot be read: {first_line(error)}; without a network, name tasks with "
            "local files by --include_path."
        ) from error
    settings = {"model": str(args.model), "ema": args.ema, "n_samples": args.n_samples, "n_steps": args.n_steps}
    return found | {"settings": settings | {"seed": args.seed, "limit": args.limit}}


def main() -> None:
    """Reads the command line."""
    name = "python -m duo_jax.evaluation.harness"
    parser = cli.Parser(prog=name, description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", required=True, help="a run's workdir, an exported folder, or a hub id")
    parser.add_argument("--tasks", required=True, type=lambda text: text.split(","), help="comma-separated")
    parser.add_argument("--include_path", type=Path, help="a folder of your own tasks")
    parser.add_argument("--num_fewshot", type=int, help="examples in the prompt; the task's own number if not given")
    parser.add_argument("--limit", type=int, help="the most documents per task")
    parser.add_argument("--n_samples", type=int, default=128, help="draws of time and noise per likelihood")
    parser.add_argument("--n_steps", type=int, default=32, help="steps of the sampler, for tasks that generate")
    parser.add_argument("--seed", type=int, default=0, help="seed of likelihoods and samples")
    parser.add_argument("--ema", action=argparse.BooleanOptionalAction, default=True, help="averaged weights")
    parser.add_argument("--out", type=Path, help="folder for harness.json")
    with cli.one_line_errors():
        args = parser.parse_args()
        for setting in ("n_samples", "n_steps", "limit"):
            if (value := getattr(args, setting)) is not None and value < 1:
                raise UserError(f"--{setting} must be at least 1.")
        if not 0 <= args.seed < 2**32:
            raise UserError(f"--seed is {args.seed}; it must be from 0 to 2^32 - 1.")
        if args.include_path is not None and not args.include_path.is_dir():
            raise UserError(f"--include_path={args.include_path} is not a folder.")
        out = None if args.out is None else check_folder(args.out, flag="--out", keep=False)
        cli.keep_memory()
        found = evaluate(args)
        from duo_jax.evaluation.harness_model import make_table

        progress.say(make_table(found))
        if "groups" in found:
            progress.say(make_table(found, "groups"))
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            kept = {key: found[key] for key in _KEPT if key in found}
            (out / "harness.json").write_text(json.dumps(kept, indent=1, default=str) + "\n", encoding="utf-8")
            progress.say(f"Written to {out / 'harness.json'}.")


if __name__ == "__main__":
    main()
