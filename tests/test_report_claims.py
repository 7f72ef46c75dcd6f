"""The paper's claims, its Table 4 and its tuning, answered from studies whose answers are known."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from studies import LPC, VAE, Builder, measured

from lpc_runner.evaluation.samples import save_grid
from lpc_runner.paper import numbers as paper
from lpc_runner.paper.claims import CHECKS, ratio, study_answers
from lpc_runner.paper.evidence import (
    CHANCE,
    FAILS,
    HOLDS,
    UNMEASURED,
    Finding,
    Sample,
    all_of,
    answer,
    differences,
    judge,
    standard_error,
)
from lpc_runner.paper.training_checks import climbing_steps, cut, gradient_energy, sharpness
from lpc_runner.report import study_tables
from lpc_runner.study.study import read_study
from lpc_runner.study.tables import show

CHAIN = LPC | {"num_steps": 300}
FD = "fd_random_conv"
SEEDS = (0, 1)


@pytest.fixture
def disk(tmp_path):
    return Builder(tmp_path / "outputs")


def said(disk, claim, **wanted):
    """The one answer to a claim."""
    found = [a for a in study_answers(read_study(disk.study)) if a.claim.id == claim]
    (found,) = [a for a in found if all(getattr(a, key) == value for key, value in wanted.items())]
    return found


def table(disk, title):
    found = next(table for table in study_tables(read_study(disk.study)) if title in table.title)
    return {row[0]: dict(zip(found.columns, row)) for row in found.rows}, "\n".join(found.notes)


def quality(fd, density=0.5, coverage=0.5):
    return {FD: fd, "density_random_conv": density, "coverage_random_conv": coverage}


def runs(disk, name, keys, values, **result):
    """One run per value of the Fréchet distance (or per dict of metrics), seeds from 0; None: diverged."""
    for seed, value in enumerate(values):
        metrics = value if isinstance(value, dict) else quality(500.0 if value is None else value)
        status = {"status": "diverged"} if value is None else {}
        disk.run(f"{name}{seed}", keys, seed, metrics=metrics, **{**result, **status})


def lpc_and_vae(disk, lpc, vae, dataset="cifar10", epochs=(15, 50)):
    """Two seeds each with these metrics, after these epochs."""
    for seed in SEEDS:
        shift = {name: value * (1 + 0.01 * seed) for name, value in lpc.items()}
        common = {"dataset": dataset, "num_epochs": float(epochs[0])}
        disk.run(f"lpc{seed}", CHAIN | {"num_epochs": epochs[0]}, seed, metrics=shift, **common)
        common["num_epochs"] = float(epochs[1])
        disk.run(f"vae{seed}", VAE | {"num_epochs": epochs[1]}, seed, metrics=vae, **common)


def test_every_claim_of_the_paper_is_asked():
    assert set(CHECKS) == {claim.id for claim in paper.CLAIMS}


def test_every_claim_is_answered_once_per_dataset_and_extractor_where_features_enter(disk):
    both = {FD: 3.0, "fd_classifier": 2.0}
    disk.run("a", VAE, dataset="svhn", metrics=both)
    disk.run("b", VAE, metrics={FD: 3.0})
    found = [(a.claim.id, a.dataset, a.extractor) for a in study_answers(read_study(disk.study))]
    assert len(found) == len(set(found))
    featured = {claim for claim, (_, featured) in CHECKS.items() if featured}
    expected = {(claim, d, e) for claim in featured for d, e in (("svhn", "random_conv"), ("digits", "random_conv"))}
    expected |= {(claim, "svhn", "classifier") for claim in featured}
    expected |= {(claim, dataset, "") for claim in set(CHECKS) - featured for dataset in ("svhn", "digits")}
    assert set(found) == expected


# Verdicts -------------------------------------------------------------------------------------------------


def test_a_difference_within_two_standard_errors_or_of_one_seed_is_chance():
    assert standard_error([1.0, 3.0], [2.0, 6.0]) == pytest.approx(math.sqrt(2 / 2 + 8 / 2))
    assert standard_error([1.0], [2.0, 6.0]) is None
    assert [judge(margin, 1.0) for margin in (-2.01, -2.0, 0.0, 2.0, 2.01)] == [FAILS, CHANCE, CHANCE, CHANCE, HOLDS]
    assert judge(99.0, None) == CHANCE and judge(0.0, 0.0) == CHANCE


def lost(finite, diverged=0, odd=0):
    return Sample("a", dict(enumerate(finite)), {"diverged": diverged, "not finite": odd})


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        (lost([1.0, 1.1]), lost([2.0, 2.1]), HOLDS),
        (lost([2.0, 2.1]), lost([1.0, 1.1]), FAILS),
        (lost([1.0, 2.0]), lost([1.4, 2.4]), CHANCE),
        (lost([1.0]), lost([9.0, 9.1]), CHANCE),
        (lost([1.0], diverged=2), lost([9.0, 9.1, 9.2]), CHANCE),  # two of three: within two standard errors
        (lost([1.0], diverged=4), lost([9.0, 9.1, 9.2, 9.3, 9.4]), FAILS),
        (lost([], diverged=3), lost([9.0, 9.1, 9.2]), FAILS),
        (lost([9.0, 9.1, 9.2]), lost([], diverged=3), HOLDS),
        (lost([1.0, 1.1], odd=1), lost([9.0, 9.1, 9.2]), CHANCE),
        (lost([1.0, 1.1], odd=1), lost([9.0, 9.1], diverged=1), CHANCE),
        (lost([], odd=3), lost([], diverged=3), UNMEASURED),
        (Sample("a", {0: 1.0, 1: 1.1}, {}, ("seed 2 of a: failed",)), lost([2.0, 2.1, 2.2]), UNMEASURED),
    ],
)
def test_lost_seeds_are_worse_than_any_number_and_never_averaged_away(ours, theirs, verdict):
    found = answer(ours, theirs, "x")
    assert found.verdict == verdict
    for each in (ours, theirs):
        for word, number in each.lost.items():
            assert not number or f"{number} of {each.num_seeds} {word}" in found.text
    flipped = [Sample(s.name, {k: -v for k, v in s.by_seed.items()}, s.lost, s.missing) for s in (ours, theirs)]
    assert answer(*flipped, "x", higher=True).verdict == verdict


@pytest.mark.parametrize(
    ("parts", "verdict"),
    [
        ((HOLDS, HOLDS), HOLDS),
        ((HOLDS, CHANCE), CHANCE),
        ((CHANCE, UNMEASURED), UNMEASURED),
        ((UNMEASURED, FAILS), FAILS),
        ((), UNMEASURED),
    ],
)
def test_a_claim_of_several_parts_holds_where_all_do(parts, verdict):
    assert all_of([Finding(part, "") for part in parts]).verdict == verdict


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"keys": {"num_epochs": 2}, "num_epochs": 2.0}, "num_epochs 15 against 2"),
        ({"keys": {"num_steps": 5}}, "T 300 against 5"),
        ({"keys": {"scale": "optimal"}}, "scale learned against optimal"),
        ({"keys": {"batch_size": 32}}, "batch_size 64 against 32"),
        ({"num_epochs": 9.0}, "epochs trained 15 against 9"),  # cut by max_updates
        ({"num_updates": 99}, "updates trained 100 against 99"),
        ({"config": "precision: bf16"}, "precision fp32 against bf16"),
        ({"seeds": (0, 2)}, "seeds 0, 1 against 0, 2"),
        ({"device": "GPU B"}, "device GPU A against GPU B"),
        ({"device": None}, "device GPU A against not recorded"),
    ],
)
def test_whatever_differs_beyond_the_claims_own_variable_is_named(disk, change, words):
    keys = CHAIN | {"scale": "learned", "batch_size": 64}
    for seed in SEEDS:
        disk.run(f"a{seed}", keys, seed, metrics=quality(1.0), config="precision: fp32", device="GPU A")
    own = {"config": "precision: fp32", "device": "GPU A"} | change
    changed, seeds = own.pop("keys", {}), own.pop("seeds", SEEDS)
    for seed in seeds:
        disk.run(f"b{seed}", keys | changed | {"objective": "reverse"}, seed, metrics=quality(2.0), **own)
    first, second = read_study(disk.study).groups
    first, second = (first, second) if first.method == "LPC jeffreys" else (second, first)
    assert words in "; ".join(differences(first, second, ("objective",), times=True))
    assert "objective jeffreys against reverse" in differences(first, second, ())
    found = said(disk, "fig2-warm-start")
    assert found.verdict == UNMEASURED and (words in found.numbers) == ("device" not in change)


def test_equal_cells_differ_in_nothing_and_what_only_one_has_is_its_methods(disk):
    runs(disk, "a", CHAIN, (1.0, 2.0), device="GPU A")
    runs(disk, "b", CHAIN | {"objective": "reverse"}, (1.0, 2.0), device="GPU A")
    runs(disk, "v", VAE, (1.0, 2.0), device="GPU A")
    groups = {group.method: group for group in read_study(disk.study).groups}
    assert differences(groups["LPC jeffreys"], groups["LPC reverse"], ("objective",), times=True) == []
    assert differences(groups["LPC jeffreys"], groups["VAE"], ("objective", "sampler"), times=True) == []


# Table 1 and Figure 2 -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lpc", "vae", "verdict"), [(10.0, 12.0, HOLDS), (12.0, 10.0, FAILS), (10.0, 10.1, CHANCE)])
def test_table_1_compares_means_at_the_papers_epochs(disk, lpc, vae, verdict):
    lpc_and_vae(disk, quality(lpc), quality(vae))
    found = said(disk, "table1-fid")
    assert (found.verdict, found.extractor) == (verdict, "random_conv")
    # mean 1.005 lpc, standard deviation lpc 0.01 / sqrt 2, its standard error lpc 0.005
    assert f"{1.005 * lpc:.2f} ± {lpc * 0.01 / math.sqrt(2):.2f} (n = 2)" in found.numbers
    difference = 1.005 * lpc - vae
    assert f"difference {show(difference)} (standard error {lpc * 0.005:.3f})" in found.numbers


@pytest.mark.parametrize(
    ("density", "coverage", "verdict"),
    [(0.6, 0.6, HOLDS), (0.6, 0.4, FAILS), (0.4, 0.6, FAILS), (0.6, 0.498, CHANCE)],
)
def test_density_and_coverage_must_both_be_higher(disk, density, coverage, verdict):
    lpc_and_vae(disk, quality(9.0, density, coverage), quality(9.0, 0.5, 0.5))
    assert said(disk, "table1-density-coverage").verdict == verdict


def test_a_verdict_of_one_seed_is_chance(disk):
    disk.run("lpc", CHAIN, dataset="cifar10", metrics=quality(1.0))
    disk.run("vae", VAE | {"num_epochs": 50}, dataset="cifar10", metrics=quality(99.0), num_epochs=50.0)
    found = said(disk, "table1-fid")
    assert found.verdict == CHANCE and "one seed" in found.numbers


@pytest.mark.parametrize(("epochs", "verdict"), [((15, 20), UNMEASURED), ((2, 50), UNMEASURED), ((15, 50), HOLDS)])
def test_the_papers_datasets_need_the_papers_epochs(disk, epochs, verdict):
    lpc_and_vae(disk, quality(10.0), quality(12.0), epochs=epochs)
    found = said(disk, "table1-fid")
    assert found.verdict == verdict
    assert verdict == HOLDS or f"epochs trained {epochs[0]}" in found.numbers or "epochs, not" in found.numbers


@pytest.mark.parametrize(("epochs", "verdict"), [((12, 40), HOLDS), ((15, 2), UNMEASURED), ((12, 80), UNMEASURED)])
def test_other_datasets_need_epochs_in_the_papers_proportion(disk, epochs, verdict):
    lpc_and_vae(disk, quality(10.0), quality(12.0), dataset="digits", epochs=epochs)
    found = said(disk, "table1-fid")
    assert found.verdict == verdict
    assert verdict == HOLDS or "the paper's are 15 against 50" in found.numbers


def test_a_run_cut_short_has_not_reached_its_epochs(disk):
    runs(disk, "lpc", CHAIN, (3.0, 3.1), dataset="cifar10", num_epochs=2.0)
    runs(disk, "vae", VAE | {"num_epochs": 50}, (9.0, 9.1), dataset="cifar10", num_epochs=50.0)
    found = said(disk, "table1-fid")
    assert found.verdict == UNMEASURED and "LPC jeffreys, 15 epochs trained 2.0 epochs, not 15" in found.numbers


@pytest.mark.parametrize("state", ["failed", "unfinished", "diverged", "nan", "other N", "no number"])
def test_a_seed_without_a_number_supports_nothing(disk, state):
    lpc_and_vae(disk, quality(10.0), quality(12.0))
    folder = disk.outputs / "runs" / "lpc1"
    result = json.loads((folder / "result.json").read_text())
    if state in ("failed", "diverged"):
        result["status"] = state
    elif state == "other N":
        result["measurement"]["num_samples"] = 100
    else:
        result["metrics"] = {"nan": quality("nan")}.get(state, {})
    (folder / "result.json").write_text(json.dumps(result))
    if state == "unfinished":
        (folder / "result.json").unlink()
    found = said(disk, "table1-fid")
    words = {"diverged": "1 of 2 diverged", "nan": "1 of 2 not finite", "no number": "fd not measured"}
    words |= {"other N": "measured with random_conv features (abc), N = 100"}
    assert found.verdict == (CHANCE if state in ("diverged", "nan") else UNMEASURED)
    assert words.get(state, f"seed 1 of LPC jeffreys, 15 epochs: {state}") in found.numbers


def test_a_vae_of_another_measurement_is_named_and_not_called_missing(disk):
    runs(disk, "lpc", CHAIN, (3.0, 3.1, 3.2), dataset="cifar10")
    other = {"dataset": "cifar10", "num_epochs": 50.0, "measurement": {"num_samples": 50000}}
    runs(disk, "vae", VAE | {"num_epochs": 50}, (9.0, 9.1, 9.2), **other)
    found = said(disk, "table1-fid")
    assert found.verdict == UNMEASURED and "N = 50,000" in found.numbers and "not with" in found.numbers


@pytest.mark.parametrize(("claim", "dataset"), [("table1-fid", "celeba64"), ("table1-density-coverage", "svhn")])
def test_a_claim_is_not_stretched_to_datasets_it_leaves_out(disk, claim, dataset):
    lpc_and_vae(disk, quality(10.0), quality(12.0), dataset=dataset)
    assert said(disk, claim).verdict == UNMEASURED


def test_every_setting_of_lpc_has_its_own_answer_and_the_papers_is_marked(disk):
    lpc_and_vae(disk, quality(10.0), quality(12.0))
    common = {"learning_rate": 0.001, "batch_size": 64}
    runs(disk, "papers", CHAIN | common, (11.0, 11.1), dataset="cifar10")
    runs(disk, "other", CHAIN | {"step_size": 0.5}, (99.0, 99.1), dataset="cifar10")
    study = read_study(disk.study)
    found = {a.cell: a.verdict for a in study_answers(study) if a.claim.id == "table1-fid"}
    assert sorted(found.values()) == [FAILS, HOLDS, HOLDS] and "" not in found
    rows, _ = table(disk, "the paper's claims")
    text = next(claim.text for claim in paper.CLAIMS if claim.id == "table1-fid")
    assert sum(name.startswith(text) for name in rows) == 3
    assert sum("the paper's setting" in name for name in rows if name.startswith(text)) == 1


def test_lpc_must_be_below_every_vae_that_can_be_compared(disk):
    lpc_and_vae(disk, quality(10.0), quality(12.0))
    keys = VAE | {"num_epochs": 50, "learning_rate": 0.003}
    runs(disk, "tuned", keys, (5.0, 5.1), dataset="cifar10", num_epochs=50.0)
    assert said(disk, "table1-fid").verdict == FAILS


@pytest.mark.parametrize(
    ("reverse", "jeffreys", "none", "warm", "best"),
    [
        (5.0, 4.0, 6.0, HOLDS, HOLDS),
        (7.0, 4.0, 6.0, FAILS, HOLDS),
        (4.0, 5.0, 6.0, HOLDS, FAILS),
        (4.0, 4.05, 6.0, HOLDS, CHANCE),
    ],
)
def test_figure_2_compares_objectives(disk, reverse, jeffreys, none, warm, best):
    for objective, fd in (("reverse", reverse), ("jeffreys", jeffreys), ("prior", none), ("forward", 50.0)):
        runs(disk, objective, CHAIN | {"objective": objective}, (fd, fd + 0.1))
    assert said(disk, "fig2-warm-start").verdict == warm
    assert said(disk, "fig2-jeffreys").verdict == best


@pytest.mark.parametrize(("once", "verdict"), [((50.0, 50.1), HOLDS), ((3.0, 3.1), FAILS), (None, UNMEASURED)])
def test_forward_kl_after_one_epoch_is_compared_as_in_the_paper(disk, once, verdict):
    for objective, fd in (("reverse", 5.0), ("jeffreys", 4.0)):
        runs(disk, objective, CHAIN | {"objective": objective}, (fd, fd + 0.1))
    runs(disk, "wild", CHAIN | {"objective": "forward", "num_epochs": 9}, (1.0, 1.1), num_epochs=9.0)
    if once:
        runs(disk, "once", CHAIN | {"objective": "forward", "num_epochs": 1}, once, num_epochs=1.0)
    assert said(disk, "fig2-jeffreys").verdict == verdict


@pytest.mark.parametrize("changed", ["reverse", "prior"])
def test_objectives_of_unequal_chains_are_not_compared(disk, changed):
    for objective, fd in (("reverse", 5.0), ("jeffreys", 4.0), ("prior", 6.0)):
        keys = CHAIN | {"objective": objective} | ({"num_steps": 5} if objective == changed else {})
        runs(disk, objective, keys, (fd, fd + 0.1))
    found = said(disk, "fig2-warm-start")
    assert found.verdict == UNMEASURED and "T 300 against 5" in found.numbers


def test_what_is_missing_is_named(disk):
    disk.run("a", CHAIN, metrics=quality(3.0))
    assert "LPC reverse" in said(disk, "fig2-warm-start").numbers
    assert "LPC prior" in said(disk, "fig2-warm-start").numbers
    assert "LPC forward after one epoch" in said(disk, "fig2-jeffreys").numbers


@pytest.mark.parametrize(
    ("places", "verdict"),
    [
        ((1.2, 3.0), HOLDS),
        ((1.2, 0.4), FAILS),
        ((1.2, "finished"), FAILS),
        ((1.2, None), UNMEASURED),  # nobody recorded where
        ((1.2, "failed"), UNMEASURED),
        ((1.2, "cut"), UNMEASURED),  # by max_updates, before the first epoch's end
        ((1.2,), CHANCE),
        ((), UNMEASURED),
    ],
)
def test_forward_kl_diverges_after_its_first_epoch_in_every_seed_or_not(disk, places, verdict):
    keys = CHAIN | {"objective": "forward"}
    disk.run("once", keys | {"num_epochs": 1}, metrics=quality(3.0), num_epochs=1.0)
    for seed, epoch in enumerate(places):
        result = {"status": "diverged", "diverged_at": None}
        if isinstance(epoch, float):
            result["diverged_at"] = {"update": int(100 * epoch), "epoch": epoch}
        elif epoch is not None:
            result = {"status": "failed" if epoch == "failed" else "finished"}
            result |= {"num_epochs": 0.9} if epoch == "cut" else {}
        disk.run(f"f{seed}", keys, seed, metrics=quality(9.0), **result)
    found = said(disk, "fig2-forward")
    assert found.verdict == verdict
    assert "f0: diverged at epoch 1.2, update 120" in found.numbers or not places


def test_where_runs_diverged_is_a_table(disk):
    place = {"update": 1041, "epoch": 2.5}
    result = {"status": "diverged", "diverged_at": place, "state_measured": "last finite state"}
    disk.run("wild", CHAIN | {"objective": "forward"}, 3, metrics=quality(9.0), **result)
    disk.run("tame", CHAIN, 3, metrics=quality(9.0))
    rows, _ = table(disk, "where runs diverged")
    assert list(rows) == ["LPC forward"]
    row = rows["LPC forward"]
    assert (row["seed"], row["epoch"], row["update"], row["run"]) == ("3", "2.5", "1,041", "wild")
    assert row["state measured"] == "last finite state"


# Figure 3 -------------------------------------------------------------------------------------------------


def climb(num_steps, phase, chains=3, gain=10.0):
    """log p along chains that gain 10 nats in each of the first `phase` steps and nothing after them."""
    gains = np.where(np.arange(num_steps - 1) < phase, gain, 0.0)
    return np.tile(np.concatenate([[0.0], np.cumsum(gains)])[:, None], (1, chains)) - 500


def test_a_chain_climbs_until_the_first_step_of_small_median_change():
    assert climbing_steps(climb(20, 7)) == 7
    assert climbing_steps(climb(20, 0)) == 0
    assert climbing_steps(climb(20, 19)) == 19  # to its end
    mixed = np.concatenate([climb(20, 7, 2), climb(20, 3, 1)], axis=1)
    assert climbing_steps(mixed) == 7
    dip = climb(20, 7)
    dip[8:] -= 5.0  # one step back, then level
    assert climbing_steps(dip) == 7
    for value in (np.nan, -np.inf):
        exploding = climb(20, 2)
        exploding[5:] = value
        assert climbing_steps(exploding) is None
    assert climbing_steps(np.concatenate([climb(10, 4), climb(10, 9, gain=-50.0)])) is None
    assert climbing_steps(climb(20, 19, gain=-50.0)) is None  # a chain that loses 50 nats a step has not settled


@pytest.mark.parametrize(
    ("forward", "gain", "verdict"),
    [
        ((9, 9), 10.0, HOLDS),
        ((9, 3), 10.0, FAILS),
        ((9, 4), 10.0, CHANCE),
        ((9, 9), -50.0, FAILS),
        ((19, 19), -50.0, UNMEASURED),
    ],
)
def test_figure_3_compares_first_phases_at_every_shared_batch(disk, forward, gain, verdict):
    for objective, phases in (("forward", forward), ("reverse", (4, 4)), ("jeffreys", (5, 4))):
        own = gain if objective == "forward" else 10.0
        traces = {u: (climb(20, p, gain=own), np.ones((20, 3))) for u, p in zip((300, 600), phases)}
        status = {"status": "diverged"} if objective == "forward" else {}  # after these batches
        for seed in SEEDS:
            disk.run(f"{objective}{seed}", CHAIN | {"objective": objective}, seed, metrics=quality(3.0), traces=traces,
                     **status)  # fmt: skip
    found = said(disk, "fig3-forward")
    assert found.verdict == verdict
    if verdict != UNMEASURED:
        assert "batch 300: LPC reverse" in found.numbers and "4.00 ± 0.00 (n = 2)" in found.numbers


def test_figure_3_needs_equal_chains_and_two_seeds(disk):
    for objective, steps in (("forward", 20), ("reverse", 20), ("jeffreys", 10)):
        traces = {300: (climb(steps, 9 if objective == "forward" else 4), np.ones((steps, 3)))}
        keys = CHAIN | {"objective": objective, "num_steps": steps}
        disk.run(objective, keys, metrics=quality(3.0), traces=traces)
    assert "T 20 against 10" in said(disk, "fig3-forward").numbers
    assert said(disk, "fig3-forward").verdict == UNMEASURED
    disk.run("equal", CHAIN | {"objective": "jeffreys", "num_steps": 20}, metrics=quality(3.0), traces=traces)
    assert said(disk, "fig3-forward").verdict == CHANCE


# Figure 4 -------------------------------------------------------------------------------------------------


def sweep(disk, cells, seeds=SEEDS, **changed):
    """cells: Fréchet distance by (β or None, γ), None: diverged, or a state; changed: keys of β = 0.9's cells."""
    for (beta, step_size), fd in cells.items():
        keys = CHAIN | {"step_size": step_size}
        keys |= {"preconditioning": "none"} if beta is None else {"beta": beta}
        keys |= changed if beta == 0.9 else {}
        for seed in seeds:
            name = f"b{beta}g{step_size}s{seed}"
            if fd == "unfinished":
                disk.run(name, keys, seed)
                continue
            number = fd if isinstance(fd, float) else 500.0
            status = "diverged" if fd is None else "failed" if fd == "failed" else "finished"
            disk.run(name, keys, seed, metrics=quality(number * (1 + 0.01 * seed)), status=status)


