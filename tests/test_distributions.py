"""Densities against high-precision arithmetic, torch.distributions and finite differences."""

import ctypes
import math
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli as TorchBernoulli
from torch.distributions import Normal, kl_divergence

from lpc_runner.base.bins import KERNEL, _kernel
from lpc_runner.base.distributions import (
    Bernoulli,
    DiagonalGaussian,
    DiscretisedGaussian,
    Gaussian,
    Poisson,
    Prior,
    log_bin_probability,
    log_normal,
)
from lpc_runner.base.likelihoods import Likelihood, draw, fault_of, lacking

SCALES = (1e-3, 1e-2, 0.1, 0.3, 1.0, 10.0)
LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def exact(x, mean, sigma):
    """log P, d log P / d mean and d log P / d log σ of one bin, with 60 digits."""
    with mpmath.workdps(60):
        x, mean, sigma, half = mpmath.mpf(x), mpmath.mpf(mean), mpmath.mpf(sigma), 1 / mpmath.mpf(255)
        low, high = (x - half - mean) / sigma, (x + half - mean) / sigma
        has_low, has_high = x > -1 + half, x < 1 - half

        def below(y):  # Φ by erfc: full relative precision in either tail
            return mpmath.erfc(-y / mpmath.sqrt(2)) / 2

        if not has_high:
            probability = below(-low)
        elif not has_low:
            probability = below(high)
        elif low > 0:
            probability = below(-low) - below(-high)
        else:
            probability = below(high) - below(low)
        at_low = mpmath.npdf(low) if has_low else mpmath.mpf(0)
        at_high = mpmath.npdf(high) if has_high else mpmath.mpf(0)
        to_mean = (at_low - at_high) / sigma / probability
        to_scale = ((low if has_low else 0) * at_low - (high if has_high else 0) * at_high) / probability
        return float(mpmath.log(probability)), float(to_mean), float(to_scale)


def computed(x, mean, sigma, dtype):
    """The same three numbers of `log_bin_probability`, and the arguments as that precision rounds them."""
    x = torch.tensor(x, dtype=dtype)
    mean = torch.tensor(mean, dtype=dtype, requires_grad=True)
    log_scale = torch.tensor(math.log(sigma), dtype=dtype, requires_grad=True)
    value = log_bin_probability(x, mean, log_scale)
    to_mean, to_scale = torch.autograd.grad(value, [mean, log_scale])
    # σ as computed from log_scale, by which the exact value is measured
    return (value.item(), to_mean.item(), to_scale.item()), (
        x.item(),
        mean.item(),
        log_scale.double().exp().item(),
    )


CASES = [
    (level, offset)
    for level in (0, 1, 100, 128, 254, 255)
    for offset in (0.0, 1e-4, -0.002, 0.02, -0.3, 0.9, -1.7, 3.0)
]


@pytest.mark.parametrize("sigma", SCALES)
def test_log_bin_probability_float64(sigma):
    """Value and both derivatives to 1e-9 relative (1e-10 absolute) at bins of core, tail and both ends.

    A bin is 2/(255 σ) standard deviations wide: the difference of two erfc loses at most 4 of 16 digits.
    """
    for level, offset in CASES:
        x = float(LEVELS[level])
        got, point = computed(x, x + offset, sigma, torch.float64)
        np.testing.assert_allclose(got, exact(*point), rtol=1e-9, atol=1e-10, err_msg=f"{level} {offset}")


