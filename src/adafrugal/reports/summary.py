"""The end of one run, as a person reads it."""

from __future__ import annotations

from adafrugal.tracking.record import Record, spoken


def text(record: Record) -> str:
    """The summary of a finished run, a few lines."""
    found = record.summary()
    memory, seconds = found["state_bytes"], found["seconds"]
    phases = {name: s for name, s in seconds.items() if name != "wall"}
    start, end = mib(memory["start"]), mib(memory["end"])
    rows = [
        *(_scores(found) if "metrics" in found else _language(found)),
        ("trained on", _trained_on(found)),
        ("optimizer state", f"{start} at the start, {end} at the end; AdamW keeps {mib(memory['adamw'])}"),
        *_memory(found.get("memory", {})),
        ("seconds", "  ".join(f"{name} {s:.1f}" for name, s in phases.items()) + f"  all {seconds['wall']:.1f}"),
        ("optimizer", f"{found['optimizer_share']:.1%} of the time of forward and backward"),
        ("record", str(record.directory)),
        ("picture", str(record.directory / "picture.svg")),
    ]  # fmt: skip
    return "\n".join(f"{name:<16} {value}" for name, value in rows)


def _language(found: dict) -> list[tuple[str, str]]:
    """What a pre-training reached."""
    perplexity, unigram = found["validation_perplexity"], found["unigram"]
    return [
        ("validation loss", f"{found['validation_loss']:.4f} nats a token, {_below(found)}"),
        ("perplexity", f"{perplexity:.1f}, a unigram model of the same tokens has {unigram['perplexity']:.1f}"),
        ("bits per byte", f"{found['validation_bits_per_byte']:.3f}"),
    ]


def _scores(found: dict) -> list[tuple[str, str]]:
    """What a fine-tuning reached, at the end and at its best by the first metric."""
    last, best, by = found["last"], found["best"], spoken(found["metric"])
    return [
        (spoken(name), f"{last[name]:.4f} at the end; {best[name]:.4f} at step {best['step']:,}, the best by {by}")
        for name in ("validation_loss", *found["metrics"])
    ]


def _memory(found: dict) -> list[tuple[str, str]]:
    """The estimate of the peak beside what was measured; a process on a CPU holds more than tensors."""
    if "estimate" not in found:
        return []
    if "allocated" in found:
        what = found.get("peak_is", "allocated")
        measured = f"{mib(found['grown'])} {what}, to which the estimate is {found['estimate_error']:+.1%}"
    else:
        measured = f"the process grew by {mib(found['grown'])}, with libraries and evaluations"
    of = " of a run that is not compiled" if found.get("is_upper_bound") else ""
    return [("memory", f"{mib(found['estimate'])} at most by the estimate{of}; {measured}")]


def _trained_on(found: dict) -> str:
    read = f"{found['tokens']:,} tokens in {found['steps']:,} steps"
    what = "epochs" if "metrics" in found else "of the text"
    more = [] if found["epochs"] is None else [f"{found['epochs']:.2f} {what}"]  # its length may not be known
    if found.get("padding"):
        more.append(f"{found['padding']:.1%} padding")
    return f"{read} ({', '.join(more)})" if more else read


def mib(count: float) -> str:
    """Bytes as MiB."""
    return f"{count / 2**20:.2f} MiB"


def _below(found: dict) -> str:
    below = found["unigram"]["loss"] - found["validation_loss"]
    return f"{abs(below):.2f} {'below' if below >= 0 else 'above'} a unigram model's {found['unigram']['loss']:.4f}"
