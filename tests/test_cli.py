"The command `rcka`, called as a user calls it."

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from rcka.cli import app, main
from rcka.experiments import Experiment
from rcka.sweep import fingerprint, state

sys.path.insert(0, str(Path(__file__).parent))
from sweep_stub import write_stub


@pytest.fixture
def says(capfd, monkeypatch):
    "Call the command: its exit code, what it prints, and what it prints to stderr."

    def call(*args):
        code = 0
        try:
            main([str(a) for a in args])
        except SystemExit as e:
            code = e.code or 0
        return code, *capfd.readouterr()

    return call


@pytest.fixture
def stub(tmp_path, monkeypatch):
    monkeypatch.setenv("STUB_FIELDS", json.dumps(list(Experiment().to_dict())))
    return write_stub(tmp_path / "stub.ipynb")


def test_every_option_has_help(says):
    root = typer.main.get_command(app)
    assert {"methods", "models", "datasets", "run", "sweep", "report", "status"} == set(root.commands)
    for name, command in root.commands.items():
        assert command.help, name
        assert not [p.name for p in command.params if not getattr(p, "help", None)], name
        assert says(name, "--help")[0] == 0


def test_completion():
    "Shell completion gives the commands."
    env = {
        **os.environ,
        "_RCKA_COMPLETE": "complete_bash",
        "COMP_WORDS": "rcka s",
        "COMP_CWORD": "1",
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
    }
    code = "import sys; sys.argv[0] = 'rcka'; from rcka.cli import app; app(prog_name='rcka')"
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout.split() == [
        "sweep",
        "status",
    ]


def test_lists(says):
    assert "reviewkd" in says("methods")[1] and "wrn_40_2" in says("models")[1]
    out = says("datasets")[1]
    assert "cifar100" in out and "how to get it" in out


@pytest.mark.parametrize(
    "args, words",
    [
        (["sweep", "cifar100", "--methods", "rkca"], ["rkca", "rcka"]),
        (["sweep", "cifar100", "--pairs", "resnet110:resnet21"], ["resnet21", "resnet20"]),
        (["sweep", "cifar10", "--pairs", "resnet20"], ["TEACHER:STUDENT"]),
        (["sweep", "digits"], ["digits"]),  # no published pairs
        (["sweep", "cifra10", "--pairs", "resnet20:resnet8"], ["cifra10", "cifar10"]),
        (["sweep", "digits", "--pairs", "resnet20:resnet8", "-p", "epoch=3"], ["epoch", "epochs"]),
        (["sweep", "digits", "--pairs", "resnet20:resnet8", "-p", "seed=3"], ["seed"]),
        (["sweep", "digits", "--pairs", "resnet20:resnet8", "-p", "epochs"], ["NAME=VALUE"]),
        (["sweep", "digits", "--pairs", "resnet20:resnet8", "--seeds", "a"], ["'a'"]),
        (["sweep", "digits", "--pairs", "resnet20:resnet8", "--executor", "slrum"], ["slrum", "slurm"]),
        (
            ["sweep", "digits", "--pairs", "wrn_16_2:vgg8", "--methods", "at"],
            ["nothing was started", "wrn_16_2:vgg8 by at"],
        ),
        (["run", "digits", "-p", "studnet=resnet8"], ["studnet", "student"]),
        (["run", "nowhere.ipynb"], ["nowhere.ipynb"]),
        (["report", "--format", "markdwon"], ["markdwon", "markdown"]),
    ],
)
def test_bad_input(args, words, says, tmp_path):
    "One line with the near names; nothing is started and no file is written."
    code, _, err = says(*args, "--root", tmp_path)
    assert code == 2 and err.startswith("error: ") and all(word in err for word in words), err
    assert not list(tmp_path.iterdir())


def test_sweep_status_report(stub, says, tmp_path):
    "A sweep with a failure, what status says of it, and its report; then the same again with an edited notebook."
    root = tmp_path / "runs"
    sweep = (
        "sweep",
        "digits",
        "--pairs",
        "resnet14:resnet8",
        "--methods",
        "none,kd",
        "--seeds",
        "0,66",
        "-p",
        "epochs=2",
        "-p",
        "train_limit=100",
        "-p",
        "test_limit=100",
        "--root",
        root,
        "--notebook",
        stub,
    )
    code, out, _ = says(*sweep, "--dry-run")
    assert code == 0 and "5 runs" in out and "5 waiting" in out and not root.exists()
    code, out, _ = says(*sweep, "--workers", "3")
    assert code == 1 and "3 of 5 runs are done; 2 failed" in out and "bad luck" in out and "left)" in out
    code, out, _ = says("status", "--root", root)
    assert code == 0 and "3 done" in out and "2 failed" in out and "raise ValueError" not in out
    assert "raise ValueError" in says("status", "--root", root, "--traceback")[1]
    write_stub(stub, more="1")
    assert "another version of the notebook" in says(*sweep, "--no-retry")[1]

    assert "2 runs are missing" in says("report", "--root", root)[1]
    assert "| resnet14 | resnet8 | kd | 1 | 50.00 |" in says("report", "--root", root, "--format", "markdown")[1]
    assert r"\toprule" in says("report", "--root", root, "--format", "latex")[1]
    code, out, _ = says("report", "--root", root, "--format", "csv", "--figures", tmp_path / "figures")
    assert out.startswith("dataset,teacher,student") and {p.name for p in (tmp_path / "figures").iterdir()} == {
        "digits_scores.png",
        "digits_cost.png",
    }


def test_run(stub, says, tmp_path):
    "One papermill run: the executed notebook lies in the folder of its experiment, or where it was asked for."
    root = tmp_path / "runs"
    e = Experiment("digits", "resnet8", epochs=2)
    code, out, err = says(
        "run", stub, "-p", "student=resnet8", "-p", "lr=0.05", "-p", "method_args={}", "-p", "epochs=2", "--root", root
    )
    assert code == 0 and str(root / e.key / "notebook.ipynb") in out, err
    assert state(root / e.key) == "done" and fingerprint(root / e.key / "notebook.ipynb") == fingerprint(stub)


def test_nothing_there(says, tmp_path):
    assert "no runs" in says("status", "--root", tmp_path)[1] and "0 results" in says("report", "--root", tmp_path)[1]
