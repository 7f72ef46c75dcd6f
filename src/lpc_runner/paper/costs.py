"""Table 4, what a batch and a whole training cost in multiples of a VAE's, and where runs diverged."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from lpc_runner.paper import numbers as paper
from lpc_runner.paper.evidence import UNKNOWN, devices_of, epochs_of
from lpc_runner.study.runs import Run
from lpc_runner.study.study import Group
from lpc_runner.study.tables import DASH, Table, mean_of, show, spread


def ms_per_batch(run: Run) -> float | None:
    """Milliseconds of training per update, measuring left out; None where a run does not record both."""
    seconds, updates = run.cost("train_seconds"), run.cost("num_updates")
    return None if seconds is None or not updates else 1e3 * seconds / updates


def reference_vae(groups: Sequence[Group]) -> Group | None:
    """The finished VAE that trained longest: 50 epochs in the paper."""
    found = [group for group in groups if group.method == "VAE" and mean_of(map(ms_per_batch, group.finished))]
    return max(found, key=epochs_of, default=None)


def ratios(group: Group, reference: Group) -> tuple[float, float] | None:
    """Time per batch and of the whole training, in multiples of the reference's means.

    None where either has no times, or where they were not all taken on one device that is recorded.
    """
    pairs = []
    for cost in (ms_per_batch, lambda run: run.cost("train_seconds")):
        ours, theirs = (mean_of(map(cost, each.finished)) for each in (group, reference))
        if ours is None or not theirs:
            return None
        pairs.append(ours / theirs)
    devices = devices_of(group) | devices_of(reference)
    return (pairs[0], pairs[1]) if len(devices) == 1 and UNKNOWN not in devices else None


def time_table(dataset: str, groups: Sequence[Group]) -> Table | None:
    """Table 4: ours and the paper's ratios; None without a finished VAE and something to set beside it."""
    reference = reference_vae(groups)
    shown = [group for group in groups if mean_of(map(ms_per_batch, group.finished))]
    if reference is None or len(shown) < 2:
        return None
    theirs = {cost.method: cost for cost in paper.TABLE_4}
    columns = ["method", "seeds", "epochs", "T", "ms per batch", "× VAE's batch", "paper ×"]
    columns += ["training s", "× VAE end to end", "paper × end to end", "device"]
    rows = []
    for group in shown:
        found, printed = ratios(group, reference), theirs.get(group.method)
        per_batch, whole = found if found is not None else (None, None)
        steps = group.properties.get("num_steps")
        rows.append(
            [
                group.marked_label,
                str(len(group.finished)),
                show(epochs_of(group), 0),
                DASH if steps is None else str(steps),
                spread(map(ms_per_batch, group.finished)),
                show(per_batch),
                DASH if printed is None else f"{printed.per_batch:g}",
                spread(run.cost("train_seconds") for run in group.finished),
                show(whole),
                DASH if printed is None else f"{printed.end_to_end:g}",
                ", ".join(sorted(devices_of(group))),
            ]
        )
    devices = sorted({device for group in shown for device in devices_of(group)})
    notes = [
        f"Ratios to {reference.label}, the VAE that trained longest; training time without measuring.",
        f"Ours on {', '.join(devices)}; the paper's: T = 300, 15 epochs against the VAE's 50, "
        f"on {paper.TABLE_4_HARDWARE}.",
    ]
    notes += [f"{DASH} for a ratio: not on one recorded device with the VAE."] * any(
        ratios(g, reference) is None for g in shown
    )
    hidden = frozenset({"epochs", "T", "device", "training s"})
    return Table(f"{dataset}: times (Table 4)", columns, rows, notes, hidden)


def divergence_table(dataset: str, groups: Sequence[Group]) -> Table | None:
    """Every diverged run: when, and which state its numbers are of; None where none diverged."""
    rows = []
    for group in groups:
        for run in group.runs:
            if run.status == "diverged":
                place = run.result.get("diverged_at")
                epoch, update = (place.get(key) if isinstance(place, dict) else None for key in ("epoch", "update"))
                state = str(run.result.get("state_measured") or DASH)
                when = [DASH if value is None else f"{value:,.6g}" for value in (epoch, update)]
                rows.append([group.label, str(run.seed), *when, state, run.name])
    if not rows:
        return None
    epochs = [float(row[2].replace(",", "")) for row in rows if row[2] != DASH]
    notes = [f"First at epoch {min(epochs):g}, median {statistics.median(epochs):g}."] if epochs else []
    columns = ["method", "seed", "epoch", "update", "state measured", "run"]
    return Table(f"{dataset}: where runs diverged", columns, rows, notes, frozenset({"run"}))
