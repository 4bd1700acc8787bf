"""Copy the numbers of a run's record to a file of events beside it, which TensorBoard reads."""

from __future__ import annotations

from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

from adafrugal.tracking.copying import Source, flat, work
from adafrugal.tracking.record import read_time


def main(pipe: Connection) -> None:
    """Copy a record in the helper process."""
    work(pipe, _copy)


def _copy(_: Mapping[str, Any], source: Source) -> None:
    """Write all metrics so far and those to come; TensorBoard drops what files of earlier starts have.

    The writer is the one that torch.utils.tensorboard wraps, without importing torch into another process. An event's
    time is that of the first start and the run's seconds since, without those between its starts.
    """
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    begun = read_time(source.record.events()[0]["time"])
    writer = EventFileWriter(str(source.record.directory))
    writer.add_event(Event(wall_time=begun, step=0, session_log=SessionLog(status=SessionLog.START)))  # of no step yet
    for lines in source.lines():
        for metrics in lines:
            numbers = {name: value for name, value in flat(metrics).items() if isinstance(value, int | float)}
            values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
            at = begun + metrics.get("elapsed", 0.0)  # older records have none
            writer.add_event(Event(wall_time=at, step=metrics["step"], summary=Summary(value=values)))
        writer.flush()
    writer.close()
