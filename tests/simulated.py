"""A device whose memory the CPU cannot read, for machines that have none: what would fail on a GPU fails here.

Its tensors wrap tensors of the CPU, which hold the numbers. An operator given tensors of both raises as on a GPU; one
that makes the host wait for the device (a value read, a copy across, a mask whose length decides a shape) is noted in
`waits`, every one that would launch a kernel in `launches`. Running this file serves command lines: for a line
{"module": ..., "argv": [...], "cwd": ...} on standard input it runs `python -m MODULE` on the device and answers
{"code": ..., "waits_in_blocks": [...], "waits_in_updates": [...]}; the engine is the one whose blocks a graph captures.
A line {"script": ...} is Python that may import this module; the answer is {"code": ..., "out": ...}, what it printed.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import json
import os
import subprocess
import sys
import tempfile
import traceback

import torch
from torch._decomp import decompositions
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("simulated")
DEVICE = torch.device("simulated:0")
aten = torch.ops.aten
waits: list[str] = []
launches: list[str] = []

ACROSS = {aten._to_copy.default, aten.copy_.default, aten._copy_from.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
WAITING = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.equal.default,
}
# Operators that make no number: a view, or memory without content.
FREE = {
    "view", "detach", "slice", "select", "expand", "t", "transpose", "unsqueeze", "squeeze", "permute", "alias",
    "_unsafe_view", "as_strided", "split", "unbind", "empty", "empty_like", "empty_strided", "new_empty",
}  # fmt: skip


class Simulated(torch.Tensor):
    """A tensor of the device; `inside` are its numbers."""

    is_cuda = True  # what the code asks to know that a kernel is launched rather than run

    @staticmethod
    def __new__(cls, inside: torch.Tensor) -> Simulated:
        like = {"strides": inside.stride(), "storage_offset": inside.storage_offset(), "dtype": inside.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, inside.size(), device=DEVICE, **like)

    def __init__(self, inside: torch.Tensor) -> None:
        self.inside = inside

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return perform(operator, args, kwargs or {})

    def __repr__(self) -> str:
        return f"Simulated({tuple(self.shape)}, {self.dtype})"

    def tolist(self) -> list:
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol):
        return self.detach().inside.__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        copied = Simulated(self.detach().inside.clone())
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied


def _inside(value):
    return value.inside if isinstance(value, Simulated) else value


def perform(operator, args, kwargs):
    """Run an operator on the numbers inside, and note what it would have cost."""
    tensors = [value for value in pytree.tree_leaves((args, kwargs)) if torch.is_tensor(value)]
    there = [tensor for tensor in tensors if isinstance(tensor, Simulated)]
    here = [tensor for tensor in tensors if not isinstance(tensor, Simulated)]
    name = str(operator).split(".")[1]
    crosses = bool(there) and operator in ACROSS and bool(here)
    indexed_from_here = operator in INDEXED and isinstance(args[0], Simulated)  # torch takes the index across itself
    if there and operator not in ACROSS and any(tensor.ndim for tensor in here) and not indexed_from_here:
        shapes = ", ".join(f"{type(tensor).__name__}{tuple(tensor.shape)}" for tensor in tensors)
        raise RuntimeError(f"expected all tensors on one device: {operator} of {shapes}")
    on_device = bool(there)
    if (device := kwargs.get("device")) is not None:
        on_device = torch.device(device).type == DEVICE.type
        crosses |= bool(there) and not on_device
        kwargs = {**kwargs, "device": torch.device("cpu")}
    by_mask = operator in INDEXED and any(
        torch.is_tensor(index) and (index.dtype == torch.bool or not isinstance(index, Simulated)) for index in args[1]
    )
    if there and (crosses or by_mask or operator in WAITING):
        waits.append(name)
    if there and name not in FREE:
        launches.append(name)
    kwargs = {key: value for key, value in kwargs.items() if key not in ("pin_memory", "non_blocking")}
    result = operator(*pytree.tree_map(_inside, args), **pytree.tree_map(_inside, kwargs))
    given = {id(_inside(tensor)): tensor for tensor in tensors}  # what is written in place is returned as it came

    def wrapped(value):
        if not torch.is_tensor(value):
            return value
        if id(value) in given:
            return given[id(value)]
        return Simulated(value) if on_device else value

    return pytree.tree_map(wrapped, result)


def _gru_cell(given, hidden, weight_given, weight_hidden, bias_given=None, bias_hidden=None):
    one = torch.nn.functional.linear(given, weight_given, bias_given).chunk(3, 1)
    other = torch.nn.functional.linear(hidden, weight_hidden, bias_hidden).chunk(3, 1)
    reset, update = (one[0] + other[0]).sigmoid(), (one[1] + other[1]).sigmoid()
    new = (one[2] + reset * other[2]).tanh()
    return new + update * (hidden - new)


_everything, _some = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
_everything.fallback(lambda operator, *args, **kwargs: perform(operator, args, kwargs), "PrivateUse1")
for _key in ("AutogradPrivateUse1", "PrivateUse1"):  # a GPU's fused kernels have no twin on a CPU
    _some.impl("gru.input", decompositions.gru_impl, _key)
    _some.impl("gru_cell", _gru_cell, _key)
_some.impl("silu_backward", lambda *args: perform(aten.silu_backward.default, args, {}), "PrivateUse1")

# A kernel's own text, compiled for this machine. erfcx is asked for at 7 and beyond only: Laplace's continued fraction.
HOST = """
#include <cmath>
using namespace std;
template <typename T> T erfcx(T y) {
  T below = y;
  for (int n = 80; 0 < n; n--) below = y + n / (2 * below);
  return T(0.564189583547756287) / below;
}
%s
#define RUN(T) extern "C" void run_##T(long count, T** a, const double* c, T** b) { \\
  for (long i = 0; i < count; i++) %s<T>(a[0][i], a[1][i], a[2][i], c[0], c[1], c[2], b[0][i], b[1][i], b[2][i]); }
