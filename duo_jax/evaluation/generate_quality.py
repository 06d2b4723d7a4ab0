"""The few-step curve: `python -m duo_jax.evaluation.generate_quality --models NAME=WORKDIR ... --out DIR`.

Samples texts from each network at each number of steps, and has a pretrained language model judge them. Results are kept
in DIR/quality.json as they come, and what is there already is not sampled again:

DIR/quality.json    every figure, one entry a network, sampler, number of steps, noise removal and seed
DIR/quality.md      the table, averaged over seeds
DIR/quality.png     perplexity and entropy against network calls, if any network was sampled
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
from duo_jax.evaluation.judged_texts import NONE, Model, already_written, opened, own_length, reference
from duo_jax.files import check_folder

HELDOUT = "held-out text"


@dataclasses.dataclass(frozen=True)
class Case:
    """One set of texts that is sampled.

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


def cases(args: argparse.Namespace, models: dict[str, Model], judge: str) -> Iterator[Case]:
    """Yields what is to be sampled; an autoregressive network takes a call a token, whatever the number of steps."""
    for name, model in models.items():
        network = model.params.network
        ways, steps, tails = samplers(args), args.steps, args.noise_removal
        if network.algo == "ar":
            ways, steps, tails = [("ancestral", "")], [args.length or network.length], ["ancestral"]
        how = args.num, args.top_p, args.temperature, judge, args.protocol
        for (sampler, psi), n_steps, tail, seed in itertools.product(ways, steps, tails, args.seeds):
            yield Case(name, model.checkpoint, n_steps, tail, seed, *how, sampler, psi, own_length(args, network))


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
    if "n_steps" not in case:
        return case["model"]
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

    path = args.out / "quality.json"
    known = kept(path, [field.name for field in dataclasses.fields(generative.Quality)])
    models = {name: opened(asked) for name, asked in args.models.items()}
    for name, model in models.items():
        check_fit(args, name, model.params.network)
    given = already_written(args, models)
    if (real := reference(args, models, given)) is not None:
        given = {HELDOUT: real} | given
    judge = judges.load(args.judge)
    args.out.mkdir(parents=True, exist_ok=True)

    def keep(case: dict[str, Any], quality: generative.Quality, texts: list[str], calls: int) -> None:
        known[key_of(case)] = {"case": case, "network_calls": calls, **dataclasses.asdict(quality)}
        with (args.out / "texts.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"case": case, "text": text}, ensure_ascii=False) + "\n" for text in texts)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(list(known.values()), indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)

    how = {"num": args.num, "judge": judge.name, "protocol": args.protocol}
    wanted = [{"model": name, **about, **how} for name, (about, _) in given.items()]
    wanted += map(dataclasses.asdict, cases(args, models, judge.name))
    missing = [case for case in wanted if key_of(case) not in known]
    with progress.bar(total=sum(map(work, missing)), unit=" passes") as bar:
        for case in missing:
            bar.set_description(title(case))
            if case["model"] in given:
                (tokens, tokenizer), calls = given[case["model"]][1](), 0
            else:
                params = models[case["model"]].params
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
    sampled = f", top_p {args.top_p:g}, temperature {args.temperature:g}; {seeds}" if args.models else ""
    told = [f"{args.num} texts{length} a set{sampled}."]
    told += [f"The texts of {name} are those of {file}." for name, file in args.texts.items()]
    if args.heldout == NONE:
        told.append("There is no held-out text to compare with.")
    elif args.heldout is not None:
        told.append(f"The held-out text is {args.heldout}.")
    return " ".join(told)


def report(args: argparse.Namespace) -> None:
    """Measures, and writes the table and the picture."""
    measured = measure(args)
    rows, judge = averaged(measured), measured[0]["case"]["judge"]
    if args.protocol != "ours":
        judge += f", {args.protocol} protocol"
    text = f"{table(rows, judge)}\n{provenance(args)}\n"
    (args.out / "quality.md").write_text(text, encoding="utf-8")
    levels = {row["model"]: (row["ppl"][0], row["entropy"][0]) for row in rows if not row["n_steps"]}
    curves: dict[tuple[str, str], list[tuple[int, float, float, float]]] = {}
    for row in rows:
        if not row["n_steps"]:
            continue
        point = row["network_calls"], *row["ppl"], row["entropy"][0]
        curves.setdefault((series(row["model"], row["sampler"]), row["noise_removal"]), []).append(point)
    if curves:
        from duo_jax.evaluation import plots

        plots.few_steps(args.out / "quality.png", curves, levels, judge)
    progress.say(text)
    progress.say(f"Written to {args.out}.")


def _names(flag: str, values: list[str]) -> dict[str, str]:
    named = cli.named(flag, values)
    if HELDOUT in named:
        raise UserError(f"{flag} has {HELDOUT!r}, the name of the text to compare with; give another.")
    return named


def _check(args: argparse.Namespace) -> None:
    """Refuses what no network can be sampled with, or no results be written to, before anything is read."""
    from duo_jax import sampling
    from duo_jax.data import text_files
    from duo_jax.evaluation import generative

    if not args.models and not args.texts:
        raise UserError(
            "--models is missing; name a network, as in --models NAME=DIR, or give texts as --texts NAME=FILE."
        )
    if both := [name for name in args.texts if name in args.models]:
        raise UserError(f"--models and --texts both have {both[0]}; name them apart.")
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
    if args.heldout == "":
        raise UserError("--heldout is empty; give a text file or folder, or none.")
    if args.heldout not in (None, NONE):
        path = Path(args.heldout).expanduser()
        files = text_files.list_files(path, setting="--heldout")
        # All are read, for the last row's mistake to show now, too.
        if not sum(len(text) for file in files for text in text_files.read_rows(file, args.field, setting="--field")):
            raise UserError(f"--heldout={args.heldout} holds no text but white space; give another.")
    args.out = check_folder(args.out, flag="--out", keep=False)


def _list(kind: type) -> Any:
    def read(text: str) -> list:
        return [kind(part) for part in text.split(",")]

    read.__name__ = f"comma-separated {kind.__name__}"
    return read


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Tells the defaults of the flags that have one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def main() -> None:
    """Reads the command line."""
    name = "python -m duo_jax.evaluation.generate_quality"
    parser = cli.Parser(prog=name, description=__doc__.split("\n")[0], allow_abbrev=False, formatter_class=_Help)
    parser.add_argument(
        "--models",
        action="append",
        metavar="NAME=DIR",
        help="a network: a run's workdir, an exported folder, or what else duo_jax.load takes, such as quickstart",
    )
    parser.add_argument(
        "--texts",
        action="append",
        metavar="NAME=FILE",
        help="texts that are there: a samples.jsonl as mode=sample wrote it",
    )
    parser.add_argument(
        "--sampler", type=_list(str), default="ancestral", help="as duo_jax.sample takes them, comma-separated"
    )
    parser.add_argument(
        "--psi",
        type=_list(str),
        help="kappa modes of the sampler psi, such as constant-0.9; its own default if not given",
    )
    parser.add_argument("--steps", type=_list(int), default="1,2,4,8,16,32,64,128", help="steps of the samplers")
    parser.add_argument("--noise_removal", type=_list(str), default="ancestral,greedy", help="the last call's kinds")
    parser.add_argument("--seeds", type=_list(int), default="0,1,2", help="a set of texts for each")
    parser.add_argument("--num", type=int, default=64, help="texts a set")
    parser.add_argument("--length", type=int, help="tokens of a text; the network's own length if not given")
    parser.add_argument("--rows_at_once", type=int, default=64, help="texts sampled together; bounds the memory")
    parser.add_argument("--top_p", type=float, default=1.0, help="nucleus; 1 keeps every token")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the predictions")
    parser.add_argument(
        "--heldout",
        metavar="FILE",
        help="text to compare with, a file or folder, or none; the first run's held-out data if not given",
    )
    parser.add_argument(
        "--field", default="text", help="what the rows of --heldout call their text, in .jsonl and .parquet files"
    )
    parser.add_argument("--judge", default="smollm2", help="smollm2, a .gguf file, or GPT-2's folder or hub id")
    parser.add_argument("--protocol", default="ours", help="ours, or reference: what published figures were judged by")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    with cli.one_line_errors():
        args = parser.parse_args()
        args.models, args.texts = _names("--models", args.models or []), _names("--texts", args.texts or [])
        _check(args)
        cli.keep_memory()
        report(args)


if __name__ == "__main__":
    main()
