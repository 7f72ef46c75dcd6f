"""The plan of a command: all cells checked, their state on disk, and what came of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from lpc_runner.config.compose import Cell, choices_of
from lpc_runner.errors import UserError
from lpc_runner.run import Planned, plan
from lpc_runner.runs import DONE

# Shown first in the closing table, in this order; metrics carry the extractor's name behind these.
_SHOWN = ("fid", "fd", "kid", "precision", "recall", "density", "coverage")
_BOUND = ("elbo", "kl", "bits_per_dim", "active_units", "sigma")


def cell_of_job(cfg: DictConfig, hydra_cfg: DictConfig) -> Cell:
    """The cell that Hydra hands to a job."""
    OmegaConf.resolve(cfg)
    return Cell(cfg, choices_of(hydra_cfg), tuple(hydra_cfg.overrides.task))


def check_plan(cells: list[Cell]) -> list[Planned]:
    """Every cell built and checked, data and weights there or fetched. Raises UserError for the first wrong one."""
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
    """The closing table of every run that is done: metrics with what they were measured on, and the paths."""
    console = Console()
    for run in planned:
        result = run.directory.result()
        if result is None or result["status"] not in DONE:
            continue
        print_measurement(run.directory.name, result["metrics"], result["measurement"])
        seconds, updates = result["train_seconds"], result["num_updates"]
        ending = f" at update {result['diverged_at']['update']:,}" if result["diverged_at"] else ""
        console.print(
            f"  {result['status']}{ending}: {updates:,} updates, {result['gradient_evaluations']:,} decoder gradients, "
            f"{seconds:.1f} s of training on {result['device']}; metrics of the {result['state_measured']}"
        )
        link = Path(run.cell.cfg.output_dir) / run.cell.cfg.study / run.directory.name
        console.print(f"  samples  {link}/samples/final.png", soft_wrap=True)
        console.print(f"  result   {link}/result.json", soft_wrap=True)


def print_measurement(name: str, metrics: dict[str, float], facts: dict[str, Any]) -> None:
    """Metrics as a table, with what they were measured on."""
    console = Console()
    console.print(f"\n[bold]{name}[/bold]", highlight=False, soft_wrap=True)
    if facts.get("kind") == "sequences":
        _print_sequences(console, metrics, facts)
    else:
        _print_images(console, metrics, facts)


def _print_sequences(console: Console, metrics: dict[str, float], facts: dict[str, Any]) -> None:
    """Every number beside that of the true rates, where there is one, and its unit."""
    table = Table(box=None, padding=(0, 1))
    table.add_column("", min_width=max(map(len, metrics)), no_wrap=True)
    for column in ("model", "true rates"):
        table.add_column(column, justify="right", header_style="dim", no_wrap=True)
    table.add_column("")
    for metric in _ordered(metrics):
        ceiling = facts["ceilings"].get(metric)
        truth = "" if ceiling is None else f"{ceiling:.4g}"
        table.add_row(metric, f"{metrics[metric]:.4g}", truth, facts["notes"].get(metric, ""))
    console.print(table)
    console.print(f"  {facts['sources']}", highlight=False, soft_wrap=True)


def _print_images(console: Console, metrics: dict[str, float], facts: dict[str, Any]) -> None:
    """Sample quality first, with N, k, extractor and split of those it belongs to."""
    suffix = "_" + facts["extractor"]
    table = Table(show_header=False, box=None, padding=(0, 2))
    quality = [metric for metric in _ordered(metrics) if metric.removesuffix(suffix) in _SHOWN]
    for metric in quality:
        note = ""
        if metric.startswith("coverage"):
            note = f"{facts['coverage_ceiling']:.3f} at best with these N"
        elif facts.get(f"{metric}_floor") is not None:
            note = f"{facts[f'{metric}_floor']:.3g} between the references and {facts['num_floor']:,} other real images"
        table.add_row(metric, f"{metrics[metric]:.4g}", note)
    table.add_section()
    for metric in (metric for metric in _ordered(metrics) if metric not in quality):
        note = {"elbo": "nats per image", "kl": "nats per image", "bits_per_dim": "from the ELBO"}.get(metric, "")
        table.add_row(metric, f"{metrics[metric]:.4g}", note)
    console.print(table)
    sources = (
        f"N = {facts['num_samples']:,} samples against {facts['num_references']:,} {facts['reference']} images, "
        f"k = {facts['k']}, extractor {facts['extractor']} {facts['extractor_hash'][:8]}"
    )
    if "num_bound" in facts:
        sources += f"; elbo to active_units: {facts['num_bound']:,} {facts['bound_split']} images"
    console.print(f"  {sources}")


def _ordered(metrics: dict[str, float]) -> list[str]:
    order = [*_SHOWN, *_BOUND]

    def place(metric: str) -> int:
        return next((number for number, name in enumerate(order) if metric.startswith(name)), len(order))

    return sorted(metrics, key=place)
