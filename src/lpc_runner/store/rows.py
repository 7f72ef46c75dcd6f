"""What a run has logged, from its folder, as a tracker takes it: row by row, numbers and pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lpc_runner.store.log import MetricLog
from lpc_runner.store.runs import RunDirectory


@dataclass
class Row:
    """Everything of one update, logged at once: numbers by key, pictures by name."""

    epoch: float | None = None
    values: dict[str, float] = field(default_factory=dict)
    pictures: dict[str, Path] = field(default_factory=dict)


def rows_of(run: RunDirectory) -> dict[int, Row]:
    """What the run logged, by update: metrics.jsonl and the pictures in samples/. UserError for a damaged log."""
    rows: dict[int, Row] = {}
    log = run.path / "metrics.jsonl"
    for line in MetricLog.read(log) if log.exists() else []:
        row = rows.setdefault(int(line.pop("update")), Row())
        row.epoch = line.pop("epoch")
        row.values |= line
    result = run.result() or {}
    last = int(result.get("num_updates", max(rows, default=0)))
    for path in sorted(run.samples.glob("update-*.png")):
        rows.setdefault(int(path.stem.removeprefix("update-")), Row()).pictures["samples"] = path
    for name, picture in (("samples", "final.png"), ("reconstructions", "reconstructions.png")):
        if (run.samples / picture).exists():
            rows.setdefault(last, Row()).pictures[name] = run.samples / picture
    return dict(sorted(rows.items()))


def final_numbers(result: dict[str, Any]) -> dict[str, float]:
    """The metrics of a result.json under the names that a tracker's summary gives them."""
    return {f"final/{name}": value for name, value in result["metrics"].items()}
