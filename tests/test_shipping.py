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
from rcka.shipping import EXPORTS, compare_logits, export_student, push_to_hub, write_card

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


@pytest.mark.slow
@pytest.mark.parametrize("to", FORMATS)
def test_a_network_that_returns_a_dict(to, tmp_path, monkeypatch):
    "The exported program returns the logits."
    (tmp_path / "dict_networks.py").write_text("""
from torch import nn
class Dict(nn.Sequential):
    def forward(self, x):
        return {"logits": super().forward(x), "name": "one"}
def network(num_classes): return Dict(nn.Flatten(), nn.Linear(64, num_classes))
""")
    monkeypatch.syspath_prepend(tmp_path)
    torch.manual_seed(0)
    model = make_network("dict_networks:network", 10)
    save_student(model, tmp_path / "a", "dict_networks:network", classes=tuple("0123456789"), in_channels=1)
    assert export_student(tmp_path / "a", to, data="digits").is_file()
    assert read_about(tmp_path / "a")["exports"][to]["images"] == 64


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


def finished(folder):
    "Write what `rcka distill` writes about a run, beside a student that is there."
    about = read_about(folder)
    settings = {"data": "digits", "method": "kd+fcka", "epochs": 7, "alone": True}
    args = {"kd.weight": 1.0, "fcka.weight": 16.0}
    about["made_by"] = {"settings": settings, "teacher": "resnet14", "method_args": args, "versions": {"torch": "2.6"}}
    (folder / "student.json").write_text(json.dumps(about))
    costs = {"parameters": 77754, "flops": 2e6, "megabytes": 0.3}
    results = {
        "teacher": {"network": "resnet14", "top1": 97.5} | costs,
        "student": {"network": "resnet8", "top1": 95.25} | costs,
        "alone": {"top1": 94.0},
    }
    (folder / "distill.json").write_text(json.dumps({"settings": settings, "results": results}))


def test_the_card_is_read_by_the_hub_and_its_code_runs(student, digits, monkeypatch):
    "The head by the hub's own reader, where it is installed; the code block as it stands, on an image."
    finished(student)
    assert write_card(student)
    text = (student / "README.md").read_text()
    for said in (
        "resnet14",
        "97.50",
        "95.25",
        "94.00",
        "77,754",
        "`kd+fcka`",
        "| `kd+fcka`: `fcka.weight` | 16.0 |",
        "torch 2.6",
    ):
        assert said in text, said
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard(text)
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("accuracy", 0.9525, "digits")
    assert card.data.pipeline_tag == "image-classification" and card.data.library_name == "rcka"
    code = text.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(student)
    names = {"image": digits.test_images[0]}
    exec(code, names)
    torch.testing.assert_close(names["probabilities"].sum(), torch.tensor(1.0))
    assert len(code.splitlines()) == 4


def test_the_card_of_an_encoder(tmp_path):
    "A student without a classifier, that nobody said anything about."
    torch.manual_seed(0)
    save_student(make_network("resnet8", 0), tmp_path, "resnet8")
    text = rcka.shipping.model_card(tmp_path)
    assert '"image-feature-extraction"' in text and "features = student(x)" in text and "model-index" not in text


def test_a_readme_of_somebody_else_stays(student):
    (student / "README.md").write_text("mine")
    assert not write_card(student) and (student / "README.md").read_text() == "mine"
    (student / "README.md").unlink()
    assert write_card(student) and write_card(student)  # its own it writes again


class Hub:
    "In place of HfApi: keeps what it was asked for, and opens no connection."

    calls: list = []

    def __init__(self, **_):
        pass

    def create_repo(self, repo_id, **how):
        self.calls.append(("create", repo_id, how))

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, commit_message):
        self.calls.append(("upload", repo_id, set(allow_patterns), folder_path))
        return f"https://example.org/{repo_id}"


def test_a_student_is_sent_to_the_hub(student, monkeypatch):
    "A private repository gets the student and nothing else of its folder; a damaged one is not sent."
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    finished(student)
    (student / "student").mkdir()
    (student / "student" / "checkpoint-1.pt").write_bytes(b"")
    assert push_to_hub(student, "someone/resnet8") == "https://example.org/someone/resnet8"
    created, sent = Hub.calls
    assert created == ("create", "someone/resnet8", {"private": True, "exist_ok": True})
    assert sent == ("upload", "someone/resnet8", {"README.md", "student.json", "student.safetensors"}, student)
    Hub.calls.clear()
    with pytest.raises(ValueError, match="USER/NAME"):
        push_to_hub(student, "a/b/c")
    with pytest.raises(ValueError, match="USER/NAME"):  # before anything is trained
        rcka.distill("digits", "resnet14", "resnet8", output=student / "out", push_to_hub="not a name!")
    weights = (student / "student.safetensors").read_bytes()
    (student / "student.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(ValueError, match="damaged"):
        push_to_hub(student, "someone/resnet8")
    assert not Hub.calls and not (student / "out").exists()
