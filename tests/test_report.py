"""The report: what it averages, what it refuses to mix, what it says of runs that went wrong."""

from __future__ import annotations

import csv
import io
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from studies import LPC, PAPER_LPC, VAE, Builder, measured

from lpc_runner.base.errors import UserError
from lpc_runner.paper import numbers as paper
from lpc_runner.paper.quality_figures import grid_pictures
from lpc_runner.report import main, study_pictures, study_tables
from lpc_runner.study.budgets import BUDGETS, budget_table, curve_settings, mean_curve
from lpc_runner.study.study import method_of, read_study
from lpc_runner.study.style import MAX_LINES
from lpc_runner.study.tables import show, spread


@pytest.fixture
def disk(tmp_path):
    return Builder(tmp_path / "outputs")


def table(study, title):
    """A table as one dict per row, by the label of the row."""
    found = next(table for table in study_tables(study) if title in table.title)
    return {row[0]: dict(zip(found.columns, row)) for row in found.rows}, "\n".join(found.notes)


def figures_of(study):
    return {name: figure for name, _, figure in study_pictures(study, [])}


def labels(study):
    return [group.label for group in study.groups]


# Grouping -------------------------------------------------------------------------------------------------


def test_seeds_are_averaged_and_other_settings_are_not(disk):
    for seed, fd in enumerate((2.0, 4.0, 9.0)):
        disk.run(f"a{seed}", LPC, seed, metrics={"fd_random_conv": fd})
    disk.run("b0", LPC | {"beta": 0.9}, metrics={"fd_random_conv": 1.5})
    rows, _ = table(read_study(disk.study), "sample quality")
    # mean 5; deviations -3, -1, 4: variance 26 / 2 = 13
    assert rows["LPC jeffreys, β=0.25"]["fd_random_conv"] == f"5.00 ± {math.sqrt(13):.2f}" == "5.00 ± 3.61"
    assert rows["LPC jeffreys, β=0.25"]["seeds"] == "3"
    assert rows["LPC jeffreys, β=0.9"]["fd_random_conv"] == "1.50 ± –"


def test_settings_that_do_not_apply_separate_nothing(disk):
    disk.run("a", VAE | {"num_steps": 0}, 0, metrics={"elbo": 1.0})
    disk.run("b", VAE | {"num_steps": 30, "preconditioning": "adam", "beta": 0.9}, 1, metrics={"elbo": 2.0})
    disk.run("c", LPC | {"preconditioning": "none", "beta": 0.5}, 0, metrics={"elbo": 2.0})
    disk.run("d", LPC | {"preconditioning": "none", "beta": 0.7}, 1, metrics={"elbo": 2.0})
    assert labels(read_study(disk.study)) == ["VAE", "LPC jeffreys"]


def test_a_difference_in_the_configuration_alone_separates_groups(disk):
    text = "seed: {0}\ntracker: {{mode: x{0}}}\nengine: e{0}\ntrainer: {{num_prior_batches: {1}, log_every: {0}}}\n"
    for seed, batches in ((0, 50), (1, 50), (0, 0)):
        disk.run(f"r{seed}{batches}", LPC, seed, config=text.format(seed, batches))
    study = read_study(disk.study)
    assert labels(study) == ["LPC jeffreys, num_prior_batches=0", "LPC jeffreys, num_prior_batches=50"]
    assert [[run.seed for run in group.runs] for group in study.groups] == [[0], [0, 1]]


def test_a_seed_counts_once_and_the_finished_repetition_wins(disk):
    disk.run("a", VAE, 0, rows=[measured(10, 1.0, 50.0)])
    disk.run("a-rerun1", VAE, 0, metrics={"fd_random_conv": 3.0})
    disk.run("a-rerun2", VAE, 0, metrics={"fd_random_conv": 7.0})
    study = read_study(disk.study)
    assert table(study, "sample quality")[0]["VAE"]["fd_random_conv"] == "3.00 ± –"
    assert [warning.split(":")[0] for warning in study.warnings] == ["a-rerun2", "a"]


