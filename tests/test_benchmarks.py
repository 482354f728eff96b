"Every benchmark notebook runs under papermill with small parameters, away from the checkout, and says what it should."

from dataclasses import fields
from pathlib import Path

import papermill
import pytest
from test_imagenet import make_folder
from test_segmentation import draw

from rcka.data.coco import draw_rectangles
from rcka.experiments.detection import DetectionExperiment
from rcka.experiments.exhibits import read_manifests
from rcka.experiments.experiment import Experiment, run
from rcka.experiments.result import Result
from rcka.experiments.segmentation import SegmentationExperiment

pytestmark = pytest.mark.slow

benchmarks = Path(__file__).parent.parent / "nbs" / "benchmarks"
HOW = {"device", "channels_last"}  # to run it: arguments of `run`
small = dict(
    dataset="digits",
    teacher="resnet14",
    student="resnet8",
    epochs=1,
    schedule="onecycle",
    train_limit=120,
    test_limit=100,
)


def parameters(name):
    return set(papermill.inspect_notebook(benchmarks / f"{name}.ipynb"))


def execute(name, folder, monkeypatch, cwd=None, **values):
    "Run a notebook in an empty folder, or in `cwd`; a cell that fails fails the test."
    monkeypatch.setenv("RCKA_RUNS", str(folder / "runs"))
    monkeypatch.setenv("PYTHONPATH", str(benchmarks.parent.parent))
    monkeypatch.delenv("MPLBACKEND", raising=False)
    values = {k: v for k, v in values.items() if k in parameters(name)}
    done = papermill.execute_notebook(
        benchmarks / f"{name}.ipynb",
        folder / f"{name}.ipynb",
        values,
        cwd=cwd or folder,
        progress_bar=False,
        kernel_name="python3",
    )
    outputs = [o for cell in done["cells"] for o in cell.get("outputs", [])]
    assert any("image/png" in o.get("data", {}) for o in outputs), "no figure in the executed notebook"
    return "".join(str(o.get("text", "")) + str(o.get("data", {}).get("text/plain", "")) for o in outputs)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion_mnist"])
def test_image_benchmarks(name, tmp_path, monkeypatch):
    assert parameters(name) == {f.name for f in fields(Experiment)}  # one for one
    text = execute(name, tmp_path, monkeypatch, **small, method="kd+fcka", seed=1)
    assert "student, last epoch" in text
    results = [Result.load(p) for p in (tmp_path / "runs").glob("*/result.json")]
    assert {r.experiment["method"] for r in results} == {"none", "kd+fcka"}


def test_imagenet(tmp_path, monkeypatch):
    "On photographs in its layout; a second time it shows what is there."
    assert parameters("imagenet") == {f.name for f in fields(Experiment)} | HOW | {"workers", "compile"}
    make_folder(tmp_path / "data", 8, 2, 3)
    tiny = dict(
        dataset=f"imagenet:{tmp_path / 'data'}",
        teacher="resnet14",
        student="mobilenet_v1",
        teacher_weights=None,
        epochs=2,
        teacher_epochs=1,
        batch_size=8,
        lr=0.01,
        image_size=32,
        channels_last=True,
        workers=1,
        device="cpu",
    )
    text = execute("imagenet", tmp_path, monkeypatch, **tiny)
    assert (
        "24 training images in 3 classes, 6 test images; seen at 32 x 32" in text
        and "that on the validation images" in text
    )
    for said in ("lcka_intra", "data alone", "step alone", "whole run"):
        assert said in text
    assert "is the bottleneck" in text or "as fast as each other" in text
    (result,) = [
        r for p in (tmp_path / "runs").glob("*/result.json") if (r := Result.load(p)).experiment["method"] == "rcka"
    ]
    assert result.last["epoch"] == 2 and result.experiment["image_size"] == 32


def test_digits(tmp_path, monkeypatch):
    "In its own folder, as make demo runs it: with other parameters it leaves the exhibits of the checkout alone."
    exhibits = benchmarks.parent.parent / "figures"
    before = {p: p.read_bytes() for p in exhibits.rglob("*") if p.is_file()}
    values = small | dict(methods=["kd", "rcka"], seeds=[0, 1], teacher_epochs=1)
    text = execute("digits", tmp_path, monkeypatch, cwd=benchmarks, **values)
    assert "student alone" in text and "teacher resnet14" in text and "closed (%)" in text
    assert (tmp_path / "runs" / "figures" / "digits.png").stat().st_size > 5000
    results = [Result.load(p).experiment for p in (tmp_path / "runs").glob("*/result.json")]
    assert len(results) == 1 + 3 * 2
    limits = {e["student"]: e["train_limit"] for e in results}
    assert limits == {"resnet14": None, "resnet8": 120}  # the teacher has more labels than its students
    made = read_manifests(tmp_path / "runs" / "figures")["digits"]
    assert made["parameters"]["epochs"] == 1 and made["parameters"]["train_limit"] == 120
    assert {p: p.read_bytes() for p in exhibits.rglob("*") if p.is_file()} == before


def test_bounds(tmp_path, monkeypatch):
    assert "rank correlation" in execute("bounds", tmp_path, monkeypatch, epochs=2, teacher_epochs=1, samples=16)


