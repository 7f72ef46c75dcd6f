"""scripts/sweep_bayes.yaml: W&B accepts it, and what an agent makes of it is a command line of ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from conftest import cells_of

from lpc_runner.evaluation.quality import SampleQuality

FILE = Path(__file__).parents[1] / "scripts" / "sweep_bayes.yaml"


@pytest.fixture
def sweep():
    return yaml.safe_load(FILE.read_text())


def command_line(sweep, values):
    """As `wandb agent` builds it: macros replaced by wandb's own functions."""
    from wandb.sdk.launch.sweeps import utils

    macros = utils.create_sweep_command_args({"args": {key: {"value": value} for key, value in values.items()}})
    words = []
    for word in utils.create_sweep_command(sweep["command"]):
        words += {"${env}": ["/usr/bin/env"]}.get(word) or (macros[word[2:-1]] if word.startswith("${") else [word])
    return words


@pytest.mark.parametrize("end", ["min", "max"])
def test_an_agents_command_line_composes_to_the_values_it_chose(sweep, end):
    values = {key: setting[end] for key, setting in sweep["parameters"].items()}
    words = command_line(sweep, values)
    assert words[:4] == ["/usr/bin/env", "python", "-m", "lpc_runner"]
    (cell,) = cells_of(*words[4:])
    cfg = cell.cfg
    assert (cell.choices["dataset"], cfg.study) == ("svhn", "sweep_bayes")
    found = (cfg.step_size.value, cfg.preconditioning.beta, cfg.optimizer.learning_rate)
    assert found == tuple(values[key] for key in ("step_size.value", "preconditioning.beta", "optimizer.learning_rate"))


def test_wandb_finds_nothing_to_add_or_to_refuse(sweep):
    from wandb.apis.public.sweeps import _validate_config_and_fill_distribution

    assert _validate_config_and_fill_distribution(sweep) == sweep
    assert sweep["method"] == "bayes" and sweep["early_terminate"]["type"] == "hyperband"
    logarithmic = [key for key, setting in sweep["parameters"].items() if "log_uniform" in setting["distribution"]]
    assert logarithmic == ["step_size.value", "optimizer.learning_rate"]
    for key in logarithmic:  # log_uniform_values takes the values themselves, log_uniform their logarithms
        setting = sweep["parameters"][key]
        assert setting["distribution"] == "log_uniform_values" and 0 < setting["min"] < setting["max"]


def test_the_metric_is_logged_during_training_under_this_name(sweep):
    """Hyperband counts rows with the metric: a metric of the end alone would stop nothing."""
    (cell,) = cells_of(*command_line(sweep, {})[4:])
    metrics = cell.cfg.metrics
    part, name = sweep["metric"]["name"].split("/")
    assert part == "eval" and name == f"fd_{metrics.extractor}"
    assert metrics._target_.endswith(SampleQuality.__qualname__) and metrics.every_epochs > 0
    assert sweep["early_terminate"]["min_iter"] < cell.cfg.trainer.num_epochs / metrics.every_epochs


def test_several_runs_of_one_command_are_refused_under_an_agent(command, workplace, monkeypatch):
    """By the tracker that says so; another takes them."""
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    monkeypatch.setenv("WANDB_MODE", "offline")
    answer = command("-m", "seed=0,1", "device=cpu", "check=true")
    assert answer.code == 1 and len(answer.lines) == 1 and "agent gives one run's id" in answer.err
    answer = command("-m", "seed=0,1", "device=cpu", "tracker=none", "check=true")
    assert answer.code == 0