def test_what_all_share_is_said_once_and_labels_hold_the_rest(disk):
    disk.run("a", VAE | {"batch_size": 64}, metrics={"elbo": 1.0})
    disk.run("b", LPC | {"batch_size": 64}, metrics={"elbo": 1.0})
    disk.run("c", LPC | {"batch_size": 64, "step_size": 0.5}, metrics={"elbo": 1.0})
    rows, notes = table(read_study(disk.study), "runs")
    assert list(rows) == ["VAE", "LPC jeffreys, γ=0.1", "LPC jeffreys, γ=0.5"]
    assert "Shared by all: model conv, num_epochs 15, batch_size 64." in notes
    assert "Shared where it applies: preconditioning adam, beta 0.25" in notes


@pytest.mark.parametrize(
    ("sampler", "objective", "start", "name"),
    [
        ("none", "reverse", None, "VAE"),
        ("map", "prior", None, "PC"),
        ("langevin", "prior", None, "LPC prior"),
        ("langevin", "forward", None, "LPC forward"),
        ("langevin", "prior", "persistent", "LPC persistent"),
        ("langevin", "forward", "persistent", "LPC forward persistent"),
        ("langevin", "reverse", "prior", "LPC reverse, start=prior"),
        ("mala", "jeffreys", None, "mala jeffreys"),
    ],
)
def test_methods_have_the_names_of_the_field(sampler, objective, start, name):
    assert method_of(sampler, objective, start) == name


# Numbers --------------------------------------------------------------------------------------------------


def test_a_missing_metric_is_a_dash_and_fewer_seeds_are_said(disk):
    disk.run("a0", LPC, 0, metrics={"fd_random_conv": 2.0, "density_random_conv": 0.5})
    disk.run("a1", LPC, 1, metrics={"fd_random_conv": 4.0})
    disk.run("b0", VAE, 0, metrics={"fd_random_conv": "nan", "elbo": -3.0})
    rows, _ = table(read_study(disk.study), "sample quality")
    assert rows["LPC jeffreys"]["density_random_conv"] == "0.500 ± – (n=1)"
    assert rows["VAE"]["density_random_conv"] == "–"
    assert rows["VAE"]["fd_random_conv"] == "not finite"
    bounds, _ = table(read_study(disk.study), "likelihood")
    assert bounds["VAE"]["elbo"] == "-3.00 ± –" and "LPC jeffreys" not in bounds


def test_a_seed_without_the_measurement_of_the_others_is_left_out_of_their_table(disk):
    facts = {"kind": "likelihood", "start": "encoder"}
    disk.run("a0", LPC, 0, metrics={"log_likelihood": -90.0}, measurement=facts)
    disk.run("a1", LPC, 1, metrics={"elbo": -95.0})
    rows, _ = table(read_study(disk.study), "log p(x)")
    assert rows["LPC jeffreys"]["log_likelihood"] == "-90.00 ± – (n=1)"


def test_of_two_starts_of_one_run_the_report_shows_that_of_the_smaller_gap(disk):
    """Whichever was measured first."""
    found = [
        {"metrics": {"log_likelihood": value, "bdmc_gap": gap}, "measurement": {"kind": "likelihood", "start": start}}
        for value, gap, start in ((-9.0, 40.0, "prior"), (-5.0, 0.5, "free"), (-4.0, 3.0, "encoder"))
    ]
    disk.run("a", VAE, 0, **found[0])
    (disk.study / "a" / "evaluations").mkdir()
    for number, later in enumerate(found[1:]):
        (disk.study / "a" / "evaluations" / f"{number}.json").write_text(json.dumps(later | {"update": 100}))
    rows, _ = table(read_study(disk.study), "log p(x)")
    assert rows["VAE"]["log_likelihood"] == "-5.00 ± –" and rows["VAE"]["bdmc_gap"] == "0.500 ± –"


@pytest.mark.parametrize(("kind", "title"), [("likelihood", "log p(x)"), ("posterior", "posterior")])
def test_where_chains_were_annealed_from_is_said_of_each_group_that_differs(disk, kind, title):
    for name, choices, seed, start in (("a", LPC, 0, "encoder"), ("b", LPC, 1, "free"), ("c", VAE, 0, "encoder")):
        disk.run(name, choices, seed, metrics={"log_likelihood": -9.0}, measurement={"kind": kind, "start": start})
    _, notes = table(read_study(disk.study), title)
    assert "Annealed from the encoder's q: VAE; LPC jeffreys." in notes
    assert "Annealed from a free q for each example: LPC jeffreys." in notes
    assert "from the prior" not in notes


