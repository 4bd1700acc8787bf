"""Estimates as text: side by side, and what fits."""

from __future__ import annotations

from collections.abc import Sequence

from adafrugal.memory import fit
from adafrugal.memory.estimate import Estimate, Stage
from adafrugal.memory.on_device import chunk_rows
from adafrugal.settings.schema import Settings
from adafrugal.system.errors import SettingError

MIB = 2**20
ROLES = (  # of the state, in the order in which they are listed
    ("state-full", "moments"), ("split", "moments"), ("split", "indices"), ("split", "basis"),
)  # fmt: skip


def text(found: Sequence[tuple[Settings, Estimate]]) -> str:
    """A column for each optimizer at each density that it begins or ends with; MiB."""
    settings, first = found[0]
    trainer = settings.trainer
    rows = trainer.micro_batch_size or trainer.batch_size
    columns = [(s, stage) for s, e in found for stage in e.stages]
    lines = [
        f"{first.parameters:,} parameters; {rows} × {trainer.sequence_length} tokens in a micro-batch, "
        f"{trainer.batch_size} rows in a step; {_logits(settings)}; precision {_precision(trainer.precision)}",
        "",
        *_aligned([["MiB", *(_named(s, stage) for s, stage in columns)], *_rows([stage for _, stage in columns])]),
        "",
        "peak: bytes of all tensors at the moment of a step when they are most, traced on a CPU's kernels without",
        "allocating them. What a GPU's allocator reserves beside it, its context, and libraries are not in it.",
    ]
    return "\n".join(lines) + "\n"


def chosen(settings: Settings, found: fit.Fitted) -> str:
    """What `optimizer.fit_gib` has led to, in a line."""
    gib = settings.optimizer.fit_gib
    return (
        f"ρ begins at {found.density:g}: {found.peak / fit.GIB:.2f} GiB by the estimate, of {gib:g} (optimizer.fit_gib)"
    )


def _logits(settings: Settings) -> str:
    rows = chunk_rows(settings)
    return "logits in one piece" if rows is None else f"logits of {rows:,} tokens at once"


def _precision(given: str) -> str:
    return "auto, taken as fp32: type trainer.precision=bf16 for what a GPU takes" if given == "auto" else given


def _named(settings: Settings, stage: Stage) -> str:
    return f"{settings.arm}, ρ {stage.density:.3g}" if stage.density is not None else str(settings.arm)


def _rows(stages: Sequence[Stage]) -> list[list[str]]:
    rows = [["weights", *(_mib(stage.peak.weights) for stage in stages)]]
    rows.append(["state", *(_mib(stage.state_bytes) for stage in stages)])
    for whose, what in ROLES:
        sizes = [stage.state.get((whose, what), 0) for stage in stages]
        if any(sizes):
            rows.append([f"  {what} of {whose} tensors", *map(_mib, sizes)])
    others = [sum(size for role, size in stage.state.items() if role not in ROLES) for stage in stages]
    rows.append(["  counters", *map(_mib, others)])
    rows.append(["peak, all in all", *(_mib(stage.peak.total) for stage in stages)])
    rows.append(["  comes in", *(stage.peak.phase for stage in stages)])
    for name in ("gradients", "activations", "temporaries"):
        rows.append([f"  {name} then", *(_mib(getattr(stage.peak, name)) for stage in stages)])
    return rows


def _mib(size: int) -> str:
    return f"{size / MIB:,.2f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def what_fits(settings: Settings, gib: float) -> str:
    """The largest micro-batch, and the largest ρ, whose estimate stays under so many GiB.

    Raises:
        SettingError: not a positive number of GiB.
    """
    if not gib > 0:
        raise SettingError(f"--fits is {gib}; allowed: a number of GiB above 0")
    lines = [f"{settings.arm} in {gib:g} GiB:"]
    rows = fit.largest_micro_batch(settings, gib)
    what = "batch" if settings.trainer.update_in_backward else "micro-batch"
    lines.append(f"  the largest {what} is {rows}" if rows else f"  not even a {what} of one row fits")
    if hasattr(settings.optimizer, "density"):
        share = fit.largest_density(settings, gib, [n / 100 for n in range(101)])
        typed = settings.trainer.micro_batch_size or settings.trainer.batch_size
        held = f"with the micro-batch of {typed} that is set"
        lines.append(f"  no ρ fits {held}" if share is None else f"  the largest ρ is {share:g} {held}")
    return "\n".join(lines) + "\n"