@pytest.mark.parametrize("sigma", SCALES)
def test_log_bin_probability_float32(sigma):
    """In float32 the error is that of an argument moved by a rounding, divided by the width of the bin."""
    rounding = 2.0**-23
    for level, offset in CASES:
        x = float(LEVELS[level])
        got, point = computed(x, x + offset, sigma, torch.float32)
        value, to_mean, to_scale = exact(*point)
        # Narrow bins (h small) are differences of nearly equal numbers: relative error 2⁻²³/h of P.
        narrow = rounding * 255 * sigma
        moved = rounding * (abs(to_mean) + abs(to_scale) * math.log(1 / 1e-4))
        np.testing.assert_allclose(got[0], value, rtol=4e-6, atol=8 * (narrow + moved + rounding))
        slope_error = 8 * (narrow / sigma * 4 + rounding * (1 / sigma**2 + abs(to_mean) / sigma))
        np.testing.assert_allclose(got[1], to_mean, rtol=1e-4, atol=slope_error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sigma", SCALES)
@pytest.mark.parametrize("mean", [0.0, 0.37, -1.0, 1.0, 5.0, -40.0])
def test_256_bins_sum_to_one(dtype, sigma, mean):
    """Σ_l P(l) = 1 wherever the mean is, also far outside [-1, 1], where an end bin takes everything."""
    log_scale = torch.tensor(math.log(sigma), dtype=dtype)
    log_p = log_bin_probability(LEVELS.to(dtype), torch.full((256,), mean, dtype=dtype), log_scale)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5 * max(1.0, sigma)
    assert log_p.double().exp().sum().item() == pytest.approx(1, abs=tolerance)
    assert log_p.isfinite().all()


def test_end_bins_are_open():
    """At x = ±1 the probability is a whole tail: half (and the bin's own half) at mean = ±1, 1 beyond."""
    log_scale = torch.tensor(math.log(0.1), dtype=torch.float64)
    x = torch.tensor([1.0, -1.0], dtype=torch.float64)
    half = 0.5 * math.erfc(-(1 / 255) / 0.1 / math.sqrt(2))
    torch.testing.assert_close(log_bin_probability(x, x, log_scale).exp(), torch.full_like(x, half))
    assert log_bin_probability(x, 3 * x, log_scale).tolist() == pytest.approx([0, 0], abs=1e-15)


@pytest.mark.parametrize("sigma", [0.01, 0.1, 1.0])
def test_gradcheck(sigma):
    """Analytic derivatives against finite differences, in core, tail and end bins (u up to 60σ)."""
    x = LEVELS[[0, 0, 0, 1, 90, 128, 200, 254, 255, 255, 255]]
    away = torch.tensor([0.5, -2.0, 30.0, 1.0, 60.0, 0.3, -26.0, -40.0, 2.0, -0.4, -35.0], dtype=torch.float64)
    mean = (x + sigma * away).requires_grad_()
    log_scale = torch.tensor(math.log(sigma), dtype=torch.float64, requires_grad=True)
    f = lambda mean, log_scale: log_bin_probability(x, mean, log_scale)
    assert torch.autograd.gradcheck(f, (mean, log_scale), eps=1e-7 * sigma, atol=1e-4, rtol=1e-5)


def test_gradient_lives_in_the_far_tail_in_float32():
    """40σ away float32 still gives the drift (about 40/σ), which a clamped difference of cdfs turns to 0."""
    for sigma in (0.01, 0.04):
        for level, side in ((128, 1), (128, -1), (0, 1), (255, -1)):
            x = float(LEVELS[level])
            got, point = computed(x, x + side * 40 * sigma, sigma, torch.float32)
            want = exact(*point)
            assert abs(want[1]) > 30 / sigma
            np.testing.assert_allclose(got, want, rtol=2e-5)


CALL = """
extern "C" __global__ void of_%s(%s* a, double c) {
  log_bin_probability<%s>(a[0], a[1], a[2], c, c, c, a[3], a[4], a[5]);
}
"""


def test_the_kernel_of_a_gpu_compiles_without_one():
    """torch's jiterator reads its name; NVRTC, called as torch calls it, compiles it in both precisions.

    What it computes: `test_simulated_device.py`.
    """
    assert _kernel().kernel_name == "log_bin_probability"
    libraries = list(Path(torch.__file__).parents[1].glob("nvidia/*/lib/libnvrtc.so.*"))
    if not libraries:
        pytest.skip("this torch comes without NVRTC")
    nvrtc, program = ctypes.CDLL(str(libraries[0])), ctypes.c_void_p()
    code = KERNEL + "".join(CALL % (dtype, dtype, dtype) for dtype in ("float", "double"))
    options = [b"--std=c++17", b"--gpu-architecture=compute_80", b"-default-device"]
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), code.encode(), None, 0, None, None) == 0
    assert nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options)) == 0
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def test_likelihoods_sum_over_dimensions():
    """forward = Σ over all dimensions of the elementwise log-density, per example."""
    x = LEVELS[torch.randint(256, (3, 2, 4, 4))].float()
    mean = torch.randn(3, 2, 4, 4) * 0.3
    gaussian = Gaussian("fixed", 0.7, 0.9)
    want = Normal(mean, 0.7).log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(gaussian(x, mean), want)
    torch.testing.assert_close(log_normal(x, mean, torch.tensor(math.log(0.7))), Normal(mean, 0.7).log_prob(x))
    discrete = DiscretisedGaussian("fixed", 0.2, 0.9)
    width = 2 / 255  # a bin's mass is density times width up to the curvature, (width/σ)²/24 = 6e-5, per pixel
    inner = (x.abs() < 0.99).double()
    approximate = (Normal(mean, 0.2).log_prob(x) + math.log(width)) * inner
    torch.testing.assert_close((discrete.density(x, mean) * inner).double(), approximate, atol=5e-3, rtol=1e-4)


