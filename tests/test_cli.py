"The command `rcka`, called as a user calls it."

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import typer

from rcka.cli import app, main
from rcka.experiments.experiment import Experiment
from rcka.experiments.launch import KINDS, field_comments, kind_of, make_parser
from rcka.experiments.sweep import fingerprint, state
from rcka.models.registry import create_model, save_weights

sys.path.insert(0, str(Path(__file__).parent))
from sweep_stub import write_stub

BENCHMARKS = Path(__file__).resolve().parents[1] / "nbs" / "benchmarks"


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
    known = {"methods", "models", "datasets", "train", "distill", "save-teacher", "export", "run", "sweep", "report"}
    assert known | {"status"} == set(root.commands)
    for name, command in root.commands.items():
        assert command.help, name
        assert not [p.name for p in command.params if not getattr(p, "help", None)], name
        assert says(name, "--help")[0] == 0


@pytest.mark.parametrize(
    "words, expected",
    [
        ("rcka s", {"save-teacher", "sweep", "status"}),
        ("rcka save-teacher --te", {"--teacher", "--teacher-weights", "--teacher-options"}),
        ("rcka train --dataset digits --lr_", {"--lr_steps", "--lr_decay"}),
        ("rcka train --kind detection --det", {"--detector", "--deterministic"}),
        ("rcka train --student resnet11", {"resnet110"}),
        ("rcka train --method dens", {"dense_kd", "dense_dist"}),
    ],
)
@pytest.mark.slow
def test_completion(words, expected):
    "Shell completion gives commands, options, and names for the options of `rcka train`."
    env = {
        **os.environ,
        "_RCKA_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
    }
    code = "import sys; sys.argv[0] = 'rcka'; from rcka.cli import app; app(prog_name='rcka')"
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout
    assert set(out.split()) == expected


def test_train(says, tmp_path):
    "The command of rcka.train: a run, its options, its exit codes."
    code, out, _ = says("train", "--help")
    assert code == 0 and "rcka train" in out and "--lr_decay" in out and "--checkpoint_seconds" in out
    small = ("--dataset", "digits", "--epochs", 1, "--train_limit", 60, "--test_limit", 50, "--root", tmp_path)
    code, out, err = says("train", *small, "--quiet")
    assert code == 0 and json.loads(out)["key"].startswith("digits-resnet8-none-s0-"), err
    assert state(tmp_path / json.loads(out)["key"]) == "done"
    code, _, err = says("train", *small, "--student", "resnet9")
    assert code == 1 and err.startswith("error: ") and "resnet8" in err
    assert says("train", "--epoch", 1)[0] == 2  # no such option


