"""metrics=likelihood and metrics=posterior: numbers against closed forms, resumption, and the commands around them."""

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, cells_of, only_run, result_of
from PIL import Image
from series import Series, lds
from torch import nn

from lpc_runner.base.distributions import DiagonalGaussian, Gaussian
from lpc_runner.base.ranks import SINGLE, Ranks
from lpc_runner.config.build import build
from lpc_runner.data.dataset import Data, Split
from lpc_runner.evaluation import calibration, log_likelihood
from lpc_runner.evaluation.ais import AnnealedImportance
from lpc_runner.evaluation.calibration import PosteriorMetrics
from lpc_runner.evaluation.evaluator import Setup
from lpc_runner.evaluation.log_likelihood import LikelihoodMetrics
from lpc_runner.inference.interfaces import Sampler
from lpc_runner.inference.preconditioning import Identity
from lpc_runner.inference.samplers import HMC, MALA, Info, Langevin, State
from lpc_runner.inference.step_sizes import Constant
from lpc_runner.models.dense import Linear


class Reals(Series):
    """Examples of one's own; to the model as they are."""

    def __init__(self, num_held_out=0):
        self.num_held_out = num_held_out

    def to_model(self, values):
        return values


def ais(num_chains=4, num_temperatures=12, start="encoder"):
    return AnnealedImportance(num_chains=num_chains, num_temperatures=num_temperatures, num_leapfrog=2, start=start)


def likelihood_metrics(**more):
    settings = {"ais": ais(), "num_examples": None, "num_simulated": 6, "num_importance_samples": 5, "every_epochs": 0}
    return LikelihoodMetrics(**settings | more)


class Best(nn.Module):
    """q(z|x) of the posterior's mean and of the variances of a diagonal of it."""

    def __init__(self, model):
        super().__init__()
        self.model = [model]

    def forward(self, batch):
        exact = self.model[0].posterior(batch.x)
        return DiagonalGaussian(exact.mean, exact.covariance_matrix.diagonal(dim1=-2, dim2=-1))


@pytest.fixture
def linear():
    """A linear model in float64 with 10 examples of its own, and an encoder."""
    torch.manual_seed(0)
    model = Linear((6, 5), 2, 1.0, Gaussian("learned", 0.6, 0.9), 0.3).double()
    with torch.no_grad():
        x = model.likelihood.sample(model.predict(torch.randn(10, 2).double()), torch.Generator().manual_seed(1))
    data = Data(Split(x), Split(x))
    return SimpleNamespace(model=model, encoder=Best(model), sampler=SimpleNamespace(num_steps=0)), data


def evaluator(data, tmp_path, metrics=None, dataset=None, ranks=SINGLE):
    setup = Setup(dataset or Reals(), data, tmp_path, "cpu", 0, ranks)
    return (metrics or likelihood_metrics()).evaluator(setup)


def test_the_numbers_are_near_the_evidence_and_say_how_near(linear, tmp_path, caplog):
    trained, data = linear
    caplog.set_level("INFO")
    numbers, facts = evaluator(data, tmp_path).final(trained)
    assert numbers["log_likelihood"] == pytest.approx(numbers["log_evidence"], abs=0.1)
    assert numbers["elbo"] < numbers["iwae"] < numbers["log_evidence"] + 0.1  # of 50 draws
    assert 0 < numbers["bdmc_gap"] < 0.3 and numbers["log_likelihood_error"] > 0
    assert "log_likelihood_bits_per_dim" not in numbers  # a density
    assert facts["start"] == "encoder" and set(facts["notes"]) == set(numbers)
    assert facts["gradient_evaluations"] == (10 * (4 + 4) + 6 * (8 + 4)) * (1 + 2 * 11)
    (said,) = [line for line in caplog.messages if "at most" in line]
    assert "10 test and 6 simulated examples, K = 4 chains, S = 12 temperatures" in said
    assert all(parameter.requires_grad for parameter in trained.model.parameters())  # as they were


