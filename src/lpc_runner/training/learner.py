"""What is learned: the model's θ, the encoder's φ, and their optimisers."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from lpc_runner.base.errors import UserError
from lpc_runner.base.ranks import SINGLE, Ranks
from lpc_runner.base.schema import PositiveFloat, at_least, checked, declared
from lpc_runner.data.dataset import Batch
from lpc_runner.inference.context import STEP_BY_STEP, Context, PersistentStates
from lpc_runner.inference.engine import Blocked, Eager
from lpc_runner.inference.interfaces import Objective, Part, Sampler, parts_of
from lpc_runner.inference.sharing import over_ranks
from lpc_runner.models.latent import EncoderInterface, LatentVariableModel
from lpc_runner.training.update import Combined, UpdateNoise, WholeUpdates, compute_gradients, step_encoder

Decay = Annotated[float, at_least(0)]


class AdamOptimizer:
    """Adam (Kingma and Ba 2015) with weight decay 0: `build` gives a torch optimiser for θ or for φ.

    learning_rate: for both θ and φ. betas: decay of first and second moment. eps: added to the denominator.
    """

    @checked
    def __init__(self, learning_rate: PositiveFloat, betas: list[Decay], eps: PositiveFloat) -> None:
        if len(betas) != 2 or max(betas) >= 1:
            raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
        self.learning_rate, self.betas, self.eps = learning_rate, (betas[0], betas[1]), eps

    def build(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        """A fresh optimiser over `parameters`; on CUDA one kernel for all of them."""
        parameters = list(parameters)
        fused = all(parameter.is_cuda for parameter in parameters) or None
        return torch.optim.Adam(parameters, lr=self.learning_rate, betas=self.betas, eps=self.eps, fused=fused)

    def build_by_row(self, parameters: Iterable[Tensor], learning_rate: float) -> torch.optim.Optimizer:
        """The same for tables, every row of which belongs to one example; learning_rate: the tables' own."""
        return RowAdam(parameters, learning_rate, self.betas, self.eps)


