"""rcka.experiments.sweep: what needs processes, kernels, locks, signals and a full disk.

Most runs go through the stand-in notebook of sweep_stub."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest

from rcka.experiments.experiment import Experiment, groups_of, run
from rcka.experiments.sweep import (
    DiskFull,
    Processes,
    _context,
    execute,
    fingerprint,
    grid,
    state,
    sweep,
    validate,
    with_teachers,
    work,
)
from rcka.train.checkpoint import last_checkpoint

sys.path.insert(0, str(Path(__file__).parent))
from sweep_stub import write_stub


@pytest.fixture
def stub(tmp_path, monkeypatch):
    monkeypatch.setenv("STUB_FIELDS", json.dumps(list(Experiment().to_dict())))
    return write_stub(tmp_path / "stub.ipynb")


@pytest.fixture(scope="module")
def pool():
    "One executor for all tests: its fork server has imported torch once."
    with Processes(3) as local:
        yield local


def pairs(methods="none,kd", seeds=(0,), **fields):
    return grid("digits", "resnet14:resnet8", methods, seeds, **{"epochs": 2, **fields})


def states(outcomes):
    return dict(Counter(o.state for o in outcomes))


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def alive(pid):
    return Path(f"/proc/{pid}").exists() and ") Z" not in Path(f"/proc/{pid}/stat").read_text()


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return found


@pytest.mark.slow
def test_failures_stay_with_their_run(stub, tmp_path, pool):
    """A kernel that raises and one that is killed: the others are done, both are recorded, and tried again unless asked
    not to."""
    runs, root = pairs("none,kd,rcka", (0, 66, 77)), tmp_path / "runs"
    tallies = []
    out = {o.key: o for o in sweep(runs, root, pool, stub, watch=tallies.append, every=0.1)}
    assert len(out) == len(with_teachers(runs)) == 10
    assert {out[e.key].state for e in runs if e.seed == 0} == {"done"} and {
        out[e.key].state for e in runs if e.seed
    } == {"failed"}
    teacher = runs[-1].teacher_experiment
    assert len(lines(root / teacher.key / "starts")) == 1  # trained once for six students
    raised, killed = (
        json.loads((root / next(e.key for e in runs if e.seed == seed) / "failure.json").read_text())
        for seed in (66, 77)
    )
    assert (
        raised["error"] == "ValueError: this seed brings bad luck"
        and "raise ValueError" in raised["traceback"]
        and "\x1b" not in raised["traceback"]
    )
    assert "Kernel" in killed["error"] or "kernel" in killed["error"]
    notebook = nbformat.read(root / teacher.key / "notebook.ipynb", 4)  # a page to open, with its parameters
    assert any("injected-parameters" in c.metadata.get("tags", []) and "resnet14" in c.source for c in notebook.cells)
    assert (
        tallies[-1].runs == 10
        and tallies[-1].epochs == tallies[-1].epochs_done == 8
        and any(t.seconds_left for t in tallies)
    )

    assert states(sweep(runs, root, pool, stub, retry=False, every=0.1)) == {"found": 4, "failed": 6}
    bad = next(e for e in runs if e.seed == 66)
    assert len(lines(root / bad.key / "starts")) == 1
    again = sweep([bad], root, pool, stub, every=0.1)
    assert len(lines(root / bad.key / "starts")) == 2 and states(again)["failed"] == 1


@pytest.mark.slow
def test_teacher_fails(stub, tmp_path, pool):
    runs = pairs("kd,rcka", teacher_seed=66)
    assert states(sweep(runs, tmp_path / "runs", pool, stub, every=0.1)) == {"failed": 1, "blocked": 2}


def test_no_experiments(tmp_path):
    assert sweep([], tmp_path) == []


@pytest.mark.slow
def test_bad_result_files(stub, tmp_path, pool):
    "Cut short, or of a newer format: named, left alone, and their students blocked."
    runs, root = pairs("none,kd", (0, 1)), tmp_path / "runs"
    sweep(runs, root, pool, stub, every=0.1)
    cut, newer = (root / e.key / "result.json" for e in runs[:2])
    cut.write_text(cut.read_text()[:40])
    newer.write_text(newer.read_text().replace('"format": ', '"format": 9'))
    before = cut.read_text(), newer.read_text()
    assert [state(p.parent) for p in (cut, newer)] == ["unreadable"] * 2
    out = {o.key: o for o in sweep(runs, root, pool, stub, every=0.1)}
    assert (
        "or incomplete" in out[runs[0].key].error
        and str(cut) in out[runs[0].key].error
        and "format 9" in out[runs[1].key].error
    )
    assert (cut.read_text(), newer.read_text()) == before and len(lines(cut.parent / "starts")) == 1


@pytest.mark.slow
def test_edited_notebook(stub, tmp_path, pool):
    "Every run says from which version of the notebook it is."
    runs, root = pairs(), tmp_path / "runs"
    sweep(runs[:1], root, pool, stub, every=0.1)
    old = fingerprint(stub)
    write_stub(stub, more="print('edited')")
    out = {o.key: o for o in sweep(runs, root, pool, stub, every=0.1)}
    assert out[runs[0].key].fingerprint == old != out[runs[1].key].fingerprint == fingerprint(stub)


@pytest.mark.slow
def test_full_disk(stub, tmp_path, pool):
    with pytest.raises(DiskFull, match="Make room"):
        sweep(pairs("none", (88,)), tmp_path / "runs", Processes(), stub, every=0.1)


def test_really_full_disk(stub, tmp_path):
    "A file system of 64 kB: the notebook alone does not fit."
    root = tmp_path / "small"
    root.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", root], capture_output=True).returncode:
        pytest.skip("cannot mount a small file system here")
    try:
        (root / "ballast").write_bytes(b"x" * 40_000)
        with pytest.raises(OSError, match="No space left|disk is full"):
            sweep(pairs("none", range(10)), root, Processes(), stub, every=0.1)
        (root / "ballast").unlink()
        assert states(sweep(pairs("none", (0,)), root, Processes(), stub, every=0.1)) == {"done": 1}
    finally:
        subprocess.run(["umount", root], check=True)


def a_sweep(root, stub, seconds):
    "A sweep in a process of its own, two runs at a time."
    os.environ["STUB_SECONDS"] = str(seconds)
    out = sweep(pairs("none,kd,rcka", (0, 1), epochs=4), root, Processes(2), stub, every=0.1)
    assert {o.state for o in out} <= {"done", "found"}, out


def start(target, *args):
    process = _context.Process(target=target, args=args)
    process.start()
    return process


def ended(process):
    process.join(200)
    return process.exitcode == 0


@pytest.mark.slow
def test_two_sweeps_at_once(stub, tmp_path, pool):
    "On one folder: nothing is run twice, both end, both say that all is done."
    root = tmp_path / "runs"
    both = [start(a_sweep, root, stub, 0.2) for _ in range(2)]
    assert all(map(ended, both))
    assert {p.parent.name: len(lines(p)) for p in root.glob("*/starts")} == {p.name: 1 for p in root.iterdir()}
    assert len(list(root.iterdir())) == 7 and all(state(p) == "done" for p in root.iterdir())


@pytest.mark.slow
def test_killed_and_started_again(stub, tmp_path, pool):
    "SIGKILL in the middle: no process stays behind, and the next sweep goes on from the last epochs."
    root = tmp_path / "runs"
    killed = start(a_sweep, root, stub, 0.7)
    until(lambda: any(len(lines(p)) >= 2 for p in root.glob("*/epochs")))
    pids = [pid for p in root.glob("*/starts") for pid in lines(p)]
    killed.kill()
    killed.join()
    until(lambda: not any(alive(pid) for pid in pids), 15)
    assert {"done"} != {state(p) for p in root.iterdir()}
    assert ended(start(a_sweep, root, stub, 0))
    assert all(state(p) == "done" for p in root.iterdir())
    assert all(lines(p) == ["1", "2", "3", "4"] for p in root.glob("*/epochs"))  # no epoch twice


@pytest.mark.parametrize("executor", ["threads", "submitit"])
@pytest.mark.slow
def test_other_executors(executor, stub, tmp_path):
    "Python's own thread pool, and submitit's local executor with two runs a job."
    if executor == "threads":
        made, share = ThreadPoolExecutor(1), 1
    else:
        submitit = pytest.importorskip("submitit")
        made, share = submitit.AutoExecutor(folder=tmp_path / "jobs", cluster="local"), 2
        made.update_parameters(timeout_min=5)
    assert states(sweep(pairs("none", (0, 66)), tmp_path / "runs", made, stub, runs_per_job=share, every=0.1)) == {
        "done": 1,
        "failed": 1,
    }


def a_real_sweep(root):
    "`rcka sweep` of one long run, in a session of its own like a terminal."
    command = [
        sys.executable,
        "-c",
        "from rcka.cli import main; main()",
        "sweep",
        "digits",
        "--pairs",
        "resnet14:resnet8",
    ]
    fields = ["epochs=2000", "batch_size=32", "train_limit=64", "test_limit=40", "schedule=cosine"]
    options = ["--methods", "none", "--seeds", "0", "--root", root, *(text for f in fields for text in ("-p", f))]
    repo = Path(__file__).resolve().parents[1]
    env = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(repo)}
    return subprocess.Popen(
        [*command, *map(str, options)],
        env=env,
        cwd=repo,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # tests that run in the background of a script have Ctrl-C ignored, and so would this process
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def kernels_of(root):
    "Processes whose environment has this folder of runs."
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"RCKA_RUNS={root}".encode() in path.read_bytes().split(b"\0"):
                found.append(path.parent.name)
        except OSError:
            pass
    return [pid for pid in found if alive(pid)]


def rows(root):
    return sum(len(lines(path)) - 1 for path in root.glob("*/metrics.csv"))


def stopped(root, signum, epochs):
    "Start the sweep, stop it once it has so many epochs; what it says, and the last checkpoint."
    p = a_real_sweep(root)
    until(lambda: rows(root) >= epochs or p.poll() is not None, 300)
    assert p.poll() is None, p.communicate()
    os.killpg(p.pid, signum)
    out, err = p.communicate(timeout=100)
    assert p.returncode == 130, (out, err)
    (run,) = root.iterdir()
    return err, last_checkpoint(run), run


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
def test_stopped_sweep_keeps_every_epoch(tmp_path):
    """Ctrl-C, then SIGTERM, long before a checkpoint is due: every epoch is kept, what is said of it is true, and the
    same command goes on."""
    root, epochs = tmp_path / "runs", 0
    for signum in (signal.SIGINT, signal.SIGTERM):
        err, kept, run = stopped(root, signum, epochs + 5)
        assert kept["epoch"] == rows(root) >= epochs + 5
        epochs = kept["epoch"]
        assert f"has a checkpoint after {epochs} epochs and {kept['step']} steps" in err
        assert not (run / "failure.json").exists() and not kernels_of(root)
        assert [row["epoch"] for row in kept["learner"]["history"]] == list(range(1, epochs + 1))


DEAF = """
import subprocess, sys, time
from rcka.experiments import sweep
sweep.PATIENCE = 1.0
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(999)"
kernel = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE)
kernel.stdout.readline()
print(kernel.pid, flush=True)
class Call:
    is_alive, join = (lambda self: True), (lambda self, seconds: time.sleep(seconds))
