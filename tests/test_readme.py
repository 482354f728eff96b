"README.md and CHANGELOG.md say what is true: code runs, commands parse, names and files exist."

import importlib
import os
import re
import shlex
from pathlib import Path

import pytest
import torch

root = Path(__file__).parent.parent
README = (root / "README.md").read_text(encoding="utf-8")
LOOP, TRAINER = re.findall(r"```python\n(.*?)```", README, re.S)
SHELL = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()]
NAMES_TABLE = re.compile(r"^\| `([\w.]+)` \| `([\w.]+)` \| (.*) \|$", re.M)  # | old module | new module | names |


def test_it_is_short():
    "What is longer belongs to the pages."
    assert len(README.splitlines()) <= 120


def test_the_loop_trains_the_student_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {"loader": [(torch.randn(4, 3, 64, 64), torch.arange(4)) for _ in range(2)]}
    exec(LOOP.replace('weights="IMAGENET1K_V1"', "weights=None"), names)  # the weights need a download
    assert set(names["terms"]) == set(re.findall(r'"(\w+)": \.\.\.', LOOP))
    assert all(p.grad is not None and bool(p.isfinite().all()) for p in names["student"].parameters())
    assert all(p.grad is None for p in names["teacher"].parameters())


def test_the_trainer_leaves_what_the_pages_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(TRAINER.replace("epochs=10", "epochs=1"), names)
    (row,) = names["history"]
    assert {"ce", "kd", "fcka", "top1"} <= set(row)
    for run in ("teacher", "student"):
        files = {p.name for p in (tmp_path / "runs" / run).iterdir()}
        assert {"metrics.csv", "last.safetensors", "best.safetensors"} <= files


@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith("rcka ")])
def test_commands_parse(line):
    typer = pytest.importorskip("typer", reason="pip install 'rcka[notebook]'")
    from rcka.cli import app
    from rcka.experiments.experiment import Experiment
    from rcka.methods.base import create_method

    _, name, *args = shlex.split(line)
    command = typer.main.get_command(app).commands[name]
    given = command.make_context(name, list(args)).params  # an unknown option or a missing argument is an error
    fields = dict(text.split("=", 1) for text in given.get("param") or [])
    if name == "run":
        Experiment(dataset=args[0], **fields)
    for method in (given.get("methods") or "none").split(","):
        create_method(method)


def test_make_has_the_targets():
    targets = re.findall(r"^([\w-]+):", (root / "Makefile").read_text(encoding="utf-8"), re.M)
    named = re.findall(r"^make ([\w-]+)", "\n".join(SHELL), re.M)
    assert named and set(named) <= set(targets)


def test_lanes_see_nothing_but_the_repository():
    "Every call of pytest in the Makefile clears the folders of data and runs and leaves out the tests of real images."
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    alone = re.search(r"^ALONE := (.*)$", makefile, re.M)[1]
    assert "-u RCKA_DATA" in alone and "-u RCKA_RUNS" in alone
    calls = re.findall(r"^\t.*\b(?:pytest|nbdev_test) .*$", makefile, re.M)
    assert len(calls) >= 4 and all("$(ALONE)" in call for call in calls)
    assert all("not real_data" in call for call in calls if "pytest" in call)
    ci = (root / ".ci" / "run").read_text(encoding="utf-8")
    clone, real = ci.index("git clone"), ci.index("pytest -q -n 2 -m real_data")
    assert clone < ci.index("env -u RCKA_DATA -u RCKA_RUNS make lint test") < ci.index("export RCKA_DATA") < real


def test_tests_look_at_nothing_of_the_shell():
    assert not {"RCKA_DATA", "RCKA_RUNS"} & set(os.environ)


def test_every_benchmark_is_in_the_table():
    "Those with a data set of their own; the others are studies on these data."
    listed = set(re.findall(r"nbs/benchmarks/(\w+)\.ipynb", README))
    from rcka.data.datasets import KNOWN

    assert listed >= {*KNOWN, "imagenet", "coco", "cityscapes"}


def test_the_changelog_names_what_there_is():
    """The table of old and new names: each new name exists in its module. Where this fails, a name has moved on: say
    where."""
    rows = NAMES_TABLE.findall((root / "CHANGELOG.md").read_text(encoding="utf-8"))
    assert len(rows) > 40
    for _, new, names in rows:
        try:
            module = importlib.import_module(f"rcka.{new}" if new != "rcka" else new)
        except ImportError as error:
            if "pip install" not in str(error):  # an extra that is not installed here
                raise
            continue
        for name in re.findall(r"(?:`\w+` → )?`(\w+)`", names):
            assert hasattr(module, name), f"CHANGELOG.md: {module.__name__} has no {name}"


def test_the_changelog_knows_every_public_module():
    "A module of the old tree appears in the table; so does each name that the top of the package had."
    text = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    old = {row[0] for row in NAMES_TABLE.findall(text)}
    assert {"losses", "baselines", "taps", "data", "trainer", "experiments", "sweep", "report", "similarity"} <= old
