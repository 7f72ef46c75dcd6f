"""Stable names of this package's classes, for run hashes and config.yaml, independent of where a class's file lies.

A name is the first path that the class had; it never changes, so that the hashes of finished runs stay the same.
To move a class: move its file, and give its new path in its YAML's `_target_` and in PLACES, beside its name.
A class from elsewhere has no row: its own `_target_` is its name.
"""

from __future__ import annotations

from omegaconf import DictConfig

# Classes that have not moved, by module: their path is their name.
_AT_HOME = {
    "data.arrays": "Arrays",
    "data.digits": "Digits",
    "data.folder": "ImageFolder",
    "data.spikes": "Series Spikes",
    "data.torchvision_sets": "CIFAR10 CelebA64 FashionMNIST MNIST SVHN",
    "evaluation.ais": "AnnealedImportance",
    "evaluation.calibration": "PosteriorMetrics",
    "evaluation.log_likelihood": "LikelihoodMetrics",
    "evaluation.quality": "SampleQuality",
    "inference.objectives": "VariationalEM",
    "inference.preconditioning": "Adam EncoderVariance Fisher Identity SharedAdam",
    "inference.samplers": "HMC Langevin MALA Map NoSteps Underdamped",
    "inference.step_sizes": "Adapted Annealed Blocks Constant Polynomial",
    "models.conv": "Conv",
    "models.hierarchical": "Hierarchical",
    "models.sequential": "FactorAnalysis LFADS",
    "tracking.tracker": "NoTracker",
    "tracking.wandb_run": "WandbTracker",
    "training.traces": "Traces",
    "training.trainer": "Trainer",
}
# Name: where the class is today.
PLACES = {
    f"lpc_runner.{module}.{name}": f"lpc_runner.{module}.{name}"
    for module, names in _AT_HOME.items()
    for name in names.split()
} | {
    "lpc_runner.data.chaotic_rnn.ChaoticRNN": "lpc_runner.data.simulated.ChaoticRNN",
    "lpc_runner.data.linear_system.SampledLinearSystem": "lpc_runner.data.simulated.SampledLinearSystem",
    "lpc_runner.data.lorenz.Lorenz": "lpc_runner.data.simulated.Lorenz",
    "lpc_runner.distributions.DiscretisedGaussian": "lpc_runner.base.distributions.DiscretisedGaussian",
    "lpc_runner.distributions.Gaussian": "lpc_runner.base.distributions.Gaussian",
    "lpc_runner.emissions.Bernoulli": "lpc_runner.base.distributions.Bernoulli",
    "lpc_runner.emissions.Poisson": "lpc_runner.base.distributions.Poisson",
    "lpc_runner.evaluation.sequence_quality.SequenceQuality": "lpc_runner.evaluation.sequence_metrics.SequenceQuality",
    "lpc_runner.inference.importance.ImportanceWeighted": "lpc_runner.inference.objectives.ImportanceWeighted",
    "lpc_runner.inference.objectives.Objective": "lpc_runner.inference.objectives.WeightedKL",
    "lpc_runner.models.linear.Linear": "lpc_runner.models.dense.Linear",
    "lpc_runner.models.mlp.MLP": "lpc_runner.models.dense.MLP",
    "lpc_runner.training.optimizers.Adam": "lpc_runner.training.learner.AdamOptimizer",
}


def place_of(target: str) -> str:
    """The path at which a class is imported, given its name or its path."""
    return PLACES.get(target, target)


def name_of(target: str) -> str:
    """The name of the class at a path: that of its row, or the path itself."""
    return next((name for name, place in PLACES.items() if place == target), target)


def name_classes(cfg: DictConfig) -> None:
    """Put the name of its class, which no move changes, into every `_target_` of a resolved configuration."""
    for key, value in cfg.items():
        if isinstance(value, DictConfig):
            name_classes(value)
        elif key == "_target_":
            cfg[key] = name_of(value)
