"""What the training loop is handed: the metric log, and beside it any number of sinks such as W&B."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lpc_runner.base.errors import one_line
from lpc_runner.base.schema import declared
from lpc_runner.store.log import MetricLog
from lpc_runner.store.runs import RunDirectory

Status = Literal["finished", "diverged", "failed", "interrupted"]

_logger = logging.getLogger("lpc_runner")


class Sink(ABC):
    """Where numbers go besides metrics.jsonl. An error that it raises disables this sink; the run goes on.

    Made once per run, with the values of its YAML file and those of these that its constructor takes: run_id, name,
    group (the study), config, folder (the run's), resume_step (updates made before), more_tags (further studies). All
    but `log` may be left out; a class need not inherit from this one (`schema.declared`).
    """

    @staticmethod
    def require(**settings: Any) -> None:
        """Raise UserError (one line), before any work, if these values of the YAML file cannot be had."""

    @staticmethod
    def wants_done_runs() -> bool:
        """Whether to record a run once more that is done already."""
        return False

    @staticmethod
    def refuses_sweeps() -> str:
        """Why several runs of one command cannot be recorded; empty where they can."""
        return ""

    @staticmethod
    def refuses_fleets(**settings: Any) -> str:
        """Why runs that one process trains together cannot be recorded with these values; empty where they can."""
        return ""

    @abstractmethod
    def log(self, update: int, epoch: float, values: Mapping[str, float]) -> None:
        """Record the values of one update."""

    def images(self, update: int, name: str, path: Path) -> None:
        """Record the picture file at `path` under `name`."""

    def summary(self, values: Mapping[str, float]) -> None:
        """Record numbers that describe the whole run."""

    def close(self, status: Status) -> None:
        """The run has ended; nothing follows."""


def facts_of_run(run: RunDirectory, config: dict[str, Any]) -> dict[str, Any]:
    """What a sink is told of a run besides `resume_step`; config: the run's settings."""
    description = run.description()
    first, *others = description["studies"]
    return {
        "run_id": run.name[-64:],
        "name": run.name,
        "group": first,
        "config": {**description["keys"], "config": config},
        "folder": run.path,
        "more_tags": tuple(others),
    }


class Tracker:
    """Writes every row to `metrics` (None: a rank other than 0 keeps no log), then to each sink."""

    def __init__(self, metrics: MetricLog | None, sinks: Sequence[Sink] = ()) -> None:
        self.metrics = metrics
        self._sinks = list(sinks)
        self._broken: list[Sink] = []

    def log(self, update: int, epoch: float, values: Mapping[str, float]) -> None:
        """One row; `epoch` may be fractional; OSError when metrics.jsonl cannot be written."""
        if self.metrics is not None:
            self.metrics.append(update, epoch, values)
        self._each("log", update, epoch, values)

    def images(self, update: int, name: str, path: Path) -> None:
        """A picture file that the run's folder already holds, for the sinks that show pictures."""
        self._each("images", update, name, path)

    def summary(self, values: Mapping[str, float]) -> None:
        """Final numbers for the sinks; result.json, which the caller writes, is what reports read."""
        self._each("summary", values)

    def close(self, status: Status) -> None:
        """End every sink, broken ones too: they may still save what they hold."""
        self._each("close", status)
        self._sinks = []
        if self.metrics is not None:
            self.metrics.close()

    def _each(self, method: str, *values: Any) -> None:
        for sink in self._sinks:
            is_broken = sink in self._broken
            if is_broken and method != "close":
                continue
            try:
                declared(sink, Sink, method)(*values)
            except Exception as error:  # whatever a sink raises, training goes on
                self._broken.append(sink)
                _logger.log(
                    logging.DEBUG if is_broken else logging.WARNING,
                    "%s failed and is off for the rest of this run (metrics.jsonl goes on): %s: %s",
                    type(sink).__name__,
                    type(error).__name__,
                    one_line(error),
                )


class NoTracker(Sink):
    """tracker=none: records nothing beside metrics.jsonl."""

    def log(self, update: int, epoch: float, values: Mapping[str, float]) -> None:
        """Nothing."""
