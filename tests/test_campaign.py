"""A campaign at toy size on the CPU: killed, stopped by its clock, with an item that fails; and none of what notebooks
need."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rcka.experiments import campaign
from rcka.experiments.campaign import ITEMS, Campaign, check_step, full_size, main, run_campaign, time_ways, toy_size
from rcka.experiments.result import Result
from rcka.models.registry import create_model, load_checkpoint

CPU = torch.device("cpu")
WITHOUT = ("papermill", "nbdev", "fastcore", "nbformat", "nbclient", "IPython", "rich", "pyarrow", "transformers")
START = f"""
import sys
for name in {WITHOUT}:
    sys.modules[name] = None  # importing it is an error
from rcka.experiments.campaign import main
sys.exit(main(sys.argv[1:]))
"""


def begin(folder, *more):
    "A process of its own, where what notebooks need cannot be imported."
    args = ("--out", folder, "--size", "toy", "--device", "cpu", *more)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", START, *map(str, args)], env=env, stderr=subprocess.PIPE, text=True)


def files(folder):
    return {p.relative_to(folder) for p in Path(folder).rglob("*") if p.is_file() and "runs" not in p.parts}


@pytest.mark.slow
def test_killed_in_each_half_and_gone_on_with(tmp_path):
    "SIGKILL while the checks run and while students are trained; what was written is whole, kept, and not done again."
    first = begin(tmp_path)
    wait_for(first, lambda: len(read(tmp_path, "checks")) > 1)
    first.kill()
    first.communicate()
    checks = read(tmp_path, "checks")[:2]
    second = begin(tmp_path)
    wait_for(second, lambda: read(tmp_path, "study/toy"))
    second.kill()
    second.communicate()
    assert read(tmp_path, "checks")[:2] == checks  # the same rows, with the same seconds
    speed, study = read(tmp_path, "speed"), read(tmp_path, "study/toy")
    state = json.loads((tmp_path / "campaign.json").read_text())["items"]
    assert state["tests"]["state"] == state["speed"]["state"] == "done" and state["study"]["state"] == "running"
    third = begin(tmp_path)
    _, errors = third.communicate()
    assert third.returncode == 0, errors
    state = json.loads((tmp_path / "campaign.json").read_text())
    assert [(name, item["state"], item["error"]) for name, item in state["items"].items()] == [
        (name, "done", "") for name in ITEMS
    ]
    assert read(tmp_path, "speed") == speed and read(tmp_path, "study/toy")[: len(study)] == study
    assert all(row["passed"] == "yes" for row in read(tmp_path, "checks"))
    assert len({row["check"] for row in read(tmp_path, "checks")}) == len(read(tmp_path, "checks")) == 3 + 2 + 5
    assert {row["label"] for row in read(tmp_path, "study/toy")} == {"none", "kd", "fcka"}
    assert [row["label"] for row in read(tmp_path, "students")] == ["none", "kd", "rcka"]
    assert (
        all(float(row["ms"]) > 0 and not row["failed"] for row in speed) and len({r["comparison"] for r in speed}) == 6
    )
    (teacher,) = read(tmp_path, "teachers")
    weights = load_checkpoint(create_model("resnet14", 10, 1), tmp_path / "teachers" / "resnet14.safetensors")
    result = Result.load(tmp_path / "runs" / teacher["key"] / "result.json")
    assert float(teacher["last"]) == pytest.approx(result.last["top1"], abs=1e-3) and weights is not None
    taught = [
        r for r in map(Result.load, (tmp_path / "runs").glob("*/result.json")) if r.experiment["method"] == "rcka"
    ]
    assert taught[0].teacher["top1"] == result.last["top1"]  # by the very run of the item before
    assert "pytest" in (tmp_path / "tests.log").read_text()
    assert not list(tmp_path.glob(".*.tmp"))


def wait_for(process, ready, seconds=600):
    began = time.monotonic()
    while not ready():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() - began < seconds, "the campaign did not come so far"
        time.sleep(0.05)


def read(folder, table):
    return Campaign(folder, toy_size(), CPU, "toy").rows(table)


def test_stopped_by_its_clock_in_the_middle_of_a_run(tmp_path, monkeypatch):
    "The run saves its state after a step, and the next call goes on from there to the bits of an unbroken one."
    whole = Campaign(tmp_path / "whole", toy_size(), CPU, "toy")
    assert run_campaign(whole, ["teachers"]) == {"teachers": "done"}
    cut = Campaign(tmp_path / "cut", toy_size(), CPU, "toy")
    steps = []

    def after_step(self, learner):
        steps.append(learner.step)
        if len(steps) == 6:
            learner.stop("the campaign's time is over")

    with monkeypatch.context() as patch:
        patch.setattr(campaign.Deadline, "after_step", after_step)
        assert run_campaign(cut, ["teachers", "students"]) == {"teachers": "stopped"}
    assert not cut.rows("teachers") and len(steps) == 6
    again = Campaign(tmp_path / "cut", toy_size(), CPU, "toy")
    assert run_campaign(again, ["teachers"]) == {"teachers": "done"}
    name = Path("teachers", "resnet14.safetensors")
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert campaign.Deadline(time.monotonic() + 1e6).state_dict() == {}


def test_the_deadline_stops_a_learner():
    class Learner:
        asked = ""

        def stop(self, reason):
            self.asked = reason

    early, late = Learner(), Learner()
    campaign.Deadline(time.monotonic() + 1000).after_step(early)
    campaign.Deadline(time.monotonic() - 1).after_step(late)
    assert not early.asked and "time is over" in late.asked


def test_no_time_is_said_and_changes_nothing(tmp_path, capsys):
    args = ["--out", str(tmp_path), "--size", "toy", "--device", "cpu", "--minutes", "0"]
    assert main(args) == 0
    assert capsys.readouterr().out.split() == "tests stopped the campaign's time is over".split()
    assert files(tmp_path) == {Path("campaign.json")}
    assert main([*args[:-2], "--items", "speeed"]) == 1
    assert "did you mean speed" in capsys.readouterr().err
    assert main(["--out", str(tmp_path), "--device", "cpu", "--minutes", "0"]) == 1
    assert "holds a campaign of size 'toy', not 'full'" in capsys.readouterr().err


def test_an_item_that_fails_is_noted_and_the_rest_goes_on(tmp_path, monkeypatch):
    def broken(c):
        with c.attempt("the first half"):
            raise ValueError("no card")
        with c.attempt("the second half"):
            c.put("half", [{"a": 1}], ("a",))

    def worse(c):
        raise RuntimeError("CUDA error")

    fine = lambda c: c.put("fine", [{"a": 1}], ("a",))
    monkeypatch.setattr(campaign, "ITEMS", {"speed": broken, "study": worse, "students": fine})
    c = Campaign(tmp_path, toy_size(), CPU, "toy")
    assert run_campaign(c, ["speed", "study", "students"]) == {"speed": "failed", "study": "failed", "students": "done"}
    assert c.state["items"]["speed"]["error"] == "the first half: ValueError: no card" and c.rows("half")
    assert c.state["items"]["study"]["error"] == "RuntimeError: CUDA error"
    monkeypatch.setattr(campaign, "ITEMS", dict.fromkeys(("speed", "study", "students"), fine))
    again = Campaign(tmp_path, toy_size(), CPU, "toy")  # what failed is tried again
    assert set(run_campaign(again, ["speed", "study", "students"]).values()) == {"done"}
    assert again.state["items"]["speed"]["error"] == ""


def test_a_signal_leaves_the_state(tmp_path, monkeypatch):
    monkeypatch.setattr(campaign, "ITEMS", {"speed": lambda c: signal.raise_signal(signal.SIGINT)})
    c = Campaign(tmp_path, toy_size(), CPU, "toy")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            run_campaign(c, ["speed"])
    finally:
        signal.signal(signal.SIGINT, before)
    assert json.loads((tmp_path / "campaign.json").read_text())["items"]["speed"]["state"] == "stopped"


def test_a_way_that_fails_is_dropped(tmp_path):
    c = Campaign(tmp_path, toy_size(), CPU, "toy")

    def fails():
        raise RuntimeError("no kernel")

    time_ways(c, "sums", {"usual": lambda: sum(range(100)), "broken": fails, "other": lambda: sum(range(100))})
    rows = {row["way"]: row for row in c.rows("speed")}
    assert rows["broken"]["failed"] == "RuntimeError: no kernel" and not rows["broken"]["ms"]
    assert float(rows["usual"]["times as fast"]) == 1 and float(rows["other"]["ms"]) > 0
    assert c.errors == ["sums, broken: RuntimeError: no kernel"]


def test_a_check_can_fail(monkeypatch):
    "A loss that depends on the device, and a gradient that is not there."
    losses = iter([(1.0, {}), (1.5, {}), (1.0, {})])
    with monkeypatch.context() as patch:
        patch.setattr(campaign, "step_of", lambda *args, **kw: next(losses))
        with pytest.raises(AssertionError, match="the loss is 1.5 on cpu and 1 on the CPU"):
            check_step("kd", CPU)
    with monkeypatch.context() as patch:
        patch.setattr(campaign.Distiller, "__call__", lambda self, batch: _no_gradient(self))
        with pytest.raises(AssertionError, match="the gradient of .* is missing"):
            campaign.step_of("kd", CPU)


def _no_gradient(task):
    from rcka.train.classification import Step

    return Step({"ce": task.student.fc.weight.sum()})


def test_the_teachers_are_the_runs_that_students_ask_for():
    plan = full_size()
    for teacher, student in plan.pairs:
        for method in plan.methods:
            for seed in plan.seeds:
                asked = plan.experiment(teacher, student, method, seed).teacher_experiment
                assert asked.key == plan.teachers()[teacher].key and asked.epochs == 240
    assert list(plan.teachers()) == ["resnet32x4", "wrn_40_2", "resnet56", "resnet110", "vgg13", "resnet50"]
    assert set(plan.first) <= set(plan.study.methods)
