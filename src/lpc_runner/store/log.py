"""metrics.jsonl, the canonical log of a run: one flat JSON object per line; and its rows as a tracker takes them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lpc_runner.base.errors import UserError
from lpc_runner.base.files import flush_to_disk
from lpc_runner.store.runs import RunDirectory

_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_BLOCK = 65536


class MetricLog:
    """Appends to `path`, first cutting off a last line that a crash tore; OSError if it cannot be opened."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        # Unbuffered: a line is with the operating system when `append` returns: a killed process loses none.
        self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115 (open as long as the run lasts)
        self._cut(_end_of_last_line(self._file))

    @property
    def offset(self) -> int:
        """Bytes written so far, always the end of a line: what a checkpoint stores."""
        return self._offset

    def append(self, update: int, epoch: float, values: Mapping[str, float]) -> None:
        """Write one line; OSError naming the file when the disk is full, the lines before intact."""
        row = {"update": int(update), "epoch": _encode(epoch)}
        row |= {key: _encode(number) for key, number in values.items()}
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        try:
            written = self._file.write(line)
            if written != len(line):  # a full disk takes part of a line without an error; writing the rest raises it
                self._file.write(line[written:])
        except OSError as error:
            self._cut(self._offset)
            raise OSError(error.errno, f"cannot write metrics, {error.strerror}", str(self.path)) from error
        self._offset += len(line)

    def sync(self) -> None:
        """Make the lines so far survive a power cut; call it before a checkpoint stores `offset`."""
        flush_to_disk(self._file.fileno())

    def rewind(self, offset: int) -> None:
        """Drop what was written after a checkpoint's `offset` (bytes); UserError when the log is another."""
        if offset > self._offset:
            raise UserError(
                f"{self.path} holds {self._offset} bytes but the checkpoint was saved at {offset}: "
                "the log was cut or replaced; restore it, or move the run's folder away to start again"
            )
        if offset and os.pread(self._file.fileno(), 1, offset - 1) != b"\n":
            raise UserError(
                f"{self.path} has no line ending at the checkpoint's byte {offset}: "
                "the log was edited; restore it, or move the run's folder away to start again"
            )
        self._cut(offset)

    def close(self) -> None:
        """Close the file; further appends raise ValueError."""
        self._file.close()

    def _cut(self, offset: int) -> None:
        self._file.truncate(offset)
        self._offset = offset

    @staticmethod
    def read(path: Path) -> list[dict[str, Any]]:
        """Every row of the log at `path`, without a torn last line; any other bad line raises UserError."""
        *lines, _torn = Path(path).read_bytes().split(b"\n")
        rows = []
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                rows.append({key: _decode(value) for key, value in row.items()})
            except (ValueError, AttributeError):
                raise UserError(f"{path}, line {number}, is no row of metrics: {line[:60]!r}") from None
        return rows


def _encode(number: float) -> float | str:
    number = float(number)
    return number if math.isfinite(number) else str(number)


def _decode(value: Any) -> Any:
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value


def _end_of_last_line(file: Any) -> int:
    """Bytes up to and including the last newline, read from the end: logs grow to hundreds of megabytes."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - _BLOCK)
        newline = os.pread(file.fileno(), end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


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
    for path in sorted(run.samples.glob("level-*.png")):
        rows.setdefault(last, Row()).pictures[path.stem] = path
    return dict(sorted(rows.items()))


def final_numbers(result: dict[str, Any]) -> dict[str, float]:
    """The metrics of a result.json under the names that a tracker's summary gives them."""
    return {f"final/{name}": value for name, value in result["metrics"].items()}
