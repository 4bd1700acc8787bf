"""A copy of the record for Weights & Biases, for which no run fails (one warning is all), and the way back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from adafrugal.config import SettingError, WandbTracking, is_plain_name
from adafrugal.tracking.record import Record

SECONDS = 30  # that a run waits for W&B at its start, and at its end


class WandbCopy:
    """Sends what the record holds, and what is added to it.

    Every start of a process makes a run of its own that begins with a copy of all metrics so far: offline runs
    cannot be continued at W&B, and two processes that write to one id overwrite each other.

    Args:
        settings: mode, project and entity.
        record: what is copied; W&B's own files go into its directory.
        identity: the run's identity; with the number of the start it is the id at W&B.
        labels: task, data, model, arm, seed: what tables select by. They become the group, the name and the tags.
        warn: told once, in a sentence, when the copy has failed.
    """

    def __init__(
        self,
        settings: WandbTracking,
        record: Record,
        identity: str,
        labels: Mapping[str, Any],
        warn: Callable[[str], None],
    ) -> None:
        self._run: Any = None
        self._warn = warn
        self._attempt(lambda: self._start(settings, record, identity, labels))
        for line in record.metrics():
            self.add_metrics(line)

    def _start(self, settings: WandbTracking, record: Record, identity: str, labels: Mapping[str, Any]) -> None:
        import wandb

        if settings.mode == "online" and not wandb.login(prompt=False):
            raise RuntimeError("there is no login: type `wandb login`, or set tracking.mode=offline")
        starts = sum(event["event"] == "start" for event in record.events())
        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            mode=settings.mode,
            dir=str(record.directory),
            id=f"{identity}-{starts}",
            group="-".join(str(labels[key]) for key in ("task", "data", "model")),
            name=f"{labels['arm']}-seed{labels['seed']}",
            tags=[f"{key}:{value}"[:64] for key, value in labels.items()],
            config=record.config() | {"environment": record.environment()},
            reinit="create_new",
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                init_timeout=SECONDS,
                finish_timeout=SECONDS,
                finish_timeout_raises=True,
            ),
        )

    def add_metrics(self, line: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl, nested names joined by slashes."""
        flat = _flat(line)
        self._attempt(lambda: self._run and self._run.log(flat, step=flat["step"]))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """The numbers of summary.json."""
        self._attempt(lambda: self._run and self._run.summary.update(_flat(summary)))

    def finish(self, exit_code: int) -> None:
        """Close the copy; 0 for a run that finished."""
        self._attempt(lambda: self._run and self._run.finish(exit_code=exit_code))
        self._run = None

    def _attempt(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # W&B raises all kinds; none of them may cost a run
            self._run = None
            reason = " ".join(str(error).split()) or type(error).__name__
            self._warn(f"W&B gets no copy of this run ({reason}); the record is complete without it")


def fetch(project: str, directory: Path) -> list[Record]:
    """Records of the finished runs of a project at W&B, made from its copies of them; events are not copied.

    Args:
        project: as entity/project.
        directory: where the records are written; one that is there is not fetched again.

    Raises:
        SettingError: W&B refuses, or cannot be reached.
    """
    import wandb

    try:
        runs = list(wandb.Api().runs(project))
        ours = [
            run for run in runs if "environment" in run.config and "steps" in run.summary and run.state == "finished"
        ]
    except Exception as error:  # W&B raises all kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        login = "log in with `wandb login`, and give entity/project as it stands in its address"
        raise SettingError(f"W&B does not give the runs of {project}: {reason}; {login}") from error
    return [_fetched(run, directory) for run in ours]


def _fetched(run: Any, directory: Path) -> Record:
    config = {key: value for key, value in run.config.items() if not key.startswith("_")}
    environment = config.pop("environment")
    labels = environment["identity"]["labels"]
    group = "-".join(str(labels[key]) for key in ("task", "data", "model"))
    record = Record(directory / _name(group) / _name(environment["identity"]["key"]))
    if record.status != "finished":
        record.begin(config)
        record.write_environment(environment)
        rows = [_nested(row) for row in run.scan_history() if row.get("step") is not None]
        record.write_metrics(sorted(rows, key=lambda row: row["step"]))
        record.write_summary(_nested(dict(run.summary.items())))
        record.set_status("finished")
    return record


def _name(given: str) -> str:
    """A name from outside, which must be one of a directory here."""
    if not is_plain_name(given):
        raise SettingError(
            f"a run of this project at W&B calls itself {given!r}, which is no name of a run; not fetched"
        )
    return given


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """What `_flat` made flat, without what W&B adds under names that begin with _.

    W&B's summary has the last line of metrics in it, too, where `state_bytes` is a number and not a group of them: the
    group wins.
    """
    nested: dict[str, Any] = {}
    for name, value in sorted(flat.items()):  # state_bytes before state_bytes/end
        *path, last = name.split("/")
        if not name.startswith("_") and value is not None:
            place = nested
            for part in path:
                if not isinstance(place.get(part), dict):
                    place[part] = {}
                place = place[part]
            place[last] = value
    return nested


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
