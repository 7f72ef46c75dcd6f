# A training loop of your own, from the library's parts alone: no Hydra, no run folder, no tracker.
#
#     python examples/own_loop.py
#
# Langevin predictive coding on the embedded digits. The weights are those of
# `python -m lpc_runner method=lpc_jeffreys model=mlp trainer.num_epochs=3`, bit for bit on the CPU.
# docs/algorithm.md says where each line of Algorithm 1 is computed.
import torch

from lpc_runner.base.distributions import DiscretisedGaussian
from lpc_runner.base.tensors import seeded_layers
from lpc_runner.data.dataset import Batches
from lpc_runner.data.digits import Digits
from lpc_runner.inference.objectives import WeightedKL
from lpc_runner.inference.preconditioning import SharedAdam
from lpc_runner.inference.samplers import Langevin
from lpc_runner.inference.step_sizes import Constant
from lpc_runner.models.dense import MLP
from lpc_runner.training.learner import AdamOptimizer, Learner

SEED, NUM_EPOCHS, NUM_STEPS, LATENT_DIM, HIDDEN = 0, 3, 10, 40, [256, 512]

dataset = Digits()
batches = Batches(dataset.load().train, dataset, batch_size=64, seed=SEED)
with seeded_layers(SEED, "initialisation"):
    likelihood = DiscretisedGaussian("learned", initial_scale=1.0, momentum=0.9)
    model = MLP(dataset.shape, LATENT_DIM, prior_scale=1.0, likelihood=likelihood, variance_beta=0.3, hidden=HIDDEN)
with seeded_layers(SEED, "encoder"):
    encoder = model.build_encoder()
preconditioner = SharedAdam(beta=0.25, eps=1e-8, freeze_after=None)
sampler = Langevin(NUM_STEPS, theta_states="all", step_size=Constant(0.1), preconditioner=preconditioner)
jeffreys = WeightedKL(forward=0.5, reverse=0.5)
optimizer = AdamOptimizer(learning_rate=1e-3, betas=[0.9, 0.999], eps=1e-8)
learner = Learner(model, encoder, sampler, jeffreys, optimizer)

for update in range(NUM_EPOCHS * batches.num_batches):
    batch = batches.batch(*divmod(update, batches.num_batches))
    gradients = learner.gradients(batch, SEED, update, start_from_prior=update < 50)
    if not gradients.finite:
        raise SystemExit(f"diverged at update {update + 1}")
    learner.apply(batch, gradients)
    if (update + 1) % batches.num_batches == 0:
        elbo, sigma = gradients.scalars["train/elbo"], gradients.scalars["train/sigma"]
        print(f"update {update + 1}: ELBO {elbo:.1f} nats per image, sigma {sigma:.3f}")

with torch.no_grad():
    images = model.decode(torch.randn(16, LATENT_DIM))  # samples of the model, (16, 1, 28, 28) in [-1, 1]