def test_bernoulli_is_the_probability_of_binary_pixels():
    """Value and gradient of torch.distributions', and finite where a float32 probability is 0 or 1."""
    x, predictor = torch.randint(2, (5, 2, 3)) * 2.0 - 1, 20 * torch.randn(5, 2, 3)
    predictor[0, 0, 0], x[0, 0, 0] = 300.0, -1.0
    predictor.requires_grad_()
    likelihood = Bernoulli()
    value = likelihood(x, predictor)
    exact = predictor.detach().double().requires_grad_()
    want = TorchBernoulli(logits=exact).log_prob((x.double() + 1) / 2).sum((1, 2))
    torch.testing.assert_close(value.double(), want, rtol=1e-6, atol=1e-6)
    found, known = torch.autograd.grad(value.sum(), predictor)[0], torch.autograd.grad(want.sum(), exact)[0]
    torch.testing.assert_close(found.double(), known, rtol=1e-6, atol=1e-7)
    total = sum(likelihood.density(torch.full_like(x, level), predictor).exp() for level in (-1.0, 1.0))
    torch.testing.assert_close(total, torch.ones_like(total))


def test_bernoulli_reads_grey_pixels_as_probabilities():
    """The expectation over binary draws of log p; the mean is 2 s(η) - 1."""
    grey, predictor, likelihood = torch.rand(4, 3), torch.randn(4, 3), Bernoulli()
    white, black = (likelihood.density(torch.full_like(grey, level), predictor) for level in (1.0, -1.0))
    expected = (grey * white + (1 - grey) * black).sum(1)
    torch.testing.assert_close(likelihood(2 * grey - 1, predictor), expected)
    torch.testing.assert_close(likelihood.mean(predictor), 2 * white.exp() - 1)


def test_every_likelihood_is_one():
    """Of the protocol, on images and series; only a Gaussian has a variance for closed forms."""
    gaussian = Gaussian("optimal", 0.5, 0.9)
    others = DiscretisedGaussian("learned", 0.5, 0.9), Bernoulli(), Poisson("exp", 4.0, 0.2)
    for likelihood in (gaussian, *others):
        assert isinstance(likelihood, Likelihood) and lacking(likelihood) is None
        assert fault_of(likelihood, (1, 4, 4)) is fault_of(likelihood, (6, 5)) is None
    assert int(gaussian.num_observed) == 0  # what is tried is a copy
    assert gaussian.gaussian_variance().item() == pytest.approx(0.25)
    assert [likelihood.gaussian_variance() for likelihood in others] == [None] * 3


