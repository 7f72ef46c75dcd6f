"""Junk from outside, by the hundred (`-m slow`: by the thousand): a result or one line, never a traceback or a hang."""

from __future__ import annotations

import io
import json
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, cells_of, only_run, plan_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_mistakes import words

from lpc_runner.base.errors import UserError, masked, one_line
from lpc_runner.base.files import plain_name
from lpc_runner.config.build import build
from lpc_runner.config.identity import run_name
from lpc_runner.data.arrays import Arrays
from lpc_runner.ls import list_runs
from lpc_runner.runner.in_python import load
from lpc_runner.runner.screen import print_results
from lpc_runner.store.checkpoints import load_checkpoint, save_checkpoint
from lpc_runner.store.log import MetricLog
from lpc_runner.store.runs import RunDirectory

PATIENCE = 20.0  # seconds for one example, on a busy machine
FEW, MANY = 200, 3000
CONFIG = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


def attempt(act) -> None:
    """It may work, or say in one line why not."""
    started = time.monotonic()
    try:
        act()
    except UserError as error:
        assert str(error).strip() and "\n" not in str(error)
    assert time.monotonic() - started < PATIENCE


def both(few: int = FEW, many: int = MANY):
    """A property held against some examples always, and against many in the slow tier."""

    def decorate(check):
        def quick(*args, **kwargs):
            check(few, *args, **kwargs)

        return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.slow)], ids=["few", "many"])(
            check
        )

    return decorate


def damage(content: bytes, edits: list[tuple[float, int]], cut: float) -> bytes:
    """Some bytes changed, the end cut off."""
    changed = bytearray(content)
    for place, value in edits:
        if changed:
            changed[int(place * (len(changed) - 1))] = value
    return bytes(changed[: int(cut * len(changed))])


edits = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6)
cuts = st.just(1.0) | st.floats(0, 1)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
trees = st.recursive(
    scalars, lambda node: st.lists(node, max_size=3) | st.dictionaries(st.text(max_size=6), node, max_size=3)
)


@both(100, 3000)
def test_command_lines(count, workplace):
    @settings(max_examples=count, **CONFIG)
    @given(st.lists(words, min_size=1, max_size=3), st.booleans())
    def check(overrides, multirun):
        def act():
            for cell in cells_of(*(["-m"] if multirun else []), *overrides):
                build(cell.cfg, cell.choices)
                name = run_name(cell, "0" * 64)
                assert plain_name(name) == name and len(name) < 200

        attempt(act)
        assert list(workplace.iterdir()) == []

    check()


@both()
def test_image_files(count, tmp_path):
    buffer = io.BytesIO()
    np.savez(buffer, images=np.full((12, 1, 8, 8), 200, np.uint8), labels=np.zeros(12, np.int64))
    path = tmp_path / "images.npz"

    @settings(max_examples=count, **CONFIG)
    @given(edits, cuts)
    def check(changes, cut):
        path.write_bytes(damage(buffer.getvalue(), changes, cut))

        def act():
            data = Arrays(train=str(path))
            data.prepare()
            assert data.load().train.values.dtype == torch.uint8

        attempt(act)

    check()


@both()
def test_arrays_of_any_kind(count, tmp_path):
    path = tmp_path / "images.npz"
    kinds = st.sampled_from(["u1", "i1", "i8", "f4", "f8", "?", "U3", "c8", "M8[s]"])

    @settings(max_examples=count, **CONFIG)
    @given(kinds, st.lists(st.integers(0, 6), max_size=5), kinds, st.integers(0, 9), st.sampled_from(["images", "x"]))
    def check(kind, shape, label_kind, num_labels, key):
        np.savez(path, **{key: np.full(shape, 9).astype(kind), "labels": np.zeros(num_labels, label_kind)})

        def act():
            data = Arrays(train=str(path))
            data.prepare()
            data.load()

        attempt(act)

    check()


def test_objects_are_never_unpickled(tmp_path):
    """An .npz or a checkpoint that would run code when unpickled does not run it."""
    witness = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (witness,))

    np.savez(tmp_path / "evil.npz", images=np.array([Evil()], dtype=object))
    with pytest.raises(UserError):
        data = Arrays(train=str(tmp_path / "evil.npz"))
        data.prepare()
        data.load()
    save_checkpoint(tmp_path / "checkpoints", 1, {"weights": Evil()})
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        load_checkpoint(tmp_path / "checkpoints")
    assert not witness.exists()


