"""Ways to run one and the same chain: step by step, compiled, or as a captured CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lpc_runner.base.errors import UserError
from lpc_runner.base.schema import declared
from lpc_runner.base.tensors import products_in
from lpc_runner.inference.chain import (
    Chain,
    FusedPotential,
    Gathered,
    advance,
    begin,
    draws,
    run_chain,
    theta_along,
)
from lpc_runner.inference.interfaces import Sampler
from lpc_runner.inference.samplers import Info, State, block_length


class Captures:
    """Graphs of one device that never run at the same time, and so share their memory."""

    WARM_UPS = 3  # runs before a capture, in which libraries choose algorithms and allocate what they keep

    def __init__(self, device: torch.device) -> None:
        self.device, self._pool = device, None
        self._stream = None  # its own: torch's capture stream stays on the first device that a process captured on

    def __call__(self, work: Callable[[], None], warm: bool = True) -> Callable[[], None]:
        """What replays `work`, after WARM_UPS runs of it where it is to be warmed up; raises what it raises."""
        with torch.cuda.device(self.device):
            self._stream = self._stream or torch.cuda.Stream()
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(self.WARM_UPS if warm else 0):
                    work()
            current.wait_stream(self._stream)
            return self.captured(work, current).replay

    def captured(self, work: Callable[[], None], current: Any) -> Any:
        """The graph of one run; current: the stream that is current outside.

        Raises what the work raised: ending a broken capture raises another error over it and, before torch 2.15,
        leaves the capture's stream current.
        """
        graph, first = torch.cuda.CUDAGraph(), None
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                try:
                    work()
                except Exception as error:
                    first = error
                    raise
        except Exception:
            torch.cuda.set_stream(current)
            if first is not None:
                raise first from None
            raise
        self._pool = graph.pool()
        return graph


EngineName = Literal["auto", "eager", "compiled", "cuda_graph"]
Precision = Literal["fp32", "tf32", "bf16"]
LogJoint = Callable[..., Tensor]  # (*inputs, z) -> (B,) nats
CPU = torch.device("cpu")


class Eager:
    """Step by step in Python; a chain is `run_chain`.

    precision: `fp32` exactly; `tf32`, products of matrices and convolutions with 10 bits of mantissa on CUDA; `bf16`,
    those operations of the model in bfloat16 by autocast. z, the preconditioner's state, noise, likelihood and all
    sums are float32 in each of them. shows_steps: whether `on_step` costs no other way of running a chain.
    """

    shows_steps = True

    def __init__(self, precision: Precision = "fp32", device: torch.device = CPU) -> None:
        self.precision: Precision = precision
        self.device = device

    def arithmetic(self) -> AbstractContextManager[None]:
        """Inside, CUDA's products are exact float32, or TF32 where that is the precision."""
        return products_in("tf32" if self.precision == "tf32" else "ieee")

    def autocast(self) -> AbstractContextManager:
        """Around log p(x, z) alone; without the cache, which would outlive a captured graph."""
        if self.precision != "bf16":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)

    def potential_of(self, log_joint: LogJoint) -> LogJoint:
        """log_joint in this engine's arithmetic, with float results."""
        if self.precision != "bf16":
            return log_joint

        def rounded(*arguments: Tensor) -> Tensor:
            with self.autocast():
                return log_joint(*arguments)

        return rounded

    def run(
        self,
        log_joint: LogJoint,
        inputs: Sequence[Tensor],
        z: Tensor,
        sampler: Any,
        noise: Callable[[int], Tensor],
        **options: Any,
    ) -> Chain:
        """`run_chain`, with its options, on log_joint(*inputs, z); inputs: tensors that change from batch to batch (x).

        log_joint: the same callable at every update, for what is captured or compiled belongs to it. on_step: with it
        every engine runs this chain step by step.
        """
        return run_chain(partial(self.potential_of(log_joint), *inputs), z, sampler, noise, **options)