def test_numbers_have_the_decimals_that_their_size_deserves():
    assert [show(x) for x in (None, 12345.6, 113.29, 5.0, 0.63, 0.0002)] == [
        "–", "12,346", "113.3", "5.00", "0.630", "0.0002"
    ]  # fmt: skip
    assert spread([4e-6, 4.2e-6]) == "4.1e-06 ± 1.4e-07" and spread([0.0, 0.0]) == "0.000 ± 0.000"
    assert spread([math.nan, 1.0, 2.0]) == "not finite in 1 of 3"
    assert spread([]) == "–" and spread([None, 1.0, 1.0]) == "1.00 ± 0.00"


def test_different_ways_of_measuring_never_share_a_column(disk):
    disk.run("a0", VAE, 0, metrics={"fd_random_conv": 2.0})
    disk.run("a1", VAE, 1, metrics={"fd_random_conv": 8.0}, measurement={"num_samples": 2000})
    folder = disk.run("a2", VAE, 2, metrics={"fd_random_conv": 4.0})
    later = {"metrics": {"fid": 90.0}, "measurement": {"num_samples": 50000, "extractor": "inception"}}
    (folder / "evaluations").mkdir()
    (folder / "evaluations" / "fid.json").write_text(json.dumps(later))
    found = [table for table in study_tables(read_study(disk.study)) if "sample quality" in table.title]
    assert [(table.columns[2], table.rows[0][1:3]) for table in found] == [
        ("fid", ["1", "90.00 ± –"]),
        ("fd_random_conv", ["1", "8.00 ± –"]),
        ("fd_random_conv", ["2", f"3.00 ± {math.sqrt(2):.2f}"]),
    ]
    assert "N = 2,000, 400 references (train), k = 5" in found[1].notes[0]


def test_an_evaluation_made_before_the_end_is_left_out_and_named(disk):
    folder = disk.run("a", VAE, metrics={"fd_random_conv": 2.0})
    (folder / "evaluations").mkdir()
    for update in (40, 100):
        later = {"metrics": {f"log_likelihood_{update}": -1.0}, "measurement": {}, "update": update}
        (folder / "evaluations" / f"at{update}.json").write_text(json.dumps(later))
    study = read_study(disk.study)
    assert study.runs[0].numbers == {"log_likelihood_100": -1.0}
    assert study.warnings == ["a/evaluations/at40.json measured update 40 of 100: left out"]


# The paper ------------------------------------------------------------------------------------------------


def test_the_papers_value_stands_only_where_dataset_method_settings_and_extractor_fit(disk):
    inception = {"extractor": "inception", "measurement": {"num_samples": 50000}}
    keys = {"model": "conv", "batch_size": 64, "learning_rate": 0.001, "num_epochs": 50}
    fid = {"metrics": {"fid": 110.0, "density": 0.5}}
    disk.run("lpc", PAPER_LPC, dataset="cifar10", **inception, **fid)
    disk.run("vae", VAE | keys, dataset="cifar10", **inception, **fid, num_epochs=50.0)
    disk.run("cut", VAE | keys | {"num_epochs": 15}, dataset="cifar10", **inception, **fid, num_epochs=3.0)
    disk.run("other", PAPER_LPC | {"step_size": 0.5}, dataset="cifar10", **inception, **fid)
    disk.run("mnist", PAPER_LPC, dataset="mnist", **inception, **fid)
    disk.run("conv", PAPER_LPC, 1, dataset="svhn", metrics={"fd_random_conv": 3.0})
    study = read_study(disk.study)
    rows, notes = table(study, "cifar10: sample quality")
    fits = {label: row["paper fid"] for label, row in rows.items() if row["paper fid"] != "–"}
    assert fits == {"LPC jeffreys, γ=0.1, 15 epochs": "113.29", "VAE, 50 epochs": "145.87"}
    assert rows["LPC jeffreys, γ=0.1, 15 epochs"]["fid − paper"] == "-3.29"
    assert rows["VAE, 50 epochs"]["paper density"] == "0.14" and "not comparable" not in notes
    rows, _ = table(study, "mnist: sample quality")
    assert not any("paper" in column for row in rows.values() for column in row)
    rows, notes = table(study, "svhn: sample quality")
    assert not any("paper" in column for row in rows.values() for column in row)
    assert "random_conv features: not comparable with the paper's FID" in notes
    assert table(study, "svhn: the paper's Table 1")[0]["LPC jeffreys"]["fid"] == "39.64"


