"""`lpc-runner ls outputs/`: every run with its state, and what to do about it. Imports no torch."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lpc_runner.base.errors import UserError
from lpc_runner.main import one_line_errors
from lpc_runner.store.runs import RunDirectory, entries_of, follow, last_row
from lpc_runner.tracking.progress import show_duration

_NARROW = 60  # columns below which a table is no help: every run takes lines of its own
_METRICS = ("fid", "fd_", "elbo", "log_likelihood", "r2")  # shown, in this order; --json has all


@dataclass
class Listed:
    """A run as it lies on disk. age: seconds since it last wrote. todo: what a person can do about it."""

    name: str
    state: str
    epoch: float | None
    update: int | None
    metrics: dict[str, float]
    age: float | None
    host: str | None
    todo: str
    studies: list[str] = field(default_factory=list)


def list_runs(folder: Path | str) -> list[Listed]:
    """The runs of an output folder, of a study in it, or one run. Raises UserError if `folder` holds none."""
    folder = follow(Path(folder))
    root = folder / "runs" if (folder / "runs").is_dir() else folder
    if not root.is_dir():
        raise UserError(f"{folder}: no such folder; runs lie in outputs/ unless output_dir says otherwise")
    paths = [follow(path) for path in entries_of(root)]
    paths = [path for path in paths if (path / "run.json").exists() or (path / ".owner").exists()]
    if not paths:
        raise UserError(f"{folder} holds no runs; runs lie in outputs/ unless output_dir says otherwise")
    return [_look(path) for path in paths]


def _look(path: Path) -> Listed:
    run = RunDirectory(path.resolve())
    session, row = run.last_session(), last_row(run.path / "metrics.jsonl")
    listed = Listed(
        name=run.name,
        state="interrupted",
        epoch=_number(row.get("epoch")),
        update=row.get("update"),
        metrics={},
        age=_age(run.path),
        host=session.get("host"),
        todo="",
    )
    words = [str(word) for word in session.get("command", [])]
    again = (
        "rerun: " + " ".join(["python -m lpc_runner", *map(shlex.quote, words[1:])]) if words else "rerun its command"
    )
    try:
        listed.studies = run.studies()
        result = run.result() or {}
    except UserError as error:
        listed.state, listed.todo = "damaged", str(error)
        return listed
    owner = run.owner()
    status = result["status"] if result else None
    if result:
        listed.metrics = result["metrics"]
        listed.epoch = _number(result.get("num_epochs", listed.epoch))
        listed.update = result.get("num_updates", listed.update)
    if owner:
        listed.state, listed.todo = "running", f"leave it to {owner}"
    elif status == "finished":
        listed.state = "done"
    elif status == "diverged":
        at = result["diverged_at"].get("update") if isinstance(result.get("diverged_at"), dict) else "?"
        listed.state, listed.todo = "diverged", f"not finite at update {at}: a smaller step_size.value may help"
    else:
        listed.todo = again
        if status == "failed":
            listed.state, listed.todo = "failed", f"{result.get('error')}; {again}"
        checkpoints = run.checkpoint_files()
        whole = next((number for number, checkpoint in enumerate(checkpoints) if checkpoint.is_whole()), None)
        if checkpoints and whole is None:
            listed.state = "damaged"
            listed.todo = f"all {len(checkpoints)} checkpoints are damaged: move the folder away, then {again}"
        elif whole:
            listed.todo += f" (the newest checkpoint is damaged: goes on after update {checkpoints[whole].update})"
    return listed


def _number(value: Any) -> float | None:
    """`value` if it is a number: a record may have been edited."""
    return value if isinstance(value, int | float) else None


def _age(path: Path) -> float | None:
    times = [file.stat().st_mtime for name in ("metrics.jsonl", "result.json") if (file := path / name).exists()]
    return time.time() - max(times) if times else None


def _ago(run: Listed) -> str:
    return "" if run.age is None else show_duration(max(0, run.age))


def _numbers(run: Listed) -> list[str]:
    """The two metrics that are shown."""
    known = [key for key, value in run.metrics.items() if _number(value) is not None]
    shown = [key for start in _METRICS for key in known if key.startswith(start)][:2]
    return [f"{key} {run.metrics[key]:.4g}" for key in shown]


def _table(runs: list[Listed]) -> Table:
    table = Table(box=None)
    for name in ("run", "state", "epoch", "metrics", "age", "host", "what to do"):
        table.add_column(name, overflow="fold")  # a shortened name could not be searched for
    colours = {"done": "green", "running": "cyan", "interrupted": "yellow"}
    for run in runs:
        numbers = "  ".join(_numbers(run))
        epoch = "" if run.epoch is None else f"{run.epoch:.1f}"
        state = f"[{colours.get(run.state, 'red')}]{run.state}[/]"
        table.add_row(run.name, state, epoch, numbers, _ago(run), run.host or "", run.todo.replace("[", "\\["))
    return table


def _lines(run: Listed) -> list[str]:
    """What the table says of a run, where there is no room for a table."""
    epoch = "" if run.epoch is None else f"epoch {run.epoch:.1f}"
    facts = [run.state, epoch, *_numbers(run), _ago(run), run.host]
    return [run.name, "  " + ", ".join(filter(None, facts)), *([f"  {run.todo}"] if run.todo else [])]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="lpc-runner ls", description=__doc__)
    parser.add_argument("folder", nargs="?", default="outputs", help="outputs/, outputs/<study> or a run")
    parser.add_argument("--json", action="store_true", help="one JSON object per run and line")
    given = parser.parse_args()
    with one_line_errors():
        runs = list_runs(given.folder)
        if given.json:
            for run in runs:
                print(json.dumps(asdict(run)))
            return
        # In a file or a pipe, names are not broken over lines.
        console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 240)
        if console.width < _NARROW:
            for line in (line for run in runs for line in _lines(run)):
                console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            console.print(_table(runs))
        states = [run.state for run in runs]
        console.print(
            f"{len(runs)} runs: " + ", ".join(f"{states.count(state)} {state}" for state in sorted({*states}))
        )


if __name__ == "__main__":
    main()
