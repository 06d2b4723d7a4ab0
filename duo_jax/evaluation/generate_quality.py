"""The few-step curve: `python -m duo_jax.evaluation.generate_quality --models NAME=WORKDIR ... --out DIR`.

Samples texts from each network at each number of steps, and has a pretrained language model judge them. Results are kept
in DIR/quality.json as they come, and what is already there is not sampled again:

DIR/quality.json    every figure, one entry per network, sampler, number of steps, noise removal and seed
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

import numpy as np
from tqdm import tqdm

from duo_jax import api, cli, progress, sampling
from duo_jax.data.tokenizer import Tokenizer
from duo_jax.errors import UserError
from duo_jax.evaluation import generative, judges, quality_flags
from duo_jax.evaluation.judged_texts import HELDOUT, NONE, Model, already_written, opened, own_length, reference


@dataclasses.dataclass(frozen=True)
class Case:
    """The settings of one sampled set of texts.

    Attributes:
        model: the network's name in the report.
        checkpoint: its folder and step.
        n_steps: steps of the sampler.
        noise_removal: `ancestral`, `greedy` or `none`.
        seed: seed of the sampler.
        num: how many texts.
        top_p: nucleus.
        temperature: of the predictions.
        judge: the judge's name.
        protocol: how it judged; see `generative.quality`.
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
    """Returns the samplers that the flags ask for, each with its kappa mode or an empty string, in order."""
    modes = {"psi": args.psi or [sampling.Psi().high]}
    return [(sampler, psi) for sampler in args.sampler for psi in modes.get(sampler, [""])]


def cases(args: argparse.Namespace, models: dict[str, Model], judge: str) -> Iterator[Case]:
    """Yields the sets to sample; an autoregressive network takes one call per token, whatever the number of steps."""
    for name, model in models.items():
        network = model.params.network
        pairs, steps, removals = samplers(args), args.steps, args.noise_removal
        if network.algo == "ar":
            pairs, steps, removals = [("ancestral", "")], [args.length or network.length], ["ancestral"]
        fixed = args.num, args.top_p, args.temperature, judge, args.protocol
        for (sampler, psi), n_steps, removal, seed in itertools.product(pairs, steps, removals, args.seeds):
            yield Case(name, model.checkpoint, n_steps, removal, seed, *fixed, sampler, psi, own_length(args, network))


def check_fit(args: argparse.Namespace, name: str, network: Any) -> None:
    """Raises UserError if a network cannot be sampled as the flags say; an autoregressive one has its own sampler."""
    if network.algo == "ar":
        return
    for (sampler, psi), removal in itertools.product(samplers(args), args.noise_removal):
        try:
            sampling.Settings.for_network(
                network,
                min(args.steps),
                sampler=sampler,
                noise_removal=removal,
                top_p=args.top_p,
                psi=sampling.as_psi(psi or None, sampler),
            )
        except UserError as error:
            raise UserError(f"the network {name} cannot be sampled with these flags: {error}") from error


def key_of(case: dict[str, Any]) -> str:
    """Returns the same string for the same settings, in whatever order."""
    return json.dumps(case, sort_keys=True)


