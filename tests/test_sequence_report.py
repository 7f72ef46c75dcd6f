"""Paired differences and gaps of a study, from runs whose numbers are written down here."""

from __future__ import annotations

import json
import math

import pytest

from lpc_runner.study.estimates import PAIRED, Difference, paired_difference, paired_table, sequence_pictures
from lpc_runner.study.study import read_study

OBJECTIVES = {"VAE": ("none", "reverse"), "VEM": ("none", "variational_em"), "LPC jeffreys": ("langevin", "jeffreys")}


def write_run(folder, method, seed, status="finished", **numbers):
    sampler, objective = OBJECTIVES[method]
    choices = {"dataset": "lorenz", "model": "lfads", "sampler": sampler, "objective": objective}
    path = folder / f"lorenz-{sampler}-{objective}-s{seed}"
    path.mkdir(parents=True)
    (path / "run.json").write_text(json.dumps({"choices": choices, "keys": {"seed": seed}}))
    result = {"status": status, "metrics": numbers, "measurement": {"kind": "sequences"}, "num_updates": 10}
    (path / "result.json").write_text(json.dumps(result))


@pytest.fixture
def study(tmp_path):
    folder = tmp_path / "gaps"
    for seed, shift in ((0, 0.0), (1, 10.0), (2, -7.0)):  # seeds differ far more than methods
        write_run(folder, "VAE", seed, free_iwae=-500 + shift, approximation_gap=2.0, amortisation_gap=3.0)
        write_run(folder, "LPC jeffreys", seed, free_iwae=-499 + shift + 0.3 * (seed - 1), approximation_gap=2.5,
                  amortisation_gap=1.0)  # fmt: skip
    write_run(folder, "VEM", 0, free_iwae=-502, approximation_gap=1.5)
    write_run(folder, "VEM", 5, free_iwae=-100, approximation_gap=1.5)  # no VAE of this seed
    return read_study(folder)


def groups(study):
    return {group.label: group for group in study.groups}


def test_the_noise_that_a_pair_shares_cancels(study):
    found = paired_difference(groups(study)["LPC jeffreys"], groups(study)["VAE"], "free_iwae")
    assert list(found.by_seed.values()) == pytest.approx([0.7, 1.0, 1.3])
    assert found.mean == pytest.approx(1.0)
    assert found.standard_error == pytest.approx(0.3 / math.sqrt(3))


def test_seeds_without_a_partner_are_left_out(study):
    found = paired_difference(groups(study)["VEM"], groups(study)["VAE"], "free_iwae")
    assert found.by_seed == {0: -2.0} and found.standard_error is None
    assert paired_difference(groups(study)["VEM"], groups(study)["VAE"], "amortisation_gap") is None


def test_diverged_runs_make_no_pair(tmp_path):
    write_run(tmp_path / "s", "VAE", 0, free_iwae=-500.0)
    write_run(tmp_path / "s", "LPC jeffreys", 0, status="diverged", free_iwae=-400.0)
    study = read_study(tmp_path / "s")
    assert paired_table("lorenz", study.groups) is None


def test_the_table_compares_every_method_with_the_vae(study):
    table = paired_table("lorenz", study.of("lorenz"))
    assert table.title.endswith("to VAE")
    names = [name for name in PAIRED if name in ("free_iwae", "amortisation_gap", "approximation_gap")]
    assert table.columns == ["method", "pairs", *names]
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["LPC jeffreys"] == ["3", "+1.00 ± 0.17", "-2.00 ± 0.00", "+0.50 ± 0.00"]
    assert rows["VEM"] == ["1", "-2.00 ± –", "–", "-0.50 ± –"]


def test_the_table_says_of_each_number_which_way_is_better(study):
    notes = " ".join(paired_table("lorenz", study.of("lorenz")).notes)
    assert "free_iwae: higher is better" in notes
    assert "amortisation_gap, approximation_gap: smaller" in notes and "Higher is better" not in notes


def test_one_method_has_nothing_to_be_compared_with(tmp_path):
    write_run(tmp_path / "s", "VAE", 0, free_iwae=-500.0)
    assert paired_table("lorenz", read_study(tmp_path / "s").groups) is None


def test_text_carries_the_sign_and_says_what_is_not_finite():
    assert Difference({0: 0.5, 1: 0.5}).text() == "+0.50 ± 0.00"
    assert Difference({0: math.nan}).text() == "not finite"


def test_figures(study):
    figures = {name: figure for name, _, figure in sequence_pictures("lorenz", study.of("lorenz"))}
    assert set(figures) == {"lorenz-gaps.png", "lorenz-paired.png"}
    bars = [patch.get_width() for patch in figures["lorenz-gaps.png"].axes[0].patches]
    assert sorted(bars) == pytest.approx(sorted([2.0, 1.5, 2.5, 3.0, 0.0, 1.0]))
    (labels,) = ([text.get_text() for text in axis.get_yticklabels()] for axis in figures["lorenz-paired.png"].axes)
    assert labels == ["VEM", "LPC jeffreys"]


def test_where_log_p_is_exact_the_picture_shows_it_and_not_the_bound(tmp_path):
    """A bound that is looser for one method would turn their order round."""
    for seed in (0, 1):
        write_run(tmp_path / "s", "VAE", seed, free_iwae=-90.0, log_evidence=-80.0, approximation_gap=2.0)
        write_run(tmp_path / "s", "LPC jeffreys", seed, free_iwae=-95.0, log_evidence=-75.0, approximation_gap=9.0)
    groups = read_study(tmp_path / "s").groups
    figures = {name: figure for name, _, figure in sequence_pictures("lorenz", groups)}
    axis = figures["lorenz-paired.png"].axes[0]
    assert axis.get_xlabel().startswith("exact log p(x)") and "+5.00 ± 0.00" in {t.get_text() for t in axis.texts}
    assert paired_table("lorenz", groups).columns[2:4] == ["log_evidence", "free_iwae"]


def test_images_have_no_such_figures(tmp_path):
    write_run(tmp_path / "s", "VAE", 0, elbo=-5.0)
    assert not list(sequence_pictures("lorenz", read_study(tmp_path / "s").groups))