def restore(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Moments and settings of a checkpoint, from whatever device; how a step is launched stays this device's way."""
    launched = ("fused", "foreach", "capturable")
    groups = [
        {**saved, **{key: own[key] for key in launched if key in own}}
        for saved, own in zip(state["param_groups"], optimizer.param_groups)
    ]
    optimizer.load_state_dict({**state, "param_groups": groups})


class RowAdam(torch.optim.Optimizer):
    """Adam on each row of a table by itself: a row whose gradient is 0 stays as it is, with its moments and its count.

    torch's Adam moves every row at every step by its momentum, and its SparseAdam corrects the bias of all rows by
    one common count of steps. Here a row takes the path of an Adam that sees this row's batches only.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            learning_rate, (beta, beta_square), eps = group["lr"], group["betas"], group["eps"]
            for table in group["params"]:
                assert table.grad is not None
                state = self.state[table]
                if not state:
                    state["count"] = table.new_zeros(len(table), *[1] * (table.ndim - 1))
                    state["mean"], state["mean_square"] = torch.zeros_like(table), torch.zeros_like(table)
                rows = table.grad.flatten(1).any(1).nonzero().squeeze(1)
                gradient, count = table.grad[rows], state["count"][rows] + 1
                mean = torch.lerp(gradient, state["mean"][rows], beta)
                square = torch.lerp(gradient.square(), state["mean_square"][rows], beta_square)
                state["count"][rows], state["mean"][rows], state["mean_square"][rows] = count, mean, square
                scale = (square / (1 - beta_square**count)).sqrt() + eps
                table[rows] -= learning_rate * mean / (1 - beta**count) / scale


class Learner:
    """Model, encoder (None where the objective uses none), sampler, objective, and an optimiser each for θ and φ.

    ranks: the processes that share every batch. sampler: as configured; in training, what it averages over the batch
    is averaged over all ranks. engine: runs the chains. num_train: training examples, which
    sampler.start=persistent must know before it trains. frozen: model and encoder stay as they are.
    """

    def __init__(
        self,
        model: LatentVariableModel,
        encoder: nn.Module | None,
        sampler: Any,
        objective: Objective,
        optimizer: AdamOptimizer,
        ranks: Ranks = SINGLE,
        engine: Eager = STEP_BY_STEP,
        num_train: int | None = None,
        frozen: bool = False,
    ) -> None:
        self.model, self.encoder, self.sampler, self.objective = model, encoder, sampler, objective
        self.ranks, self.frozen = ranks, frozen
        self._training_sampler, self.engine = sampler, engine
        if ranks.size > 1 and declared(sampler, Sampler, "couples_batch"):
            # A message at every step is Python's to send.
            self._training_sampler = over_ranks(sampler, ranks.mean_over_batch)
            self.engine = Eager(engine.precision, engine.device)
        self._whole = None
        if isinstance(self.engine, Blocked) and ranks.size == 1 and sampler.num_steps == 0:
            by_row = encoder is not None and not declared(encoder, EncoderInterface, "amortised")
            if declared(objective, Objective, "capturable") and not by_row:
                self._whole = WholeUpdates(self.engine)  # without a chain, all of an update is a block
        self._first_sampler = self._training_sampler
        if (first_steps := declared(sampler, Sampler, "first_steps")) is not None:
            self._first_sampler = copy.copy(self._training_sampler)
            self._first_sampler.num_steps = first_steps
        self.kept = None
        self._keeps = declared(sampler, Sampler, "start") == "persistent"
        if self._keeps and num_train is not None:
            self.kept = PersistentStates(num_train, model.latent_dim, next(model.parameters()))
        self.theta_optimizer = optimizer.build(model.parameters())
        self.phi_optimizer: torch.optim.Optimizer | None = None
        if encoder is not None:
            self.phi_optimizer = declared(encoder, EncoderInterface, "build_optimizer")(optimizer)

    def gradients(
        self,
        batch: Batch,
        seed: int,
        update: int,
        start_from_prior: bool,
        on_step=None,
        judge: bool = False,
        stop: bool = False,
        first_epoch: bool = False,
    ) -> Combined:
        """The objective's gradients for one batch; the random numbers are those of (seed, update).

        batch: this rank's rows; the gradients are those of all ranks' rows. start_from_prior, on_step, judge: see
        Context. stop: whether this rank was signalled. first_epoch: whether every example comes for the first time.
        """
        assert self.kept is not None or not self._keeps, "sampler.start=persistent: a learner without num_train"
        like, ranks = next(self.model.parameters()), self.ranks
        num_rows = len(batch.x) * ranks.size
        shape = (num_rows, self.model.latent_dim)
        combine = partial(ranks.combine, stop=stop)
        context = Context(
            self.model,
            self.encoder,
            self._first_sampler if first_epoch else self._training_sampler,
            batch,
            UpdateNoise(seed, update, shape, like.device, like.dtype, ranks.rows(num_rows)),
            start_from_prior,
            self.engine,
            on_step,
            judge,
            partial(step_encoder, self.phi_optimizer, combine),
            self.kept,
        )
        with self.engine.arithmetic():
            compute = partial(compute_gradients, self.objective, combine=combine)
            if self._whole is not None and on_step is None:
                return self._whole.gradients(compute, context)
            return compute(context)

    def apply(self, batch: Batch, gradients: Combined) -> None:
        """The optimisers' steps, and what the sampler learns; only ever called with finite gradients."""
        if not self.frozen:
            optimizers = [part for part in (self.theta_optimizer, self.phi_optimizer) if part is not None]
            if self._whole is not None:
                self._whole.step(optimizers)
            else:
                for optimizer in optimizers:
                    optimizer.step()
            with self.engine.arithmetic():
                self.model.observe(batch.x, gradients.z, self.ranks.mean)
        for part, averaged in self._told(gradients):
            declared(part, Part, "observe")(averaged)
            gradients.scalars |= declared(part, Part, "scalars")()
        if self.kept is not None and gradients.chain is not None:
            counts = [len(batch.index)] * self.ranks.size
            self.kept.keep(*(self.ranks.gather_rows(rows, counts) for rows in (batch.index, gradients.chain.z)))

    def pass_over(self, gradients: Combined) -> bool:
        """Of an update that is not made, tell the parts that see to it that the next can be; False if none does."""
        goes_on = False
        for part, averaged in self._told(gradients):
            if declared(part, Part, "usable")(averaged) is not None:
                goes_on |= part.pass_over(averaged, gradients.finite)
                gradients.scalars |= declared(part, Part, "scalars")()
        return goes_on

    def _told(self, gradients: Combined) -> list[tuple[Any, dict[str, Tensor]]]:
        """The sampler's parts, and what each took from the chains."""
        samplers = (self.sampler, self._training_sampler)  # a copy that averages over ranks shares parts with the first
        pairs = [pair for sampler in samplers for pair in zip(parts_of(sampler), gradients.contributions)]
        return list({id(part): (part, averaged) for part, averaged in pairs}.values())

    def _parts(self) -> dict[str, Any]:
        parts = {
            "model": self.model,
            "encoder": self.encoder,
            "theta_optimizer": self.theta_optimizer,
            "phi_optimizer": self.phi_optimizer,
            "persistent": self.kept,
        }
        parts |= _learning(self.sampler)
        return {name: part for name, part in parts.items() if part is not None}

    def state_dict(self) -> dict[str, Any]:
        """Everything learned, for a checkpoint."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint of the same configuration."""
        if self._whole is not None:
            self._whole = WholeUpdates(self._whole.engine)  # state and parameters lie elsewhere now
        for name, part in (*self._parts().items(), *_learning(self._training_sampler).items()):
            if isinstance(part, torch.optim.Optimizer):
                restore(part, state[name])
            else:
                part.load_state_dict(state[name])

    def start_from(self, state: dict[str, Any], source: str) -> None:
        """Take the weights, no state of optimisers or chains, of another run's checkpoint; UserError if they misfit."""
        for name, part in (("model", self.model), ("encoder", self.encoder)):
            if part is None:
                continue
            if name not in state:
                if self.frozen:
                    raise UserError(f"trainer.init_from={source} has no {name}, and trainer.frozen=true trains none")
                continue
            try:
                part.load_state_dict(state[name])
            except RuntimeError as error:
                detail = str(error).strip().splitlines()[-1].strip()
                raise UserError(f"trainer.init_from={source}: its {name} does not fit this one: {detail}") from None


def _learning(sampler: Any) -> dict[str, Any]:
    """Those of a sampler and its parts that have a state, by their names in a checkpoint."""
    beside = {name: getattr(sampler, name, None) for name in ("step_size", "preconditioner")}
    return {name: part for name, part in ({"sampler": sampler} | beside).items() if hasattr(part, "state_dict")}