class Block:
    """`length` steps of a chain on fixed tensors, written in place; calling it makes them.

    potential: z, accumulate -> (value, drift), its sums among the fixed tensors. step: the sampler's. noise
    (length, B, d), times (length,): read. state: the chain's, moved on. Written, for every step: states (length, B, d),
    log_joints (length, B) and drifts (length, B, d) before it, the largest 2γG (length,) or a number, energy errors
    (length, B) where there are any. num_evaluations: of the potential.
    """

    def __init__(
        self, potential: FusedPotential, step: Callable, sampler: Any, start: State, length: int, along: bool
    ) -> None:
        z = start.z
        self.potential, self.step, self.sampler = potential, step, sampler
        self.length, self.along = length, along
        self.state = pytree.tree_map_only(torch.Tensor, torch.clone, start)
        several = (count,) if (count := declared(sampler, Sampler, "num_draws")) > 1 else ()
        self.noise = z.new_zeros(length, *several, *z.shape) if sampler.noisy else [None] * length
        self.times = torch.zeros(length, dtype=torch.float64, device=z.device)
        self.states = z.new_zeros(length, *z.shape)
        self.num_evaluations = 0

    def __call__(self) -> None:
        state, before, infos = self.state, self.potential.num_evaluations, []
        for index in range(self.length):
            # A block's length is a multiple of theta_every, so that the same steps accumulate in each.
            accumulate = self.along and index % self.sampler.theta_every == 0
            state = state._replace(t=self.times[index])
            state, info = advance(self.sampler, self.step, state, self.potential, accumulate, self.noise[index])
            self.states[index].copy_(state.z)  # at once, for the next step may write over it
            infos.append(info)
        # The rest of all steps together, a kernel each; of a captured block, tensors of the graph's own.
        log_joints, drifts, variances, errors = zip(*infos)
        self.log_joints, self.drifts, self.variances = torch.stack(log_joints), torch.stack(drifts), variances[0]
        if torch.is_tensor(self.variances):
            self.variances = torch.stack(variances).view(self.length, -1).amax(1)
        self.errors = None if errors[0] is None else torch.stack(errors)
        self.load(state)
        self.num_evaluations = self.potential.num_evaluations - before

    def load(self, state: State) -> None:
        """Take over a chain's state, whose time is in `times`; z last, for what is kept may be the z of before."""
        for name in ("memory", "seen", "metric", "z"):
            leaves = (pytree.tree_leaves(getattr(of, name)) for of in (self.state, state))
            for target, source in zip(*leaves):
                if torch.is_tensor(target):
                    target.copy_(source)


class Blocked(Eager):
    """The chain in blocks on fixed tensors, launched by Python: what `cuda_graph` captures, and its twin on a CPU."""

    shows_steps = False

    def __init__(self, precision: Precision = "fp32", device: torch.device = CPU) -> None:
        super().__init__(precision, device)
        self._programs: dict[tuple, _Program] = {}

    def launcher(self, work: Callable[[], None], warm: bool = True) -> Callable[[], None]:
        """What does the work on its fixed tensors, again and again; warm: whether it may be done before, to warm up."""
        del warm
        return work

    def step_of(self, sampler: Any) -> Callable[..., tuple[State, Info]]:
        """One step of the sampler, as this engine makes it."""
        return sampler.step

    def run(self, log_joint, inputs, z, sampler, noise, **options) -> Chain:
        if options.get("on_step") is not None or sampler.num_steps == 0:
            return super().run(log_joint, inputs, z, sampler, noise, **options)
        z, parameters = z.detach(), options.pop("parameters", ())
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in (*inputs, z))
        key = (log_joint, sampler, shapes, tuple(map(id, parameters)))
        if key not in self._programs:
            self._programs[key] = _Program(self, log_joint, inputs, sampler, parameters)
        return self._programs[key](inputs, z, noise, **options)


