"""What may happen to a folder of results: several runs, kills at any moment, and files of people in it."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import KILLED_AT_EVERY, make_bank, run_program
from safetensors.torch import save_file

import pyels
from pyels.files import read_tensors, remove_temporary, replacing, write_tensors
from pyels.studies import resumable

RESULTS = ["run.json", "samples.png", "samples.safetensors"]


class Silent:
    """Progress that nobody sees."""

    def step(self, step):
        pass

    def skip(self):
        pass


SILENT = Silent()


@pytest.fixture
def sample(tmp_path):
    """The arguments of a short run into tmp_path / "out"."""
    make_bank(20, (1, 8, 8)).save(tmp_path / "bank.npz")
    options = ("--dataset", tmp_path / "bank.npz", "--patch-size", 3, "--steps", 4, "--num", 3)
    return [str(a) for a in ("sample", *options, "--out", tmp_path / "out")]


def contents(folder):
    """Of every file in it; None for a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def program(*lines):
    """A command line that runs the program after some lines of Python."""
    return [sys.executable, "-c", "\n".join((*lines, "import pyels.cli; pyels.cli.main()"))]


def wait_for(path, process):
    deadline = time.time() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.time() < deadline
        time.sleep(0.01)


# ---- Several runs --------------------------------------------------------------------------------------------------


