"""What a study says of the paper's claims about Figure 3, along the chains, and Figure 5, samples and epochs."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import numpy as np

from lpc_runner.base.presentation import FRECHET, base_name
from lpc_runner.paper.evidence import (
    ENDED,
    EPOCHS,
    FORWARD,
    JEFFREYS,
    REVERSE,
    Evidence,
    Finding,
    against,
    against_vaes,
    all_of,
    answer,
    as_planned,
    epochs_of,
    lacking,
    of_cells,
    out_of_proportion,
    sample,
)
from lpc_runner.study.budgets import curve_settings
from lpc_runner.study.recorded_chains import LOG_JOINT, read_trace, steps_gained, traced_updates
from lpc_runner.study.runs import Run
from lpc_runner.study.study import Group
from lpc_runner.study.tables import mean_of, show

SETTLED = 1.0  # nats: a chain whose median step changes less is near the mode
MARGIN = 0.1  # share of its lowest Fréchet distance within which a method has converged

# Figure 3 -------------------------------------------------------------------------------------------------


def climbing_steps(log_joint: np.ndarray) -> int | None:
    """Steps before the first that gains less than SETTLED nats, in the median over chains; all where none does.

    None where the chain has not come to rest: it leaves the finite numbers, or loses SETTLED nats or more per step in
    the median of the second half of its steps. log_joint: log p(x, z(t-1)) in nats, (T, B).
    """
    gains = np.median(steps_gained(log_joint), axis=1)  # nan where one is nan
    rest = np.median(gains[len(gains) // 2 :])
    if not np.isfinite(gains).all() or rest <= -SETTLED:
        return None
    below = np.flatnonzero(gains < SETTLED)
    return int(below[0]) if len(below) else len(gains)


def drift_phase(e: Evidence) -> list[Finding]:
    """Forward KL's chains climb for more steps than reverse KL's and Jeffreys', at every batch that all recorded."""
    own = ("objective", EPOCHS)  # a training batch is the same whatever comes after it

    def longer(forward: Group, other: Group) -> Finding:
        runs = [run for group in (forward, other) for run in group.runs if run.status in ENDED]
        shared = sorted(set.intersection(*({*traced_updates(run)} for run in runs))) if runs else []
        parts = []
        for update in shared:
            first, second = (
                sample(group, lambda run, update=update: _phase(run, update), ENDED) for group in (other, forward)
            )
            parts.append(answer(first, second, f"climbing steps at batch {update:,}"))
        return all_of(parts) if parts else lacking(f"traces of {forward.label} and {other.label} at one batch", 0)

    def cell(forward: Group) -> Finding:
        return all_of([against(forward, e.of(m), f"traces of {m}", own, longer) for m in (REVERSE, JEFFREYS)])

    traced = [group for group in e.of(FORWARD) if any(traced_updates(run) for run in group.runs)]
    return of_cells(traced, f"traces of {FORWARD}", cell)


def _phase(run: Run, update: int) -> float | str:
    trace = read_trace(run, update, [])
    if trace is None:
        return "its trace is damaged"
    steps = climbing_steps(trace[LOG_JOINT])
    return f"its chains do not settle at batch {update:,}" if steps is None else float(steps)


# Figure 5 -------------------------------------------------------------------------------------------------

GAP = 2  # white pixels around every image of a grid
ENLARGED = 96  # small images are enlarged by whole pixels to about this side


def sharp(e: Evidence) -> list[Finding]:
    """LPC's samples are nearer to the data's gradient energy than those of a VAE of equal or the paper's epochs."""
    compared = [*e.of(JEFFREYS), *e.of("VAE")]
    energies = {run.name: sharpness(run) for group in compared for run in group.finished}

    def distance(run: Run) -> float | str:
        energy = energies[run.name]
        return "no sample grid, or none of the data" if energy is None else abs(energy - 1)

    def nearer(lpc: Group, vae: Group) -> Finding:
        part = answer(sample(lpc, distance), sample(vae, distance), "distance of the gradient energy from the data's")
        means = [(mean_of(energies[run.name] for run in group.finished), group.label) for group in (lpc, vae)]
        words = ", ".join(f"× {show(mean)} of {label}" for mean, label in means if mean is not None)
        return Finding(part.verdict, f"{part.text}; gradient energy {words}") if words else part

    def epochs(lpc: Group, vae: Group) -> list[str]:
        equal = as_planned(epochs_of(lpc), epochs_of(vae))
        return [] if equal else out_of_proportion(e.dataset, lpc, vae)

    return against_vaes(e, nearer, epochs)