def test_a_diverged_run_is_not_set_beside_the_paper(disk):
    result = {"metrics": {"fid": 300.0}, "status": "diverged", "num_epochs": 14.9}
    disk.run("lpc", PAPER_LPC, dataset="cifar10", extractor="inception", **result)
    rows, _ = table(read_study(disk.study), "sample quality")
    assert list(rows["LPC jeffreys\N{NO-BREAK SPACE}†"]) == ["method", "seeds", "fid"]


def test_fewer_samples_than_the_papers_are_pointed_out(disk):
    disk.run("lpc", PAPER_LPC, dataset="cifar10", extractor="inception", metrics={"fid": 110.0})
    assert "The paper used 50,000 samples" in table(read_study(disk.study), "sample quality")[1]


def test_the_papers_claims_follow_from_its_own_table():
    fid = {(row.dataset, row.method, row.num_epochs): row.fid for row in paper.TABLE_1}
    assert len(fid) == 9
    for dataset in ("svhn", "cifar10"):
        assert fid[dataset, "LPC jeffreys", 15] < fid[dataset, "VAE", 50]
    assert fid["celeba64", "LPC jeffreys", 15] > fid["celeba64", "VAE", 50]
    assert len({claim.id for claim in paper.CLAIMS}) == len(paper.CLAIMS)
    assert paper.find_row("svhn", "LPC jeffreys", PAPER_LPC | {"model": "conv"}) is None  # tuned otherwise


# Equal budgets --------------------------------------------------------------------------------------------


def test_equal_budgets_take_the_last_measurement_within_the_smallest_total(disk):
    vae = [measured(50, 1.0, 20.0, evaluations=100), measured(100, 2.0, 16.0, evaluations=200)]
    totals = {"num_updates": 150, "train_seconds": 3.0, "gradient_evaluations": 300}
    disk.run("vae", VAE, rows=vae, metrics={"fd_random_conv": 12.0}, **totals)
    for seed in (0, 1):
        rows = [measured(u, u / 40, 30.0 - u / 10 + seed, evaluations=2 * u) for u in (40, 80, 119, 121, 160)]
        totals = {"num_updates": 200, "train_seconds": 5.0, "gradient_evaluations": 400}
        disk.run(f"lpc{seed}", LPC, seed, rows=rows, metrics={"fd_random_conv": 9.0}, **totals)
    study = read_study(disk.study)
    rows, notes = table(study, "equal seconds")
    # 3 s of the VAE: LPC at update 119 (2.975 s), not 121 (3.025 s): 18.1 and 19.1
    assert "Budget: 3.00 s" in notes and "(VAE)" in notes
    assert rows["VAE"]["fd_random_conv"] == "12.00 ± –" and rows["VAE"]["measured at"] == "3.00"
    assert rows["LPC jeffreys"]["fd_random_conv"] == f"18.60 ± {math.sqrt(0.5):.2f}"
    assert rows["LPC jeffreys"]["measured at"] in ("2.97", "2.98")
    rows, _ = table(study, "equal updates")
    assert rows["VAE"]["measured at"] == "150" and rows["LPC jeffreys"]["measured at"] == "121"
    rows, _ = table(study, "equal gradient evaluations")
    assert rows["LPC jeffreys"]["measured at"] == "242"


def test_a_final_measurement_with_other_samples_stays_off_the_curve(disk):
    for name, settings in (("a", VAE), ("b", LPC)):
        rows = [measured(50, 5.0, 20.0, samples=100)]
        disk.run(name, settings, rows=rows, metrics={"fd_random_conv": 1.0})
    study = read_study(disk.study)
    (setting,) = curve_settings(study.groups)
    assert setting.num_samples == 100
    assert [point.update for point in study.groups[0].runs[0].curve(setting)] == [50]
    rows, notes = table(study, "equal updates")
    assert rows["VAE"]["fd_random_conv"] == "20.00 ± –"
    assert "N = 100" in notes and "made otherwise (N = 500)" in notes


