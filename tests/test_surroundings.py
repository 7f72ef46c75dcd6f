"""What shells, notebooks, containers and file systems hand over: encodings, streams, names, links, locks, places."""

from __future__ import annotations

import errno
import fcntl
import getpass
import io
import json
import os
import pwd
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, only_run, result_of, write_images
from rich.console import Console
from test_ls import make

import lpc_runner
import lpc_runner.evaluate
import lpc_runner.ls
import lpc_runner.report
import lpc_runner.sample
from lpc_runner.base import files
from lpc_runner.base.errors import UserError
from lpc_runner.base.files import flush_to_disk, is_held, lock_on, sync_folder, write_cache
from lpc_runner.base.surroundings import error_text, settle
from lpc_runner.data.files import damage_named
from lpc_runner.evaluation.quality import Reference
from lpc_runner.runner import screen
from lpc_runner.store.runs import Occupied, RunDirectory, checkpoint_files, follow
from lpc_runner.tracking.uploads import runs_of


def shell(line: str, folder: Path, **variables: str) -> subprocess.CompletedProcess:
    """A line of bash in `folder`, without torch; what it says as bytes."""
    environment = {**os.environ, "PYTHON": sys.executable, **variables}
    return subprocess.run(["bash", "-c", line], cwd=folder, env=environment, capture_output=True, check=False)


@pytest.fixture
def listed(tmp_path) -> Path:
    """An output folder whose listing has letters of several alphabets."""
    make(tmp_path / "outputs", "a-failed", {"status": "failed", "error": "γ² 数据 é"})
    return tmp_path


@pytest.fixture
def restored(monkeypatch):
    """The environment and the streams as they were, whatever `settle` does to them."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for name in ("stdin", "stdout", "stderr", "__stdout__", "__stderr__"):
        monkeypatch.setattr(sys, name, getattr(sys, name))


# Streams --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "shown"),
    [
        ({"PYTHONIOENCODING": "latin-1"}, "\\u03b3² \\u6570\\u636e é".encode("latin-1")),
        ({"PYTHONIOENCODING": "gbk"}, "γ\\xb2 数据 é".encode("gbk")),
        ({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, rb"\u03b3\xb2 \u6570\u636e \xe9"),
    ],
    ids=["latin-1", "gbk", "C"],
)
def test_what_an_encoding_cannot_say_is_printed_as_an_escape(variables, shown, listed):
    done = shell("$PYTHON -m lpc_runner.ls outputs", listed, COLUMNS="400", TERM="dumb", **variables)
    assert done.returncode == 0 and done.stderr == b"" and shown in done.stdout


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        ("$PYTHON -m lpc_runner.ls outputs --json | true; exit ${PIPESTATUS[0]}", 0, b""),
        ("$PYTHON -m lpc_runner.ls outputs >&- <&-", 0, b""),
        ("$PYTHON -m lpc_runner.ls nowhere 2>&-", 1, b""),
        ("$PYTHON -m lpc_runner.ls outputs > /dev/full", 1, b"lpc_runner: standard output: No space left on device\n"),
    ],
    ids=["reader gone", "closed", "no standard error", "full"],
)
def test_a_command_outlives_its_output(line, code, says, listed):
    done = shell(line, listed)
    assert (done.returncode, done.stderr) == (code, says)


def test_a_closed_stream_leaves_its_number_to_no_file(tmp_path):
    """Else the next file to be opened is written to by whatever prints."""
    program = (
        "from lpc_runner.base.surroundings import settle; settle(); settle();"
        "import os, subprocess; file = open('x', 'w');"
        "print('to nobody'); os.system('echo to nobody'); file.write(str(file.fileno() > 2)); file.close()"
    )
    done = shell(f'$PYTHON -c "{program}" <&- >&- 2>&-', tmp_path)
    assert done.returncode == 0 and (tmp_path / "x").read_text() == "True"


def test_a_pipe_that_does_not_block_gets_everything(tmp_path):
    program = (
        "import os, sys; from lpc_runner.base.surroundings import settle; os.set_blocking(1, False); settle();"
        "print('x' * 1000000)"
    )
    done = shell(f'$PYTHON -c "{program}" | (sleep 0.3; wc -c)', tmp_path)
    assert done.stdout.strip() == b"1000001" and done.stderr == b""


def test_no_backend_and_no_settings_of_a_users_reach_the_pictures(tmp_path):
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.size: 3\naxes.linewidth: 9\n")
    program = (
        "from lpc_runner.base.surroundings import settle; settle()\n"
        "from lpc_runner.base.presentation import picture_style\n"
        "import matplotlib\n"
        "from matplotlib.figure import Figure\n"
        "assert matplotlib.rcParams['text.usetex']\n"
        "with picture_style(**{'axes.titlesize': 14}):\n"
        "    figure = Figure(); figure.subplots().set_title('t'); figure.savefig('x.png')\n"
        "    print(*(matplotlib.rcParams[name] for name in ('text.usetex', 'font.size', 'axes.linewidth')))\n"
    )
    done = shell(f"$PYTHON -c {shlex.quote(program)}", tmp_path, MPLBACKEND="module://nowhere.backend")
    # The project's own size, and of what it sets nothing matplotlib's.
    assert done.stdout.split() == [b"False", b"13.0", b"0.8"] and (tmp_path / "x.png").exists(), done.stderr


def test_a_command_settles_what_its_workers_inherit(command, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "module://nowhere.backend")
    assert command("seed=one").code == 1
    assert os.environ["MPLBACKEND"] == "agg"


def test_a_number_without_a_name_or_a_home(restored, monkeypatch):
    """A container under `--user 1234`."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME", "HOME"):
        os.environ.pop(name, None)

    def nobody(*_):
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    settle()
    assert getpass.getuser() == f"user{os.getuid()}" and Path.home() == Path(tempfile.gettempdir())