def test_an_interrupted_measurement_goes_on(linear, tmp_path, monkeypatch, caplog):
    """The same numbers as in one go, and only what was missing is computed; a damaged file is said and done without."""
    trained, data = linear
    monkeypatch.setattr(log_likelihood, "EXAMPLES", 4)
    short = likelihood_metrics(ais=ais(2, 3))
    caplog.set_level("INFO")
    whole = evaluator(data, tmp_path / "whole", short).final(trained)[0]
    bounds, calls = AnnealedImportance.bounds, []

    def counted(self, *arguments):
        calls.append(arguments[4])
        if len(calls) == 3 and stop:
            raise KeyboardInterrupt
        return bounds(self, *arguments)

    monkeypatch.setattr(AnnealedImportance, "bounds", counted)
    stop = True
    with pytest.raises(KeyboardInterrupt):
        evaluator(data, tmp_path, short).final(trained)
    assert "AIS: 8 of 10 examples are kept; the same command goes on" in caplog.text
    stop = False
    calls.clear()
    assert evaluator(data, tmp_path, short).final(trained)[0] == whole
    assert calls == ["test/2", "simulated/0", "simulated/1"]
    calls.clear()
    assert evaluator(data, tmp_path, short).final(trained)[0] == whole and not calls
    with torch.no_grad():  # other weights are another measurement
        trained.model.decoder[0].bias += 0.1
    assert evaluator(data, tmp_path, short).final(trained)[0] != whole and len(calls) == 5
    for path in tmp_path.glob("*.npz"):
        path.write_bytes(path.read_bytes()[:-40])
    calls.clear()
    evaluator(data, tmp_path, short).final(trained)
    assert len(calls) == 5 and "is damaged" in caplog.text


def test_ranks_share_the_examples(linear, tmp_path, monkeypatch):
    trained, data = linear
    monkeypatch.setattr(log_likelihood, "EXAMPLES", 4)
    monkeypatch.setattr(Ranks, "gather_rows", lambda self, rows, counts: rows)
    parts = []
    for ranks in (SINGLE, Ranks(0, 2, 0), Ranks(1, 2, 1)):
        one = evaluator(data, tmp_path, ranks=ranks)
        with one.measuring(trained):
            parts.append(one._rows(10, partial(one._test, trained), None, "AIS"))
    assert torch.equal(torch.cat(parts[1:]), parts[0]) and min(map(len, parts)) > 0


def test_no_two_chunks_share_their_noise(linear, tmp_path, monkeypatch):
    """Else the error of a mean over chunks would not fall with their number: equal examples, unequal numbers."""
    trained, data = linear
    monkeypatch.setattr(log_likelihood, "EXAMPLES", 5)
    same = data.test.values[:5].repeat(2, 1, 1)
    one = evaluator(Data(Split(same), Split(same)), tmp_path)
    with one.measuring(trained):
        first, second = one._rows(10, partial(one._test, trained), None, "AIS").split(5)
    columns = [0, 3, 4]  # log p(x), IWAE, ELBO
    assert (first[:, columns] != second[:, columns]).all()


def test_held_out_neurons_are_not_read_and_the_prior_serves_without_an_encoder(tmp_path):
    model = lds(num_held_out=2)
    values = (
        torch.randn(4, *model.readout.weight.shape[:1], dtype=torch.float64)[:, None].expand(-1, 6, -1).contiguous()
    )
    trained = SimpleNamespace(model=model, encoder=None, sampler=SimpleNamespace(num_steps=0))
    metrics = likelihood_metrics(ais=ais(2, 3), num_simulated=2)
    numbers, facts = evaluator(Data(Split(values), Split(values)), tmp_path, metrics, Reals(2)).final(trained)
    assert facts["start"] == "prior" and "iwae" not in numbers
    assert {"log_likelihood", "bdmc_gap", "log_evidence"} <= numbers.keys()
    assert numbers["log_likelihood"] < numbers["log_evidence"] + 3


