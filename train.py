"""Train a language model: Hydra composes the settings, `adafrugal.training` runs them.

    python train.py [group=choice] [name=value] [-m …] [--dry-run …]

Exit codes: 0 done, 1 failed, 2 wrong setting or missing input, 75 interrupted (the same command continues the run).
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # exceptions reach `main`, which makes one line of them

REPOSITORY = Path(__file__).resolve().parent


def _tell(text: str) -> None:
    """Write to stderr before there is `adafrugal.system.stderr`."""
    with suppress(OSError):
        os.write(2, text.encode())


try:
    from adafrugal.system import allocator, threads

    allocator.grow_segments()
    threads.wait_asleep()
    from adafrugal.system.signals import Stop
    from adafrugal.training.distributed import ranks

    ranks.silence_others()
    stop = Stop()
    with stop:  # an interruption in the middle of an import may end in an error of another kind, or in none
        import hydra
        from hydra.errors import HydraException
        from omegaconf.errors import OmegaConfBaseException

        from adafrugal.launching import dry_run, jobs
        from adafrugal.settings import compose
        from adafrugal.settings.explain import explain
        from adafrugal.system.errors import INTERRUPTED, SettingError
        from adafrugal.system.stderr import tell
except ModuleNotFoundError as missing:
    install = f"run `make train`, or `pip install -r requirements.txt`, in {REPOSITORY}"
    _tell(f"error: No module named {missing.name!r}; {install}\n")
    sys.exit(2)
except (Exception, KeyboardInterrupt) as error:
    if not (isinstance(error, KeyboardInterrupt) or stop.requested):  # the first may come before there is a Stop
        raise
    _tell("interrupted; the same command continues\n")
    os._exit(75)  # at once, and without a last look at streams that nobody may read any more


def main() -> int:
    """Compose, run one job or many, and return the exit code for all of them."""
    compose.register(REPOSITORY)
    try:
        options, sys.argv[1:] = dry_run.options(sys.argv[1:])
    except SettingError as error:
        return jobs.ended(error, stop, is_alike=True).code
    if line := dry_run.base_of_a_sweep(sys.argv[1:]):
        tell(line)
    # argparse takes no -m between settings: `train.py optimizer=adamw -m seed=0,1` should work all the same
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda argument: argument not in ("-m", "--multirun"))
    all_jobs = dry_run.DryRun(options, stop) if options.dry_run else jobs.Jobs(stop)
    start = hydra.main(version_base="1.3", config_path=str(REPOSITORY / "conf"), config_name="config")(all_jobs)
    try:
        with stop:
            start()
            if options.dry_run:
                all_jobs.work_out()
    except (Exception, KeyboardInterrupt) as error:  # of composition, or an interruption; jobs catch all other errors
        is_alike = not isinstance(error, KeyboardInterrupt)  # all processes see the same settings
        end = jobs.ended(_explained(error), stop, is_alike)
        if end.code == INTERRUPTED:
            with suppress(OSError):
                all_jobs.print()
                sys.stdout.flush()
            os._exit(INTERRUPTED)  # at once: Python would wait for threads, or end them in a checkpoint's middle
        return end.code
    all_jobs.print()
    return all_jobs.code


def _explained(error: BaseException) -> BaseException:
    """A SettingError for an error of composition."""
    if isinstance(error, OSError) and error.filename:  # Hydra makes the directories of a sweep
        reason = f"{error.filename}: {error.strerror}"
        return SettingError(f"{reason}; set run_root to a directory that can be written to")
    if isinstance(error, HydraException | OmegaConfBaseException | ValueError) and not isinstance(error, SettingError):
        return SettingError(explain(error))
    return error


if __name__ == "__main__":
    code = main()
    if code:
        ranks.let_all_speak()
    sys.exit(code)