@pytest.mark.parametrize(
    ("large", "verdict"),
    [
        ((30.0, 15.0, 11.0), HOLDS),
        ((None, 15.0, 11.0), HOLDS),
        ((11.0, 15.0, 30.0), FAILS),
        ((15.0, 30.0, 11.0), FAILS),  # between neighbours too
        ((11.0, 11.0, None), FAILS),
        ((12.0, 12.0, 12.0), CHANCE),  # nothing falls
        ((30.0, "failed", 11.0), UNMEASURED),
        ((30.0, "unfinished", 11.0), UNMEASURED),
    ],
)
def test_robustness_is_harm_at_the_largest_step_size_by_beta(disk, large, verdict):
    betas = (0.25, 0.9, 0.99)
    cells = {(beta, 0.01): 10.0 for beta in betas} | {(beta, 0.5): fd for beta, fd in zip(betas, large)}
    sweep(disk, cells)
    found = said(disk, "fig4-robust")
    assert found.verdict == verdict
    assert (f"γ=0.5, β=0.9: {large[1]}" if verdict == UNMEASURED else "γ = 0.5") in found.numbers
    assert ("2 of 2 diverged" in found.numbers) == (None in large)


def test_harm_of_seeds_that_vary_more_than_betas_is_chance(disk):
    values = {(0.25, 0.01): (1.0, 1.0), (0.99, 0.01): (1.0, 1.0), (0.25, 0.5): (2.0, 2.4), (0.99, 0.5): (1.9, 2.3)}
    for (beta, step_size), own in values.items():
        runs(disk, f"b{beta}g{step_size}", CHAIN | {"beta": beta, "step_size": step_size}, own)
    found = said(disk, "fig4-robust")
    assert found.verdict == CHANCE and "β = 0.99 2.10 ± 0.28 (n = 2), β = 0.25 2.20 ± 0.28" in found.numbers


