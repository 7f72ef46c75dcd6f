"""One run from its configuration to result.json; whatever it does can be done again after an interruption."""

from __future__ import annotations

import logging
import os
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from lpc_runner.base.errors import UserError, masked
from lpc_runner.base.files import write_atomically
from lpc_runner.base.schema import accepted, declared
from lpc_runner.base.surroundings import command_words
from lpc_runner.base.tensors import exact_arithmetic, keep_freed_memory
from lpc_runner.config.build import Experiment
from lpc_runner.config.identity import flat_keys
from lpc_runner.config.options import as_dict
from lpc_runner.data.dataset import Batches, Data
from lpc_runner.evaluation.evaluator import Evaluator, Setup
from lpc_runner.runner.plan import Planned, build_learner, feature_cache
from lpc_runner.store.checkpoints import require_checkpoint
from lpc_runner.store.environment import describe_environment, warn_of_another_device, warn_of_other_code
from lpc_runner.store.log import MetricLog, final_numbers, rows_of
from lpc_runner.store.runs import RunDirectory
from lpc_runner.tracking.progress import Progress
from lpc_runner.tracking.tracker import Sink, Tracker, facts_of_run
from lpc_runner.training.learner import Learner
from lpc_runner.training.trainer import Counters, Interrupted, Interrupts, Outcome

logger = logging.getLogger(__name__)


def set_up_torch(experiment: Experiment) -> None:
    """Threads, determinism and memory, for the whole process."""
    keep_freed_memory()
    if experiment.num_threads is not None:
        torch.set_num_threads(experiment.num_threads)
    if experiment.deterministic and experiment.device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it torch refuses every matrix product
    torch.use_deterministic_algorithms(experiment.deterministic)


def execute(planned: Planned, member: Interrupts | None = None) -> dict[str, Any]:
    """Run, resume, or return the result of a run that is done; the content of result.json.

    member: of a fleet, which shows its progress and hears signals; see `Trainer.fit`.
    A failure other than a signal is recorded as `status: failed` and raised again. Of several ranks, those
    other than 0 return {}.
    """
    experiment, directory = planned.experiment, planned.directory
    if not planned.ranks.is_main:
        if not planned.ranks.agree(False):
            set_up_torch(experiment)
            _train_and_measure(planned)
            planned.ranks.agree(False)  # rank 0 has measured
        return {}
    with directory.locked():
        done = directory.result() if directory.state() == "done" else None
        planned.ranks.agree(done is not None)
        directory.require_hash(planned.digest)
        if done is not None:
            _describe(planned)
            again = int(planned.cell.cfg.rerun) + 1
            logger.info("already done: %s (rerun=%d makes it once more, beside it)", directory.path, again)
            _report_again(planned, done)
            return done
        set_up_torch(experiment)
        try:
            _describe(planned)
            result = _train_and_measure(planned, member)
            directory.write("result.json", result)
        except Exception as error:
            reason = masked(" ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":"))
            with suppress(OSError):  # a full disk may have no room for this record either
                directory.write("result.json", {"status": "failed", "metrics": {}, "error": reason})
            if isinstance(error, torch.OutOfMemoryError):
                cfg = planned.cell.cfg
                raise UserError(
                    f"{directory.name}: {experiment.device} is out of memory: a smaller trainer.batch_size "
                    f"({cfg.trainer.batch_size}) or runs_per_gpu ({cfg.runs_per_gpu}) takes less ({reason})"
                ) from error
            raise
        planned.ranks.agree(True)
        return result


def _train_and_measure(planned: Planned, member: Interrupts | None = None) -> dict[str, Any]:
    """The content of result.json. Every rank runs this; rank 0 alone reads and writes the run's folder."""
    experiment, directory, is_main = planned.experiment, planned.directory, planned.ranks.is_main
    started = time.perf_counter()
    account = experiment.dataset.account()
    for line in account:
        logger.info("%s", line)
    data = experiment.dataset.load()
    batches = batches_of(planned, data)
    learner = build_learner(experiment, planned.ranks, experiment.dataset.num_train)
    counters = _start(planned, learner)
    with planned.ranks.main_first():  # rank 0 computes and keeps references that the other ranks then read
        cache = feature_cache(planned.cell.cfg)
        setup = Setup(experiment.dataset, data, cache, experiment.device, experiment.seed, planned.ranks)
        evaluator = experiment.metrics.evaluator(setup)
    tracker = _open_tracker(planned, counters.update) if is_main else Tracker(None)
    status = "failed"
    try:
        if tracker.metrics is not None:
            tracker.metrics.rewind(counters.log_offset)
            evaluator.draw_data(directory.samples)

        def draw(update: int, final: bool = False) -> None:
            if not is_main:
                return
            pictures = evaluator.draw(learner, directory.samples, None if final else update)
            for name, path in pictures.items():
                tracker.images(update, name, path)

        def measure(counters: Counters) -> dict[str, float]:
            with exact_arithmetic():
                numbers = evaluator.during(learner)
                draw(counters.update)
            spent = {
                "time/train_seconds": counters.train_seconds,
                "train/gradient_evaluations": float(counters.gradient_evaluations),
            }
            return {f"eval/{name}": value for name, value in numbers.items()} | spent

        with Progress(silent=not is_main or member is not None) as progress:
            outcome = experiment.trainer.fit(
                learner,
                batches,
                seed=experiment.seed,
                folder=directory.path,
                counters=counters,
                tracker=tracker,
                progress=progress,
                traces=experiment.traces,
                measure=measure,
                measure_every=experiment.metrics.every_epochs,
                member=member,
            )
        logger.info("measuring %s", directory.name)
        with exact_arithmetic():
            if is_main:
                _follow(planned, learner, batches)
            result = _final(evaluator, learner, outcome, str(experiment.device))
            result["data"] = account
            result["total_seconds"] = time.perf_counter() - started
            draw(outcome.counters.update, final=True)
        tracker.summary(final_numbers(result))
        status = result["status"]
        return result
    except (Interrupted, SystemExit):
        status = "interrupted"
        raise
    finally:
        tracker.close(status)


def _start(planned: Planned, learner: Learner) -> Counters:
    """Put the learner where the run's newest checkpoint is, else where trainer.init_from is, if anywhere."""
    trainer = planned.experiment.trainer
    if planned.ranks.is_main and trainer.init_from is not None:  # the others are given rank 0's state
        source = RunDirectory.open(trainer.init_from)
        learner.start_from(require_checkpoint(source, setting="trainer.init_from="), str(source.path))
    return trainer.restore(learner, planned.directory.path)


def batches_of(planned: Planned, data: Data) -> Batches:
    """This rank's rows of every batch."""
    experiment, size = planned.experiment, planned.experiment.trainer.batch_size
    rows = planned.ranks.rows(size)
    return Batches(data.train, experiment.dataset, size, experiment.seed, experiment.device, rows)


def _final(evaluator: Evaluator, learner: Learner, outcome: Outcome, device: str) -> dict[str, Any]:
    metrics, facts = evaluator.final(learner)
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
        "device": device,
    }