def kept(path: Path, figures: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Returns the entries of an earlier `quality.json` that have all figures, by case; none if there is no such file.

    Raises:
        UserError: this command did not write it.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        for row in rows:
            case = row["case"]
            # Settings that older files lack, since there was no choice.
            usual = {"protocol": "ours", "sampler": "ancestral", "psi": "", "length": None}
            for name in usual if "n_steps" in case else ("protocol", "length"):
                case.setdefault(name, usual[name])
        cases = {key_of(row["case"]): row for row in rows}
        return {case: row for case, row in cases.items() if row.keys() >= set(figures)}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read: {error}; delete it, or give another --out.") from error


def work(case: dict[str, Any]) -> int:
    """Returns how many passes over a text a set takes: for each text one per sampling step, and the judge's."""
    return case["num"] * (1 + case.get("n_steps", 0))


def title(case: dict[str, Any]) -> str:
    """Returns the name of a set of texts in the progress bar."""
    if "n_steps" not in case:
        return case["model"]
    return "{}, {n_steps} steps, {noise_removal}, seed {seed}".format(series(case["model"], sampler_of(case)), **case)


def sampler_of(case: dict[str, Any]) -> str:
    """Returns the name of a set's sampler in the table; empty for texts that were not sampled."""
    return f"{case.get('sampler', '')} {case.get('psi', '')}".strip()


def series(model: str, sampler: str) -> str:
    """Returns the name of a network with a sampler, in the picture and the progress bar."""
    return model if sampler == "ancestral" else f"{model}, {sampler}"


def sampled(
    args: argparse.Namespace, params: Any, case: dict[str, Any], bar: tqdm
) -> tuple[np.ndarray, Tokenizer, int]:
    """Samples a set of texts; returns its rows `[B, L]`, their tokenizer, and the network calls of a batch."""
    names = ("n_steps", "noise_removal", "seed", "top_p", "temperature", "sampler", "length")
    result = api.sample(
        params,
        batch_size=args.num,
        rows_at_once=min(args.rows_at_once, args.num),
        each=lambda batch: bar.update(len(batch.tokens) * case["n_steps"]),
        psi=case["psi"] or None,
        **{name: case[name] for name in names},
    )
    return result.tokens, api.tokenizer_of(params.tokenizer), result.network_calls


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Samples and judges what is not in DIR/quality.json yet; returns its entries."""
    path = args.out / "quality.json"
    entries = kept(path, [field.name for field in dataclasses.fields(generative.Quality)])
    models = {name: opened(place) for name, place in args.models.items()}
    for name, model in models.items():
        check_fit(args, name, model.params.network)
    text_sets = already_written(args, models)
    if (real := reference(args, models, text_sets)) is not None:
        text_sets = {HELDOUT: real} | text_sets
    judge = judges.load(args.judge)
    args.out.mkdir(parents=True, exist_ok=True)

    def keep(case: dict[str, Any], quality: generative.Quality, texts: list[str], calls: int) -> None:
        entries[key_of(case)] = {
            "case": case, "texts": len(texts), "network_calls": calls, **dataclasses.asdict(quality),
        }  # fmt: skip
        with (args.out / "texts.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"case": case, "text": text}, ensure_ascii=False) + "\n" for text in texts)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(list(entries.values()), indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)

    fixed = {"num": args.num, "judge": judge.name, "protocol": args.protocol}
    wanted = [{"model": name, **fixed, **text_set.about} for name, text_set in text_sets.items()]
    wanted += map(dataclasses.asdict, cases(args, models, judge.name))
    missing = [case for case in wanted if key_of(case) not in entries]
    with progress.bar(total=sum(map(work, missing)), unit=" passes") as bar:
        for case in missing:
            bar.set_description(title(case))
            if case["model"] in text_sets:
                (tokens, tokenizer), calls = text_sets[case["model"]].load(), 0
            else:
                tokens, tokenizer, calls = sampled(args, models[case["model"]].params, case, bar)
            keep(case, *generative.quality(tokens, tokenizer, judge, bar.update, protocol=args.protocol), calls)
    return [entries[key_of(case)] for case in wanted]


def averaged(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Averages over seeds: an entry for each network, sampler, noise removal and number of steps, in order."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        case = row["case"]
        key = case["model"], sampler_of(case), case.get("noise_removal", ""), case.get("n_steps", 0)
        groups.setdefault(key, []).append(row)

    def spread(values: list[float]) -> tuple[float, float]:
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0

    return [
        {
            "model": model,
            "sampler": sampler,
            "noise_removal": removal,
            "n_steps": n_steps,
            "network_calls": group[0]["network_calls"],
            "ppl": spread([row["ppl"] for row in group]),
            "bits": spread([row["bits"] for row in group]),
            "entropy": spread([row["entropy"] for row in group]),
            "distinct": [statistics.fmean(row["distinct"][n] for row in group) for n in range(3)],
            "seeds": len(group),
        }
        for (model, sampler, removal, n_steps), group in groups.items()
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


def provenance(args: argparse.Namespace, measured: Sequence[dict[str, Any]] = ()) -> str:
    """Returns what the table's columns do not say about the entries of `quality.json`."""
    seeds = f"± is the standard deviation over {len(args.seeds)} seeds" if len(args.seeds) > 1 else "one seed"
    length = f" of {args.length} tokens" if args.length else ""
    sampled = f", top_p {args.top_p:g}, temperature {args.temperature:g}; {seeds}" if args.models else ""
    sentences = [f"{args.num} texts{length} a set{sampled}."]
    counts = {row["case"]["model"]: row.get("texts", row["case"]["num"]) for row in measured}
    sentences += [f"Of {name} there are only {n}." for name, n in counts.items() if n < args.num]
    sentences += [f"The texts of {name} are those of {file}." for name, file in args.texts.items()]
    if args.heldout == NONE:
        sentences.append("There is no held-out text to compare with.")
    elif args.heldout is not None:
        sentences.append(f"The held-out text is {args.heldout}.")
    return " ".join(sentences)


def report(args: argparse.Namespace) -> None:
    """Measures, and writes the table and the picture."""
    measured = measure(args)
    rows, judge = averaged(measured), measured[0]["case"]["judge"]
    if args.protocol != generative.OURS:
        judge += f", {args.protocol} protocol"
    text = f"{table(rows, judge)}\n{provenance(args, measured)}\n"
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


def main() -> None:
    """Reads the command line."""
    with cli.one_line_errors():
        args = quality_flags.parse("python -m duo_jax.evaluation.generate_quality", __doc__.split("\n")[0])
        cli.keep_memory()
        report(args)


if __name__ == "__main__":
    main()
