"""The paper's experiments: what each shares with the others, and the small variants from one word to their pictures."""

import html.parser
from pathlib import Path

import numpy as np
import pytest
from conftest import cells_of, plan_of
from PIL import Image

from lpc_runner.report import main as report

NAMES = (
    "table1",
    "fig1",
    "fig2",
    "fig3",
    "fig4",
    "fig5",
    "fig6",
    "fig7",
    "fig8",
    "fig9",
    "table4",
    "tune",
    "compute",
    "cost",
)
# Networks, chains and counts so small that a run takes a second; the cells are those of the experiment.
SHORT = (
    "tracker=none",
    "num_threads=1",
    "model.hidden=[16]",
    "model.latent_dim=4",
    "tuned.num_steps=3",
    "tuned.num_epochs=2",
    "tuned.trace_updates=[2,4]",
    "trainer.max_updates=6",
    "trainer.num_prior_batches=2",
    "traces.num_chains=4",
    "traces.grid_points=3",
    "metrics.extractor=random_conv",
    "metrics.num_samples=40",
    "metrics.max_references=40",
    "metrics.num_samples_during=20",
    "seed=0",
)


@pytest.mark.parametrize("name, data", [("cost", "svhn"), ("cost_small", "digits")])
def test_every_method_of_cost_makes_as_many_decoder_gradients_and_is_measured_as_often(name, data):
    spent, counts = set(), set()
    for cell in cells_of(f"experiment={name}", f"dataset={data}", "seed=0"):
        per_visit = cell.cfg.sampler.get("num_steps") or cell.cfg.objective.get("num_samples", 1)
        epochs = cell.cfg.trainer.num_epochs
        spent.add(epochs * per_visit)
        counts.add(epochs // cell.cfg.metrics.every_epochs)
    assert len(spent) == 1 and min(counts) >= 12 and max(counts) <= 15


def test_every_sampler_of_samplers_makes_as_many_decoder_gradients_and_finds_its_step_size():
    cells = cells_of("experiment=samplers", "seed=0")
    steps = {"langevin": 1, "underdamped": 1, "mala": 2, "hmc": 1 + 5}  # and one for θ, but where a step has it
    spent = [cell.cfg.sampler.num_steps * steps[cell.choices["sampler"]] for cell in cells]
    assert len(cells) == 10 and set(spent) == {12} and cells[-1].cfg.sampler.num_leapfrog == 5
    assert {cell.choices["step_size"] for cell in cells} == {"adapted"}
    assert [cell.cfg.sampler.get("noise") for cell in cells].count("averaged") == 2


def runs_of(*words: str) -> set[str]:
    """Names of the runs that a command stands for."""
    from lpc_runner.runner.plan import plan

    return {plan(cell).directory.name for cell in cells_of(*words)}


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_has_a_small_variant_with_its_own_study(name):
    one = ("seed=0", "method=lpc_jeffreys")
    *_, large = cells_of(f"experiment={name}", "dataset=svhn", *one)
    *_, small = cells_of(f"experiment={name}_small", *one)
    assert (large.cfg.study, small.cfg.study) == (name, f"{name}_small")
    assert small.choices["dataset"] == "digits" and large.choices["dataset"] != "digits"
    assert list(large.cfg.traces.updates) == [300, 600]
    total = small.cfg.trainer.num_epochs * (1437 // 64)
    assert 0 < max(small.cfg.traces.updates) <= total


@pytest.mark.slow
def test_figures_that_share_runs_share_them_on_disk(workplace):
    """Figures 3, 7 and 8 are Figure 2's runs, 1 and 6 Table 1's, 9 Figure 5's."""
    one = ("dataset=cifar10", "seed=0")
    figure2 = runs_of("experiment=fig2", *one)
    assert all(runs_of(f"experiment={name}", *one) <= figure2 for name in ("fig3", "fig7", "fig8"))
    table1 = runs_of("experiment=table1", *one)
    assert runs_of("experiment=fig1", *one) == runs_of("experiment=fig6", *one) < table1
    assert len(figure2 & table1) == 1  # Jeffreys
    svhn = ("dataset=svhn", "seed=0")
    assert runs_of("experiment=fig9", *svhn) < runs_of("experiment=fig5", *svhn)


def test_the_tuned_values_are_cells_of_the_sweeps(workplace):
    """Table 3's choice is found in Figure 4's grid and is Table 1's run (CIFAR-10: γ = 0.1, β = 0.25; SVHN: none)."""
    chosen = {"cifar10": ("adam_25", "0.1"), "svhn": ("lpc_none", "0.001")}
    for dataset, (method, value) in chosen.items():
        words = (f"dataset={dataset}", "seed=0")
        cell = runs_of("experiment=fig4", f"method={method}", f"step_size.value={value}", *words)
        assert cell == runs_of("experiment=table1", "method=lpc_jeffreys", *words)


def test_a_command_line_value_narrows_an_experiment():
    cells = cells_of("experiment=fig4", "dataset=cifar10", "method=adam_25")
    assert len(cells) == 7 and {cell.cfg.preconditioning.beta for cell in cells} == {0.25}


def test_the_vae_of_the_tuning_has_no_step_size(workplace):
    """The product with the step sizes would repeat it: its runs are one for each learning rate."""
    words = ("experiment=tune", "dataset=cifar10", "seed=0", "step_size.value=0.01,0.1")
    vaes = [cell for cell in cells_of(*words) if cell.choices["sampler"] == "none"]
    from lpc_runner.runner.plan import plan

    assert len({plan(cell).directory.name for cell in vaes}) == 4
    assert len({cell.cfg.optimizer.learning_rate for cell in vaes}) == 4


def test_forward_kl_once_for_an_epoch_and_once_as_far_as_it_goes():
    cells = cells_of("experiment=fig2", "dataset=svhn", "seed=0")
    forward = [cell.cfg.trainer.num_epochs for cell in cells if cell.choices["objective"] == "forward"]
    assert sorted(forward) == [1, 15]


class Pictures(html.parser.HTMLParser):
    """Counts the pictures inside a page and the addresses outside it."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.outside = 0, []

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("src", "href") and tag != "a":
                self.inside += value.startswith("data:image/png;base64,")
                self.outside += [] if value.startswith("data:") else [value]


NARROWED = {"fig4": ("step_size.value=0.01,0.1", "method=lpc_none,adam_25")}
PICTURES = {
    "table1": {"samples"},
    "fig2": {"objectives-random_conv", "delta-log-joint", "drift-norm", "samples"},
    "fig3": {"delta-log-joint", "drift-norm"},
    "fig4": {"step-sizes-random_conv"},
    "fig6": {"trajectories", "trajectories-map", "trajectories-langevin"},
}


# The report of the next test has the pictures of Figure 4.
QUICK = ("fig6",)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in PICTURES]
)
def test_a_small_variant_runs_from_one_word_to_its_pictures(name, command):
    words = [*SHORT, *NARROWED.get(name, ())]
    answer = command(f"experiment={name}_small", *words)
    assert answer.code == 0, answer.err
    study = Path("outputs") / f"{name}_small"
    planned = runs_of(f"experiment={name}_small", *words)
    assert {path.name for path in study.iterdir()} == planned
    report([str(study)])
    folder = study / "report"
    drawn = {path.stem.removeprefix("digits-") for path in folder.glob("*.png")}
    assert drawn >= PICTURES[name]
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            assert np.asarray(image.convert("L")).std() > 0
    page = Pictures()
    page.feed((folder / "report.html").read_text())
    assert page.inside == len(list(folder.glob("*.png"))) and not page.outside
    text = (folder / "report.md").read_text()
    assert "claims" in text and f"{len(planned)} runs" in text


def test_a_sweep_goes_on_where_it_was_and_names_what_failed(command, monkeypatch):
    """One cell of Figure 4 that cannot be measured: the others are done, the report names it, a second call ends it."""
    words = ("experiment=fig4_small", "step_size.value=0.01,0.1", "method=adam_25", *SHORT)
    with monkeypatch.context() as patch:
        from lpc_runner.evaluation.quality import ImageEvaluator

        final, calls = ImageEvaluator.final, []
        failing = lambda self, trained: final(self, trained) if calls.append(0) or len(calls) != 2 else 1 / 0
        patch.setattr(ImageEvaluator, "final", failing)
        answer = command(*words)
    assert answer.code == 1 and "1 of 2 runs did not finish" in answer.lines[-1]
    report(["outputs/fig4_small"])
    assert "ZeroDivisionError" in Path("outputs/fig4_small/report/report.md").read_text()
    answer = command(*words)
    assert answer.code == 0 and answer.err.count("already done") == 1  # nothing is trained twice
    report(["outputs/fig4_small"])
    assert "2 runs: 2 finished" in Path("outputs/fig4_small/report/report.md").read_text()
    assert Path("outputs/fig4_small/report/digits-step-sizes-random_conv.png").exists()


def test_plan_of_one_cell():
    assert plan_of("experiment=small").directory.name.startswith("digits-mlp-langevin-jeffreys")