def test_a_largest_step_that_harms_nobody_says_nothing_of_robustness(disk):
    sweep(disk, {(beta, size): 1.0 / size for beta in (0.25, 0.99) for size in (0.01, 0.1)})
    found = said(disk, "fig4-robust")
    assert found.verdict == UNMEASURED and "γ = 0.1 has the lowest" in found.numbers


@pytest.mark.parametrize("fault", ["own step sizes", "unequal training", "one seed"])
def test_a_sweep_of_unequal_lines_answers_nothing(disk, fault):
    cells = {(b, g): fd for b, fd in ((0.25, 30.0), (0.9, 15.0), (0.99, 11.0)) for g, fd in ((0.01, 10.0), (0.5, fd))}
    if fault == "own step sizes":
        cells[0.9, 0.3] = cells.pop((0.9, 0.5))
    sweep(disk, cells, (0,) if fault == "one seed" else SEEDS)
    if fault == "unequal training":
        for seed in SEEDS:
            file = disk.outputs / "runs" / f"b0.9g0.5s{seed}" / "result.json"
            file.write_text(file.read_text().replace('"num_epochs": 15.0', '"num_epochs": 2.0'))
    found = said(disk, "fig4-robust")
    words = {"own step sizes": "β = 0.9 at γ = 0.5", "unequal training": "epochs trained 15 against 2"}
    assert found.verdict == (CHANCE if fault == "one seed" else UNMEASURED)
    assert words.get(fault, "one seed") in found.numbers


