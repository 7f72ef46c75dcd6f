"""Bad input: one line that names the remedy, exit code 1, nothing trained and nothing written."""

from __future__ import annotations

import shlex
import socket
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, cell_of, cells_of, plan_of, write_images
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lpc_runner.base.errors import UserError
from lpc_runner.config.build import build
from lpc_runner.config.words import as_text

# Arguments, and what the one line must say.
MISTAKES = [
    ("objective=jefreys", ["objective=jefreys", "forward", "jeffreys", "prior", "reverse"]),
    ("dataset=svnh", ["digits", "svhn"]),
    ("model/likelihood=laplace", ["gaussian", "discretised_gaussian"]),
    ("sampler.stepsize=1", ["unknown key sampler.stepsize", "step_size.value"]),
    ("+sampler.stepsize=1", ["unknown key sampler.stepsize", "step_size.value"]),
    ("++sampler.stepsize=1", ["unknown key sampler.stepsize", "step_size.value"]),
    ("sampler.num_step=1", ["unknown key sampler.num_step", "sampler.num_steps"]),
    ("+trainer.epochs=1", ["unknown key trainer.epochs", "trainer.num_epochs"]),
    ("+model.likelihood.sigma=1", ["unknown key model.likelihood.sigma"]),
    ("method=vem", ["unknown key model.encoder", "a key of model=factor_analysis, hierarchical, lds, lfads"]),
    ("sed=1", ["unknown key sed", "seed"]),
    ("+sed=1", ["unknown key sed", "seed"]),
    ("smapler=none", ["unknown key smapler", "sampler"]),
    ("~seed", ["seed"]),
    ("~objective", ["objective"]),
    *(
        (
            f"sampler.num_steps={value}",
            ["sampler.num_steps must be an integer of at least 1", got, "sampler=none"],
        )
        for value, got in [("abc", "'abc'"), ("null", "null"), ("0", "0"), ("-3", "-3"), ("2.5", "2.5")]
    ),
    *(
        (f"method=none preconditioning.beta={value}", ["preconditioning.beta", "(0, 1)", value, "preconditioning=none"])
        for value in ("1.5", "0", "1", "-0.1", "nan")
    ),
    ("step_size.value=0", ["step_size.value must be a number above 0"]),
    ("step_size.value=inf", ["step_size.value must be a number above 0"]),
    ("optimizer.learning_rate=-1", ["optimizer.learning_rate"]),
    ("optimizer.betas=[0.9]", ["optimizer.betas must be two numbers"]),
    ("trainer.batch_size=0", ["trainer.batch_size must be an integer of at least 1"]),
    ("trainer.batch_size=5000", ["trainer.batch_size=5000", "1437"]),
    ("sampler.start=last", ["sampler.start must be one of encoder, prior, persistent"]),
    ("sampler.noise=none", ["sampler.noise must be one of independent, averaged"]),
    ("sampler=mala preconditioning=adam", ["sampler: MALA", "G must be constant", "Adam adapts it", "freeze_after"]),
    (
        "sampler=mala preconditioning=adam_shared preconditioning.freeze_after=2 sampler.start=persistent",
        ["sampler: MALA", "SharedAdam adapts it", "chains that persist excepted"],
    ),
    (
        "sampler=hmc preconditioning=none step_size=polynomial",
        ["sampler: HMC", "γ must be constant", "Polynomial changes it", "step_size=constant"],
    ),
    ("sampler.stop=soon", ["sampler.stop must be one of never, settled"]),
    ("method=none sampler.stop=settled", ["stop=settled ends chains after blocks of 32 steps, num_steps is 10"]),
    ("sampler=map step_size=adapted", ["step_size=adapted", "sampler=map have none", "mala"]),
    ("sampler.num_steps=1 step_size=adapted", ["step_size=adapted", "two steps", "sampler=mala"]),
    ("step_size=adapted step_size.target=1", ["step_size.target must be a number in (0, 1) or null"]),
    ("method=none sampler.first_steps=5", ["sampler.first_steps is of start=persistent, and start is encoder"]),
    ("method=none sampler.first_start=prior", ["sampler.first_start is of start=persistent, and start is encoder"]),
    ("model.likelihood.scale=huge", ["model.likelihood.scale", "fixed, learned, optimal"]),
    ("seed=${nope}", ["nope"]),
    ("-m tuned.beta=1,${tuned.beta}", ["nterpolation"]),
    ("-m seed=range(0)", ["seed: the sweep names no value"]),
    ("--experimental-rerun x.pickle", ["--experimental-rerun", "the same command resumes"]),
    ("hydra.mode=${seed}", ["hydra.mode", "seed"]),
    ("hydra.mode=???", ["hydra.mode"]),
    ("--cfg job -m seed=0,1", ["--multirun and --cfg do not go together", "check=true"]),
    ("foo", ["foo: not of the form key=value, and no command", "report"]),
    ("seed=1 foo", ["foo: not of the form key=value"]),
    ("--config-name other", ["--config-name", "--config-dir"]),
    ("engine=cuda", ["engine must be one of auto, eager, compiled, cuda_graph"]),
    ("num_threads=0", ["num_threads must be an integer of at least 1"]),
    ("seed=one", ["seed must be an integer"]),
    ("check=maybe", ["check must be true or false"]),
    ("study=a/b", ["study"]),
    ("study=runs", ["study"]),
    ("study=..", ["study"]),
    ("study=", ["study"]),
    ("output_dir=", ["output_dir must be a folder's path"]),
    ("output_dir='~/o'", ["output_dir must be a folder's path", "$HOME"]),
    ("output_dir=~/o", ["output_dir=~/o", "$HOME"]),
    ("study=a!b", ["study=a!b", "quote it twice"]),
    ("rerun=-1", ["rerun must be true or false or an integer of at least 0"]),
    ("--nonsense seed=1", ["unrecognized arguments: --nonsense", "--help"]),
    ("-m seed=0,1 hydra/launcher=parallel hydra.launcher.n_jobs=0", ["hydra.launcher.n_jobs", "got 0"]),
    ("-m seed=0,1 hydra/launcher=slurm", ["hydra/launcher=slurm", "srun"]),
    ("check=true trainer.batch_size=5000", ["trainer.batch_size=5000", "1437"]),
    ("device=cuda:99", ["device=cuda:99", "found"]),
    ("device=cpu engine=cuda_graph", ["engine=cuda_graph", "CUDA", "engine=auto"]),
    ("device=cpu precision=tf32", ["precision=tf32", "fp32"]),
    ("precision=fp16", ["precision must be one of fp32, tf32, bf16"]),
    ("sampler.theta_every=0", ["sampler.theta_every must be an integer of at least 1"]),
    ("device=gpu", ["device must be auto, cpu, cuda"]),
    ("sampler=none objective=forward", ["objective=forward", "sampler=none"]),
    ("sampler=none", ["objective=jeffreys", "sampler=none"]),
    ("objective=iwae", ["objective=iwae has no chain", "sampler=none"]),
    ("method=iwae objective.num_samples=0", ["objective.num_samples must be an integer of at least 1"]),
    ("model=linear model/likelihood=discretised_gaussian", ["model=linear", "gaussian"]),
    ("model=linear model/likelihood=bernoulli", ["model=linear", "gaussian"]),
    ("dataset=lorenz model/likelihood=bernoulli", ["model/likelihood=bernoulli expects images", "poisson"]),
    (
        "dataset=lorenz method=no_warm_start",
        ["needs an encoder", "preconditioning=none, adam or adam_shared"],
    ),
    ("dataset.binarise=yes", ["dataset.binarise must be one of none, static, dynamic"]),
    ("model=mlp model.activation=selu", ["model.activation must be one of silu, tanh, relu"]),
    ("metrics.num_samples=3", ["metrics.num_samples must be above k = 5"]),
    ("metrics.extractor=inception metrics.weights=nowhere.pth", ["Inception", "nowhere.pth"]),
    ("dataset=arrays", ["dataset.train has no value", "dataset.train="]),
    ("dataset=arrays dataset.train=nowhere.npz", ["nowhere.npz", "no such file", "np.savez"]),
    ("dataset=image_folder dataset.path=nowhere", ["nowhere", "no such folder"]),
    ("trainer.init_from=nowhere", ["nowhere", "run.json"]),
    ("trainer.frozen=true", ["trainer.frozen=true needs trainer.init_from=RUN"]),
    ("method=vae trainer.frozen=true trainer.init_from=x", ["trainer.frozen=true", "sampler=none has no chain"]),
    ("metrics=posterior metrics.num_reference_steps=3", ["metrics.num_reference_steps must be 0 or at least 20"]),
    ("seed=0,1", ["-m"]),
    ("seed", ["seed"]),
    ("seed=[", ["["]),
    ("--config-dir=nowhere", ["nowhere", "not a folder"]),
    ("-m seed=0,1,x", ["seed must be an integer", "'x'", "seed=x"]),
    ("dataset.path=mine.npz", ["unknown key dataset.path", "a key of dataset=image_folder, series, spikes"]),
    ("preconditioning=none preconditioning.beta=0.5", ["preconditioning=adam, adam_damped, adam_shared"]),
    ("path=mine.npz", ["unknown key path; dataset.path is a key of dataset=image_folder, series, spikes"]),
    ("hydra.job.chdir=true", ["hydra.job.chdir=true", "leave it out"]),
    *(
        (f"dataset=spikes dataset.path={name}", [name, "quote it twice: ", f"""dataset.path="{name}"'"""])
        for name in ("d/day=3.npz", "a(1).npz", "[old].npz", "{a}.npz", "a#2.npz", "ä.npz", "a;b.npz")
    ),
    ("dataset=spikes dataset.path=it's.npz", ["quote it twice: ", 'dataset.path="it']),
    ("dataset=spikes dataset.path=a,b.npz", ["add -m", "one text is quoted: 'dataset.path=\"a,b.npz\"'"]),
    ("dataset=spikes dataset.path=[old]", ["dataset.path must be text, got ['old']", "quoted twice"]),
    ("study=2024", ["study must be text, got 2024", "quoted twice: 'key=\"value\"'"]),
    ("größe=1", ["größe=1", "'größe' is no key"]),
    ("=1", ["=1", "'' is no key"]),
    ("--seed=1", ["unrecognized arguments: --seed=1", "settings have no dashes: seed=1"]),
    ("seed=nope(1)", ["seed=nope(1)", "Unknown function 'nope'"]),
    ("seed=int(x)", ["seed=int(x)", "while evaluating 'int(x)'"]),
    ("objective=glob(*)", ["add -m"]),
    ("-m seed=interval(0,5)", ["seed=interval(0,5)", "range(start,stop,step)"]),
    ("-m seed=glob(*)", ["seed: the sweep names no value"]),
    ("-m objective=glob(nope*)", ["objective: the sweep names no value"]),
    ("-m seed=range(1,5,0)", ["seed=range(1,5,0)", "must not be zero"]),
    ("-m step_size.value=range(0.1,0.5,0)", ["step_size.value=range(0.1,0.5,0)", "Invalid range"]),
    ("-m objective=reverse,jefreys", ["jefreys", "jeffreys"]),
    ("-m sampler.num_steps=5,0", ["sampler.num_steps", "sampler.num_steps=0"]),
]