sweep._stop_kernels(Call())
"""


@pytest.mark.slow
def test_a_run_that_does_not_answer_is_killed():
    "A kernel that ignores SIGTERM gets PATIENCE and no more."
    repo = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(
        [sys.executable, "-c", DEAF],
        env={**os.environ, "PYTHONPATH": repo},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 1, done.stderr
    until(lambda: not alive(done.stdout.strip()), 10)


SOCKETS = """
import json, os, sys
from ipykernel.connect import get_connection_info
info = json.loads(get_connection_info())
open_now = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
mine = {os.readlink(path)[8:-1] for path in open_now if os.path.exists(path)}
rows = [line.split() for net in ("tcp", "tcp6") for line in open(f"/proc/self/net/{net}")]
listening = {int(row[1].split(":")[1], 16) for row in rows if row[3] == "0A" and row[9] in mine}
# where forked children hand their output: loopback, and guarded by a random token
output = sys.stdout.pub_thread._pipe_port
print(json.dumps([info["transport"], os.stat(os.path.dirname(info["ip"])).st_mode & 0o077, list(listening - {output})]))
"""


def test_kernel_is_not_on_tcp(tmp_path, monkeypatch):
    """The kernel's channels are files in a folder only the user can enter, also where the temporary folder has a long
    name."""
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(SOCKETS)]), tmp_path / "in.ipynb")
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    execute(tmp_path / "in.ipynb", tmp_path / "out.ipynb", {})
    said = "".join(
        o.text for c in nbformat.read(tmp_path / "out.ipynb", 4).cells for o in c.outputs if o.get("name") == "stdout"
    )
    assert json.loads(said) == ["ipc", 0, []]


def a_run(root, said):
    e = Experiment("digits", "resnet8", "resnet8", "kd", epochs=2, train_limit=100, test_limit=100)
    Path(said).write_text(str(run(e, root, progress=False)))


@pytest.mark.slow
def test_two_notebooks_side_by_side(tmp_path, pool):
    "`run` twice at once: one trains, the other waits and finds its result."
    root, said = tmp_path / "runs", [tmp_path / "a", tmp_path / "b"]
    assert all(map(ended, [start(a_run, root, path) for path in said]))
    assert said[0].read_text() == said[1].read_text() and len(list(root.iterdir())) == 2


def weights(root, e):
    return (root / e.key / "last.safetensors").read_bytes()


def group_of_three(**fields):
    "Two runs and one that diverges, and a fourth that sees its images in another order."
    small = dict(student="resnet8", teacher="resnet8", epochs=2, train_limit=100, test_limit=100, teacher_epochs=1)
    kinds = [("kd", {}), ("fcka", {"weight": 1e38}), ("fcka", {}), ("sp", {})]
    seeds = (0, 0, 0, 1)
    return [
        Experiment(dataset="digits", method=m, method_args=args, data_seed=seed, **small, **fields)
        for (m, args), seed in zip(kinds, seeds)
    ]


def test_a_sweep_groups_what_can_share_a_teacher():
    runs = group_of_three()
    assert groups_of(runs, 4) == [runs[:3], runs[3:]]
    assert groups_of(runs, 2) == [runs[:2], runs[2:3], runs[3:]]
    alone = pairs("none", (0, 1))  # without a teacher there is nothing to share
    assert groups_of(alone, 4) == [[e] for e in alone]


@pytest.mark.slow
def test_a_group_in_a_sweep(tmp_path, pool):
    "Bits, pages and failures are those of runs that are alone; the page of a run finds what the group left."
    runs, alone, together = group_of_three()[:3], tmp_path / "alone", tmp_path / "together"
    for e in (runs[0], runs[2]):
        run(e, alone, device="cpu", progress=False)
    out = {o.key: o for o in sweep(runs, together, pool, every=0.1)}
    assert [out[e.key].state for e in runs] == ["done", "failed", "done"], out
    assert "not finite" in out[runs[1].key].error
    for e in (runs[0], runs[2]):
        assert weights(alone, e) == weights(together, e)
        assert json.loads((together / e.key / "result.json").read_text())["group_size"] == 3
        assert (together / e.key / "notebook.ipynb").exists()


def test_validate():
    small = dict(seeds=[0], train_limit=100, test_limit=100)
    problems = validate(
        [
            *grid("digits", "wrn_16_2:vgg8,resnet14:resnet8", "kd,at", **small),
            *grid("imagefolder:nowhere", "resnet14:resnet8", "kd", [0]),
        ]
    )
    assert len(problems) == 2 and "wrn_16_2:vgg8 by at" in problems[0] and "nowhere" in problems[1]


def test_busy(stub, tmp_path):
    from filelock import FileLock

    e = pairs("none")[0]
    (tmp_path / e.key).mkdir()
    with FileLock(tmp_path / e.key / ".sweep.lock"):
        assert state(tmp_path / e.key) == "running"
        assert work(e.to_dict(), str(tmp_path), str(stub)).state == "busy"
    assert state(tmp_path / e.key) == "waiting"