def test_annealed_from_a_free_q_a_posterior_that_is_one_gives_the_evidence(tmp_path):
    """Independent z: log p(x, z) - log q(z) is log p(x) wherever z is, so that one chain gives it; from the prior,
    which is ten times wider, it is nats away. The fit's gradients are counted."""
    torch.manual_seed(0)
    model = Linear((2, 3), 2, 1.0, Gaussian("learned", 0.1, 0.9), 0.3).double()
    with torch.no_grad():
        model.decoder[0].weight.copy_(torch.eye(6, 2))
        x = model.likelihood.sample(model.predict(torch.randn(10, 2).double()), torch.Generator().manual_seed(1))
    trained = SimpleNamespace(model=model, encoder=None, sampler=SimpleNamespace(num_steps=0))
    found = {}
    for start in ("free", "prior"):
        metrics = likelihood_metrics(ais=ais(1, 4, start), num_simulated=4)
        found[start], facts = evaluator(Data(Split(x), Split(x)), tmp_path, metrics).final(trained)
        passes = (10 + 4 * 2) * (1 + 2 * 3) + 14 * 4 * (1 + 2 * 3)
        fit = 14 * (4 * (1 + 2 * 4) + 2_000) if start == "free" else 0
        assert facts["start"] == start and facts["gradient_evaluations"] == passes + fit
    exact = found["free"]["log_evidence"]
    assert found["free"]["log_likelihood"] == pytest.approx(exact, abs=0.1)  # a fit has an end
    assert found["free"]["bdmc_gap"] == pytest.approx(0, abs=0.1)
    assert abs(found["prior"]["log_likelihood"] - exact) > 10


class Exact(Sampler):
    """z(t) = μ + width · Λ^(-1/2) ξ: independent draws of the posterior of a linear model, whose g is -Λ (z - μ)."""

    start = "prior"

    def __init__(self, model, num_steps, width):
        precision = model.posterior(torch.zeros(1, 6, 5).double()).precision_matrix[0]
        self.num_steps, self.inverse = num_steps, torch.linalg.inv(precision)
        self.factor = width * torch.linalg.cholesky(self.inverse)

    def init(self, z, q=None):
        return State(z, None, 0)

    def step(self, state, potential, noise):
        log_joint, drift = potential(state.z)
        return State(state.z + drift @ self.inverse + noise @ self.factor.T, None, state.t + 1), Info(
            log_joint, drift, 1.0
        )


@pytest.mark.parametrize(("width", "spread"), [(1.0, 1.0), (2**0.5, 0.72)])
def test_an_exact_sampler_is_calibrated_and_one_of_twice_the_variance_is_told(linear, tmp_path, width, spread):
    """Ranks of z among draws of variance v² times the posterior's; of an exact chain every state counts."""
    trained, data = linear
    trained.sampler = Exact(trained.model, 9, width)
    settings = {"num_simulated": 600, "num_states": 9, "num_examples": 3, "num_chains": 4, "num_chain_steps": 100}
    settings |= {"free_steps": 60, "free_samples": 4, "free_learning_rate": 0.05, "ais": ais()}
    numbers, facts = evaluator(data, tmp_path, PosteriorMetrics(**settings)).final(trained)
    assert numbers["calibration_spread"] == pytest.approx(spread, abs=0.06)
    assert (numbers["calibration_p"] > 0.01) == (width == 1)
    assert 0.4 < numbers["calibration_chi2"] < 2 if width == 1 else numbers["calibration_chi2"] > 3
    assert len(facts["by_coordinate"]["calibration_p"]) == 2 and facts["num_ranks"] == 10
    assert facts["start"] == "encoder" and "exact log p(x)" in facts["sources"]
    assert numbers["rhat_max"] < 1.05 and numbers["ess_per_pass"] == pytest.approx(1, abs=0.25)
    covariance = trained.model.posterior(torch.zeros(1, 6, 5).double()).covariance_matrix[0]
    precision = torch.linalg.inv(covariance)
    approximation = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision)).item()
    assert numbers["approximation_gap"] == pytest.approx(approximation, abs=0.1)  # of a fit's end
    assert numbers["amortisation_gap"] > -0.1