def test_a_run_without_early_measurements_is_a_dash(disk):
    disk.run("a", VAE, rows=[measured(5, 0.5, 3.0)], metrics={"fd_random_conv": 2.0}, num_updates=10)
    disk.run("b", LPC, metrics={"fd_random_conv": 1.0}, num_updates=100)
    rows, notes = table(read_study(disk.study), "equal updates")
    assert rows["LPC jeffreys"]["fd_random_conv"] == "–" and "every_epochs" in notes


def test_a_diverged_group_does_not_set_the_budget(disk):
    disk.run("a", VAE, rows=[measured(50, 5.0, 3.0)], metrics={"fd_random_conv": 2.0})
    disk.run("b", LPC, metrics={"fd_random_conv": 40.0}, status="diverged", num_updates=7)
    study = read_study(disk.study)
    (setting,) = curve_settings(study.groups)
    found = budget_table("digits", study.groups, setting, BUDGETS[0])
    assert "Budget: 100 updates" in found.notes[0]
    assert [row[:3] for row in found.rows] == [
        ["VAE", "1", "100"],
        ["LPC jeffreys\N{NO-BREAK SPACE}†", "1", "7"],
    ]


# Runs that went wrong -------------------------------------------------------------------------------------


def test_every_run_that_did_not_finish_is_named(disk, capsys):
    metrics = {"fd_random_conv": 2.0}
    disk.run("fine", LPC, 0, metrics=metrics)
    place = {"update": 41, "epoch": 2.5}
    disk.run("gone_wild", LPC, 1, metrics={"fd_random_conv": 99.0}, status="diverged", diverged_at=place)
    folder = disk.run("broken", LPC, 2)
    (folder / "result.json").write_text(json.dumps({"status": "failed", "metrics": {}, "error": "OOM:\nbig"}))
    disk.run("half", LPC, 3, rows=[{"update": 1234, "epoch": 1, "train/elbo": -5}])
    disk.run("begun", VAE, 0)
    main([str(disk.study)])
    printed = capsys.readouterr().out
    text = (disk.study / "report" / "report.md").read_text()
    for expected in (
        "gone_wild: diverged at update 41, epoch 2.5",
        "broken: failed: OOM: big",
        "half: unfinished, last logged at update 1,234",
        "begun: unfinished, nothing logged yet",
    ):
        assert expected in text and expected in printed
    rows, _ = table(read_study(disk.study), "runs")
    label = "LPC jeffreys (1 of 4 diverged)"
    assert rows[label]["runs"] == "1 finished, 1 diverged, 1 failed, 1 unfinished"
    assert table(read_study(disk.study), "sample quality")[0][label]["fd_random_conv"] == "2.00 ± –"


def test_seeds_that_diverged_or_are_not_finite_stay_visible_in_every_table_and_picture(disk):
    settings = {"wild": LPC, "odd": LPC | {"objective": "reverse"}}
    for seed in range(3):
        for name, keys in settings.items():
            values = {"fd_random_conv": math.nan if (name, seed) == ("odd", 1) else 2.0, "elbo": -1.0}
            status = "diverged" if name == "wild" and seed else "finished"
            rows = [measured(50, 5.0, 3.0)]
            disk.run(f"{name}{seed}", keys, seed, rows=rows, metrics=values, status=status, device="GPU A")
    for seed in range(3):
        disk.run(f"vae{seed}", VAE, seed, metrics={"fd_random_conv": 2.0}, device="GPU A")
    study = read_study(disk.study)
    shown = [table for table in study_tables(study) if table.columns[0] == "method" and "diverged" not in table.title]
    assert len(shown) >= 5
    for found in shown:
        assert [row[0] for row in found.rows if "jeffreys" in row[0]] == ["LPC jeffreys (2 of 3 diverged)"], found.title
    assert table(study, "sample quality")[0]["LPC reverse"]["fd_random_conv"] == "not finite in 1 of 3"
    figures = figures_of(study)
    ticks = [text.get_text() for text in figures["digits-objectives-random_conv.png"].axes[0].get_yticklabels()]
    assert any("2 of 3 diverged" in tick for tick in ticks) and any("1 of 3 not finite" in tick for tick in ticks)
    legend = figures["digits-fd_random_conv.png"].legends[0].get_texts()
    assert any("2 of 3 diverged" in " ".join(text.get_text().split()) for text in legend)


