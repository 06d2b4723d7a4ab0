"""The few-step curve: `python -m duo_jax.evaluation.generate_quality --models NAME=WORKDIR ... --out DIR`.

Samples texts from each network at each number of steps, and has a pretrained language model judge them. Results are kept
in DIR/quality.json as they come, and what is there already is not sampled again:

DIR/quality.json    every figure, one entry a network, sampler, number of steps, noise removal and seed
DIR/quality.md      the table, averaged over seeds
DIR/quality.png     perplexity and entropy against network calls
DIR/texts.jsonl     the texts
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from duo_jax import cli, progress
from duo_jax.errors import UserError

HELDOUT = "held-out text"


@dataclasses.dataclass(frozen=True)
class Case:
    """One set of texts.

    Attributes:
        model: the network's name in the report.
        checkpoint: its folder and step.
        n_steps: steps of the sampler.
        noise_removal: `ancestral`, `greedy` or `none`.
        seed: of the sampler.
        num: how many texts.
        top_p: nucleus.
        temperature: of the predictions.
        judge: who judged.
        protocol: how; see `generative.quality`.
        sampler: as `duo_jax.sample` calls it.
        psi: kappa mode of the sampler `psi`; empty for the others.
        length: tokens of a text; None for as many as the network's own length.
    """

    model: str
    checkpoint: str
    n_steps: int
    noise_removal: str
    seed: int
    num: int
    top_p: float
    temperature: float
    judge: str
    protocol: str
    sampler: str
    psi: str
    length: int | None


def samplers(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Returns the samplers that are asked for, each with its kappa mode or an empty string, in order."""
    from duo_jax import sampling

    modes = {"psi": args.psi or [sampling.Psi().high]}
    return [(sampler, psi) for sampler in args.sampler for psi in modes.get(sampler, [""])]


def own_length(args: argparse.Namespace, network: Any) -> int | None:
    """Returns `--length`, or None where it is the network's own, however that was asked for."""
    return None if args.length == network.length else args.length


def cases(args: argparse.Namespace, models: dict[str, Any], judge: str) -> Iterator[Case]:
    """Yields what is to be sampled; an autoregressive network takes a call a token, whatever the number of steps."""
    for name, (params, checkpoint) in models.items():
        network = params.network
        ways, steps, tails = samplers(args), args.steps, args.noise_removal
        if network.algo == "ar":
            ways, steps, tails = [("ancestral", "")], [args.length or network.length], ["ancestral"]
        how = args.num, args.top_p, args.temperature, judge, args.protocol
        for (sampler, psi), n_steps, tail, seed in itertools.product(ways, steps, tails, args.seeds):
            yield Case(name, checkpoint, n_steps, tail, seed, *how, sampler, psi, own_length(args, network))


def check_fit(args: argparse.Namespace, name: str, network: Any) -> None:
    """Raises UserError if a network cannot be sampled as is asked; an autoregressive one is sampled in its own way."""
    from duo_jax import sampling

    if network.algo == "ar":
        return
    for (sampler, psi), tail in itertools.product(samplers(args), args.noise_removal):
        try:
            sampling.Settings.for_network(
                network,
                min(args.steps),
                sampler=sampler,
                noise_removal=tail,
                top_p=args.top_p,
                psi=sampling.as_psi(psi or None, sampler),
            )
        except UserError as error:
            raise UserError(f"the network {name} cannot be sampled so: {error}") from error


def heldout(settings: dict[str, Any], num: int, length: int | None = None) -> tuple[Any, Any]:
    """Returns `num` held-out rows of the data that a run with these settings uses, `[B, L]`, and their tokenizer.

    They are as long as the run's rows, or as `length` says.
    """
    from ml_collections import ConfigDict

    from duo_jax.data import prepare
    from duo_jax.training import run as run_lib

    config = ConfigDict(settings)
    config.eval.batch_size, config.eval.batches = num, 1
    config.model.length = length or config.model.length
    folder = run_lib.prepared(config)
    batch = next(iter(run_lib.heldout(config, folder)))
    whole = batch["mask"].any(axis=1)
    if whole.sum() < num:
        progress.say(
            f"{folder} has {whole.sum()} held-out rows, so the figures of real text are of these, not of {num}."
        )
    return batch["tokens"][whole], prepare.load_tokenizer(folder)


