"""`claims-toy`: what a paper claims, tried on the synthetic world with several seeds, as a table with intervals.

An arm is a toy with flags; a claim says that one figure is higher than another one of the same seed. Each figure is written down
as soon as it is known, so the command can be stopped and called again.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tbps_common.run.arguments import HelpFormatter, whole_number
from tbps_world.toys.steps import StepFailed, add_start, call

DESCRIPTION = """\
Run the arms that test a paper's claims with several seeds, and write docs/claims/PAPER.json and PAPER.md: mean and spread of every
figure, and of every claim the difference with a 95 % interval over the seeds. Figures that are there are kept. Hours.
"""


@dataclass(frozen=True)
class Arm:
    """A run of the paper's toy, with `--seed`, `--start` and these flags."""

    name: str
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Claim:
    """That the figure `better` is higher than `worse`; figures are named "arm: figure"."""

    text: str
    better: str
    worse: str


@dataclass(frozen=True)
class Paper:
    """The arms and claims of a paper, and flags that end its toy within minutes."""

    title: str
    arms: tuple[Arm, ...]
    claims: tuple[Claim, ...]
    quick: tuple[str, ...]


PAPERS = {
    "cmlfa": Paper(
        "CMLFA",
        (
            Arm("parts"),
            Arm("one prototype", ("--more=--num_prototypes 1",)),
            Arm("with MLM", ("--more=--loss_names sdm+mlm+id+itc",)),
            Arm("over the batch", ("--lfa_attention", "batch")),
        ),
        (
            Claim("refining beats the CLIP it starts from", "parts: refined", "parts: start"),
            Claim("nine prototypes beat one", "parts: refined", "one prototype: refined"),
            Claim("MLM helps", "with MLM: refined", "parts: refined"),
            Claim("attention over parts beats attention over the batch", "parts: refined", "over the batch: refined"),
        ),
        ("--preset", "tiny", "--epochs", "1"),
    ),
    "fafa": Paper(
        "FAFA",
        (
            Arm("FAFA"),
            Arm("mean of all tokens", ("--more=--fda-k 12",)),
            Arm("best token alone", ("--more=--fda-k 1",)),
            Arm("without FD", ("--more=--loss-fd 0",)),
            Arm("without MFR", ("--more=--loss-mfr 0",)),
        ),
        (
            Claim("training on triplets beats none", "FAFA: trained", "FAFA: untrained"),
            Claim("training on triplets beats the sum of picture and sentence", "FAFA: trained", "FAFA: sum"),
            Claim("FDA beats the mean of all tokens", "FAFA: trained", "mean of all tokens: trained"),
            Claim("FDA beats the best token", "FAFA: trained", "best token alone: trained"),
            Claim("FD helps", "FAFA: trained", "without FD: trained"),
            Claim("MFR helps", "FAFA: trained", "without MFR: trained"),
        ),
        ("--ids", "48", "--epochs", "1"),
    ),
    "mra": Paper(
        "MRA",
        (
            Arm("pre-trained"),
            Arm("without regions", ("--no_regions",)),
            Arm("not pre-trained", ("--sda_epochs", "0")),
        ),
        (
            Claim("re-ranking beats similarity alone", "pre-trained: re-ranked", "pre-trained: similarity"),
            Claim("pre-training on SDA beats none", "pre-trained: re-ranked", "not pre-trained: re-ranked"),
            Claim("regions help the pre-training", "pre-trained: re-ranked", "without regions: re-ranked"),
        ),
        ("--preset", "tiny", "--networks", "tiny", "--sda_epochs", "1", "--cuhk_epochs", "2"),
    ),
    "diana": Paper(
        "DiaNA",
        (Arm("with refiner"), Arm("without refiner", ("--no_refiner",))),
        (
            Claim("five rounds beat one", "with refiner: round 5", "with refiner: round 1"),
            Claim("the refiner helps after five rounds", "with refiner: round 5", "without refiner: round 5"),
            Claim("the refiner helps after one round", "with refiner: round 1", "without refiner: round 1"),
        ),
        ("--preset", "tiny", "--pretrain_steps", "2", "--finetune_steps", "2"),
    ),
}
# Quantiles of Student's distribution for a two-sided interval of 95 %, by degrees of freedom.
_STUDENT = (math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

Figures = dict[str, dict[str, dict[str, float]]]
"""Seed -> arm -> R@1 in percent of each figure, and the minutes the arm took."""


def main(argv: list[str]) -> int:
    """Run what is missing, and write the table."""
    from tbps_common.files import write_json, write_text

    flags = _parse(argv)
    paper, claims = PAPERS[flags.paper], flags.claims or (flags.out if flags.quick else "docs/claims")
    file, start = Path(claims) / f"{flags.paper}.json", "random" if flags.quick else flags.start
    figures: Figures = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    try:
        for seed in range(flags.seeds):
            measured = figures.setdefault(str(seed), {})
            for number, arm in enumerate(paper.arms):
                if arm.name not in measured:
                    out = Path(flags.out) / flags.paper / f"seed{seed}_arm{number}"
                    more = [*arm.flags, *(_absent(paper.quick, arm.flags) if flags.quick else ())]
                    measured[arm.name] = run_arm(flags.paper, out, ["--seed", str(seed), "--start", start, *more])
                    write_json(file, figures, indent=1)
    except StepFailed as failure:
        return failure.status
    page = table(paper, figures, f"claims-toy --paper {flags.paper} --seeds {flags.seeds}")
    write_text(file.with_suffix(".md"), page)
    print(f"\n{page}\nwrote {file} and {file.with_suffix('.md')}")
    return 0


def _absent(quick: Sequence[str], given: Sequence[str]) -> list[str]:
    """The pairs of a flag and its value in `quick` whose flag is not given."""
    pairs = zip(quick[::2], quick[1::2])
    return [word for pair in pairs if pair[0] not in given for word in pair]


def run_arm(paper: str, out: Path, arguments: list[str]) -> dict[str, float]:
    """Run a toy with these flags; returns its figures and the minutes it took."""
    from tbps_world import cli

    started = time.perf_counter()
    toy = {
        "cmlfa": cli.cmlfa_toy_main,
        "fafa": cli.fafa_toy_main,
        "mra": cli.mra_toy_main,
        "diana": cli.diana_toy_main,
    }[paper]
    call(f"{paper}-toy", toy, ["--out", str(out), *arguments])
    return {**_read[paper](out), "minutes": round((time.perf_counter() - started) / 60, 1)}


def _cmlfa_figures(out: Path) -> dict[str, float]:
    evaluation = json.loads((out / "metrics.json").read_text(encoding="utf-8"))[0]
    return {"start": evaluation["start_R1"], "refined": evaluation["metrics"]["t2i"]["R1"]}


def _fafa_figures(out: Path) -> dict[str, float]:
    evaluation = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    return {**evaluation["start_R1"], "trained": evaluation["metrics"]["com"]["R1"]}


def _mra_figures(out: Path) -> dict[str, float]:
    similarity, reranked = json.loads((out / "metrics.json").read_text(encoding="utf-8"))["stages"].values()
    return {"similarity": similarity["R1"], "re-ranked": reranked["R1"]}


def _diana_figures(out: Path) -> dict[str, float]:
    rows = json.loads((out / "evaluation/metrics.json").read_text(encoding="utf-8"))
    # "all" where there is a refiner; "global" is the only one without.
    return {f"round {row['turn_limit']}": list(row["metrics"].values())[-1]["r1"] for row in rows}


_read = {"cmlfa": _cmlfa_figures, "fafa": _fafa_figures, "mra": _mra_figures, "diana": _diana_figures}


def table(paper: Paper, figures: Mapping[str, Mapping[str, Mapping[str, float]]], command: str) -> str:
    """The page of a paper: a table of the figures and one of the claims."""
    seeds = [arms for arms in figures.values() if all(arm.name in arms for arm in paper.arms)]
    minutes = sum(figure.get("minutes", 0.0) for arms in seeds for figure in arms.values())
    lines = [f"## {paper.title}", "", f"`{command}`: {len(seeds)} seed(s), {minutes:.0f} minutes. R@1 in percent.", ""]
    lines += ["| arm | figure | mean | lowest to highest |", "| --- | --- | --- | --- |"]
    for arm in paper.arms:
        for name in (name for name in seeds[0][arm.name] if name != "minutes"):
            values = [arms[arm.name][name] for arms in seeds]
            spread = f"{min(values):.1f} to {max(values):.1f}"
            lines.append(f"| {arm.name} | {name} | {statistics.mean(values):.1f} | {spread} |")
    lines += ["", "| claim | difference | 95 % interval | verdict |", "| --- | --- | --- | --- |"]
    for claim in paper.claims:
        mean, low, high = difference([_figure(arms, claim.better) - _figure(arms, claim.worse) for arms in seeds])
        lines.append(f"| {claim.text} | {mean:+.1f} | {low:+.1f} to {high:+.1f} | {verdict(low, high)} |")
    return "\n".join(lines) + "\n"


def _figure(arms: Mapping[str, Mapping[str, float]], name: str) -> float:
    arm, _, figure = name.partition(": ")
    return arms[arm][figure]


def difference(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of differences of the same seed, and the ends of Student's interval of 95 %; infinite for a single seed."""
    mean, count = statistics.mean(values), len(values)
    if count == 1:
        return mean, -math.inf, math.inf
    half = _STUDENT[min(count, len(_STUDENT)) - 1] * statistics.stdev(values) / math.sqrt(count)
    return mean, mean - half, mean + half


def verdict(low: float, high: float) -> str:
    """What an interval says of a claim."""
    return "holds" if low > 0 else "opposite" if high < 0 else "no difference seen"


def _parse(argv: list[str]) -> Any:
    parser = argparse.ArgumentParser(
        prog="claims-toy", description=DESCRIPTION, formatter_class=HelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--paper", required=True, choices=tuple(PAPERS), help="whose claims")
    add("--seeds", type=whole_number(1), default=3, help="number of seeds")
    add("--out", metavar="DIR", default="build/claims", help="folder of the toys' runs")
    add("--claims", metavar="DIR", help="folder of the figures (default: docs/claims, with --quick OUT)")
    add_start(parser)
    add("--quick", action="store_true", help="runs of a few steps, which say nothing")
    return parser.parse_args(argv)