def test_a_group_without_a_finished_run_shows_its_last_finite_states_marked(disk):
    for seed, fd in enumerate((1.0, 3.0)):
        disk.run(f"a{seed}", LPC, seed, metrics={"fd_random_conv": fd}, status="diverged")
    rows, notes = table(read_study(disk.study), "sample quality")
    assert rows["LPC jeffreys\N{NO-BREAK SPACE}†"]["fd_random_conv"] == f"2.00 ± {math.sqrt(2):.2f}"
    assert "† no seed finished" in notes


@pytest.mark.parametrize("damage", [b"{", b"[1]", b"", b"\xff\xfe"])
def test_damaged_files_are_one_warning_each(disk, damage):
    disk.run("fine", VAE, 0, metrics={"fd_random_conv": 2.0})
    for file in ("run.json", "result.json", "metrics.jsonl", "config.yaml", "evaluations/x.json"):
        folder = disk.run(file.split(".")[0].replace("/", "-"), VAE, 1, metrics={"fd_random_conv": 5.0})
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(damage + b"\n" if file == "metrics.jsonl" else damage)
    (disk.study / "dangling").symlink_to("../runs/nowhere")
    (disk.study / "stray").mkdir()
    study = read_study(disk.study)
    named = [warning for warning in study.warnings if "not counted again" not in warning]
    harmless = {"config"} if damage in (b"", b"\xff\xfe") else set()  # empty YAML, the latter in UTF-16
    expected = {"dangling", "evaluations-x", "metrics", "result", "run", "stray", "config"} - harmless
    assert {warning.split("/")[0].split(":")[0] for warning in named} == expected
    assert all("\n" not in warning for warning in named) and len(named) == len(expected)
    assert {run.name: run.status for run in study.runs}["result"] == "damaged"


@pytest.mark.parametrize("arguments", [["nowhere"], ["empty"], ["only_broken"]])
def test_impossible_requests_are_one_line(tmp_path, capsys, arguments):
    (tmp_path / "empty").mkdir()
    (tmp_path / "only_broken").mkdir()
    (tmp_path / "only_broken" / "x").symlink_to("nothing")
    with pytest.raises(SystemExit) as left:
        main([str(tmp_path / arguments[0])])
    assert left.value.code == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and arguments[0] in captured.err
    with pytest.raises(UserError, match="empty, only_broken" if arguments == ["nowhere"] else "holds no runs"):
        read_study(tmp_path / arguments[0])


def test_the_folder_of_all_runs_names_its_studies(tmp_path):
    for name in ("runs", "fig4", "table1"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=r"holds no runs.*; studies there: fig4, table1"):
        read_study(tmp_path)


def test_an_output_that_cannot_be_written_is_one_line(disk, tmp_path, capsys):
    disk.run("a", VAE, metrics={"elbo": 1.0})
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as left:
        main([str(disk.study), "--output", str(tmp_path / "file")])
    assert left.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1


# Files ----------------------------------------------------------------------------------------------------


def curves(disk, num_seeds=2, length=4):
    """Two methods measured during training; the VAE is forty times faster."""
    for seed in range(num_seeds):
        for name, settings, pace in (("vae", VAE, 0.01), ("lpc", LPC, 0.4)):
            rows = [measured(u, u * pace, 40.0 - u / 10 + seed) for u in range(20, 20 * length, 20)]
            rows += [{"update": u, "epoch": 1, "train/elbo": -900 + u, "time/train_seconds": u} for u in (1, 90)]
            final = {"fd_random_conv": 25.0 + seed, "density_random_conv": 0.7}
            picture = np.full((30, 30), seed / 2)
            picture[5:9] = 1.0
            total = {"train_seconds": 100 * pace}
            disk.run(f"{name}{seed}", settings, seed, rows=rows, metrics=final, samples=picture, **total)


