"""One run on several ranks: the numbers of one rank, whatever happens to a rank; gloo, as torchrun starts it."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch._dynamo  # what ranks would each import, were it not there when they fork
import torchvision.utils  # noqa: F401
from conftest import (
    TELLING,
    TINY,
    assert_same_run,
    cell_of,
    environment,
    finish,
    only_run,
    result_of,
    rows_of,
    spin_counts,
    weights_of,
    write_images,
)

from benchmarks.ranks import bytes_per_update, numbers_per_update
from lpc_runner.base.distributions import DiscretisedGaussian
from lpc_runner.base.errors import UserError
from lpc_runner.base.ranks import Ranks
from lpc_runner.data.dataset import Batches, Split
from lpc_runner.data.images import ImageDataset
from lpc_runner.evaluation.samples import sample_images, share_of
from lpc_runner.inference.engine import Blocked
from lpc_runner.inference.objectives import WeightedKL
from lpc_runner.inference.preconditioning import Adam as PerSample
from lpc_runner.inference.preconditioning import Fisher, Identity, SharedAdam
from lpc_runner.inference.samplers import MALA, Langevin
from lpc_runner.inference.sharing import require_shareable
from lpc_runner.inference.step_sizes import Adapted, Constant
from lpc_runner.main import main
from lpc_runner.models.dense import MLP
from lpc_runner.runner.plan import plan
from lpc_runner.runner.run import execute
from lpc_runner.store.log import MetricLog
from lpc_runner.tracking.progress import Progress
from lpc_runner.tracking.tracker import Tracker
from lpc_runner.training.learner import AdamOptimizer, Learner
from lpc_runner.training.traces import Traces
from lpc_runner.training.trainer import Interrupted, Trainer

SHAPE, BATCH = (1, 8, 8), 8


class Common(PerSample):
    """G = 1 / (E|g| + β), the mean over the batch: a coupling of one's own, as docs/extending.md has it."""

    couples_batch = True
    mean = staticmethod(lambda rows: rows.mean(0, keepdim=True))

    def init(self, z, q=None):
        return None

    def update(self, state, drift, t):
        return state, 1 / (self.mean(drift.abs()) + self.beta)


class Unsaid(Common):
    couples_batch = False


class NotByMean(Common):
    def update(self, state, drift, t):
        return state, 1 / (drift.abs().mean(0) + self.beta)


class NoMean(Common):
    mean = None


# Preconditioner, weights of the objective, scale.
CASES = {
    "jeffreys, adam": (PerSample, (0.5, 0.5), "learned"),
    "forward, adam_shared": (SharedAdam, (1.0, 0.0), "learned"),
    "jeffreys, coupling of one's own": (Common, (0.5, 0.5), "learned"),
    "prior, optimal": (PerSample, (0.0, 0.0), "optimal"),
    "reverse, fisher": (lambda *_: Fisher(0.9, 1.0), (0.0, 1.0), "learned"),
    "forward, persistent": (lambda *_: Fisher(0.9, 1.0), (1.0, 0.0), "learned"),
    "reverse, adapted": (lambda *_: Identity(), (0.0, 1.0), "learned"),
}


class Images:
    """As much of a dataset as batches need, in the precision wanted."""

    name = "test"

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def to_model(self, values: torch.Tensor) -> torch.Tensor:
        return ImageDataset.to_model(self, values).to(self.dtype)