@pytest.mark.slow
def test_distill_and_export(says, tmp_path):
    "A student of digits by a recipe, its scores, and its export in a command of its own; bad input with near names."
    given = ("distill", "--data", "digits", "--teacher", "resnet14", "--student", "resnet8", "--output", tmp_path)
    args = ("--precision", "fp32", "--method-args", '{"fcka.weight": 8}')
    code, out, err = says(*given, "--epochs", 1, "--preset", "crd", "-p", "mixup=0.2", "--device", "cpu", *args)
    assert code == 0 and "student: top-1, %: " in out and (tmp_path / "README.md").is_file(), err
    assert ", fp32\n" in out and "| `kd+fcka`: `fcka.weight` | 8" in (tmp_path / "README.md").read_text()
    code, out, err = says("export", tmp_path, "--to", "torch")
    assert code == 0 and "same classes on 64 images" in out and (tmp_path / "student.pt2").is_file(), err
    assert "student.pt2" in (tmp_path / "README.md").read_text()
    for wrong, near in (
        (("-p", "mixupp=1"), "mixup"),
        (("--preset", "deti"), "deit"),
        (("--export", "onx"), "onnx"),
        (("--precision", "fp8"), "bf16"),
        (("--method-args", "weight=3"), "--method-args must be a JSON object"),
        (("--method-args", '{"fcka.wieght": 3}'), "did you mean weight"),
        (("--student-options", '{"depth": 3}'), "no option depth"),
        (("--device", "gpu"), "give cpu"),
        (("--log", "tensorbord"), "did you mean tensorboard"),
        (("-p", "epochs=3"), "give --epochs 3"),
    ):
        code, _, err = says(*given[:-1], tmp_path / "other", *wrong)
        assert code == 2 and near in err, err
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_save_teacher(says, tmp_path):
    "A teacher's outputs in a file, with the features of the methods that were asked for; then a student of the file."
    weights, file = tmp_path / "weights.safetensors", tmp_path / "teacher.safetensors"
    save_weights(create_model("resnet14", 10, 1), weights)
    given = ("save-teacher", file, "--data", "digits", "--teacher", "resnet14", "--teacher-weights", weights)
    code, out, err = says(*given, "--augmentations", 2, "--method", "rcka+at", "--device", "cpu")
    assert code == 0 and "2 augmentations of" in out and "features: layer3, layer1, layer2; top-1" in out, err
    assert {p.name for p in tmp_path.iterdir()} == {weights.name, file.name}
    student = ("distill", "--data", "digits", "--teacher", file, "--student", "resnet8", "--epochs", 1)
    code, out, err = says(*student, "--output", tmp_path / "student", "--method", "at+kd", "--device", "cpu")
    assert code == 0 and "teacher: top-1, %: " in out, err
    code, _, err = says(*student, "--output", tmp_path / "other", "--method", "reviewkd", "--device", "cpu")
    assert code == 2 and "no features at" in err