def test_the_csv_holds_every_run_in_full_precision(disk):
    disk.run("a", LPC, 3, metrics={"fd_random_conv": 1 / 3, "elbo": -0.1}, total_seconds=12.5)
    place = {"update": 5, "epoch": 0.5}
    disk.run("b", VAE, 0, metrics={"elbo": -7.0}, status="diverged", diverged_at=place, error='a, "b"')
    disk.run("c", VAE, 1)
    main([str(disk.study)])
    text = (disk.study / "report" / "report.csv").read_text()
    a, b, c = csv.DictReader(io.StringIO(text))
    assert float(a["metric.fd_random_conv"]) == 1 / 3 and float(a["metric.elbo"]) == -0.1
    assert (a["run"], a["setting.seed"], a["setting.step_size"], a["measurement.k"]) == ("a", "3", "0.1", "5")
    assert (a["total_seconds"], a["counted"]) == ("12.5", "True")
    assert (b["status"], b["diverged_at.update"], b["error"]) == ("diverged", "5", 'a, "b"')
    assert (c["status"], c["metric.elbo"], c["setting.step_size"], c["counted"]) == (
        "unfinished",
        "",
        "",
        "False",
    )


def test_the_terminal_shows_at_most_100_columns(disk, capsys):
    curves(disk)
    inception = {"extractor": "inception", "measurement": {"num_samples": 50000}}
    metrics = {"fid": 1234.5, "kid": 0.1, "density": 0.5, "coverage": 0.5, "precision": 0.1, "recall": 0.3}
    for seed in (0, 1):
        disk.run(f"x{seed}", PAPER_LPC, seed, dataset="cifar10", metrics=metrics, **inception)
    bounds = dict.fromkeys(("elbo", "bits_per_dim", "kl", "active_units", "sigma"), -12345.678)
    for seed, step_size in ((0, 0.25), (1, 0.25), (0, 0.5)):
        settings = LPC | {"preconditioning": "adam_shared", "step_size": step_size, "learning_rate": 0.00125}
        disk.run(f"y{seed}{step_size}", settings, seed, metrics=bounds)
    main([str(disk.study)])
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines if str(disk.study) not in line) <= 100
    assert any("LPC jeffreys, " in line and "-12,346 ± 0" in line for line in lines)
    assert any("1,234 ± 0  113.29" in line for line in lines)


def test_the_terminal_shows_the_claims_that_were_measured_and_counts_the_others(disk, capsys):
    disk.run("alone", LPC, 0, metrics={"fd_random_conv": 2.0})
    main([str(disk.study)])
    text = " ".join(capsys.readouterr().out.split())
    assert f"the paper's claims: 0 holds; 0 does not hold; 0 within chance; {len(paper.CLAIMS)} not measured." in text
    assert not any(claim.text.split()[0] + " " + claim.text.split()[1] in text for claim in paper.CLAIMS)
    report = (disk.study / "report" / "report.md").read_text()
    assert report.index(": runs") < report.index("the paper's claims") and paper.CLAIMS[0].text in report
    for objective, fd in (("reverse", 3.0), ("jeffreys", 2.0), ("prior", 4.0)):
        for seed in (0, 1):
            disk.run(
                f"{objective}{seed}", LPC | {"objective": objective}, seed, metrics={"fd_random_conv": fd + seed / 9}
            )
    main([str(disk.study)])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[-1:] == ["holds"] for line in lines)
    assert not any(line.endswith("not measured") for line in lines)


def test_starting_needs_neither_torch_nor_matplotlib():
    code = "import sys, lpc_runner.report; print({'torch', 'matplotlib', 'hydra', 'wandb'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


# Pictures -------------------------------------------------------------------------------------------------