@pytest.mark.parametrize(
    ("plain", "other", "verdict"),
    [
        (9.0, 12.0, HOLDS),
        (9.95, 12.0, CHANCE),
        (11.0, 12.0, FAILS),
        (None, 12.0, FAILS),
        (9.0, None, HOLDS),  # the others' divergence is worse than any number
        (9.0, "failed", UNMEASURED),
        (9.0, "unfinished", UNMEASURED),
        (9.0, "missing", UNMEASURED),
        ("failed", 12.0, UNMEASURED),
    ],
)
def test_at_a_small_step_no_preconditioning_is_as_good_as_any(disk, plain, other, verdict):
    cells = {(None, 0.001): plain, (0.25, 0.001): 10.0, (0.99, 0.001): other, (None, 0.1): 5.0, (0.25, 0.1): 5.0}
    cells |= {(0.99, 0.1): 5.0}
    sweep(disk, {cell: fd for cell, fd in cells.items() if fd != "missing"})
    found = said(disk, "fig4-small-step")
    assert found.verdict == verdict
    assert other != "missing" or "β = 0.99 at γ = 0.001" in found.numbers


def test_a_sweep_with_a_lost_seed_says_so(disk):
    sweep(disk, {(None, 0.001): 9.0, (0.25, 0.001): 10.0, (None, 0.1): 5.0, (0.25, 0.1): 5.0}, seeds=(0, 1, 2))
    for name in ("bNoneg0.001s1", "bNoneg0.001s2"):
        file = disk.outputs / "runs" / name / "result.json"
        file.write_text(file.read_text().replace("finished", "diverged"))
    found = said(disk, "fig4-small-step")
    assert found.verdict == CHANCE and "2 of 3 diverged" in found.numbers


