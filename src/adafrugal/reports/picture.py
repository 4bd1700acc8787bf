"""One run as a picture: loss, density, interval and state bytes over its steps."""

from __future__ import annotations

from pathlib import Path

from adafrugal.tracking.record import Record, spoken


def draw(record: Record, file: Path) -> None:
    """Draw a run's metrics into an SVG, the same to the byte for the same record."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "adafrugal"
    from matplotlib import pyplot

    lines, summary = record.metrics(), record.summary()
    steps = [line["step"] for line in lines]
    evaluated = [line for line in lines if "validation_loss" in line]
    metrics = list(summary.get("metrics", [])) if summary else []
    moving = [] if lines[-1]["density"] is None else ["density", "interval"]
    panels = ["loss", *(["scores"] if metrics else []), *moving, "state"]
    figure, axes = pyplot.subplots(
        len(panels), sharex=True, figsize=(7, 2 + 1.5 * len(panels)), layout="constrained",
        height_ratios=[2] + [1] * (len(panels) - 1),
    )  # fmt: skip
    by_name = dict(zip(panels, axes, strict=True))
    loss = by_name["loss"]
    loss.plot(steps, [line["loss"] for line in lines], color="C0", alpha=0.5, label="training")
    loss.plot([line["step"] for line in evaluated], [line["validation_loss"] for line in evaluated], "o-", color="C0",
              markersize=3, label="validation")  # fmt: skip
    if summary and "unigram" in summary:
        loss.axhline(summary["unigram"]["loss"], color="grey", linestyle=":", label="unigram model")
    loss.set_ylabel("loss" if metrics else "loss (nats per token)")
    loss.legend(frameon=False)
    loss.set_title(f"{record.directory.parent.name} / {record.directory.name}", fontsize=10)
    for place, name in enumerate(metrics):
        by_name["scores"].plot([line["step"] for line in evaluated], [line[name] for line in evaluated], "o-",
                               color=f"C{4 + place % 4}", markersize=3, label=spoken(name))  # fmt: skip
        by_name["scores"].set_ylabel("validation\nscores")
        by_name["scores"].legend(frameon=False)
    if "density" in by_name:
        by_name["density"].plot(steps, [line["density"] for line in lines], color="C1")
        by_name["density"].set_ylabel("density ρ")
        by_name["density"].set_ylim(bottom=0)
        by_name["interval"].step(steps, [line["interval"] for line in lines], color="C2", where="post")
        by_name["interval"].set_ylabel("interval T\n(steps)")
        by_name["interval"].set_ylim(bottom=0)
    state = by_name["state"]
    state.step(steps, [line["state_bytes"] / 2**20 for line in lines], color="C3", where="post")
    if summary:
        state.axhline(summary["state_bytes"]["adamw"] / 2**20, color="grey", linestyle=":", label="AdamW")
        state.legend(frameon=False)
    state.set_ylabel("optimizer state\n(MiB)")
    state.set_ylim(bottom=0)
    state.set_xlabel("step")
    beside = file.with_name(f".{file.name}.new")  # half a picture would never be drawn again
    figure.savefig(beside, format="svg", metadata={"Date": None})
    beside.replace(file)
    pyplot.close(figure)
