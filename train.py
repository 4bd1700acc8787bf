"""Train a language model: Hydra composes the settings, `adafrugal.training` runs them.

    python train.py [group=choice] [name=value] [-m …]

Exit codes: 0 done, 1 failed, 2 wrong setting or missing input, 75 interrupted (the same command continues the run).
"""

from __future__ import annotations

import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # exceptions reach `main`, which makes one line of them

if TYPE_CHECKING:
    from adafrugal.tracking.record import Record

DONE, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 75
REPOSITORY = Path(__file__).resolve().parent


def _tell(text: str) -> None:
    """Write to stderr; where nobody is left to read it, the exit code still says how it ended."""
    with suppress(OSError):
        sys.stderr.write(text)
        sys.stderr.flush()


try:
    from adafrugal.training.signals import Stop

    stop = Stop()
    with stop:  # an interruption in the middle of an import may end in an error of another kind, or in none
        import hydra
        from hydra.core.hydra_config import HydraConfig
        from hydra.errors import HydraException
        from hydra.types import RunMode
        from omegaconf import DictConfig, OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        from adafrugal import checks, composition, config
        from adafrugal.tracking.credentials import hidden
except ModuleNotFoundError as missing:
    _tell(f"error: {missing}; run `make train`, or `pip install -r requirements.txt`, in {REPOSITORY}\n")
    sys.exit(WRONG)
except (Exception, KeyboardInterrupt) as error:
    if not (isinstance(error, KeyboardInterrupt) or stop.requested):  # the first may come before there is a Stop
        raise
    _tell("interrupted; the same command continues\n")
    os._exit(INTERRUPTED)  # at once, and without a last look at streams that nobody may read any more


def run_job(composed: DictConfig) -> tuple[int, str]:
    """Run one job; its exit code, and why it is that one. No error leaves here: a sweep's other jobs still run."""
    choices = HydraConfig.get().runtime.choices
    try:
        settings = checks.check(composed, choices)

        # imported late: a wrong setting needs none of it
        from adafrugal.training.session import run

        record, outcome = run(settings, choices, stop)
        if outcome == "interrupted":
            return INTERRUPTED, ""
        if outcome == "finished before":
            sys.stdout.write("this run was finished before: nothing is done; remove its directory to make it anew\n")
        _show(record)
        return DONE, ""
    except Exception as error:
        if stop.was_lost:  # this is what became of it
            raise KeyboardInterrupt from error
        return _end(error)


def _end(error: Exception) -> tuple[int, str]:
    """Say why a job ended; its exit code and the reason."""
    if isinstance(error, config.SettingError):
        return _say(error), hidden(str(error))
    if isinstance(error, config.TrainingError):
        _tell(f"error: {hidden(str(error))}\n")
        return FAILED, hidden(str(error))
    _tell(hidden("".join(traceback.format_exception(error))))
    return FAILED, hidden(" ".join(f"{type(error).__name__}: {error}".split()))


def _say(error: Exception) -> int:
    line = str(error) if isinstance(error, config.SettingError) else checks.explain(error)
    _tell(f"error: {hidden(line)}\n")
    return WRONG


def _show(record: Record) -> None:
    """Print the summary of a finished run and see that it has its picture."""
    from adafrugal.reports import picture, summary

    file = record.directory / "picture.svg"
    if not file.exists():
        try:
            picture.draw(record, file)
        except OSError as error:  # the run is done and its record whole
            sys.stderr.write(f"warning: {file} cannot be written: {error.strerror}\n")
    sys.stdout.write(f"\n{summary.text(record)}\n")


def _list(ends: dict[str, tuple[int, str]]) -> None:
    """Print how each job of a sweep ended, and why."""
    if len(ends) > 1:
        words = {DONE: "done", FAILED: "failed", WRONG: "refused", INTERRUPTED: "interrupted"}
        lines = (f"{words[code]:>11}  {name}{reason and f': {reason}'}\n" for name, (code, reason) in ends.items())
        sys.stdout.write("\n" + "".join(lines))


def main() -> int:
    """Compose, run one job or many, and return the exit code for all of them."""
    composition.register(REPOSITORY)
    # argparse takes no -m between settings: `train.py optimizer=adamw -m seed=0,1` should work all the same
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda argument: argument not in ("-m", "--multirun"))
    ends: dict[str, tuple[int, str]] = {}

    @hydra.main(version_base="1.3", config_path="conf", config_name="config")
    def start(composed: DictConfig) -> None:
        hydra_config = HydraConfig.get()
        typed = OmegaConf.to_container(hydra_config.overrides.task, resolve=False)
        name = f"job {len(ends) + 1}: {' '.join(typed)}"
        ends[name] = INTERRUPTED, "not started" if stop.requested else ""
        if stop.requested:
            return
        if hydra_config.mode == RunMode.MULTIRUN:
            sys.stdout.write(f"\n── {name}\n")
        ends[name] = run_job(composed)

    try:
        with stop:
            start()
    except (Exception, KeyboardInterrupt) as error:  # run_job lets no other out than an interruption
        if isinstance(error, KeyboardInterrupt) or stop.was_lost:
            with suppress(OSError):
                _list(ends)
                sys.stdout.flush()
            _tell("interrupted; the same command continues\n")
            os._exit(INTERRUPTED)  # at once: Python would wait for threads, or end them in the middle of a checkpoint
        if isinstance(error, HydraException | OmegaConfBaseException | ValueError):  # composition's own
            return _say(error)
        if isinstance(error, OSError):  # Hydra makes the directories of a sweep
            reason = f"{error.filename}: {error.strerror}"
            return _say(config.SettingError(f"{reason}; set run_root to a directory that can be written to"))
        raise
    _list(ends)
    codes = {code for code, _ in ends.values()}
    return next((code for code in (INTERRUPTED, FAILED, WRONG) if code in codes), DONE)


if __name__ == "__main__":
    sys.exit(main())