def train(ranks: Ranks, case: str, dtype: torch.dtype, num_updates: int) -> dict:
    """Parameters and logged values after some updates of a small model."""
    metric, weights, scale = CASES[case]
    torch.manual_seed(ranks.rank)  # ranks start apart: what they share must bring them together
    model = MLP(SHAPE, 3, 1.0, DiscretisedGaussian(scale, 0.3, 0.9), 0.3, [16]).to(dtype)
    objective = WeightedKL(*weights)
    encoder = model.build_encoder().to(dtype) if objective.uses_encoder else None
    start = "persistent" if case == "forward, persistent" else "encoder"
    kind, size = (MALA, Adapted(1.0, None)) if case == "reverse, adapted" else (Langevin, Constant(1e-3))
    sampler = kind(5, "all", size, metric(0.25, 1e-8, None), start=start)
    learner = Learner(model, encoder, sampler, objective, AdamOptimizer(1e-4, [0.9, 0.999], 1e-8), ranks, num_train=40)
    learner.load_state_dict(ranks.share(learner.state_dict()))
    source = torch.Generator().manual_seed(0)
    split = Split(torch.randint(256, (40, *SHAPE), dtype=torch.uint8, generator=source))
    batches = Batches(split, Images(dtype), BATCH, 0, rows=ranks.rows(BATCH))
    for update in range(num_updates):
        batch = batches.batch(*divmod(update, batches.num_batches))
        gradients = learner.gradients(batch, 0, update, start_from_prior=update < 2, stop=ranks.rank == 1)
        if gradients.verdict():
            learner.apply(batch, gradients)
        else:
            assert case == "reverse, adapted" and learner.pass_over(gradients)
    parts = [model.state_dict(), *([encoder.state_dict()] if encoder else [])]
    every = [(f"{number}/{key}", value) for number, part in enumerate(parts) for key, value in part.items()]
    if learner.kept is not None:
        assert learner.kept.z.isfinite().all() or num_updates == 1  # on every rank those of all
        every.append(("kept", learner.kept.z.nan_to_num()))
    if isinstance(learner.sampler.preconditioner, Fisher):
        every.append(("second moment", learner.sampler.preconditioner.second_moment))
    if isinstance(size, Adapted):
        every.append(("step size", size.size))
    numbers = {key: value for key, value in every if value.is_floating_point()}
    return {
        "parameters": numbers,
        "scalars": {key: float(value) for key, value in gradients.scalars.items()},
        "evaluations": gradients.num_evaluations,
        "signalled": int(gradients.stop),
    }


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _rank(target, rank: int, size: int, port: int) -> None:
    torch.set_num_threads(1)
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in where.items()}
    target(rank)