@pytest.mark.parametrize(
    "args, words",
    [
        (["t.safetensors", "--teacher", "resnet8"], ["no weights to run with", "teacher_weights='pretrained'"]),
        (["t.safetensors", "--teacher", "x.safetensors"], ["no weights to run with"]),
        (["t.pth", "--teacher", "resnet8"], ["must end in .safetensors", "t.pth"]),
        (["t.safetensors", "--teacher", "resnet8", "--method", "kdd"], ["kdd", "kd"]),
        (["t.safetensors", "--teacher", "resnet8", "--precision", "bf17"], ["precision", "bf16"]),
        (["t.safetensors", "--teacher", "resnet8", "--teacher-options", "{"], ["--teacher-options must be"]),
        (["t.safetensors", "--teacher", "resnet9", "--teacher-weights", "w.pth"], ["resnet9", "resnet8"]),
        (["t.safetensors", "--teacher", "resnet8", "--teacher-weights", "w.pth"], ["w.pth"]),
        (["t.safetensors", "--teacher", "resnet8", "--data", "digitss"], ["digitss", "digits"]),
    ],
)
def test_bad_input_to_save_teacher(args, words, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = says("save-teacher", *args[:1], *(() if "--data" in args else ("--data", "digits")), *args[1:])
    assert code == 2 and not out and "Traceback" not in err and all(word in err for word in words), err
    assert not list(tmp_path.iterdir())


def test_a_logger_of_distill(says, tmp_path, monkeypatch):
    "Each network that is trained has one; a package that is missing is named before anything is trained."
    from rcka import loggers

    class Kept(loggers.Logger):
        rows = []

        def __init__(self, folder):
            self.folder = folder

        def log(self, values, epoch):
            self.rows.append((self.folder, set(values)))

    small = ("--data", "digits", "--teacher", "resnet8", "--student", "resnet8", "--epochs", 1, "--device", "cpu")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tensorboard", None)
        code, _, err = says("distill", *small, "--output", tmp_path / "a", "--log", "tensorboard")
        assert code == 2 and "rcka[tensorboard]" in err and not list(tmp_path.rglob("metrics.csv"))
    monkeypatch.setattr(loggers, "TensorBoard", Kept)
    code, _, err = says("distill", *small, "--output", tmp_path / "b", "--log", "tensorboard")
    assert code == 0, err
    assert [folder for folder, _ in Kept.rows] == [
        tmp_path / "b" / who / "tensorboard" for who in ("teacher", "student")
    ]
    assert {"ce", "kd", "fcka", "top1"} <= Kept.rows[1][1]


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
        (["run", "digitss"], ["digitss", "did you mean digits"]),
        (["run", "digits", "-p", "epochs=abc"], ["epochs must be a whole number", "'abc'"]),
        (["run", "digits", "-p", "epochs=2.5"], ["epochs must be a whole number", "2.5"]),
        (["run", "digits", "-p", "lr=high"], ["lr must be a number or null", "'high'"]),
        (["run", "digits", "-p", "lr_steps=3"], ["lr_steps must be a list", "3"]),
        (["run", "digits", "-p", "method_args=4"], ["method_args must be a dict", "4"]),
        (["run", "digits", "-p", "deterministic=1"], ["deterministic must be true or false", "1"]),
        (["run", "digits", "-p", "epochs=0"], ["epochs", "0"]),
        (["run", "digits", "-p", "lr_steps=['a']"], ["lr_steps takes numbers", "'a'"]),
        (["run", "digits", "-p", "momentum=-1"], ["momentum", "-1"]),
        (["run", "digits", "-p", "method_args={'alpha': 'x'}"], ["alpha of method 'rcka' must be a number", "'x'"]),
        (["run", "digits", "-p", "method=none", "-p", "teacher=resnett14"], ["resnett14", "trains the student alone"]),
        (["run", "digits", "-p", "batch_size=-1"], ["batch_size", "-1"]),
        (["run", "digits", "-p", "train_limit=-5"], ["-5"]),
        (["run", "digits", "-p", "student=resnet21"], ["resnet21", "resnet20"]),
        (["run", "digits", "-p", "teacher=None"], ["needs a teacher"]),
        (["run", "digits", "-p", "method=rcak"], ["rcak", "rcka"]),
        (["run", "digits", "-p", "teacher_weights=nowhere.pth"], ["nowhere.pth"]),
        (["run", "imagefolder:nowhere"], ["nowhere"]),
        (["run", "digits", "-p", "student=torchvision/vit_b_16", "-p", "method=none"], ["vit_b_16", "224"]),
        (["run", "digits", "--output", "."], ["--output", "folder"]),
        (["run", BENCHMARKS / "digits.ipynb", "-p", "epochs=abc"], ["epochs must be a number", "'abc'"]),
        (["run", BENCHMARKS / "coco.ipynb", "-p", "batch_size=abc"], ["batch_size must be a number", "'abc'"]),
        (["sweep", "imagefolder:mine"], ["imagefolder:mine", "--pairs TEACHER:STUDENT"]),
        (["sweep", "cifra100"], ["cifra100", "did you mean cifar100"]),
        (["sweep", "digits", "--pairs", "resnet20:resnet8", "-p", "epochs=abc"], ["epochs must be a whole number"]),
        (
            ["sweep", "digits", "--pairs", "resnet20:resnet8", "--notebook", "no.ipynb"],
            ["there is no notebook no.ipynb"],
        ),
        (["sweep", "digits", "--pairs", "resnet14:torchvision/vit_b_16", "--methods", "kd"], ["vit_b_16", "224"]),
        (["report", "--format", "markdwon"], ["markdwon", "markdown"]),
    ],
)
def test_bad_input(args, words, says, tmp_path):
    "One line with the near names; nothing is started and no file is written."
    code, _, err = says(*args, "--root", tmp_path)
    assert code == 2 and err.startswith("error: ") and all(word in err for word in words), err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "args, words",
    [
        (["--dataset", "digitss"], ["did you mean digits"]),
        (["--student", "resnet9"], ["did you mean resnet8"]),
        (["--student", "torchvision/vit_b_16"], ["vit_b_16 cannot take images of 1 x 8 x 8", "224"]),
        (["--teacher", "torchvision/vit_b_16", "--method", "kd"], ["vit_b_16 cannot take images of 1 x 8 x 8"]),
        (["--epochs", "abc"], ["epochs must be a whole number, got 'abc'"]),
        (["--lr_steps", "[true, 'a']"], ["lr_steps must be a list", "true, 'a'"]),
        (["--lr_steps", '["a"]'], ["lr_steps takes numbers", "'a'"]),
        (["--optimizer", "adamw", "--betas", '["a", 1]'], ["betas", "'a'"]),
        (["--weight_decay", "-1"], ["weight_decay", "-1"]),
        (
            ["--teacher", "resnet14", "--method", "rcka", "--method_args", '{"alpha": "x"}'],
            ["must be a number, got 'x'"],
        ),
        (["--teacher", "resnett14"], ["resnett14", "trains the student alone"]),
        (["--dataset", "imagefolder:nowhere"], ["nowhere"]),
        (["--device", "cud"], ["--device", "'cud'"]),
        (["nowhere.json"], ["nowhere.json"]),
    ],
)
def test_bad_input_to_train(args, words, says, tmp_path):
    "The same for the command without a notebook; a run that cannot begin leaves no folder."
    code, out, err = says("train", *args, "--root", tmp_path, "--quiet")
    assert code in (1, 2) and not out and "Traceback" not in err and all(word in err for word in words), err
    assert not list(tmp_path.iterdir())


