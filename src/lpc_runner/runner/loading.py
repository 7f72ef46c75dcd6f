"""A run directory back to its model, encoder and settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from yaml import YAMLError

from lpc_runner.base.errors import UserError
from lpc_runner.config.build import Experiment, build
from lpc_runner.config.compose import recompose_group
from lpc_runner.config.options import CONF_DIR, CONFIG_NAME
from lpc_runner.models.latent import LatentVariableModel
from lpc_runner.runner.plan import build_learner
from lpc_runner.store.checkpoints import load_checkpoint
from lpc_runner.store.runs import CHANGES_NO_RESULT, RunDirectory

# What may differ from the run when it is looked at again: everything else would make it another run.
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
    cfg = _read_config(directory.path / "config.yaml")
    # How the chain was computed in training is nothing to those who look, perhaps on a machine without a GPU.
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
    state = load_checkpoint(directory.checkpoints, experiment.device)
    if state is None:
        raise UserError(f"{directory.path} has no checkpoint yet")
    learner.load_state_dict(state)
    for module in filter(None, (learner.model, learner.encoder)):
        module.eval().requires_grad_(False)
    parts = learner.model, learner.encoder, learner.sampler
    return LoadedRun(*parts, experiment, cfg, directory, state["counters"]["update"])


def _facts(directory: RunDirectory) -> dict[str, Any] | None:
    """What run.json keeps of the data, which need not be there; None where it lacks something: the data are asked."""
    found = {name: directory.description().get(name) for name in ("data_shape", "num_train", "num_held_out")}
    counts = [*found["data_shape"], found["num_train"], found["num_held_out"]] if found["data_shape"] else [None]
    return found | {"data_shape": tuple(counts[:-2])} if all(isinstance(count, int) for count in counts) else None


def _read_config(path: Path) -> DictConfig:
    try:
        cfg = OmegaConf.load(path)
    except (FileNotFoundError, ValueError, YAMLError, OmegaConfBaseException):
        cfg = None
    except OSError as error:
        if error.errno is not None:  # the system's refusal; OmegaConf's own means content that is no mapping
            raise
        cfg = None
    if not isinstance(cfg, DictConfig) or not cfg:
        raise UserError(f"{path} is missing or damaged; without it, the run's own command writes it anew")
    defaults = DictConfig(OmegaConf.load(CONF_DIR / f"{CONFIG_NAME}.yaml"))
    for key in CHANGES_NO_RESULT:  # a setting that the run is older than
        if key not in cfg and key in defaults:
            cfg[key] = defaults[key]
    return cfg