def key_of(case: dict[str, Any]) -> str:
    """Returns the same string for the same settings, in whatever order."""
    return json.dumps(case, sort_keys=True)


def kept(path: Path, figures: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Returns the entries of an earlier `quality.json` that have all figures, by case; none if there is no such file.

    Raises:
        UserError: it is not one that this command wrote.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        for row in rows:
            case = row["case"]
            # What there was no choice of, and was not told.
            usual = {"protocol": "ours", "sampler": "ancestral", "psi": "", "length": None}
            for name in usual if "n_steps" in case else ("protocol", "length"):
                case.setdefault(name, usual[name])
        cases = {key_of(row["case"]): row for row in rows}
        return {case: row for case, row in cases.items() if row.keys() >= set(figures)}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read: {error}; delete it, or give another --out.") from error


def work(case: dict[str, Any]) -> int:
    """Returns how many passes of a network over a text a set of them takes: one a step to sample it, and the judge's."""
    return case["num"] * (1 + case.get("n_steps", 0))


def title(case: dict[str, Any]) -> str:
    """Returns what the progress bar calls a set of texts."""
    if case["model"] == HELDOUT:
        return HELDOUT
    return "{}, {n_steps} steps, {noise_removal}, seed {seed}".format(series(case["model"], of_sampler(case)), **case)


def of_sampler(case: dict[str, Any]) -> str:
    """Returns what the table calls a set's sampler; empty for text that none wrote."""
    return f"{case.get('sampler', '')} {case.get('psi', '')}".strip()


def series(model: str, sampler: str) -> str:
    """Returns what the picture and the progress bar call a network with a sampler."""
    return model if sampler == "ancestral" else f"{model}, {sampler}"


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Samples and judges what is not in DIR/quality.json yet; returns its entries."""
    from duo_jax import api
    from duo_jax.evaluation import generative, judges
    from duo_jax.training import checkpoint

    path = args.out / "quality.json"
    known = kept(path, [field.name for field in dataclasses.fields(generative.Quality)])
    found = {name: checkpoint.find(workdir) for name, workdir in args.models.items()}
    read = {name: checkpoint.read(checkpoint.folder_of(*place)) for name, place in found.items()}
    models = {name: (read[name][0], f"{folder} at step {step:,}") for name, (folder, step) in found.items()}
    run = next((name for name, (_, record) in read.items() if "config" in record), None)
    for name, (params, _) in models.items():
        check_fit(args, name, params.network)
    if run is None:
        raise UserError("the text to compare with is held-out data of a run: name a run's workdir among --models, too.")
    judge = judges.load(args.judge)
    args.out.mkdir(parents=True, exist_ok=True)

    def keep(case: dict[str, Any], quality: generative.Quality, texts: list[str], calls: int) -> None:
        known[key_of(case)] = {"case": case, "network_calls": calls, **dataclasses.asdict(quality)}
        with (args.out / "texts.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"case": case, "text": text}, ensure_ascii=False) + "\n" for text in texts)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(list(known.values()), indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)

    wanted = [dataclasses.asdict(case) for case in cases(args, models, judge.name)]
    real = {"model": HELDOUT, "checkpoint": models[run][1], "num": args.num, "judge": judge.name}
    wanted.insert(0, real | {"protocol": args.protocol, "length": own_length(args, models[run][0].network)})
    missing = [case for case in wanted if key_of(case) not in known]
    with progress.bar(total=sum(map(work, missing)), unit=" passes") as bar:
        for case in missing:
            bar.set_description(title(case))
            if case["model"] == HELDOUT:
                tokens, tokenizer = heldout(read[run][1]["config"], args.num, args.length)
                calls = 0
            else:
                params = models[case["model"]][0]
                names = ("n_steps", "noise_removal", "seed", "top_p", "temperature", "sampler", "length")
                result = api.sample(
                    params,
                    batch_size=args.num,
                    rows_at_once=args.rows_at_once,
                    each=lambda batch, steps=case["n_steps"]: bar.update(len(batch.tokens) * steps),
                    psi=case["psi"] or None,
                    **{key: case[key] for key in names},
                )
                tokens, calls = result.tokens, result.network_calls
                tokenizer = api.tokenizer_of(params.tokenizer)
            keep(case, *generative.quality(tokens, tokenizer, judge, bar.update, protocol=args.protocol), calls)
    return [known[key_of(case)] for case in wanted]


def averaged(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Averages over seeds: an entry for each network, sampler, noise removal and number of steps, in order."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        case = row["case"]
        key = case["model"], of_sampler(case), case.get("noise_removal", ""), case.get("n_steps", 0)
        groups.setdefault(key, []).append(row)

    def spread(values: list[float]) -> tuple[float, float]:
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0

    return [
        {
            "model": model,
            "sampler": sampler,
            "noise_removal": tail,
            "n_steps": n_steps,
            "network_calls": group[0]["network_calls"],
            "ppl": spread([row["ppl"] for row in group]),
            "bits": spread([row["bits"] for row in group]),
            "entropy": spread([row["entropy"] for row in group]),
            "distinct": [statistics.fmean(row["distinct"][n] for row in group) for n in range(3)],
            "seeds": len(group),
        }
        for (model, sampler, tail, n_steps), group in groups.items()
    ]


def table(rows: Sequence[dict[str, Any]], judge: str) -> str:
    """Returns the averages as a Markdown table."""
    lines = [
        f"| network | sampler | noise removal | steps | calls | PPL ({judge}) | bits / character | entropy | "
        "distinct 1 / 2 / 3 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        shares = " / ".join(f"{share:.2f}" for share in row["distinct"])
        means = []
        for figure, digits in (("ppl", 1), ("bits", 2), ("entropy", 2)):
            mean, deviation = row[figure]
            means.append(f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if row["seeds"] > 1 else ""))
        steps = f"{row['n_steps']} | {row['network_calls']}" if row["n_steps"] else "- | -"
        how = f"{row['model']} | {row['sampler'] or '-'} | {row['noise_removal'] or '-'}"
        lines.append(f"| {how} | {steps} | {' | '.join(means)} | {shares} |")
    return "\n".join(lines) + "\n"


def provenance(args: argparse.Namespace) -> str:
    """Returns what the table's columns do not tell."""
    seeds = f"± is the standard deviation over {len(args.seeds)} seeds" if len(args.seeds) > 1 else "one seed"
    length = f" of {args.length} tokens" if args.length else ""
    return f"{args.num} texts{length} a set, top_p {args.top_p:g}, temperature {args.temperature:g}; {seeds}."


def report(args: argparse.Namespace) -> None:
    """Measures, and writes the table and the picture."""
    measured = measure(args)
    rows, judge = averaged(measured), measured[0]["case"]["judge"]
    if args.protocol != "ours":
        judge += f", {args.protocol} protocol"
    text = f"{table(rows, judge)}\n{provenance(args)}\n"
    (args.out / "quality.md").write_text(text, encoding="utf-8")
    real, *sampled = rows
    curves: dict[tuple[str, str], list[tuple[int, float, float, float]]] = {}
    for row in sampled:
        point = row["network_calls"], *row["ppl"], row["entropy"][0]
        curves.setdefault((series(row["model"], row["sampler"]), row["noise_removal"]), []).append(point)
    from duo_jax.evaluation import plots

    plots.few_steps(args.out / "quality.png", curves, (real["ppl"][0], real["entropy"][0]), judge)
    progress.say(text)
    progress.say(f"Written to {args.out}.")


def _names(values: list[str]) -> dict[str, str]:
    models = dict(value.split("=", 1) if "=" in value else (Path(value).name, value) for value in values)
    if len(models) < len(values):
        raise UserError("two --models have one name; name them apart, as in --models before=DIR --models after=DIR.")
    return models


def _check(args: argparse.Namespace) -> None:
    """Refuses what no network can be sampled with, or no results be written to, before anything is read."""
    from duo_jax import sampling
    from duo_jax.evaluation import generative

    for name in ("sampler", "psi", "steps", "noise_removal", "seeds"):
        values = getattr(args, name) or []
        if twice := [value for i, value in enumerate(values) if value in values[:i]]:
            raise UserError(f"--{name} has {twice[0]} twice; the same texts would count twice. Give it once.")
    if wrong := [seed for seed in args.seeds if not 0 <= seed < 2**32]:
        raise UserError(f"--seeds has {wrong[0]}; a seed must be from 0 to 2^32 - 1.")
    if args.protocol not in generative.PROTOCOLS:
        raise UserError(f"--protocol={args.protocol}; choose one of {', '.join(generative.PROTOCOLS)}.")

    if min(*args.steps, args.num, args.rows_at_once) < 1:
        raise UserError("--steps, --num and --rows_at_once must be at least 1.")
    if args.length is not None and args.length < 3:
        raise UserError(f"--length={args.length} leaves no room between a row's BOS and EOS; give 3 or more.")
    if unknown := [sampler for sampler in args.sampler if sampler not in sampling.SAMPLERS]:
        raise UserError(f"--sampler has {unknown[0]!r}; choose from {', '.join(sampling.SAMPLERS)}.")
    if args.psi and "psi" not in args.sampler:
        raise UserError("--psi is of the sampler psi, which --sampler does not have; add it, or leave --psi out.")
    for mode in args.psi or []:
        sampling.as_psi(mode, "psi")
    sampling.check_temperature(args.temperature)
    for tail in args.noise_removal:
        sampling.Settings(1, noise_removal=tail, nucleus=sampling.uses_nucleus(args.top_p))
    args.out = cli.results_folder("--out", args.out)


def _list(kind: type) -> Any:
    def read(text: str) -> list:
        return [kind(part) for part in text.split(",")]

    read.__name__ = f"comma-separated {kind.__name__}"
    return read


def main() -> None:
    """Reads the command line."""
    name = "python -m duo_jax.evaluation.generate_quality"
    parser = cli.Parser(prog=name, description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--models",
        action="append",
        required=True,
        metavar="NAME=DIR",
        help="a network: a run's workdir or an exported folder",
    )
    parser.add_argument("--sampler", type=_list(str), default=["ancestral"])
    parser.add_argument("--psi", type=_list(str), help="kappa modes of the sampler psi, such as constant-0.9")
    parser.add_argument("--length", type=int, help="tokens of a text, if not the network's own length")
    parser.add_argument("--steps", type=_list(int), default=[1, 2, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--noise_removal", type=_list(str), default=["ancestral", "greedy"])
    parser.add_argument("--seeds", type=_list(int), default=[0, 1, 2])
    parser.add_argument("--num", type=int, default=64, help="texts a set")
    parser.add_argument("--rows_at_once", type=int, default=64, help="texts sampled together; bounds the memory")
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--judge", default="smollm2", help="smollm2, a .gguf file, or GPT-2's folder or hub id")
    parser.add_argument("--protocol", default="ours", help="ours, or reference: what published figures were judged by")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    with cli.one_line_errors():
        args = parser.parse_args()
        args.models = _names(args.models)
        _check(args)
        cli.keep_memory()
        report(args)


if __name__ == "__main__":
    main()
