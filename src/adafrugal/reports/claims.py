"""Check the papers' claims on a table: statement, numbers and verdict.

A claim is a conjunction of parts. A part says that a weighted sum of arms' numbers is below zero, seed by seed: "a is
below b" is `a − b`, "a is within 2% of b" is `a − 1.02·b`. A part holds if the whole 95% interval is below zero and
fails if it is above; otherwise there are not enough runs. The papers do not define "close" or "far more": the margins
are ours, and the part's text names them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from adafrugal.reports.grid import difference
from adafrugal.reports.statistics import Sample, contrast
from adafrugal.tracking.record import Record

if TYPE_CHECKING:
    from adafrugal.reports.plan import Section

HOLDS, FAILS, OPEN = "holds", "does not hold", "not enough runs"
CLOSE = 0.02  # of the loss


def _loss(run: Record) -> float:
    return run.summary()["validation_loss"]


def _early_loss(run: Record) -> float:
    """Return the validation loss at the first evaluation of `eval.every`, after a quarter of a small run."""
    every = run.config()["eval"]["every"]
    return next(line["validation_loss"] for line in run.metrics() if line["step"] == every)


def _overhead(run: Record) -> float:
    """Return the time of optimizer, refreshes and evaluations (which move T), as a share of forward and backward."""
    seconds = run.summary()["seconds"]
    passes = seconds["forward"] + seconds["backward"]
    return sum(seconds.get(phase, 0.0) for phase in ("optimizer", "refresh", "evaluation")) / passes


def _state(when: str, less: str | None = None) -> Callable[[Record], float]:
    """Return a function to the optimizer's state in MiB at the start, peak or end of a run, less that at `less`."""

    def number(run: Record) -> float:
        sizes = run.summary()["state_bytes"]
        return (sizes[when] - (sizes[less] if less else 0)) / 2**20

    return number


@dataclass(frozen=True)
class Part:
    """One condition of a claim."""

    text: str
    coefficients: Mapping[str, float]  # job -> factor of its number
    number: Callable[[Record], float] = _loss
    form: str = ".4f"
    is_exact: bool = False  # the number is counted, without noise: one seed is enough
    without: int | None = None  # a seed to leave out, since an arm was selected by it


@dataclass(frozen=True)
class Claim:
    """A statement, its source, and its parts, which must all hold and may depend on the table."""

    text: str
    source: str
    parts: tuple[Part, ...] | Callable[[Section], tuple[Part, ...]]


class Finding(NamedTuple):
    """The verdict on a part; `found` is None if an arm has no runs."""

    part: Part
    found: Sample | None
    verdict: str


def _below(one: str, other: str, **more: Any) -> Part:
    return Part(f"{one}'s loss below {other}'s", {one: 1, other: -1}, **more)


def _close(one: str, other: str) -> Part:
    return Part(f"{one}'s loss at most {CLOSE:.0%} above {other}'s", {one: 1, other: -1 - CLOSE})


def _counted(text: str, number: Callable[[Record], float], **coefficients: float) -> Part:
    return Part(text, coefficients, number, ".2f", is_exact=True)


def _head_costs_more(module: str) -> Part:
    text = f"the head costs more than twice what the {module} cost"
    return Part(text, {"head": -1, module: 2, "usual": -1})


def _against_the_best(section: Section) -> tuple[Part, ...]:
    """Compare AdaFRUGAL with the best static setting of a search on one seed, on the other seeds."""
    static = {name: job for name, job in section.rows.items() if name != "adafrugal"}
    seed = next(iter(static.values())).seeds[0]
    losses = {name: _loss(job.runs[seed]) for name, job in static.items() if seed in job.runs}
    if not losses:
        return (Part("adafrugal against the best static ρ and T", {"adafrugal": 1, "the best": -1}),)
    best = min(losses, key=losses.__getitem__)
    what = f"{best}, the best of {len(losses)} static settings on seed {seed}, which cost as many runs; on the other"
    return (
        Part(f"adafrugal at most {CLOSE:.0%} above {what} seeds", {"adafrugal": 1, best: -1 - CLOSE}, without=seed),
    )


