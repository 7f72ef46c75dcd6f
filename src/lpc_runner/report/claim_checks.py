"""Whether a claim of the paper holds in a study: of Tables 1 and 4, and of Figures 2 and 4.

A check takes Evidence and returns whether the claim holds, None where a run that it needs is missing.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence

from lpc_runner.report import paper
from lpc_runner.report.costs import devices_of, ratios
from lpc_runner.report.evidence import FRECHET, Evidence, comparison, named
from lpc_runner.report.grouping import Group
from lpc_runner.report.sweep_figures import cell_values, frechet_name, sweeps_of
from lpc_runner.report.tables import show
from lpc_runner.report.training_checks import FORWARD, JEFFREYS, REVERSE, drift_phase, fast, sharp

NO_WARM_START = "LPC prior"
TOLERANCE = 0.25  # share of the paper's ratio within which ours repeats it
SLACK = 0.05
SMALL_STEP = 0.001
NUM_STEPS = 300  # of the chains whose cost Table 4 states


# Table 1 and Figure 2 -------------------------------------------------------------------------------------


def _table1_fid(e: Evidence) -> bool | None:
    if e.dataset == "celeba64":
        e.missing.append("SVHN or CIFAR10: the claim is not about CelebA")
        return None
    lpc, vae = e.trained_lpc(JEFFREYS), e.longest_vae()
    return e.below(lpc, vae, *FRECHET) if lpc and vae else None


def _table1_density_coverage(e: Evidence) -> bool | None:
    if e.dataset == "svhn":
        e.missing.append("CelebA or CIFAR10: the claim is not about SVHN")
        return None
    lpc, vae = e.trained_lpc(JEFFREYS), e.longest_vae()
    return _all([e.below(vae, lpc, name) for name in ("density", "coverage")]) if lpc and vae else None


def _all(parts: Sequence[bool | None]) -> bool | None:
    return None if None in parts else all(parts)


def _warm_start(e: Evidence) -> bool | None:
    jeffreys = e.find(JEFFREYS)
    reverse, none = (e.find(method, like=jeffreys) for method in (REVERSE, NO_WARM_START))
    if not (jeffreys and reverse and none):
        return None
    return _all([e.below(group, none, *FRECHET) for group in (reverse, jeffreys)])


def _jeffreys(e: Evidence) -> bool | None:
    jeffreys = e.find(JEFFREYS)
    reverse = e.find(REVERSE, like=jeffreys)
    others = [g for g in e.groups if g.method == FORWARD and e.values(g, *FRECHET)]
    if not others:
        e.missing.append(f"{FORWARD} after one epoch")
    if not (jeffreys and reverse and others):
        return None
    first = min(others, key=lambda group: (group.diverged, group.properties.get("num_epochs") or 0))
    return _all([e.below(jeffreys, group, *FRECHET) for group in (reverse, first)])


def _forward(e: Evidence) -> bool | None:
    """Every seed of every forward run that was to train longer than one epoch diverged after its first."""
    groups = [g for g in e.groups if g.method == FORWARD and (g.properties.get("num_epochs") or 0) > 1]
    ended = [run for group in groups for run in group.runs if run.status in ("finished", "diverged")]
    # max_updates may have ended one before: it says nothing of what comes after.
    runs = [run for run in ended if run.status == "diverged" or (run.cost("num_epochs") or math.inf) > 1]
    if not runs:
        e.missing.append(f"{FORWARD} for more than one epoch")
        return None
    late = []
    for run in runs:
        place = run.result.get("diverged_at") if run.status == "diverged" else None
        epoch = place.get("epoch") if isinstance(place, dict) else None
        late.append(run.status == "diverged" and (epoch is None or epoch >= 1))
        where = "not recorded where" if epoch is None else f"at epoch {epoch:.3g}, update {place.get('update'):,}"
        e.numbers.append(f"{run.name}: " + (f"diverged {where}" if run.status == "diverged" else "finished"))
    return all(late)


# Figure 4 -------------------------------------------------------------------------------------------------


def _robust(e: Evidence) -> bool | None:
    """At the largest step size that all β share, the Fréchet distance over the lowest of the same β falls with β.

    From one β to the next it may rise by SLACK of itself, from the smallest to the largest β it must fall. A cell in
    which a seed diverged counts as infinite; step sizes at which every β diverged are passed over.
    """
    for lines, metric in _sweeps(e):
        betas = {line[1]: cells for line, cells in lines.items() if line[0] != "none" and line[1] is not None}
        worth = {beta: {s: _cell(group, e, metric) for s, group in cells.items()} for beta, cells in betas.items()}
        worth = {beta: {s: v for s, v in own.items() if v is not None} for beta, own in sorted(worth.items())}
        shared = set.intersection(*map(set, worth.values())) if worth else set()
        shared = {size for size in shared if any(math.isfinite(own[size]) for own in worth.values())}
        if len(worth) < 2 or len(shared) < 2:
            continue
        size = max(shared)
        harm = [own[size] / min(own.values()) if math.isfinite(own[size]) else math.inf for own in worth.values()]
        parts = [f"β = {b:g} {'diverged' if math.isinf(h) else f'× {h:.2f}'}" for b, h in zip(worth, harm)]
        e.numbers.append(
            f"Fréchet distance at γ = {size:g} in multiples of the lowest of the same β: {', '.join(parts)}"
        )
        return all(late <= (1 + SLACK) * early for early, late in itertools.pairwise(harm)) and harm[-1] < harm[0]
    e.missing.append("a sweep over step sizes with two values of β or more")
    return None


def _sweeps(e: Evidence) -> list[tuple[dict, str]]:
    found = []
    for sweep in sweeps_of(e.groups):
        members = [group for cells in sweep.values() for group in cells.values()]
        metric = frechet_name(members, e.setting) if e.setting is not None else None
        found += [(sweep, metric)] if metric is not None else []
    return found


def _cell(group: Group, e: Evidence, metric: str) -> float | None:
    """Mean of the finished seeds, infinite where a seed diverged, None where nothing was measured."""
    if any(run.status == "diverged" for run in group.runs):
        return math.inf
    values = cell_values(group, e.setting, metric)
    return statistics.fmean(values) if values else None


def _small_step(e: Evidence) -> bool | None:
    for lines, metric in _sweeps(e):
        cells = {line: own[size] for line, own in lines.items() for size in own if math.isclose(size, SMALL_STEP)}
        plain = next((group for line, group in cells.items() if line[0] == "none"), None)
        others = [group for line, group in cells.items() if line[0] != "none"]
        if plain is None or not others or _cell(plain, e, metric) is None:
            continue
        worth = [(group, _cell(group, e, metric)) for group in others]
        for group, value in worth:
            pair = [(named(g), cell_values(g, e.setting, metric)) for g in (plain, group)]
            both = all(math.isfinite(v) for v in (_cell(plain, e, metric), math.nan if value is None else value))
            e.numbers.append(comparison(*pair[0], *pair[1]) if both else f"{named(group)}: {show(value)}")
        lowest = _cell(plain, e, metric)
        return math.isfinite(lowest) and all(value is None or lowest <= value for _, value in worth)
    e.missing.append(f"step size {SMALL_STEP:g} without preconditioning and with it, in a sweep")
    return None


# Table 4 --------------------------------------------------------------------------------------------------


def _cost(e: Evidence, end_to_end: bool) -> bool | None:
    """Both ratios within TOLERANCE of the paper's, for chains of NUM_STEPS steps."""
    vae = e.longest_trained_vae() if not end_to_end else e.longest_vae(measured=False)
    close = []
    for printed in paper.TABLE_4:
        what = f" with T = {NUM_STEPS}"
        lpc = e.trained_lpc(printed.method, measured=False) if end_to_end else e.find(printed.method, measured=False)
        if not (lpc and vae):
            continue
        found = ratios(lpc, vae)
        if found is None:
            devices = ", ".join(sorted(devices_of(lpc) | devices_of(vae)))
            e.missing.append(f"times of {lpc.label} and {vae.label} on one device (now {devices})")
            continue
        ours, theirs = found[end_to_end], printed.end_to_end if end_to_end else printed.per_batch
        if lpc.properties.get("num_steps") != NUM_STEPS:
            e.missing.append(f"{printed.method}{what} (T = {lpc.properties.get('num_steps')}: × {ours:.3g})")
            continue
        e.numbers.append(f"{named(lpc)} × {ours:.3g} of {named(vae)}, the paper × {theirs:g}")
        close.append(abs(ours / theirs - 1) <= TOLERANCE)
    if not e.missing:
        e.numbers.append(f"repeated when within {TOLERANCE:.0%}; on {', '.join(sorted(devices_of(vae)))}")
    return all(close) if len(close) == len(paper.TABLE_4) else None


Check = Callable[[Evidence], bool | None]
CHECKS: dict[str, tuple[Check, bool]] = {  # by the claim's id; whether features enter
    "table1-fid": (_table1_fid, True),
    "table1-density-coverage": (_table1_density_coverage, True),
    "fig2-warm-start": (_warm_start, True),
    "fig2-jeffreys": (_jeffreys, True),
    "fig2-forward": (_forward, False),
    "fig3-forward": (drift_phase, False),
    "fig4-robust": (_robust, True),
    "fig4-small-step": (_small_step, True),
    "fig5-sharp": (sharp, False),
    "fig5-fast": (fast, True),
    "table4-batch": (lambda e: _cost(e, end_to_end=False), False),
    "table4-end": (lambda e: _cost(e, end_to_end=True), False),
}
