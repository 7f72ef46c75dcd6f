"""Stable names of this package's classes, for run hashes and config.yaml, independent of where a class's file lies.

A name is the first path that the class had; it never changes, so that the hashes of finished runs stay the same.
To move a class: move its file, and give its new path in its YAML's `_target_` and on the right of its row here.
A class from elsewhere has no row: its own `_target_` is its name.
"""

from __future__ import annotations

from omegaconf import DictConfig

# Name: where the class is today.
PLACES = {
    "lpc_runner.data.arrays.Arrays": "lpc_runner.data.arrays.Arrays",
    "lpc_runner.data.chaotic_rnn.ChaoticRNN": "lpc_runner.data.simulated.ChaoticRNN",
    "lpc_runner.data.digits.Digits": "lpc_runner.data.digits.Digits",
    "lpc_runner.data.folder.ImageFolder": "lpc_runner.data.folder.ImageFolder",
    "lpc_runner.data.linear_system.SampledLinearSystem": "lpc_runner.data.simulated.SampledLinearSystem",
    "lpc_runner.data.lorenz.Lorenz": "lpc_runner.data.simulated.Lorenz",
    "lpc_runner.data.spikes.Series": "lpc_runner.data.spikes.Series",
    "lpc_runner.data.spikes.Spikes": "lpc_runner.data.spikes.Spikes",
    "lpc_runner.data.torchvision_sets.CIFAR10": "lpc_runner.data.torchvision_sets.CIFAR10",
    "lpc_runner.data.torchvision_sets.CelebA64": "lpc_runner.data.torchvision_sets.CelebA64",
    "lpc_runner.data.torchvision_sets.FashionMNIST": "lpc_runner.data.torchvision_sets.FashionMNIST",
    "lpc_runner.data.torchvision_sets.MNIST": "lpc_runner.data.torchvision_sets.MNIST",
    "lpc_runner.data.torchvision_sets.SVHN": "lpc_runner.data.torchvision_sets.SVHN",
    "lpc_runner.distributions.DiscretisedGaussian": "lpc_runner.base.distributions.DiscretisedGaussian",
    "lpc_runner.distributions.Gaussian": "lpc_runner.base.distributions.Gaussian",
    "lpc_runner.emissions.Bernoulli": "lpc_runner.base.distributions.Bernoulli",
    "lpc_runner.emissions.Poisson": "lpc_runner.base.distributions.Poisson",
    "lpc_runner.evaluation.ais.AnnealedImportance": "lpc_runner.evaluation.ais.AnnealedImportance",
    "lpc_runner.evaluation.calibration.PosteriorMetrics": "lpc_runner.evaluation.calibration.PosteriorMetrics",
    "lpc_runner.evaluation.log_likelihood.LikelihoodMetrics": "lpc_runner.evaluation.log_likelihood.LikelihoodMetrics",
    "lpc_runner.evaluation.quality.SampleQuality": "lpc_runner.evaluation.quality.SampleQuality",
    "lpc_runner.evaluation.sequence_quality.SequenceQuality": "lpc_runner.evaluation.sequence_metrics.SequenceQuality",
    "lpc_runner.inference.importance.ImportanceWeighted": "lpc_runner.inference.objectives.ImportanceWeighted",
    "lpc_runner.inference.objectives.Objective": "lpc_runner.inference.objectives.WeightedKL",
    "lpc_runner.inference.objectives.VariationalEM": "lpc_runner.inference.objectives.VariationalEM",
    "lpc_runner.inference.preconditioning.Adam": "lpc_runner.inference.preconditioning.Adam",
    "lpc_runner.inference.preconditioning.EncoderVariance": "lpc_runner.inference.preconditioning.EncoderVariance",
    "lpc_runner.inference.preconditioning.Fisher": "lpc_runner.inference.preconditioning.Fisher",
    "lpc_runner.inference.preconditioning.Identity": "lpc_runner.inference.preconditioning.Identity",
    "lpc_runner.inference.preconditioning.SharedAdam": "lpc_runner.inference.preconditioning.SharedAdam",
    "lpc_runner.inference.samplers.HMC": "lpc_runner.inference.samplers.HMC",
    "lpc_runner.inference.samplers.Langevin": "lpc_runner.inference.samplers.Langevin",
    "lpc_runner.inference.samplers.MALA": "lpc_runner.inference.samplers.MALA",
    "lpc_runner.inference.samplers.Map": "lpc_runner.inference.samplers.Map",
    "lpc_runner.inference.samplers.NoSteps": "lpc_runner.inference.samplers.NoSteps",
    "lpc_runner.inference.samplers.Underdamped": "lpc_runner.inference.samplers.Underdamped",
    "lpc_runner.inference.step_sizes.Adapted": "lpc_runner.inference.step_sizes.Adapted",
    "lpc_runner.inference.step_sizes.Annealed": "lpc_runner.inference.step_sizes.Annealed",
    "lpc_runner.inference.step_sizes.Blocks": "lpc_runner.inference.step_sizes.Blocks",
    "lpc_runner.inference.step_sizes.Constant": "lpc_runner.inference.step_sizes.Constant",
    "lpc_runner.inference.step_sizes.Polynomial": "lpc_runner.inference.step_sizes.Polynomial",
    "lpc_runner.models.conv.Conv": "lpc_runner.models.conv.Conv",
    "lpc_runner.models.hierarchical.Hierarchical": "lpc_runner.models.hierarchical.Hierarchical",
    "lpc_runner.models.linear.Linear": "lpc_runner.models.dense.Linear",
    "lpc_runner.models.mlp.MLP": "lpc_runner.models.dense.MLP",
    "lpc_runner.models.sequential.FactorAnalysis": "lpc_runner.models.sequential.FactorAnalysis",
    "lpc_runner.models.sequential.LFADS": "lpc_runner.models.sequential.LFADS",
    "lpc_runner.tracking.tracker.NoTracker": "lpc_runner.tracking.tracker.NoTracker",
    "lpc_runner.tracking.wandb_run.WandbTracker": "lpc_runner.tracking.wandb_run.WandbTracker",
    "lpc_runner.training.optimizers.Adam": "lpc_runner.training.learner.AdamOptimizer",
    "lpc_runner.training.traces.Traces": "lpc_runner.training.traces.Traces",
    "lpc_runner.training.trainer.Trainer": "lpc_runner.training.trainer.Trainer",
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