def test_options_of_train_say_what_they_are():
    "Each field of each kind of experiment has a comment in the source, which is its help."
    for kind in KINDS:
        comments = field_comments(kind_of(["--kind", kind]))
        silent = [f.name for f in fields(kind_of(["--kind", kind])) if not comments.get(f.name)]
        assert not silent, f"{kind}: a comment beside {silent} in the notebook becomes the help of the option"
        text = " ".join(make_parser(kind_of(["--kind", kind]), "rcka train").format_help().split())
        assert "--weight_decay VALUE of the weights (float, default" in text


@pytest.mark.slow
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
    assert "student resnet8, method none: top-1 50.00 %" in out and str(root / e.key / "last.safetensors") in out


def test_run_says_what_came_of_the_teacher(stub, says, tmp_path):
    "Teacher and student with their accuracy and weights; weights that were given are named."
    given, root = tmp_path / "teacher.safetensors", tmp_path / "runs"
    arguments = Experiment("digits", "resnet8", "resnet14", "kd").method_args  # all of them, as the stand-in compares
    save_weights(create_model("resnet14", 10, 1), given)
    values = [
        "student=resnet8",
        "teacher=resnet14",
        "method=kd",
        f"method_args={arguments}",
        "lr=0.05",
        "teacher_lr=0.05",
        "epochs=1",
    ]
    params = [f"--param={value}" for value in (*values, f"teacher_weights={given}")]
    code, out, err = says("run", stub, *params, "--root", root)
    assert code == 0 and f"teacher resnet14: top-1 50.00 %; weights: {given}" in out, err
    assert "student resnet8, method kd: top-1 50.00 %" in out
    assert "found" not in err
    code, out, err = says("run", stub, *params, "--root", root)
    assert code == 0 and re.search(r"found digits-resnet14-resnet8-kd-s0-\w+, finished on 20", err), err


def test_run_that_fails(stub, says, tmp_path):
    "One line and where the page is; `rcka status` has the rest."
    root = tmp_path / "runs"
    code, out, err = says("run", stub, "-p", "seed=66", "-p", "epochs=1", "--root", root)
    # a kernel that is interrupted as it shuts down may log a line before
    assert code == 1 and "error: ValueError: this seed brings bad luck" in err.splitlines() and "Traceback" not in err
    assert (
        str(next(root.glob("*/notebook.ipynb"))) in err
        and "raise ValueError" in says("status", "--root", root, "--traceback")[1]
    )


