"""What a stranger meets first: the import with torch alone, the README's code, the metadata, the package that is built
from the sources."""

import ast
import configparser
import csv
import email
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

root = Path(__file__).parent.parent
settings = configparser.ConfigParser(delimiters=["="])
settings.read(root / "settings.ini")
cfg = settings["DEFAULT"]


def python(code):
    return subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_import_needs_torch_and_torchvision_alone():
    "Everything the extras bring is made impossible to import; the losses, networks and taps still work."
    names = [re.split(r"[<>=!]", r)[0] for key in cfg if key.endswith("_requirements") for r in cfg[key].split()]
    blocked = [{"scikit-learn": "sklearn"}.get(n, n).replace("-", "_") for n in names] + [
        "IPython",
        "ipykernel",
        "fastcore",
    ]
    done = python(f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}: raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import torch, rcka
student, teacher = rcka.create_model("resnet8", 10), rcka.create_model("resnet14", 10)
s, t = (rcka.Taps(m, ["layer3"]) for m in (student, teacher))
x = torch.randn(8, 3, 32, 32)
sum(rcka.RCKA()(s(x), t(x), torch.arange(8)).values()).backward()
print(len(rcka.list_methods()))
""")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 5


@pytest.mark.parametrize("first", ["papermill", "rcka.engine", "rcka.experiments.sweep", "rcka.cli"])
@pytest.mark.slow
def test_papermill_and_its_engine_import_in_any_order(first):
    "papermill loads the engine of an installed rcka while it is itself being imported."
    done = python(
        f"import {first}, papermill.engines, rcka.experiments.sweep; "
        "print(papermill.engines.papermill_engines.get_engine('rcka').__class__.__module__)"
    )
    assert done.stdout.strip() == "rcka.engine", done.stderr


@pytest.mark.parametrize(
    "code",
    [
        "import rcka, rcka.engine, rcka.__main__",
        "import sys; sys.argv = ['rcka', '--help']; from rcka.__main__ import main; main()",
        "import sys; sys.argv = ['rcka', 'sweep', '--help']; from rcka.__main__ import main; main()",
        "import sys; sys.argv = ['rcka', 'models']; from rcka.__main__ import main; main()",
    ],
    ids=["import", "help", "sweep-help", "models"],
)
def test_torch_is_imported_late(code):
    """torch takes seconds to import: not for the engine that papermill loads, not for help, not for the list of
    networks."""
    done = python(
        "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules, 'papermill' in sys.modules)); "
        f"{code}"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False False"


def test_names_of_the_package():
    "`rcka.NAME` is what type checkers are told it is; `import rcka` is enough for its modules."
    import rcka

    (block,) = [n for n in ast.parse(Path(rcka.__file__).read_text()).body if isinstance(n, ast.If)]
    told = {alias.name: line.module for line in block.body for alias in line.names}
    assert set(told) | {"EXTRAS", "optional_import"} == set(rcka.__all__) <= set(dir(rcka))
    for name, module in told.items():
        assert getattr(rcka, name) is getattr(importlib.import_module(module), name), name
    assert python("import rcka; rcka.methods.FCKA, rcka.models.create_model, rcka.train.Trainer").returncode == 0
    with pytest.raises(AttributeError, match="cak"):
        rcka.cak  # noqa: B018


@pytest.mark.slow
def test_methods_register_whoever_asks():
    "Every family is known without importing it; a method of the user's keeps its name."
    done = python("""