def test_a_study_without_a_sweep_says_what_it_lacks(disk):
    disk.run("a", CHAIN, metrics=quality(3.0))
    assert "sweep" in said(disk, "fig4-robust").numbers
    assert "0.001" in said(disk, "fig4-small-step").numbers


# Figure 5 -------------------------------------------------------------------------------------------------


def images(amplitude, number=10, shape=(3, 12, 10)):
    """Columns alternate between 100 and 100 + amplitude."""
    picture = np.full((number, *shape), 100, dtype=np.uint8)
    picture[..., ::2] += amplitude
    return torch.from_numpy(picture)


@pytest.mark.parametrize(("number", "shape"), [(10, (3, 12, 10)), (9, (1, 28, 28)), (3, (3, 32, 32)), (64, (1, 8, 8))])
def test_grids_are_cut_back_into_their_images(tmp_path, number, shape):
    import matplotlib.image

    source = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 255, (number, *shape), generator=source, dtype=torch.uint8)
    save_grid(drawn, tmp_path / "grid.png")
    found = cut(matplotlib.image.imread(tmp_path / "grid.png"), *shape[1:])
    expected = drawn.permute(0, 2, 3, 1).numpy() / 255
    np.testing.assert_allclose(found[..., : shape[0]], expected, atol=1e-6)
    assert cut(np.zeros((50, 47, 3)), 28, 28) is None


