"""Whole runs through the command line: what they leave behind, and what a second command does with it."""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, TINY_VAE, earlier_run, only_run, plan_of, result_of, rows_of, weights_of, write_images
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobRuntime
from hydra.version import getbase
from omegaconf import OmegaConf
from PIL import Image

import lpc_runner
from lpc_runner.base.errors import UserError
from lpc_runner.data.digits import Digits
from lpc_runner.evaluation.samples import sample_images
from lpc_runner.runner import in_python
from lpc_runner.runner.run import execute
from lpc_runner.store.log import MetricLog
from lpc_runner.training.learner import Learner

QUALITY = ("fd", "kid", "precision", "recall", "density", "coverage")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def run(command) -> Path:
    """A finished tiny run of the default: Jeffreys, Langevin, per-sample Adam, digits."""
    answer = command(*TINY)
    assert answer.code == 0, answer.err
    return only_run()


def test_what_a_run_leaves_behind(command):
    answer = command(*TINY)
    run = only_run()
    assert answer.code == 0
    assert run.is_symlink() and not os.readlink(run).startswith("/")
    result = result_of(run)
    assert result["status"] == "finished" and result["error"] is None and result["diverged_at"] is None
    assert set(result["metrics"]) == {f"{name}_random_conv" for name in QUALITY} | {
        "elbo",
        "kl",
        "bits_per_dim",
        "active_units",
        "sigma",
    }
    assert all(isinstance(value, float) and math.isfinite(value) for value in result["metrics"].values())
    measured = result["measurement"]
    assert (measured["num_samples"], measured["num_references"], measured["k"]) == (40, 40, 5)
    assert (measured["extractor"], measured["reference"]) == ("random_conv", "train")
    assert len(measured["extractor_hash"]) == 64
    assert (measured["bound_split"], measured["num_bound"]) == ("test", 360)
    # One evaluation per image, chain step and update: 16 images, T = 3, 6 updates.
    assert result["num_updates"] == 6 and result["gradient_evaluations"] == 16 * (
        3 * 6 + 2
    )  # 2: z ~ q beside a prior start
    assert result["num_epochs"] == 6 / (1437 // 16)
    assert 0 < result["train_seconds"] < result["total_seconds"] and result["device"] == "cpu"

    rows = rows_of(run)
    assert [row["update"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["train/gradient_evaluations"] == result["gradient_evaluations"]
    assert rows[-1]["train/sigma"] != rows[0]["train/sigma"]
    for picture in ("final", "data", "reconstructions"):
        with Image.open(run / "samples" / f"{picture}.png") as image:
            pixels = np.asarray(image)
        assert pixels.std() > 0 and min(pixels.shape[:2]) >= 8 * 28 // 2
    assert sorted(path.name for path in run.iterdir() if not path.name.startswith(".")) == [
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "result.json",
        "run.json",
        "samples",
        "sessions.jsonl",
        "traces",
        "trajectories.npz",
    ]
    session = json.loads((run / "sessions.jsonl").read_text())
    assert session["command"] == ["lpc_runner", *TINY] and session["packages"]["torch"] in torch.__version__
    # The closing table: metrics with N, k and extractor, and the paths.
    for word in (
        "fd_random_conv",
        "coverage_random_conv",
        "N = 40",
        "k = 5",
        "final.png",
        "result.json",
        "360 test",
    ):
        assert word in answer.out


def test_a_finished_run_is_not_run_twice(run, command, monkeypatch):
    before = contents(run)
    monkeypatch.setattr(Learner, "gradients", lambda *args, **kwargs: pytest.fail("trained again"))
    answer = command(*TINY)
    assert answer.code == 0 and "already done" in answer.err and "fd_random_conv" in answer.out
    assert contents(run) == before

    assert command("study=second", *TINY).code == 0
    assert only_run(study="second").resolve() == run.resolve()
    assert json.loads((run / "run.json").read_text())["studies"] == ["default", "second"]
    after = contents(run)
    assert {name for name in after if after[name] != before.get(name)} == {"run.json"}


@pytest.mark.parametrize("wanted", [True, False])
def test_a_done_run_is_recorded_again_where_a_tracker_wants_it(wanted, run):
    """An agent of W&B's sweeps gives every choice of values a run, and waits for that run's numbers."""
    recorded = []

    class Sink:
        wants_done_runs = staticmethod(lambda: wanted)
        log = staticmethod(lambda *row: recorded.append(row))
        images = staticmethod(lambda update, name, path: recorded.append((update, name, path.name)))
        summary = staticmethod(recorded.append)
        close = staticmethod(recorded.append)

        def __init__(self, **facts):
            recorded.append((facts["name"], facts["resume_step"]))

    planned = plan_of(*TINY)
    planned.experiment.tracker = functools.partial(Sink)
    execute(planned)
    if not wanted:
        assert recorded == []
        return
    rows: dict[tuple[int, float], dict[str, float]] = {}  # one per update, which may have several lines in the log
    for row in MetricLog.read(run / "metrics.jsonl"):
        rows.setdefault((row.pop("update"), row.pop("epoch")), {}).update(row)
    pictures = [(6, "samples", "final.png"), (6, "reconstructions", "reconstructions.png")]
    final = {f"final/{name}": value for name, value in result_of(run)["metrics"].items()}
    assert recorded == [(run.name, 0), *((*when, row) for when, row in rows.items()), *pictures, final, "finished"]


def test_check_shows_the_plan_and_starts_nothing(run, command, workplace):
    before = contents(workplace)
    answer = command("-m", "check=true", "seed=0,1", *TINY)
    assert answer.code == 0 and "2 runs (1 done, 0 resume, 1 new)" in answer.out
    assert "to download" not in answer.out
    answer = command("-m", "check=true", "dataset=cifar10", "metrics.extractor=inception", "seed=0,1", *TINY)
    assert "dataset=cifar10 also chose metrics=paper, tuned.beta=0.25" in answer.out.splitlines()
    says = "to download first: cifar10 into data, Inception's weights into data/features"
    assert answer.code == 0 and says in answer.out.splitlines()
    assert contents(workplace) == before


def test_the_plan_says_what_the_dataset_chose_and_nothing_that_the_command_did():
    from lpc_runner.config.compose import compose_command
    from lpc_runner.config.words import parse_arguments

    words = "dataset=lorenz,lds,mnist model=lfads trainer.batch_size=80 method=vae check=true -m"
    assert compose_command(parse_arguments(words.split())).chosen == tuple(
        f"dataset={name} also chose tuned=sequences, metrics=sequences, trainer.num_prior_batches=0"
        for name in ("lorenz", "lds")
    )


def test_what_was_taken_of_the_users_files_stands_in_the_plan_the_log_and_the_result(command, tmp_path):
    path = write_images(tmp_path / "images.npz", count=70, notes=np.zeros(3))
    mine = ("dataset=arrays", f"dataset.train={path}", *TINY)
    says = [
        f"{path}: 63 images (1, 28, 28) to train on, 7 to measure on, a tenth held out",
        f"{path}: not read: notes",
    ]
    assert [f"data: {line}" for line in says] == [
        line for line in command("check=true", *mine).out.splitlines() if line.startswith("data: ")
    ]
    answer = command(*mine)
    assert answer.code == 0 and result_of(only_run())["data"] == says
    for line in says:
        assert line in answer.err + answer.out


def test_rerun_starts_beside_the_old_run(run, command):
    before = contents(run.resolve())
    assert command("rerun=true", *TINY).code == 0
    second = Path("outputs/runs") / f"{run.name}-rerun1"
    assert contents(run.resolve()) == before
    assert result_of(second)["metrics"] == result_of(run)["metrics"]  # the same seed: a repetition, not a resumption
    assert rows_of(second) == rows_of(run)
    assert {path.name for path in Path("outputs/default").iterdir()} == {run.name, second.name}
    before = contents(Path("outputs"))
    answer = command("rerun=1", *TINY)  # the same command: a sweep of repetitions goes on where it stopped
    assert answer.code == 0 and "already done" in answer.err and "rerun=2" in answer.err
    assert contents(Path("outputs")) == before
    assert command("-m", "rerun=1,2,1", *TINY).code == 0
    assert {path.name for path in Path("outputs/default").iterdir()} == {run.name, second.name, f"{run.name}-rerun2"}


def test_evaluate_measures_again_without_training(run, command):
    from lpc_runner.evaluate import main

    before = contents(run)
    answer = command(str(run), entry=main)
    assert answer.code == 0, answer.err
    again = json.loads((run / "evaluations" / "random_conv-n40-k5-train-1.json").read_text())
    assert again["metrics"] == result_of(run)["metrics"] and again["update"] == 6
    assert command(str(run), "metrics.num_samples=30", "metrics.k=3", entry=main).code == 0
    other = json.loads((run / "evaluations" / "random_conv-n30-k3-train-1.json").read_text())
    assert (other["measurement"]["num_samples"], other["measurement"]["k"]) == (30, 3)
    assert other["metrics"]["fd_random_conv"] != again["metrics"]["fd_random_conv"]
    assert other["metrics"]["elbo"] == again["metrics"]["elbo"]
    assert command(str(run), entry=main).code == 0  # a second one beside the first
    assert (run / "evaluations" / "random_conv-n40-k5-train-2.json").exists()
    after = contents(run)
    assert {name: after[name] for name in before} == before


def test_evaluate_says_what_is_wrong_in_one_line(run, command):
    from lpc_runner.evaluate import main

    for words, says in (
        (["nowhere"], "no run directory"),
        ([str(run), "trainer.num_epochs=3"], "metrics"),
        ([str(run), "metrics.num_sample=3"], "unknown key metrics.num_sample"),
        ([str(run), "metrics.num_samples=2"], "above k"),
        ([str(run), "metrics.extractor=vgg"], "metrics.extractor"),
        ([str(run), "metrics=papr"], "paper"),
        ([str(run), "dataset.nonsense=3"], "unknown key dataset.nonsense"),
        ([str(run), "metrics.k=["], "metrics.k"),
        ([str(run), "seed"], "seed"),
    ):
        answer = command(*words, entry=main)
        assert answer.code == 1 and len(answer.lines) == 1 and says in answer.err, answer.err
    assert not (run / "evaluations").exists()


def test_a_run_of_a_gpu_is_read_without_one(run, command, tmp_path, monkeypatch):
    """How its chains were launched, and in what arithmetic, asks nothing of the machine that measures it."""
    from lpc_runner.evaluate import main

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    copy = shutil.copytree(run, tmp_path / "copy")
    cfg = OmegaConf.load(copy / "config.yaml")
    cfg.device, cfg.engine, cfg.precision = "cuda", "cuda_graph", "tf32"
    OmegaConf.save(cfg, copy / "config.yaml")
    assert lpc_runner.load(copy).update == 6
    answer = command(str(copy), entry=main)
    assert answer.code == 0, answer.err


def test_sample_and_load_give_the_runs_own_images(run, command, tmp_path):
    from lpc_runner.sample import main

    torch.set_num_threads(2)
    loaded = lpc_runner.load(run)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert num_threads == 2  # the run had one: a caller's process is not the run's
    assert loaded.update == 6 and not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert command(str(run), "--num", "10", "--output", f"{tmp_path}/ten.npz", entry=main).code == 0
    images = np.load(tmp_path / "ten.npz")["images"]
    assert images.shape == (10, 1, 28, 28) and images.dtype == np.uint8
    ours = torch.cat(list(sample_images(loaded.model, 10, 0)))
    np.testing.assert_array_equal(images, ours)
    assert command(str(run), "--num", "10", "--seed", "1", "--output", f"{tmp_path}/1.npz", entry=main).code == 0
    assert not np.array_equal(np.load(tmp_path / "1.npz")["images"], images)
    assert command(str(run), "--num", "64", entry=main).code == 0  # the run's own grid again, the seed being 0
    assert (run / "samples" / "sample-64-seed0-update6.png").read_bytes() == (
        run / "samples" / "final.png"
    ).read_bytes()
    x = Digits().to_model(Digits().load().test.values[:3])
    encode = loaded.encoder(type("Batch", (), {"x": x, "index": torch.arange(3)}))
    assert encode.mean.shape == (3, 4) and bool((encode.mean[0] != encode.mean[1]).any())
    for wrong in (["--num", "0"], ["--output", "x.jpg"], ["--output", f"{tmp_path}/ten.npz"]):
        answer = command(str(run), *wrong, entry=main)
        assert answer.code == 1 and len(answer.lines) == 1


def test_init_from_takes_the_weights_and_nothing_else(run, command):
    answer = command(f"trainer.init_from={run}", "study=onward", *TINY, "trainer.max_updates=1")
    assert answer.code == 0, answer.err
    onward = only_run(study="onward")
    assert onward.resolve() != run.resolve()
    old, new = weights_of(run), weights_of(onward)
    assert new["/counters/update"] == 1
    for key in (key for key in old if key.startswith(("/model", "/encoder"))):
        # One Adam update moves each number by at most the learning rate.
        assert float((new[key] - old[key]).abs().max()) <= 1.01e-3, key
    assert rows_of(onward)[0]["train/sigma"] == pytest.approx(float(old["/model/likelihood.log_scale"].exp()))

    words = ("study=frozen", "trainer.frozen=true", "preconditioning=fisher", "step_size=adapted", *TINY)
    answer = command(f"trainer.init_from={run}", *words, "trainer.max_updates=3")
    assert answer.code == 0, answer.err
    frozen = weights_of(only_run(study="frozen"))
    assert all(bool((frozen[key] == old[key]).all()) for key in old if key.startswith(("/model", "/encoder")))
    assert frozen["/step_size/made"] == 3 and float(frozen["/preconditioner/second_moment"].min()) > 0

    answer = command(f"trainer.init_from={run}", *(w.replace("[16]", "[8]") for w in TINY))
    assert answer.code == 1 and "does not fit" in answer.lines[-1]

    (run / "result.json").unlink()  # weights that may still change would make another run under the same name
    answer = command(f"trainer.init_from={run}", "study=later", *TINY, "trainer.max_updates=2")
    assert answer.code == 1 and len(answer.lines) == 1 and "is not finished" in answer.err
    assert command(f"trainer.init_from={run}", "study=onward", *TINY, "trainer.max_updates=1").code == 0  # it is done


@pytest.mark.parametrize(
    "arguments, has_encoder, evaluations",
    [
        (("objective=prior", *TINY), False, 6 * 3),
        (("objective=prior", "sampler=map", *TINY), False, 6 * 4),  # 3 steps, and θ's gradient at the last state
        (
            ("objective=reverse", "preconditioning=adam_shared", *TINY),
            True,
            6 * 3 + 2,
        ),  # 2: the encoder's own z ~ q beside a prior start
        (("experiment=vae", *TINY_VAE), True, 6 * 1),
    ],
    ids=["prior", "map", "shared", "vae"],
)
def test_the_baselines_are_configurations_of_the_same_code(arguments, has_encoder, evaluations, command):
    answer = command(*arguments)
    assert answer.code == 0, answer.err
    run = only_run()
    result = result_of(run)
    assert result["status"] == "finished" and result["num_updates"] == 6
    assert ("elbo" in result["metrics"]) == has_encoder == (run / "samples" / "reconstructions.png").exists()
    assert any(key.startswith("/encoder") for key in weights_of(run)) == has_encoder
    assert result["gradient_evaluations"] == 16 * evaluations
    assert lpc_runner.load(run).encoder is None or has_encoder


def test_a_diverged_run_is_recorded_and_the_sweep_goes_on(command):
    answer = command("-m", "step_size.value=1e30,0.01", "preconditioning=none", "study=steps", *TINY)
    assert answer.code == 0, answer.err
    results = [result_of(path) for path in Path("outputs/steps").iterdir()]
    assert sorted(result["status"] for result in results) == ["diverged", "finished"]
    (lost,) = (result for result in results if result["status"] == "diverged")
    assert lost["diverged_at"]["update"] == lost["num_updates"] + 1 <= 6
    assert lost["state_measured"] == "last finite state"
    assert all(math.isfinite(value) for value in lost["metrics"].values()) and "fd_random_conv" in lost["metrics"]
    assert "diverged" in answer.out


def _failing(monkeypatch, seed: int, message: str):
    real = Learner.gradients

    def gradients(self, batch, run_seed, update, *args, **kwargs):
        if run_seed == seed and update == 3:
            raise RuntimeError(message)
        return real(self, batch, run_seed, update, *args, **kwargs)

    monkeypatch.setattr(Learner, "gradients", gradients)


def test_a_failing_job_does_not_end_the_sweep(command, monkeypatch, tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "pair.yaml").write_text(
        "# @package _global_\nstudy: pair\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      seed: 0,1\n"
    )
    sweep = (f"--config-dir={tmp_path}", "experiment=pair", *TINY)
    with monkeypatch.context() as patch:
        _failing(patch, 0, "out of\nmemory")
        answer = command(*sweep)
    assert answer.code == 1
    assert answer.lines[-1].startswith("lpc_runner: 1 of 2 runs did not finish") and "out of memory" in answer.lines[-1]
    failed, finished = sorted(Path("outputs/pair").iterdir(), key=lambda path: "-s1-" in path.name)
    assert result_of(finished)["status"] == "finished"
    assert result_of(failed) == {"status": "failed", "metrics": {}, "error": "RuntimeError: out of memory"}
    before = contents(finished.resolve())
    answer = command(*sweep)  # the failed one is tried again, the finished one is left alone
    assert answer.code == 0, answer.err
    assert result_of(failed)["status"] == "finished" and contents(finished.resolve()) == before
    sessions = [json.loads(line) for line in (failed / "sessions.jsonl").read_text().splitlines()]
    assert [session["failed_before"] for session in sessions] == [None, "RuntimeError: out of memory"]
    assert "already done" in answer.err


def test_a_failed_measurement_is_made_again_without_training(command, monkeypatch):
    with monkeypatch.context() as patch:
        no_room = lambda *args: (_ for _ in ()).throw(RuntimeError("no room"))
        patch.setattr("lpc_runner.evaluation.quality.ImageEvaluator.final", no_room)
        assert command(*TINY).code == 1
    assert result_of(only_run())["status"] == "failed"
    monkeypatch.setattr(Learner, "gradients", lambda *args, **kwargs: pytest.fail("trained again"))
    assert command(*TINY).code == 0
    assert result_of(only_run())["status"] == "finished"


def state_of_the_process() -> dict[str, object]:
    """What a caller of `lpc_runner.run` finds again as it was."""
    loggers = [
        logging.getLogger(name) for name in (None, "lpc_runner", "lpc_runner.runner.run", "hydra", "hydra.utils")
    ]
    return {
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "hydra": (GlobalHydra.instance().hydra, JobRuntime.instance().get("name"), getbase()),
        "logging": [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers],
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)],
        "torch": (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()),
        "random numbers": torch.get_rng_state().tolist(),
    }


def test_a_run_from_python_resumes_is_found_and_leaves_the_process_as_it_was(workplace, monkeypatch):
    """Within an application of Hydra's; the first of two runs is done, the second was interrupted after 3 updates."""
    words, _ = earlier_run("done"), earlier_run("interrupted")
    words = [word for word in words if not word.startswith("seed=")]
    kept = {path.absolute() for path in Path("outputs/runs").iterdir()}
    monkeypatch.setattr(in_python, "execute", lambda planned: os.environ.update(NEW="1", OLD="2") or execute(planned))
    monkeypatch.setenv("OLD", "1")
    (workplace / "own").mkdir()
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with initialize_config_dir(str(workplace / "own"), job_name="theirs", version_base="1.2"):
            before = state_of_the_process()
            runs = lpc_runner.run(["-m", *words, "seed=0,1"])
            assert state_of_the_process() == before
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    assert [run.result["num_updates"] for run in runs] == [6, 6]
    assert {run.path for run in runs} == kept
    assert [run.metrics["elbo"] for run in runs] == [result_of(run.path)["metrics"]["elbo"] for run in runs]
    sessions = [json.loads(line) for line in (runs[1].path / "sessions.jsonl").read_text().splitlines()]
    assert len(sessions) == 2 and sessions[1]["command"][:2] == ["lpc_runner.run", "-m"]
    written = contents(runs[0].path)
    again = lpc_runner.run([*words, "seed=0"])
    assert again == runs[0] and contents(again.path) == written
    assert again.load().model.latent_dim == 2


@pytest.mark.parametrize(
    "words, says",
    [
        ("dataset=digits", "takes a list of words"),
        (["seed=1,2"], "add -m"),
        (["sampler.stepsize=1"], "unknown key sampler.stepsize"),
        (["sampler.num_steps=0"], "no steps at all: sampler=none"),
        (["check=true"], "prints a plan"),
        (["--info"], "--info shows something"),
        (["--version"], "--version shows something"),
        (["--config-name", "other"], "would replace the checked configuration"),
        (["-m", "hydra/launcher=parallel", "seed=1,2"], "makes its runs in this process"),
    ],
    ids=str,
)
def test_what_python_asks_wrongly_is_a_user_error_before_any_work(words, says, workplace):
    with pytest.raises(UserError, match=says):
        lpc_runner.run(words)
    assert not (workplace / "outputs").exists()


def test_from_python_a_failure_is_raised_and_a_sweep_goes_on(workplace, monkeypatch, caplog):
    made = []

    def fail(planned):
        made.append(planned.experiment.seed)
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(in_python, "execute", fail)
    with pytest.raises(RuntimeError, match="no such kernel"):
        lpc_runner.run(TINY)
    with pytest.raises(UserError, match=r"2 of 2 runs did not finish: .*no result") as raised:
        lpc_runner.run(["-m", *TINY, "seed=0,1"])
    assert made == [0, 0, 1] and isinstance(raised.value.__cause__, RuntimeError)
    assert [record.message.split(": ")[1] for record in caplog.records if record.levelname == "ERROR"] == [
        "no such kernel",
        "no such kernel",
    ]


def test_ctrl_c_in_python_saves_and_the_same_words_resume(workplace, monkeypatch):
    words, apply = earlier_run("interrupted"), Learner.apply
    with monkeypatch.context() as patched:
        patched.setattr(Learner, "apply", lambda *given: apply(*given) or signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            lpc_runner.run(words)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    run = lpc_runner.run(words)
    assert [row["update"] for row in rows_of(run.path) if "train/elbo" in row] == [1, 2, 3, 4, 5, 6]
    sessions = (run.path / "sessions.jsonl").read_text().splitlines()
    assert len(sessions) == 3 and run.result["status"] == "finished"


def test_a_command_that_says_nothing_of_the_method_runs_what_its_plan_says(command):
    """Hydra composes a single run once more by itself."""
    words = [word for word in TINY if not word.startswith(("tuned", "sampler"))]
    for more in ((), ("-m", "seed=0,1")):
        answer = command(*words, *more)
        assert answer.code == 0, answer.err
    names = sorted(path.name for path in Path("outputs/default").iterdir())
    assert len(names) == 2 and all("langevin-reverse-fisher" in name for name in names)
