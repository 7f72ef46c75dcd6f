"""What a run recorded along its chains: log p(x, z) and gradient norms, and trajectories of the final model."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lpc_runner.base.files import is_refusal
from lpc_runner.study.runs import Run
from lpc_runner.study.study import Group

LOG_JOINT, DRIFT_NORM = "log_joint", "drift_norm"
FILE = re.compile(r"update-(\d+)\.npz")
SAMPLERS = ("map", "langevin")
PARTS = ("coordinates", "explained", "grid", "potential", "log_joint")


class ChainCurve(NamedTuple):
    """Quartiles over chains, each (steps,); steps counts from 1; num_chains of num_runs runs."""

    steps: np.ndarray
    low: np.ndarray
    median: np.ndarray
    high: np.ndarray
    num_chains: int
    num_runs: int


def read_arrays(path: Path, warnings: list[str]) -> dict[str, np.ndarray] | None:
    """Every array of an npz file in float64, None where it is missing; damaged: None and one warning."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as content:
            return {name: content[name].astype(np.float64) for name in content.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        what = "is damaged"
        if isinstance(error, OSError) and is_refusal(error):
            what = f"cannot be read ({error.strerror})"
        _say_damaged(path, warnings, what)
        return None


def _say_damaged(path: Path, warnings: list[str], what: str = "is damaged") -> None:
    depth = 1 + (path.parent.name == "traces")  # folders up to the study's
    warnings.append(f"{path.relative_to(path.parents[depth])} {what}: left out")


def traced_updates(run: Run) -> list[int]:
    """The training batches whose chains this run recorded."""
    matches = (FILE.fullmatch(path.name) for path in (run.path / "traces").glob("*.npz"))
    return sorted(int(match[1]) for match in matches if match)


def read_trace(run: Run, update: int, warnings: list[str]) -> dict[str, np.ndarray] | None:
    """log_joint and drift_norm (T, B) of one training batch: at z(t-1), t = 1..T."""
    path = run.path / "traces" / f"update-{update:09d}.npz"
    arrays = read_arrays(path, warnings)
    if arrays is None:
        return None
    series = [arrays.get(name) for name in (LOG_JOINT, DRIFT_NORM)]
    if any(values is None or values.ndim != 2 or not values.size for values in series):
        _say_damaged(path, warnings)
        return None
    return arrays


def steps_gained(log_joint: np.ndarray) -> np.ndarray:
    """log p(x, z(t)) - log p(x, z(t-1)) in nats, (T - 1, B) from log p(x, z(t-1)) (T, B)."""
    with np.errstate(invalid="ignore"):
        return np.diff(log_joint, axis=0)


def chain_curve(group: Group, update: int, name: str, warnings: list[str]) -> ChainCurve | None:
    """Median and quartiles over every chain of every counted seed: of the gain per step, or of the gradient's norm.

    At update's training batch; None where no seed recorded it. Values that are not finite are left out.
    """
    by_run = []
    for run in traced_runs(group):
        trace = read_trace(run, update, warnings)
        if trace is not None:
            values = steps_gained(trace[LOG_JOINT]) if name == LOG_JOINT else trace[DRIFT_NORM]
            by_run += [values] if len(values) else []
    by_run = [values for values in by_run if len(values) == len(by_run[0])]
    if not by_run:
        return None
    chains = np.concatenate(by_run, axis=1)
    chains = np.where(np.isfinite(chains), chains, np.nan)
    steps = np.flatnonzero(~np.isnan(chains).all(axis=1))
    if not len(steps):
        return None
    low, median, high = np.nanpercentile(chains[steps], [25, 50, 75], axis=1)
    return ChainCurve(steps + 1, low, median, high, chains.shape[1], len(by_run))


def traced_runs(group: Group) -> list[Run]:
    """The runs whose chains are shown: those that are averaged, or what is under way where none is done."""
    return group.counted or group.runs


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
    path = run.path / "trajectories.npz"
    arrays = read_arrays(path, warnings)
    if arrays is None:
        return None
    images = arrays.get("images")
    if images is None or images.ndim != 4 or images.shape[1] not in (1, 3):
        return None
    trajectories: dict[str, Any] = {"images": images}
    for sampler in SAMPLERS:
        own = {name.removeprefix(f"{sampler}_"): a for name, a in arrays.items() if name.startswith(f"{sampler}_")}
        if _fit(own, len(images)):
            trajectories[sampler] = own
        elif own:
            _say_damaged(path, warnings)
    return trajectories if len(trajectories) > 1 else None
