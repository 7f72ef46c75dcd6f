"""Contract checks for a part of one's own: every option of this package passes them (tests/test_extending.py).

    from lpc_runner.testing import check_preconditioner
    check_preconditioner(Mine(0.5))

Each raises AssertionError, or UserError where a run on several ranks would, with one sentence. A part that wants to be
told of its model is bound before.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lpc_runner.base.distributions import DiagonalGaussian, Gaussian
from lpc_runner.base.schema import accepted, declared, missing
from lpc_runner.data.dataset import Batch
from lpc_runner.inference.chain import ChainNoise, run_chain
from lpc_runner.inference.context import Context, Gradients
from lpc_runner.inference.engine import Blocked
from lpc_runner.inference.interfaces import Objective, Preconditioner, Sampler, StepSize
from lpc_runner.inference.preconditioning import Identity
from lpc_runner.inference.samplers import Langevin, NoSteps
from lpc_runner.inference.sharing import require_shareable
from lpc_runner.inference.step_sizes import Constant
from lpc_runner.models.dense import MLP
from lpc_runner.tracking.tracker import Sink
from lpc_runner.training.update import UpdateNoise

_PICTURE = bytes.fromhex(  # a PNG of one pixel
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154789c6360000000020001"
    "48afa4710000000049454e44ae426082"
)
NUM_STEPS = 12  # of the chains that are run
FACTS = {"run_id": "run", "name": "run", "group": "study", "config": {}, "resume_step": 0, "more_tags": ()}


def check_step_size(step_size: Any, dim: int = 6) -> None:
    """γ(t) is positive and finite, a number or (1, dim), and the same for t an integer and a 0-d float64 tensor."""
    _require(step_size, StepSize)
    first, constant = None, declared(step_size, StepSize, "constant_along_chain")
    for t in (1, 2, 7, 300):
        both = (t, torch.tensor(t, dtype=torch.float64))
        sizes = [torch.as_tensor(step_size(of), dtype=torch.float64) for of in both]
        assert all(size.shape in ((), (1, dim)) for size in sizes), f"γ({t}) has the shape {tuple(sizes[0].shape)}"
        assert all(bool((size.isfinite() & (size > 0)).all()) for size in sizes), f"γ({t}) is {sizes[0]}"
        _close(sizes[0], sizes[1], f"γ({t}) of an integer and of a tensor")
        first = sizes[0] if first is None else first
        assert not constant or torch.equal(sizes[0], first), f"γ({t}) is not γ(1), constant_along_chain"


def check_preconditioner(preconditioner: Any, dim: int = 6) -> None:
    """G broadcasts against z (B, dim), is positive, and of t an integer or a 0-d tensor; else as `check_sampler`.

    It is the same at every step where the part says `constant_along_chain`.
    """
    _require(preconditioner, Preconditioner)
    z, q = _normal(4, dim), _q(dim)
    first, constant = None, declared(preconditioner, Preconditioner, "constant_along_chain")
    states = [preconditioner.init(z, q), preconditioner.init(z, q)]
    for t in range(1, NUM_STEPS + 1):
        drift = _normal(4, dim, seed=t)
        states[0], scale = preconditioner.update(states[0], drift, t)
        states[1], same = preconditioner.update(states[1], drift, torch.tensor(t, dtype=torch.float64))
        scale, same = (torch.as_tensor(of, dtype=z.dtype).broadcast_to(z.shape) for of in (scale, same))
        assert bool((scale.isfinite() & (scale > 0)).all()), f"G of step {t} is not positive and finite: {scale}"
        _close(scale, same, f"G of step {t}, an integer and a tensor,")
        first = scale if first is None else first
        assert not constant or torch.equal(scale, first), f"G of step {t} is not that of step 1, constant_along_chain"
    check_sampler(Langevin(NUM_STEPS, "all", Constant(0.01), preconditioner), dim)


def check_sampler(sampler: Any, dim: int = 6) -> None:
    """A chain keeps z's shape, repeats itself, is the same in blocks, and can be spread over ranks or says why not."""
    _require(sampler, Sampler)
    if sampler.num_steps == 0:
        return
    goal, q = _normal(4, dim), _q(dim)
    noise = ChainNoise(0, 0, (4, dim), "cpu")

    def log_joint(goal: Tensor, z: Tensor) -> Tensor:
        return -0.5 * (z - goal).square().sum(1)

    seen = []
    chains = [
        run_chain(partial(log_joint, goal), q.mean, sampler, noise, q=q, on_step=lambda *step: seen.append(step))
        for _ in range(2)
    ]
    for t, (state, info) in enumerate(seen[: sampler.num_steps], 1):
        assert state.z.shape == (4, dim) and state.t == t, f"after step {t}: z {tuple(state.z.shape)}, t {state.t}"
        assert info.log_joint.shape == (4,) and info.drift.shape == (4, dim), f"what step {t} saw has another shape"
    assert torch.equal(chains[0].z, chains[1].z), "chains with the same start and noise differ: a part keeps a state"
    blocks = Blocked().run(log_joint, (goal,), q.mean, sampler, noise, q=q)
    _close(blocks.z, chains[0].z, "z(T) in blocks, where t is a tensor, and step by step")
    require_shareable(sampler, dim)


