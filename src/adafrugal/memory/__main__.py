"""What a run takes, before it is started: nothing of the model is allocated, and no GPU is needed.

    python -m adafrugal.memory model=llama_1b optimizer=adafrugal trainer.precision=bf16
    python -m adafrugal.memory model=llama_1b optimizer=adamw,galore,frugal,adafrugal      several, side by side
    python -m adafrugal.memory model=llama_1b optimizer=adafrugal --fits 16                what fits in so many GiB

The settings are train.py's; the largest micro-batch that fits is a divisor of trainer.batch_size. What fits is found by
a dozen estimates.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

os.environ.setdefault("HYDRA_FULL_ERROR", "1")

from adafrugal.settings import compose
from adafrugal.system import threads
from adafrugal.system.errors import SettingError
from adafrugal.system.secrets import hidden

DONE, WRONG = 0, 2


def main(arguments: Sequence[str]) -> int:
    """Print estimates; the exit code: 0, or 2 for a wrong setting."""
    threads.wait_asleep()
    parser = argparse.ArgumentParser(
        prog="python -m adafrugal.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="*", metavar="name=value")
    parser.add_argument("--fits", type=float, metavar="GIB", help="say which micro-batch and which ρ fit")
    given = parser.parse_intermixed_args(arguments)
    try:
        chosen = [compose.settings(words) for words in _each(given.settings)]
        from adafrugal.memory import breakdown, fit
        from adafrugal.memory.estimate import estimate

        for place, settings in enumerate(chosen):
            if getattr(settings.optimizer, "fit_gib", None) is not None:
                found = fit.fitted(settings)
                chosen[place] = fit.beginning_with(settings, found.density)
                sys.stdout.write(breakdown.chosen(settings, found) + "\n")
        sys.stdout.write(breakdown.text([(settings, estimate(settings)) for settings in chosen]))
        for settings in chosen if given.fits is not None else ():
            sys.stdout.write(breakdown.what_fits(settings, given.fits))
    except SettingError as error:
        sys.stderr.write(f"error: {hidden(str(error))}\n")
        return WRONG
    return DONE


def _each(words: Sequence[str]) -> list[list[str]]:
    """The words for each optimizer that is named."""
    names = next((word.partition("=")[2].split(",") for word in words if word.startswith("optimizer=")), None)
    others = [word for word in words if not word.startswith("optimizer=")]
    return [[f"optimizer={name}", *others] for name in names] if names else [list(words)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
