"""What the processes of tests/training/distributed/test_parallel.py run: several short runs, one after the other.

Takes a JSON list of jobs: the words of a run, and whether it is left after a step (`stop`), listened to in one
(`listen`), or given a loss that is no number (`poison`: the process and the step). The first process prints what was
seen, a line of JSON; the rest stands in the runs' records.
"""

import json
import os
import sys
from collections import Counter

import torch

from adafrugal.settings import compose
from adafrugal.settings.compose import check
from adafrugal.training.distributed import ranks
from adafrugal.training.loop import Loop
from adafrugal.training.session import run

_next_work, _train_step, _step = Loop._next_work, Loop._train_step, Loop._step


class Seen(dict):
    """What is said between processes in a part of a step, by name and number."""

    def listen(self, part, act):
        with torch.profiler.profile() as found:
            act()
        self[part] = Counter(event.name for event in found.events() if event.name.startswith("c10d::"))


def made(job):
    """A job's run, watched as the job says; what is to be told of it."""
    found, choices, _ = compose.composed(job["words"])
    seen, rank = Seen(), int(os.environ.get("RANK", "0"))

    def next_work(loop, stop):
        return None if loop.account.step == job.get("stop") else _next_work(loop, stop)

    def train_step(loop, work):
        step, loss = loop.account.step + 1, type(loop.task).loss
        if job.get("poison") == [rank, step]:
            loop.task.loss = lambda batch: loss(loop.task, batch) * float("nan")
        if step in job.get("listen", ()):
            seen.listen(f"step {step}", lambda: _train_step(loop, work))
        else:
            _train_step(loop, work)
        loop.task.__dict__.pop("loss", None)

    def optimizer_step(loop):
        if job.get("listen to the optimizer") == loop.account.step + 1:
            seen.listen("optimizer", lambda: _step(loop))
        else:
            _step(loop)

    Loop._next_work, Loop._train_step, Loop._step = next_work, train_step, optimizer_step
    try:
        record, outcome = run(check(found, choices), choices)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"outcome": outcome, "directory": str(record.directory), **seen}


def main():
    out, sys.stdout = sys.stdout, sys.stderr  # displays are of no interest
    told = [made(job) for job in json.loads(sys.argv[1])]
    if ranks.is_first():
        out.write(f"\n{json.dumps(told)}\n")


if __name__ == "__main__":
    main()