from rcka.methods import Method, create_method, register
@register("kd")
class Mine(Method): pass
from rcka.methods import list_methods
print({"kd", "fitnet", "dense_kd", "rcka"} <= set(list_methods()), type(create_method("kd")).__name__)
""")
    assert done.stdout.split() == ["True", "Mine"], done.stderr


def test_models_are_counted():
    "The table behind `rcka models` has the networks there are, in their order, with their parameters."
    from rcka.models.registry import create_model, list_models

    with open(root / "rcka" / "models" / "parameters.csv", newline="") as f:
        table = {row["name"]: int(row["parameters"]) for row in csv.DictReader(f)}
    with torch.device("meta"):
        counted = {name: sum(p.numel() for p in create_model(name).parameters()) for name in list_models()}
    assert list(table.items()) == list(counted.items())


def test_extras_are_those_of_the_settings():
    import rcka

    extra_of = {
        {"scikit-learn": "sklearn", "faster-coco-eval": "faster_coco_eval", "mlflow-skinny": "mlflow"}.get(
            name, name
        ): extra
        for extra in (
            *("train", "notebook", "parquet", "segmentation", "detection", "slurm"),
            *("timm", "transformers", "datasets", "hub", "export", "tensorboard", "wandb", "mlflow"),
        )
        for name in (re.split(r"[<>=!]", r)[0] for r in cfg[f"{extra}_requirements"].split())
    }
    unnamed = {"jupyterlab", "sqlalchemy", "alembic"}  # a program, and what mlflow's file store needs
    assert rcka.EXTRAS.items() >= {k: v for k, v in extra_of.items() if k not in unnamed}.items()
    assert set(rcka.EXTRAS) - set(extra_of) == {"nbformat"}  # comes with papermill


def test_extras_of_the_settings_can_be_installed(monkeypatch):
    "setup.py offers each of them, and what an error tells to install is one."
    import runpy

    import setuptools

    import rcka

    given = {}
    monkeypatch.setattr(setuptools, "setup", lambda **settings: given.update(settings))
    runpy.run_path(str(root / "setup.py"))
    named = {key.removesuffix("_requirements") for key in cfg if key.endswith("_requirements")}
    assert set(given["extras_require"]) == named >= set(rcka.EXTRAS.values())
    for extra, requirements in given["extras_require"].items():
        assert set(cfg[f"{extra}_requirements"].split()) <= set(requirements)


def test_every_extra_is_used_alone():
    "`tests/extras_alone` has a program for each extra that a user installs."
    import runpy

    import rcka

    assert set(runpy.run_path(str(root / "tests" / "extras_alone"))["USES"]) == set(rcka.EXTRAS.values())


@pytest.mark.parametrize("path", sorted((root / "rcka").rglob("*.py")), ids=lambda p: p.stem)
def test_optional_imports_name_their_extra(path):
    "Each import of an optional package stands in `with optional_import()`; papermill itself calls the engine."
    import rcka

    def unguarded(node, guarded=False):
        if isinstance(node, ast.With):
            guarded |= any("optional_import" in ast.unparse(item) for item in node.items)
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        if not guarded:
            yield from (name for name in names if name.split(".")[0] in rcka.EXTRAS)
        for child in ast.iter_child_nodes(node):
            yield from unguarded(child, guarded)

    found = set(unguarded(ast.parse(path.read_text())))
    assert found <= ({"papermill.engines"} if path.name == "engine.py" else set()), found


@pytest.mark.parametrize(
    "package, extra, module",
    [
        ("tqdm", "train", "rcka.train.callbacks"),
        ("filelock", "train", "rcka.experiments.result"),
        ("papermill", "notebook", "rcka.experiments.sweep"),
        ("nbformat", "notebook", "rcka.experiments.sweep"),
        ("typer", "notebook", "rcka.cli"),
        ("rich", "notebook", "rcka.cli"),
    ],
)
def test_a_missing_extra_is_named(package, extra, module, monkeypatch):
    "Where a package is missing, the import of a module says how to get it."
    importlib.import_module(module.rpartition(".")[0])  # its package, which may need the same
    _block(package, monkeypatch)
    spec = importlib.util.find_spec(module)
    with pytest.raises(ImportError, match=rf"{package}.*{_install(extra)}"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def _block(package, monkeypatch):
    "Make a package impossible to import."
    for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)


def _install(extra):
    return re.escape(f"pip install 'rcka[{extra}] @ git+{cfg['git_url']}'")


def _missing_in_use():
    import rcka
    from rcka.data.datasets import load_dataset
    from rcka.experiments.report import _tidy
    from rcka.experiments.result import plot_history, summary
    from rcka.experiments.sweep import slurm
    from rcka.train.segmentation import confusion

    return {
        "pandas": ("train", lambda: summary([])),
        "sklearn": ("train", lambda: load_dataset("digits")),
        "safetensors": ("train", lambda: rcka.save_weights(rcka.create_model("resnet8"), "no.safetensors")),
        "matplotlib": ("notebook", lambda: plot_history({}, "top1")),
        "seaborn": ("notebook", lambda: _tidy(None)),
        "torchmetrics": (
            "segmentation",
            lambda: confusion(torch.zeros(1, 2, 2).long(), torch.zeros(1, 2, 2).long(), 2),
        ),
        "submitit": ("slurm", lambda: slurm("nowhere")),
    }


@pytest.mark.parametrize(
    "package", ["pandas", "sklearn", "safetensors", "matplotlib", "seaborn", "torchmetrics", "submitit"]
)
def test_a_missing_extra_is_named_in_use(package, monkeypatch, tmp_path):
    "The same for what is imported when it is first needed."
    monkeypatch.chdir(tmp_path)
    extra, call = _missing_in_use()[package]
    _block(package, monkeypatch)
    with pytest.raises(ImportError, match=rf"{package}.*{_install(extra)}"):
        call()


def test_the_command_without_typer():
    "One line, no traceback."
    done = python("import sys; sys.modules['typer'] = None; from rcka.__main__ import main; main()")
    assert done.returncode == 2 and re.fullmatch(rf"error: .*typer.*{_install('notebook')}\n", done.stderr), done.stderr


def test_installation_is_said_for_a_package_from_git():
    "`pip install rcka[train]` would ask an index, where the package is not."
    for path in [root / "README.md", *(root / "nbs").rglob("*.ipynb"), *(root / "rcka").rglob("*.py")]:
        for command in re.findall(r"pip install [^`\n]*rcka\[[^`\n]*", path.read_text(encoding="utf-8")):
            assert "@ git+" in command, f"{path.name}: {command}"


def test_readme_links_exist():
    for page in ("README.md", "data/README.md"):
        for link in re.findall(r"\]\(([^)#]+)\)", (root / page).read_text()):
            assert link.startswith("http") or (root / page).parent.joinpath(link).exists(), f"{page} links to {link}"


def test_version_is_said_once():
    import rcka

    assert rcka.__version__ == cfg["version"]
    assert f"version: {cfg['version']}" in (root / "CITATION.cff").read_text()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist made from a copy of the sources, the wheel made from the sdist, and an environment with the sdist
    installed."""
    for tool in ("setuptools", "pip"):
        pytest.importorskip(tool, reason=f"{tool} builds or installs the package")
    folder = tmp_path_factory.mktemp("built")
    unwanted = {".git", ".venv", "data", "runs", "figures", "build", "dist", "_docs"}
    at_root = lambda path, names: [
        n for n in names if n == "__pycache__" or n.endswith(".egg-info") or (Path(path) == root and n in unwanted)
    ]
    shutil.copytree(root, folder / "sources", ignore=at_root)
    call = lambda *args, **how: subprocess.run([str(a) for a in args], capture_output=True, text=True, **how)
    code = "import sys, setuptools.build_meta as b; b.build_sdist(sys.argv[1])"
    made = call(sys.executable, "-c", code, folder / "dist", cwd=folder / "sources")
    assert made.returncode == 0, made.stderr
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    pip = (sys.executable, "-m", "pip", "-q", "--disable-pip-version-check")
    offline = ("--no-deps", "--no-build-isolation", "--no-index")
    made = call(*pip, "wheel", *offline, "-w", folder / "dist", sdist)
    assert made.returncode == 0, made.stderr
    call(sys.executable, "-m", "venv", "--without-pip", folder / "venv")
    (site,) = (folder / "venv" / "lib").glob("*/site-packages")
    here = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    (site / "outside.pth").write_text(
        "\n".join(here) + "\n"
    )  # torch and the rest; an rcka that is installed there comes later
    python = folder / "venv" / "bin" / "python"
    made = call(*pip, "--python", python, "install", *offline, "--ignore-installed", sdist)
    assert made.returncode == 0, made.stderr
    return folder, sdist, site


