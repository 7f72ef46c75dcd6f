"""Networks against the paper's Table 2, and the linear model against Gaussian algebra."""

import copy
import math
import operator

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal

from lpc_runner.base.distributions import Bernoulli, DiscretisedGaussian, Gaussian
from lpc_runner.data.dataset import Batch
from lpc_runner.models.conv import Conv
from lpc_runner.models.dense import MLP, Linear
from lpc_runner.models.latent import Encoder
from lpc_runner.models.upsampling import Doubling, FromPoint

# Side of the feature maps after every layer of Table 2.
DECODER_SIDES = {64: [1, 4, 8, 16, 32, 64], 32: [1, 4, 8, 16, 16, 32], 28: [1, 4, 8, 16, 14, 28]}
ENCODER_SIDES = {64: [22, 11, 5, 2, 1], 32: [16, 8, 4, 2, 1], 28: [14, 7, 3, 2, 1]}
DECODER_KERNELS = {64: [4, 4, 4, 4, 4], 32: [4, 4, 4, 3, 4], 28: [4, 4, 4, 3, 4]}
ENCODER_KERNELS = {64: [3, 4, 4, 4, 4], 32: [4, 4, 4, 4, 4], 28: [4, 4, 4, 3, 4]}
DECODER_WIDTHS, ENCODER_WIDTHS = [256, 64, 64, 32, 32], [32, 32, 64, 64, 256]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def conv(side, channels, latent_dim=40):
    return Conv((channels, side, side), latent_dim, 1.0, DiscretisedGaussian("learned", 0.1, 0.99), 0.3)


def maps_of(network, run):
    """(channels, side) of every convolution's output, by hooks."""
    seen = []
    for layer in network.modules():
        if isinstance(layer, (nn.Unflatten, nn.Conv2d, nn.ConvTranspose2d)):
            layer.register_forward_hook(lambda _, __, out: seen.append((out.shape[1], *out.shape[2:])))
    run()
    return seen


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def weights(widths, kernels):
    """Σ in · out · k² + out over a chain of convolutions."""
    return sum(a * b * k * k + b for a, b, k in zip(widths, widths[1:], kernels))


@pytest.mark.parametrize("side", [64, 32, 28])
@pytest.mark.parametrize("channels", [1, 3])
def test_conv_is_table_2(side, channels):
    """Every feature map, and the number of weights the table implies."""
    model = conv(side, channels)
    encoder = model.build_encoder()
    maps = maps_of(model.decoder, lambda: model.decode(torch.randn(2, 40)))
    assert maps == [(c, s, s) for c, s in zip([*DECODER_WIDTHS, channels], DECODER_SIDES[side])]
    batch = Batch(torch.rand(2, channels, side, side), torch.arange(2))
    maps = maps_of(encoder, lambda: encoder(batch))
    assert maps == [(c, s, s) for c, s in zip(ENCODER_WIDTHS, ENCODER_SIDES[side])]
    linear = 40 * 256 + 256
    assert count(model.decoder) == linear + weights([*DECODER_WIDTHS, channels], DECODER_KERNELS[side])
    assert count(model) == count(model.decoder) + 1  # and log σ
    assert count(encoder) == weights([channels, *ENCODER_WIDTHS], ENCODER_KERNELS[side]) + 256 * 80 + 80


