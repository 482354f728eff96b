"`rcka.distill`: own networks on own images, what it leaves, and what it refuses."

import json
import warnings

import pytest
import torch
from PIL import Image

import rcka
from rcka.data.datasets import load_dataset
from rcka.models.sources import InputConfig, input_config
from rcka.models.student import save_student


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "A folder of images in the layout of a stranger's: three classes of digits, enlarged, as PNG."
    folder = tmp_path_factory.mktemp("photos")
    data = load_dataset("digits")
    for part, images, targets, n in (
        ("train", data.train_images, data.train_targets, 10),
        ("val", data.test_images, data.test_targets, 5),
    ):
        for c in range(3):
            (folder / part / f"class{c}").mkdir(parents=True)
            for i, image in enumerate(images[targets == c][:n]):
                Image.fromarray(image[0].numpy()).resize((40, 40)).save(folder / part / f"class{c}" / f"{i}.png")
    return folder


SMALL = dict(epochs=1, batch_size=16, device="cpu", workers=0, progress=False)


def test_a_folder_of_images(photos, tmp_path):
    "A teacher of 48 pixels with a normalisation of its own, a student of 32; what is left loads and is found again."
    torch.manual_seed(0)
    teacher = rcka.create_model("torchvision/shufflenet_v2_x0_5", 3)
    theirs = InputConfig((0.5,) * 3, (0.25,) * 3, 48, "bicubic")
    save_student(
        teacher, tmp_path / "teacher", "torchvision/shufflenet_v2_x0_5", classes=("a", "b", "c"), config=theirs
    )
    given = (photos, str(tmp_path / "teacher"), "rcka/resnet8", "kd+fcka")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(
            ValueError, match="features|stages|pairs|known"
        ):  # stages of other numbers are refused at once, with names
            rcka.distill(*given[:2], "torchvision/squeezenet1_0", "fcka", output=tmp_path / "no", size=32, **SMALL)
        results = rcka.distill(*given, output=tmp_path / "out", size=32, alone=True, **SMALL)
    left = {p.name for p in (tmp_path / "out").iterdir()}
    assert left >= {"student.safetensors", "student.json", "history.csv", "curves.png", "report.md", "distill.json"}
    assert results["student"]["parameters"] < results["teacher"]["parameters"] and results["alone"]
    student = rcka.load_student(tmp_path / "out")
    assert student.about["classes"] == ["class0", "class1", "class2"] and input_config(student).size == 32
    image = Image.open(next((photos / "val" / "class0").iterdir())).convert("RGB")
    assert student(rcka.student_transform(student)(image)[None]).shape == (1, 3)
    written = (tmp_path / "out" / "student.safetensors").stat().st_mtime_ns
    assert rcka.distill(*given, output=tmp_path / "out", size=32, alone=True, **SMALL) == results
    assert (tmp_path / "out" / "student.safetensors").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="epochs: 1 there, 2 here"):
        rcka.distill(*given, output=tmp_path / "out", size=32, alone=True, **SMALL | {"epochs": 2})


def test_a_run_that_was_stopped_goes_on(tmp_path, monkeypatch):
    "Stopped while the student trains; the second call neither trains the teacher again nor ends elsewhere."
    given = dict(
        data="digits", teacher="resnet14", student="resnet8", epochs=2, batch_size=64, device="cpu", progress=False
    )
    whole = rcka.distill(**given, output=tmp_path / "whole")
    from rcka.train.callbacks import Checkpoint

    seen, after = [], Checkpoint.after_epoch

    def stops(self, learner):
        after(self, learner)
        seen.append(learner.name)
        if len(seen) == 3:
            learner.stop("for the test")
            self.save(learner)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "after_epoch", stops)
        with pytest.raises(KeyboardInterrupt):
            rcka.distill(**given, output=tmp_path / "parts")
    assert seen == ["teacher", "teacher", "student"]
    parts = rcka.distill(**given, output=tmp_path / "parts")
    assert parts["student"]["top1"] == whole["student"]["top1"]
    assert (
        json.loads((tmp_path / "parts" / "student.json").read_text())["sha256"]
        == json.loads((tmp_path / "whole" / "student.json").read_text())["sha256"]
    )


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"teacher": "resnet14x"}, "did you mean"),
        ({"method": "kd+fckaa"}, "did you mean fcka"),
        ({"data": "digit"}, "did you mean digits"),
        ({"data": "no/folder"}, "there is no folder"),
        ({"epochs": 0}, "epochs must be"),
        ({"teacher_weights": "cifar100", "teacher": "resnet20"}, "for images of 3 channels"),
    ],
)
def test_bad_input_is_refused_before_training(changes, says, tmp_path):
    given = {
        "data": "digits",
        "teacher": "resnet14",
        "student": "resnet8",
        "epochs": 1,
        "device": "cpu",
        "progress": False,
    }
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        rcka.distill(**given | changes, output=tmp_path / "out")
    assert not (tmp_path / "out" / "distill.json").exists() and not list(tmp_path.rglob("metrics.csv"))


def test_bad_folders(photos, tmp_path):
    from shutil import copytree

    copytree(photos / "train", tmp_path / "a" / "train")
    with pytest.raises(ValueError, match="neither test/ nor val/"):
        rcka.distill(tmp_path / "a", "resnet18", "resnet8", output=tmp_path / "out", **SMALL)
    copytree(photos / "val" / "class0", tmp_path / "a" / "val" / "class9")
    with pytest.raises(ValueError, match="not in train: class9"):
        rcka.distill(tmp_path / "a", "resnet18", "resnet8", output=tmp_path / "out", **SMALL)
    for part in ("train", "val"):
        copytree(photos / part / "class0", tmp_path / "b" / part / "one")
    with pytest.raises(ValueError, match="has one class, one"):
        rcka.distill(tmp_path / "b", "resnet18", "resnet8", output=tmp_path / "out", **SMALL)


def test_a_teacher_of_other_classes_is_refused(photos, tmp_path):
    with pytest.raises(ValueError, match="the teacher gives 100 logits, the student 3"):
        rcka.distill(
            photos, "rcka/resnet20", "rcka/resnet8", output=tmp_path, size=32, teacher_weights="cifar100", **SMALL
        )
    assert not list(tmp_path.rglob("metrics.csv"))


def test_a_student_larger_than_its_teacher_is_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="more than its teacher"):
        rcka.distill("digits", "resnet8", "resnet14", "kd", 1, tmp_path, device="cpu", progress=False)
