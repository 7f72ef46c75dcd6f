"""How long the runs of a plan will still train: from their own logs, or from a few updates timed on made-up data."""

from __future__ import annotations

import copy
import json
import os
import time
from typing import Any

import torch

from lpc_runner.base.schema import declared
from lpc_runner.base.surroundings import is_busy, load_average
from lpc_runner.config.options import as_dict
from lpc_runner.data.dataset import Batch
from lpc_runner.inference.interfaces import Sampler
from lpc_runner.runner.plan import Planned, build_learner
from lpc_runner.runner.run import set_up_torch
from lpc_runner.store.log import MetricLog

# Chains of one and of two periods are timed, longer ones cost in proportion; of a thinned chain, whole periods of
# theta_every steps.
_MIN_PERIOD, _MAX_PERIOD = 3, 20
_SLOWING = ("model", "objective", "sampler", "preconditioning", "optimizer")


def total_updates(run: Planned) -> int:
    """Updates of the whole run."""
    return run.experiment.trainer.total_updates(_updates_per_epoch(run))


def _updates_per_epoch(run: Planned) -> int:
    return run.experiment.dataset.num_train // run.experiment.trainer.batch_size


class Pace:
    """Seconds of training left, run by run; runs that cost the same per update are timed once.

    load: processes that wanted a core before, which slow down what is timed on a CPU.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[float, float]] = {}
        self._timed_on_cpu = False
        self.load = load_average()

    def caution(self) -> str | None:
        """A line where other work shared the cores with what was timed; None where nothing was, or they were free."""
        if not self._timed_on_cpu or not is_busy(self.load):
            return None
        return (
            f"timed beside other work (load average {self.load:.1f} on {os.cpu_count()} cores): where the cores are "
            "free, training takes less than this"
        )

    def seconds_left(self, run: Planned) -> float:
        """0 for a run that is done; measuring and start-up come on top."""
        total, state = total_updates(run), run.directory.state()
        if state == "done":
            return 0.0
        update, milliseconds = _last_logged(run) if state == "resume" else (0, None)
        if milliseconds is None:
            fixed, per_step = self._timed(run)
            sampler = run.experiment.sampler
            longer = declared(sampler, Sampler, "first_steps")
            first_epoch = min(1.0, _updates_per_epoch(run) / total)
            more = 0 if longer is None else (longer - sampler.num_steps) * first_epoch  # a mean over all updates
            milliseconds = 1e3 * (fixed + per_step * (sampler.num_steps + more))
        return max(0, total - update) * milliseconds / 1e3

    def _timed(self, run: Planned) -> tuple[float, float]:
        """Seconds of an update without its chain, and of one step of the chain."""
        key = _what_costs(run)
        if key not in self._known:
            set_up_torch(run.experiment)
            self._known[key] = _time_updates(run)
            self._timed_on_cpu |= run.experiment.device.type == "cpu"
        return self._known[key]


def _what_costs(run: Planned) -> str:
    values = as_dict(run.cell.cfg, resolve=True)
    kept = {group: copy.deepcopy(values[group]) for group in _SLOWING}
    kept["sampler"].pop("num_steps", None)
    for group in ("preconditioning", "optimizer"):  # their class determines the time, their values do not
        kept[group] = kept[group]["_target_"]
    experiment = run.experiment
    engine = [type(experiment.engine).__name__, experiment.engine.precision]
    facts = [list(experiment.dataset.shape), experiment.trainer.batch_size, str(experiment.device), engine]
    return json.dumps([kept, *facts], sort_keys=True, default=str)


def _last_logged(run: Planned) -> tuple[int, float | None]:
    """Update and milliseconds per update of the last line that says so, (0, None) where none does."""
    path = run.directory.path / "metrics.jsonl"
    rows = MetricLog.read(path) if path.exists() else []
    timed = [row for row in rows if "time/ms_per_update" in row]
    return (int(timed[-1]["update"]), timed[-1]["time/ms_per_update"]) if timed else (0, None)


def _time_updates(run: Planned) -> tuple[float, float]:
    experiment = run.experiment
    shape = (experiment.trainer.batch_size, *experiment.dataset.shape)
    x = torch.ones(shape, device=experiment.device)  # a pixel's white, a spike: within every likelihood's range
    batch = Batch(x, torch.arange(len(x), device=experiment.device) % max(1, experiment.dataset.num_train))

    def seconds_of(num_steps: int) -> float:
        shortened = copy.copy(experiment)
        shortened.sampler = copy.copy(experiment.sampler)
        shortened.sampler.num_steps = num_steps
        learner = build_learner(shortened, num_train=experiment.dataset.num_train)
        return min(_once(learner, batch, experiment, update) for update in range(3))

    if experiment.sampler.num_steps == 0:
        return seconds_of(0), 0.0
    every = experiment.sampler.theta_every
    period = min(every, _MAX_PERIOD) if every > 1 else _MIN_PERIOD
    short, long = seconds_of(period), seconds_of(2 * period)
    per_step = max(0.0, (long - short) / period)
    return max(0.0, short - period * per_step), per_step


def _once(learner: Any, batch: Batch, experiment: Any, update: int) -> float:
    started = time.perf_counter()
    gradients = learner.gradients(batch, experiment.seed, update, False)
    bool(gradients.finite)  # waits for the device
    learner.apply(batch, gradients)
    return time.perf_counter() - started
