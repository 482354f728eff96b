"""The trainer in two processes (gloo, CPU): gradients, whole runs, the launchers, stopping."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import ENV, launch
from torch import nn

from rcka.core import FeaturePaths
from rcka.data.memory import Batches
from rcka.distributed import average_gradients, init_distributed, rank, shard, world_size
from rcka.methods.base import create_method
from rcka.train.classification import Distiller
from rcka.train.config import TrainConfig
from rcka.train.learner import Trainer

pytestmark = pytest.mark.slow

REPO = Path(__file__).resolve().parents[1]


class Net(nn.Sequential):
    "Without batch normalisation, which sees its own device's images only."

    layers = FeaturePaths(("0", "2", "4"), ("0", "2", "4"), "6", "7")

    def __init__(self, width, seed):
        torch.manual_seed(seed)
        super().__init__(
            nn.Conv2d(1, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=2),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * width, 5),
        )
        self.double()


def pieces():
    g = torch.Generator().manual_seed(0)
    images, targets = (
        torch.randint(0, 256, (44, 1, 7, 7), dtype=torch.uint8, generator=g),
        torch.randint(0, 5, (44,), generator=g),
    )
    make = lambda train: Batches(images, targets, 16, (0.5,), (0.25,), train=train, pad=1, dtype=torch.float64)
    return make(True), make(False)


METHODS = ["rcka", "crd+sp", "rkd+vid"]


def gradients(method, relations):
    "Of student and connectors for one batch, on one process or several."
    train, _ = pieces()
    distiller = Distiller(Net(4, 1), create_method(method), Net(6, 2))
    batch = next(iter(train.epoch(0)))
    torch.manual_seed(5)
    distiller.build(batch.images, train.targets)
    distiller.method.double()
    parameters = [*distiller.student.parameters(), *distiller.method.parameters()]
    torch.manual_seed(6)
    terms, _ = distiller(shard(batch), None, relations)
    sum(terms.values()).backward()
    average_gradients(parameters)
    return torch.cat([p.grad.flatten() for p in parameters]), {k: v.item() for k, v in terms.items()}


def whole_run(folder, method, relations=None):
    train, test = pieces()
    torch.manual_seed(3)
    student = Net(4, 1)
    trainer = Trainer(
        Distiller(student, create_method(method), Net(6, 2)),
        train,
        test,
        TrainConfig(epochs=3, lr=0.01, relations=relations),
        folder,
        checkpoint_seconds=0,
    )
    trainer.task.method.double()
    history = trainer.fit(progress=False)
    return torch.cat([p.detach().flatten() for p in student.parameters()]), history


def in_processes(folder):
    init_distributed("cpu")
    assert world_size() == 2
    found = {
        "gradients": {
            (m, r): gradients(m, r) for m in METHODS for r in ("global", "device") if (m, r) != ("crd+sp", "device")
        },
        "runs": {m: whole_run(folder / m, m) for m in METHODS[:2]},
    }
    try:
        whole_run(folder / "refused", "crd+sp", "device")
    except ValueError as e:
        found["refused"] = str(e)
    torch.save(found, folder / f"{rank()}.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    launch(__file__, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("method", METHODS)
def test_global_gradients_are_those_of_one_process(two, method):
    expected, terms = gradients(method, None)
    for found in two:
        grads, values = found["gradients"][method, "global"]
        torch.testing.assert_close(grads, expected, rtol=1e-6, atol=1e-9)
        assert values == pytest.approx(terms, rel=1e-6)


def test_device_gradients_are_others(two):
    expected = gradients("rcka", None)[0]
    a, b = (found["gradients"]["rcka", "device"][0] for found in two)
    assert torch.equal(a, b)
    assert not torch.allclose(a, expected, rtol=1e-3)


@pytest.mark.parametrize("method", METHODS[:2])
def test_runs_agree(two, tmp_path, method):
    "Three epochs with memory banks, an incomplete last batch and a schedule."
    weights, history = whole_run(tmp_path, method)
    for found in two:
        w, h = found["runs"][method]
        torch.testing.assert_close(w, weights, rtol=1e-5, atol=1e-7)
        for a, b in zip(h, history, strict=True):
            assert a == pytest.approx(b, rel=1e-5)


def test_memory_is_refused_per_device(two):
    assert "use relations='global'" in two[0]["refused"] and "memory" in two[0]["refused"]


EXPERIMENT = [
    "--dataset",
    "digits",
    "--student",
    "resnet8",
    "--method",
    "none",
    "--train_limit",
    "160",
    "--test_limit",
    "150",
    "--batch_size",
    "32",
    "--device",
    "cpu",
    "--quiet",
]


def test_module_entry_stopped_and_resumed(tmp_path):
    "torchrun -m rcka.train in two processes: SIGTERM, then again, ends as the unbroken run does."
    args = ["-m", "rcka.train", *EXPERIMENT, "--epochs", "4", "--checkpoint_seconds", "1e9"]
    launch(*args, "--root", tmp_path / "whole")
    p = launch(*args, "--root", tmp_path / "broken", wait=False)
    deadline = time.time() + 200
    while not list((tmp_path / "broken").glob("*/metrics.csv")) and time.time() < deadline and p.poll() is None:
        time.sleep(0.01)
    p.send_signal(signal.SIGTERM)
    out = p.communicate(timeout=200)[0]
    if p.returncode == 0:
        pytest.skip("it was over before the signal came")
    assert list((tmp_path / "broken").glob("*/checkpoint-*.pt")), out
    launch(*args, "--root", tmp_path / "broken")
    whole, broken = (next((tmp_path / name).iterdir()) for name in ("whole", "broken"))
    for name in ("last.safetensors", "best.safetensors", "metrics.csv"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes()


NOTEBOOK = """
import sys
from accelerate import debug_launcher
from rcka.experiments import Experiment, run
experiment = Experiment("digits", "resnet8", epochs=1, train_limit=160, test_limit=150)
debug_launcher(run, (experiment, sys.argv[1], None, "cpu", False), num_processes=2)
result = run(experiment, sys.argv[1])
print(result.last["epoch"], result.experiment["dataset"])
"""


def test_from_a_notebook(tmp_path):
    "accelerate's launcher for functions, in its form for the CPU."
    p = subprocess.run(
        [sys.executable, "-c", NOTEBOOK, str(tmp_path)], env=ENV, cwd=REPO, capture_output=True, text=True, timeout=300
    )
    assert p.returncode == 0, p.stderr
    assert p.stdout.splitlines()[-1] == "1 digits"


if __name__ == "__main__":
    in_processes(Path(sys.argv[1]))
