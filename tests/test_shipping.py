"A student in other formats: what is written runs without this package and is the student, or is not written."

import importlib.util
import json
import sys
from dataclasses import replace

import pytest
import torch

import rcka
from rcka.data.own import held_out_images, open_data
from rcka.models.sources import InputConfig
from rcka.models.student import make_network, read_about, save_student
from rcka.shipping import EXPORTS, compare_logits, export_student

FORMATS = [
    "torch",
    pytest.param(
        "onnx",
        marks=pytest.mark.skipif(
            not all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime"))),
            reason="pip install rcka[export]",
        ),
    ),
]


@pytest.fixture
def digits():
    return open_data("digits")


@pytest.fixture
def student(tmp_path, digits):
    "A folder with a student for digits."
    torch.manual_seed(0)
    model = rcka.create_model("resnet8", 10, 1).eval()
    config = InputConfig(digits.mean, digits.std, 8)
    save_student(model, tmp_path, "resnet8", classes=digits.classes, config=config, in_channels=1)
    return tmp_path


def runs(path):
    "A function that runs an exported file, by torch or ONNX Runtime alone."
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,), (out,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape[0], out.name, out.shape) == ("images", "batch", "logits", ["batch", 10])
    assert json.loads(session.get_modelmeta().custom_metadata_map["student.json"])["network"] == "resnet8"
    return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


@pytest.mark.slow
@pytest.mark.parametrize("to", FORMATS)
def test_what_is_exported_is_the_student(student, digits, to):
    "On other images than it was compared on, in batches of every size, and the description stays readable."
    path = export_student(student, to, data="digits")
    assert path == student / EXPORTS[to]
    exported, model = runs(path), rcka.load_student(student)
    images = held_out_images(
        replace(digits, test_images=digits.test_images.flip(0), test_targets=digits.test_targets.flip(0)), 40
    )
    with torch.no_grad():
        for n in (1, 2, 7, 40):
            torch.testing.assert_close(exported(images[:n]), model(images[:n]), rtol=1e-4, atol=1e-5)
    written = read_about(student)["exports"][to]
    assert written["images"] == 64 and written["largest_difference"] < 1e-3 * written["largest_logit"]
    extra = {"student.json": ""}
    if to == "torch":
        torch.export.load(path, extra_files=extra)
        about = json.loads(extra["student.json"])
        assert about["classes"] == list(digits.classes) and about["mean"] == list(digits.mean)
        assert "made_by" not in about


def test_what_differs_is_refused(student):
    "Another function, another class in one image, another number of classes, NaN."
    model, images = rcka.load_student(student), held_out_images(open_data("digits"), 20)
    with torch.no_grad():
        logits = model(images)
    assert compare_logits(model, model, images, "x")["largest_difference"] < 1e-5
    for other in (1.01 * logits, logits[:, :9], logits.roll(1, 0), torch.full_like(logits, torch.nan)):
        found = iter((other[:1], other[1:]))
        with pytest.raises(ValueError, match="not the student|gives logits"):
            compare_logits(model, lambda x, found=found: next(found), images, "student.onnx")
    near = 1 + 1e-4 * torch.nn.functional.one_hot(torch.arange(20) % 10, 10)  # within the tolerance, and another class
    found = iter((near[:1].flip(1), near[1:].flip(1)))
    with pytest.raises(ValueError, match="another class"):
        compare_logits(lambda x: near, lambda x: next(found), images, "student.onnx")


@pytest.mark.slow
def test_nothing_is_written_of_a_network_that_cannot_be_exported(tmp_path, monkeypatch):
    "One that computes something else while it is exported, and one that takes batches of one size alone."
    (tmp_path / "odd_networks.py").write_text("""
import torch
from torch import nn
class Odd(nn.Sequential):
    def forward(self, x):
        return super().forward(x) * (2 if torch.compiler.is_compiling() else 1)
class Two(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + torch.zeros(2, 1)
def odd(num_classes): return Odd(nn.Flatten(), nn.Linear(64, num_classes))
def two(num_classes): return Two(nn.Flatten(), nn.Linear(64, num_classes))
""")
    monkeypatch.syspath_prepend(tmp_path)
    torch.manual_seed(0)
    for name, error, says in (
        ("odd", ValueError, "not the student"),
        ("two", RuntimeError, "cannot be exported to torch"),
    ):
        folder, name = tmp_path / name, f"odd_networks:{name}"
        about = save_student(make_network(name, 10), folder, name, classes=tuple("0123456789"), in_channels=1)
        with pytest.raises(error, match=says):
            export_student(folder, "torch", data="digits")
        assert {p.name for p in folder.iterdir()} == {"student.json", "student.safetensors"}
        assert read_about(folder) == about


def test_bad_input_to_an_export(student, monkeypatch):
    with pytest.raises(ValueError, match="onnx or torch"):
        export_student(student, "tflite")
    with pytest.raises(ValueError, match="give images= or data="):
        export_student(student, "torch")
    with pytest.raises(FileNotFoundError, match="give images= or data="):
        export_student(student, "torch", data="no/folder")
    with pytest.raises(ValueError, match="three or more"):
        export_student(student, "torch", images=torch.zeros(2, 1, 8, 8))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.delitem(sys.modules, "onnx", raising=False)
    with pytest.raises(ImportError, match=r"rcka\[export\]"):
        export_student(student, "onnx", data="digits")
    with pytest.raises(ImportError, match=r"rcka\[export\]"):  # before anything is trained
        rcka.distill("digits", "resnet14", "resnet8", output=student / "out", export="torch+onnx")
    assert not (student / "out").exists()


@pytest.mark.real_data
@pytest.mark.parametrize("to", FORMATS)
def test_a_network_of_torchvision_on_photographs(real_data, tmp_path, to):
    torch.manual_seed(0)
    model = rcka.create_model("torchvision/mobilenet_v3_small", 10).eval()
    data = open_data(real_data / "imagenette")
    config = InputConfig(data.mean, data.std, 96)
    save_student(model, tmp_path, "torchvision/mobilenet_v3_small", classes=data.classes, config=config)
    export_student(tmp_path, to, data=real_data / "imagenette")
    assert read_about(tmp_path)["exports"][to]["input"] == [3, 96, 96]