def test_run_counts_epochs(tmp_path):
    "Those of the teacher that is trained first are counted too, and no run counts for more than it has."
    from rcka.cli import _epochs

    counts = {tmp_path / "teacher": 2, tmp_path / "student": 3}
    for folder, rows in zip(counts, (4, 1)):
        folder.mkdir()
        (folder / "metrics.csv").write_text("epoch\n" + "1\n" * rows)
    with _epochs(counts) as bar:
        pass
    assert (bar.n, bar.total) == (3, 5)


@pytest.mark.parametrize("command", ["report", "status"])
def test_a_folder_of_runs_that_is_not_there(command, says, tmp_path):
    code, out, err = says(command, "--root", tmp_path / "nope")
    assert (code, out) == (2, "") and err.startswith(f"error: there is no folder {tmp_path / 'nope'}")


def test_a_folder_that_cannot_be_made(says, tmp_path):
    "What the system refuses is one line, too."
    (tmp_path / "file").write_text("")
    small = ("-p", "epochs=1", "-p", "train_limit=50", "-p", "test_limit=50", "-p", "method=none")
    code, _, err = says("run", "digits", *small, "--root", tmp_path / "file")
    assert code == 2 and err.startswith("error: ") and str(tmp_path / "file") in err


def test_nothing_there(says, tmp_path):
    assert "no runs" in says("status", "--root", tmp_path)[1] and "0 results" in says("report", "--root", tmp_path)[1]


def test_methods_and_networks_of_others(says, tmp_path, monkeypatch):
    "--import sees what a module of the working directory registers; a module that is not there is an error."
    from rcka.data.datasets import DATASETS
    from rcka.methods.base import METHODS
    from rcka.models.registry import NETWORKS

    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_extension.py").write_text("""
from rcka.data import dataset
from rcka.methods import Method, register
from rcka.models import network
@register("my_method")
class Mine(Method):
    "A method of a user."
@network
def my_network(num_classes, in_channels): ...
@dataset(classes=2, shape=(1, 8, 8))
def my_data():
    from rcka.data.datasets import load_dataset
    return load_dataset("digits")  # has ten classes
""")
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("RCKA_IMPORT", "PYTHONPATH"):  # both are set for the processes of the command
        monkeypatch.setenv(name, os.environ.get(name, ""))
    try:
        code, out, _ = says("--import", "my_extension", "methods")
        assert code == 0 and "my_method" in out and "my_network" in NETWORKS
        assert "my_network" in says("models")[1] and "my_data" in says("datasets")[1]
        code, _, err = says("distill", "--data", "my_data", "--teacher", "resnet8", "--student", "resnet8")
        assert code == 2 and "registered with 2 classes of images (1, 8, 8), but its function returned 10" in err
        code = "import rcka; print(rcka.create_method('my_method').name)"  # what a notebook of the command sees
        done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True)
        assert done.stdout == "my_method\n", done.stderr
        code, _, err = says("--import", "my_extensio", "methods")
        assert code == 2 and "my_extensio" in err
    finally:
        METHODS.pop("my_method", None), NETWORKS.pop("my_network", None), DATASETS.pop("my_data", None)


@pytest.mark.slow
def test_an_entry_point(tmp_path):
    "What an installed package registers is there without being imported by name."
    (tmp_path / "my_package.py").write_text("""
from rcka.models import network
@network
def my_network(num_classes, in_channels):
    "A network of a package."
    import torch
    return torch.nn.Linear(3, num_classes)
""")
    info = tmp_path / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[rcka]\nmine = my_package\n")
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).resolve().parents[1])])
    env = {k: v for k, v in os.environ.items() if k != "RCKA_IMPORT"} | {"PYTHONPATH": path}
    for code in (
        "import rcka; print(rcka.create_model('my_network', 5))",
        "from rcka.cli import main; main(['models'])",
    ):
        done = subprocess.run([sys.executable, "-c", code], cwd="/", env=env, capture_output=True, text=True)
        assert "Linear" in done.stdout or "my_network" in done.stdout, done.stderr
