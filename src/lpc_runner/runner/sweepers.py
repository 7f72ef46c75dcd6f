"""Hydra's sweepers that choose a run by what came of those before (Optuna, Ax, Nevergrad): their runs and values.

Such a run is planned and checked when it is proposed; a sweep's product, which is known before, by `planning.frozen`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lpc_runner.base.errors import UserError
from lpc_runner.base.files import write_atomically
from lpc_runner.base.presentation import IS_BETTER_HIGHER
from lpc_runner.base.schema import declared
from lpc_runner.config.compose import Cell, cell_from, cell_text
from lpc_runner.evaluation.bounds import BY_BLOCK
from lpc_runner.evaluation.evaluator import Metrics
from lpc_runner.runner.plan import Planned, plan

_FOLDER = "LPC_RUNNER_PROPOSED"  # environment variable with the folder that jobs note their cells in, for launchers


@contextmanager
def proposing(output_dir: str) -> Iterator[Path]:
    """What is started within it is a job of such a sweeper; the folder comes to hold the cells that were planned."""
    above = Path(output_dir).absolute() / ".sweeps"
    above.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="proposed-", dir=above) as folder:
        os.environ[_FOLDER] = folder
        try:
            yield Path(folder)
        finally:
            os.environ.pop(_FOLDER, None)


def is_proposed() -> bool:
    """Whether this process runs a job of such a sweeper."""
    return _FOLDER in os.environ


def note_proposed(cell: Cell, number: int) -> None:
    """Leave the cell of the sweep's job `number`, from 0, for the command's closing account."""
    write_atomically(Path(os.environ[_FOLDER]) / f"{number:06d}.json", cell_text(cell))


def proposed_runs(folder: Path) -> list[Planned]:
    """Every run that was proposed and planned, once, in the order of proposal."""
    runs = [plan(cell_from(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob("*.json"))]
    return list({run.directory.name: run for run in runs}.values())


def require_metric(planned: Planned, needed: bool) -> None:
    """The run will have a metric to return. Raises UserError (one line), before any training where names are known.

    needed: a sweeper asks for it, so that there must be a default if none is named.
    """
    name, names = planned.cell.cfg.optimized_metric, _names(planned)
    if name is None and needed and _distance(names or ()) is None:
        raise UserError(
            f"optimized_metric has no default with metrics={planned.cell.choices['metrics']}, which measures no "
            "distance to the data: name what result.json has, as optimized_metric=elbo"
        )
    if name is not None and names is not None and name not in names:
        raise UserError(f"optimized_metric={name}: no such metric; there are: {', '.join(names)}")


def value_of(planned: Planned, result: dict[str, Any]) -> float:
    """The run's optimised metric; +inf (-inf where higher is better) if it diverged or the metric was not finite.

    Raises UserError for a name that no number has.
    """
    metrics, names = result["metrics"], _names(planned)
    name = planned.cell.cfg.optimized_metric or _distance(names or metrics)
    if result["status"] == "finished" and name in metrics:
        return float(metrics[name])
    if result["status"] == "finished" and name not in (names or ()):
        raise UserError(f"optimized_metric={name}: no such metric; there are: {', '.join(metrics)}")
    return -math.inf if name is not None and IS_BETTER_HIGHER.fullmatch(name) else math.inf


def _names(planned: Planned) -> tuple[str, ...] | None:
    names = declared(planned.experiment.metrics, Metrics, "names")()
    if names is None:
        return None
    blocks = planned.experiment.model.blocks
    return *names, *(f"{name}_{block}" for name in BY_BLOCK if name in names for block in blocks)


def _distance(names: Any) -> str | None:
    return next((name for name in names if name == "fid" or name.startswith("fd_")), None)
