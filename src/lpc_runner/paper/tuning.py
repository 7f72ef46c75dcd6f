"""What was tuned: every cell on one seed, the chosen one's other seeds, the paper's choice beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lpc_runner.paper import numbers as paper
from lpc_runner.paper.sweep_figures import frechet_name
from lpc_runner.study.runs import Run, Setting
from lpc_runner.study.study import Group
from lpc_runner.study.tables import DASH, Table, describe_setting, settings_of, show, spread

CHAIN = ("step_size", "preconditioning", "beta")


def tuning_tables(dataset: str, groups: Sequence[Group]) -> list[Table]:
    """A table per family and way of measuring: cells that differ in nothing but what the paper tunes."""
    tables = []
    for family in families(groups):
        for setting in settings_of(family):
            table = _table(dataset, family, setting)
            tables += [table] if table is not None else []
    return tables


def families(groups: Sequence[Group]) -> list[list[Group]]:
    """VAEs equal but for the learning rate, chains equal but for step size and preconditioning; two or more."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        varied = ("learning_rate",) if group.method == "VAE" else CHAIN
        if group.method == "VAE" or group.properties.get("sampler") == "langevin":
            rest = sorted((key, repr(value)) for key, value in group.properties.items() if key not in varied)
            found.setdefault(repr((group.method, rest)), []).append(group)
    return [family for family in found.values() if len(family) > 1]


def tuning_seed(family: Sequence[Group]) -> int | None:
    """The lowest seed of the family: the one that chooses."""
    return min((run.seed for group in family for run in group.runs if isinstance(run.seed, int)), default=None)


def value_of(run: Run | None, setting: Setting, metric: str) -> float | None:
    """What a run that finished reached, None where it did not, or not with a finite value."""
    found = run.measured(setting) if run is not None and run.status == "finished" else None
    value = math.nan if found is None else found.values.get(metric, math.nan)
    return value if math.isfinite(value) else None


def chosen(family: Sequence[Group], setting: Setting) -> Group | None:
    """The group with the smallest Fréchet distance on the tuning seed; a diverged run is never chosen."""
    metric, seed = frechet_name(family, setting), tuning_seed(family)
    if metric is None:
        return None
    cells = [(value_of(_run_of(group, seed), setting, metric), group) for group in family]
    finite = [(value, group) for value, group in cells if value is not None]
    return min(finite, key=lambda cell: cell[0])[1] if finite else None


def _run_of(group: Group, seed: int | None) -> Run | None:
    return next((run for run in group.runs if run.seed == seed), None)


def _table(dataset: str, family: Sequence[Group], setting: Setting) -> Table | None:
    metric, seed = frechet_name(family, setting), tuning_seed(family)
    best = chosen(family, setting)
    cells = [(group, run) for group in family if (run := _run_of(group, seed)) is not None and run.status in STATES]
    if metric is None or best is None or len(cells) < 2:
        return None
    rows = []
    for group, run in cells:
        rest = [other for other in group.runs if other is not run]
        others = [value for other in rest if (value := value_of(other, setting, metric)) is not None]
        lost = f", {len(others)} of {len(rest)} finished with a number" if len(others) < len(rest) else ""
        rows.append(
            [
                group.label,
                show(value_of(run, setting, metric)) if run.status == "finished" else "diverged",
                "chosen" if group is best else "",
                f"{spread(others)} (n={len(others)}{lost})" if group is best and rest else DASH,
                "paper's choice" if _is_papers(dataset, group) else "",
            ]
        )
    vae = best.method == "VAE"
    what = "VAE, learning rate" if vae else f"{best.method}, step size and preconditioning"
    notes = [
        f"Chosen by the lowest {metric} of seed {seed} among {len(cells)} cells; "
        "its other seeds, which did not take part in the choice, are averaged beside it.",
        f"Measured with {describe_setting(setting)}.",
        _papers_choice(dataset, vae),
    ]
    columns = ["cell", f"{metric} of seed {seed}", "choice", "other seeds", "the paper"]
    title = f"{dataset}: tuning, {what}, {setting.extractor}"
    return Table(title, columns, rows, [note for note in notes if note], extractor=setting.extractor)


STATES = ("finished", "diverged")


def papers_cell(dataset: str, method: str) -> dict[str, Any] | None:
    """The values of Table 3 for one of the paper's datasets, None for others."""
    tuned = paper.TABLE_3.get(dataset)
    if tuned is None:
        return None
    if method == "VAE":
        return {"learning_rate": tuned.vae_learning_rate}
    if tuned.beta is None:
        return {"step_size": tuned.step_size, "preconditioning": "none"}
    return {"step_size": tuned.step_size, "preconditioning": "adam", "beta": tuned.beta}


def _is_papers(dataset: str, group: Group) -> bool:
    cell = papers_cell(dataset, group.method)
    return cell is not None and all(paper.same(group.properties.get(key), value) for key, value in cell.items())


def _papers_choice(dataset: str, vae: bool) -> str:
    tuned = paper.TABLE_3.get(dataset)
    if tuned is None:
        return ""
    if vae:
        return f"The paper's choice (Table 3): learning rate {tuned.vae_learning_rate:g}."
    beta = "no preconditioning" if tuned.beta is None else f"β = {tuned.beta:g}"
    return f"The paper's choice (Table 3): γ = {tuned.step_size:g}, {beta}."
