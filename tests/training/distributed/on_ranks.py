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
from adafrugal.training.run import Run
from adafrugal.training.session import run

_next_batch, _train_step = Loop._next_batch, Loop._train_step


class Seen(dict):
    """The collectives of each part of a step: name -> count."""

    def listen(self, part, act):
        with torch.profiler.profile() as found:
            act()
        self[part] = Counter(event.name for event in found.events() if event.name.startswith("c10d::"))


def made(job):
    """Run a job, with the faults and measurements that it asks for; return its outcome and these."""
    found, choices, _ = compose.composed(job["words"])
    seen, rank = Seen(), int(os.environ.get("RANK", "0"))

    def next_batch(loop, stop):
        return None if loop.progress.step == job.get("stop") else _next_batch(loop, stop)

    def train_step(loop, work):
        step, loss = loop.progress.step + 1, type(loop.task).loss
        if job.get("poison") == [rank, step]:
            loop.task.loss = lambda batch: loss(loop.task, batch) * float("nan")
        if job.get("listen to the optimizer") == step:
            update = loop.scaler.step
            loop.scaler.step = lambda optimizer: seen.listen("optimizer", lambda: update(optimizer))
        if step in job.get("listen", ()):
            seen.listen(f"step {step}", lambda: _train_step(loop, work))
        else:
            _train_step(loop, work)
        loop.task.__dict__.pop("loss", None)
        loop.scaler.__dict__.pop("step", None)

    Loop._next_batch, Loop._train_step, add_estimate = next_batch, train_step, Run._add_estimate
    Run._add_estimate = lambda run, summary: None  # which takes longer than these runs
    try:
        record, outcome = run(check(found, choices), choices)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        Loop._next_batch, Loop._train_step, Run._add_estimate = _next_batch, _train_step, add_estimate
    return {"outcome": outcome, "directory": str(record.directory), **seen}


def main():
    out, sys.stdout = sys.stdout, sys.stderr  # only the results go to stdout
    told = [made(job) for job in json.loads(sys.argv[1])]
    if ranks.is_first():
        out.write(f"\n{json.dumps(told)}\n")


if __name__ == "__main__":
    main()
