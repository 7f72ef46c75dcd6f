"""Small datasets of sequences and small sequential models, for tests."""

from __future__ import annotations

from pathlib import Path

import torch

from lpc_runner.base.distributions import Gaussian, Poisson
from lpc_runner.base.schema import NonNegativeInt, checked
from lpc_runner.data.dataset import Data, Dataset, Split
from lpc_runner.evaluation.evaluator import Metrics
from lpc_runner.models.sequential import LFADS, FactorAnalysis

NUM_TRAIN, NUM_STEPS, NUM_NEURONS = 12, 6, 5

SIZES = {
    "generator": "gru",
    "nonlinearity": "tanh",
    "hidden_dim": 7,
    "state_dim": 4,
    "initial_dim": 3,
    "inputs": "inferred",
    "input_dim": 2,
    "input_prior": "white",
    "num_factors": 3,
    "encoder": "birnn",
    "encoder_dim": 6,
    "variance_beta": 1.0,
    "initial_variance": 0.1,
    "table_learning_rate": 0.05,
}


def lfads(likelihood=None, num_held_out=0, num_steps=NUM_STEPS, num_neurons=NUM_NEURONS, num_train=NUM_TRAIN, **more):
    """A small LFADS in float64, Poisson unless told otherwise."""
    likelihood = Poisson("exp", 4.0, 0.5) if likelihood is None else likelihood
    return LFADS((num_steps, num_neurons), num_train, num_held_out, likelihood, **{**SIZES, **more}).double()


def lds(num_steps=NUM_STEPS, **more):
    """A small linear Gaussian system in float64 whose parameters are all away from their initial values."""
    model = lfads(
        Gaussian("learned", 0.6, 0.9), num_steps=num_steps,
        **{"generator": "linear", "state_dim": 2, "initial_dim": None, "num_factors": None, **more},
    )  # fmt: skip
    source = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=source, dtype=parameter.dtype), alpha=0.2)
    return model


def factor_analysis(**more):
    settings = {"state_dim": 2, "hidden": [7], "encoder": "mlp", "encoder_dim": 6, "variance_beta": 1.0}
    settings |= {"initial_variance": 0.1, "table_learning_rate": 0.05, "num_held_out": 0} | more
    return FactorAnalysis((NUM_STEPS, NUM_NEURONS), NUM_TRAIN, likelihood=Poisson("exp", 4.0, 0.5), **settings).double()


def counts(num_trials=3, num_steps=NUM_STEPS, num_neurons=NUM_NEURONS, seed=1):
    """Spike counts, float64 (B, T, N)."""
    source = torch.Generator().manual_seed(seed)
    return torch.poisson(torch.full((num_trials, num_steps, num_neurons), 0.8, dtype=torch.float64), generator=source)


class Spikes(Dataset):
    """Counts around one per bin."""

    kind = "spike counts"
    name = "spikes"

    @checked
    def __init__(self, num_held_out: NonNegativeInt) -> None:
        self.num_held_out = num_held_out

    shape, num_train = (NUM_STEPS, NUM_NEURONS), NUM_TRAIN

    def identity(self):
        return {"name": self.name}

    def prepare(self):
        pass

    def load(self):
        return Data(Split(counts(NUM_TRAIN).to(torch.uint8)), Split(counts(4, seed=2).to(torch.uint8)))

    def to_model(self, values):
        return values.float()


class Series(Spikes):
    """The same numbers, called real."""

    kind = "real-valued series"
    name = "series"


class NoMetrics(Metrics):
    """Measures nothing."""

    data_kinds = ("spike counts", "real-valued series")
    every_epochs = 0

    def evaluator(self, setup):
        raise NotImplementedError

    def label(self, facts):
        return "none"


def config_dir(folder: Path) -> str:
    """The argument that adds dataset=test_spikes and dataset=test_series, and metrics that measure nothing."""
    for name, target in (("test_spikes", "Spikes"), ("test_series", "Series")):
        path = folder / "dataset" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            "# @package _global_\ndefaults:\n  - override /metrics: test_none\n"
            f"dataset:\n  _target_: series.{target}\n  num_held_out: 0\n"
        )
    (folder / "metrics").mkdir(exist_ok=True)
    (folder / "metrics" / "test_none.yaml").write_text("_target_: series.NoMetrics\n")
    return f"--config-dir={folder}"