LENGTHS = {"num_simulated": 8, "num_states": 1, "num_examples": 2, "num_chains": 32, "num_chain_steps": 200}
REST = {"free_steps": 1, "free_samples": 2, "free_learning_rate": 0.05, "num_reference_steps": 100}


def measured(data, tmp_path, trained, sampler):
    trained.sampler = sampler
    return evaluator(data, tmp_path, PosteriorMetrics(**LENGTHS, **REST, ais=ais(1, 2))).final(trained)[0]


def test_a_truth_that_lies_below_a_bound_is_said(linear, tmp_path, monkeypatch, caplog):
    """Of a model whose log p(x) is not known in closed form, from one draw of the prior."""
    trained, data = linear
    monkeypatch.setattr(calibration, "exact_log_evidence", lambda model, x: None)
    settings = {**LENGTHS, **REST, "num_chains": 2, "num_chain_steps": 20, "num_reference_steps": 0, "free_steps": 60}
    found = evaluator(data, tmp_path, PosteriorMetrics(**settings, ais=ais(1, 1, "prior")))
    numbers, facts = found.final(trained)
    assert numbers["approximation_gap"] < -1 and "log p(x) was found below an ELBO" in caplog.text
    assert facts["start"] == "prior" and "AIS from the prior with K = 1, S = 1" in facts["sources"]


def test_bias_against_long_chains_is_that_of_the_closed_form(linear, tmp_path):
    """Unadjusted Langevin's law on a Gaussian of precision Λ is Gaussian of covariance 2 (Λ(2 - γΛ))^-1."""
    trained, data = linear
    precision = trained.model.posterior(data.test.values[:1]).precision_matrix[0].detach()
    size = 0.8 / float(torch.linalg.eigvalsh(precision).max())
    wide = 2 * torch.linalg.inv(precision @ (2 * torch.eye(2) - size * precision)).diagonal()
    expected = float((wide / torch.linalg.inv(precision).diagonal()).mean()) - 1
    chain = lambda noise: Langevin(3, "all", Constant(size), Identity(), noise=noise)
    found = measured(data, tmp_path, trained, chain("independent"))
    assert expected > 0.3 and found["variance_bias"] == pytest.approx(expected, abs=0.1)
    assert found["mean_error"] < 0.15 and found["reference_rhat_max"] < 1.05
    found = measured(data, tmp_path, trained, chain("averaged"))
    assert found["variance_bias"] == pytest.approx(0, abs=0.1) and 0 < found["chain_acceptance"] < 1


def test_longer_paths_have_more_effective_samples_for_as_many_passes(linear, tmp_path):
    """On a Gaussian a path of small angle φ = L sqrt(2γλ) leaves the correlation cos φ: ESS per pass tan²(φ/2)/L, about
    L γλ/2. That of MALA, L = 1, is the L-th part of it."""
    trained, data = linear
    precision = trained.model.posterior(data.test.values[:1]).precision_matrix[0].detach()
    size = 0.04 / float(torch.linalg.eigvalsh(precision).max())
    one, five = (measured(data, tmp_path, trained, kind(3, "all", Constant(size), Identity())) for kind in (MALA, HMC))
    assert 3 < five["ess_per_pass_slowest"] / one["ess_per_pass_slowest"] < 9
    assert five["variance_bias"] == pytest.approx(0, abs=0.1) and five["chain_acceptance"] > 0.97


def test_chains_that_would_end_early_are_measured_whole(linear, tmp_path):
    """Ranks are among num_states of T steps, and mixing is of num_chain_steps, whatever training spares itself."""
    trained, data = linear
    trained.sampler = Exact(trained.model, 100, 1.0)
    settings = {"num_simulated": 20, "num_states": 50, "num_examples": 2, "num_chains": 2, "num_chain_steps": 100}
    settings |= {"free_steps": 2, "free_samples": 2, "free_learning_rate": 0.05, "ais": ais(1, 2)}
    numbers, facts = evaluator(data, tmp_path, PosteriorMetrics(**settings)).final(trained)
    trained.sampler.stop = "settled"
    same, of_same = evaluator(data, tmp_path, PosteriorMetrics(**settings)).final(trained)
    assert same == numbers and of_same["num_ranks"] == facts["num_ranks"] == 51


