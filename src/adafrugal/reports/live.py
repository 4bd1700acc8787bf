"""A page of the runs below some directories while they go on: one file, which a browser opens without a server."""

from __future__ import annotations

import json
import sys
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from adafrugal.reports.follow import STRANGE, Curve, Run, Runs, apart
from adafrugal.reports.pictures import MIB, in_use
from adafrugal.system.errors import SettingError

EVERY = 3.0  # seconds between two writes
_WIDE, _HIGH = 120, 30  # of the small curves, in pixels
_REASON = 160  # characters of why a run failed
_COLUMNS = (  # key, head, whether it is text
    ("run", "Run", True), ("status", "Status", True), ("step", "Step", False), ("loss", "Loss", False),
    ("validation", "Valid. loss", False), ("density", "ρ", False), ("interval", "T", False),
    ("state", "State, MiB", False), ("memory", "Memory, MiB", False), ("speed", "Tokens/s", False),
    ("time", "Time", False), ("sign", "Last sign", False),
)  # fmt: skip


def watch(roots: Sequence[Path], once: bool) -> None:
    """Write index.html into the first directory, and again every few seconds until Ctrl-C.

    Args:
        roots: directories with runs below them; there may be none yet.
        once: write it once.

    Raises:
        SettingError: a directory is missing or cannot be written to.
    """
    for root in roots:
        if not root.is_dir():
            raise SettingError(
                f"{root} is no directory; name one with runs below it, make a run first, or --unpack an archive"
            )
    runs, page, file = Runs(roots), Page(0.0 if once else EVERY), roots[0] / "index.html"
    try:
        found = _write(runs, page, file)
        ends = "" if once else "; open it in a browser, Ctrl-C ends"
        sys.stdout.write(f"{found} runs → {file}{ends}\n")
        sys.stdout.flush()
        while not once:
            time.sleep(EVERY)
            _write(runs, page, file)
    except KeyboardInterrupt:
        sys.stdout.write("\n")


def _write(runs: Runs, page: Page, file: Path) -> int:
    """Replace the file, so that no browser finds half of one; return the number of runs."""
    found, beside = runs.update(), file.with_name(".index.html.new")
    try:
        beside.write_text(page.of(found), encoding="utf-8")
        beside.replace(file)
    except OSError as error:
        raise SettingError(f"{file}: {error.strerror}; choose a directory that can be written to") from error
    return len(found)


class Page:
    """Makes the page again and again, with the rows of unchanged runs as they were.

    `every`: seconds after which a browser reads it again, 0 for never.
    """

    def __init__(self, every: float) -> None:
        self._every = every
        self._rows: dict[Run, tuple[Any, str]] = {}  # with what it was made of

    def of(self, runs: Sequence[Run]) -> str:
        """Return the page of these runs."""
        settings, rows = apart(runs), {}
        for run in runs:
            made_of = run.changes, run.status, settings[run]
            known = self._rows.get(run)
            rows[run] = known if known and known[0] == made_of else (made_of, _row_of(run, settings[run]))
        self._rows = rows
        return _page(runs, "\n".join(row for _, row in rows.values()), self._every)


def _row_of(run: Run, settings: str) -> str:
    """Return the row of a run, whatever its record holds."""
    try:
        return _row(run, settings)
    except STRANGE as error:
        run.refuse(error)
        return _row(run, settings)


def _page(runs: Sequence[Run], rows: str, every: float) -> str:
    now = time.time()
    counts = Counter(run.status for run in runs)
    said = escape(", ".join(f"{number} {status}" for status, number in counts.most_common())) or "no runs yet"
    clock = f"written {_date(now)}"
    heads = "".join(
        f'<th scope="col" data-key="{key}"{_TEXT if is_text else ""}><button>{name}</button></th>'
        for key, name, is_text in _COLUMNS
    )
    curves = '<span class="key-loss">loss</span>, <span class="key-density">ρ</span>'
    again = f'<noscript><meta http-equiv="refresh" content="{every:.0f}"></noscript>' if every else ""
    style, script = (files(__package__).joinpath(name).read_text("utf-8") for name in ("live.css", "live.js"))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">{again}