class _Program:
    """The blocks of one chain's shapes: one for whole blocks, one for the rest of T, on common sums and inputs."""

    def __init__(self, engine: Blocked, log_joint: LogJoint, inputs, sampler: Any, parameters) -> None:
        self.engine, self.sampler = engine, sampler
        self.inputs = [torch.empty_like(tensor).copy_(tensor) for tensor in inputs]
        self.potential = FusedPotential(partial(engine.potential_of(log_joint), *self.inputs), parameters)
        self.length = block_length(sampler)
        self.along, self.blocks, self.launchers = theta_along(sampler, parameters), {}, {}

    def build(self, start: State) -> None:
        """The blocks, for chains that start like this one."""
        num_steps = self.sampler.num_steps
        for length in {self.length, num_steps % self.length or self.length}:
            step = self.engine.step_of(self.sampler)
            self.blocks[length] = Block(self.potential, step, self.sampler, start, length, self.along)
            self.launchers[length] = self.engine.launcher(self.blocks[length])
        self.times = torch.arange(num_steps, dtype=torch.float64, device=start.z.device)  # made before each step

    def __call__(self, inputs, z: Tensor, noise, *, centre=None, q=None, on_step=None, num_kept: int = 0) -> Chain:
        for target, source in zip(self.inputs, inputs):
            target.copy_(source)
        self.potential.num_evaluations = 0
        state = begin(self.sampler, z, q, self.potential, noise, self.along)
        spent = self.potential.num_evaluations
        if not self.blocks:
            self.build(state)
        for total in self.potential.sums:
            total.zero_()
        gathered = Gathered(self.sampler, z, centre, num_kept)
        for made in range(0, self.sampler.num_steps, self.length):
            length = min(self.length, self.sampler.num_steps - made)
            block = self.blocks[length]
            block.load(state)
            block.times.copy_(self.times[made : made + length])
            if self.sampler.noisy:
                steps_made = range(made + 1, made + length + 1)
                torch.stack([draws(self.sampler, noise, t) for t in steps_made], out=block.noise)
            self.launchers[length]()
            spent += block.num_evaluations  # by Python's count when it was captured: a replayed graph does not count
            gathered.add(block.states, block.log_joints, block.drifts, block.variances, block.errors)
            state = block.state
            if gathered.ended():
                break
        self.potential.num_evaluations = spent
        return gathered.chain(self.potential, state.z.clone())


class CudaGraph(Blocked):
    """Blocks captured once as CUDA graphs: the host launches one graph per block instead of every kernel."""

    def __init__(self, precision: Precision = "fp32", device: torch.device = CPU) -> None:
        super().__init__(precision, device)
        self.captures = Captures(device)

    def launcher(self, work: Callable[[], None], warm: bool = True) -> Callable[[], None]:
        return self.captures(work, warm)


class Compiled(Blocked):
    """The potential, forward and backward, and the sampler's move by torch.compile, in blocks launched by Python (CPU).

    torch keeps a few compiled forms of one function and then runs it uncompiled; so that the many runs of a sweep do
    not get there, every engine starts with none of those before it.
    """

    backend = "inductor"  # torch.compile's

    def __init__(self, precision: Precision = "fp32", device: torch.device = CPU) -> None:
        super().__init__(precision, device)
        self._compiled: dict[Any, Callable] = {}

    def _compile(self, key: Any, function: Callable) -> Callable:
        if not self._compiled:
            torch.compiler.reset()
        if key not in self._compiled:
            self._compiled[key] = torch.compile(function, backend=self.backend, dynamic=False)
        return self._compiled[key]

    def potential_of(self, log_joint: LogJoint) -> LogJoint:
        return self._compile(log_joint, super().potential_of(log_joint))

    def step_of(self, sampler: Any) -> Callable[..., tuple[State, Info]]:
        if (arithmetic := declared(sampler, Sampler, "move")) is None:
            return super().step_of(sampler)
        move = self._compile(sampler, arithmetic)
        return lambda state, potential, noise: move(state, *potential(state.z), noise)


class CompiledCudaGraph(Compiled, CudaGraph):
    """Potential and move by torch.compile, whose fused kernels are captured like all others (CUDA)."""


def make_engine(name: EngineName, precision: Precision, device: torch.device) -> Eager:
    """The engine of that name; `auto` is cuda_graph on CUDA and eager on a CPU (docs/benchmarks.md).

    Raises UserError (one line) for what the device cannot do.
    """
    on_cuda = device.type == "cuda"
    if precision == "tf32" and not on_cuda:
        raise UserError(f"precision=tf32 is arithmetic of CUDA devices, device is {device}; fp32 and bf16 run anywhere")
    if name == "cuda_graph" and not on_cuda:
        raise UserError(f"engine=cuda_graph needs a CUDA device, device is {device} (engine=auto takes what is there)")
    if name == "auto":
        name = "cuda_graph" if on_cuda else "eager"
    if name == "compiled":
        return (CompiledCudaGraph if on_cuda else Compiled)(precision, device)
    return {"eager": Eager, "cuda_graph": CudaGraph}[name](precision, device)
