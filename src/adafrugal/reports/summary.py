"""Summarise one finished run, as text for the terminal."""

from __future__ import annotations

from typing import Any

from adafrugal.tracking.record import Record, spoken


def text(record: Record) -> str:
    """Return the summary of a finished run in a few lines."""
    found = record.summary()
    state, seconds = found["state_bytes"], found["seconds"]
    phases = "  ".join(f"{name} {s:.1f}" for name, s in seconds.items() if name != "wall")
    rows = [
        *(_scores(found) if "metrics" in found else _language(found)),
        ("trained on", _trained_on(found)),
        *_began(found),
        ("optimizer state", f"{_mib(state['start'])} at the start, {_mib(state['end'])} at the end; "
                            f"AdamW keeps {_mib(state['adamw'])}"),
        *_memory(found.get("memory", {})),
        ("seconds", f"{phases}  all {seconds['wall']:.1f}"),
        ("optimizer", f"{found['optimizer_share']:.1%} of the time of forward and backward"),
        ("record", record.directory),
        ("picture", record.directory / "picture.svg"),
    ]  # fmt: skip
    return "\n".join(f"{name:<16} {value}" for name, value in rows)


def _language(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the results of pre-training."""
    loss, unigram = found["validation_loss"], found["unigram"]
    beside = f"{abs(unigram['loss'] - loss):.2f} {'below' if loss <= unigram['loss'] else 'above'} a unigram model's"
    of = f"a unigram model of the same tokens has {unigram['perplexity']:.1f}"
    return [
        ("validation loss", f"{loss:.4f} nats a token, {beside} {unigram['loss']:.4f}"),
        ("perplexity", f"{found['validation_perplexity']:.1f}, {of}"),
        ("bits per byte", f"{found['validation_bits_per_byte']:.3f}"),
    ]


def _scores(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the results of fine-tuning, at the end and at the best by the first metric."""
    last, best, by = found["last"], found["best"], spoken(found["metric"])
    return [
        (spoken(name), f"{last[name]:.4f} at the end; {best[name]:.4f} at step {best['step']:,}, the best by {by}")
        for name in ("validation_loss", *found["metrics"])
    ]


def _memory(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the estimated and the measured peak; on a CPU the process also holds libraries and evaluations."""
    if "estimate" not in found:
        return []
    measured = "not measured, since its process made other runs before, or it began with a checkpoint"
    if "allocated" in found:
        what, error = found.get("peak_is", "allocated"), found.get("estimate_error", 0.0)
        measured = f"measured {_mib(found['grown'])} {what}, to which the estimate is {error:+.1%}"
    elif "grown" in found:
        measured = f"measured {_mib(found['grown'])}, by which the process grew, with libraries and evaluations"
    of = " of a run that is not compiled" if found.get("is_upper_bound") else ""
    return [("peak memory", f"{_mib(found['estimate'])} at most by the estimate{of}; {measured}")]


def _trained_on(found: dict[str, Any]) -> str:
    of = "epochs" if "metrics" in found else "of the text"
    more = [] if found["epochs"] is None else [f"{found['epochs']:.2f} {of}"]  # the text's length may be unknown
    if found.get("padding"):
        more.append(f"{found['padding']:.1%} padding")
    return f"{found['tokens']:,} tokens in {found['steps']:,} steps" + (f" ({', '.join(more)})" if more else "")


def _began(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the checkpoint with which the run began, if it was another run's; seconds and peaks are since then."""
    begins = found.get("continued_from")
    return [("continued from", f"{begins['run']} after step {begins['step']:,}")] if begins else []


def _mib(count: float) -> str:
    return f"{count / 2**20:.2f} MiB"