def codes_of(size: int, target) -> list[int]:
    """Exit codes of `size` processes that call `target(rank)` with what torchrun sets."""
    context = multiprocessing.get_context("fork")
    port = free_port()
    processes = [context.Process(target=_rank, args=(target, rank, size, port)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    return [process.exitcode for process in processes]


def on_ranks(size: int, work, folder: Path) -> list:
    """What `work(ranks)` returns on each of `size` processes."""

    def target(rank: int) -> None:
        ranks = Ranks.connect()
        torch.save(work(ranks), folder / f"{rank}.pt")
        ranks.close()

    assert codes_of(size, target) == [0] * size
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def distance(one: dict, other: dict) -> float:
    """Relative distance of two sets of parameters, all of them taken as one vector."""
    left, right = (
        torch.cat([value.double().flatten() for value in side["parameters"].values()]) for side in (one, other)
    )
    return float((left - right).norm() / left.norm())


def compare(size: int, case: str, dtype: torch.dtype, folder: Path) -> None:
    work = functools.partial(train, case=case, dtype=dtype, num_updates=25)
    alone = work(Ranks(0, 1, 0))
    together = on_ranks(size, work, folder)
    for rank in together:
        assert rank["signalled"] == 1  # every rank heard of the one that was told to stop
        for key, value in rank["parameters"].items():
            assert torch.equal(value, together[0]["parameters"][key]), f"replicas differ in {key}"
    assert distance(alone, together[0]) <= {torch.float64: 1e-12, torch.float32: 1e-6}[dtype]
    assert alone["evaluations"] == together[0]["evaluations"]
    if dtype == torch.float64:
        for key, value in alone["scalars"].items():
            assert together[0]["scalars"][key] == pytest.approx(value, rel=1e-9), key


ALSO_FLOAT32 = ("jeffreys, adam",)  # the arithmetic of runs; float64 tells more


@pytest.mark.parametrize("case, dtype", [
    pytest.param(case, dtype, id=f"{case}-{dtype}", marks=[] if fast else pytest.mark.slow)
    for case in CASES for dtype in (torch.float32, torch.float64)
    for fast in [dtype == torch.float64 or case in ALSO_FLOAT32]
])  # fmt: skip
def test_two_ranks_make_the_updates_of_one(case, dtype, tmp_path):
    compare(2, case, dtype, tmp_path)


def test_what_cannot_be_shared_is_refused():
    """A coupling that is not said, that goes around `mean`, or that has none; and a sampler that says no way."""
    chain = lambda metric: Langevin(5, "all", Constant(1e-3), metric(0.25, 1e-8, None))
    for metric in (PerSample, SharedAdam, Common):
        require_shareable(chain(metric), 3)
    for metric, says in (
        (Unsaid, "depend on one another in Langevin with Unsaid"),
        (NotByMean, "depend on one another in Langevin with NotByMean"),
        (NoMean, "NoMean couples the chains of a batch and has no `mean`"),
    ):
        with pytest.raises(UserError, match=says):
            require_shareable(chain(metric), 3)
    sampler = chain(Common)
    sampler.averaging_by = None
    with pytest.raises(UserError, match="Langevin couples the chains of a batch and has no averaging_by"):
        require_shareable(sampler, 3)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case", CASES)
def test_four_ranks_make_the_updates_of_one(case, dtype, tmp_path):
    compare(4, case, dtype, tmp_path)


def _count_sums(ranks: Ranks) -> dict:
    import torch.distributed as dist

    real, sent = dist.all_reduce, []
    dist.all_reduce = lambda tensor, *args: (sent.append(tensor.numel()), real(tensor, *args))
    counts = {}
    for case in CASES:
        sent.clear()
        result = train(ranks, case, torch.float32, 1)
        counts[case] = (list(sent), sum(value.numel() for key, value in result["parameters"].items()), result)
    dist.all_reduce = real
    return counts


def fit_with_trace(ranks: Ranks, engine: Blocked, folder: Path) -> list:
    """Rows of the log of two updates, the last of which is traced; only rank 0 writes."""
    torch.manual_seed(0)
    model = MLP(SHAPE, 3, 1.0, DiscretisedGaussian("learned", 0.3, 0.9), 0.3, [16])
    sampler = Langevin(5, "all", Constant(1e-3), PerSample(0.25, 1e-8, None))
    optimizer = AdamOptimizer(1e-4, [0.9, 0.999], 1e-8)
    learner = Learner(model, model.build_encoder(), sampler, WeightedKL(0.5, 0.5), optimizer, ranks, engine)
    split = Split(torch.randint(256, (40, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))
    tracker = Tracker(MetricLog(folder / "metrics.jsonl") if ranks.is_main else None)
    run, trainer = folder / str(ranks.rank), Trainer(1, BATCH, 0, 2, 1, 60.0, None)
    trainer.fit(
        learner,
        Batches(split, Images(torch.float32), BATCH, 0, rows=ranks.rows(BATCH)),
        seed=0,
        folder=run,
        counters=trainer.restore(learner, run),
        tracker=tracker,
        progress=Progress(silent=True),
        traces=Traces([2], 0, 2),
        measure=lambda counters: {},
        measure_every=0,
    )
    tracker.close("finished")
    return MetricLog.read(folder / "metrics.jsonl") if ranks.is_main else []


def test_a_traced_update_logs_the_same_on_every_rank(tmp_path):
    """An engine that hides its steps shows those of a traced chain: all ranks then sum one more number."""
    rows, nothing = on_ranks(2, functools.partial(fit_with_trace, engine=Blocked(), folder=tmp_path), tmp_path)
    assert ["chain/mala_acceptance" in row for row in rows] == [False, True] and nothing == []
    assert (tmp_path / "0/traces").is_dir() and not (tmp_path / "1").exists()
    (tmp_path / "alone").mkdir()
    alone = fit_with_trace(Ranks(0, 1, 0), Blocked(), tmp_path / "alone")
    for key in ("chain/mala_acceptance", "train/elbo", "chain/log_joint_last"):
        assert rows[1][key] == pytest.approx(alone[1][key], rel=1e-5), key


def test_one_sum_per_update_of_the_length_stated(tmp_path):
    """adam_shared: d numbers more per step of the chain; the optimal scale: one number more; fisher: d in the sum."""
    counts, _ = on_ranks(2, _count_sums, tmp_path)
    for case, more in (
        ("jeffreys, adam", []),
        ("forward, adam_shared", [3] * 5),
        ("prior, optimal", [1]),
        ("reverse, fisher", []),
    ):
        sent, num_numbers, result = counts[case]
        assert sorted(sent)[:-1] == more
        num_parameters = num_numbers - (case == "prior, optimal")  # the optimal scale is a buffer
        # Means: what is logged without the norms (computed afterwards) and the largest variance, and Σz.
        norms = sum(key.endswith("gradient_norm") for key in result["scalars"])
        of_parts = sum(key.startswith("chain/fisher") for key in result["scalars"])
        num_means = len(result["scalars"]) - norms - of_parts - 1 + 1
        assert max(sent) == numbers_per_update(num_parameters, num_means, 1, 2)


def test_communication_volume_of_the_papers_model():
    """2 (P - 1)/P of 4 bytes per parameter, as of a ring; 0 for one rank; adam_shared adds T d numbers."""
    assert bytes_per_update(1000, 1) == 0
    assert bytes_per_update(1_000_000, 8, num_scalars=0) == pytest.approx(2 * 7 / 8 * 4e6, rel=1e-4)
    added = bytes_per_update(1000, 2, num_steps=300, shared_dim=40) - bytes_per_update(1000, 2)
    assert added == 4 * 300 * 40


def test_a_value_that_is_not_finite_on_one_rank_is_not_finite_on_any(tmp_path):
    def work(ranks: Ranks) -> bool:
        bad = torch.tensor([1.0, float("nan") if ranks.rank == 1 else 2.0])
        gradients, values, _ = ranks.combine([bad], {"mean": torch.tensor(1.0 + ranks.rank)}, {"max": bad[0]}, False)
        return bool(gradients[0].isfinite().all()), float(values["mean"]), float(values["max"])

    assert on_ranks(2, work, tmp_path) == [(False, 1.5, 1.0)] * 2


def test_samples_of_all_ranks_in_order_are_those_of_one():
    class Means:
        latent_dim, prior = 2, type("Prior", (), {"scale": 1.0})
        parameters = lambda self: iter([torch.zeros(1)])
        decode = lambda self, z: z.view(-1, 1, 1, 2).tanh()

    for num in (1, 40, 250, 600, 1000, 1001):
        whole = torch.cat(list(sample_images(Means(), num, 3)))
        for size in (2, 3, 4):
            parts = [list(sample_images(Means(), num, 3, Ranks(rank, size, rank))) for rank in range(size)]
            assert [sum(map(len, part)) for part in parts] == share_of(num, Ranks(0, size, 0))
            assert torch.equal(torch.cat([chunk for part in parts for chunk in part]), whole)


def test_rows_of_a_batch_and_what_does_not_divide():
    assert [Ranks(rank, 4, rank).rows(8) for rank in range(4)] == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)]
    with pytest.raises(UserError, match=r"batch_size=9 .* divisible by their number, 4"):
        Ranks(0, 4, 0).rows(9)
    with pytest.raises(UserError, match="device=cuda gives each its own"):
        Ranks(0, 2, 0).device(torch.device("cuda:1"))


# The command line.


@pytest.fixture
def settings(tmp_path) -> tuple[str, ...]:
    """Ten updates over three epochs, measured after each epoch, 300 samples of which the second rank draws 50."""
    images = write_images(tmp_path / "images.npz", count=45)
    keep = [item for item in TINY if not item.startswith(("trainer.max_updates", "trainer.batch", "metrics."))]
    return (
        *keep,
        "dataset=arrays",
        f"dataset.train={images}",
        f"data_dir={tmp_path}/data",
        "trainer.batch_size=10",
        "trainer.max_updates=10",
        "metrics.num_samples=300",
        "metrics.num_samples_during=8",
        "metrics.every_epochs=1",
        "preconditioning=adam_shared",
    )


def torchrun(cwd: Path, size: int, *arguments: str, launcher: tuple[str, ...] = (), **more) -> subprocess.Popen:
    cwd.mkdir(exist_ok=True)
    where = () if "--master-port" in launcher else ("--standalone",)
    # Ranks meet at this address: a machine's name need not be known to its own resolver.
    words = (*where, "--local-addr", "127.0.0.1", "--nproc-per-node", str(size), *launcher)
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *words, "-m", "lpc_runner", *arguments],
        cwd=cwd,
        env=environment() | TELLING,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **more,
    )


