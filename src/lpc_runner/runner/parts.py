"""What every rank of a run builds: batches, learner, evaluator; and the work of those that are not rank 0."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from lpc_runner.base.randomness import seeded_layers
from lpc_runner.base.ranks import SINGLE, Ranks
from lpc_runner.base.schema import declared
from lpc_runner.base.tensors import exact_arithmetic
from lpc_runner.config.build import Experiment
from lpc_runner.data.batches import Batches
from lpc_runner.data.dataset import Data
from lpc_runner.evaluation.evaluator import Evaluator
from lpc_runner.inference.interfaces import Objective
from lpc_runner.tracking.progress import Progress
from lpc_runner.tracking.tracker import Tracker
from lpc_runner.training.learner import Learner
from lpc_runner.training.trainer import Counters

if TYPE_CHECKING:
    from lpc_runner.runner.run import Planned


def feature_cache(cfg: DictConfig) -> Path:
    """Where extractors keep weights and reference features."""
    return Path(cfg.data_dir) / "features"


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
    )


def batches_of(planned: Planned, data: Data) -> Batches:
    """This rank's rows of every batch."""
    experiment, size = planned.experiment, planned.experiment.trainer.batch_size
    rows = planned.ranks.rows(size)
    return Batches(data.train, experiment.dataset, size, experiment.seed, experiment.device, rows)


def evaluator_of(planned: Planned, data: Data) -> Evaluator:
    """References and what they need; what has to be computed for them is rank 0's to compute and keep."""
    experiment = planned.experiment
    with planned.ranks.main_first():
        cache = feature_cache(planned.cell.cfg)
        return experiment.metrics.evaluator(
            experiment.dataset, data, cache, experiment.device, experiment.seed, planned.ranks
        )


def work_for_main(planned: Planned) -> None:
    """A rank other than 0: the same loop over its rows and its share of the measuring; nothing is written."""
    experiment = planned.experiment
    data = experiment.dataset.load()
    batches = batches_of(planned, data)
    learner = build_learner(experiment, planned.ranks, experiment.dataset.num_train)
    evaluator = evaluator_of(planned, data)

    def measure(_: Counters) -> dict[str, float]:
        with exact_arithmetic():
            return evaluator.during(learner)

    experiment.trainer.fit(
        learner,
        batches,
        seed=experiment.seed,
        folder=planned.directory.path,
        tracker=Tracker(None),
        progress=Progress(silent=True),
        traces=experiment.traces,
        measure=measure,
        measure_every=experiment.metrics.every_epochs,
    )
    with exact_arithmetic():
        evaluator.final(learner)