def test_sharpness_is_gradient_energy_over_that_of_the_data(disk):
    # |∂x/∂j| = amplitude between all columns, 0 between rows: energy amplitude², here (20 / 40)² = 1 / 4
    assert gradient_energy(images(20).permute(0, 2, 3, 1).numpy().astype(float)) == 400
    folder = disk.run("a", CHAIN, metrics=quality(3.0), shape=(3, 12, 10))
    save_grid(images(20), folder / "samples" / "final.png")
    save_grid(images(40), folder / "samples" / "data.png")
    (run,) = read_study(disk.study).runs
    assert sharpness(run) == pytest.approx(0.25)
    (folder / "samples" / "data.png").write_bytes(b"no picture")
    assert sharpness(run) is None


@pytest.mark.parametrize(
    ("lpc", "vae", "verdict"), [((35, 36), (20, 21), HOLDS), ((8, 9), (30, 31), FAILS), ((150, 155), (20, 21), FAILS)]
)
def test_sharper_is_nearer_to_the_datas_energy(disk, lpc, vae, verdict):
    """The data's amplitude is 40; samples of 150 have 14 times its energy: noise, not detail."""
    sharp_runs(disk, {"lpc": (CHAIN, lpc), "vae": (VAE | {"num_epochs": 50}, vae)})
    found = said(disk, "fig5-sharp")
    assert found.verdict == verdict
    energies = [sum((amplitude / 40) ** 2 for amplitude in own) / 2 for own in (lpc, vae)]
    words = [f"{energy:.2f}" if energy >= 1 else f"{energy:.3f}" for energy in energies]
    assert f"gradient energy × {words[0]} of LPC" in found.numbers and f"× {words[1]} of VAE" in found.numbers


def sharp_runs(disk, methods):
    for name, (keys, amplitudes) in methods.items():
        for seed, amplitude in enumerate(amplitudes):
            epochs = float(keys.get("num_epochs", 15))
            folder = disk.run(f"{name}{seed}", keys, seed, metrics=quality(3.0), shape=(3, 12, 10), num_epochs=epochs)
            save_grid(images(amplitude), folder / "samples" / "final.png")
            save_grid(images(40), folder / "samples" / "data.png")


def test_samples_must_be_sharper_than_those_of_every_vae_of_the_papers_epochs(disk):
    methods = {"lpc": (CHAIN, (30, 31)), "vae": (VAE | {"num_epochs": 50}, (20, 21)), "equal": (VAE, (39, 40))}
    sharp_runs(disk, methods | {"long": (VAE | {"num_epochs": 90}, (40, 40))})
    found = said(disk, "fig5-sharp")
    assert found.verdict == FAILS and "VAE, 15 epochs" in found.numbers and "90 epochs" not in found.numbers
    (disk.outputs / "runs" / "lpc1" / "samples" / "data.png").unlink()
    assert said(disk, "fig5-sharp").verdict == UNMEASURED