def assert_close_runs(one: Path, other: Path) -> None:
    left, right = weights_of(one), weights_of(other)
    assert left.keys() == right.keys()
    for key, value in left.items():
        if not isinstance(value, torch.Tensor) or key.endswith("step"):
            assert value == right[key], key
        elif not key.endswith("exp_avg_sq"):
            assert torch.allclose(value, right[key], rtol=1e-4, atol=1e-5), key
    for row, same in zip(rows_of(one), rows_of(other), strict=True):
        assert same == pytest.approx(row, rel=2e-3, abs=1e-3)
    expected = pytest.approx(result_of(one)["metrics"], rel=1e-3, abs=1e-4)
    assert result_of(other)["metrics"] == expected


def test_torchrun_with_two_ranks_is_the_run_of_one_process(settings, tmp_path, command):
    together = tmp_path / "together"
    out = finish(torchrun(together, 2, *settings))
    assert out.count("finished: 10 updates") == 1  # one rank speaks
    assert (
        spin_counts(out).count(0) >= 2 or platform.system() != "Linux"
    )  # threads of the ranks sleep; torchrun's need not
    assert command(*settings).code == 0
    one, other = only_run(), only_run(together / "outputs")
    assert one.name == other.name  # how many ranks there are is no part of what a run is
    assert_close_runs(one, other)
    (session,) = (json.loads(line) for line in (other / "sessions.jsonl").read_text().splitlines())
    assert session["num_ranks"] == 2
    assert result_of(one)["gradient_evaluations"] == result_of(other)["gradient_evaluations"]
    before = (other / "result.json").read_bytes()
    again = command(*settings, f"output_dir={together / 'outputs'}")
    assert "already done" in again.err
    assert (other / "result.json").read_bytes() == before


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL wants a GPU for each rank")
@pytest.mark.parametrize("engine", ["eager", "cuda_graph"])
def test_two_gpus_joined_by_nccl_are_the_run_of_one(engine, settings, tmp_path, command):
    # adam_shared sums over the ranks at every step, which no graph holds.
    metric = "adam" if engine == "cuda_graph" else "adam_shared"
    keep = [word for word in settings if not word.startswith(("device=", "preconditioning="))]
    on_cuda = [*keep, "device=cuda", f"engine={engine}", f"preconditioning={metric}"]
    together = tmp_path / "together"
    out = finish(torchrun(together, 2, *on_cuda))
    assert out.count("finished: 10 updates") == 1
    assert command(*on_cuda).code == 0
    assert_close_runs(only_run(), only_run(together / "outputs"))


