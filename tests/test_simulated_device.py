"""Whole runs on a device whose memory the CPU cannot read: what would fail on a GPU, on machines without one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, TINY_VAE, environment, only_run, result_of
from test_sequence_run import LORENZ, SMALL

HERE = Path(__file__).parent
CONV = (*(item for item in TINY if not item.startswith("model")), "sampler.num_steps=2", "trainer.max_updates=3")
SHORT = ("sampler.num_steps=2", "trainer.max_updates=2", "metrics.num_gap_trials=2", "metrics.free_steps=2")
LEARNING = ("preconditioning=fisher", "step_size=annealed", "sampler.start=persistent")
FAST = {
    "conv": (*CONV, *LEARNING),
    "vae": (*TINY_VAE, "method=vae", "model/likelihood=gaussian"),
}
SLOW = {
    "default": (*TINY, "model.likelihood.scale=optimal", "step_size=polynomial"),
    "lfads_vae": ("model=lfads", *LORENZ, *SHORT[1:], "method=vae"),
    "iwae": (*TINY_VAE, "method=iwae"),
    "classifier": (*TINY, "metrics.extractor=classifier"),
    "pc": (*TINY, "method=pc"),
    "lpc_persistent": (*TINY, "method=lpc_persistent", "sampler.first_steps=2"),
    "no_warm_start": (*TINY, "method=no_warm_start"),
    "thinned": (*TINY, "sampler.theta_every=2", "preconditioning=adam"),
    "last": (*TINY, "sampler.theta_states=last", "preconditioning=adam_damped"),
    "linear": (*(item for item in TINY if "hidden" not in item), "model=linear"),
    "lfads": ("model=lfads", *LORENZ, *SHORT, "objective=jeffreys", "dataset.num_held_out=3"),
    "lds": ("model=lds", "dataset=lds", *SMALL, *SHORT, "objective=jeffreys"),
    "lds_vem": ("model=lds", "dataset=lds", *SMALL, *SHORT[1:], "method=vem"),
    "poisson_lds": ("model=poisson_lds", *LORENZ, *SHORT, "objective=reverse"),
    "nonlinear": ("model=nonlinear", *LORENZ, *SHORT, "objective=jeffreys"),
    "factor_analysis": (*(item for item in LORENZ if "_dim" not in item), "model=factor_analysis", "objective=forward"),
}
CASES = {name: pytest.param(arguments, id=name) for name, arguments in FAST.items()} | {
    name: pytest.param(arguments, id=name, marks=pytest.mark.slow) for name, arguments in SLOW.items()
}


class Server:
    """A process in which the device is simulated: it changes torch for good."""

    def __init__(self, log: Path) -> None:
        self.log, command = log, [sys.executable, str(HERE / "simulated.py")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with log.open("w") as file:
            self.process = subprocess.Popen(command, **pipes, stderr=file, env=environment())
        self.answer()

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        assert line, self.log.read_text()
        return json.loads(line)

    def run(self, arguments, folder: Path, module: str = "lpc_runner.main") -> dict:
        return self.asked({"module": module, "argv": list(arguments), "cwd": str(folder)})

    def printed_by(self, script: str) -> str:
        """What a script prints, which may import the device."""
        answer = self.asked({"script": script})
        assert answer["code"] == 0, self.log.read_text()[-3000:]
        return answer["out"]

    def asked(self, order: dict) -> dict:
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return self.answer()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    started = Server(tmp_path_factory.mktemp("simulated") / "log")
    yield started
    started.process.stdin.close()
    started.process.wait()
    started.process.stdout.close()


@pytest.mark.parametrize("arguments", CASES.values())
def test_a_run_on_a_device_of_its_own(command, workplace, server, arguments):
    """Numbers of the CPU's run; no block that a graph captures waits for the device, nor does the rest of an update.

    Data, updates, traces, checkpoints, metrics and pictures are all made there. (E-steps look after each whether the
    encoder's gradient is finite.)
    """
    assert command(*arguments, "output_dir=here").code == 0
    answer = server.run([*arguments, "output_dir=there"], workplace)
    assert answer["code"] == 0, server.log.read_text()[-3000:]
    assert answer["waits_in_blocks"] == []
    assert answer["waits_in_updates"] == [] or "method=vem" in arguments
    there, here = (result_of(only_run(workplace / name)) for name in ("there", "here"))
    assert (there["device"], here["device"]) == ("simulated:0", "cpu")
    assert there["metrics"] == pytest.approx(here["metrics"], rel=2e-3, abs=1e-5) and len(here["metrics"]) > 5


def test_a_run_goes_on_there_and_is_read_there(workplace, server):
    """Resuming, evaluating and sampling: checkpoints and caches cross to the device, what chains learned with them."""
    arguments = (*TINY, "trainer.checkpoint_seconds=1e-9", *LEARNING)
    assert server.run(arguments, workplace)["code"] == 0
    run = only_run()
    first, (newest, *_) = result_of(run), sorted((run / "checkpoints").iterdir(), reverse=True)
    newest.unlink(), (run / "result.json").unlink()
    assert server.run(arguments, workplace)["code"] == 0, server.log.read_text()[-3000:]
    assert result_of(run)["metrics"] == first["metrics"]
    assert len((run / "sessions.jsonl").read_text().splitlines()) == 2
    for module, more in (("evaluate", ["metrics.num_samples=30"]), ("sample", ["--num", "5", "--output", "five.npz"])):
        answer = server.run([str(run), *more], workplace, f"lpc_runner.{module}")
        assert answer["code"] == 0, server.log.read_text()[-3000:]
    assert np.load("five.npz")["images"].shape == (5, 1, 28, 28)


SCRIPT = """
import torch
from simulated import DEVICE, launches, waits

one = torch.ones(3, device=DEVICE)
assert float((one + 1).sum()) == 6 and waits == ["_local_scalar_dense"] and launches[1:3] == ["add", "sum"]
for wrong in (lambda: one + torch.ones(3), lambda: one.numpy(), lambda: torch.cat([one, torch.ones(3)])):
    try:
        wrong()
    except (RuntimeError, TypeError):
        continue
    raise SystemExit("a CPU read the device's memory")
waits.clear()
one[one > 0], one.cpu(), torch.ones(3).to(DEVICE)
assert len(waits) == 3, waits
weight = torch.nn.Linear(3, 2).to(DEVICE).weight
weight.sum().backward()
assert weight.grad.device == DEVICE and weight.grad.tolist() == [[1.0] * 3] * 2
"""


def test_the_device_is_not_the_cpu(server):
    """Mixing devices and reading its memory fail, waits are noticed, gradients are there."""
    server.printed_by(SCRIPT)


LIKELIHOOD = """
import math
from unittest import mock
import torch
from simulated import DEVICE, launches
from lpc_runner.base.distributions import log_bin_probability

for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
    for sigma in (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0):
        x = (torch.arange(256, dtype=dtype) / 127.5 - 1)[:, None].expand(256, 200)
        away = torch.linspace(-60, 60, 200, dtype=dtype) * sigma
        found, narrow = [], 4 * torch.finfo(dtype).eps * 255 * sigma  # two nearly equal erfc, of two libraries
        for device, compiling in (("cpu", False), ("cpu", True), (DEVICE, False)):
            level, mean = x.to(device), (x + away).to(device).detach().requires_grad_()
            log_scale = torch.tensor(math.log(sigma), dtype=dtype, device=device).requires_grad_()
            launches.clear()
            with mock.patch("torch.compiler.is_compiling", lambda: compiling):
                value = log_bin_probability(level, mean, log_scale)
            assert launches == (["log_bin_probability"] if device is DEVICE else [])
            parts = value, *torch.autograd.grad(value.sum(), [mean, log_scale])
            found.append([part.detach().cpu() for part in parts])
        for other in found[1:]:
            for one, two in zip(found[0], other):
                torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance / sigma + narrow)

