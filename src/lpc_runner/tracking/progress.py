"""What a person sees while a run trains: a live bar on a terminal, elsewhere a log line every few seconds."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from rich.console import Console, RenderableType
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

_logger = logging.getLogger("lpc_runner")

# Log keys worth a glance, in order; the last value seen stays. Every Fréchet distance follows.
_SHOWN = {
    "train/log_joint": "log p(x, z)",
    "chain/delta_log_joint": "Δ log p",
    "chain/drift_norm_last": "drift",
    "train/sigma": "σ",
}
_DISTANCES = ("eval/fid", "eval/fd_")
_INTERVAL = 10.0  # seconds between two log lines
_REDRAW = 0.1  # seconds; an update may take less than drawing the bar does


class Progress:
    """Context manager around a training loop; `update` once per update is cheap.

    A terminal gets a bar, anything else, a second one within it too, a log line every ten seconds, `silent=True`
    nothing at all. Speed and ETA are this session's. unit: what is counted.
    """

    _drawn: ClassVar[Progress | None] = None  # whose bar the terminal has

    def __init__(self, *, silent: bool = False, console: Console | None = None, unit: str = "update") -> None:
        self._console = console or Console(stderr=True)
        self._silent, self._unit = silent, unit
        self._values: dict[str, float] = {}
        self._first: tuple[float, int] | None = None  # when the first update of this session ended, and its number
        self._bar: _Bar | None = None
        self._streams: list[tuple[logging.StreamHandler, Any]] = []

    def __enter__(self) -> Progress:
        self._spoken = time.monotonic()
        if not self._silent and self._console.is_terminal and Progress._drawn is None:
            outside = (sys.stdout, sys.stderr)
            self._bar = _Bar(self._console)
            self._bar.start()
            Progress._drawn = self
            self._lift_handlers(outside)
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            Progress._drawn = None
            self._bar.stop()
        for handler, stream in self._streams:
            handler.setStream(stream)

    def update(self, done: int, total: int, values: Mapping[str, float]) -> None:
        """`done` of `total` updates, counted over all sessions; `values` by log key, `epoch` among them."""
        if self._silent:
            return
        now = time.monotonic()
        self._values.update(values)
        if self._first is None:
            # The first update of a session pays for compilation and loading: the clock starts after it.
            self._first = (now, done)
        if now - self._spoken < (_INTERVAL if self._bar is None else _REDRAW) and done != total:
            return
        self._spoken = now
        line, shown = self._line(now, done, total), self._shown()
        if self._bar is None:
            _logger.info("%s", "  ".join(filter(None, [line, shown])))
        else:
            self._bar.update(self._bar.task, total=total, completed=done, line=line, values=shown)

    def _line(self, now: float, done: int, total: int) -> str:
        began, first = self._first or (now, done)
        epoch = f"epoch {self._values['epoch']:.2f}  " if "epoch" in self._values else ""
        pace = "" if done == total else f"-- ms/{self._unit}  ETA --"
        if done > first:
            speed = (now - began) / (done - first)  # evaluations included
            pace = f"{1000 * speed:.3g} ms/{self._unit}  ETA {_clock(speed * (total - done))}"
        return f"{epoch}{self._unit} {done}/{total}  {pace}".rstrip()

    def _shown(self) -> str:
        parts = [f"{label} {self._values[key]:.4g}" for key, label in _SHOWN.items() if key in self._values]
        distances = [key for key in self._values if key.startswith(_DISTANCES)]
        parts += [f"{key.removeprefix('eval/')} {self._values[key]:.4g}" for key in distances]
        return "  ".join(parts)

    def _lift_handlers(self, outside: tuple[Any, Any]) -> None:
        """Log lines go above the bar: handlers hold the streams that rich has just replaced by its own."""
        for handler in [*logging.getLogger().handlers, *_logger.handlers]:
            if type(handler) is logging.StreamHandler and handler.stream in outside:
                self._streams.append((handler, handler.stream))
                handler.setStream(sys.stdout if handler.stream is outside[0] else sys.stderr)


class _Bar(RichProgress):
    """A bar with its counters, and below it the values, so that both fit into 80 columns."""

    def __init__(self, console: Console) -> None:
        super().__init__(
            BarColumn(bar_width=16), TextColumn("{task.fields[line]}"), console=console, refresh_per_second=4
        )
        self.task = self.add_task("", total=None, line="starting", values="")

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar's row, then the values."""
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if task.fields["values"]:
                yield Text(task.fields["values"], style="dim")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def show_duration(seconds: float) -> str:
    """1 d 02 h, 3 h 05 min, 4 min, 12 s."""
    days, hours, minutes = int(seconds // 86400), int(seconds // 3600), int(seconds // 60)
    if days:
        return f"{days} d {hours % 24:02d} h"
    if hours:
        return f"{hours} h {minutes % 60:02d} min"
    return f"{minutes} min" if minutes >= 2 else f"{seconds:.0f} s"
