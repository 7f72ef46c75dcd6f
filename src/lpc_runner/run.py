"""One run from its configuration to result.json; whatever it does can be done again after an interruption."""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from lpc_runner.config.build import Experiment, build
from lpc_runner.config.compose import Cell
from lpc_runner.config.identity import flat_keys, run_hash, run_name
from lpc_runner.data.batches import Batches
from lpc_runner.data.dataset import Batch, Data
from lpc_runner.environment import describe_environment
from lpc_runner.errors import UserError
from lpc_runner.evaluation.likelihood import encoder_bound
from lpc_runner.evaluation.quality import Measurer
from lpc_runner.evaluation.samples import reconstruct, sample_images, save_grid
from lpc_runner.files import write_atomically
from lpc_runner.randomness import seeded_layers
from lpc_runner.runs import RunDirectory
from lpc_runner.tracking.log import MetricLog
from lpc_runner.tracking.progress import Progress
from lpc_runner.tracking.tracker import Tracker
from lpc_runner.training.checkpoints import load_checkpoint
from lpc_runner.training.interrupts import Interrupted
from lpc_runner.training.learner import Learner
from lpc_runner.training.trainer import Counters, Outcome

logger = logging.getLogger(__name__)
GRID = 64  # images in a grid


@dataclass
class Planned:
    """A checked cell with its place on disk."""

    cell: Cell
    experiment: Experiment
    directory: RunDirectory
    digest: str

    def require(self) -> None:
        """Data and weights are there, or are fetched, before anything starts. Raises UserError (one line)."""
        dataset = self.experiment.dataset
        dataset.prepare()
        self.experiment.metrics.require(tuple(dataset.shape), feature_cache(self.cell.cfg))
        batch_size = self.experiment.trainer.batch_size
        if dataset.num_train < batch_size:
            raise UserError(f"trainer.batch_size={batch_size} is more than the {dataset.num_train} training examples")
        if self.experiment.metrics.reference == "train":
            self.experiment.metrics.check(dataset.num_train)


def feature_cache(cfg: DictConfig) -> Path:
    """Where extractors keep weights and reference features."""
    return Path(cfg.data_dir) / "features"


def plan(cell: Cell) -> Planned:
    """Build and check everything a cell needs, without loading data. Raises UserError (one line)."""
    experiment = build(cell.cfg, cell.choices)
    digest = run_hash(cell, experiment.dataset.identity())
    directory = RunDirectory.locate(Path(cell.cfg.output_dir), run_name(cell, digest), cell.cfg.rerun)
    if experiment.trainer.init_from is not None:
        RunDirectory.open(experiment.trainer.init_from)
    return Planned(cell, experiment, directory, digest)


def build_learner(experiment: Experiment) -> Learner:
    """Model, encoder (where the objective uses one) and optimisers on the run's device."""
    with seeded_layers(experiment.seed, "encoder"):
        encoder = experiment.model.build_encoder() if experiment.objective.uses_encoder else None
    for module in filter(None, (experiment.model, encoder)):
        module.to(experiment.device)
    return Learner(
        experiment.model,
        encoder,
        experiment.sampler,
        experiment.objective,
        experiment.optimizer,
        experiment.engine,
    )


def set_up_torch(experiment: Experiment) -> None:
    """Threads and determinism, for the whole process."""
    if experiment.num_threads is not None:
        torch.set_num_threads(experiment.num_threads)
    torch.use_deterministic_algorithms(experiment.deterministic)


def execute(planned: Planned) -> dict[str, Any]:
    """Run, resume, or return the result of a run that is done; the content of result.json.

    A failure other than a signal is recorded as `status: failed` and raised again.
    """
    experiment, directory = planned.experiment, planned.directory
    with directory.locked():
        if directory.state() == "done":
            _describe(planned)
            logger.info("already done: %s", directory.path)
            return directory.result()
        set_up_torch(experiment)
        _describe(planned)
        try:
            result = _train_and_measure(planned)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split()) if str(error) else type(error).__name__
            directory.write("result.json", {"status": "failed", "metrics": {}, "error": reason})
            raise
        directory.write("result.json", result)
        return result


def _train_and_measure(planned: Planned) -> dict[str, Any]:
    experiment, directory = planned.experiment, planned.directory
    started = time.perf_counter()
    data = experiment.dataset.load()
    batches = Batches(data.train, experiment.dataset, experiment.trainer.batch_size, experiment.seed, experiment.device)
    learner = build_learner(experiment)
    if experiment.trainer.init_from is not None:
        source = RunDirectory.open(experiment.trainer.init_from)
        weights = load_checkpoint(source.checkpoints)
        if weights is None:
            raise UserError(f"trainer.init_from={source.path} has no checkpoint yet")
        learner.start_from(weights, str(source.path))
    identity = experiment.dataset.identity()
    measurer = experiment.metrics.prepare(data, identity, feature_cache(planned.cell.cfg), experiment.device)
    tracker = _open_tracker(planned)
    status = "failed"
    try:
        save_grid(data.train.values[:GRID], directory.samples / "data.png")

        def measure(counters: Counters) -> dict[str, float]:
            images = sample_images(learner.model, measurer.num_samples_during, experiment.seed)
            numbers = measurer.measure(images, measurer.num_samples_during)
            _draw(learner, planned, tracker, counters.update)
            spent = {
                "time/train_seconds": counters.train_seconds,
                "train/gradient_evaluations": float(counters.gradient_evaluations),
                "eval/num_samples": float(measurer.num_samples_during),
            }
            return {f"eval/{name}": value for name, value in numbers.items()} | spent

        with Progress() as progress:
            outcome = experiment.trainer.fit(
                learner,
                batches,
                seed=experiment.seed,
                folder=directory.checkpoints,
                tracker=tracker,
                progress=progress,
                measure=measure,
                measure_every=experiment.metrics.every_epochs,
            )
        result = _final(planned, learner, data, measurer, outcome)
        result["total_seconds"] = time.perf_counter() - started
        _draw(learner, planned, tracker, outcome.counters.update, final=True)
        _draw_reconstructions(learner, planned, data, tracker, outcome.counters.update)
        tracker.summary({f"final/{name}": value for name, value in result["metrics"].items()})
        status = result["status"]
        return result
    except Interrupted:
        status = "interrupted"
        raise
    finally:
        tracker.close(status)