def _describe(planned: Planned) -> None:
    """config.yaml and run.json of a new run, its study's link, and a line about this start."""
    directory, cell = planned.directory, planned.cell
    studies = directory.studies()
    cfg = as_dict(cell.cfg, resolve=True)
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
            **planned.experiment.facts,
            "data": planned.experiment.dataset.identity(),
        }
        directory.write("run.json", description)
    directory.link_into(Path(cell.cfg.output_dir), cell.cfg.study)
    if directory.state() != "done":
        warn_of_other_code(directory.last_session())
        if directory.checkpoint_files():
            warn_of_another_device(directory.last_session(), planned.experiment.device)
        failed = directory.result()
        session = {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": command_words(),
            **describe_environment(planned.experiment.device),
            "num_ranks": planned.ranks.size,
            "failed_before": failed and failed.get("error"),
        }
        directory.append_session(session)
        directory.discard_failure()


def _open_tracker(planned: Planned, resume_step: int) -> Tracker:
    sink = _open_sink(planned, resume_step)
    return Tracker(MetricLog(planned.directory.path / "metrics.jsonl"), [sink])


def _open_sink(planned: Planned, resume_step: int) -> Sink:
    told = facts_of_run(planned.directory, as_dict(planned.cell.cfg, resolve=True)) | {"resume_step": resume_step}
    tracker = planned.experiment.tracker
    return tracker(**accepted(tracker.func, told))


def _report_again(planned: Planned, result: dict[str, Any]) -> None:
    """A done run's rows, pictures and numbers for a tracker that wants them again, as W&B's under an agent does."""
    if not declared(planned.experiment.tracker.func, Sink, "wants_done_runs")():
        return
    rows = rows_of(planned.directory)
    tracker = Tracker(None, [_open_sink(planned, 0)])
    for update, row in rows.items():
        if row.epoch is not None:
            tracker.log(update, row.epoch, row.values)
        for name, path in row.pictures.items():
            tracker.images(update, name, path)
    tracker.summary(final_numbers(result))
    tracker.close(result["status"])


def _follow(planned: Planned, learner: Learner, batches: Batches) -> None:
    """Trajectories of the trained model's chains for the first training examples."""
    experiment = planned.experiment
    shown = batches.fixed(min(experiment.traces.num_chains, len(batches.values)))
    images = batches.values[: len(shown.x)] if experiment.dataset.kind == "images" else None
    path = planned.directory.path / "trajectories.npz"
    model, encoder, sampler = learner.model, learner.encoder, learner.sampler
    experiment.traces.follow(path, model, encoder, sampler, shown, experiment.seed, images)