def test_every_command_leaves_a_folder_alone_that_is_in_use(sample, tmp_path, capsys):
    pyels.ResNet(width=4, depth=1).save(tmp_path / "network.safetensors")
    data = sample[1:3]
    network = ("--network", tmp_path / "network.safetensors", *data, "--num", 1)
    commands = {
        "demo": ("--num", 1),
        "sample": sample[1:],
        "train": (*data, "--steps", 1),
        "calibrate": (*network, "--sizes", 3),
        "compare": (*network, "--machines", "is"),
        "bench": (*data, "--images", 4, "--size", 8, "--sizes", 3),
        "scaling": (*data, "--patch-sizes", "3,3", "--num", 1),
    }
    out = tmp_path / "out"
    with resumable.result_folder(out, "train"):
        before = contents(out)
        for command, options in commands.items():
            assert run_program(command, *options, "--out", out) == 2
            (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
            assert line.startswith(f"pyels: error: {out} is in use by pyels train, process {os.getpid()} on ")
            assert re.search(r", since 20\d\d-\S+ \d\d:\d\d:\S+; wait till it has ended, or choose another", line)
            assert contents(out) == before
    assert not out.exists()
    assert run_program(*sample) == 0


@pytest.mark.slow
def test_two_commands_at_once(sample, tmp_path):
    """As a double click or a job array starts them."""
    processes = [
        subprocess.Popen([sys.executable, "-m", "pyels", *sample], stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    for process, error in zip(processes, errors, strict=True):
        assert process.returncode == (2 if "is in use by" in error else 0), error
    assert {process.returncode for process in processes} <= {0, 2}
    assert 0 in {process.returncode for process in processes}
    assert sorted(contents(tmp_path / "out")) == RESULTS


STUDY = """
import os, signal, sys
from pathlib import Path
import torch
from pyels.studies import resumable
from pyels.files import write_json, write_tensors

class Silent:
    step = skip = lambda self, *_: None

def study(out, visited=False):
    def compute(i, on_step):
        if visited:  # by a person, who leaves notes
            for folder in (out, out / "unfinished"):
                (folder / "notes.txt").write_text("mine")
        return {"v": torch.full((2,), float(i))}

    with resumable.result_folder(out, "sample"):
        items = resumable.resumable(out, {"command": "sample", "version": "2"}, 3, compute, Silent())
        write_tensors(out / "samples.safetensors", items)
        write_json(out / "run.json", {"command": "sample"})
        resumable.finished(out)

def names(out):
    return sorted(str(path.relative_to(out)) for path in out.rglob("*"))

def forked(work):
    process = os.fork()
    if process == 0:
        try:
            work()
        except BaseException as error:
            if not (isinstance(error, ValueError) and "is in use by" in str(error)):
                print(repr(error), flush=True)
                os._exit(1)
            os._exit(2)
        os._exit(0)
    return process

def ended(process):
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

torch.set_num_threads(1)
folder, every = Path(sys.argv[1]), int(sys.argv[2])
"""

AT_ONCE = """
codes = []
for trial in range(25):
    out = folder / str(trial)
    read, write = os.pipe()

    def work():
        os.read(read, 1)  # until both are there
        study(out)

    processes = [forked(work) for _ in range(2)]
    os.write(write, b"go")
    codes.append(sorted(map(ended, processes)))
    assert codes[-1] in ([0, 0], [0, 2]), codes[-1]
    assert names(out) == ["run.json", "samples.safetensors"], names(out)
    os.close(read)
    os.close(write)
assert [0, 2] in codes
"""

KILLS = """
CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "fcntl.flock"}
kills = 0
for visited in (False, True):
    for end in ("kill", "interrupt"):
        for last in range(1, 1000, every):
            out = folder / f"{visited}-{end}-{last}"

            def work():
                done = 0

                def hook(event, arguments):
                    nonlocal done
                    if event in CHANGES and (event == "fcntl.flock" or str(out) in str(arguments[0])):
                        done += 1
                        if done == last:
                            if end == "interrupt":
                                raise KeyboardInterrupt
                            os.kill(os.getpid(), signal.SIGKILL)

                sys.addaudithook(hook)
                try:
                    study(out, visited)
                except KeyboardInterrupt:
                    os._exit(3)

            code = ended(forked(work))
            assert code in (0, -9, 3), code
            notes = out.exists() and [path for path in names(out) if path.endswith("notes.txt")]
            assert not notes or all((out / path).read_text() == "mine" for path in notes)
            assert ended(forked(lambda: study(out))) == 0, (out, names(out))
            expected = ["run.json", "samples.safetensors"]
            if notes:  # of which none is lost
                expected = sorted({*expected, *notes})
                if "unfinished/notes.txt" in notes:
                    expected = sorted([*expected, "unfinished", "unfinished/settings.json"])
            assert names(out) == expected, (out, notes, names(out))
            if code == 0:
                break
            kills += 1
assert kills * every > 100, kills
"""


@pytest.mark.slow
@pytest.mark.parametrize("script", [AT_ONCE, KILLS], ids=["at-once", "kills"])
def test_many_processes(tmp_path, script):
    """Two that start in the same moment in a new folder; one that is ended before each of its changes to the disk."""
    ended = subprocess.run(
        [sys.executable, "-c", STUDY + script, str(tmp_path), str(KILLED_AT_EVERY)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (0, ""), ended.stdout + ended.stderr


def test_a_file_system_without_locks_is_used_all_the_same(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.warns(UserWarning, match="cannot be locked"), resumable.result_folder(tmp_path / "out", "sample"):
        pass
    assert not (tmp_path / "out").exists()


# ---- Files of people -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [None, "no json", '{"version": 3}', '{"command": "build", "version": "1"}'], ids=str
)
def test_a_folder_of_somebody_else_is_never_touched(sample, tmp_path, capsys, settings):
    out = tmp_path / "out"
    for name in ("unfinished", ".unfinished-done"):
        (out / name / "deeper").mkdir(parents=True)
        (out / name / "000000.safetensors").write_text("mine")
        (out / name / "deeper" / "notes.txt").write_text("mine")
        if settings is not None:
            (out / name / "settings.json").write_text(settings)
    before = contents(out)
    assert run_program(*sample) == 2
    assert f"{out / 'unfinished'} is not of pyels, or its settings.json is damaged" in capsys.readouterr().err
    assert contents(out) == before
    (out / "unfinished").rename(out / "elsewhere")
    (out / "unfinished").mkdir()  # nor is an empty one
    assert run_program(*sample) == 2
    (out / "unfinished").rmdir()
    assert run_program(*sample) == 0
    left = contents(out)
    assert {name: left[name] for name in before if name.startswith(".unfinished")}.items() <= before.items()
    assert sorted(path.name for path in out.iterdir()) == [".unfinished-done", "elsewhere", *RESULTS]


def test_a_run_json_of_somebody_else_is_not_replaced(sample, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text('{"runs": 7}')
    assert run_program(*sample) == 2
    assert "run.json is not of pyels, or it is damaged" in capsys.readouterr().err
    assert contents(tmp_path / "out") == {"run.json": b'{"runs": 7}'}


@pytest.mark.parametrize("command", ["demo", "sample", "bench", "train"])
def test_results_of_other_settings_and_of_others_are_not_replaced(sample, tmp_path, capsys, command):
    out, data = tmp_path / "out", sample[1:3]
    options, other, names = {
        "demo": (("--num", 1), ("--num", 1, "--seed", 1), ["demo.png", "demo.safetensors", "report.json"]),
        "sample": (sample[1:-2], (*sample[1:-2], "--seed", 1), ["samples.png", "samples.safetensors"]),
        "bench": (
            (*data, "--images", 4, "--image-size", 8, "--sizes", 3, "--seconds", 0.01, "--repeats", 1),
            (*data, "--images", 5, "--image-size", 8, "--sizes", 3),
            ["bench.json", "bench.png"],
        ),
        "train": (
            (*data, "--width", 4, "--depth", 1, "--steps", 1, "--batch-size", 2),
            (*data, "--width", 4, "--depth", 1, "--steps", 2),
            ["loss.png", "network.safetensors"],
        ),
    }[command]
    for name in names:
        out.mkdir()
        (out / name).write_text("mine")
        assert run_program(command, *options, "--out", out) == 2
        assert f"{out / name} is a finished" in (err := capsys.readouterr().err) or f"holds {name}, and nothing" in err
        assert contents(out) == {name: b"mine"}
        (out / name).unlink()
        out.rmdir()
    if command == "demo":
        out.mkdir()
        (out / "run.json").write_text('{"command": "demo", "version": "7"}')
    else:
        assert run_program(command, *options, "--out", out) == 0
        assert sorted(contents(out)) == sorted([*names, "run.json"])
    before = contents(out)
    assert run_program(command, *other, "--out", out) == 2
    assert re.search("holds finished results with|is a finished network", capsys.readouterr().err)
    assert contents(out) == before


def test_no_path_and_the_home_folder(sample, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run_program(*sample[:-1], "") == 2
    assert "a path must not be empty; the current folder is ." in capsys.readouterr().err
    assert sorted(contents(tmp_path)) == ["bank.npz"]
    assert run_program(*sample[:-1], "~/out") == 0
    assert sorted(contents(tmp_path / "out")) == RESULTS


@pytest.mark.parametrize("damage", ["bit", "nan", "names", "shape", "short"])
def test_a_damaged_item_is_refused_by_name(tmp_path, damage):
    path = tmp_path / "unfinished" / "000001.safetensors"

    def stop(i, on_step):
        if i == 2:
            raise KeyboardInterrupt
        return {"v": torch.ones(4)}

    with pytest.raises(KeyboardInterrupt), resumable.result_folder(tmp_path, "sample"):
        resumable.resumable(tmp_path, {"a": 1}, 3, stop, SILENT)
    blob = path.read_bytes()
    if damage == "bit":
        path.write_bytes(blob[:-1] + bytes([blob[-1] ^ 1]))
    elif damage == "nan":  # as another program writes it
        save_file({"v": torch.tensor([1, 1, 1, float("nan")])}, path)
    elif damage == "names":
        write_tensors(path, {"w": torch.ones(4)})
    elif damage == "shape":
        write_tensors(path, {"v": torch.ones(5)})
    else:
        path.write_bytes(blob[:-1])
    message = r"unfinished/000001\.safetensors(: not as it was written| holds other tensors).*; delete it"
    with resumable.result_folder(tmp_path, "sample"), pytest.raises(ValueError, match=message):
        resumable.resumable(tmp_path, {"a": 1}, 3, lambda i, on_step: {"v": torch.ones(4)}, SILENT)
    path.unlink()
    with resumable.result_folder(tmp_path, "sample"):
        resumable.resumable(tmp_path, {"a": 1}, 3, lambda i, on_step: {"v": torch.ones(4)}, SILENT)


@pytest.mark.parametrize("of", ["another item", "another run"])
def test_an_item_that_belongs_elsewhere_is_refused_by_name(tmp_path, of):
    def stop(i, on_step):
        if i == 2:
            raise KeyboardInterrupt
        return {"v": torch.full((4,), float(i))}

    for name in ("a", "b"):
        with pytest.raises(KeyboardInterrupt), resumable.result_folder(tmp_path / name, "sample"):
            resumable.resumable(tmp_path / name, {"seed": name}, 3, stop, SILENT)
    item = tmp_path / "a" / "unfinished" / "000001.safetensors"
    shutil.copy(
        item.with_name("000000.safetensors") if of == "another item" else tmp_path / "b" / "unfinished" / item.name,
        item,
    )
    with (
        resumable.result_folder(tmp_path / "a", "sample"),
        pytest.raises(
            ValueError, match=r"unfinished/000001\.safetensors: not as it was written \(it is of another run"
        ),
    ):
        resumable.resumable(tmp_path / "a", {"seed": "a"}, 3, stop, SILENT)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"command": ["sample"], "version": "1"}', "{", "[]", "\x00"])
def test_hostile_records_in_a_folder_are_refused_in_one_line(sample, tmp_path, capsys, text):
    out = tmp_path / "out"
    for place in (out / "run.json", out / "unfinished" / "settings.json"):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
        assert run_program(*sample) == 2
        err = capsys.readouterr().err
        assert err.splitlines()[-1].startswith(f"pyels: error: {place.parent if place.parent != out else place}")
        assert "is not of pyels, or it" in err
        assert "Traceback" not in err
        place.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM], ids=str)
@pytest.mark.parametrize("visited", [False, True])
def test_ended_before_the_first_sample(sample, tmp_path, end, visited):
    out = tmp_path / "out"
    slow = program("import pyels, time", "pyels.sample = lambda *_, **__: time.sleep(100)")
    process = subprocess.Popen([*slow, *sample], stderr=subprocess.PIPE, text=True)
    wait_for(out / "unfinished" / "settings.json", process)
    time.sleep(0.2)
    if visited:
        (out / "notes.txt").write_text("mine")
        (out / "unfinished" / "mine").mkdir()
        (out / "unfinished" / "mine" / "notes.txt").write_text("mine")
    process.send_signal(end)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "pyels: interrupted; repeat the command" in err
    if not visited:
        assert not out.exists()
        return
    left = contents(out)
    assert json.loads(left.pop("unfinished/settings.json"))["command"] == "sample"
    assert left == {
        "notes.txt": b"mine",
        "unfinished": None,
        "unfinished/mine": None,
        "unfinished/mine/notes.txt": b"mine",
    }
    assert run_program(*sample, "--seed", 3) == 0  # as nothing was finished, another run may follow
    assert {name: value for name, value in contents(out).items() if "notes" in name} == {
        "notes.txt": b"mine",
        "unfinished/mine/notes.txt": b"mine",
    }


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL], ids=str)
def test_training_ended_while_it_writes(sample, tmp_path, end):
    """Half of a checkpoint is not left behind, at the latest by the run that goes on."""
    out = tmp_path / "out"
    stuck = program(
        "import time",
        "from pyels.networks import training",
        "from pyels.files import replacing",
        "def write(self, path, run):",
        "    with replacing(path) as temporary:",
        "        temporary.write_bytes(b'half')",
        "        time.sleep(100)",
        "training._State.write = write",
        "training._CHECKPOINT_SECONDS = -1",
        "training._interrupts_between_steps = lambda: __import__('contextlib').nullcontext(lambda: False)",
    )
    options = ["train", *sample[1:3], "--width", "4", "--depth", "1", "--batch-size", "4", "--steps", "3"]
    process = subprocess.Popen([*stuck, *options, "--out", str(out)], stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not list(out.glob(".pyels-*-checkpoint.safetensors")) and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(end)
    assert process.wait(timeout=60) == (130 if end == signal.SIGTERM else -9)
    assert out.exists() == (end == signal.SIGKILL)
    assert run_program(*options, "--out", out) == 0
    assert sorted(path.name for path in out.iterdir()) == ["loss.png", "network.safetensors", "run.json"]


# ---- Going on ------------------------------------------------------------------------------------------------------


def test_killed_run_goes_on_and_gives_the_same_bits(tmp_path):
    """Killed outright in the middle; the finished samples are kept, and the rest comes out as if nothing happened."""
    options = ["sample", "--limit", "100", "--num", "6", "--steps", "10", "--patch-size", "7", "--boundary", "interior"]
    assert run_program(*options, "--out", tmp_path / "whole") == 0
    out = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-m", "pyels", *options, "--out", str(out)], stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while time.time() < deadline and not (out / "unfinished" / "000001.safetensors").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = sorted((out / "unfinished").glob("0*.safetensors"))
    assert 2 <= len(done) < 6
    before = [p.stat().st_mtime_ns for p in done]
    # Another setting is refused, the same one goes on.
    assert run_program(*options[:-1], "circular", "--out", out) == 2
    assert [p.stat().st_mtime_ns for p in done] == before
    assert run_program(*options, "--out", out) == 0
    a, b = (read_tensors(folder / "samples.safetensors") for folder in (tmp_path / "whole", out))
    assert torch.equal(a["samples"], b["samples"])
    assert not (out / "unfinished").exists()


def test_a_run_of_the_version_before_goes_on(sample, tmp_path, monkeypatch):
    assert run_program(*sample) == 0
    whole = read_tensors(tmp_path / "out" / "samples.safetensors")
    monkeypatch.setattr(resumable, "finished", lambda out: (out / "run.json").unlink())
    assert run_program(*sample) == 0  # and leaves its items
    monkeypatch.undo()
    waiting = tmp_path / "out" / "unfinished"
    (waiting / "000001.safetensors").unlink()
    settings = json.loads((waiting / "settings.json").read_text())
    assert settings.pop("unfinished_run_of") == "pyels"
    (waiting / "settings.json").write_text(json.dumps(settings))
    before = (waiting / "000002.safetensors").stat().st_mtime_ns
    assert run_program(*sample, "--seed", 1) == 2
    assert (waiting / "000002.safetensors").stat().st_mtime_ns == before
    assert run_program(*sample) == 0
    assert torch.equal(read_tensors(tmp_path / "out" / "samples.safetensors")["samples"], whole["samples"])
    assert sorted(contents(tmp_path / "out")) == RESULTS


def test_items_of_other_settings_are_not_used(tmp_path):
    def compute(value):
        return lambda i, on_step: {"v": torch.tensor(float(value))}

    def stop(i, on_step):
        if i == 1:
            raise KeyboardInterrupt
        return {"v": torch.tensor(1.0)}

    with pytest.raises(KeyboardInterrupt), resumable.result_folder(tmp_path, "sample"):
        resumable.resumable(tmp_path, {"a": 1}, 2, stop, SILENT)
    with resumable.result_folder(tmp_path, "sample"):
        with pytest.raises(ValueError, match="unfinished run with a = 1, now 2"):
            resumable.resumable(tmp_path, {"a": 2}, 2, compute(2), SILENT)
        assert resumable.resumable(tmp_path, {"a": 1}, 2, compute(2), SILENT)["v"].tolist() == [1, 2]
        (tmp_path / "unfinished" / "settings.json").unlink()
        with pytest.raises(ValueError, match="is not of pyels"):
            resumable.resumable(tmp_path, {"a": 1}, 2, compute(2), SILENT)
    assert len(list((tmp_path / "unfinished").iterdir())) == 2


def test_a_run_that_finished_nothing_leaves_nothing(tmp_path, monkeypatch):
    def stop(i, on_step):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    for folder in (Path(), tmp_path / "new" / "folder"):
        with pytest.raises(KeyboardInterrupt), resumable.result_folder(folder, "sample"):
            resumable.resumable(folder, {"a": 1}, 2, stop, SILENT)
    assert [p.name for p in tmp_path.iterdir()] == ["new"]
    assert list((tmp_path / "new").iterdir()) == []


def test_jobs_give_the_same_items_and_stop_together(tmp_path):
    """Eight items in four threads come back in order; an error in one stops the others at their next step."""

    def compute(i, on_step):
        return {"v": torch.tensor(float(i))}

    with resumable.result_folder(tmp_path / "a", "sample"):
        items = resumable.resumable(tmp_path / "a", {}, 8, compute, SILENT, jobs=4)
    assert items["v"].tolist() == list(range(8))

    steps = []

    def endless(i, on_step):
        if i == 2:
            raise ValueError("no good")
        while True:
            steps.append(i)
            time.sleep(0.001)
            on_step(None)

    with pytest.raises(ValueError, match="no good"), resumable.result_folder(tmp_path / "b", "sample"):
        resumable.resumable(tmp_path / "b", {}, 8, endless, SILENT, jobs=4)
    assert not (tmp_path / "b").exists()
    assert len(set(steps)) < 7  # not all of the others were begun


def test_replacing_keeps_the_old_file_when_writing_fails(tmp_path):
    write_tensors(tmp_path / "a.safetensors", {"x": torch.ones(3)})

    def fail_halfway():
        with replacing(tmp_path / "a.safetensors") as temporary:
            temporary.write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_halfway()
    assert torch.equal(read_tensors(tmp_path / "a.safetensors")["x"], torch.ones(3))
    assert len(list(tmp_path.iterdir())) == 1
    (tmp_path / "a.safetensors").write_bytes(b"12345")
    with pytest.raises(ValueError, match=r"a\.safetensors: damaged"):
        read_tensors(tmp_path / "a.safetensors")


def test_nothing_is_removed_under_another_name(tmp_path):
    for name in ("a.json", ".pyels-lock", ".pyels-0123456-a.json", ".run-01234567.json"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(ValueError, match="only what bears a temporary name"):
            remove_temporary(tmp_path / name)
    with resumable.result_folder(tmp_path, "sample"):  # whose lock's name is the one that the last run may have left
        (tmp_path / ".pyels-01234567-a.json").write_text("half")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".pyels-0123456-a.json", ".run-01234567.json", "a.json"]
