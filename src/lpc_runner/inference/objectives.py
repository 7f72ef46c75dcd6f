"""What the encoder learns from a chain: reverse KL at its start, forward KL from its states (Section 3.2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from torch import Tensor

from lpc_runner.distributions import LOG_2PI, DiagonalGaussian, Prior
from lpc_runner.inference.chain import Moments
from lpc_runner.schema import PositiveInt, at_least, checked

Weight = Annotated[float, at_least(0)]


def forward_kl(q: DiagonalGaussian, moments: Moments) -> Tensor:
    """L_F = -(1/T) Σ_t log q(z(t)|x; φ) in nats, (B,): KL(p(z|x) ‖ q) up to the posterior's entropy.

    For a diagonal Gaussian the sum over t depends on the states through two sums only, so the encoder is
    differentiated once per batch: Σ(z - m)² = Σ(z - c)² - 2(m - c) Σ(z - c) + T (m - c)², c the moments' centre.
    """
    shift = q.mean - moments.centre
    square = (moments.second - 2 * shift * moments.first) / moments.count + shift.square()
    return 0.5 * (square / q.variance + q.variance.log() + LOG_2PI).sum(1)


def reverse_kl(q: DiagonalGaussian, prior: Prior, z: Tensor, log_joint: Tensor, drift: Tensor) -> Tensor:
    """L_R = -ELBO = -log p(x|z) + KL(q ‖ p(z)) in nats, (B,), z = q.rsample(noise): KL(q ‖ p(z|x)) up to log p(x).

    The gradient through z is the drift ∇z log p(x, z) less the prior's score, both already known, so neither the
    decoder is run again nor can a gradient reach θ. log_joint: log p(x, z) (B,). drift: (B, d).
    """
    point = z.detach()
    log_likelihood = log_joint - prior.log_prob(point)
    pathwise = ((drift - prior.score(point)) * (z - point)).sum(1)  # value 0, gradient ∇z log p(x|z) · dz/dφ
    return q.kl(prior) - (log_likelihood + pathwise)


class Objective:
    """w_f · forward KL + w_r · reverse KL; (1, 0) forward, (0, 1) reverse, (½, ½) Jeffreys, (0, 0) no encoder.

    needs_chain: whether there is nothing to learn from z(0) alone. allows_chain: whether a chain means anything.
    """

    allows_chain = True

    num_encoder_steps = 0  # E-steps on φ alone before every update

    @checked
    def __init__(self, forward: Weight, reverse: Weight) -> None:
        self.forward, self.reverse = forward, reverse

    @property
    def uses_encoder(self) -> bool:
        """Whether there is an encoder at all; without one the chain starts from the prior."""
        return self.forward > 0 or self.reverse > 0

    @property
    def needs_chain(self) -> bool:
        """Forward KL is an average over the chain's states; without an encoder z(0) is no guess of the posterior."""
        return self.forward > 0 or not self.uses_encoder

    @property
    def needs_factorised_q(self) -> bool:
        """Two sums over the states suffice where q's coordinates are independent."""
        return self.forward > 0

    def loss(self, forward: Callable[[], Tensor], reverse: Callable[[], Tensor]) -> Tensor:
        """The encoder's loss, (B,); a term with weight 0 is never computed."""
        terms = [(self.forward, forward), (self.reverse, reverse)]
        return sum(weight * term() for weight, term in terms if weight > 0)


class VariationalEM(Objective):
    """Reverse KL with E-steps: per batch, num_encoder_steps steps of φ alone, then the update of θ and φ together.

    num_samples: draws z ~ q that each E-step averages over.
    """

    @checked
    def __init__(self, num_encoder_steps: PositiveInt, num_samples: PositiveInt) -> None:
        super().__init__(0.0, 1.0)
        self.num_encoder_steps, self.num_samples = num_encoder_steps, num_samples