def sharpness(run: Run) -> float | None:
    """Gradient energy of a run's final samples in multiples of its data's.

    Gradient energy: the mean over images, channels and pixels of (∂x/∂i)² + (∂x/∂j)², differences between neighbours
    within an image, in samples/final.png and samples/data.png. 1: as much detail as the data; below: blurred; above:
    noise. None where a grid or the images' shape is missing, a grid is damaged, or the data are flat.
    """
    final, data = (_grid_energy(run.path / "samples" / name, run.shape) for name in ("final.png", "data.png"))
    return None if final is None or not data else final / data


def gradient_energy(images: np.ndarray) -> float:
    """Mean squared difference between vertical and between horizontal neighbours, added; images (N, H, W, C)."""
    return float(np.mean(np.diff(images, axis=1) ** 2) + np.mean(np.diff(images, axis=2) ** 2))


def _grid_energy(path: Path, shape: tuple[int, ...]) -> float | None:
    import matplotlib.image

    if len(shape) != 3 or min(shape[1:]) < 2:
        return None
    try:
        picture = matplotlib.image.imread(path)
    except (OSError, ValueError, SyntaxError):
        return None
    images = cut(np.asarray(picture, dtype=np.float64), *shape[1:])
    return None if images is None else gradient_energy(images)


def cut(picture: np.ndarray, height: int, width: int) -> np.ndarray | None:
    """The images (N, height, width, C) of a grid (rows, columns, C), at their own size; None where they do not fit."""
    picture = picture[..., None] if picture.ndim == 2 else picture[..., :3]
    side = max(1, round(ENLARGED / width))
    picture = picture[::side, ::side]
    rows, columns = ((size - GAP) // (own + GAP) for size, own in zip(picture.shape, (height, width)))
    expected = (rows * (height + GAP) + GAP, columns * (width + GAP) + GAP)
    if picture.shape[:2] != expected or not rows * columns:
        return None
    tiles = picture[GAP:, GAP:].reshape(rows, height + GAP, columns, width + GAP, -1)[:, :height, :, :width]
    images = tiles.swapaxes(1, 2).reshape(rows * columns, height, width, -1)
    images = images[images.min(axis=(1, 2, 3)) < picture.max()]  # the last row ends with empty places
    return images if len(images) else None


def fast(e: Evidence) -> list[Finding]:
    """LPC is within MARGIN of its lowest Fréchet distance after fewer epochs than a VAE of the paper's epochs.

    Where the lowest was and how much worse the end is stand beside it: a run that gets worse has its best early.
    """
    setting = next((s for s in curve_settings(e.groups) if e.setting and s.extractor == e.setting.extractor), None)

    def curve(run: Run) -> list[tuple[float, float]]:
        """Epochs and Fréchet distances, of three measurements or more."""
        points = [] if setting is None else run.curve(setting)
        known = [(point.spent["epoch"], point.values) for point in points if point.spent["epoch"] is not None]
        pairs = [(epoch, v) for epoch, values in known for name, v in values.items() if base_name(name) in FRECHET]
        return pairs if len(pairs) >= 3 else []

    def epochs(run: Run) -> float | str:
        points = curve(run)
        if not points:
            return "fewer than three measurements during training whose epoch is recorded"
        if not math.isfinite(points[-1][1]):
            return math.nan
        target = (1 + MARGIN) * _best(points)[1]
        return next(epoch for epoch, value in points if value <= target)

    def sooner(lpc: Group, vae: Group) -> Finding:
        finding = answer(sample(lpc, epochs), sample(vae, epochs), f"epochs until within {MARGIN:.0%} of its own best")
        texts = [finding.text]
        for group in (lpc, vae):
            followed = [points for run in group.finished if (points := curve(run))]
            if followed:
                best = statistics.fmean(_best(points)[0] for points in followed)
                worse = statistics.fmean(points[-1][1] / _best(points)[1] - 1 for points in followed)
                texts.append(f"{group.label} is best after epoch {show(best, 1)} and ends {worse:.0%} above that")
        return Finding(finding.verdict, "; ".join(texts))

    def apart(lpc: Group, vae: Group) -> list[str]:
        words = out_of_proportion(e.dataset, lpc, vae)
        first = [next((points for run in group.finished if (points := curve(run))), None) for group in (lpc, vae)]
        gaps = [points[1][0] - points[0][0] for points in first if points is not None]
        if len(gaps) == 2 and abs(gaps[0] - gaps[1]) > 0.5:
            words.append(f"measured every {gaps[0]:.3g} epochs against every {gaps[1]:.3g}")
        return words

    return against_vaes(e, sooner, apart)


def _best(curve: list[tuple[float, float]]) -> tuple[float, float]:
    return min(((e, v) for e, v in curve if math.isfinite(v)), key=lambda point: point[1])
