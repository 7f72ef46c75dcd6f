"""The benchmark compares like with like: rivals compute the same chain, ratios are paired, the floor is a floor."""

import json
import sys
import tarfile

import pytest
import torch

from benchmarks import accuracy, deferred, fleet, floor, kept, report, rivals, stages, suite, training
from benchmarks.variants import Variant, Work, build_model, build_variants, images, measure, ratio, rows_of
from lpc_runner.inference.chain import run_chain
from lpc_runner.inference.preconditioning import Adam, Identity
from lpc_runner.inference.samplers import Langevin
from lpc_runner.inference.step_sizes import Constant

CPU, TINY = torch.device("cpu"), Work(28, 3, 2)


def test_jax_runs_the_same_chain():
    """Same start and noise: JAX ends at our z(T), with our sums of ∇θ and of states (float32)."""
    pytest.importorskip("jax")
    for side in (28, 32, 64):
        model, x = build_model(side, CPU), images(Work(side, 3, 2), CPU)
        update, _ = rivals.jax_chain(model, x, 3)
        z, noise = torch.randn(2, 40), torch.randn(3, 2, 40)
        got, sums, first, second, _ = update(0, z, noise)
        sampler = Langevin(3, "all", Constant(rivals.STEP_SIZE), Adam(rivals.BETA, rivals.EPS, None))
        theta = dict(model.named_parameters())
        want = run_chain(
            lambda z, model=model, x=x: model.log_joint(x, z),
            z,
            sampler,
            lambda t, noise=noise: noise[t - 1],
            parameters=list(theta.values()),
        )
        torch.testing.assert_close(torch.tensor(got.tolist()), want.z, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(torch.tensor(first.tolist()), want.moments.first, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(torch.tensor(second.tolist()), want.moments.second, rtol=1e-3, atol=1e-3)
        gradients = dict(zip(theta, want.theta_gradient))
        names = {"bias0": "decoder.0.bias", "log_scale": "likelihood.log_scale"}
        for ours, theirs in ((gradients[name], sums[key]) for key, name in names.items()):
            torch.testing.assert_close(torch.tensor(theirs.tolist()), 6 * ours, rtol=1e-3, atol=1e-2)


def test_torchebm_runs_plain_langevin():
    """Same generator: torchebm's state after T steps is ours without preconditioning."""
    pytest.importorskip("torchebm")
    model, x = build_model(28, CPU), images(TINY, CPU)
    update, _ = rivals.torchebm_chain(model, x, 3)
    source = torch.Generator().manual_seed(7)
    z = torch.randn(2, 40, generator=source)
    sampler = Langevin(3, "last", Constant(rivals.STEP_SIZE), Identity())
    chain = run_chain(lambda z: model.log_joint(x, z), z, sampler, lambda t: torch.randn(2, 40, generator=source))
    torch.testing.assert_close(update(7), chain.z, rtol=1e-3, atol=1e-3)


def test_ratios_are_paired_by_round():
    """A machine twice as slow in one round changes no ratio; quartiles are those of the times."""
    slow, fast = (Variant(name, 1, None, "slow", times=times) for name, times in (("slow", [4.0, 8.0, 4.4]), ("f", [])))
    fast.times = [2.0, 4.0, 2.2]
    assert ratio(slow, fast) == pytest.approx(2)
    assert fast.quartiles() == pytest.approx((2.1, 2.2, 3.1))


def test_every_variant_runs_and_rows_name_what_is_not_measured(monkeypatch):
    def missing(*_):
        raise ImportError("No module named 'jax'")

    monkeypatch.setattr("benchmarks.variants.jax_chain", missing)
    monkeypatch.setattr("benchmarks.variants.torchebm_chain", missing)
    variants, skipped = build_variants(TINY, CPU, ("eager",))
    measure(variants, 2, CPU)
    rows = rows_of(variants)
    assert len(rows) == len(variants) and all(len(variant.times) == 2 for variant in variants)
    assert next(row for row in rows if row["variant"] == "literal, reverse")["times_faster_than_literal"] == 1
    assert len(skipped) == 2 and all("not measured: No module named 'jax'" in line for line in skipped)
    result = {"work": vars(TINY), "rounds": 2, "rows": [row | {"share_of_floor": None} for row in rows], "floor": {}}
    text = report.markdown_of(result | {"not_measured": skipped})
    assert text.count("\n| ") == len(rows) + 1 and "not measured" in text


@pytest.mark.parametrize("side", [28, 32, 64])
def test_work_of_the_paper_s_decoder(side):
    """Twice the products forward for z and for the weights, layer by layer from Table 2's shapes."""
    last = {28: (14, 9), 32: (16, 9), 64: (16, 16)}[side]  # positions a side of the input or output, taps
    positions = [1, 16 * 256 * 64, 16 * 16 * 64 * 64, 64 * 16 * 64 * 32, last[0] ** 2 * last[1] * 32 * 32]
    positions[0] = 40 * 256
    final = {28: 14, 32: 16, 64: 32}[side] ** 2 * 16 * 32 * 3
    done = floor.work_of_a_step(build_model(side, CPU), images(Work(side, 1, 2), CPU), "fp32")
    assert done["flops"] == 3 * 2 * 2 * (sum(positions) + final)


def test_a_whole_comparison_prints_a_table(monkeypatch):
    """Every stage of the smallest comparison, growth and profile aside, runs to its text."""
    monkeypatch.setattr(floor, "WIDTH", {"cpu": 64})
    monkeypatch.setattr(floor, "COPIED", {"cpu": 2**12})
    result = report.compare(Work(28, 1, 2), 2, CPU, ("eager",))
    text = report.markdown_of(result)
    assert "| literal, jeffreys | eager | fp32 |" in text and "Floor, fp32:" in text and "Floor, bf16:" in text
    assert all(row["share_of_floor"] is None or row["share_of_floor"] > 0 for row in result["rows"])


def test_work_of_a_step_is_counted_by_hand():
    """The last layer alone: 2 · positions · kernel · channels each for the output, for z and for the weights."""
    model, x = build_model(28, CPU), images(TINY, CPU)
    last = model.decoder[-1]
    del model.decoder[:-1]
    model.predict = lambda z: model.decoder(z.repeat(1, 157)[:, : 32 * 14 * 14].view(2, 32, 14, 14))
    done = floor.work_of_a_step(model, x, "fp32")
    assert done["flops"] == 3 * 2 * (2 * 14 * 14) * 32 * 3 * 16
    num_parameters = last.weight.numel() + 3 + 1
    assert done["bytes"] == 4 * 4 * 2 * 3 * 28 * 28 + 16 * num_parameters
    assert floor.floor_seconds({"flops": 6.0, "bytes": 8.0}, {"flops": 2.0, "bytes": 4.0}) == 3


@pytest.mark.parametrize("side", [28, 32, 64])
def test_deferred_weight_gradients_are_those_of_autograd(side):
    """Of every layer, and k copies of a batch give k times the gradient."""
    model, x = build_model(side, CPU), images(Work(side, 1, 2), CPU)
    torch.manual_seed(3)
    seen = deferred._seen(model, x)
    torch.manual_seed(3)
    z = torch.randn(2, model.latent_dim)
    weights = {id(layer): layer.weight for layer in model.decoder if list(layer.parameters())}
    wanted = dict(zip(weights, torch.autograd.grad(model.log_joint(x, z).sum(), list(weights.values()))))
    assert len(seen) == len(weights) == 6
    for part in seen:
        gradient = wanted[id(part.layer)]
        scale = gradient.abs().max().item()
        torch.testing.assert_close(deferred.weight_gradient(part), gradient, rtol=1e-4, atol=1e-5 * scale)
        torch.testing.assert_close(deferred.weight_gradient(part.times(3)), 3 * gradient, rtol=1e-4, atol=1e-4 * scale)


def test_what_deferring_could_save_is_a_share_of_a_step():
    found = deferred.deferred_bound(TINY, CPU, num_deferred=2, rounds=1)
    assert found["share"] == pytest.approx((found["separate"] - found["joint"]) / found["step"])
    assert "Deferring could save at most" in deferred.markdown_of_deferred(found)


def test_coarser_arithmetic_is_further_from_float64():
    """bf16 keeps 8 bits, float32 24: its errors are hundreds of times as large."""
    errors = accuracy.drift_errors(TINY, CPU)
    for name in ("drift_median", "drift_largest", "log_joint_largest"):
        for fine, coarse in zip(errors["fp32"], errors["bf16"]):
            assert 0 < fine[name] < coarse[name] / 5
    assert errors["fp32"][0]["drift_largest"] < 1e-4 and 1e-4 < errors["bf16"][0]["drift_median"] < 0.1
    _, wide, narrow = errors["bf16"]  # σ = .1 and .03: the mean is rounded to the same steps, residuals are about σ
    assert narrow["drift_median"] > 1.3 * wide["drift_median"]
    assert accuracy.markdown_of_errors(errors).count("\n| bf16 |") == 3


@pytest.mark.slow
def test_variants_in_processes_of_their_own_are_compared_with_the_literal_one():
    result = kept.kept_memory(TINY, rounds=2)
    rows = result["rows"]
    assert [(row["variant"], row["kept"]) for row in rows] == [
        ("literal", False), ("literal", True), ("ours", False), ("ours", True),
    ]  # fmt: skip
    for row in rows:
        assert row["ms_per_step"] > 0 and row["quartiles_ms"][0] <= row["ms_per_step"] <= row["quartiles_ms"][1]
    assert rows[0]["ratio"] == 1
    assert kept.markdown_of_kept(result).count("| ours |") == 2


def test_a_suite_s_stages_are_apart(tmp_path, monkeypatch):
    """One fails, one hangs, the rest is measured; what comes back is a few files, written after every stage."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    script = tmp_path / "stages.py"
    script.write_text(STAND_IN)
    real = suite._one
    monkeypatch.setattr(suite, "_one", lambda command, *more: real([sys.executable, str(script), *command[3:]], *more))
    limits = {"smoke": 20.0, "tests": 20.0, "jax": 1.0, "growth": 20.0, "train": 1e4}
    monkeypatch.setattr(suite, "LIMITS", limits)
    monkeypatch.setattr(suite, "GRACE", 0.5)
    results = suite.run_suite(tmp_path / "out", seconds=30.0, device="cpu", more=["a=1"])
    assert results["smoke"]["words"] == ["cpu", str(tmp_path / "out"), "a=1"] and results["smoke"]["exit_code"] == 0
    assert results["tests"]["exit_code"] == 3 and results["tests"]["number"] == 1  # kept before it failed
    assert results["jax"]["ended"] and results["jax"]["exit_code"] < 0 and results["jax"]["seconds"] < 15
    assert results["growth"]["exit_code"] == 0
    assert suite.failed(results)[:2] == ["tests", "jax"]
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"results.json", "benchmark.md", "log.txt"}
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    assert "loud" in (tmp_path / "out" / "log.txt").read_text()
    assert "## jax" in (tmp_path / "out" / "benchmark.md").read_text()


STAND_IN = """
import json, signal, sys, time
name, path, limit, *words = sys.argv[1:]
open(path, "w").write(json.dumps({"number": 1, "words": words}))
print("loud", name)
if name == "tests":
    sys.exit(3)
if name == "jax":  # hangs, and does not listen
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)
"""


def test_a_stage_without_time_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "_one", lambda *_: pytest.fail("nothing is to be started"))
    results = suite.run_suite(tmp_path, ["smoke"], seconds=10.0, device="cpu")
    assert results["smoke"] == {"not_measured": "4 s were left"} and not suite.failed(results)


QUICK = ("smoke", "compare-32", "accuracy", "layouts", "branches", "fleet", "profile")


@pytest.fixture
def small_rates(monkeypatch):
    monkeypatch.setattr(floor, "WIDTH", {"cpu": 64})
    monkeypatch.setattr(floor, "COPIED", {"cpu": 2**12})


@pytest.mark.parametrize("name", QUICK)
def test_every_stage_runs_as_far_as_a_cpu_goes(tmp_path, small_rates, name):
    """The smallest sizes; nothing fails, and each number is kept."""
    stage = stages.Stage(tmp_path / "kept.json", 1e3, CPU, tmp_path, True, [])
    stages.STAGES[name](stage)
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert kept and not [value for value in kept.values() if str(value).startswith("failed")]
    if name == "smoke":
        assert kept["the likelihood's kernel is right"][0] and kept["eager fp32, 64 pixels, equals the loop"] is True
    if name == "compare-32":
        assert len(kept["rows"]) == 9 and kept["literal, jeffreys, eager fp32"]["rounds"] == 2
    if name == "fleet":
        alone, two, ratio = kept.values()
        assert ratio == two / alone and min(alone, two) > 0


def test_a_fleet_s_pace_counts_while_all_of_it_trains():
    """From the last run's first counted update to the first run's last."""
    assert fleet.rate([[0, 1, 2, 3, 4, 5, 6.5]], warm=1) == 5 / 5.5
    assert fleet.rate([[0, 9, 10, 11, 12], [0, 9.5, 10.5, 11.5, 99]], warm=2) == 3 / 1.5


def test_a_number_that_cannot_be_had_is_a_result(tmp_path):
    stage = stages.Stage(tmp_path / "kept.json", 1e3, CPU, tmp_path, True, [])
    stage.attempt("odd", lambda: 1 / 0)
    stage.attempt("late", lambda: pytest.fail("no time"), seconds=1e6)
    assert stage.kept["odd"].startswith("failed: ZeroDivisionError") and "s were left" in stage.kept["late"]

    def broken():
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    with pytest.raises(SystemExit) as leaving:  # the process is not to be trusted any more
        stage.attempt("capture", broken)
    assert leaving.value.code == 3 and stage.kept["capture"].startswith("failed")


def test_archives_of_runs_have_the_newest_checkpoint(tmp_path):
    checkpoints = tmp_path / "runs" / "one-abc" / "checkpoints"
    checkpoints.mkdir(parents=True)
    for update in (1, 2):
        (checkpoints / f"update-{update:09d}-00.pt").write_bytes(b"weights")
    (checkpoints.parent / "metrics.jsonl").write_text("{}")
    (path,) = training.pack(tmp_path / "runs", tmp_path)
    with tarfile.open(path) as archive:
        assert sorted(archive.getnames()) == [
            "one-abc/checkpoints/update-000000002-00.pt", "one-abc/metrics.jsonl",
        ]  # fmt: skip