def installed(built, tmp_path, *args):
    "Call a program of the environment in an empty folder."
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "RCKA_"))}
    env = {"OMP_NUM_THREADS": "1"} | env | {"JUPYTER_DATA_DIR": str(tmp_path / "jupyter")}
    program = built[0] / "venv" / "bin" / args[0]
    return subprocess.run([program, *args[1:]], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_sdist_and_wheel(built):
    "What they hold, and that the README makes sense on an index."
    import zipfile

    folder, sdist, _ = built
    with tarfile.open(sdist) as tar:
        files = {name.partition("/")[2] for name in tar.getnames()}
        (info,) = [m for m in tar if m.name.count("/") == 1 and m.name.endswith("PKG-INFO")]
        text = tar.extractfile(info).read().decode()
    assert {"settings.ini", "pyproject.toml", "LICENSE", "nbs/method/01_core.ipynb", "tests/test_package.py"} <= files
    message = email.message_from_string(text)
    addresses = dict(line.split(", ") for line in message.get_all("Project-URL"))
    assert set(addresses) == {"Documentation", "Issues", "Changelog", "Paper"}
    assert all(address.startswith("https://") for address in addresses.values())
    page = message.get_payload()
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)]+)\)", page)
    assert len(links) > 20 and all(link.startswith(("https://", "#")) for _, link in links), links
    assert all("/raw/" in link for image, link in links if image)
    assert re.search(r"/blob/main/nbs/theory/01_similarity.ipynb", page)
    (wheel,) = (folder / "dist").glob("*.whl")
    notebooks = {p.name for p in (root / "nbs" / "benchmarks").glob("*.ipynb")}
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"rcka/py.typed", "rcka/tables/cifar100.csv", "rcka/models/parameters.csv", "rcka/__main__.py"} <= names
    assert notebooks == {Path(n).name for n in names if n.startswith("rcka/notebooks/")}


@pytest.mark.slow
def test_installed_package_runs(built, tmp_path):
    "Import, command, and a run and a sweep of the benchmark notebooks, with no checkout in sight."
    done = installed(built, tmp_path, "python", "-c", "import rcka; print(rcka.__file__, len(rcka.list_methods()))")
    assert str(built[2]) in done.stdout, done.stderr
    small = ("-p", "epochs=1", "-p", "train_limit=100", "-p", "test_limit=100")
    done = installed(built, tmp_path, "rcka", "run", "digits", "-p", "method=none", *small)
    assert done.returncode == 0 and "student resnet8, method none: top-1" in done.stdout, done.stderr
    (result,) = tmp_path.glob("runs/*/result.json")
    assert (result.parent / "last.safetensors").exists() and str(result.parent) in done.stdout
    sweep = ("rcka", "sweep", "digits", "--pairs", "resnet14:resnet8", "--methods", "none", "--seeds", "1")
    done = installed(built, tmp_path, *sweep, *small)
    assert done.returncode == 0 and "1 of 1 runs are done" in done.stdout, done.stderr