def test_scales():
    """fixed: no parameter; learned: one; optimal: σ² = w·σ² + (1 - w)·MSE, the first batch alone at first."""
    assert list(Gaussian("fixed", 0.5, 0.9).parameters()) == []
    (parameter,) = DiscretisedGaussian("learned", 0.5, 0.9).parameters()
    assert parameter.shape == () and parameter.item() == pytest.approx(math.log(0.5))
    for likelihood, limit in ((Gaussian, math.inf), (DiscretisedGaussian, 1.0)):
        optimal = likelihood("optimal", 0.5, 0.75)
        assert list(optimal.parameters()) == []
        running = None
        for _ in range(4):
            # Means beyond ±1 are no error of levels, whose end bins are open; they are one of real values.
            x, mean = torch.rand(5, 3) * 2 - 1, 2 * torch.randn(5, 3)
            error = (x - mean.clamp(-limit, limit)).square().mean().item()
            running = error if running is None else 0.75 * running + 0.25 * error
            optimal.observe(x, mean)
            assert math.exp(2 * optimal.log_scale.item()) == pytest.approx(running, rel=1e-5)


def test_prior():
    """log N(0, s²I) and its score, against torch.distributions and autograd."""
    prior, z = Prior(1.7), torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    value = prior.log_prob(z)
    torch.testing.assert_close(value, Normal(0.0, 1.7).log_prob(z).sum(1))
    torch.testing.assert_close(prior.score(z), torch.autograd.grad(value.sum(), z)[0])


def test_diagonal_gaussian():
    """log-density and KL against torch.distributions; rsample is mean + sd ⊙ noise, differentiably."""
    mean = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    variance = (torch.rand(6, 3, dtype=torch.float64) + 0.1).requires_grad_()
    q, reference = DiagonalGaussian(mean, variance), Normal(mean, variance.sqrt())
    z, noise = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    torch.testing.assert_close(q.log_prob(z), reference.log_prob(z).sum(1))
    want = kl_divergence(reference, Normal(torch.zeros_like(mean), torch.full_like(mean, 1.3)))
    torch.testing.assert_close(q.kl(Prior(1.3)), want.sum(1))
    torch.testing.assert_close(q.kl_per_dimension(Prior(1.3)), want)
    sample = q.rsample(noise)
    torch.testing.assert_close(sample, mean + variance.sqrt() * noise)
    to_mean, to_variance = torch.autograd.grad(sample.sum(), [mean, variance])
    torch.testing.assert_close(to_mean, torch.ones_like(mean))
    torch.testing.assert_close(to_variance, noise / (2 * variance.sqrt()))
    assert not q.detach().mean.requires_grad and not q.detach().variance.requires_grad


@pytest.mark.parametrize(
    ("likelihood", "support"),
    [
        (DiscretisedGaussian("fixed", 0.4, 0.9), LEVELS),
        (Bernoulli(), torch.tensor([-1.0, 1.0], dtype=torch.float64)),
        (Poisson("exp", 4.0, 0.2), torch.arange(30, dtype=torch.float64)),
        (Gaussian("fixed", 0.4, 0.9), None),
    ],
)
def test_draws_have_the_law_that_the_density_says(likelihood, support):
    """The share of every value is its probability; a Gaussian's draws have its mean and variance."""
    predictor = torch.full((100_000,), 0.7, dtype=torch.float64)
    x = draw(likelihood.double(), predictor, torch.Generator().manual_seed(0))
    if support is None:
        assert x.mean().item() == pytest.approx(0.7, abs=0.01) and x.std().item() == pytest.approx(0.4, abs=0.01)
        return
    expected = likelihood.density(support, torch.full_like(support, 0.7)).exp()
    assert expected.sum().item() == pytest.approx(1, abs=1e-6)
    nearest = (x[:, None] - support).abs().min(1)
    assert nearest.values.max() < 1e-9
    found = torch.bincount(nearest.indices, minlength=len(support)) / len(x)
    assert (found - expected).abs().max() < 0.006


def test_a_likelihood_may_have_no_draws():
    assert draw(torch.nn.Identity(), torch.zeros(3), torch.Generator()) is None