def curves(disk, lpc, vae, seeds=SEEDS, **changed):
    """Fréchet distances at epochs 2, 4, 6 and at the end: 15 of LPC, 50 of the VAE."""
    for name, keys, values, end in (("lpc", CHAIN, lpc, 15), ("vae", VAE | {"num_epochs": 50}, vae, 50)):
        for seed in seeds:
            rows = [measured(update, update, fd) for update, fd in zip((20, 40, 60), values)]
            result = {"num_epochs": float(end), "num_updates": 10 * end} | changed
            disk.run(f"{name}{seed}", keys, seed, rows=rows, metrics={FD: values[-1]}, **result)


@pytest.mark.parametrize(
    ("lpc", "verdict", "words"),
    [
        ((30, 10.5, 10.2, 10.0), HOLDS, "4.00 ± 0.00 (n = 2), VAE"),
        ((30, 20, 10.2, 9.0), FAILS, "15.00 ± 0.00 (n = 2), VAE"),
        ((30, 10, 14, 14.5), HOLDS, "is best after epoch 4.0 and ends 45% above that"),
    ],
)
def test_figure_5b_counts_epochs_until_near_the_best_and_says_how_much_worse_the_end_is(disk, lpc, verdict, words):
    curves(disk, lpc, (30, 25, 20.5, 20.0))
    found = said(disk, "fig5-fast")
    assert found.verdict == verdict and words in found.numbers
    assert "6.00 ± 0.00 (n = 2)" in found.numbers  # the VAE: 20.5 is within 10 % of 20


def test_a_run_that_only_gets_worse_was_best_at_its_first_measurement(disk):
    curves(disk, (10, 20, 30, 40.0), (30, 25, 20.5, 20.0))
    assert "is best after epoch 2.0 and ends 300% above that" in said(disk, "fig5-fast").numbers


