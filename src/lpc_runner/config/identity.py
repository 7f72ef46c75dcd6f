"""What makes two runs the same: a hash of the resolved configuration without what changes no result."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lpc_runner.base.files import plain_name
from lpc_runner.config.compose import Cell
from lpc_runner.config.options import as_dict
from lpc_runner.store.runs import CHANGES_NO_RESULT, FIRST_VALUES


def run_hash(cell: Cell, dataset_identity: dict[str, object]) -> str:
    """Hex SHA-256 of what the run computes; the dataset enters by its content, not by its path."""
    values = copy.deepcopy(as_dict(cell.cfg, resolve=True))
    for path, first in FIRST_VALUES.items():
        group, _, key = path.partition(".")
        if values[group]["_target_"].startswith("lpc_runner.") and values[group].get(key) == first:
            values[group].pop(key, None)
    for key in CHANGES_NO_RESULT:
        values.pop(key)
    values["dataset"] = dataset_identity
    if "num_steps" not in values["sampler"]:  # without a chain, the settings of its steps change nothing
        values.pop("step_size")
        values.pop("preconditioning")
    values["trainer"].pop("checkpoint_seconds", None)
    values["metrics"].pop("weights", None)  # verified by their own hash
    if values["trainer"].get("init_from"):
        values["trainer"]["init_from"] = Path(values["trainer"]["init_from"]).resolve().name
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def flat_keys(cell: Cell) -> dict[str, Any]:
    """The settings that sweeps and dashboards group by, at one level, absent where they do not apply."""
    cfg, choices = cell.cfg, cell.choices
    groups = ("dataset", "model", "sampler", "objective", "preconditioning", "step_size")
    keys: dict[str, Any] = {group: choices[group] for group in groups}
    keys["step_size_schedule"] = keys.pop("step_size")
    has_chain, has_e_steps = "num_steps" in cfg.sampler, "num_encoder_steps" in cfg.objective
    keys |= {
        "seed": cfg.seed,
        "num_steps": cfg.sampler.get("num_steps", 0),
        "step_size": cfg.step_size.get("value") if has_chain else None,
        "beta": cfg.preconditioning.get("beta") if has_chain else None,
        "num_importance_samples": None if has_e_steps else cfg.objective.get("num_samples"),
        "theta_states": cfg.sampler.get("theta_states"),
        "start": None if (start := cfg.sampler.get("start")) == FIRST_VALUES["sampler.start"] else start,
        "learning_rate": cfg.optimizer.get("learning_rate"),
        "num_epochs": cfg.trainer.num_epochs,
        "batch_size": cfg.trainer.batch_size,
        "scale": OmegaConf.select(cfg, "model.likelihood.scale"),
        "extractor": cfg.metrics.get("extractor"),
    }
    return {key: value for key, value in keys.items() if value is not None}


def run_name(cell: Cell, digest: str) -> str:
    """<dataset>-<model>-<method>-s<seed>-<hash>: readable, safe as a file name, never the clock."""
    choices = cell.choices
    words = [choices["dataset"], choices["model"], choices["sampler"], choices["objective"]]
    if choices["sampler"] != "none":
        words.append(choices["preconditioning"])
    text = "-".join([*words, f"s{cell.cfg.seed}"[:24], digest[:10]])
    return plain_name(text)
