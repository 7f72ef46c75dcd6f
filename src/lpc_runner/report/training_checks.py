"""Whether a claim of the paper holds in a study: of Figure 3, along the chains, and of Figure 5, samples and epochs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np

from lpc_runner.report.budgets import curve_settings
from lpc_runner.report.evidence import FRECHET, Evidence, comparison, finished, named, summary
from lpc_runner.report.sharpness import sharpness
from lpc_runner.report.study import Point, Run, Setting
from lpc_runner.report.tables import base_name
from lpc_runner.report.traces import LOG_JOINT, read_trace, steps_gained, traced_runs, traced_updates

JEFFREYS, REVERSE, FORWARD = "LPC jeffreys", "LPC reverse", "LPC forward"
SETTLED = 1.0  # nats: a chain whose median step gains less is near the mode
MARGIN = 0.1  # share of its final Fréchet distance within which a method has converged


# Figure 3 -------------------------------------------------------------------------------------------------


def steps_until_settled(log_joint: np.ndarray) -> int:
    """The first step whose median gain over chains is below SETTLED nats; their number where none is.

    log_joint: log p(x, z(t-1)) in nats, (T, B).
    """
    gains = steps_gained(log_joint)
    gains = np.where(np.isfinite(gains), gains, np.inf)  # what left the finite numbers has not settled
    below = np.flatnonzero(np.median(gains, axis=1) < SETTLED)
    return int(below[0]) + 1 if len(below) else len(gains)


def drift_phase(e: Evidence) -> bool | None:
    phases: dict[str, dict[int, list[float]]] = {}
    for method in (FORWARD, REVERSE, JEFFREYS):
        groups = [g for g in e.groups if g.method == method and any(traced_updates(run) for run in traced_runs(g))]
        if not groups:
            e.missing.append(f"traces of {method}")
            continue
        group = max(groups, key=lambda g: max(len(traced_updates(run)) for run in traced_runs(g)))
        for run in traced_runs(group):
            for update in traced_updates(run):
                trace = read_trace(run, update, e.warnings)
                if trace is not None:
                    steps = steps_until_settled(trace[LOG_JOINT])
                    phases.setdefault(method, {}).setdefault(update, []).append(steps)
    if e.missing:
        return None
    shared = sorted(set.intersection(*(set(phases.get(method, {})) for method in (FORWARD, REVERSE, JEFFREYS))))
    if not shared:
        e.missing.append("traces of all three objectives at one training batch")
        return None
    longer = []
    for update in shared:
        forward, *others = ((m, phases[m][update]) for m in (FORWARD, REVERSE, JEFFREYS))
        longer += [statistics.fmean(forward[1]) > statistics.fmean(other[1]) for other in others]
        counts = ", ".join(f"{method} {summary(steps)}" for method, steps in (forward, *others))
        e.numbers.append(f"steps until the median gain is below {SETTLED:g} nat, batch {update:,}: {counts}")
    return all(longer)


# Figure 5 -------------------------------------------------------------------------------------------------


def sharp(e: Evidence) -> bool | None:
    lpc, vae = e.find(JEFFREYS, measured=False), e.longest_trained_vae()
    if not (lpc and vae):
        return None
    found = [[s for run in finished(group) if (s := sharpness(run)) is not None] for group in (lpc, vae)]
    e.missing += [f"sample grids of {group.label}" for group, own in zip((lpc, vae), found) if not own]
    if e.missing:
        return None
    text = comparison(named(lpc), found[0], named(vae), found[1])
    e.numbers.append(f"gradient energy of the samples in multiples of the data's: {text}")
    return statistics.fmean(found[0]) > statistics.fmean(found[1])


def epochs_until(points: Sequence[Point], metric: str, target: float) -> float | None:
    """The first epoch at which the metric is no larger than `target`."""
    return next((p.epoch for p in points if p.epoch is not None and p.values.get(metric, math.inf) <= target), None)


def fast(e: Evidence) -> bool | None:
    setting = next((s for s in curve_settings(e.groups) if e.setting and s.extractor == e.setting.extractor), None)
    lpc, vae = e.find(JEFFREYS), e.longest_trained_vae(measured=True)
    if not (lpc and vae):
        return None
    curves = [[c for run in finished(g) if len(c := _followed(run, setting)) >= 3] for g in (lpc, vae)]
    e.missing += [f"three measurements during training of {g.label}" for g, own in zip((lpc, vae), curves) if not own]
    if e.missing:
        return None
    metric = next(name for name in curves[0][0][0].values if base_name(name) in FRECHET)
    ends = [[curve[-1].values[metric] for curve in own] for own in curves]
    epochs = [
        [epochs_until(curve, metric, (1 + MARGIN) * end) for curve, end in zip(own, last)]
        for own, last in zip(curves, ends)
    ]
    text = comparison(named(lpc), epochs[0], named(vae), epochs[1])
    e.numbers.append(f"epochs until within {MARGIN:.0%} of its own final Fréchet distance: {text}")
    passed = [epochs_until(curve, metric, statistics.fmean(ends[1])) for curve in curves[0]]
    known = [value for value in passed if value is not None]
    seeds = f" ({len(known)} of {len(passed)} seeds)" if len(known) < len(passed) else ""
    e.numbers.append(
        f"epochs until {lpc.label} is below the VAE's final: {summary(known) if known else 'never'}{seeds}"
    )
    return statistics.fmean(epochs[0]) < statistics.fmean(epochs[1])


def _followed(run: Run, setting: Setting | None) -> list[Point]:
    points = [] if setting is None else run.curve(setting)
    return [p for p in points if any(base_name(n) in FRECHET and math.isfinite(v) for n, v in p.values.items())]