@pytest.mark.parametrize("fault", ["one seed", "no epochs", "nan", "two points", "other spacing"])
def test_figure_5b_needs_curves_that_can_be_compared(disk, fault):
    lpc = (30, 10.5, 10.2, math.nan if fault == "nan" else 10.0)
    curves(disk, lpc, (30, 25, 20.5, 20.0), (0,) if fault == "one seed" else SEEDS)
    for file in (disk.outputs / "runs").glob("lpc*/metrics.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        if fault == "no epochs":
            rows = [{key: value for key, value in row.items() if key != "epoch"} for row in rows]
        rows = rows[:1] if fault == "two points" else rows[::2] if fault == "other spacing" else rows
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = {"one seed": "one seed", "nan": "2 of 2 not finite", "other spacing": "every 4 epochs against every 2"}
    found = said(disk, "fig5-fast")
    assert found.verdict == {"one seed": CHANCE, "nan": FAILS}.get(fault, UNMEASURED)
    assert words.get(fault, "fewer than three measurements") in found.numbers


def test_runs_without_a_number_of_epochs_are_reported_all_the_same(disk):
    for name, keys in (("lpc", CHAIN), ("vae", VAE)):
        rows = [{k: v for k, v in measured(u, u, 9.0).items() if k != "epoch"} for u in (20, 40, 60)]
        disk.run(name, keys | {"num_epochs": None}, rows=rows, metrics=quality(9.0), num_epochs=None)
    assert said(disk, "fig5-fast").verdict == UNMEASURED
    assert table(disk, "runs")


# Table 4 --------------------------------------------------------------------------------------------------


def times(disk, batch, device="GPU A", num_steps=300, vae_device="GPU A", seeds=SEEDS):
    """VAE: 4 ms a batch, 50 epochs of 100 batches; chains: ms by objective, 15 epochs of 100 batches."""
    for seed in seeds:
        cost = {"num_updates": 5000, "train_seconds": 20.0 * (1 + 0.01 * seed), "num_epochs": 50.0}
        keys = VAE | {"num_epochs": 50}
        disk.run(f"vae{seed}", keys, seed, dataset="cifar10", metrics=quality(9.0), device=vae_device, **cost)
        for objective, ms in batch.items():
            cost = {"num_updates": 1500, "train_seconds": 1.5 * ms, "num_epochs": 15.0}
            keys = LPC | {"objective": objective, "num_steps": num_steps}
            name = f"{objective}{seed}"
            disk.run(name, keys, seed, dataset="cifar10", metrics=quality(9.0), device=device, **cost)


def test_table_4_has_ratios_to_the_longest_vae_beside_the_papers(disk):
    times(disk, {"reverse": 96.0, "jeffreys": 120.0}, seeds=(0,))
    short = {"num_updates": 1500, "train_seconds": 12.0, "num_epochs": 15.0}
    disk.run("short", VAE, dataset="cifar10", metrics=quality(9.0), device="GPU A", **short)
    rows, notes = table(disk, "Table 4")
    # 96 / 4 = 24; 1.5 × 96 / 20 = 7.2; 120 / 4 = 30; 1.5 × 120 / 20 = 9
    found = {name: (row["× VAE's batch"], row["× VAE end to end"], row["paper ×"]) for name, row in rows.items()}
    reverse, jeffreys, vae = "LPC reverse, 15 epochs", "LPC jeffreys, 15 epochs", "VAE, 50 epochs"
    assert found == {
        vae: ("1.00", "1.00", "–"),
        "VAE, 15 epochs": ("2.00", "0.600", "–"),
        reverse: ("24.00", "7.20", "24"),
        jeffreys: ("30.00", "9.00", "36"),
    }
    assert rows[jeffreys]["paper × end to end"] == "11" and rows[vae]["ms per batch"] == "4.00 ± –"
    assert "GPU A" in notes and paper.TABLE_4_HARDWARE in notes


@pytest.mark.parametrize(
    ("batch", "per_batch", "whole"),
    [
        ({"reverse": 96.0, "jeffreys": 144.0}, HOLDS, HOLDS),
        ({"reverse": 48.0, "jeffreys": 60.0}, FAILS, FAILS),
        ({"reverse": 96.0}, UNMEASURED, UNMEASURED),
    ],
)
def test_times_repeat_the_papers_within_a_quarter(disk, batch, per_batch, whole):
    times(disk, batch)
    assert (said(disk, "table4-batch").verdict, said(disk, "table4-end").verdict) == (per_batch, whole)


def test_a_ratio_has_the_standard_error_of_its_two_means():
    ours, theirs = Sample("a", {0: 22.0, 1: 26.0}), Sample("b", {0: 1.0, 1: 1.0})
    assert ratio(ours, theirs, 24).verdict == HOLDS  # 24 ± 2, the bounds 18 and 30
    assert ratio(ours, theirs, 20).verdict == CHANCE  # the upper one 25
    assert "24.00" in ratio(ours, theirs, 24).text and "standard error 2.00" in ratio(ours, theirs, 24).text
    assert ratio(Sample("a", {0: 24.0}), theirs, 24).verdict == CHANCE
    assert ratio(Sample("a", {0: 24.0, 1: 24.0}, {"diverged": 1}), theirs, 24).verdict == UNMEASURED


@pytest.mark.parametrize(
    "change",
    [{"device": "GPU B"}, {"num_steps": 10}, {"device": None, "vae_device": None}, {"device": None}, {"seeds": (0,)}],
)
def test_times_of_other_or_unknown_devices_of_shorter_chains_or_one_seed_answer_nothing(disk, change):
    times(disk, {"reverse": 96.0, "jeffreys": 144.0}, **change)
    found = said(disk, "table4-batch")
    assert found.verdict == (CHANCE if "seeds" in change else UNMEASURED)
    words = {"device": "device", "num_steps": "T = 10", "seeds": "one seed"}
    assert words[next(iter(change))] in found.numbers
    ratios = {row["× VAE's batch"] for name, row in table(disk, "Table 4")[0].items() if "VAE" not in name}
    assert ("–" in ratios) == ("device" in change)


def test_a_run_that_went_on_elsewhere_has_no_time_of_one_device(disk):
    times(disk, {"reverse": 96.0, "jeffreys": 144.0})
    with open(disk.outputs / "runs" / "vae0" / "sessions.jsonl", "a") as file:
        file.write('{"device": "GPU B"}\n')
    found = said(disk, "table4-batch")
    assert found.verdict == UNMEASURED and "GPU A, GPU B" in found.numbers


# Tuning ---------------------------------------------------------------------------------------------------


def test_the_lowest_seed_chooses_and_the_others_are_reported(disk):
    cells = {(0.1, 1): 5.0, (0.1, 2): 9.0, (0.1, 3): 11.0, (0.01, 1): 6.0, (0.01, 2): 1.0, (0.5, 1): 2.0}
    for (step_size, seed), fd in cells.items():
        status = "diverged" if step_size == 0.5 else "finished"
        keys = CHAIN | {"step_size": step_size}
        disk.run(f"g{step_size}s{seed}", keys, seed, dataset="cifar10", metrics={FD: fd}, status=status)
    rows, notes = table(disk, "tuning, LPC jeffreys")
    assert {name: (row[f"{FD} of seed 1"], row["choice"], row["other seeds"]) for name, row in rows.items()} == {
        "LPC jeffreys, γ=0.01": ("6.00", "", "–"),
        "LPC jeffreys, γ=0.1": ("5.00", "chosen", f"10.00 ± {math.sqrt(2):.2f} (n=2)"),
        "LPC jeffreys, γ=0.5": ("diverged", "", "–"),
    }
    assert [name for name, row in rows.items() if row["the paper"]] == ["LPC jeffreys, γ=0.1"]
    assert "γ = 0.1, β = 0.25" in notes


def test_vaes_that_differ_in_more_than_the_learning_rate_are_not_tuned_against_each_other(disk):
    for rate, epochs in ((1e-3, 15), (1e-3, 50), (2e-3, 50)):
        keys = VAE | {"learning_rate": rate, "num_epochs": epochs}
        disk.run(f"v{rate}-{epochs}", keys, dataset="celeba64", metrics={FD: 1e3 * rate + epochs})
    rows, notes = table(disk, "tuning, VAE")
    assert list(rows) == ["VAE, α=0.001, 50 epochs", "VAE, α=0.002, 50 epochs"]
    assert "learning rate 0.0008" in notes and not any(row["the paper"] for row in rows.values())


# Numbers --------------------------------------------------------------------------------------------------


def test_a_study_of_sequences_has_its_numbers_and_no_claims_about_images(disk):
    disk.run("a", CHAIN, dataset="lorenz", metrics={"co_bps": 0.25, "rate_r2": 0.8}, shape=(50, 29))
    study = read_study(disk.study)
    assert study_answers(study) == []
    rows, _ = table(disk, "likelihood")
    assert (rows["LPC jeffreys"]["co_bps"], rows["LPC jeffreys"]["rate_r2"]) == ("0.250 ± –", "0.800 ± –")
    assert not [found for found in study_tables(study) if "claims" in found.title]