<link rel="icon" href="data:,">
<title>{said}</title>
<style>
{style}</style>
</head>
<body data-every="{every:g}">
<header><h1>Runs</h1><p>{said}</p><p id="written" data-v="{now:.0f}" data-text="{clock}">{clock}</p>
<label>Filter <input type="search" placeholder="such as: adamw failed lr=0.003"></label><p id="shown"></p></header>
<section id="compare" hidden></section>
<table>
<thead><tr><td></td>{heads}<th scope="col" class="text curves">{curves}</th></tr></thead>
<tbody>
{rows}
</tbody>
</table>
<script>
{script}</script>
</body>
</html>
"""


_TEXT = ' class="text"'


def _row(run: Run, settings: str) -> str:
    """Return the row of a run. All that comes from its record is escaped."""
    directory, line, status = run.record.directory, run.line, run.status
    name = f"{directory.name} {settings}".strip()
    trouble = "; ".join(run.damage.values()) or run.reason
    small = f"<small>{escape(run.group)}</small>"
    small += f'<small class="bad">{escape(trouble[:_REASON])}</small>' if trouble else ""
    step = line.get("step", 0)
    results = "\n".join(f"{key.removeprefix('validation_')} {value:.6g}" for key, value in run.results.items())
    state, memory = line.get("state_bytes"), in_use(line.get("memory", {}))
    cells = [
        f'<td class="text run" data-v="{escape(name)}"><b>{escape(directory.name)}</b> {escape(settings)}{small}</td>',
        f'<td class="text" data-v="{escape(status)}"><span class="status {escape(status)}">{escape(status)}</span>'
        f"{_bar(run, step)}</td>",
        _cell(step, f"{step:,}" + (f"/{run.steps:,}" if run.steps else "")),
        _cell(line.get("loss"), _number(line.get("loss"), ".4f")),
        _cell(run.results.get("validation_loss"), _number(run.results.get("validation_loss"), ".4f"), results),
        _cell(line.get("density"), _number(line.get("density"), ".3f")),
        _cell(line.get("interval"), _number(line.get("interval"), ",.0f")),
        _cell(state, _number(state and state / MIB, ",.1f")),
        _cell(memory, _number(memory, ",.0f")),
        _cell(line.get("tokens_per_second"), _number(line.get("tokens_per_second"), ",.0f")),
        _cell(run.seconds, _clock(run.seconds) + _left(run, step)),
        f'<td class="sign" data-v="{run.sign:.0f}">{_date(run.sign)}</td>',
    ]
    points = json.dumps([[at, round(loss, 5)] for at, loss in run.validation.points], separators=(",", ":"))
    text = f"{name} {run.group} {status} {trouble}".lower()
    identity = f"r{zlib.crc32(str(directory).encode()):08x}"
    return (
        f'<tr id="{identity}" data-name="{escape(name)}" data-text="{escape(text)}" data-points="{points}">'
        f'<td><input type="checkbox" aria-label="compare {escape(name)}"></td>{"".join(cells)}'
        f'<td class="text curves">{_curves(run)}</td></tr>'
    )


def _cell(value: float | None, shown: str, title: str = "") -> str:
    given = "" if value is None else f' data-v="{value:.10g}"'
    told = f' title="{escape(title)}"' if title else ""
    return f"<td{given}{told}>{shown}</td>"


def _number(value: Any, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _bar(run: Run, step: int) -> str:
    if run.status == "finished" or not run.steps:
        return ""
    return f'<div class="bar"><i style="width:{min(1.0, step / run.steps):.0%}"></i></div>'


def _left(run: Run, step: int) -> str:
    """Return the time to the end at the pace so far, of a run that goes on."""
    if run.status != "running" or not run.steps or not step:
        return ""
    return f"<small>{_clock(run.seconds / step * (run.steps - step))} left</small>"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _curves(run: Run) -> str:
    """Draw loss and ρ over the steps: the loss without its steep first fall, ρ from 0 on."""
    lowest = min((loss for _, loss in run.loss.points), default=0.0)
    steps = max(run.steps or 1, run.line.get("step", 1))
    drawn = [_polyline("loss", run.loss, lowest, steps), _polyline("density", run.density, 0.0, steps)]
    return f'<svg width="{_WIDE}" height="{_HIGH}" aria-hidden="true">{"".join(drawn)}</svg>'


def _polyline(name: str, curve: Curve, low: float, steps: int) -> str:
    """Draw a curve from `low` to its highest after a twentieth of its points; those above lie at the upper edge."""
    points = curve.points
    if len(points) < 2:
        return ""
    high = max(low + 1e-12, *(value for _, value in points[len(points) // 20 :]))
    places = " ".join(
        f"{_WIDE * step / steps:.1f},{1 + (_HIGH - 2) * (high - min(value, high)) / (high - low):.1f}"
        for step, value in points
    )
    return f'<polyline class="{name}" points="{places}"/>'