class Stop(BaseException):
    """As sudden as a kill: nothing below catches it."""


def _until(ranks: Ranks, overrides: tuple[str, ...], last: int) -> bool:
    """Execute a run, dying on the spot at update `last`; whether it died."""
    real = Learner.gradients

    def gradients(self, batch, seed, update, *args, **kwargs):
        if update == last:
            raise Stop
        return real(self, batch, seed, update, *args, **kwargs)

    Learner.gradients = gradients
    try:
        execute(plan(cell_of(*overrides), ranks))
    except Stop:
        return True
    finally:
        Learner.gradients = real
    return False


def test_a_checkpoint_of_two_ranks_goes_on_at_one_and_back(settings, tmp_path, workplace):
    often = (*settings, "trainer.checkpoint_seconds=1e-9")
    assert on_ranks(2, functools.partial(_until, overrides=often, last=3), tmp_path) == [True, True]
    assert _until(Ranks(0, 1, 0), often, 7)
    assert on_ranks(2, functools.partial(_until, overrides=often, last=99), tmp_path) == [False, False]
    sessions = [json.loads(line) for line in (only_run() / "sessions.jsonl").read_text().splitlines()]
    assert [session["num_ranks"] for session in sessions] == [2, 1, 2]
    straight = (*settings, "output_dir=straight")
    assert not _until(Ranks(0, 1, 0), straight, 99)
    assert_close_runs(only_run(Path("straight")), only_run())


