"""What a person sees while a run trains: a live bar on a terminal, elsewhere a log line every few seconds."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

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
_REDRAW = 0.1  # seconds; an update may take less than drawing does


class Progress:
    """Context manager around a training loop; `update` once per update is cheap.

    `start` is the number of updates done before this session: speed and ETA are this session's. A terminal
    gets a bar, anything else a log line every `interval` seconds, `silent=True` nothing at all. unit: what is counted.
    """

    def __init__(
        self,
        start: int = 0,
        *,
        silent: bool = False,
        interval: float = 10.0,
        console: Console | None = None,
        unit: str = "update",
    ) -> None:
        self._console = console or Console(stderr=True)
        self._silent = silent
        self._interval, self._unit = interval, unit
        self._start = start
        self._done = start
        self._total: int | None = None
        self._values: dict[str, float] = {}
        self._bar: _Bar | None = None
        self._streams: list[tuple[logging.StreamHandler, Any]] = []

    def __enter__(self) -> Progress:
        self._first: tuple[float, int] | None = None
        self._spoken = time.monotonic()
        if not self._silent and self._console.is_terminal:
            outside = (sys.stdout, sys.stderr)
            self._bar = _Bar(self._console)
            self._bar.start()
            self._task = self._bar.add_task("", total=None, completed=self._start, line="starting", values="")
            self._lift_handlers(outside)
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._show()
            self._bar.stop()
            self._bar = None
        for handler, stream in self._streams:
            handler.setStream(stream)
        self._streams = []

    def update(self, done: int, total: int, values: Mapping[str, float]) -> None:
        """`done` of `total` updates, counted over all sessions; `values` by log key, `epoch` among them."""
        if self._silent:
            return
        now = time.monotonic()
        self._done, self._total = done, total
        self._values.update(values)
        if self._first is None:
            # The first update of a session pays for compilation and loading: the clock starts after it.
            self._first = (now, done)
        if now - self._spoken < (self._interval if self._bar is None else _REDRAW) and done != total:
            return
        self._spoken = now
        if self._bar is not None:
            self._show()
        else:
            _logger.info("%s", "  ".join(filter(None, [self._line(), self._shown()])))

    def seconds_per_update(self) -> float | None:
        """Mean of this session, evaluations included; None before the second update."""
        if self._first is None or self._done <= self._first[1]:
            return None
        return (time.monotonic() - self._first[0]) / (self._done - self._first[1])

    def _line(self) -> str:
        speed = self.seconds_per_update()
        epoch = f"epoch {self._values['epoch']:.2f}  " if "epoch" in self._values else ""
        pace = f"-- ms/{self._unit}  ETA --"
        if speed is not None and self._total is not None:
            pace = f"{1000 * speed:.3g} ms/{self._unit}  ETA {_clock(speed * (self._total - self._done))}"
        return f"{epoch}{self._unit} {self._done}/{self._total}  {pace}"

    def _shown(self) -> str:
        parts = [f"{label} {self._values[key]:.4g}" for key, label in _SHOWN.items() if key in self._values]
        distances = [key for key in self._values if key.startswith(_DISTANCES)]
        parts += [f"{key.removeprefix('eval/')} {self._values[key]:.4g}" for key in distances]
        return "  ".join(parts)

    def _show(self) -> None:
        if self._bar is not None and self._total is not None:
            self._bar.update(
                self._task, total=self._total, completed=self._done, line=self._line(), values=self._shown()
            )

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
