"""Sequences from the command line to result.json: default, variational EM, held-out neurons, the user's own file."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import cells_of, only_run, plan_of, result_of

import lpc_runner.sample
from lpc_runner.config.build import build
from lpc_runner.runner.plan import build_learner
from lpc_runner.runner.run import batches_of

SMALL = (
    "device=cpu",
    "tracker=none",
    "num_threads=1",
    "model.state_dim=6",
    "model.encoder_dim=6",
    "traces.num_chains=2",
    "traces.grid_points=3",
    "trainer.batch_size=8",
    "trainer.max_updates=3",
    "metrics.num_importance_samples=5",
    "metrics.num_gap_trials=4",
    "metrics.free_steps=3",
    "metrics.num_posterior_samples=4",
)
LORENZ = ("dataset=lorenz", "dataset.num_conditions=4", "dataset.num_trials=5", *SMALL)


def test_the_default_of_sequences_measures_and_draws(command):
    answer = command("model=lfads", *LORENZ, "objective=jeffreys", "dataset.num_held_out=3", "metrics.every_epochs=1")
    assert answer.code == 0, answer.err
    result = result_of(only_run())
    metrics, facts = result["metrics"], result["measurement"]
    for name in (
        "free_iwae",
        "encoder_elbo",
        "rates_r2",
        "latents_r2",
        "kl_inputs",
        "chain_cosmoothing_bits_per_spike",
    ):
        assert name in metrics
    assert facts["kind"] == "sequences" and facts["ceilings"]["rates_r2"] == 1
    pictures = {path.name for path in (only_run() / "samples").iterdir()}
    assert {"data.png", "final.png", "factors.png", "inputs.png", "gaps.png"} <= pictures
    assert any(name.startswith("update-") for name in pictures)
    rows = [line for line in answer.out.splitlines() if line.strip().startswith("rates_r2")]
    assert rows and f"{metrics['rates_r2']:.4g}" in rows[0] and " 1 " in rows[0]
    assert "true rates" in answer.out and facts["sources"] in answer.out


@pytest.mark.parametrize(
    "words",
    [
        ("model=lds", "dataset=lds", "dataset.num_train=20", "method=lpc_persistent", *SMALL),
        ("model=lfads", *LORENZ, "method=lpc_persistent", "objective=jeffreys", "sampler.first_steps=3"),
    ],
)
def test_persistent_chains_of_sequences(words, workplace):
    """Of every trial that was seen the whole z is kept, initial condition and inputs."""
    planned = plan_of(*words)
    planned.require()
    experiment = planned.experiment
    batches, seen = batches_of(planned, experiment.dataset.load()), []
    learner = build_learner(experiment, num_train=experiment.dataset.num_train)
    for update in range(2):
        seen.append(batches.batch(0, update))
        gradients = learner.gradients(seen[-1], 0, update, False, first_epoch=True)
        assert bool(gradients.finite)
        learner.apply(seen[-1], gradients)
    kept = learner.state_dict()["persistent"]["z"]
    assert kept.shape == (experiment.dataset.num_train, experiment.model.latent_dim)
    index = torch.cat([batch.index for batch in seen])
    assert kept[index].isfinite().all() and kept.isfinite().any(1).sum() == len(index)
    assert torch.equal(kept[seen[-1].index], gradients.z)


def test_step_sizes_of_blocks_follow_the_run_to_its_device(workplace):
    """A lease or a rank chooses the GPU after the configuration was checked."""
    experiment = plan_of(*LORENZ, "step_size=blocks").experiment
    experiment.device = torch.device("meta")
    learner = build_learner(experiment)
    assert learner.sampler.step_size(1).device == next(learner.model.parameters()).device == torch.device("meta")


def test_variational_em_is_measured_by_its_free_q(command):
    assert command("model=lfads", *LORENZ, "method=vem", "metrics.every_epochs=1").code == 0
    metrics = result_of(only_run())["metrics"]
    assert "free_iwae" in metrics and "rates_r2" in metrics
    assert not any(name.startswith("encoder_") or name == "elbo" for name in metrics)


def test_a_diverged_run_keeps_what_is_finite(command):
    """The model's first state is measured; averages over its exploding chains are no numbers."""
    answer = command(*LORENZ, "preconditioning=none", "step_size.value=5000")
    assert answer.code == 0, answer.err
    result = result_of(only_run())
    assert result["status"] == "diverged" and "bits_per_spike" in result["metrics"]
    assert all(map(math.isfinite, result["metrics"].values()))
    assert "not finite and left out: chain_" in answer.err
    assert command(*LORENZ, "preconditioning=none", "step_size.value=5000").code == 0  # it is done


