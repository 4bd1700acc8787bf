"""What the papers claim, as checks on a table: the statement, the numbers, and whether they bear it out.

A claim is a conjunction of parts. Each part says that a sum of arms' numbers, times coefficients, is at most zero, seed
by seed: "a is below b" is `a − b ≤ 0`, "a is within 2% of b" is `a − 1.02·b ≤ 0`. It holds where the whole 95% interval
is below zero, it does not hold where the whole interval is above, and between the two there are not enough runs. What
"close" or "far more" means is not in the papers: the margins are ours, and stand in the part's words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from adafrugal.reports.grid import Difference
from adafrugal.reports.plan import Section
from adafrugal.reports.statistics import Contrast, contrast
from adafrugal.tracking.record import Record

HOLDS, FAILS, OPEN = "holds", "does not hold", "not enough runs"
CLOSE = 0.02  # of the loss


def _loss(run: Record) -> float:
    return run.summary()["validation_loss"]


def _beside(run: Record) -> float:
    """What a run does beside forward and backward, as a share of them; evaluations that move T are part of it."""
    seconds = run.summary()["seconds"]
    passes = seconds["forward"] + seconds["backward"]
    return sum(seconds.get(phase, 0.0) for phase in ("optimizer", "refresh", "evaluation")) / passes


def _state_peak(run: Record) -> float:
    return run.summary()["state_bytes"]["peak"] / 2**20


def _state_end(run: Record) -> float:
    return run.summary()["state_bytes"]["end"] / 2**20


def _state_gone(run: Record) -> float:
    """Bytes at the end less those at the start: below zero where memory was freed."""
    state = run.summary()["state_bytes"]
    return (state["end"] - state["start"]) / 2**20


def _early_loss(run: Record) -> float:
    """The validation loss at the first evaluation that every run has, a quarter of a small run."""
    every = run.config()["eval"]["every"]
    return next(line["validation_loss"] for line in run.metrics() if line["step"] == every)


@dataclass(frozen=True)
class Part:
    """One thing that a claim says.

    Args:
        text: in words.
        coefficients: job -> what its number is multiplied by; the sum is to be at most zero.
        number: of a run.
        form: how the sum is written.
        is_exact: whether the number is counted, so that one seed says it.
        without: a seed that is left out, since something was chosen by it.
    """

    text: str
    coefficients: Mapping[str, float]
    number: Callable[[Record], float] = _loss
    form: str = ".4f"
    is_exact: bool = False
    without: int | None = None


@dataclass(frozen=True)
class Claim:
    """A statement and its parts.

    Args:
        name: as this project calls it.
        text: the statement.
        source: where it stands.
        parts: all of which have to hold; or what gives them, where they depend on the table.
    """

    name: str
    text: str
    source: str
    parts: tuple[Part, ...] | Callable[[Section], tuple[Part, ...]]


@dataclass(frozen=True)
class Finding:
    """A part, judged on a table.

    Args:
        part: what was to be shown.
        found: the sum; None where an arm has no runs.
        verdict: holds, does not hold, or not enough runs.
    """

    part: Part
    found: Contrast | None
    verdict: str


def below(one: str, other: str, **more: Any) -> Part:
    """One arm's loss is below another's."""
    return Part(f"{one}'s loss below {other}'s", {one: 1, other: -1}, **more)


def close(one: str, other: str) -> Part:
    """One arm's loss is at most `CLOSE` above another's."""
    return Part(f"{one}'s loss at most {CLOSE:.0%} above {other}'s", {one: 1, other: -1 - CLOSE})


def _against_the_best(section: Section) -> tuple[Part, ...]:
    """AdaFRUGAL against the static setting that a search on one seed finds, on other seeds."""
    static = [job for job in section.jobs if job.name != "adafrugal"]
    seed = static[0].seeds[0]
    losses = {job.name: _loss(job.runs[seed]) for job in static if seed in job.runs}
    if not losses:
        return (Part("adafrugal against the best static ρ and T", {"adafrugal": 1, "the best": -1}),)
    best = min(losses, key=losses.__getitem__)
    what = (
        f"{best}, the best of {len(losses)} static settings on seed {seed}, which cost as many runs; on the other seeds"
    )
    return (Part(f"adafrugal at most {CLOSE:.0%} above {what}", {"adafrugal": 1, best: -1 - CLOSE}, without=seed),)


BESIDE = "optimizer, refreshes and evaluations take, as a share of forward and backward,"
FRUGAL, ADAFRUGAL = "arXiv 2411.07837", "arXiv 2601.11568"
CLAIMS = {
    claim.name: claim
    for claim in (
        Claim("F1", "At ρ = 0.25 FRUGAL beats GaLore and BAdam with the same memory budget and comes close to AdamW.",
              f"FRUGAL ({FRUGAL})", (below("frugal", "galore"), below("frugal", "badam"), close("frugal", "adamw"))),
        Claim("F2", "FRUGAL with ρ = 0 beats GaLore and BAdam with ρ = 0.25.", f"a public summary of FRUGAL ({FRUGAL})",
              (below("frugal_0", "galore"), below("frugal_0", "badam"))),
        Claim("F3", "Moving the output head to signSGD hurts far more than moving embeddings or norms.",
              f"a public summary of FRUGAL ({FRUGAL})",
              (below("usual", "head"),
               *(Part(f"the head costs more than twice what the {name} cost", {"head": -1, name: 2, "usual": -1})
                 for name in ("embeddings", "norms")))),
        Claim("F4", "SVD gives an early boost, random choice does better later.",
              f"quoted by a reviewer of FRUGAL ({FRUGAL})",
              (below("svd", "random", number=_early_loss), below("random", "svd"))),
        Claim("A1", "Quality competitive with AdamW and static FRUGAL.", f"AdaFRUGAL ({ADAFRUGAL})",
              (close("adafrugal", "adamw"), close("adafrugal", "frugal"))),
        Claim("A2", "Less GPU memory, progressively.", f"AdaFRUGAL ({ADAFRUGAL})", (
            Part("adafrugal's optimizer state (MiB) is less at the end than at the start (on the way it rises, too, "
                 "where larger matrices have their turn)", {"adafrugal": 1},
                 _state_gone, ".2f", is_exact=True),
            Part("and at its highest less than adamw's", {"adafrugal": 1, "adamw": -1}, _state_peak, ".2f",
                 is_exact=True),
            Part("and at the end less than frugal's", {"adafrugal": 1, "frugal": -1}, _state_end, ".2f", is_exact=True),
        )),
        Claim("A3", "Less training time.", f"AdaFRUGAL ({ADAFRUGAL})", (
            Part(f"adafrugal's {BESIDE} less than frugal's",
                 {"adafrugal": 1, "frugal": -1}, _beside),
        )),
        Claim("A3-svd", "Less training time: a longer T, where the refresh is expensive.", f"AdaFRUGAL ({ADAFRUGAL})", (
            Part(f"with a T that grows {BESIDE} less",
                 {"adafrugal_interval": 1, "frugal": -1}, _beside),
            close("adafrugal_interval", "frugal"),
        )),
        Claim("A4", "Autonomy: no manual tuning of ρ and T.", f"AdaFRUGAL ({ADAFRUGAL})", _against_the_best),
    )
}  # fmt: skip


def judge(claim: Claim, section: Section) -> list[Finding]:
    """What a table says of each part of a claim."""
    parts = claim.parts(section) if callable(claim.parts) else claim.parts
    return [_judge(part, section) for part in parts]


def verdict(findings: list[Finding]) -> str:
    """Of the whole claim: what one part does not bear out does not hold."""
    found = {finding.verdict for finding in findings}
    return FAILS if FAILS in found else OPEN if OPEN in found else HOLDS


def _judge(part: Part, section: Section) -> Finding:
    numbers = {
        job.name: {seed: part.number(run) for seed, run in job.runs.items() if seed != part.without}
        for job in section.jobs
        if job.name in part.coefficients
    }
    found = contrast(numbers, part.coefficients)
    if found is None:
        return Finding(part, None, OPEN)
    if part.is_exact:
        return Finding(part, found, HOLDS if found.mean < 0 else FAILS)
    if found.low is None or found.high is None:
        return Finding(part, found, OPEN)
    return Finding(part, found, HOLDS if found.high < 0 else FAILS if found.low > 0 else OPEN)


def markdown(section: Section) -> str:
    """The claims of a section, judged, as a list."""
    about = "Each number is a sum that is below zero where the part holds, with its 95% interval over seeds."
    if any("at most" in finding.part.text for name in section.claims for finding in judge(CLAIMS[name], section)):
        about += f" {CLOSE:.0%} of a loss of 4.5 is {math.expm1(CLOSE * 4.5):.0%} in perplexity."
    lines = [f"{about}\n"]
    for name in section.claims:
        claim = CLAIMS[name]
        findings = judge(claim, section)
        lines.append(f"- **{claim.name}: {verdict(findings)}.** {claim.text} ({claim.source})")
        lines += [f"  - {finding.part.text}: {_numbers(finding)}{finding.verdict}" for finding in findings]
    return "\n".join(lines)


def _numbers(finding: Finding) -> str:
    if finding.found is None:
        return ""
    seeds = "" if finding.found.low is None else f", {finding.found.n} seeds"
    return f"{Difference(finding.found, finding.part.form)}{seeds}: "