RUN(float) RUN(double)
"""


def _kernel(code: str, num_outputs: int, **constants: float):
    """torch.cuda.jiterator's, for kernels of three tensors, three constants and three results."""
    name = torch.cuda.jiterator._CodeParser(code).function_name
    with tempfile.TemporaryDirectory() as folder:
        command = ["g++", "-x", "c++", "-", "-O1", "-shared", "-fPIC", "-o", f"{folder}/kernel.so"]
        subprocess.run(command, input=HOST % (code, name), text=True, check=True)
        library = ctypes.CDLL(f"{folder}/kernel.so")

    def launch(*tensors, **given):
        assert all(isinstance(tensor, Simulated) for tensor in tensors)
        launches.append(name)
        first, *others = torch.broadcast_tensors(*map(_inside, tensors))
        # In the first one's layout, as torch's elementwise kernels.
        dtype = torch.result_type(first, others[0])
        inputs = [torch.empty_like(first, dtype=dtype).copy_(tensor) for tensor in (first, *others)]
        outputs = [torch.empty_like(inputs[0]) for _ in range(num_outputs)]
        scalars = (ctypes.c_double * len(constants))(*(constants | given).values())
        at = [(ctypes.c_void_p * len(some))(*(one.data_ptr() for one in some)) for some in (inputs, outputs)]
        run = {torch.float32: library.run_float, torch.float64: library.run_double}[dtype]
        run(ctypes.c_long(first.numel()), at[0], scalars, at[1])
        return tuple(map(Simulated, outputs))

    return launch


torch.cuda.jiterator._create_multi_output_jit_fn = _kernel

# What asks torch for memory of the device without an operator. A file's tensors stay on the CPU: what takes them up
# copies.
_tensor, _as_tensor, _Generator, _load = torch.tensor, torch.as_tensor, torch.Generator, torch.load


def _placed(make):
    def placed(data, *, device=None, **more):
        made = make(data, **more)
        return made if device is None else made.to(device)

    return placed


class _AnyGenerator(_Generator):
    def __new__(cls, device="cpu"):
        return _Generator.__new__(_Generator)


torch.tensor, torch.as_tensor, torch.Generator = _placed(_tensor), _placed(_as_tensor), _AnyGenerator
torch.load = lambda file, map_location, weights_only: _load(file, map_location="cpu", weights_only=weights_only)


def printed(script: str) -> dict:
    """What a script prints, or how it failed."""
    waits.clear(), launches.clear()
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            exec(compile(script, "script", "exec"), {"__name__": "script"})
        except BaseException:
            traceback.print_exc()
            return {"code": 1, "out": out.getvalue()}
    return {"code": 0, "out": out.getvalue()}


def serve() -> None:
    """Answer command lines, one after the other."""
    import lpc_runner.training.learner as learning
    from lpc_runner.config import build
    from lpc_runner.inference import engine

    in_blocks, in_updates = [], []

    class Watched(engine.Blocked):
        def launcher(self, block, warm=True):
            def launch() -> None:
                before = len(waits)
                block()
                in_blocks.extend(waits[before:])

            return launch

    def watched(update):
        def watching(*args, **kwargs):
            before = len(waits)
            result = update(*args, **kwargs)
            in_updates.extend(waits[before:])
            return result

        return watching

    build.resolve_device = lambda name: DEVICE
    engine.make_engine = lambda name, precision, device: Watched(precision, device)
    for name in ("gradients", "apply"):
        setattr(learning.Learner, name, watched(getattr(learning.Learner, name)))
    print(json.dumps({"ready": True}), flush=True)
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        order = json.loads(line)
        if "script" in order:
            print(json.dumps(printed(order["script"])), file=answers, flush=True)
            continue
        os.chdir(order["cwd"])
        sys.argv, code = ["lpc_runner", *order["argv"]], 0
        in_blocks.clear(), in_updates.clear(), waits.clear(), launches.clear()
        try:
            importlib.import_module(order["module"]).main()
        except SystemExit as leaving:
            code = leaving.code or 0
        except BaseException:
            traceback.print_exc()
            code = 99
        found = {"code": code, "waits_in_blocks": in_blocks, "waits_in_updates": in_updates}
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.modules["simulated"] = sys.modules["__main__"]  # for scripts: the device is registered once in a process
    serve()