def test_a_run_is_measured_again(command):
    from lpc_runner.evaluate import main

    assert command("model=lfads", *LORENZ, "objective=jeffreys").code == 0
    answer = command(str(only_run()), "metrics.num_importance_samples=7", entry=main)
    assert answer.code == 0, answer.err
    (path,) = (only_run() / "evaluations").iterdir()
    assert path.name == "sequences-k7-n4-test-1.json" and "K = 7" in answer.out
    answer = command(str(only_run()), entry=lpc_runner.sample.main)
    assert answer.code == 1 and len(answer.lines) == 1 and "spike counts" in answer.err, answer.err


def test_a_linear_system_is_measured_against_its_exact_evidence(command):
    small = [item for item in SMALL if "state_dim" not in item]
    assert command("dataset=lds", "dataset.num_train=16", "dataset.num_test=8", *small, "method=vae").code == 0
    result = result_of(only_run())
    metrics, ceilings = result["metrics"], result["measurement"]["ceilings"]
    assert metrics["log_evidence"] > metrics["free_iwae"] > metrics["free_elbo"]
    assert metrics["log_evidence"] < ceilings["log_evidence"]  # after three updates no model is as good as the truth


def test_the_users_own_series(command, workplace):
    draw = np.random.default_rng(0).normal(size=(30, 12, 4))
    np.savez("mine.npz", train_series=draw[:20], valid_series=draw[20:])
    assert command("dataset=series", "dataset.path=mine.npz", *SMALL).code == 0
    assert "sigma" in result_of(only_run())["metrics"]


@pytest.mark.parametrize(
    "arguments, facts",
    [
        (("dataset=lorenz", "model=conv"), ("model=conv expects images", "dataset=lorenz holds spike counts")),
        (("dataset=lorenz", "metrics=default"), ("metrics=default expects images",)),
        (("dataset=lorenz", "model/likelihood=gaussian"), ("gaussian", "spike counts")),
        (("dataset=lds", "model/likelihood=poisson"), ("poisson", "real-valued series")),
        (("dataset=digits", "metrics=sequences"), ("metrics=sequences expects", "images")),
        (("dataset=lorenz", "dataset.num_held_out=30"), ("dataset.num_held_out", "30 neurons")),
        (("dataset=lorenz", "dataset.num_trials=4"), ("dataset.num_trials", "at least 5")),
        (("dataset=spikes", "dataset.path=none.npz"), ("none.npz", "no such file")),
        (("dataset=spikes",), ("dataset.path has no value",)),
        (("dataset=lorenz", "metrics.free_samples=3"), ("metrics.free_samples must be even",)),
    ],
)
def test_mistakes_are_one_line(command, arguments, facts):
    answer = command(*arguments, "tracker=none", "device=cpu")
    assert answer.code == 1 and len(answer.lines) == 1, answer.err
    for fact in facts:
        assert fact in answer.err


@pytest.mark.parametrize("name", ["gaps", "lfads_lorenz", "lfads_pulse"])
def test_experiments_pair_their_seeds_and_measure_alike(name, workplace):
    for study in (f"{name}_small", name):
        cells = cells_of(f"experiment={study}", "tracker=none", "device=cpu")
        seeds = {}
        for cell in cells:
            seeds.setdefault(cell.choices["method"], []).append(cell.cfg.seed)
            assert cell.cfg.metrics == cells[0].cfg.metrics and cell.cfg.dataset == cells[0].cfg.dataset
            assert cell.cfg.study == study and cell.choices["metrics"] == "sequences"
        assert len({tuple(found) for found in seeds.values()}) == 1 and len(seeds) > 1
    first = cells[0]
    build(first.cfg, first.choices)