def test_a_run_is_measured_by_both_and_the_report_shows_it(command, caplog):
    """As the group of a run, of binary images; again afterwards, with a picture of the ranks."""
    from lpc_runner.evaluate import main
    from lpc_runner.report import study_tables
    from lpc_runner.study.estimates import estimate_pictures
    from lpc_runner.study.study import read_study

    kept = [word for word in TINY if not word.startswith("metrics.")]
    words = ("metrics.ais.num_chains=2", "metrics.ais.num_temperatures=3", "metrics.ais.num_leapfrog=1")
    words += ("metrics.num_examples=4", "metrics.num_simulated=20")
    own = ("metrics=likelihood", "metrics.num_importance_samples=5", "metrics.every_epochs=1")
    answer = command(*kept, *own, *words, "model/likelihood=bernoulli", "dataset.binarise=static")
    assert answer.code == 0 and "K = 2 chains" in answer.out, answer.err
    metrics = result_of(only_run())["metrics"]
    bits = -metrics["log_likelihood"] / (784 * math.log(2))
    assert metrics["log_likelihood_bits_per_dim"] == pytest.approx(bits) and "elbo" in metrics
    assert (only_run() / "samples" / "final.png").exists()
    more = ("metrics.num_chain_steps=20", "metrics.num_chains=2", "metrics.free_steps=4", "metrics.free_samples=2")
    more += ("metrics.num_reference_steps=20",)
    caplog.set_level("INFO")
    answer = command(str(only_run()), "metrics=posterior", *words, *more, entry=main)
    assert answer.code == 0 and "among 3 states of a chain of T = 3" in answer.out, answer.err
    assert "AIS from the encoder's q with K = 2, S = 3" in answer.out.replace("\n", " ") and "28/28" in caplog.text
    found = sorted(path.name for path in (only_run() / "evaluations").iterdir())
    assert found == ["posterior-encoder-m20-n4-1.json", "posterior-encoder-m20-n4-1.png"]
    with Image.open(only_run() / "evaluations" / found[1]) as image:
        assert np.asarray(image.convert("L")).std() > 0
    text = "\n".join(table.markdown() for table in study_tables(read_study(only_run().parent)))
    for line in ("log p(x), 4 test examples, AIS K = 2, S = 3, 2 levels", "| log_likelihood | error | difference |"):
        assert line in text
    assert "chains and posteriors, 4 test examples, 20 simulated" in text and "| calibration_chi2 |" in text
    assert "| variance_bias | mean_error |" in text
    study = read_study(only_run().parent)
    (picture,) = estimate_pictures("digits", study.of("digits"))
    (axis,) = picture.figure.axes
    point = axis.containers[0].lines[0]
    (estimate,) = [found for found in study.runs[0].estimates if found.setting[0] == "posterior"]
    drawn = (point.get_xdata()[0], point.get_ydata()[0])
    assert drawn == (estimate.values["ess_per_pass"], estimate.values["variance_bias"])


def test_a_mistake_is_one_line(command):
    answer = command("metrics=likelihood", "metrics.ais.num_chains=0", "check=true", "tracker=none")
    assert answer.code == 1
    assert answer.lines == ["lpc_runner: metrics.ais.num_chains must be an integer of at least 1, got 0"]


@pytest.mark.parametrize(
    "words", [(), ("dataset.binarise=static", "model/likelihood=bernoulli"), ("dataset=lds", "model=lds")]
)
def test_the_experiment_measures_alike_on_all_its_data(words, workplace):
    methods = "method=vae" if words else "method=vae,lpc_persistent"
    cells = cells_of("experiment=likelihood_small", *words, methods, "seed=0", "tracker=none", "device=cpu")
    for cell in cells:
        assert cell.choices["metrics"] == "likelihood" and cell.cfg.metrics == cells[0].cfg.metrics
        assert build(cell.cfg, cell.choices).metrics.ais.num_temperatures == 50