def test_conv_has_silu_between_layers_and_none_after_the_last():
    model = conv(32, 3)
    for network in (model.decoder, model.build_encoder().body):
        kinds = [type(layer) for layer in network if not isinstance(layer, (nn.Flatten, nn.Unflatten))]
        assert kinds[1::2] == [nn.SiLU] * (len(kinds) // 2)
        assert nn.SiLU not in kinds[::2] and len(kinds) % 2 == 1


@pytest.mark.parametrize("shape", [(3, 30, 30), (1, 28, 32), (64, 64)])
def test_conv_rejects_other_sides(shape):
    with pytest.raises(ValueError, match="28, 32, 64"):
        Conv(shape, 40, 1.0, DiscretisedGaussian("learned", 0.1, 0.99), 0.3)


def test_encoder_reads_mean_and_softplus_variance():
    """variance = log(1 + exp(β raw))/β with β = 0.3, from the second half of the network's output."""
    encoder = Encoder(nn.Identity(), 0.3)
    q = encoder(Batch(torch.tensor([[1.0, -2.0, -30.0, 0.0], [3.0, 4.0, 2.0, 50.0]]), torch.arange(2)))
    assert q.mean.tolist() == [[1, -2], [3, 4]]
    want = [[math.log1p(math.exp(0.3 * raw)) / 0.3 for raw in row] for row in ([-30, 0], [2, 50])]
    torch.testing.assert_close(q.variance, torch.tensor(want), rtol=1e-6, atol=0)


def test_mlp_layers():
    """Widths latent -> hidden -> data, the encoder in reverse, log p(x, z) as the sum of its parts."""
    model = MLP((2, 3, 5), 4, 1.5, Gaussian("fixed", 0.3, 0.9), 0.3, [7, 11])
    encoder = model.build_encoder()
    assert count(model) == (4 * 7 + 7) + (7 * 11 + 11) + (11 * 30 + 30)
    assert count(encoder) == (30 * 11 + 11) + (11 * 7 + 7) + (7 * 8 + 8)
    z, x = torch.randn(6, 4), torch.randn(6, 2, 3, 5)
    hidden = z
    for layer in [layer for layer in model.decoder if isinstance(layer, nn.Linear)]:
        last = hidden @ layer.weight.T + layer.bias
        hidden = last * torch.sigmoid(last)
    mean = last.reshape(6, 2, 3, 5)
    torch.testing.assert_close(model.decode(z), mean)
    log_x = torch.distributions.Normal(mean, 0.3).log_prob(x).sum((1, 2, 3))
    log_z = torch.distributions.Normal(0.0, 1.5).log_prob(z).sum(1)
    torch.testing.assert_close(model.log_joint(x, z), log_x + log_z)


def test_mlp_of_the_published_tables():
    """Burda et al. (2016): 50 latents, two layers of 200 tanh each way, binary pixels."""
    model = MLP((1, 28, 28), 50, 1.0, Bernoulli(), 0.3, [200, 200], "tanh")
    for network, sizes in ((model.decoder, [50, 200, 200, 784]), (model.build_encoder().body, [784, 200, 200, 100])):
        layers = [layer for layer in network if isinstance(layer, nn.Linear)]
        assert [layers[0].in_features, *(layer.out_features for layer in layers)] == sizes
        assert sum(isinstance(layer, nn.Tanh) for layer in network) == 2
    z = torch.randn(3, 50)
    hidden = torch.tanh(model.decoder[2](torch.tanh(model.decoder[0](z))))
    logits = model.decoder[4](hidden).unflatten(1, (1, 28, 28))
    torch.testing.assert_close(model.decode(z), 2 * torch.sigmoid(logits) - 1)
    x = torch.randint(2, (3, 1, 28, 28)) * 2.0 - 1
    log_x = torch.distributions.Bernoulli(logits=logits).log_prob((x + 1) / 2).sum((1, 2, 3))
    torch.testing.assert_close(model.log_joint(x, z), log_x + model.prior.log_prob(z))


@pytest.fixture
def linear():
    return Linear((1, 2, 4), 3, 1.6, Gaussian("learned", 0.4, 0.9), 0.3).double()


def test_linear_posterior_by_conditioning_the_joint(linear):
    """p(z|x) from the joint covariance [[s²I, s²Wᵀ], [s²W, s²WWᵀ + σ²I]] by the Schur complement."""
    weight, bias, s2 = linear.decoder[0].weight, linear.decoder[0].bias, 1.6**2
    marginal = s2 * weight @ weight.T + linear.likelihood.log_scale.exp() ** 2 * torch.eye(8)
    gain = s2 * weight.T @ torch.linalg.inv(marginal)
    x = torch.randn(5, 1, 2, 4, dtype=torch.float64)
    posterior = linear.posterior(x)
    torch.testing.assert_close(posterior.mean, (x.flatten(1) - bias) @ gain.T)
    covariance = s2 * torch.eye(3) - s2 * gain @ weight
    torch.testing.assert_close(posterior.covariance_matrix, covariance.expand(5, 3, 3))
    torch.testing.assert_close(linear.log_evidence(x), MultivariateNormal(bias, marginal).log_prob(x.flatten(1)))


def test_linear_evidence_by_brute_force():
    """log p(x) = log ∫ p(x, z) dz by a sum over a grid of z in one dimension."""
    model = Linear((3,), 1, 0.8, Gaussian("fixed", 0.5, 0.9), 0.3).double()
    grid = torch.linspace(-9, 9, 20001, dtype=torch.float64)[:, None]
    for x in torch.randn(3, 1, 3, dtype=torch.float64):
        total = torch.logsumexp(model.log_joint(x.expand(len(grid), 3), grid), 0) + math.log(18 / 20000)
        assert total.item() == pytest.approx(model.log_evidence(x).item(), abs=1e-9)


def test_linear_bayes_rule(linear):
    """log p(x, z) - log p(z|x) = log p(x) for every z."""
    x = torch.randn(5, 1, 2, 4, dtype=torch.float64)
    for scale in (0.1, 1.0, 5.0):
        z = scale * torch.randn(5, 3, dtype=torch.float64)
        evidence = linear.log_joint(x, z) - linear.posterior(x).log_prob(z)
        torch.testing.assert_close(evidence, linear.log_evidence(x))


def test_linear_needs_a_gaussian():
    for likelihood in (DiscretisedGaussian("fixed", 0.5, 0.9), Bernoulli()):
        with pytest.raises(ValueError, match="likelihood=gaussian"):
            Linear((3,), 1, 1.0, likelihood, 0.3)


def test_optimal_scale_is_observed_once_per_call(linear):
    """model.observe moves σ² to the mean squared error at z, and leaves a learned σ alone."""
    x, z = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    model = Linear((4,), 2, 1.0, Gaussian("optimal", 0.4, 0.9), 0.3).double()
    model.observe(x, z)
    error = (x - model.decode(z)).square().mean().item()
    assert math.exp(2 * model.likelihood.log_scale.item()) == pytest.approx(error)
    before = linear.likelihood.log_scale.item()
    linear.observe(torch.randn(5, 1, 2, 4).double(), torch.randn(5, 3).double())
    assert linear.likelihood.log_scale.item() == before


def test_first_transposed_convolution_is_a_matrix_product():
    """Value and gradients of torch's own layer, from the same parameters, in either memory format."""
    torch.manual_seed(0)
    for layout in (torch.contiguous_format, torch.channels_last):
        ours = FromPoint(6, 5, 4, 1, 0).double().to(memory_format=layout)
        theirs = torch.nn.ConvTranspose2d(6, 5, 4, 1, 0).double()
        theirs.load_state_dict(ours.state_dict())
        hidden = torch.randn(3, 6, 1, 1, dtype=torch.float64, requires_grad=True)
        seed = torch.randn(3, 5, 4, 4, dtype=torch.float64)
        one, other = (layer(hidden) for layer in (ours, theirs))
        torch.testing.assert_close(one, other)
        gradients = [
            torch.autograd.grad((out * seed).sum(), [hidden, *layer.parameters()])
            for out, layer in ((one, ours), (other, theirs))
        ]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("out_channels", [1, 3, 4, 7])
def test_doubling_is_torchs_transposed_convolution(out_channels):
    """Value and gradients from the same parameters, sides that differ, either memory format."""
    for layout in (torch.contiguous_format, torch.channels_last):
        ours = Doubling(5, out_channels).double().to(memory_format=layout)
        theirs = nn.ConvTranspose2d(5, out_channels, 4, 2, 1).double()
        theirs.load_state_dict(ours.state_dict())
        hidden = torch.randn(3, 5, 4, 6, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
        one, other = ours(hidden), theirs(hidden)
        assert one.shape == (3, out_channels, 8, 12)
        torch.testing.assert_close(one, other)
        seed = torch.randn_like(other)
        gradients = [
            torch.autograd.grad(out, [hidden, *layer.parameters()], seed)
            for out, layer in ((one, ours), (other, theirs))
        ]
        torch.testing.assert_close(*gradients)


def test_doubling_in_bfloat16_sums_weight_gradients_in_float32():
    """Under autocast: bfloat16 out, float32 gradients of θ, nearer to the exact ones than torch's own layer's."""
    ours, theirs = Doubling(16, 3), nn.ConvTranspose2d(16, 3, 4, 2, 1)
    theirs.load_state_dict(ours.state_dict())
    hidden = torch.randn(64, 16, 16, 16)
    seed, gradients = torch.randn(64, 3, 32, 32).bfloat16(), {}
    for layer in (ours, theirs):
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(hidden)
        assert out.dtype == torch.bfloat16
        gradients[layer] = torch.autograd.grad(out, list(layer.parameters()), seed)
    exact = copy.deepcopy(theirs).double()
    wanted = torch.autograd.grad(exact(hidden.double()), list(exact.parameters()), seed.double())
    errors = {
        layer: [((one - want).norm() / want.norm()).item() for one, want in zip(found, wanted)]
        for layer, found in gradients.items()
    }
    assert {gradient.dtype for gradient in gradients[ours]} == {torch.float32}
    assert max(errors[ours]) < 1e-2 and all(map(operator.le, errors[ours], errors[theirs]))
