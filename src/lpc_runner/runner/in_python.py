"""What Python offers: `lpc_runner.run` makes the runs of a command in this process, `lpc_runner.load` reads one."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from yaml import YAMLError

from lpc_runner.base.errors import UserError, masked
from lpc_runner.base.surroundings import words_for_workers
from lpc_runner.config.build import Experiment, build
from lpc_runner.config.compose import Composed, compose_command, recompose_group, runs_in_this_process
from lpc_runner.config.options import CONF_DIR, CONFIG_NAME
from lpc_runner.config.words import flags_of, parse_arguments, refuse_flags
from lpc_runner.models.latent import LatentVariableModel
from lpc_runner.runner.fleet import execute_fleets
from lpc_runner.runner.plan import Planned, build_learner, check_plan, unfinished
from lpc_runner.runner.run import execute
from lpc_runner.store.checkpoints import require_checkpoint
from lpc_runner.store.environment import settings_of
from lpc_runner.store.runs import CHANGES_NO_RESULT, RunDirectory
from lpc_runner.training.trainer import Interrupted

# What may differ from the run when it is read again: anything else would make it another run.
_CHANGEABLE = ("metrics", "device", "num_threads", "data_dir", "dataset")


@dataclass
class LoadedRun:
    """A run's newest checkpoint. model: p(x, z; θ). encoder: q(z|x; φ), None where the objective had none.
    sampler: the chain it was trained with."""

    model: LatentVariableModel
    encoder: nn.Module | None
    sampler: Any
    experiment: Experiment
    cfg: DictConfig
    directory: RunDirectory
    update: int


def load(run_dir: str | Path, overrides: tuple[str, ...] = (), device: str = "auto") -> LoadedRun:
    """Model and encoder of a run, in evaluation mode, from its newest whole checkpoint; the data need not be there.

    overrides: `metrics=...`, `metrics.key=...`, `dataset.data_dir=...`, `device=...`. Threads and determinism of the
    process stay as they are (`lpc_runner.runner.run.set_up_torch` sets the run's). Raises UserError if run_dir is no
    run, has no checkpoint, or an override does not fit.
    """
    directory = RunDirectory.open(run_dir)
    cfg = _read_config(directory)
    # How the chain was computed in training does not matter here, perhaps on a machine without a GPU.
    cfg.device, cfg.engine, cfg.precision = device, "auto", "fp32"
    choices = dict(directory.description()["choices"])
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or key.split(".")[0] not in _CHANGEABLE:
            raise UserError(f"{override}: a finished run can be read again with other {', '.join(_CHANGEABLE)} only")
        if key == "metrics":
            cfg.metrics, choices["metrics"] = recompose_group("metrics", value), value
        else:
            try:
                OmegaConf.update(cfg, key, OmegaConf.from_dotlist([f"value={value}"]).value, force_add=True)
            except (YAMLError, OmegaConfBaseException) as error:
                raise UserError(f"{override}: not a value: {str(error).splitlines()[0]}") from None
        if key == "data_dir" and "data_dir" in cfg.dataset:
            cfg.dataset.data_dir = value
    experiment = build(cfg, choices, _facts(directory))
    learner = build_learner(experiment)
    state = require_checkpoint(directory, experiment.device)
    learner.load_state_dict(state)
    for module in filter(None, (learner.model, learner.encoder)):
        module.eval().requires_grad_(False)
    parts = learner.model, learner.encoder, learner.sampler
    return LoadedRun(*parts, experiment, cfg, directory, state["counters"]["update"])


def _facts(directory: RunDirectory) -> dict[str, Any] | None:
    """What run.json keeps of the data, which need not be there; None where it lacks something: the data are asked."""
    shape, *counts = (directory.description().get(name) for name in ("data_shape", "num_train", "num_held_out"))
    if not shape or not all(isinstance(count, int) for count in (*shape, *counts)):
        return None
    return {"data_shape": tuple(shape), "num_train": counts[0], "num_held_out": counts[1]}


def _read_config(directory: RunDirectory) -> DictConfig:
    settings_of(directory)  # says if they are missing or damaged
    try:
        cfg = DictConfig(OmegaConf.load(directory.path / "config.yaml"))  # 1e-3 is a number, as on a command line
    except OmegaConfBaseException as error:
        raise directory.damaged("config.yaml", str(error).splitlines()[0]) from None
    defaults = DictConfig(OmegaConf.load(CONF_DIR / f"{CONFIG_NAME}.yaml"))
    for key in CHANGES_NO_RESULT:  # a setting that the run is older than
        if key not in cfg and key in defaults:
            cfg[key] = defaults[key]
    return cfg


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompletedRun:
    """A run that is done. path: its folder. result: the content of result.json; `status` is finished or diverged."""

    path: Path
    result: dict[str, Any] = field(repr=False)

    @property
    def metrics(self) -> dict[str, float]:
        """The run's final numbers by name."""
        return self.result["metrics"]

    def load(self, *overrides: str, device: str = "auto") -> LoadedRun:
        """Its model and encoder; see `lpc_runner.load`."""
        return load(self.path, overrides, device)


def run(words: Sequence[str]) -> CompletedRun | list[CompletedRun]:
    """What `python -m lpc_runner WORDS` would run, made here, or taken as it is where it is done.

    words: `["dataset=digits", "model=mlp"]`. With `-m`, or an experiment that is a sweep, the answer is a list, each
    run once. Everything is checked before anything starts. Raises UserError (one line) for a mistake, and at the end of
    a sweep of which a run failed; what a single run raises is raised as it is. An interrupted run is saved, and
    the same words resume it.

    Environment, logging, signal handlers, Hydra's state, threads and determinism of the process are the caller's
    again afterwards. How its threads wait is left alone, and freed memory stays with the process.
    """
    if isinstance(words, str):
        raise UserError(f"lpc_runner.run takes a list of words, got {words!r}: run({words.split()})")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("lpc_runner.run works in one process: several ranks are `torchrun -m lpc_runner ...`")
    words = [str(word) for word in words]
    try:
        args = parse_arguments(words)
    except SystemExit:
        raise UserError("--version shows something and runs nothing: it is the command's") from None
    refuse_flags(args)
    if flags := flags_of(args) - {"run", "multirun", "config_dir"}:
        raise UserError(f"--{min(flags).replace('_', '-')} shows something and runs nothing: it is the command's")
    with _left_as_it_was(), words_for_workers(["lpc_runner.run", *words]):
        composed = compose_command(args)
        _require_runs_here(composed)
        planned = check_plan(composed.cells)
        failure = None

        def failed(planned_run: Planned, error: Exception) -> None:
            nonlocal failure
            failure = failure or error
            logger.error("%s: %s", planned_run.directory.path, masked(str(error)))

        try:
            if composed.is_fleet:
                execute_fleets(planned, failed)
            for planned_run in () if composed.is_fleet else planned:
                try:
                    execute(planned_run)
                except Exception as error:
                    if not composed.is_sweep:
                        raise
                    failed(planned_run, error)
        except Interrupted as interrupted:
            if interrupted.exit_code == 128 + signal.SIGINT:
                raise KeyboardInterrupt from None
            raise SystemExit(interrupted.exit_code) from None
        if left := unfinished(planned):
            raise UserError(f"{len(left)} of {len(planned)} runs did not finish: {left[0]}") from failure
        completed = [_completed(planned_run.directory) for planned_run in planned]
    return completed if composed.is_sweep else completed[0]


def _completed(directory: RunDirectory) -> CompletedRun:
    result = directory.result()
    assert result is not None  # nothing is unfinished
    return CompletedRun(directory.path.absolute(), result)


def _require_runs_here(composed: Composed) -> None:
    """Raises UserError for what is the command line's to do."""
    if composed.cells[0].cfg.check:
        raise UserError("check=true prints a plan and runs nothing: it is the command's")
    if composed.sweeper is not None:
        raise UserError(f"hydra/sweeper={composed.sweeper} proposes its runs one by one: that is the command's to do")
    if not runs_in_this_process(composed.launcher):
        raise UserError("hydra/launcher: lpc_runner.run makes its runs in this process: the command starts others")


@contextmanager
def _left_as_it_was() -> Iterator[None]:
    """Undo what a run sets for the whole process."""
    environment, threads = dict(os.environ), torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        yield
    finally:
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ |= environment
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