def test_analysis(tmp_path, monkeypatch):
    text = execute(
        "analysis",
        tmp_path,
        monkeypatch,
        **small | {"epochs": 2},
        teacher_epochs=1,
        methods=["none", "kd", "rcka"],
        probe=200,
    )
    assert "similarity of logits" in text
    made = {p.name for p in (tmp_path / "runs" / "figures" / "analysis").iterdir()}
    assert {
        "digits-none.csv",
        "digits-rcka.csv",
        "digits-runs.csv",
        "digits-along.csv",
        "digits-before-after.png",
        "digits-grams.svg",
    } <= made


def test_speed_analysis(tmp_path, monkeypatch):
    pytest.importorskip("torch_cka")
    monkeypatch.setenv("PYTHONPATH", str(benchmarks.parent.parent))
    done = papermill.execute_notebook(
        benchmarks / "speed_analysis.ipynb",
        tmp_path / "out.ipynb",
        dict(batches=1, batch_size=8, image_size=32, layers=6, large=None),
        cwd=tmp_path,
        progress_bar=False,
        kernel_name="python3",
    )
    assert "times as long" in str(done)


def test_report(tmp_path, monkeypatch):
    "Of two runs: the table has both, with what their result files say."
    experiment = Experiment(**small, method="kd")
    results = [run(e, tmp_path / "runs", progress=False) for e in (experiment, Experiment(**small | {"teacher": None}))]
    execute("report", tmp_path, monkeypatch, root=str(tmp_path / "runs"))
    executed = (tmp_path / "report.ipynb").read_text()
    for result, line in zip(results, ("| resnet14 | resnet8 | kd | 1 | {:.2f}", "| resnet8 | none | 1 | {:.2f}")):
        assert line.format(result.last["top1"]) in executed


def test_cityscapes(tmp_path, monkeypatch):
    "On drawn scenes in its layout."
    assert parameters("cityscapes") == {f.name for f in fields(SegmentationExperiment)} | HOW | {"boxes"}
    for part, n in (("train", 6), ("val", 4)):
        draw(tmp_path / "scenes", part, n)
    network = "lraspp/mobilenet_v3_large"
    text = execute(
        "cityscapes",
        tmp_path,
        monkeypatch,
        dataset=f"cityscapes:{tmp_path / 'scenes'}",
        teacher=network,
        student=network,
        epochs=1,
        batch_size=3,
        crop=[16, 24],
        channels_last=True,
    )
    assert "teacher, training images" in text and "6 training and 4 validation images" in text
    assert {Result.load(p).experiment["method"] for p in (tmp_path / "runs").glob("*/result.json")} == {"none", "lcka"}


def test_coco(tmp_path, monkeypatch):
    "On drawn rectangles in its layout."
    pytest.importorskip("faster_coco_eval")
    assert parameters("coco") == {f.name for f in fields(DetectionExperiment)} | HOW | {"workers", "figures"}
    for split, n in (("train2017", 6), ("val2017", 4)):
        draw_rectangles(tmp_path / "rectangles", n, split)
    network = "mobilenet_v3_small"
    text = execute(
        "coco",
        tmp_path,
        monkeypatch,
        dataset=str(tmp_path / "rectangles"),
        teacher=network,
        student=network,
        epochs=1,
        teacher_epochs=1,
        size=48,
        max_size=72,
        head_convs=1,
        precision="fp32",
        channels_last=True,
    )
    assert "trained on (6)" in text and "others (4)" in text and "level0" in text
    assert {Result.load(p).experiment["method"] for p in (tmp_path / "runs").glob("*/result.json")} == {"none", "pcka"}
    assert {"coco_along_training.png", "coco_boxes.jpg"} <= {p.name for p in (tmp_path / "runs" / "figures").iterdir()}


def test_study(tmp_path, monkeypatch):
    "A few of its losses: a row for each loss and seed, gradients along training, and the protocol."
    monkeypatch.setenv("PYTHONPATH", str(benchmarks.parent.parent))
    monkeypatch.setenv("RCKA_RUNS", str(tmp_path / "runs"))
    losses = ["none", "kd", "fcka-u", "fcka-c", "rcka-c@16"]
    papermill.execute_notebook(
        benchmarks / "study.ipynb",
        tmp_path / "out.ipynb",
        dict(
            dataset="digits",
            teacher="resnet14",
            student="resnet8",
            losses=losses,
            seeds=[0, 1],
            epochs=2,
            train_limit=128,
            test_limit=100,
            teacher_epochs=1,
            teacher_limit=128,
            precision="fp32",
            name="tiny",
            figures=str(tmp_path / "figures"),
        ),
        cwd=tmp_path,
        progress_bar=False,
        kernel_name="python3",
    )
    rows = (tmp_path / "figures" / "study" / "tiny.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * len(losses) and {r.split(",")[0] for r in rows[1:]} == set(losses)
    assert "fcka-u,fcka-c,2" in (tmp_path / "figures" / "study" / "tiny-gradients.csv").read_text()
    assert '"epochs": 2' in (tmp_path / "figures" / "study" / "tiny.json").read_text()
