"""Print estimates: side by side, and what fits."""

from __future__ import annotations

from collections.abc import Sequence

from adafrugal.memory import card, fit
from adafrugal.memory.estimate import Estimate, Stage, shared
from adafrugal.memory.on_device import chunk_rows, rows_at_once
from adafrugal.models import decoder
from adafrugal.settings.schema import Settings


def text(found: Sequence[tuple[Settings, Estimate]]) -> str:
    """A table in MiB with a column for each optimizer at each density that it begins or ends with."""
    settings, first = found[0]
    trainer = settings.trainer
    processes, logits = shared(trainer), ""
    rows, among = rows_at_once(trainer, processes), f", of {processes} processes" if processes > 1 else ""
    if settings.task.kind == "pretrain":
        chunks = chunk_rows(decoder.sized(settings), None, processes)
        logits = "logits in one piece; " if chunks is None else f"logits of {chunks:,} tokens at once; "
    assumed = "auto, taken as fp32: type trainer.precision=bf16 for what a GPU takes"
    precision = assumed if trainer.precision == "auto" else trainer.precision
    columns = [(s.arm, stage) for s, e in found for stage in e.stages]
    heads = [str(arm) if stage.density is None else f"{arm}, ρ {stage.density:.3g}" for arm, stage in columns]
    cells = [["MiB", *heads], *_rows([stage for _, stage in columns])]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        f"{first.parameters:,} parameters; {rows} × {trainer.sequence_length} tokens in a micro-batch, "
        f"{trainer.batch_size} rows in a step{among}; {logits}precision {precision}",
        "",
        *("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells),
        "",
        "peak: the most bytes that all tensors of a step take at once, traced with a CPU's kernels, without allocating",
        "them. What the card must have: another estimate, of the peak, the most that torch's allocator kept beyond",
        "tensors in measurements on an H100, and the largest of CUDA's contexts there.",
    ]
    return "\n".join(lines) + "\n"


def _rows(stages: Sequence[Stage]) -> list[list[str]]:
    sizes = {"weights": [s.peak.weights for s in stages], "state": [s.peak.state for s in stages]}
    for whose, role in dict.fromkeys(key for stage in stages for key in stage.state):
        sizes[f"  {role} of {whose} tensors"] = [stage.state.get((whose, role), 0) for stage in stages]
    for part in ("gradients", "activations", "temporaries"):
        sizes[f"{part} at the peak"] = [getattr(stage.peak, part) for stage in stages]
    sizes["evaluation"] = [stage.evaluation.total for stage in stages]
    sizes["peak"] = [stage.peak.total for stage in stages]
    rows = [[name, *(f"{size / 2**20:,.2f}" for size in row)] for name, row in sizes.items()]
    rows.append(["  in phase", *(stage.peak.phase for stage in stages)])
    return [*rows, ["what the card must have", *(f"{card.needed(stage.peak) / 2**20:,.2f}" for stage in stages)]]


def chosen(settings: Settings, found: fit.Fitted) -> str:
    """One line on the density chosen for the budget of the settings."""
    budget = card.of_settings(settings)
    assert budget is not None
    whole = " for the whole card" if budget.whole else ""
    peak = f"{found.peak / card.GIB:.2f} GiB{whole} by the estimate"
    return f"ρ begins at {found.density:g}: {peak}, of {budget.gib:g} ({budget.name})"


def what_fits(settings: Settings, budget: card.Budget) -> str:
    """The largest micro-batch, and the largest ρ, whose estimate fits."""
    counted = "what the card must have" if budget.whole else "tensors alone"
    lines = [f"{settings.arm} in {budget.gib:g} GiB ({budget.name}; {counted}):"]
    rows = fit.largest_micro_batch(settings, budget)
    what = "batch" if settings.trainer.update_in_backward else "micro-batch"
    batch = settings.trainer.batch_size
    is_all = rows == batch // shared(settings.trainer)
    limit = f", as much as trainer.batch_size={batch} gives: a larger one may fit, too" if is_all else ""
    lines.append(f"  the largest {what} is {rows}{limit}" if rows else f"  not even a {what} of one row fits")
    if hasattr(settings.optimizer, "density"):
        found = fit.largest_density(settings, budget, [n / 100 for n in range(101)])
        held = f"with the micro-batch of {settings.trainer.micro_batch_size or settings.trainer.batch_size} that is set"
        lines.append(f"  no ρ fits {held}" if found is None else f"  the largest ρ is {found.density:g} {held}")
    return "\n".join(lines) + "\n"
