"""The plan of a command: all cells checked, their state on disk, and what came of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from lpc_runner.config.compose import Cell
from lpc_runner.errors import UserError
from lpc_runner.run import Planned, plan
from lpc_runner.runs import DONE

# Shown first in the closing table, in this order; metrics carry the extractor's name behind these.
_SHOWN = ("fid", "fd", "kid", "precision", "recall", "density", "coverage")
_BOUND = ("elbo", "kl", "bits_per_dim", "active_units", "sigma")


def cell_of_job(cfg: DictConfig, hydra_cfg: DictConfig) -> Cell:
    """The cell that Hydra hands to a job."""
    choices = {group: option for group, option in hydra_cfg.runtime.choices.items() if "hydra" not in group}
    OmegaConf.resolve(cfg)
    return Cell(cfg, choices, tuple(hydra_cfg.overrides.task))


def check_plan(cells: list[Cell]) -> list[Planned]:
    """Every cell built and checked; data and weights are there or were fetched. Raises UserError for the first wrong one."""
    planned = []
    for cell in cells:
        try:
            found = plan(cell)
            planned.append(found)
            if not cell.cfg.check and found.directory.state() != "done":
                found.require()
        except UserError as error:
            where = f" (in the cell {' '.join(cell.overrides)})" if len(cells) > 1 else ""
            raise UserError(f"{error}{where}") from None
    names = [run.directory.name for run in planned]
    return [run for number, run in enumerate(planned) if run.directory.name not in names[:number]]


def unfinished(planned: list[Planned]) -> list[str]:
    """What is not done, one line each."""
    lines = []
    for run in planned:
        result = run.directory.result()
        if result is None or result["status"] not in DONE:
            lines.append(f"{run.directory.path}: {result['error'] if result else 'no result'}")
    return lines


def print_plan(planned: list[Planned]) -> None:
    """What a command would do, run by run."""
    console = Console()
    table = Table("run", "state", "updates", box=None)
    for run in planned:
        table.add_row(run.directory.name, run.directory.state(), f"{_updates(run):,}")
    console.print(table)
    states = [run.directory.state() for run in planned]
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("done", "resume", "new"))
    study = planned[0].cell.cfg.study
    console.print(f"{len(planned)} runs ({counts}) in {planned[0].cell.cfg.output_dir}/{study}; nothing was started")


def _updates(run: Planned) -> int:
    """Updates of the whole run."""
    trainer = run.experiment.trainer
    return trainer.total_updates(run.experiment.dataset.num_train // trainer.batch_size)


def print_results(planned: list[Planned]) -> None:
    """The closing table: metrics with what they were measured on, and where everything lies."""
    console = Console()
    for run in planned:
        result = run.directory.result()
        if result is None or result["status"] not in DONE:
            continue
        console.print()
        console.print(_table(run.directory.name, result))
        study = run.cell.cfg.study
        link = Path(run.cell.cfg.output_dir) / study / run.directory.name
        console.print(f"samples  {link}/samples/final.png", soft_wrap=True)
        console.print(f"result   {link}/result.json", soft_wrap=True)


def _table(name: str, result: dict[str, Any]) -> Table:
    facts, metrics = result["measurement"], result["metrics"]
    quality = (
        f"N = {facts['num_samples']:,} samples, {facts['num_references']:,} {facts['reference']} images, "
        f"k = {facts['k']}, {facts['extractor']} ({facts['extractor_hash'][:8]})"
    )
    table = Table("metric", "value", "measured on", title=name, title_justify="left", box=None, title_style="bold")
    for metric in _ordered(metrics):
        base = metric.removesuffix("_" + facts["extractor"])
        if base in _SHOWN:
            source = quality
            if base == "coverage":
                source += f"; at most {facts['coverage_ceiling']:.3f}"
            floor = facts.get(f"{metric}_floor")
            if floor is not None:
                source += f"; real images: {floor:.3g}"
        elif metric in _BOUND[:-1]:
            source = f"N = {facts['num_bound']:,} {facts['bound_split']} images"
        else:
            source = "the model"
        table.add_row(metric, f"{metrics[metric]:.4g}", source)
    table.add_row("status", result["status"], result["state_measured"])
    table.add_row(
        "training",
        f"{result['train_seconds']:.1f} s",
        f"{result['num_updates']:,} updates, {result['gradient_evaluations']:,} decoder gradients, {result['device']}",
    )
    return table


def _ordered(metrics: dict[str, float]) -> list[str]:
    order = {name: number for number, name in enumerate([*_SHOWN, *_BOUND])}

    def place(metric: str) -> int:
        return next((number for name, number in order.items() if metric.startswith(name)), len(order))

    return sorted(metrics, key=place)