def assert_one_line(answer, *fragments) -> None:
    assert answer.code == 1
    assert len(answer.lines) == 1 and answer.lines[0].startswith("lpc_runner: "), answer.err
    assert answer.out == ""
    for fragment in fragments:
        assert fragment in answer.lines[0]


@pytest.mark.parametrize("arguments, fragments", MISTAKES, ids=[row[0] for row in MISTAKES])
def test_a_mistake_is_one_line(arguments, fragments, command, workplace):
    assert_one_line(command(*arguments.split(), "tracker=none"), *fragments)
    assert list(workplace.iterdir()) == []


def test_flags_stand_anywhere(command, tmp_path):
    """Hydra's parser takes flags before all overrides or after them."""
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text("# @package _global_\nstudy: mine\n")
    words = ("seed=0,1", "--config-dir", str(tmp_path), "method=mine", "-m")
    answer = command(*words, *TINY)
    assert answer.code == 0 and len(list(Path("outputs/mine").iterdir())) == 2, answer.err
    answer = command("seed=0", *TINY, "--info", "config")
    assert answer.code == 0 and "Config search path" in answer.out
    Path("seed=1").symlink_to(tmp_path)  # the word that a flag takes is an override too
    answer = command("method=mine", *TINY, "seed=1", "--config-dir", "seed=1")
    assert answer.code == 0, answer.err