def _told_late(ranks: Ranks, overrides: tuple[str, ...]) -> bool:
    """Execute a run whose rank 0 gets a signal while it saves for the last time; whether it left unmeasured."""
    real = Trainer._save

    def save(learner, folder, counters, metrics):
        real(learner, folder, counters, metrics)
        if ranks.is_main and counters.update == 10:
            os.kill(os.getpid(), signal.SIGTERM)

    Trainer._save = staticmethod(save)
    try:
        execute(plan(cell_of(*overrides), ranks))
    except Interrupted:
        return True
    finally:
        Trainer._save = staticmethod(real)
    return False


def test_a_signal_during_the_last_save_ends_every_rank(settings, tmp_path, workplace):
    assert on_ranks(2, functools.partial(_told_late, overrides=settings), tmp_path) == [True, True]
    assert not (only_run() / "result.json").exists()
    assert weights_of(only_run())["/counters/update"] == 10


def children_of(pid: int) -> list[int]:
    """The ranks of a torchrun, in the order in which they were started."""
    return sorted(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "nothing happened for a minute"
        time.sleep(0.005)


def _long(settings) -> tuple[str, ...]:
    keep = [item for item in settings if not item.startswith(("trainer.max_updates", "metrics."))]
    return (*keep, "trainer.num_epochs=75", "trainer.checkpoint_seconds=0.05", "metrics.num_samples=12",
            "metrics.num_samples_during=8", "metrics.every_epochs=20")  # fmt: skip


def _num_rows(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("outputs/runs/*/metrics.jsonl"))


@pytest.mark.faults
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_comes_back_and_ends_bit_identical(victim, settings, tmp_path):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    finish(torchrun(straight, 2, *_long(settings)))
    restarting = ("--max-restarts", "2", "--monitor-interval", "0.1")
    # torchrun's two kinds of rendezvous; the plain one keeps the addresses of ranks that have died.
    place = ("--master-port", str(free_port())) if victim else ()
    process = torchrun(broken, 2, *_long(settings), launcher=(*restarting, *place))
    until(lambda: _num_rows(broken) >= 40)
    os.kill(children_of(process.pid)[victim], signal.SIGKILL)
    finish(process)
    run = only_run(broken / "outputs")
    assert len((run / "sessions.jsonl").read_text().splitlines()) == 2
    assert_same_run(only_run(straight / "outputs"), run)


@pytest.mark.faults
def test_a_signal_to_torchrun_saves_and_the_same_command_goes_on(settings, tmp_path):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    rare = (*_long(settings), "trainer.checkpoint_seconds=1000")
    finish(torchrun(straight, 2, *rare))
    process = torchrun(broken, 2, *rare)
    until(lambda: _num_rows(broken) >= 40)
    process.send_signal(signal.SIGTERM)
    finish(process, code=None)
    run = only_run(broken / "outputs")
    assert not (run / "result.json").exists()
    saved = weights_of(run)["/counters/update"]
    assert saved >= 40 and rows_of(run)[-1]["update"] <= saved
    finish(torchrun(broken, 2, *rare))
    assert_same_run(only_run(straight / "outputs"), run)


def test_a_mistake_on_two_ranks_is_said_once(settings, tmp_path, workplace):
    def target(rank: int) -> None:
        sys.argv = ["lpc_runner", *settings, "trainer.batch_size=9"]
        sys.stdout = sys.stderr = (tmp_path / f"{rank}.txt").open("w", buffering=1)
        main()

    assert codes_of(2, target) == [1, 1]
    assert "trainer.batch_size=9 is the batch of all ranks together" in (tmp_path / "0.txt").read_text()
    assert (tmp_path / "1.txt").read_text() == "" and not Path("outputs/runs").exists()


@pytest.mark.faults
def test_a_mistake_under_torchrun_is_said_once(settings, tmp_path):
    out = finish(torchrun(tmp_path / "odd", 2, *settings, "trainer.batch_size=9"), code=1)
    assert out.count("trainer.batch_size=9 is the batch of all ranks together") == 1
    assert not (tmp_path / "odd" / "outputs" / "runs").exists()
