"What lies under figures/ says how it was made, and is what its page would draw today; only a command writes there."

import json
import re
from pathlib import Path

import papermill
import pytest

from rcka.experiments.exhibits import (
    NOT_RECORDED,
    out_of_date,
    read_manifests,
    record_exhibit,
    remake,
    resolved_arguments,
)
from rcka.experiments.sweep import parameters
from rcka.methods import BUILT_IN  # not list_methods(): other tests register more
from rcka.methods.base import create_method

root = Path(__file__).parent.parent
figures = root / "figures"
records = read_manifests(figures)
named = pytest.mark.parametrize("name", sorted(records))


def test_every_file_belongs_to_one_record():
    files = [f for record in records.values() for f in record["files"]]
    assert len(files) == len(set(files))
    found = {p.relative_to(figures).as_posix() for p in figures.rglob("*") if p.is_file()}
    assert set(files) == {f for f in found if not f.startswith("manifests/")}


@named
def test_record_is_complete(name):
    record = records[name]
    fields = ("files", "notebook", "parameters", "methods", "commit", "versions", "machine", "date")
    assert tuple(record) == fields and all(record[f] or f in ("parameters", "methods") for f in fields)
    notebook = root / record["notebook"]
    assert notebook.is_file()
    if record["parameters"] != NOT_RECORDED:
        assert set(record["parameters"]) <= set(parameters(notebook)) - {"figures"}
    assert re.fullmatch(r"[0-9a-f]{40}", record["commit"])  # committed code: no plus of a changed checkout
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", record["date"])
    assert not re.search(r'"(/|[A-Za-z]:\\\\)', json.dumps(record))  # no absolute path


@named
def test_exhibit_is_what_would_be_made_today(name):
    import rcka.experiments.study  # noqa: F401  # registers "scaled", which records of studies name; not for other tests' lists

    assert not out_of_date(records[name]), f"python -m rcka.experiments.exhibits {name}"


def test_a_changed_default_is_found():
    "The exhibits made before RCKA's weight became 16 would have been found."
    asked = {"method": "rcka", "method_args": None, "teacher": "resnet20", "student": "resnet8", "dataset": "digits"}
    record = {"methods": [asked | {"arguments": resolved_arguments(**asked) | {"alpha": 4.0}}]}
    assert out_of_date(record) == ["rcka: alpha was 4.0, is 16.0 today"]
    record["methods"][0]["method_args"] = {"alpha": 4.0}  # asked for, not a default
    assert not out_of_date(record)


def test_a_removed_argument_is_found():
    record = {"methods": [{"method": "kd", "arguments": resolved_arguments("kd") | {"once": 1}}]}
    assert out_of_date(record) == ["kd: once was 1, is 'no argument' today"]


@pytest.mark.parametrize("method", sorted(BUILT_IN))
def test_resolved_arguments_make_the_same_method(method):
    "Every value is plain, and given back explicitly it changes nothing."
    arguments = resolved_arguments(method, {})
    assert " at 0x" not in json.dumps(arguments)
    create_method(method, arguments)
    assert resolved_arguments(method, arguments) == arguments


def test_only_a_folder_that_is_named_is_written_to(tmp_path, monkeypatch):
    "Pages write below the runs; the notebooks name no folder of the checkout."
    for path in (root / "nbs").rglob("*.ipynb"):
        if ".ipynb_checkpoints" in path.parts:
            continue
        cells = json.loads(path.read_text())["cells"]
        code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
        for line in code.splitlines():
            writes = re.search(r"savefig|save_figure\(|to_csv|write_text|mkdir", line)
            assert not (writes and re.search(r"checkout\(\)|[\"']figures[\"']", line)), f"{path.name}: {line}"


@pytest.mark.slow
def test_a_page_in_the_checkout_leaves_its_exhibits_alone(tmp_path, monkeypatch):
    "The digits page with other parameters, run from its own folder, as make demo runs it."
    monkeypatch.setenv("RCKA_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("PYTHONPATH", str(root))
    before = {p: p.read_bytes() for p in figures.rglob("*") if p.is_file()}
    values = dict(methods=["kd"], seeds=[0, 1], epochs=1, teacher_epochs=1, train_limit=60, test_limit=50)
    values |= dict(teacher="resnet8", teacher_limit=120)
    page = root / "nbs" / "benchmarks" / "digits.ipynb"
    papermill.execute_notebook(
        page, tmp_path / "out.ipynb", values, cwd=page.parent, progress_bar=False, kernel_name="python3"
    )
    made = read_manifests(tmp_path / "runs" / "figures")["digits"]
    assert made["parameters"]["epochs"] == 1 and made["parameters"]["teacher_limit"] == 120
    assert {p: p.read_bytes() for p in figures.rglob("*") if p.is_file()} == before


@pytest.mark.slow
def test_exhibits_are_made_again_from_their_records(tmp_path, monkeypatch):
    """A page with its recorded parameters, in a copy of the checkout: the record and the files are new, the rest as it
    was."""
    (tmp_path / "nbs").mkdir()
    cells = [
        ("epochs = 1\nfigures = None", ["parameters"]),
        (
            "from rcka.experiments.exhibits import figures_folder, parameters_of, record_exhibit\nparameters = "
            "parameters_of(globals())",
            [],
        ),
        ("folder = figures_folder(figures)\n(folder / 'a.txt').write_text(str(epochs))", []),
        ("record_exhibit(folder, 'a', ['a.txt'], 'nbs/a.ipynb', parameters, [{'method': 'kd'}])", []),
    ]
    cells = [
        dict(cell_type="code", source=s, metadata={"tags": t}, outputs=[], execution_count=None, id=f"c{i}")
        for i, (s, t) in enumerate(cells)
    ]
    page = dict(
        cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    )
    (tmp_path / "nbs" / "a.ipynb").write_text(json.dumps(page | {"nbformat": 4, "nbformat_minor": 5}))
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "a.txt").write_text("old")
    record_exhibit(tmp_path / "figures", "a", ["a.txt"], "nbs/a.ipynb", {"epochs": 7})
    monkeypatch.setenv("RCKA_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("PYTHONPATH", str(root))
    remake("a", tmp_path)
    assert (tmp_path / "figures" / "a.txt").read_text() == "7"
    record = read_manifests(tmp_path / "figures")["a"]
    assert record["parameters"] == {"epochs": 7} and record["methods"][0]["arguments"] == resolved_arguments("kd")
    with pytest.raises(ValueError, match="exhibit"):
        remake("b", tmp_path)


@pytest.mark.slow
def test_a_small_sweep_is_a_page(tmp_path, monkeypatch):
    monkeypatch.setenv("RCKA_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("PYTHONPATH", str(root))
    values = dict(dataset="digits", pairs=["resnet14:resnet8"], methods=["none", "kd"], seeds=[0], epochs=1)
    values |= dict(teacher_epochs=1, train_limit=60, test_limit=50)
    papermill.execute_notebook(
        root / "nbs" / "benchmarks" / "sweep.ipynb",
        tmp_path / "out.ipynb",
        values,
        cwd=tmp_path,
        progress_bar=False,
        kernel_name="python3",
    )
    rows = (tmp_path / "runs" / "figures" / "sweep_digits.csv").read_text().splitlines()
    assert {r.split(",")[3] for r in rows[1:]} == {"teacher", "none", "kd"}
    assert read_manifests(tmp_path / "runs" / "figures")["sweep_digits"]["parameters"]["train_limit"] == 60
