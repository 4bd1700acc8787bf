"""Records as train.py would leave them, made by hand: real settings and identities, invented numbers."""

from dataclasses import asdict

from adafrugal.reports import plan, records
from adafrugal.reports.arms import compose_once
from adafrugal.settings.compose import check
from adafrugal.settings.identity import differing, identify
from adafrugal.tracking.record import Record

MIB = 2**20


def recorded(root, words, loss=4.5, seed=0, state=(3.0, 3.0), share=0.03, early=None, data="0" * 64, evaluation=0.5,
             precision="bf16", **differs):  # fmt: skip
    """A finished pre-training run of what `words` compose, with that validation loss, and with settings that differ."""
    composed, choices = compose_once([*words.split(), f"seed={seed}", f"run_root={root}"])  # files are read once
    settings = check(composed, choices)
    identity = identify(settings, choices)
    record = Record(identity.directory)
    record._write = lambda name, text: (record.directory / name).write_text(text)  # without waiting for the disk
    config = asdict(settings)
    record.begin({key: value for key, value in config.items() if key not in ("run_root", "cache_root")})
    record.write_environment({
        "precision": precision, "data": {"fingerprint": data},
        "identity": {"key": identity.key, "labels": identity.labels, "differs": differing(settings) | differs},
    })  # fmt: skip
    is_frugal, steps = settings.optimizer.kind == "frugal", settings.trainer.steps
    for number in range(1, 5):
        step, done = steps * number // 4, number / 4
        size = (state[0] + (state[1] - state[0]) * done) * MIB
        record.add_metrics({
            "step": step, "loss": loss + 1 - done, "tokens": 100 * step, "seconds": {"forward": 1.0},
            "density": 0.25 - 0.2 * done if is_frugal else None, "interval": 25 * number if is_frugal else None,
            "state_bytes": size, "state_bytes_by_role": {"moments": size - MIB / 4, "counters": MIB / 4},
            "memory": {"resident": (500 + number) * MIB, "peak_resident": 600 * MIB},
            "validation_loss": (early or loss + 0.5) if number == 1 else loss + 1 - done,
        })  # fmt: skip
    record.write_summary({
        "steps": steps, "tokens": 100 * steps, "epochs": 0.5, "validation_loss": loss,
        "validation_perplexity": 2.0**loss, "validation_bits_per_byte": loss / 2, "optimizer_share": share,
        "unigram": {"loss": 6.5, "perplexity": 665.1},
        "seconds": {"data": 0.1, "forward": 1.0, "backward": 2.0, "optimizer": 3 * share, "evaluation": evaluation,
                    "wall": 4},
        "state_bytes": {"start": state[0] * MIB, "peak": state[0] * MIB, "end": state[1] * MIB, "adamw": 4 * MIB,
                        "end_by_role": {"moments": (state[1] - 0.25) * MIB, "counters": MIB / 4}},
        **({"split_moments": {"bytes": (state[1] - 0.25) * MIB / 3, "selected_entries": 1}} if is_frugal else {}),
    })  # fmt: skip
    record.set_status("finished")
    return record


def section(jobs, root, **more):
    """The section of these jobs, filled with the runs below a directory."""
    empty = plan.Page("page", plan.PageFile(), [plan.Section("main", "Main", [], jobs=jobs, **more)])
    return plan.filled([empty], records.find([root]))[0].sections[0]