# What is not finite is so on both: else a run that diverges would not be seen there.
BAD = (math.nan, 0), (math.inf, 0), (-math.inf, 0), (1e30, -60), (0.3, math.nan), (0.3, -math.inf)
for mean, log_scale in BAD:
    found = []
    for device in ("cpu", DEVICE):
        level = (torch.arange(256) / 127.5 - 1).to(device)
        inputs = torch.full((256,), mean, device=device), torch.tensor(float(log_scale), device=device)
        value = log_bin_probability(level, *(one.requires_grad_() for one in inputs))
        found.append([part.detach().cpu() for part in (value, *torch.autograd.grad(value.sum(), inputs))])
    assert not math.isfinite(found[0][0].sum()) and not math.isfinite(found[0][2])
    for one, two in zip(*found):
        torch.testing.assert_close(one, two, equal_nan=True)

# The mean's layout, whichever x has; of a mean in bfloat16 the likelihood is float32.
x, log_scale = torch.zeros(2, 3, 4, 4, device=DEVICE), torch.zeros((), device=DEVICE)
mean = torch.linspace(-1, 1, 96).view(2, 4, 4, 3).permute(0, 3, 1, 2).bfloat16().to(DEVICE).requires_grad_()
value = log_bin_probability(x, mean, log_scale)
assert value.dtype == torch.float32 and value.is_contiguous(memory_format=torch.channels_last)
(slope,) = torch.autograd.grad(value.sum(), mean)
assert slope.dtype == torch.bfloat16 and slope.is_contiguous(memory_format=torch.channels_last)
want = log_bin_probability(x.cpu(), mean.detach().cpu().float(), log_scale.cpu())
torch.testing.assert_close(value.cpu(), want, rtol=1e-5, atol=4 * 2.0**-23 * 255)
"""


def test_the_likelihood_there_is_that_of_the_cpu(server):
    """One kernel, whose text is compiled here; torch.compile takes every pixel as core and as tail; all agree."""
    server.printed_by(LIKELIHOOD)


FREE = """
import torch
from series import NUM_NEURONS, NUM_STEPS, lds
from simulated import DEVICE
from lpc_runner.evaluation.bounds import FreeFit, importance_bound

