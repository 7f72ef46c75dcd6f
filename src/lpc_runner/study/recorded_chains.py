"""What a run recorded along its chains: log p(x, z) and gradient norms, and trajectories of the final model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lpc_runner.study.runs import Run, read_file
from lpc_runner.study.study import Group

LOG_JOINT, DRIFT_NORM = "log_joint", "drift_norm"
FILE = re.compile(r"update-(\d+)\.npz")
SAMPLERS = ("map", "langevin")
PARTS = ("coordinates", "explained", "grid", "potential", "log_joint")


class ChainCurve(NamedTuple):
    """Quartiles over the chains of num_runs runs, each (steps,); steps counts from 1."""

    steps: np.ndarray
    low: np.ndarray
    median: np.ndarray
    high: np.ndarray
    num_runs: int


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    content = np.load(path, allow_pickle=False)
    if isinstance(content, np.ndarray):
        raise ValueError("it holds one array, no archive of them")
    with content:
        return {name: content[name].astype(np.float64) for name in content.files}


def traced_updates(run: Run) -> list[int]:
    """The training batches whose chains this run recorded."""
    matches = (FILE.fullmatch(path.name) for path in (run.path / "traces").glob("*.npz"))
    return sorted(int(match[1]) for match in matches if match)


def read_trace(run: Run, update: int, warnings: list[str]) -> dict[str, np.ndarray] | None:
    """log_joint and drift_norm (T, B) of one training batch: at z(t-1), t = 1..T."""

    def read(path: Path) -> dict[str, np.ndarray]:
        arrays = _read_arrays(path)
        series = [arrays.get(name) for name in (LOG_JOINT, DRIFT_NORM)]
        if any(values is None or values.ndim != 2 or not values.size for values in series):
            raise ValueError("it holds no series of steps and chains")
        return arrays

    return read_file(run.path, f"traces/update-{update:09d}.npz", read, warnings, then=": left out")


def steps_gained(log_joint: np.ndarray) -> np.ndarray:
    """log p(x, z(t)) - log p(x, z(t-1)) in nats, (T - 1, B) from log p(x, z(t-1)) (T, B)."""
    with np.errstate(invalid="ignore"):
        return np.diff(log_joint, axis=0)


def chain_curves(group: Group, update: int, warnings: list[str]) -> dict[str, ChainCurve]:
    """Median and quartiles over every chain of every seed, of the gain per step and of the gradient's norm.

    At update's training batch; without what no seed recorded. Values that are not finite are left out.
    """
    traces = [read_trace(run, update, warnings) for run in group.followed]
    found = [trace for trace in traces if trace is not None]
    series = {
        LOG_JOINT: [steps_gained(trace[LOG_JOINT]) for trace in found],
        DRIFT_NORM: [trace[DRIFT_NORM] for trace in found],
    }
    curves = {name: _quartiles([values for values in by_run if len(values)]) for name, by_run in series.items()}
    return {name: curve for name, curve in curves.items() if curve is not None}


def _quartiles(by_run: Sequence[np.ndarray]) -> ChainCurve | None:
    by_run = [values for values in by_run if len(values) == len(by_run[0])]
    if not by_run:
        return None
    chains = np.concatenate(by_run, axis=1)
    chains = np.where(np.isfinite(chains), chains, np.nan)
    steps = np.flatnonzero(~np.isnan(chains).all(axis=1))
    if not len(steps):
        return None
    low, median, high = np.nanpercentile(chains[steps], [25, 50, 75], axis=1)
    return ChainCurve(steps + 1, low, median, high, len(by_run))


def _fit(arrays: dict[str, np.ndarray], number: int) -> bool:
    """Whether one sampler's arrays are there and belong to `number` chains of equal length."""
    if set(arrays) != set(PARTS) or not number:
        return False
    states, points = len(arrays["coordinates"]), arrays["grid"].shape[-1]
    shapes = ((states, number, 2), (number, 2), (number, 2, points), (number, points, points), (states, number))
    return all(arrays[part].shape == shape for part, shape in zip(PARTS, shapes))


def read_trajectories(run: Run, warnings: list[str]) -> dict[str, Any] | None:
    """images (K, C, H, W) and, by sampler (map, langevin), the arrays PARTS.

    None where there are none, or where the observations are no images and have no picture; damaged: one warning.
    """
    arrays = read_file(run.path, "trajectories.npz", _read_arrays, warnings, then=": left out") or {}
    images = arrays.get("images")
    if images is None or images.ndim != 4 or images.shape[1] not in (1, 3):
        return None
    trajectories: dict[str, Any] = {"images": images}
    for sampler in SAMPLERS:
        own = {name.removeprefix(f"{sampler}_"): a for name, a in arrays.items() if name.startswith(f"{sampler}_")}
        if _fit(own, len(images)):
            trajectories[sampler] = own
        elif own:
            warnings.append(f"{run.name}/trajectories.npz is damaged: left out")
    return trajectories if len(trajectories) > 1 else None
