"""The trainer: runs killed with SIGKILL at any moment, any number of times, end with the bits of an unbroken run.

Real processes, forked from a server that has imported everything, so that a kill costs no start-up. The method is CRD
and RCKA together: connectors, a memory bank on both sides, random negatives, and the Gram terms; and a callback with a
state, an average of the weights."""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

KILLS = 20
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    ["rcka.experiments.experiment", "sklearn.datasets", "safetensors.torch", "torch._dynamo"]
)  # the last one by every optimiser


def job(root, device="cpu", method="crd+rcka", checkpoint_seconds=0.0, moment=None):
    "Teacher and student, in this process."
    from rcka.experiments.experiment import Experiment, run
    from rcka.train.callbacks import EMA

    if moment:
        sabotage(moment)
    args = {"crd.negatives": 64, "crd.width": 16} if "crd" in method else {}
    run(
        Experiment(
            "digits",
            "resnet8",
            "resnet8",
            method,
            method_args=args,
            seed=3,
            epochs=3,
            batch_size=32,
            schedule="onecycle",
            train_limit=160,
            test_limit=200,
            teacher_epochs=1,
            deterministic=True,
        ),
        root=root,
        device=device,
        progress=False,
        checkpoint_seconds=checkpoint_seconds,
        callbacks=[EMA(0.9)],
    )


def start(*args, **kwargs):
    p = processes.Process(target=job, args=args, kwargs=kwargs)
    p.start()
    return p


def what_is_left(root):
    """Every byte that counts: weights, metrics, results without dates, timings and the checkout's commit, the tensors
    of the last checkpoint."""
    from rcka.train.checkpoint import last_checkpoint

    left = {}
    for folder in sorted(Path(root).iterdir()):
        for name in ("last.safetensors", "best.safetensors", "metrics.csv", "experiment.json"):
            left[folder.name, name] = (folder / name).read_bytes()
        result = json.loads((folder / "result.json").read_text())
        left[folder.name, "result"] = {
            k: v for k, v in result.items() if k not in ("seconds", "images_per_second", "finished", "commit")
        }
        state = last_checkpoint(folder)
        del state["learner"]["seconds"]
        assert [name for name, _ in state["learner"]["callbacks"]] == ["EMA"]
        left[folder.name, "checkpoint"] = flat(state)
        assert not list(folder.glob(".*.tmp")), "parts of files were left behind"
        assert 1 <= len(list(folder.glob("checkpoint-*.pt"))) <= 2
    return left


def flat(x):
    "Nested containers with tensors as bytes, to be compared with ==."
    if isinstance(x, torch.Tensor):
        return (
            str(x.dtype),
            tuple(x.shape),
            x.contiguous().view(torch.uint8).numpy().tobytes() if x.dim() else x.item(),
        )
    if isinstance(x, dict):
        return {k: flat(v) for k, v in x.items()}
    return [flat(v) for v in x] if isinstance(x, (list, tuple)) else x


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    "Per device: what an unbroken run leaves, and how long it took."
    runs = {}

    def get(device="cpu"):
        if device not in runs:
            root = tmp_path_factory.mktemp("unbroken")
            warm = processes.Process(target=time.sleep, args=(0,))  # the server imports what it needs
            warm.start()
            warm.join()
            began = time.perf_counter()
            p = start(root, device)
            p.join()
            assert p.exitcode == 0
            runs[device] = what_is_left(root), time.perf_counter() - began
        return runs[device]

    return get


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_random_kills(unbroken, tmp_path, device):
    expected, seconds = unbroken(device)
    chance, kills, round_ = random.Random(0), 0, 0
    while kills < KILLS:
        root, delay = tmp_path / str(round_), seconds / 3
        while True:
            p = start(root, device)
            p.join(chance.uniform(0.05, delay) if kills < KILLS else None)
            if p.exitcode is not None:
                break
            os.kill(p.pid, signal.SIGKILL)
            p.join()
            if p.exitcode == 0:
                break  # it was over just then
            assert p.exitcode == -signal.SIGKILL
            kills += 1
            delay *= 1.05  # a run that cannot get past a long part must end in time
        assert p.exitcode == 0, f"round {round_} failed after {kills} kills"
        assert what_is_left(root) == expected
        round_ += 1
    print(f"{kills} kills, {round_} runs")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(module, name, call, after=False):
    "Kill this process at a certain call of a function."

    def arm():
        calls, real = [], getattr(module, name)

        def f(*args, **kwargs):
            calls.append(1)
            if len(calls) == call and not after:
                die()
            value = real(*args, **kwargs)
            if len(calls) == call:
                die()
            return value

        setattr(module, name, f)

    return arm


def half_written():
    "The 20th file gets half of its bytes."
    import rcka.files

    calls = []

    @contextlib.contextmanager
    def opened(path, mode="r", **options):
        with open(path, mode, **options) as f:
            calls.extend([1] if mode == "wb" else [])
            if mode == "wb" and len(calls) == 20:

                class Half:
                    def write(self, data):
                        f.write(bytes(data)[: len(data) // 2])
                        f.flush()
                        die()

                yield Half()
            else:
                yield f

    rcka.files.open = opened


def after_the_last():
    "The last checkpoint of the teacher is written, and none of the older ones is gone yet."
    import rcka.train.checkpoint as module

    real = module.write_atomic

    def write(path, data):
        real(path, data)
        if path.name.startswith("checkpoint-0001-000000"):
            die()

    module.write_atomic = write


def sabotage(moment):
    "Arm this process to die at a moment."
    import rcka.train.classification
    import rcka.train.learner

    moments = {
        "before fsync": die_at(os, "fsync", 25),
        "before the move": die_at(os, "replace", 20),
        "after the move": die_at(os, "replace", 20, after=True),
        "old ones going": die_at(Path, "unlink", 12),
        "mid-evaluation": die_at(rcka.train.classification, "autocast", 5),
        "mid-step": die_at(rcka.train.learner, "average_gradients", 12),
        "half written": half_written,
        "last one written": after_the_last,
        "before the first file": die_at(os, "replace", 1),
    }
    moments[moment]()


@pytest.mark.parametrize(
    "moment",
    [
        "before fsync",
        "before the move",
        "after the move",
        "old ones going",
        "mid-evaluation",
        "mid-step",
        "half written",
        "last one written",
        "before the first file",
    ],
)
def test_kill_at(unbroken, tmp_path, moment):
    "The moments that a random kill may miss."
    p = start(tmp_path / "runs", moment=moment)
    p.join()
    assert p.exitcode == -signal.SIGKILL
    p = start(tmp_path / "runs")
    p.join()
    assert p.exitcode == 0
    assert what_is_left(tmp_path / "runs") == unbroken()[0]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_go_on(unbroken, tmp_path, signum):
    "Asked to stop, a run saves although no checkpoint is due, says so, and ends with an error."
    root = tmp_path / "runs"
    p = start(root, checkpoint_seconds=1e9)
    deadline = time.time() + 60
    while not list(root.glob("*crd*/metrics.csv")) and time.time() < deadline:
        time.sleep(0.02)  # one epoch of the student is over
    os.kill(p.pid, signum)
    p.join()
    assert p.exitcode not in (0, -signal.SIGKILL)
    assert list(root.glob("*crd*/checkpoint-*.pt"))
    p = start(root)
    p.join()
    assert p.exitcode == 0
    assert what_is_left(root) == unbroken()[0]