def check_objective(objective: Any, model: Any = None, batch: Batch | None = None) -> None:
    """Gradients have the parameters' shapes, are finite means over the batch, and nothing is changed on the way.

    That they are means over the batch is what several ranks ask for: those of the whole are the average of the halves'.
    model, batch: of an even number of examples; by default a small one with random data.
    """
    _require(objective, Objective)
    model, batch = model or _model(), batch or Batch(_normal(4, 1, 2, 3), torch.arange(4))
    asks = {name: declared(objective, Objective, name) for name in ("uses_encoder", "needs_chain")}
    torch.manual_seed(0)
    encoder = model.build_encoder() if asks["uses_encoder"] else None
    sampler = Langevin(5, "all", Constant(0.01), Identity()) if asks["needs_chain"] else NoSteps(None, None)
    size, parameters = len(batch.x), [*model.parameters(), *(encoder.parameters() if encoder else ())]
    before = [parameter.clone() for parameter in parameters]
    noise = UpdateNoise(0, 0, (size, model.latent_dim), "cpu", parameters[0].dtype)
    context = Context(model, encoder, sampler, batch, noise, update_encoder=lambda gradients: True)
    whole = objective.gradients(context)
    assert isinstance(whole, Gradients), f"gradients() returned {type(whole).__name__}"
    for name, given, wanted in (("theta", whole.theta, context.theta), ("phi", whole.phi, context.phi)):
        assert [g.shape for g in given] == [p.shape for p in wanted], f"{name}: one tensor for every parameter"
        assert all(bool(g.isfinite().all()) for g in given), f"{name}: a gradient is not finite"
    assert whole.z.shape == noise.shape, f"z has the shape {tuple(whole.z.shape)}"
    for name, value in (whole.scalars | whole.maxima).items():
        assert torch.is_tensor(value) and value.shape == (), f"{name} is not a 0-d tensor"
    same = all(torch.equal(old, new) and new.grad is None for old, new in zip(before, parameters))
    assert same, "parameters, or their .grad, were changed: that is the learner's to do"
    halves = []
    for rows in (slice(0, size // 2), slice(size // 2, size)):
        part = Batch(batch.x[rows], batch.index[rows])
        halves.append(objective.gradients(replace(context, batch=part, noise=replace(noise, rows=rows))))
    for number, gradient in enumerate([*whole.theta, *whole.phi]):
        mean = torch.stack([[*half.theta, *half.phi][number] for half in halves]).mean(0)
        _close(gradient, mean, f"gradient {number} of a batch, and the mean of its halves',", 1e-3)


def check_tracker(tracker: type, **settings: Any) -> None:
    """A tracker's class, made with its YAML file's values and what a run tells it, takes all that a run records."""
    _require(tracker, Sink)
    declared(tracker, Sink, "require")(**settings)
    assert declared(tracker, Sink, "wants_done_runs")() in (True, False)
    assert isinstance(declared(tracker, Sink, "refuses_sweeps")(), str)
    assert isinstance(declared(tracker, Sink, "refuses_fleets")(**settings), str)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sink = tracker(**settings, **accepted(tracker, FACTS | {"folder": folder}))
        (folder / "samples.png").write_bytes(_PICTURE)
        calls = {
            "log": (1, 0.5, {"train/elbo": 1.0, "chain/drift_norm_last": float("nan")}),
            "images": (1, "samples", folder / "samples.png"),
            "summary": ({"final/fid": 1.0},),
            "close": ("finished",),
        }
        for method, values in calls.items():
            declared(sink, Sink, method)(*values)


def _require(part: Any, protocol: type) -> None:
    lacking = missing(part, protocol)
    assert not lacking, lacking


def _close(one: Tensor, other: Tensor, what: str, rtol: float = 1e-4) -> None:
    error = float((one - other).abs().max()) if one.numel() else 0.0
    assert error <= rtol * float(other.abs().max()) + 1e-6, f"{what} differ by {error:.2g}"


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _q(dim: int) -> DiagonalGaussian:
    return DiagonalGaussian(_normal(4, dim, seed=1), _normal(4, dim, seed=2).square() + 0.1)


def _model() -> MLP:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MLP((1, 2, 3), 4, 1.0, Gaussian("learned", 0.5, 0.9), 0.3, [5])