@both()
def test_metric_logs(count, tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = b"".join(json.dumps({"update": n, "epoch": n / 3, "train/elbo": -1.5}).encode() + b"\n" for n in range(5))

    @settings(max_examples=count, **CONFIG)
    @given(edits, cuts, st.binary(max_size=30), st.integers(0, 400))
    def check(changes, cut, tail, offset):
        path.write_bytes(damage(good, changes, cut) + tail)
        attempt(lambda: MetricLog.read(path))
        log = MetricLog(path)
        attempt(lambda: log.rewind(offset))
        log.append(9, 1.0, {"a": 2.0})
        log.close()
        assert path.read_bytes().endswith(b'{"update": 9, "epoch": 1.0, "a": 2.0}\n')

    check()


@both()
def test_checkpoints(count, tmp_path):
    state = {"weights": torch.arange(40.0), "counters": {"update": 1}}
    path = save_checkpoint(tmp_path, 1, state)
    content = path.read_bytes()

    @settings(max_examples=count, **CONFIG)
    @given(edits, cuts)
    def check(changes, cut):
        path.write_bytes(damage(content, changes, cut))
        try:
            found = load_checkpoint(tmp_path)
        except UserError as error:
            assert "damaged" in str(error) and path.read_bytes() != content
        else:
            assert torch.equal(found["weights"], state["weights"])

    check()


@pytest.fixture
def finished(command) -> RunDirectory:
    assert command(*TINY).code == 0
    return RunDirectory.open(only_run())


@both(80, 2000)
def test_records_of_a_run(count, finished):
    """Whatever stands in a run's records: listing it gives a row; loading or showing it works or says why in a line."""
    planned = [plan_of(*TINY)]
    kept = {name: (finished.path / name).read_bytes() for name in ("config.yaml", "run.json", "result.json")}

    @settings(max_examples=count, **CONFIG)
    @given(st.sampled_from(sorted(kept)), edits, cuts, trees, st.booleans())
    def check(name, changes, cut, tree, replaced):
        path = finished.path / name
        path.write_bytes(json.dumps(tree).encode() if replaced else damage(kept[name], changes, cut))
        attempt(lambda: list_runs(finished.path.parent))
        attempt(lambda: load(finished.path))
        attempt(lambda: print_results(planned))
        path.write_bytes(kept[name])

    check()


def test_a_configuration_that_is_no_mapping_is_one_line(finished):
    for content in ("false", "3", "[1]", "", "a: [", "null"):
        (finished.path / "config.yaml").write_text(content)
        with pytest.raises(UserError, match=r"config\.yaml is missing or damaged"):
            load(finished.path)


def test_a_measurement_edited_by_hand_is_one_line(finished, command):
    result = finished.result()
    for changed in ({"extractor": None}, {"num_samples": "many"}, {"extractor_hash": 7}):
        finished.write("result.json", result | {"measurement": result["measurement"] | changed})
        answer = command(*TINY)
        assert answer.code == 1 and "its measurement has lost something" in answer.err.splitlines()[-1]
    (finished.path / "result.json").unlink()  # as the line says
    assert command(*TINY).code == 0 and finished.result()["measurement"] == result["measurement"]


@both()
def test_names_stay_in_their_folder(count):
    @settings(max_examples=count, **CONFIG)
    @given(st.text(max_size=40))
    def check(text):
        name = plain_name(text)
        assert name and Path(name).name == name and not name.startswith(".") and name.isascii()
        assert plain_name(name) == name

    check()


@pytest.mark.parametrize(
    "study", ["../up", "/tmp/x", "a/b", "a\\b", ".", "..", ".hidden", "runs", "x" * 241, "ü" * 121, "a\x00b"]
)
def test_a_study_cannot_leave_the_output_folder(study, workplace):
    with pytest.raises(UserError, match="study must be a plain folder name"):
        cell = cells_of(*TINY)[0]
        cell.cfg.study = study
        build(cell.cfg, cell.choices)


@pytest.mark.parametrize("target", ["os.system", "subprocess.Popen", "builtins.eval", "pathlib.Path", "os.nothing"])
def test_a_configuration_cannot_call_the_system(target, finished):
    text = (finished.path / "config.yaml").read_text()
    text = text.replace("lpc_runner.training.optimizers.Adam", target)
    (finished.path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=f"_target_={target}"):
        load(finished.path)


def test_secrets_are_masked_in_logs_and_records(monkeypatch, command):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123")
    monkeypatch.setenv("MY_TOKEN", "on")  # too short to be one: 'on' stays readable elsewhere
    key = "+hydra.job.env_set.SERVICE_TOKEN=hush-hush-hush"
    from lpc_runner.training.learner import Learner

    def leak(*args, **kwargs):
        raise RuntimeError("cannot reach https://u:0123456789abcdef0123@host?api_key=other-secret on Monday")

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "gradients", leak)
        answer = command(*TINY, key)
    run = only_run()
    written = "".join(path.read_text(errors="replace") for path in run.iterdir() if path.is_file())
    for secret in ("0123456789abcdef0123", "other-secret", "hush-hush-hush"):
        assert secret not in answer.err + answer.out and secret not in written
    assert "cannot reach" in written and "on Monday" in written and "hydra.job.env_set.SERVICE_TOKEN=***" in written


def test_masking_leaves_ordinary_words_alone():
    line = "update 3/9  tokens per second 12  num_tokens=12 max_tokens: 8 num_steps=300 keyboard=us study=secrets_of"
    assert masked(line) == line
    assert (
        masked("WANDB_API_KEY=abc api_key: 'x y' password=\"q\"") == "WANDB_API_KEY=*** api_key: *** y' password=***\""
    )


def test_one_line_of_an_error_hides_keys(monkeypatch):
    key, commit = "0123456789abcdef" * 2 + "01234567", "fedcba98" * 5
    monkeypatch.setenv("WANDB_API_KEY", "wandb-key-of-this-user")
    for secret in (key, f"wandb_v1_{commit}", "wandb-key-of-this-user", "token=hush"):
        said = one_line(OSError(f"no way to\n  {secret} from ~/{commit}/x.npz"))
        assert secret not in said and said.startswith("no way to ") and said.endswith(f" from ~/{commit}/x.npz")
    assert one_line(OSError()) == "OSError" and len(one_line(OSError("x" * 999))) == 300


def test_a_header_that_promises_more_than_the_file_holds(tmp_path):
    """No memory is taken for what a forged header promises."""
    header = str({"descr": "|u1", "fortran_order": False, "shape": (10**9, 3, 64, 64)}).encode()
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header + b"\n" + b"\0" * 64
    import zipfile

    path = tmp_path / "forged.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", content)
    with pytest.raises(UserError, match=r"forged\.npz"):
        Arrays(train=str(path)).load()
