"""The numbers about features against closed forms, the published code, and what they are meant to say."""

import itertools
import math

import numpy as np
import prdc
import pytest
import scipy.linalg
import torch
from torch.nn import functional

from lpc_runner.base.distributions import Bernoulli, DiscretisedGaussian
from lpc_runner.base.errors import UserError
from lpc_runner.base.tensors import generator
from lpc_runner.data.dataset import Batch
from lpc_runner.data.digits import Digits
from lpc_runner.evaluation import distances
from lpc_runner.evaluation.bounds import encoder_bound
from lpc_runner.evaluation.distances import (
    FeatureMoments,
    compare_neighbours,
    coverage_ceiling,
    frechet_distance,
    kernel_distance,
    moments,
    squared_radii,
)
from lpc_runner.models.dense import MLP

K = 5
ROW = 48 * 300  # bytes of working memory for one row of distances to 300 points


def normal(*shape, stream="features", counter=0):
    return torch.randn(*shape, generator=generator(0, f"test/{stream}", counter))


# Fréchet distance


def test_frechet_of_diagonal_gaussians_is_the_closed_form():
    first, second = torch.rand(2, 30, generator=generator(0, "test/scales"), dtype=torch.float64) + 0.1
    means = normal(2, 30).double()
    distance = frechet_distance(
        FeatureMoments(means[0], torch.diag(first**2)), FeatureMoments(means[1], torch.diag(second**2))
    )
    expected = ((means[0] - means[1]) ** 2).sum() + ((first - second) ** 2).sum()
    assert distance == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize("num_first", [400, 12])  # 12 points in 20 dimensions: no Cholesky factor
def test_frechet_agrees_with_the_matrix_square_root(num_first):
    mixing = normal(20, 20, stream="mixing")
    first = moments(normal(num_first, 20) @ mixing + 1)
    second = moments(normal(300, 20, counter=1))
    root = scipy.linalg.sqrtm(second.covariance.numpy()).real
    inner = scipy.linalg.sqrtm(root @ first.covariance.numpy() @ root + 1e-13 * np.eye(20)).real
    expected = (first.mean - second.mean).square().sum() + first.covariance.trace() + second.covariance.trace()
    expected = expected.item() - 2 * np.trace(inner)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("num_examples", [200, 15])
def test_frechet_of_a_set_with_itself_is_zero_and_of_a_shift_its_square(num_examples):
    first = normal(num_examples, 32)
    summary = moments(first)
    assert frechet_distance(summary, moments(first.flip(0))) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(summary, moments(first + 2)) == pytest.approx(4 * 32, rel=1e-5)


