"""What a run keeps of its chains: batches step by step, and the plane of its trajectories."""

import json

import numpy as np
import pytest
import torch
from conftest import TINY, TINY_VAE

from lpc_runner.base.distributions import DiagonalGaussian, Gaussian
from lpc_runner.data.dataset import Batch
from lpc_runner.inference.preconditioning import EncoderVariance, Identity
from lpc_runner.inference.samplers import Langevin, Map, NoSteps
from lpc_runner.inference.step_sizes import Constant
from lpc_runner.models.dense import Linear
from lpc_runner.training.traces import Trace, Traces, trajectory

GRID = 5


@pytest.fixture
def model():
    torch.manual_seed(1)
    return Linear((1, 2, 3), 4, 1.0, Gaussian("fixed", 0.5, 0.9), 0.3).double()


@pytest.fixture
def batch():
    torch.manual_seed(2)
    return Batch(torch.randn(3, 1, 2, 3, dtype=torch.float64), torch.arange(3))


def sampler(kind=Langevin, num_steps=40):
    return kind(num_steps, "all", Constant(0.02), Identity())


def follow(model, batch, chosen, seed=0):
    return trajectory(model, None, chosen, batch, seed, GRID)


def test_chains_that_would_end_early_are_drawn_whole(model, batch):
    """A picture is of all T steps, whatever training spares itself."""
    one, other = (Langevin(200, "all", Constant(0.02), Identity(), stop=stop) for stop in ("settled", "never"))
    found, expected = follow(model, batch, one), follow(model, batch, other)
    assert found["coordinates"].shape[0] == 201
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_surface_is_log_joint_and_the_chain_lies_on_it(model, batch):
    """On a quadratic potential the grid's values obey their own second differences, and at the origin z(T)'s value."""
    found = follow(model, batch, sampler())
    assert found["coordinates"].shape == (41, 3, 2) and found["potential"].shape == (3, GRID, GRID)
    for chain in range(3):
        a, b = found["grid"][chain]
        values = found["potential"][chain].flatten()
        columns = [torch.ones(GRID, GRID), a[:, None] ** 2, a[:, None] * b, b**2, a[:, None], b]
        design = torch.stack([(c * torch.ones(GRID, GRID)).double().flatten() for c in columns], 1)
        fit = torch.linalg.lstsq(design, values).solution
        torch.testing.assert_close(design @ fit, values)  # a quadratic in the plane, exactly
        torch.testing.assert_close(-fit[0], found["log_joint"][-1, chain])  # at z(T)


def test_the_plane_holds_the_largest_share_of_the_movement(model, batch):
    """Variances along the directions fall, and are in proportion to the explained shares, which sum to at most 1."""
    found = follow(model, batch, sampler())
    again = follow(model, batch, sampler())
    assert torch.equal(found["coordinates"], again["coordinates"])  # named random numbers
    variance = found["coordinates"].var(0)  # along each direction
    assert (variance[:, 0] >= variance[:, 1]).all() and (found["explained"].sum(1) <= 1 + 1e-12).all()
    ratio = variance[:, 1] / variance[:, 0]
    torch.testing.assert_close(ratio, found["explained"][:, 1] / found["explained"][:, 0])


def test_every_state_lies_inside_its_grid_and_ends_at_the_origin(model, batch):
    found = follow(model, batch, sampler())
    low, high = found["grid"].amin(2), found["grid"].amax(2)
    assert (found["coordinates"] >= low).all() and (found["coordinates"] <= high).all()
    assert (found["coordinates"][-1] == 0).all()
    assert (found["coordinates"][0] >= 0).all()


def test_predictive_coding_climbs_and_langevin_starts_where_it_does(model, batch):
    """Without noise and with a small step log p(x, z) never falls; both samplers begin at one z(0)."""
    quiet, noisy = follow(model, batch, sampler(Map)), follow(model, batch, sampler())
    assert (quiet["log_joint"].diff(dim=0) > 0).all()
    torch.testing.assert_close(quiet["log_joint"][0], noisy["log_joint"][0])


def test_a_single_step_spans_a_line(model, batch):
    found = follow(model, batch, sampler(num_steps=1))
    torch.testing.assert_close(found["explained"][:, 0], torch.ones(3, dtype=torch.float64))
    assert (found["coordinates"][:, :, 1].abs() < 1e-12).all() and found["potential"].isfinite().all()


def test_the_encoders_variance_preconditions_trajectories_too(model, batch):
    """With G = ½ from q the chain is the plain one of half the step size."""
    encoder = lambda batch: DiagonalGaussian(torch.zeros(3, 4).double(), torch.full((3, 4), 0.5).double())
    halved = Langevin(40, "all", Constant(0.02), EncoderVariance(1.0))
    plain = Langevin(40, "all", Constant(0.01), Identity())
    found, expected = (trajectory(model, encoder, chosen, batch, 0, GRID) for chosen in (halved, plain))
    torch.testing.assert_close(found["log_joint"], expected["log_joint"])


def test_what_is_not_finite_is_not_kept(model, batch, tmp_path, caplog):
    wild = Langevin(400, "all", Constant(50.0), Identity())
    Traces([1], 3, GRID).follow(tmp_path / "t.npz", model, None, wild, batch, 0)
    assert not list(tmp_path.iterdir()) and "no trajectories" in caplog.text
    far = Langevin(3, "all", Constant(1e9), Identity())  # finite states, whose squares are beyond float32
    assert trajectory(model.float(), None, far, Batch(batch.x.float(), batch.index), 0, GRID) is None
    Traces([1], 3, GRID).follow(tmp_path / "t.npz", model, None, NoSteps(None, None), batch, 0)
    assert not list(tmp_path.iterdir())


def test_only_the_named_updates_are_watched(tmp_path):
    traces = Traces([3], 0, GRID)
    assert traces.watch(2) is None and isinstance(traces.watch(3), Trace)
    traces.keep(tmp_path, 3, Trace())  # a run without a chain
    assert not list(tmp_path.iterdir())


def test_a_run_keeps_what_its_log_averages(command, workplace):
    assert command(*TINY).code == 0
    (run,) = (workplace / "outputs/default").iterdir()
    names = sorted(path.name for path in (run / "traces").iterdir())
    assert names == ["update-000000002.npz", "update-000000004.npz"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    with np.load(run / "traces" / names[1]) as stored:
        values, norms = stored["log_joint"].mean(1), stored["drift_norm"].mean(1)
    row = next(row for row in rows if row["update"] == 4)
    np.testing.assert_allclose(row["chain/delta_log_joint"], values[-1] - values[0], rtol=1e-3)
    np.testing.assert_allclose([row["chain/drift_norm_first"], row["chain/drift_norm_last"]], norms[[0, -1]], rtol=1e-5)
    with np.load(run / "trajectories.npz") as stored:
        assert {name.split("_")[0] for name in stored.files} == {"langevin", "map", "images"}


def test_a_vae_keeps_none(command, workplace):
    assert command(*TINY_VAE, "method=vae").code == 0
    (run,) = (workplace / "outputs/default").iterdir()
    assert not (run / "traces").exists() and not (run / "trajectories.npz").exists()
