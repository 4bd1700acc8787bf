"""Prepare the tokens of a run ahead of it, and report on them.

    python -m adafrugal.data data=c4                  as much as the run of these settings reads
    python -m adafrugal.data --all data=c4            the whole text, up to data.store_limit_gib

The settings are train.py's. An interrupted preparation continues with the same command.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from adafrugal.settings import compose
from adafrugal.settings.command_line import no_option
from adafrugal.system import threads
from adafrugal.system.errors import DONE, INTERRUPTED, WRONG, SettingError
from adafrugal.system.stderr import tell


def main(arguments: Sequence[str]) -> int:
    """Prepare tokens and print a report; return the exit code: 0, 2 for a wrong setting or input, 75 if interrupted."""
    threads.wait_asleep()
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(__doc__)
        return DONE
    try:
        if other := next((word for word in arguments if word.startswith("-") and word != "--all"), None):
            raise SettingError(no_option(other, ["--all", "--help"], beside_settings=True))
        settings = compose.settings([argument for argument in arguments if argument != "--all"])
        from adafrugal.data import corpus, overview
        from adafrugal.data.tokens.preparation import Preparation

        say = partial(print, flush=True)
        plan = corpus.locate(settings, say)
        if "--all" in arguments:
            plan = replace(plan, rows=None, validation_tokens=None)
        Preparation(plan, say).finish()
        sys.stdout.write(overview.text(plan, plan.directory / "lengths.svg"))
    except SettingError as error:
        tell(f"error: {error}")
        return WRONG
    except KeyboardInterrupt:
        tell("interrupted; the same command continues")
        return INTERRUPTED
    return DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