OVERHEAD = "optimizer, refreshes and evaluations take, as a share of forward and backward,"
FRUGAL, ADAFRUGAL = "FRUGAL (arXiv 2411.07837)", "AdaFRUGAL (arXiv 2601.11568)"
CLAIMS = {
    "F1": Claim("At ρ = 0.25 FRUGAL beats GaLore and BAdam with the same memory budget and comes close to AdamW.",
                FRUGAL, (_below("frugal", "galore"), _below("frugal", "badam"), _close("frugal", "adamw"))),
    "F2": Claim("FRUGAL with ρ = 0 beats GaLore and BAdam with ρ = 0.25.", f"a public summary of {FRUGAL}",
                (_below("frugal_0", "galore"), _below("frugal_0", "badam"))),
    "F3": Claim("Moving the output head to signSGD hurts far more than moving embeddings or norms.",
                f"a public summary of {FRUGAL}",
                (_below("usual", "head"), _head_costs_more("embeddings"), _head_costs_more("norms"))),
    "F4": Claim("SVD gives an early boost, random choice does better later.", f"quoted by a reviewer of {FRUGAL}",
                (_below("svd", "random", number=_early_loss), _below("random", "svd"))),
    "A1": Claim("Quality competitive with AdamW and static FRUGAL.", ADAFRUGAL,
                (_close("adafrugal", "adamw"), _close("adafrugal", "frugal"))),
    "A2": Claim("Less GPU memory, progressively.", ADAFRUGAL, (
        _counted("adafrugal's optimizer state (MiB) is less at the end than at the start (on the way it rises, too, "
                 "where larger matrices have their turn)", _state("end", less="start"), adafrugal=1),
        _counted("and at its highest less than adamw's", _state("peak"), adafrugal=1, adamw=-1),
        _counted("and at the end less than frugal's", _state("end"), adafrugal=1, frugal=-1))),
    "A3": Claim("Less training time.", ADAFRUGAL,
                (Part(f"adafrugal's {OVERHEAD} less than frugal's", {"adafrugal": 1, "frugal": -1}, _overhead),)),
    "A3-svd": Claim("Less training time: a longer T, where the refresh is expensive.", ADAFRUGAL, (
        Part(f"with a T that grows {OVERHEAD} less", {"adafrugal_interval": 1, "frugal": -1}, _overhead),
        _close("adafrugal_interval", "frugal"))),
    "A4": Claim("Autonomy: no manual tuning of ρ and T.", ADAFRUGAL, _against_the_best),
}  # fmt: skip


def judge(claim: Claim, section: Section) -> list[Finding]:
    """Return the verdict of a table on each part of a claim."""
    findings = []
    for part in claim.parts(section) if callable(claim.parts) else claim.parts:
        arms = {name: job for name, job in section.rows.items() if name in part.coefficients}
        numbers = {
            name: {seed: part.number(run) for seed, run in job.runs.items() if seed != part.without}
            for name, job in arms.items()
        }
        found, judged = contrast(numbers, part.coefficients), OPEN
        if found is not None and (part.is_exact or found.interval):
            low, high = (found.mean, found.mean) if part.is_exact else found.interval
            judged = HOLDS if high < 0 else FAILS if low > 0 or part.is_exact else OPEN
        findings.append(Finding(part, found, judged))
    return findings


def verdict(findings: list[Finding]) -> str:
    """Return the verdict on a whole claim; it fails if one part fails."""
    found = {finding.verdict for finding in findings}
    return FAILS if FAILS in found else OPEN if OPEN in found else HOLDS


def markdown(section: Section) -> str:
    """Return the claims of a section and their verdicts as a list; empty if it has none."""
    findings = {name: judge(CLAIMS[name], section) for name in section.claims}
    about = "Each number is a sum that is below zero where the part holds, with its 95% interval over seeds."
    if any("at most" in finding.part.text for found in findings.values() for finding in found):
        about += f" {CLOSE:.0%} of a loss of 4.5 is {math.expm1(CLOSE * 4.5):.0%} in perplexity."
    lines = []
    for name, found in findings.items():
        lines.append(f"- **{name}: {verdict(found)}.** {CLAIMS[name].text} ({CLAIMS[name].source})")
        for part, sample, judged in found:
            seeds = f", {sample.n} seeds" if sample and sample.interval else ""
            numbers = f"{difference(sample, part.form).text}{seeds}: " if sample else ""
            lines.append(f"  - {part.text}: {numbers}{judged}")
    return "\n".join(["### What the papers claim", "", about, "", *lines]) if lines else ""