@pytest.mark.parametrize("mode, says", [("sometimes", "WANDB_MODE must be one of"), ("online", "no W&B API key")])
def test_a_tracker_that_cannot_work_is_said_before_any_work(mode, says, command, workplace, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setenv("HOME", str(tmp_path))  # no key in ~/.netrc
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    words = [word for word in TINY if not word.startswith("tracker")]
    assert_one_line(command("-m", "seed=0,1", *words), says, "WANDB_MODE")
    assert not (workplace / "outputs" / "runs").exists()


@pytest.mark.parametrize("place", ["outputs/default", "outputs/runs", "outputs/runs/{name}"])
def test_a_file_in_the_place_of_a_folder(place, command, workplace):
    path = workplace / place.format(name=plan_of(*TINY).directory.name)
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    assert_one_line(command(*TINY), path.name)
    assert path.read_text() == "mine"


def test_a_folder_in_the_place_of_a_link(command, workplace):
    assert command(*TINY).code == 0
    (link,) = (workplace / "outputs" / "default").iterdir()
    other = workplace / "outputs" / "other" / link.name
    other.mkdir(parents=True)
    assert_one_line(command("study=other", *TINY), "is in the way", link.name)
    assert list(other.iterdir()) == []


def test_cuda_without_a_device(command, workplace, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert_one_line(command("device=cuda"), "device=cuda", "no CUDA device, only the CPU", "device=auto")
    assert list(workplace.iterdir()) == []


@pytest.mark.parametrize("size", ["4", "", "many"])
def test_a_world_size_that_a_script_left_behind(size, command, workplace, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", size)
    assert_one_line(command(*TINY), "WORLD_SIZE is set but not what torchrun sets beside it", "unset it")
    assert list(workplace.iterdir()) == []


def test_ranks_do_not_shuffle_each_for_itself(workplace, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"seed=shuffle\(0,1\): ranks would each have an order of their own"):
        cells_of("-m", "seed=shuffle(0,1)")


def test_the_traceback_is_there_when_asked_for(command, monkeypatch):
    monkeypatch.setenv("LPC_TRACEBACK", "1")
    answer = command("seed=one")
    assert answer.code == 1 and "Traceback" in answer.err
    assert answer.lines[-1] == "lpc_runner: seed must be an integer, got 'one'"


def _truncated(path: Path) -> None:
    write_images(path)
    path.write_bytes(path.read_bytes()[:-400])


BAD_FILES = {
    "empty": (lambda path: path.write_bytes(b""), "not an .npz"),
    "truncated": (_truncated, "cut short"),
    "floats": (lambda path: np.savez(path, images=np.full((30, 1, 28, 28), np.nan)), "uint8"),
    "negative": (lambda path: np.savez(path, images=-np.ones((30, 1, 28, 28), np.int16)), "uint8"),
    "channels last": (
        lambda path: np.savez(path, images=np.zeros((30, 28, 28, 3), np.uint8)),
        "(N, C, H, W)",
    ),
    "flat": (lambda path: np.savez(path, images=np.zeros((30, 784), np.uint8)), "(N, C, H, W)"),
    "another key": (lambda path: np.savez(path, data=np.zeros((30, 1, 28, 28), np.uint8)), "images"),
    "labels": (lambda path: write_images(path, labels=np.zeros(7, np.int64)), "labels"),
    "one image": (lambda path: write_images(path, count=1), "at least 2"),
}


@pytest.mark.parametrize("write, says", BAD_FILES.values(), ids=BAD_FILES)
def test_bad_data_files_are_named(write, says, command, workplace, tmp_path):
    path = tmp_path / "bad.npz"
    write(path)
    assert_one_line(command("dataset=arrays", f"dataset.train={path}", "trainer.batch_size=1"), "bad.npz", says)
    assert list(workplace.iterdir()) == []


def test_files_that_do_not_fit_one_another(command, workplace, tmp_path):
    write_images(tmp_path / "train.npz", count=70)
    write_images(tmp_path / "test.npz", shape=(3, 32, 32))
    files = [f"dataset.train={tmp_path}/train.npz", f"dataset.test={tmp_path}/test.npz"]
    assert_one_line(command("dataset=arrays", *files), "test.npz", "(3, 32, 32)", "(1, 28, 28)")
    assert list(workplace.iterdir()) == []


def test_an_image_size_that_the_network_does_not_have(command, workplace, tmp_path):
    path = write_images(tmp_path / "odd.npz", shape=(1, 20, 20))
    assert_one_line(command("dataset=arrays", f"dataset.train={path}", "model=conv"), "20", "model=mlp")
    assert list(workplace.iterdir()) == []


def test_too_few_images_for_the_metric(command, workplace, tmp_path):
    path = write_images(tmp_path / "few.npz", count=6)
    answer = command("dataset=arrays", f"dataset.train={path}", "trainer.batch_size=2")
    assert_one_line(answer, "metrics.k=5", "at least 6", "there are 5")
    assert list(workplace.iterdir()) == []


def test_damage_that_only_reading_shows_is_one_line_before_any_work(command, workplace, tmp_path):
    path = write_images(tmp_path / "images.npz", count=60)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    assert_one_line(command("dataset=arrays", f"dataset.train={path}", *TINY), "images.npz", "damaged")
    assert list(workplace.iterdir()) == []


def test_data_that_cannot_be_fetched(command, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    answer = command("dataset=svhn", "objective=jeffreys")
    assert_one_line(answer, "svhn", "train_32x32.mat", "data/svhn")
    assert not Path("outputs").exists()


def test_the_last_cell_is_checked_before_the_first_runs(command, workplace):
    answer = command("-m", "trainer.batch_size=16,9999", *(item for item in TINY if "batch_size" not in item))
    assert_one_line(answer, "9999", "1437", "in the cell trainer.batch_size=9999")
    assert list(workplace.iterdir()) == []


def test_an_image_model_is_not_given_spike_counts(command, workplace, tmp_path, monkeypatch):
    (tmp_path / "own" / "dataset").mkdir(parents=True)
    (tmp_path / "own" / "dataset" / "recorded.yaml").write_text(
        "# @package _global_\ndataset:\n  _target_: spikes.Spikes\n"
    )
    (tmp_path / "spikes.py").write_text(
        'class Spikes:\n    kind, name, shape, num_train = "spike counts", "recorded", (50, 30), 100\n\n'
        '    def identity(self):\n        return {"name": "recorded"}\n\n    def prepare(self):\n        pass\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    answer = command(f"--config-dir={tmp_path}/own", "model=conv", "dataset=recorded")
    assert_one_line(answer, "model=conv expects images, dataset=recorded holds spike counts")
    assert list(workplace.iterdir()) == []


KEYS = [
    "seed",
    "sampler",
    "sampler.num_steps",
    "dataset",
    "step_size.value",
    "objective",
    "model",
    "optimizer.betas",
]
KEYS += [
    "trainer",
    "model.likelihood",
    "study",
    "hydra.mode",
    "metrics.weights",
    "device",
    "tuned",
    "tracker.tags",
    "",
]
VALUES = [
    "",
    "null",
    "???",
    "abc",
    "-1",
    "1e400",
    "nan",
    "[1",
    "{a:1}",
    "[]",
    "${seed}",
    "${nope}",
    "${seed",
    "a,b",
]
VALUES += ["range(2)", "'x", "vae", "none", "true", "1.5", "\n", "ü", "a=b", "../x", "{_target_:os.getcwd}"]
words = st.builds(
    "{}{}{}{}".format,
    st.sampled_from(["", "", "+", "++", "~"]),
    st.sampled_from(KEYS) | st.text(max_size=6),
    st.sampled_from(["=", "=", "=", "@", ""]),
    st.sampled_from(VALUES) | st.text(max_size=8),
).filter(lambda word: not word.startswith("-"))


@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(words, min_size=1, max_size=2), st.booleans())
@example(["metrics.weights="], False)
@example(["~seed"], False)
@example(["~dataset"], False)
@example(["sampler={}"], False)
@example(["model.likelihood=null"], False)
@example(["dataset=null"], False)
def test_junk_on_the_command_line_is_one_line_at_most(workplace, overrides, multirun):
    try:
        for cell in cells_of(*(["-m"] if multirun else []), *overrides):
            build(cell.cfg, cell.choices)
    except UserError as error:
        assert str(error).strip() and "\n" not in str(error)
    assert list(workplace.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["day=3.npz", "trials (1).npz", "[old].npz", "{a}.npz", "a, b.npz", "ä 'b' \"c\"#.npz", "a\\"]
)
def test_the_quoting_that_a_refusal_names_works_in_a_shell(name, workplace):
    (word,) = shlex.split(as_text("metrics.weights", name))
    assert cell_of(word).cfg.metrics.weights == name