def test_moments_are_numpys_whatever_the_chunk():
    values = normal(300, 7) * 3 + 100
    summary = moments(values, chunk=64)
    np.testing.assert_allclose(summary.mean, values.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(summary.covariance, np.cov(values.double().numpy().T), rtol=1e-9, atol=1e-12)
    with pytest.raises(UserError, match="at least 2 images"):
        moments(values[:1])


# Precision, recall, density, coverage


@pytest.mark.parametrize("offset", [0, 100])  # float32 distances of raw features at 100 are far off
def test_neighbours_agree_with_prdc(offset):
    real, fake = normal(300, 16) + offset, normal(200, 16, counter=1) * 0.9 + 0.1 + offset
    expected = prdc.compute_prdc(real.double().numpy(), fake.double().numpy(), K)
    found = compare_neighbours(real, fake, K, budget=64 * ROW)
    assert found == pytest.approx({name: float(value) for name, value in expected.items()}, abs=1e-12)
    assert 0.1 < found["density"] < 2 and 0.1 < found["recall"] < 1  # and the case says something


def test_neighbours_ignore_chunks_and_order():
    real, fake = normal(150, 8), normal(170, 8, counter=1) * 1.2
    whole = compare_neighbours(real, fake, K)
    shuffled = torch.randperm(170, generator=generator(0, "test/order"))
    for chunk in (1, 7, 64):
        assert compare_neighbours(real.flip(0), fake[shuffled], K, budget=chunk * ROW) == whole
    radii = squared_radii(real, K, budget=7 * ROW)
    assert compare_neighbours(real, fake, K, reference_radii=radii) == whole


def brute_force(real, fake, k):
    """Direct differences in float64 for every pair."""
    between, within = torch.cdist(real.double(), fake.double(), compute_mode="donot_use_mm_for_euclid_dist"), []
    for points in (real, fake):
        distances = torch.cdist(points.double(), points.double(), compute_mode="donot_use_mm_for_euclid_dist")
        within.append(distances.kthvalue(k + 1, dim=1).values * (1 - 1e-9))
    inside, recalled = between < within[0][:, None], between < within[1]
    return {
        "precision": inside.any(0).double().mean().item(),
        "recall": recalled.any(1).double().mean().item(),
        "density": inside.sum().item() / (k * len(fake)),
        "coverage": inside.any(1).double().mean().item(),
    }


@pytest.mark.parametrize("copied", [0, 3, 150])
@pytest.mark.parametrize("spread", [1.0, 0.1, 1e-3])
def test_pairs_that_float32_cannot_decide_are_decided_in_float64(spread, copied):
    """Tight clusters far apart: float32 products see only noise inside them."""
    centres = normal(4, 40, stream="centres") * 10
    real, fake = ((centres.repeat(75, 1) + spread * normal(300, 40, counter=n)).float() for n in range(2))
    fake[:copied] = fake[0]
    assert compare_neighbours(real, fake, K, budget=50 * ROW) == pytest.approx(brute_force(real, fake, K), abs=1e-12)


def test_memory_is_bounded_by_the_budget():
    """Rows of a block follow from the bytes allowed, at the sizes of the paper too."""
    assert 48 * distances._rows_at_once(50_000, 2**29) * 50_000 <= 2**29


def test_radii_reach_the_kth_other_point():
    line = torch.tensor([[0.0], [1.0], [3.0], [7.0], [7.0]])
    assert squared_radii(line, 1).tolist() == pytest.approx([1, 1, 4, 0, 0])
    assert squared_radii(line, 2).tolist() == pytest.approx([9, 4, 9, 16, 16])
    with pytest.raises(UserError, match="at least 6 images, there are 5"):
        squared_radii(line, K)


@pytest.mark.parametrize("chunk", [11, 512])
def test_a_set_against_itself_keeps_the_edge_of_each_ball_outside(chunk):
    points = normal(300, 24) + 3
    found = compare_neighbours(points, points.flip(0), K, budget=chunk * ROW)
    # Inside the ball of a point: itself and its k - 1 nearest, not the k-th.
    assert found == {"precision": 1.0, "recall": 1.0, "density": 1.0, "coverage": 1.0}


@pytest.mark.parametrize("chunk", [11, 512])
def test_copies_are_inside_no_ball_of_radius_zero(chunk):
    points = normal(20, 200).repeat(K + 2, 1) * 30  # every point has more than k copies
    assert set(compare_neighbours(points, points.flip(0), K, budget=chunk * ROW).values()) == {0.0}


def test_same_distribution_has_density_one_and_the_coverage_ceiling():
    num_references, num_samples, k = 12, 8, 3
    runs = []
    for draw in range(400):
        real, fake = normal(num_references + num_samples, 2, counter=draw).split([num_references, num_samples])
        found = compare_neighbours(real, fake, k)
        runs.append([found["density"], found["coverage"]])
    runs = np.array(runs)
    error = runs.std(0) / math.sqrt(len(runs))
    expected = [1.0, coverage_ceiling(num_references, num_samples, k)]
    assert np.all(error < 0.02) and np.all(np.abs(runs.mean(0) - expected) < 4 * error)


def test_coverage_ceiling_by_hand_and_of_the_papers_sizes():
    # 3 references, 2 samples: the nearest of the 4 others is a reference in 2/4, the next too in 1/3 of it.
    assert coverage_ceiling(3, 2, 1) == pytest.approx(1 / 2)
    assert coverage_ceiling(3, 2, 2) == pytest.approx(5 / 6)
    assert coverage_ceiling(50_000, 50_000, 5) == pytest.approx(0.969, abs=5e-4)
    assert coverage_ceiling(73_257, 50_000, 5) == pytest.approx(0.926, abs=5e-4)
    assert coverage_ceiling(162_770, 50_000, 5) == pytest.approx(0.738, abs=5e-4)


def test_a_collapsed_generator_covers_nothing_though_every_sample_is_precise():
    real = normal(500, 8)
    fake = real[real.square().sum(1).argmin()] + 1e-3 * normal(500, 8, counter=1)
    found = compare_neighbours(real, fake, K)
    assert found["precision"] == 1 and found["density"] > 0.9
    assert found["coverage"] < 0.1 and found["recall"] < 0.1


# Kernel distance


def test_kernel_distance_is_the_double_loop():
    real, fake = normal(13, 4) + 1, normal(9, 4, counter=1)
    kernel = lambda x, y: (float(x.double() @ y.double()) / 4 + 1) ** 3
    mean = lambda pairs: np.mean([kernel(x, y) for x, y in pairs])
    expected = mean(itertools.permutations(real, 2)) + mean(itertools.permutations(fake, 2))
    expected -= 2 * mean(itertools.product(real, fake))
    for chunk in (4, 512):
        assert kernel_distance(real, fake, chunk=chunk) == pytest.approx(expected, rel=1e-10)


def test_kernel_distance_is_unbiased():
    values = [kernel_distance(*normal(40, 6, counter=draw).split([25, 15])) for draw in range(400)]
    error = np.std(values) / math.sqrt(len(values))
    assert abs(np.mean(values)) < 4 * error and min(values) < 0
    # With the diagonal kept it would be off by E[k(x, x) - k(x, y)] (1/25 + 1/15), about 0.9.
    assert error < 0.1


@pytest.mark.parametrize("likelihood", [Bernoulli(), DiscretisedGaussian("fixed", 0.5, 0.9)])
@pytest.mark.parametrize("binarise", ["none", "static", "dynamic"])
def test_bits_per_dimension_stand_only_where_the_bound_is_of_a_probability(binarise, likelihood):
    """Bernoulli's of binary pixels, the discretised Gaussian's of any: -ELBO / (784 log 2); the ELBO by hand."""
    torch.manual_seed(0)
    dataset = Digits(binarise)
    model = MLP(dataset.shape, 3, 1.0, likelihood, 0.3, [8])
    encoder, test = model.build_encoder(), dataset.load().test
    numbers = encoder_bound(model, encoder, dataset, test, seed=0, chunk=360)
    is_probability = binarise != "none" or isinstance(likelihood, DiscretisedGaussian)
    assert ("bits_per_dim" in numbers) == is_probability
    if is_probability:
        assert numbers["bits_per_dim"] == pytest.approx(-numbers["elbo"] / (784 * math.log(2)))
    x = dataset.to_model(test.values)
    with torch.no_grad():
        q = encoder(Batch(x, torch.arange(len(x))))
        z = q.rsample(torch.randn(q.mean.shape, generator=generator(0, "bound", 0)))
        logits = model.predict(z)
        if isinstance(likelihood, Bernoulli):
            each = functional.binary_cross_entropy(torch.sigmoid(logits), (x + 1) / 2, reduction="none")
            log_x = -each.sum((1, 2, 3))
        else:
            log_x = likelihood(x, logits)
        assert numbers["elbo"] == pytest.approx((log_x - q.kl(model.prior)).mean().item(), rel=1e-5)
