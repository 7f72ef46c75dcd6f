"""Evaluators that need no samples: test examples, the start of chains on them, and examples simulated by the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from lpc_runner.base.distributions import DiagonalGaussian
from lpc_runner.base.likelihoods import draw
from lpc_runner.base.tensors import generator
from lpc_runner.data.dataset import Batch
from lpc_runner.evaluation.ais import AnnealedImportance
from lpc_runner.evaluation.bounds import gradients_through_rnns, prior_of
from lpc_runner.evaluation.evaluator import Evaluator, Setup, Trained, evaluating, is_amortised, without_held_out
from lpc_runner.evaluation.samples import draw_data, draw_images
from lpc_runner.inference.chain import constant
from lpc_runner.models.latent import LatentVariableModel

EXAMPLES = 64  # measured at once; they share draws of noise, so it is no setting


class HeldOut(Evaluator):
    """An evaluator of any kind of data by its test examples x and the start q of chains, which may simulate its own."""

    def __init__(self, setup: Setup, ais: AnnealedImportance) -> None:
        self.ais = ais
        self.dataset, self.data, self.device = setup.dataset, setup.data, torch.device(setup.device)
        self.seed, self.ranks = setup.seed, setup.ranks

    def draw_data(self, folder: Path) -> None:
        draw_data(self.dataset, self.data, folder)

    def draw(self, trained: Trained, folder: Path, update: int | None) -> dict[str, Path]:
        """Of images, samples, and at the end reconstructions; of sequences nothing."""
        if self.dataset.kind != "images":
            return {}
        return draw_images(trained, self.dataset, self.data, self.seed, folder, update)

    @contextmanager
    def measuring(self, trained: Trained) -> Iterator[None]:
        """Evaluation mode, gradients of z alone, through any network."""
        theta = list(trained.model.parameters())
        with evaluating(trained.model, trained.encoder), gradients_through_rnns(trained.model), constant(theta):
            yield

    def examples(self, index: Tensor) -> Tensor:
        """What the model sees of those test examples, held-out neurons as NaN."""
        x = self.dataset.to_model(self.data.test.values[index].to(self.device))
        return without_held_out(x, self.dataset.num_held_out)

    @torch.no_grad()
    def simulate(
        self, model: LatentVariableModel, count: int, stream: str, number: int
    ) -> tuple[Tensor, Tensor] | None:
        """z ~ p(z) and x ~ p(x|z), so that z is an exact draw of p(z|x); None where p(x|z) cannot be sampled."""
        like = next(model.parameters())
        source = generator(self.seed, stream, number, device=like.device)
        z = torch.randn(count, model.latent_dim, generator=source, device=like.device, dtype=like.dtype)
        z = model.prior.scale * z
        x = draw(model.likelihood, model.predict(z), source)
        return None if x is None else (z, without_held_out(x, self.dataset.num_held_out))

    @torch.no_grad()
    def encoded(self, trained: Trained, x: Tensor, index: Tensor) -> DiagonalGaussian | None:
        """The encoder's q of x (B, ...); None where there is no encoder for new examples."""
        return trained.encoder(Batch(x, index.to(x.device))) if is_amortised(trained.encoder) else None

    def start_of(self, trained: Trained) -> str:
        """Where AIS starts: `ais.start`, or the prior where that is an encoder's q and there is none."""
        return "prior" if self.ais.start == "encoder" and not is_amortised(trained.encoder) else self.ais.start

    def annealed_from(self, trained: Trained, x: Tensor, index: Tensor) -> DiagonalGaussian:
        """The q of x (B, ...) that `start_of` names."""
        found = None if self.ais.start == "prior" else self.encoded(trained, x, index)
        found = prior_of(trained.model, len(x)) if found is None else found
        return self.ais.free_q(trained.model, x, found, self.seed) if self.ais.start == "free" else found