def test_curves_have_a_line_a_group_a_band_over_seeds_and_units(disk):
    curves(disk)
    figures = figures_of(read_study(disk.study))
    figure = figures["digits-fd_random_conv.png"]
    epochs, seconds = figure.axes
    assert len(epochs.lines) == len(seconds.lines) == 2 and len(epochs.collections) == 2
    assert len({line.get_marker() for line in epochs.lines} | {line.get_color() for line in epochs.lines}) == 4
    vae = epochs.lines[0]
    assert list(vae.get_xdata()) == [2, 4, 6, 15]
    assert list(vae.get_ydata()) == [38.5, 36.5, 34.5, 25.5]  # means of seeds 0 and 1, the final one included
    assert list(seconds.lines[0].get_xdata()) == pytest.approx([0.2, 0.4, 0.6, 1.0])
    assert epochs.get_xlabel() == "epochs of training" and seconds.get_xlabel().startswith("training time (s")
    assert epochs.get_ylim() == seconds.get_ylim()
    assert "random_conv" in epochs.get_ylabel() and seconds.get_xscale() == "log"  # 0.2 s to 40 s
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "VAE (2 seeds)",
        "LPC jeffreys (2 seeds)",
    ]
    assert "nats per example" in figures["digits-train-elbo.png"].axes[0].get_ylabel()
    assert "digits-density_random_conv.png" not in figures  # measured once, at the end


def test_a_mean_ends_where_its_first_seed_ends(disk):
    for seed, updates in ((0, (20, 40, 60)), (1, (20, 40))):
        rows = [measured(u, u / 10 + seed, u + 2.0 * seed) for u in updates]
        disk.run(f"a{seed}", VAE, seed, rows=rows)
    (setting,) = curve_settings(read_study(disk.study).groups)
    (group,) = read_study(disk.study).groups
    curve = mean_curve([run.curve(setting) for run in group.runs], "fd_random_conv")
    assert (curve.updates, curve.mean, curve.spent["seconds"]) == ([20, 40], [21.0, 41.0], [2.5, 4.5])
    assert curve.std == pytest.approx([math.sqrt(2)] * 2)


def test_updates_stand_in_for_epochs_that_nobody_recorded(disk):
    disk.run("a", VAE, rows=[measured(u, u / 10, 5.0 + u) for u in (20, 40)], metrics={"fd_random_conv": 2.0})
    rows = [{**measured(u, u / 10, 5.0 + u), "epoch": None} for u in (20, 40)]
    disk.run("b", LPC, rows=rows, metrics={"fd_random_conv": 2.0})
    axis = figures_of(read_study(disk.study))["digits-fd_random_conv.png"].axes[0]
    assert axis.get_xlabel() == "updates"
    assert [list(line.get_xdata()) for line in axis.lines] == [[20, 40, 100], [20, 40, 100]]


def test_seconds_are_linear_within_a_decade(disk):
    rows = [measured(u, u / 10, 5.0 + u) for u in (20, 40)]
    disk.run("a", VAE, rows=rows, metrics={"fd_random_conv": 2.0})
    figure = figures_of(read_study(disk.study))["digits-fd_random_conv.png"]
    assert figure.axes[1].get_xscale() == "linear" and not figure.axes[0].collections  # one seed: no band


def test_more_lines_than_can_be_told_apart_are_spread_over_pictures(disk):
    for number in range(MAX_LINES + 2):
        rows = [measured(u, u / 10, 5.0 + u + number) for u in (20, 40)]
        disk.run(f"r{number}", LPC | {"step_size": 0.1 * (number + 1)}, rows=rows)
    figures = figures_of(read_study(disk.study))
    pages = [figures[f"digits-fd_random_conv-{page}.png"] for page in (1, 2)]
    assert [len(page.axes[0].lines) for page in pages] == [5, 5]
    assert pages[0].axes[0].get_ylim() == pages[1].axes[0].get_ylim()
    assert {line.get_linestyle() for line in pages[0].axes[0].lines} == {":"}  # none has finished


def test_sample_grids_stand_side_by_side_and_damaged_ones_are_named(disk):
    curves(disk)
    result = json.loads((disk.study / "vae0" / "result.json").read_text())
    (disk.study / "vae0" / "result.json").write_text(json.dumps(result | {"num_epochs": 0.91}))  # max_updates ended it
    (disk.study / "lpc0" / "samples" / "final.png").write_bytes(b"no picture")
    study, warnings = read_study(disk.study), []
    ((_, _, figure),) = grid_pictures("digits", study.groups, warnings)
    shown = [axis for axis in figure.axes if axis.images]
    assert [axis.get_title() for axis in shown] == ["VAE, 15 epochs\nseed 0, after 0.91 epochs"]
    assert np.ptp(shown[0].images[0].get_array()[:, :, 0]) > 0.7
    assert warnings == ["lpc0/samples/final.png is damaged (no picture)"]