def measure_model(
    experiment: Experiment, learner: Learner, data: Data, measurer: Measurer
) -> tuple[dict[str, float], dict[str, object]]:
    """Final numbers and what stands beside them: sample quality, and the encoder's bound on the test split."""
    images = sample_images(learner.model, measurer.num_samples, experiment.seed)
    metrics = measurer.measure(images, measurer.num_samples)
    facts = measurer.facts(measurer.num_samples)
    if learner.encoder is not None and len(data.test) > 0:
        metrics |= encoder_bound(learner.model, learner.encoder, experiment.dataset, data.test, experiment.seed)
        facts |= {"bound_split": "test", "num_bound": len(data.test)}
    metrics["sigma"] = float(learner.model.likelihood.log_scale.detach().exp())
    return metrics, facts


def _final(planned: Planned, learner: Learner, data: Data, measurer: Measurer, outcome: Outcome) -> dict[str, Any]:
    metrics, facts = measure_model(planned.experiment, learner, data, measurer)
    counters = outcome.counters
    diverged = {"update": counters.update + 1, "epoch": outcome.epoch} if outcome.status == "diverged" else None
    return {
        "status": outcome.status,
        "metrics": metrics,
        "measurement": facts,
        "num_updates": counters.update,
        "num_epochs": outcome.epoch,
        "train_seconds": counters.train_seconds,
        "gradient_evaluations": counters.gradient_evaluations,
        "diverged_at": diverged,
        "state_measured": "last finite state" if diverged else "final state",
        "error": None,
        "device": str(planned.experiment.device),
    }


def _describe(planned: Planned) -> None:
    """config.yaml and run.json of a new run, its study's link, and a line about this start."""
    directory, cell = planned.directory, planned.cell
    studies = directory.description()["studies"] if directory.state() != "new" else []
    cfg = OmegaConf.to_container(cell.cfg, resolve=True)
    config = directory.path / "config.yaml"
    if directory.state() != "done" or not config.exists():
        write_atomically(config, OmegaConf.to_yaml(cfg))
    if cell.cfg.study not in studies:
        description = {
            "name": directory.name,
            "hash": planned.digest,
            "choices": cell.choices,
            "keys": flat_keys(cell),
            "studies": [*studies, cell.cfg.study],
            "data_shape": list(planned.experiment.dataset.shape),
            "data": planned.experiment.dataset.identity(),
        }
        directory.write("run.json", description)
    directory.link_into(Path(cell.cfg.output_dir), cell.cfg.study)
    if directory.state() != "done":
        session = {"started": datetime.now(UTC).isoformat(timespec="seconds"), "command": sys.argv}
        directory.append_session(session | describe_environment(planned.experiment.device))


def _open_tracker(planned: Planned) -> Tracker:
    directory, cell = planned.directory, planned.cell
    studies = directory.description()["studies"]
    restored = load_checkpoint(directory.checkpoints)
    nested = OmegaConf.to_container(cell.cfg, resolve=True)
    sink = planned.experiment.tracker(
        run_id=directory.name[-64:],
        name=directory.name,
        group=studies[0],
        config={**flat_keys(cell), "config": nested},
        folder=directory.path,
        resume_step=restored["counters"]["update"] if restored else 0,
        more_tags=tuple(studies[1:]),
    )
    return Tracker(MetricLog(directory.path / "metrics.jsonl"), [sink])


def _draw(learner: Learner, planned: Planned, tracker: Tracker, update: int, final: bool = False) -> None:
    """The grid of the first samples: always of the same z, so that grids of a run can be compared."""
    name = "final.png" if final else f"update-{update:09d}.png"
    path = planned.directory.samples / name
    save_grid(torch.cat(list(sample_images(learner.model, GRID, planned.experiment.seed))), path)
    tracker.images(update, "samples", path)


def _draw_reconstructions(learner: Learner, planned: Planned, data: Data, tracker: Tracker, update: int) -> None:
    if learner.encoder is None:
        return
    values = data.test.values[: GRID // 2].to(planned.experiment.device)
    index = torch.arange(len(values), device=values.device)
    batch = Batch(planned.experiment.dataset.to_model(values), index)
    images = reconstruct(learner.model, learner.encoder, batch)
    path = planned.directory.samples / "reconstructions.png"
    save_grid(torch.stack([values, images], 1).flatten(0, 1), path, columns=8)
    tracker.images(update, "reconstructions", path)
