"""`lpc-runner evaluate RUN_DIR [overrides]`: measure a run again without training."""

from __future__ import annotations

import argparse
import logging
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lpc_runner.base.errors import UserError
from lpc_runner.base.surroundings import wait_passively
from lpc_runner.main import one_line_errors


def evaluate(run_dir: str | Path, overrides: tuple[str, ...] = ()) -> Path:
    """Measure with the overrides given, write RUN_DIR/evaluations/<extractor>-<N>-<k>.json, return its path.

    result.json never changes; an earlier evaluation of the same name is kept and the new one numbered. Raises
    UserError if the run, the data or the weights are missing.
    """
    # These load torch, which the command has something to tell before.
    from lpc_runner.base.schema import declared
    from lpc_runner.base.tensors import exact_arithmetic
    from lpc_runner.evaluation.evaluator import Evaluator, Setup
    from lpc_runner.runner.in_python import load
    from lpc_runner.runner.plan import feature_cache
    from lpc_runner.runner.run import set_up_torch
    from lpc_runner.runner.screen import print_measurement
    from lpc_runner.store.environment import describe_environment

    run = load(run_dir, overrides)
    if not os.access(run.directory.path, os.W_OK | os.X_OK):
        raise UserError(f"{run.directory.path} is read-only, and what is measured is kept there: copy the folder first")
    set_up_torch(run.experiment)
    metrics, dataset, cache = run.experiment.metrics, run.experiment.dataset, feature_cache(run.cfg)
    _require_data(run)
    metrics.require(dataset, cache)
    setup = Setup(dataset, dataset.load(), cache, run.experiment.device, run.experiment.seed)
    evaluator = metrics.evaluator(setup)
    with exact_arithmetic():
        numbers, facts = evaluator.final(run)
    stem = metrics.label(facts)
    folder, number = run.directory.path / "evaluations", 1
    while (folder / f"{stem}-{number}.json").exists():
        number += 1
    content = {
        "metrics": numbers,
        "measurement": facts,
        "update": run.update,
        "overrides": list(overrides),
        "data": dataset.identity(),
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": describe_environment(run.experiment.device),
    }
    run.directory.write(f"evaluations/{stem}-{number}.json", content)
    declared(evaluator, Evaluator, "draw_measurement")(folder / f"{stem}-{number}.png")
    print_measurement(run.directory.name, numbers, facts)
    return folder / f"{stem}-{number}.json"


def _require_data(run: Any) -> None:
    """Raises UserError (one line) if the data are not there, or are not of the shape that the `LoadedRun` knows."""
    dataset = run.experiment.dataset
    try:
        dataset.prepare()
        given = [*dataset.shape, dataset.num_held_out]
    except UserError as error:
        where = [key for key in run.cfg.dataset if key in ("train", "test", "path", "folder")]
        places = " ".join(f"{'' if key == 'data_dir' else 'dataset.'}{key}=..." for key in where or ["data_dir"])
        raise UserError(f"{error}; data that lie elsewhere now are given with {places}") from None
    known = [*run.experiment.facts["data_shape"], run.experiment.facts["num_held_out"]]
    if given != known:
        raise UserError(
            f"the run's model takes examples of shape {tuple(known[:-1])} with {known[-1]} held out, "
            f"the data given are of shape {tuple(given[:-1])} with {given[-1]}"
        )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="lpc-runner evaluate", description=__doc__)
    parser.add_argument("run_dir", help="outputs/<study>/<run>")
    parser.add_argument(
        "overrides", nargs="*", default=[], help="metrics.extractor=classifier, metrics.num_samples=1000, ..."
    )
    args = parser.parse_args()
    wait_passively()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("lpc_runner").setLevel(logging.INFO)  # how long it will take, and how far it is
    with one_line_errors():
        print(f"written  {evaluate(args.run_dir, tuple(args.overrides))}")


if __name__ == "__main__":
    main()
