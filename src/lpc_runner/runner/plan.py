"""The plan of a command: its cells, each checked and with its place on disk; and the learner that a run trains."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lpc_runner.base.errors import UserError
from lpc_runner.base.files import require_folder, require_writable
from lpc_runner.base.presentation import IS_BETTER_HIGHER
from lpc_runner.base.ranks import SINGLE, Ranks
from lpc_runner.base.schema import declared
from lpc_runner.base.tensors import seeded_layers
from lpc_runner.config.build import Experiment, build
from lpc_runner.config.compose import Cell
from lpc_runner.config.identity import run_hash, run_name
from lpc_runner.evaluation.bounds import BY_BLOCK
from lpc_runner.evaluation.evaluator import Metrics
from lpc_runner.inference.interfaces import Objective
from lpc_runner.inference.sharing import require_shareable
from lpc_runner.store.runs import DONE, RunDirectory
from lpc_runner.tracking.tracker import Sink
from lpc_runner.training.learner import Learner


def feature_cache(cfg: DictConfig) -> Path:
    """Where extractors keep weights and reference features."""
    return Path(cfg.data_dir) / "features"


@dataclass
class Planned:
    """A checked cell with its place on disk."""

    cell: Cell
    experiment: Experiment
    directory: RunDirectory
    digest: str
    ranks: Ranks

    def require(self) -> None:
        """Data, weights and a tracker's server are there, or are fetched, before anything starts.

        Raises UserError (one line).
        """
        dataset = self.experiment.dataset
        output_dir = Path(self.cell.cfg.output_dir)
        for folder in (output_dir / "runs", output_dir / self.cell.cfg.study, self.directory.path):
            require_writable(folder, "output_dir")  # any of them may be another user's
        require_folder(Path(self.cell.cfg.data_dir), "data_dir")
        if self.ranks.is_main:  # the one that logs
            tracker = self.experiment.tracker
            declared(tracker.func, Sink, "require")(**tracker.keywords)
        dataset.prepare()
        self.experiment.metrics.require(dataset, feature_cache(self.cell.cfg))

    def to_fetch(self) -> list[str]:
        """What `require` would download, and where to."""
        dataset, metrics = self.experiment.dataset, self.experiment.metrics
        wanted = dataset.to_fetch(), metrics.to_fetch(dataset, feature_cache(self.cell.cfg))
        return [what for what in wanted if what is not None]


def plan(cell: Cell, ranks: Ranks = SINGLE) -> Planned:
    """Build and check everything a cell needs, without loading data. Raises UserError (one line)."""
    experiment = build(cell.cfg, cell.choices)
    batch_size, num_train = experiment.trainer.batch_size, experiment.dataset.num_train
    if num_train < batch_size:
        raise UserError(f"trainer.batch_size={batch_size} is more than the {num_train} training examples")
    ranks.rows(batch_size)
    if ranks.size > 1:
        require_shareable(experiment.sampler, experiment.model.latent_dim)
    experiment.device = ranks.device(experiment.device)
    digest = run_hash(cell, experiment.dataset.identity())
    directory = RunDirectory.locate(Path(cell.cfg.output_dir), run_name(cell, digest), int(cell.cfg.rerun))
    if experiment.trainer.init_from is not None and directory.state() != "done":
        source = RunDirectory.open(experiment.trainer.init_from)
        if source.state() != "done":  # its weights may still change
            raise UserError(f"trainer.init_from={source.path} is not finished: its own command ends it")
    return Planned(cell, experiment, directory, digest, ranks)


def check_plan(cells: list[Cell], ranks: Ranks = SINGLE, proposed: bool = False) -> list[Planned]:
    """Every cell built and checked, data and weights there or fetched. Raises UserError for the first wrong one.

    proposed: by a sweeper, which will propose others.
    """
    planned: dict[str, Planned] = {}
    for cell in cells:
        try:
            run = plan(cell, ranks)
            planned.setdefault(run.directory.name, run)
            require_metric(run, proposed)
            if (proposed or len(cells) > 1) and (
                reason := declared(run.experiment.tracker.func, Sink, "refuses_sweeps")()
            ):
                raise UserError(reason)
            if not cell.cfg.check:
                run.directory.require_linkable(Path(cell.cfg.output_dir), cell.cfg.study)
                if run.directory.state() != "done":
                    run.require()
        except UserError as error:
            where = f" (in the cell {' '.join(cell.overrides)})" if len(cells) > 1 else ""
            raise UserError(f"{error}{where}") from None
    return list(planned.values())


def unfinished(planned: list[Planned]) -> list[str]:
    """What is not done, one line each."""
    lines = []
    for run in planned:
        result = run.directory.result()
        if result is None or result["status"] not in DONE:
            owner = run.directory.owner()
            why = f"is being run by {owner}" if owner else (result.get("error") if result else "no result")
            lines.append(f"{run.directory.path}: {why}")
    return lines


def require_metric(planned: Planned, needed: bool) -> None:
    """The run will have a metric to return. Raises UserError (one line), before any training where names are known.

    needed: a sweeper asks for it, so that there must be a default if none is named.
    """
    name, names = planned.cell.cfg.optimized_metric, _names(planned)
    if name is None and needed and _distance(names or ()) is None:
        raise UserError(
            f"optimized_metric has no default with metrics={planned.cell.choices['metrics']}, which measures no "
            "distance to the data: name what result.json has, as optimized_metric=elbo"
        )
    if name is not None and names is not None and name not in names:
        raise UserError(f"optimized_metric={name}: no such metric; there are: {', '.join(names)}")


def value_of(planned: Planned, result: dict[str, Any]) -> float:
    """The run's optimised metric; +inf (-inf where higher is better) if it diverged or the metric was not finite.

    Raises UserError for a name that no number has.
    """
    metrics, names = result["metrics"], _names(planned)
    name = planned.cell.cfg.optimized_metric or _distance(names or metrics)
    if result["status"] == "finished" and name in metrics:
        return float(metrics[name])
    if result["status"] == "finished" and name not in (names or ()):
        raise UserError(f"optimized_metric={name}: no such metric; there are: {', '.join(metrics)}")
    return -math.inf if name is not None and IS_BETTER_HIGHER.fullmatch(name) else math.inf


def _names(planned: Planned) -> tuple[str, ...] | None:
    names = declared(planned.experiment.metrics, Metrics, "names")()
    if names is None:
        return None
    blocks = planned.experiment.model.blocks
    return *names, *(f"{name}_{block}" for name in BY_BLOCK if name in names for block in blocks)


def _distance(names: Any) -> str | None:
    return next((name for name in names if name == "fid" or name.startswith("fd_")), None)


def build_learner(experiment: Experiment, ranks: Ranks = SINGLE, num_train: int | None = None) -> Learner:
    """Model, encoder (where the objective uses one) and optimisers on the run's device.

    num_train: training examples; None for a learner that will not train, whose data need not be there.
    """
    uses_encoder = declared(experiment.objective, Objective, "uses_encoder")
    with seeded_layers(experiment.seed, "encoder"):
        encoder = experiment.model.build_encoder() if uses_encoder else None
    for module in filter(None, (experiment.model, encoder)):
        module.to(experiment.device)
    experiment.bind(experiment.device)  # a rank or a lease may have chosen another GPU
    return Learner(
        experiment.model,
        encoder,
        experiment.sampler,
        experiment.objective,
        experiment.optimizer,
        ranks,
        experiment.engine,
        num_train,
        experiment.trainer.frozen,
    )
