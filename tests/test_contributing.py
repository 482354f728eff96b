"""CONTRIBUTING.md is followed to the letter: the code of each section runs in a fresh process in an empty folder.

Words and diagrams that say what stands elsewhere are compared with it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from layers import LAYERS

root = Path(__file__).parent.parent
TEXT = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^##+ (.+?)\n(.*?)(?=^##+ |\Z)", TEXT, re.M | re.S))
# What must hold after the code of a section
CHECKS = {
    "Add a method": """
from rcka.methods.base import list_methods
assert "cosine_relations" in list_methods()
row, = trainer.history
assert row["relations"] > 0 and abs(row["ce"] + row["relations"] - row["loss"]) < 1e-4 * row["loss"]
assert len(trainer.train) == 1 and trainer.optimizer.param_groups[0]["params"][0].grad is None
assert distiller.method.weight == 5 and set(create_method("kd+cosine_relations").wants(student.layers)) == {"fc:input"}
""",
    "Add a network": """
from rcka.models.registry import list_models
assert "small" in list_models()
assert outputs.logits.shape == (4, 10)
assert [tuple(f.shape) for f in outputs.features] == [(4, 16, 8, 8), (4, 32, 4, 4)]
Distiller(model, create_method("fcka"), create_model("small", 10, 1))  # by its FeaturePaths
from rcka.core import Batch
terms = distiller(Batch(torch.randn(4, 3, 32, 32), torch.arange(4), torch.arange(4))).terms
assert set(terms) == {"ce", "kd", "fcka"} and terms["fcka"].requires_grad
at = Distiller(student, create_method("at"), teacher, **paths)
try:
    at(Batch(torch.randn(4, 3, 32, 32), torch.arange(4), torch.arange(4)))
except ValueError as error:
    assert "feature maps" in str(error)
else:
    raise AssertionError("tokens were taken for a map")
""",
    "Add a data set": """
shades = load_dataset("imagefolder:shades")
assert shades.classes == ("dark", "light") and len(shades.train_images) == len(shades.test_images) == 32
assert 0 <= trainer.history[0]["top1"] <= 100 and len(data.train_images) == 64
assert 0 <= plain.history[0]["top1"] <= 100 and len(plain.train) == 2
""",
    "Add a task": """
assert trainer.history[0]["mse"] > 0 and trainer.best["agreement"] == max(r["agreement"] for r in trainer.history)
documented = {"student", "teacher", "method", "prepare", "evaluate", "score"}
assert documented <= set(dir(trainer.task)) and documented <= set(dir(rcka.Distiller(student)))
""",
    "Add a callback": """
assert [(e, s) for e, s, _ in curve.points] == [(0, 2), (0, 4), (1, 2), (1, 4)]
""",
    "Figures and their records": """
from rcka.experiments.exhibits import out_of_date
record = read_manifests("figures")["curve"]
assert record["parameters"] == {"epochs": 2} and record["files"] == ["curve.csv"]
assert record["methods"][0]["arguments"]["weight"] == 4 and not out_of_date(record)
""",
}


def blocks(section, language):
    return re.findall(rf"```{language}\n(.*?)```", SECTIONS[section], re.S)


def call(command, folder, path=root, **how):
    "Run a command in a folder, with the package of `path` and nothing of the shell's."
    env = {"OMP_NUM_THREADS": "1"} | {k: v for k, v in os.environ.items() if not k.startswith("RCKA_")}
    env["PYTHONPATH"] = os.pathsep.join([str(path), *filter(None, [os.environ.get("PYTHONPATH")])])
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600, **how)


def test_every_section_with_code_is_followed():
    with_code = {name for name in SECTIONS if blocks(name, "(?:python|sh)")}
    assert with_code == {*CHECKS, "Change a notebook"}


@pytest.mark.parametrize("section", CHECKS)
@pytest.mark.slow
def test_section(section, tmp_path):
    code = "\n".join([*blocks(section, "python"), CHECKS[section]])
    done = call([sys.executable, "-"], tmp_path, input=code)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_change_a_notebook(tmp_path):
    "In a copy of the repository: the cell changes, the module follows, and both are in step."
    for tool in ("nbdev_export", "jupytext", "jupyter", "ruff"):
        if not shutil.which(tool, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])):
            pytest.skip(f"{tool} comes with pip install 'rcka[dev]'")
    for name in ("settings.ini", "setup.py", "pyproject.toml", "README.md"):
        shutil.copy(root / name, tmp_path)
    for name in ("nbs", "rcka", "tests"):
        unwanted = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", ".last_checked")
        shutil.copytree(root / name, tmp_path / name, ignore=unwanted)
    edit, export = blocks("Change a notebook", "sh")
    module = tmp_path / "rcka" / "core.py"
    before = module.read_text(encoding="utf-8")
    assert "did you mean" in before and "maybe you mean" not in before

    done = call(["bash", "-euc", edit], tmp_path, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    forgotten = call(["tests/notebooks_in_step"], tmp_path, tmp_path)
    assert forgotten.returncode != 0 and "maybe you mean" in forgotten.stdout, forgotten.stdout + forgotten.stderr

    done = call(["bash", "-euc", export], tmp_path, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "maybe you mean" in module.read_text(encoding="utf-8")


def test_layers_are_those_that_are_checked():
    (diagram,) = blocks("Layers", "text")
    assert [tuple(line.split()) for line in diagram.splitlines()] == LAYERS[::-1]


def test_commands_and_markers_exist():
    section = SECTIONS["Check a change"]
    targets = set(re.findall(r"^([\w-]+):", (root / "Makefile").read_text(encoding="utf-8"), re.M))
    assert set(re.findall(r"make ([a-z-]+)", TEXT)) <= targets
    markers = re.findall(r'^  "(\w+): ', (root / "pyproject.toml").read_text(encoding="utf-8"), re.M)
    (line,) = [text for text in section.splitlines() if text.startswith("Markers:")]
    assert set(markers) <= set(re.findall(r"`(\w+)`", line))


def test_files_that_are_named_exist():
    for link in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert link.startswith("http") or (root / link).exists(), f"CONTRIBUTING.md links to {link}"
    for anchor in re.findall(r"\]\(#([\w-]+)\)", TEXT):
        assert anchor in {name.lower().replace(" ", "-") for name in SECTIONS}
    for path in re.findall(r"`((?:tests|rcka|nbs|data)/[\w./]+)`", TEXT):
        assert (root / path).exists(), f"CONTRIBUTING.md names {path}"
    pages = {p.stem for p in (root / "nbs").rglob("*.ipynb")}
    named = set(re.findall(r"`(\d\d[a-z]_\w+)`", TEXT))
    assert named <= pages, f"CONTRIBUTING.md names pages that are not there: {named - pages}"