def test_a_whole_result_is_not_called_damaged_for_a_terminals_sake(workplace, monkeypatch):
    class Done:
        class directory:
            name = "γ"
            result = staticmethod(lambda: {"status": "finished", "metrics": {}, "measurement": FACTS})

    monkeypatch.setattr(screen, "Console", lambda: Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii")))
    with pytest.raises(UnicodeEncodeError):
        screen.print_results([Done])


FACTS = {
    "extractor": "random_conv", "extractor_hash": "0" * 64, "num_samples": 40, "num_references": 40, "k": 5,
    "reference": "train", "coverage_ceiling": 0.974, "fd_random_conv_floor": 0.0179, "num_floor": 40,
}  # fmt: skip


@pytest.mark.parametrize("columns", [20, 40])
def test_names_and_numbers_are_whole_on_a_narrow_terminal(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    names = ("fd_random_conv", "precision_random_conv", "coverage_random_conv", "elbo", "bits_per_dim")
    metrics = dict.fromkeys(names, -1.2346e-05)
    screen.print_measurement("a-run", metrics, FACTS)
    images = capsys.readouterr().out
    sequences = {"kind": "sequences", "ceilings": {"elbo": 0.5}, "notes": {"elbo": "nats per trial"}, "sources": "360"}
    screen.print_measurement("a-run", metrics, sequences)
    for out in (images, capsys.readouterr().out):
        rows = [line.split() for line in out.splitlines()]
        assert all([name, "-1.235e-05"] in [row[:2] for row in rows] for name in names) and "…" not in out
    assert "40 other real images" in " ".join(images.split())


def test_a_listing_on_a_narrow_terminal_has_a_line_for_every_name(tmp_path, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    name = "digits-conv-langevin-jeffreys-adam_shared-s0-0123456789"
    make(tmp_path, name, {"status": "finished", "metrics": {"fid": 12.5}})
    lines = command(str(tmp_path), entry=lpc_runner.ls.main).out.splitlines()
    assert lines[0] == name and lines[1].startswith("  done, epoch 2.0, fid 12.5, 0 s")


def test_a_terminal_without_a_size_is_printed_on(listed):
    assert b"a-failed" in shell("$PYTHON -m lpc_runner.ls outputs", listed, COLUMNS="0").stdout


# File systems ---------------------------------------------------------------------------------------------


def refuse(monkeypatch, module, name: str, number: int, below: Path | None = None, folders: bool = False) -> list:
    """`module.name` answers with errno `number` for everything, below a folder, or for folders only; its calls."""
    real, calls = getattr(module, name), []

    def refused(first, *rest, **more):
        where = first
        if not isinstance(first, str | os.PathLike):
            number_of = first if isinstance(first, int) else first.fileno()
            where = os.readlink(f"/proc/self/fd/{number_of}")
        meant = below is None or Path(where).is_relative_to(below)
        if meant and not (folders and not Path(where).is_dir()):
            calls.append(where)
            raise OSError(number, os.strerror(number), str(where))
        return real(first, *rest, **more)

    monkeypatch.setattr(module, name, refused)
    return calls


@pytest.fixture
def bare(workplace, tmp_path, monkeypatch):
    """A file system below the working directory with neither links, nor locks, nor flushed folders."""
    monkeypatch.setattr(files, "_local_folder", lambda: tmp_path / "local")
    files.say_once.cache_clear()
    links = refuse(monkeypatch, os, "symlink", errno.EPERM)
    locks = refuse(monkeypatch, fcntl, "flock", errno.ENOLCK, below=workplace)
    folders = refuse(monkeypatch, os, "fsync", errno.EINVAL, below=workplace, folders=True)
    yield workplace
    assert links and locks and folders
    files.say_once.cache_clear()


def test_a_bare_file_system_carries_a_study(bare, command):
    """Run, run again, list, report, sample, measure again: through the small file that stands for the link."""
    answer = command(*TINY)
    assert answer.code == 0, answer.err
    assert answer.err.count("no file locks") == 1 and answer.err.count("no symbolic links") == 1
    (run,) = (bare / "outputs" / "runs").iterdir()
    entry = bare / "outputs" / "default" / run.name
    assert entry.is_file() and entry.read_text() == f"../runs/{run.name}\n"
    for path in (line.split()[1] for line in answer.out.splitlines() if line.split()[:1] in (["samples"], ["result"])):
        assert Path(path).is_file()
    again = command(*TINY)
    assert again.code == 0 and "already done" in again.err
    for folder in ("outputs", "outputs/default", str(entry)):
        assert "1 done" in command(folder, entry=lpc_runner.ls.main).out
    assert "1 runs, 1 finished" in command("outputs/default", entry=lpc_runner.report.main).out
    assert command(str(entry), "--num", "4", entry=lpc_runner.sample.main).code == 0
    assert [found.path for found in runs_of(Path("outputs/default"))] == [run]
    assert RunDirectory.open(entry).path == run


def test_an_entry_that_is_no_link_is_left_alone(tmp_path):
    make(tmp_path, "a-run")
    study = tmp_path / "study"
    study.mkdir()
    (study / "a-run").write_text("../runs/a-run")  # as version control writes a link without links: no line ending
    (study / "notes").write_text("../runs/a-run\n")  # a link has its run's name
    (study / "gone").write_text("../runs/gone\n")
    (study / "binary").write_bytes(b"\xff\xfe\x00")
    assert follow(study / "a-run").resolve() == tmp_path / "runs" / "a-run"
    assert follow(study / "notes") == study / "notes" and follow(study / "binary") == study / "binary"
    assert [run.name for run in lpc_runner.ls.list_runs(study)] == ["a-run"]
    warnings: list[str] = []
    assert [run.name for run in lpc_runner.study.runs.read_runs(study, warnings)] == ["a-run"]
    assert warnings == ["gone: a link to a run that is not there"]
    with pytest.raises(UserError, match="no link to a run"):
        RunDirectory(tmp_path / "runs" / "notes").require_linkable(tmp_path, "study")


def test_without_file_locks_one_machine_still_keeps_its_processes_apart(bare):
    run = RunDirectory(bare / "runs" / "a")
    with run.locked():
        assert run.owner() == f"pid {os.getpid()} on {os.uname().nodename}"
        with pytest.raises(Occupied, match=f"pid {os.getpid()}"), RunDirectory(run.path).locked():
            pass
    assert run.owner() is None
    with run.locked():
        pass
    RunDirectory(run.path).link_into(bare, "study")


def test_a_machine_without_file_locks_runs_all_the_same(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(files, "_local_folder", lambda: tmp_path / "local")
    files.say_once.cache_clear()
    refuse(monkeypatch, fcntl, "flock", errno.ENOSYS)
    with RunDirectory(tmp_path / "a").locked():
        assert RunDirectory(tmp_path / "a").owner() is None
    assert len(caplog.messages) == 1 and "two processes must not be started" in caplog.messages[0]


def test_looking_for_the_owner_writes_nothing(tmp_path):
    run = RunDirectory(tmp_path / "a")
    run.path.mkdir()
    assert run.owner() is None and list(run.path.iterdir()) == []
    with lock_on(run.path / ".lock"):
        assert is_held(run.path / ".lock")
    assert not is_held(run.path / ".lock")


def test_what_cannot_be_told_of_an_owner_is_said(tmp_path, monkeypatch):
    run = RunDirectory(tmp_path)
    (tmp_path / ".owner").write_text("pid 7 on elsewhere\n")
    (tmp_path / ".lock").write_text("")
    assert run.owner() is None
    refuse(monkeypatch, fcntl, "flock", errno.EIO)
    assert run.owner() == "pid 7 on elsewhere (whether it still works cannot be told: Input/output error)"


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fails_is_not_taken_for_one_that_cannot(number, tmp_path, monkeypatch):
    refuse(monkeypatch, os, "fsync", number)
    with pytest.raises(OSError, match=os.strerror(number)):
        sync_folder(tmp_path)
    with open(tmp_path / "x", "wb") as file, pytest.raises(OSError, match=os.strerror(number)):
        flush_to_disk(file.fileno())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_link_that_the_disk_refuses_is_one_line_and_recorded(number, command, monkeypatch):
    with monkeypatch.context() as patch:
        refuse(patch, os, "symlink", number)
        answer = command(*TINY)
    (run,) = Path("outputs/runs").iterdir()
    assert answer.code == 1 and "Traceback" not in answer.err
    assert os.strerror(number) in answer.lines[-1] and os.strerror(number) in result_of(run)["error"]


def test_a_name_too_long_for_the_file_system_is_one_line_before_any_work(command, workplace):
    answer = command(*TINY, f"study='{'数' * 100}'")
    assert answer.code == 1 and len(answer.lines) == 1 and "of at most 240 bytes" in answer.err
    assert not list(workplace.iterdir())


def test_a_read_only_data_dir_from_which_nothing_is_needed(command, workplace, monkeypatch):
    (workplace / "data").mkdir()
    real = os.mkdir
    files.say_once.cache_clear()

    def mkdir(path, *rest, **more):
        if Path(path).absolute().is_relative_to(workplace / "data"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, *rest, **more)

    monkeypatch.setattr(os, "mkdir", mkdir)
    answer = command(*TINY)
    assert answer.code == 0 and "nothing is kept there for later runs (Read-only" in answer.err
    assert list((workplace / "data").iterdir()) == []


def test_a_cache_is_done_without_and_that_is_said_once(tmp_path, monkeypatch, caplog):
    files.say_once.cache_clear()
    (tmp_path / "file").write_text("")
    for name in ("a", "b"):
        write_cache(tmp_path / "file" / name, b"")
    assert len(caplog.messages) == 1 and "nothing is kept there" in caplog.messages[0]
    write_cache(tmp_path / "new" / "a", b"x")
    assert (tmp_path / "new" / "a").read_bytes() == b"x"


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
def test_a_refusal_of_the_system_is_not_called_damage(error, tmp_path, monkeypatch, caplog):
    with pytest.raises(UserError, match=rf"x\.npz: cannot be read .*{error.strerror}"), damage_named(Path("x.npz")):
        raise error
    with pytest.raises(UserError, match="more memory than there is"), damage_named(Path("x.npz")):
        raise MemoryError
    with pytest.raises(UserError, match="damaged or cut short"), damage_named(Path("x.npz")):
        raise OSError("Unable to open file (truncated file)")  # h5py's words for damage, no number of the system's
    monkeypatch.setattr("builtins.open", lambda *_, **__: (_ for _ in ()).throw(error))
    assert Reference.read(tmp_path / "r.npz", "key") is None
    assert "cannot be read" in caplog.messages[0] and "damaged" not in caplog.messages[0]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(28, "No space left on device", "x"), "x: No space left on device"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError("two\nlines"), "two lines"),
        (OSError(), "OSError"),
    ],
)
def test_a_refusal_in_one_line(error, text):
    assert error_text(error) == text


# Runs that move -------------------------------------------------------------------------------------------


def test_a_run_needs_its_checkpoint_and_not_its_data(command, workplace, tmp_path, monkeypatch):
    """Another folder, another machine, data moved or deleted: sample, load, report; evaluate where data are given."""
    write_images(workplace / "mine.npz", 200)
    assert command(*TINY, "dataset=arrays", "dataset.train=mine.npz").code == 0
    described = json.loads((only_run() / "run.json").read_text())
    assert (described["data_shape"], described["num_train"], described["num_held_out"]) == ([1, 28, 28], 180, 0)
    there = shutil.copytree(only_run(), tmp_path / os.fsdecode(b"caf\xe9") / "copied")  # a name in an old encoding
    shutil.move(workplace / "mine.npz", tmp_path / "moved.npz")
    shutil.rmtree(workplace / "outputs")
    monkeypatch.chdir(tmp_path)
    assert command(str(there), "--num", "4", "--output", "four.npz", entry=lpc_runner.sample.main).code == 0
    assert np.load("four.npz")["images"].shape == (4, 1, 28, 28)
    assert lpc_runner.load(there).update == 6
    assert "1 runs, 1 finished" in command(str(there), entry=lpc_runner.report.main).out
    answer = command(str(there), entry=lpc_runner.evaluate.main)
    assert answer.code == 1 and len(answer.lines) == 1
    assert "mine.npz: no such file" in answer.err and "dataset.train=..." in answer.err
    answer = command(str(there), "dataset.train=moved.npz", entry=lpc_runner.evaluate.main)
    assert answer.code == 0, answer.err
    (content,) = map(json.loads, (path.read_text() for path in (there / "evaluations").iterdir()))
    assert content["metrics"] == result_of(there)["metrics"] and content["data"] == described["data"]
    write_images(tmp_path / "wider.npz", 60, (1, 32, 32))
    answer = command(str(there), "dataset.train=wider.npz", entry=lpc_runner.evaluate.main)
    assert answer.code == 1 and len(answer.lines) == 1 and "(1, 28, 28)" in answer.err and "(1, 32, 32)" in answer.err


def test_a_read_only_run_is_measured_nowhere_and_that_is_said_first(command, workplace, monkeypatch):
    assert command(*TINY).code == 0
    run, real = only_run().resolve(), os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != run and real(path, mode))
    monkeypatch.setattr(lpc_runner.evaluate, "_require_data", lambda _: pytest.fail("began to measure"))
    answer = command(str(run), entry=lpc_runner.evaluate.main)
    assert answer.code == 1 and len(answer.lines) == 1 and "is read-only" in answer.err


def test_a_folder_that_cannot_be_listed_does_not_count_as_empty(tmp_path, monkeypatch):
    make(tmp_path, "a-run")
    real = os.listdir

    def unreadable(path="."):
        if Path(path).is_relative_to(tmp_path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "listdir", unreadable)
    folder = tmp_path / "runs"
    list_of = lambda path: list(lpc_runner.study.runs.read_runs(path, []))
    for read in (runs_of, lpc_runner.ls.list_runs, list_of, checkpoint_files):
        with pytest.raises(PermissionError, match="runs"):
            read(folder)


def test_a_folder_that_may_be_written_and_not_be_read(tmp_path, monkeypatch):
    real = os.open

    def unreadable(path, flags, *rest, **more):
        if Path(path) == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", unreadable)
    files.write_atomically(tmp_path / "x", "γ")
    assert (tmp_path / "x").read_bytes() == "γ".encode()