model, x = lds(inputs="none").to(DEVICE), torch.zeros(3, NUM_STEPS, NUM_NEURONS, dtype=torch.float64, device=DEVICE)
fitted = FreeFit(1, 2, 0.1)(model, x, None, 0)
torch.stack([importance_bound(model, x, fitted.q, 2, 0).elbo, fitted.drift])
"""


def test_a_free_q_in_closed_form_is_there(server):
    server.printed_by(FREE)


LAUNCHES = """
import torch
from simulated import DEVICE, launches
from lpc_runner.base.distributions import DiscretisedGaussian
from lpc_runner.inference.chain import ChainNoise
from lpc_runner.inference.engine import Blocked
from lpc_runner.inference.preconditioning import Adam
from lpc_runner.inference.samplers import Langevin
from lpc_runner.inference.step_sizes import Constant
from lpc_runner.models.conv import Conv

class Counting(Blocked):
    def launcher(self, block):
        def launch():
            before = len(launches)
            block()
            print((len(launches) - before) / block.length, launches[before:].count("clone"))
        return launch

for side in (32, 64):
    model = Conv((3, side, side), 40, 1.0, DiscretisedGaussian("learned", 1.0, 0.9), 0.3).to(DEVICE)
    sampler = Langevin(32, "all", Constant(1e-3), Adam(0.25, 1e-3, None))
    x, z = torch.zeros(2, 3, side, side), torch.zeros(2, 40)
    noise, theta = ChainNoise(0, 0, (2, 40), DEVICE), list(model.parameters())
    Counting("fp32", DEVICE).run(model.log_joint, (x.to(DEVICE),), z.to(DEVICE), sampler, noise, parameters=theta)
"""


def test_a_step_launches_no_more_kernels_than_it_did(server):
    """What a step costs on a GPU where each kernel is small: docs/engine.md has the number. No image is copied."""
    for line in server.printed_by(LAUNCHES).splitlines():
        launched, copied = map(float, line.split())
        assert 40 < launched < 62.5 and copied == 0


WHOLE = """
import collections
import torch
from simulated import DEVICE, launches, waits
from lpc_runner.data.dataset import Batch
from lpc_runner.base.distributions import DiscretisedGaussian
from lpc_runner.inference.engine import Blocked
from lpc_runner.inference.objectives import ImportanceWeighted
from lpc_runner.inference.objectives import WeightedKL
from lpc_runner.inference.samplers import NoSteps
from lpc_runner.models.dense import MLP
from lpc_runner.training.learner import Learner
from lpc_runner.training.learner import AdamOptimizer

inside = []

class Counting(Blocked):
    def launcher(self, work, warm=True):
        def launch():
            before = len(launches)
            work()
            inside.append(launches[before:])
        return launch

for objective in (WeightedKL(0.0, 1.0), ImportanceWeighted(5)):
    model = MLP((1, 8, 8), 4, 1.0, DiscretisedGaussian("learned", 1.0, 0.9), 0.3, [16]).to(DEVICE)
    encoder = model.build_encoder().to(DEVICE)
    parts, engine = (model, encoder, NoSteps(None, None), objective), Counting("fp32", DEVICE)
    learner = Learner(*parts, AdamOptimizer(1e-3, [0.9, 0.999], 1e-8), engine=engine)
    batch = Batch(torch.zeros(3, 1, 8, 8).to(DEVICE), torch.arange(3).to(DEVICE))
    for update in range(4):
        inside.clear(), launches.clear(), waits.clear()
        gradients = learner.gradients(batch, 0, update, False)
        learner.apply(batch, gradients)
    made = collections.Counter(launches)
    for work in inside:
        made -= collections.Counter(work)
    print(len(inside), sum(map(len, inside)), sum(made.values()), len(waits))
"""


def test_without_a_chain_all_of_an_update_is_in_two_blocks(server):
    """Gradients, then both optimisers' steps; outside, noise is drawn and copied with the batch into fixed tensors."""
    for line in server.printed_by(WHOLE).splitlines():
        blocks, inside, outside, waited = map(int, line.split())
        assert blocks == 2 and inside > 100 and outside <= 4 and waited == 0
