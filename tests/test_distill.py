"`rcka.distill`: own networks on own images, what it leaves, and what it refuses."

import json
import warnings

import pytest
import torch
from PIL import Image
from torch import nn

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


CLASSES = ("class0", "class1", "class2")
SMALL = dict(epochs=1, batch_size=16, device="cpu", workers=0, progress=False)


def test_a_folder_of_images(photos, tmp_path):
    "A teacher of 48 pixels with a normalisation of its own, a student of 32; what is left loads and is found again."
    torch.manual_seed(0)
    teacher = rcka.create_model("torchvision/shufflenet_v2_x0_5", 3)
    theirs = InputConfig((0.5,) * 3, (0.25,) * 3, 48, "bicubic")
    save_student(teacher, tmp_path / "teacher", "torchvision/shufflenet_v2_x0_5", classes=CLASSES, config=theirs)
    given = (photos, str(tmp_path / "teacher"), "rcka/resnet8", "kd+fcka")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="stages=.-9,., but the network has 4 stages, at positions 0 to 3"):
            args = {"fcka.stages": [-9]}
            rcka.distill(*given, output=tmp_path / "no", size=32, method_args=args, **SMALL)
        assert not (tmp_path / "no").exists()  # what cannot begin leaves no folder
        results = rcka.distill(*given, output=tmp_path / "out", size=32, alone=True, **SMALL)
    left = {p.name for p in (tmp_path / "out").iterdir()}
    assert left >= {"student.safetensors", "student.json", "history.csv", "curves.png", "report.md", "distill.json"}
    assert results["student"]["parameters"] < results["teacher"]["parameters"] and results["alone"]
    student = rcka.load_student(tmp_path / "out")
    assert student.about["classes"] == ["class0", "class1", "class2"] and input_config(student).size == 32
    image = Image.open(next((photos / "val" / "class0").iterdir())).convert("RGB")
    assert student(rcka.student_transform(student)(image)[None]).shape == (1, 3)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| `kd+fcka`: `fcka.weight` | 16.0 |" in card and "torchvision/shufflenet_v2_x0_5" in card
    for name in ("README.md", "student.json"):  # what may be sent to others has no path of this machine
        assert str(tmp_path) not in (tmp_path / "out" / name).read_text(), name
        assert str(photos) not in (tmp_path / "out" / name).read_text(), name
    written = (tmp_path / "out" / "student.safetensors").stat().st_mtime_ns
    assert rcka.distill(*given, output=tmp_path / "out", size=32, alone=True, **SMALL) == results
    assert (tmp_path / "out" / "student.safetensors").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="epochs: 1 there, 2 here"):
        rcka.distill(*given, output=tmp_path / "out", size=32, alone=True, **SMALL | {"epochs": 2})


@pytest.mark.slow
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
    parts = rcka.distill(**given, output=tmp_path / "parts", export="torch")
    assert parts["student"]["top1"] == whole["student"]["top1"]
    assert (
        json.loads((tmp_path / "parts" / "student.json").read_text())["sha256"]
        == json.loads((tmp_path / "whole" / "student.json").read_text())["sha256"]
    )
    assert (tmp_path / "parts" / "student.pt2").is_file() and not (tmp_path / "whole" / "student.pt2").exists()


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"teacher": "resnet14x"}, "did you mean"),
        ({"method": "kd+fckaa"}, "did you mean fcka"),
        ({"data": "digit"}, "did you mean digits"),
        ({"data": "no/folder"}, "there is no folder"),
        ({"epochs": 0}, "epochs must be"),
        ({"lr": "high"}, "lr must be a number, got 'high'"),
        (
            {"student": torch.nn.Linear(2, 2)},
            "student must be a name, or a function .* got the network itself, a Linear",
        ),
        ({"teacher": lambda: 3}, "teacher must be a function at the top level of a module"),
        ({"size": 0}, "size must be a whole number of 1 or more"),
        ({"teacher": "runs/teacher"}, "no student in runs/teacher"),
        ({"preset": "deti"}, "did you mean deit"),
        ({"precision": "fp8"}, "precision must be one of .*bf16.* got 'fp8'"),
        ({"device": "cuda:99"}, "device='cuda:99' cannot be used here .*give cpu"),
        ({"device": "gpu"}, "device='gpu' cannot be used here"),
        (
            {"student_options": {"depth": 3}},
            "cannot create the student resnet8 with student_options={'depth': 3}.*no option depth",
        ),
        ({"mixupp": 0.2}, "did you mean mixup"),
        ({"mixup": -1}, "mixup must be"),
        ({"method": "dkd", "mixup": 0.2}, "method='dkd' .* mixup makes .* kd, dist"),
        ({"method": "kd+nkd", "preset": "torchvision-v2"}, "mixup and cutmix and label_smoothing make"),
        ({"teacher_weights": "cifar100", "teacher": "resnet20"}, "for images of 3 channels"),
        ({"teacher_weights": "no.safetensors"}, "no checkpoint at no.safetensors: give the path of a file"),
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
    with pytest.raises(ValueError, match="^b has one class, one"):
        rcka.distill(tmp_path / "b", "resnet18", "resnet8", output=tmp_path / "out", **SMALL)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="output must be a folder, but .*file is a file"):
        rcka.distill(photos, "resnet18", "resnet8", output=tmp_path / "file", **SMALL)


def test_a_broken_image(photos, tmp_path):
    "Named in the error with what to do; skipped if asked for, with a warning, in training and evaluation."
    from shutil import copytree

    copytree(photos, tmp_path / "photos")
    for part in ("train", "val"):
        (tmp_path / "photos" / part / "class1" / "3.png").write_bytes(b"no image")
    given = dict(SMALL, size=32, student="rcka/resnet8", teacher="rcka/resnet8", method="kd")
    with pytest.raises(ValueError, match=r"cannot decode .*class1/3.png .*repair or remove .*skip_broken=True"):
        rcka.distill(tmp_path / "photos", output=tmp_path / "a", **given)
    with pytest.warns(UserWarning, match="skipped an image that cannot be decoded: .*class1/3.png"):
        results = rcka.distill(tmp_path / "photos", output=tmp_path / "b", skip_broken=True, **given)
    assert 0 <= results["student"]["top1"] <= 100
    with pytest.raises(ValueError, match="skip_broken is for images in files, which digits has not"):
        rcka.distill("digits", "resnet8", "resnet8", output=tmp_path / "c", skip_broken=True)


def test_a_teacher_of_other_classes_is_refused(photos, tmp_path):
    with pytest.raises(ValueError, match="the teacher gives 100 logits, the student 3"):
        rcka.distill(
            photos, "rcka/resnet20", "rcka/resnet8", output=tmp_path, size=32, teacher_weights="cifar100", **SMALL
        )
    assert not list(tmp_path.rglob("metrics.csv"))


@pytest.mark.slow
def test_a_student_larger_than_its_teacher_is_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="more than the teacher"):
        rcka.distill("digits", "resnet8", "resnet14", "kd", 1, tmp_path, device="cpu", progress=False)


def test_teacher_and_student_see_the_same_crop(photos, tmp_path, monkeypatch):
    """A teacher of 224 pixels and a student of 96, each with its own normalisation.

    The pixels that both saw, taken back to values from 0 to 1: of training images one is the other, resized; of
    held-out images both are what torchvision's preset makes of the file."""
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms._presets import ImageClassification

    (tmp_path / "seeing_networks.py").write_text("""
from torch import nn
from rcka.models.sources import InputConfig
SEEN = {"teacher": [], "student": []}
CONFIG = {
    "teacher": InputConfig((0.5, 0.4, 0.3), (0.5, 0.25, 0.2), 224, "bicubic"),
    "student": InputConfig((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 96),
}
class Net(nn.Module):
    def __init__(self, who, num_classes):
        super().__init__()
        self.who, self.input_config = who, CONFIG[who]
        self.pool, self.head = nn.AdaptiveAvgPool2d(4), nn.Linear(48, num_classes)
    def forward(self, x):
        SEEN[self.who].append(x.detach().clone())
        return self.head(self.pool(x).flatten(1))
def teacher(num_classes): return Net("teacher", num_classes)
def student(num_classes): return Net("student", num_classes)
""")
    monkeypatch.syspath_prepend(tmp_path)
    import seeing_networks as made

    torch.manual_seed(0)
    rcka.save_weights(made.teacher(3), tmp_path / "teacher.safetensors")
    given = dict(SMALL, epochs=2, teacher_weights=str(tmp_path / "teacher.safetensors"), output=tmp_path / "out")
    rcka.distill(photos, made.teacher, "seeing_networks:student", "kd", **given)  # a function, or its name

    def pixels(who, n):
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in made.CONFIG[who][:2])
        return [x * std + mean for x in made.SEEN[who] if len(x) == n]

    theirs, ours = pixels("teacher", 16), pixels("student", 16)  # batches of training images
    assert len(theirs) == len(ours) >= 4 and not torch.equal(theirs[0], theirs[-1])  # another crop in each epoch
    for large, small in zip(theirs, ours):
        assert large.shape == (16, 3, 224, 224) and small.shape == (16, 3, 96, 96)
        torch.testing.assert_close(255 * large, (255 * large).round(), atol=1e-2, rtol=0)  # bytes, not resized again
        resized = torch.nn.functional.interpolate(large, (96, 96), mode="bilinear", antialias=True)
        torch.testing.assert_close(small, resized, atol=1e-5, rtol=0)
    files = sorted((photos / "val").rglob("*.png"))
    images = [decode_image(str(path), mode=ImageReadMode.RGB) for path in files]
    for who, size, resize in (("teacher", 224, 256), ("student", 96, 110)):
        mean, std = made.CONFIG[who][:2]
        preset = ImageClassification(crop_size=size, resize_size=resize, mean=mean, std=std, antialias=True)
        seen = [x for x in made.SEEN[who] if len(x) == 15][-1]  # of the student: as it was saved
        level = 1.01 / 255 / min(std)  # two ways of resizing bytes round differently
        torch.testing.assert_close(seen, torch.stack([preset(image) for image in images]), atol=level, rtol=0)


def test_weights_of_torchvision_say_what_they_want_to_see(monkeypatch):
    "From the library's own description; the file of the weights is not fetched."
    import torchvision

    fresh = torchvision.models.efficientnet_b0(num_classes=1000).state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *args, **kw: fresh)
    model = rcka.create_model("torchvision/efficientnet_b0", None, weights="pretrained")
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert input_config(model) == InputConfig(*(tuple(v) for v in imagenet), 224, "bicubic")
    with torch.device("meta"):
        assert input_config(rcka.create_model("torchvision/vit_b_16", 3)) == InputConfig(size=224)


@pytest.fixture
def loose(photos, tmp_path):
    "The photographs without classes: train/*.png and val/*.png; and a student of three classes that serves as teacher."
    for part in ("train", "val"):
        (tmp_path / "loose" / part).mkdir(parents=True)
        for path in sorted((photos / part).rglob("*.png")):
            (tmp_path / "loose" / part / f"{path.parent.name}-{path.name}").write_bytes(path.read_bytes())
    torch.manual_seed(0)
    save_student(rcka.create_model("resnet20", 3), tmp_path / "teacher", "resnet20", classes=CLASSES)
    return tmp_path / "loose", str(tmp_path / "teacher")


@pytest.mark.slow
def test_without_labels(loose, tmp_path):
    "Features alone give an encoder, logits a classifier of the teacher's classes; the loss has no cross-entropy."
    import csv

    data, teacher = loose
    encoder = rcka.distill(data, teacher, "rcka/resnet8", "fcka", output=tmp_path / "a", size=32, **SMALL)
    assert encoder["student"]["top1"] is None and -100 <= encoder["student"]["cka"] <= 100
    student = rcka.load_student(tmp_path / "a")
    assert student.about["classes"] == [] and student(torch.zeros(2, 3, 32, 32)).shape == (2, 64)
    found = rcka.distill(data, teacher, "rcka/resnet8", "kd", output=tmp_path / "b", size=32, mixup=0.2, **SMALL)
    assert 0 <= found["student"]["agreement"] <= 100
    assert rcka.load_student(tmp_path / "b").about["classes"] == list(CLASSES)
    for name in ("a", "b"):
        with open(tmp_path / name / "history.csv", newline="") as f:
            assert "ce" not in next(csv.DictReader(f))
        assert "no cross-entropy" in (tmp_path / name / "README.md").read_text()
        assert "no cross-entropy" in (tmp_path / name / "report.md").read_text()


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"method": "dkd"}, "method='dkd' cannot be used .* no labels.* fcka"),
        ({"method": "crd"}, "method='crd' cannot be used .* no labels"),
        ({"method": "none"}, "method='none' cannot be used .* no term of its own"),
        ({"alone": True}, "alone=True trains the student on labels"),
        ({"teacher": "rcka/resnet20"}, "no labels to train a teacher on"),
    ],
)
def test_what_needs_labels_is_refused_before_training(changes, says, loose, tmp_path):
    data, teacher = loose
    given = {"teacher": teacher, "student": "rcka/resnet8", "method": "fcka", "size": 32, "output": tmp_path / "out"}
    with pytest.raises(ValueError, match=says):
        rcka.distill(data, **given | changes, **SMALL)
    assert not list(tmp_path.rglob("metrics.csv")) and not (tmp_path / "out" / "distill.json").exists()


def test_a_teacher_of_other_classes(photos, loose, tmp_path):
    "Features can be compared, with cross-entropy; logits cannot, not even where their number is the same."
    import csv

    given = dict(student="rcka/resnet8", size=32, output=tmp_path / "out", **SMALL)
    results = rcka.distill(photos, "rcka/resnet20", method="sp", teacher_weights="cifar100", **given)
    assert results["teacher"]["top1"] is None and results["student"]["top1"] >= 0
    with open(tmp_path / "out" / "history.csv", newline="") as f:
        assert {"ce", "sp"} <= set(next(csv.DictReader(f)))
    torch.manual_seed(0)
    others = ("newt", "owl", "pike")
    save_student(rcka.create_model("resnet20", 3), tmp_path / "others", "resnet20", classes=others)
    with pytest.raises(ValueError, match="has other classes .newt, owl, pike.* method='kd'"):
        rcka.distill(photos, str(tmp_path / "others"), method="kd", **given | {"output": tmp_path / "no"})


@pytest.mark.slow
def test_augmented_to_the_end(tmp_path):
    "All of it at once with methods on features and logits, a preset, and a run that is done is found again."
    given = dict(epochs=1, batch_size=64, device="cpu", progress=False, output=tmp_path / "out", preset="deit")
    results = rcka.distill("digits", "resnet14", "resnet8", "kd+fcka+dist", **given)
    assert results["student"]["top1"] > 0
    assert rcka.distill("digits", "resnet14", "resnet8", "kd+fcka+dist", **given) == results
    with pytest.raises(ValueError, match="preset: 'deit' there, 'crd' here"):
        rcka.distill("digits", "resnet14", "resnet8", "kd+fcka+dist", **given | {"preset": "crd"})
    log = json.loads((tmp_path / "out" / "distill.json").read_text())
    assert log["settings"]["epochs"] == 1


def test_the_rows_of_a_report_are_one_table():
    "With an average and a student alone as well."
    from rcka.distillation import report

    net = {"network": "resnet8", "top1": 50.0, "parameters": 8, "flops": 1e9, "megabytes": 1.0, "milliseconds": 1.0}
    results = {"teacher": net, "student": net | {"last_step_top1": 49.0}, "alone": {"top1": 40.0}, "device": "CPU"}
    settings = {"method": "kd", "data": "digits", "epochs": 1, "precision": "fp32"}
    lines = report(settings, results, False, {"decay": 0.9, "every": 1}).splitlines()
    rows = [i for i, line in enumerate(lines) if line.startswith("|")]
    assert len(rows) == 5 and rows == list(range(rows[0], rows[0] + 5)) and "alone" in lines[rows[-1]]


def test_presets_are_the_published_recipes():
    "What the sources say, at their own batch size; the rate is in proportion, and what is given counts more."
    from rcka.distillation import PRESETS, recipe

    assert {name: (p.epochs, p.batch_size) for name, p in PRESETS.items()} == {
        "crd": (240, 64),
        "torchvision-v2": (600, 1024),
        "deit": (300, 1024),
    }
    from rcka.train.config import TrainConfig

    crd = recipe("crd", 64, {})
    assert not any("precision" in p.fields for p in PRESETS.values())  # no recipe depends on one
    assert TrainConfig(**crd) == TrainConfig()  # the protocol of Tian et al. is the default
    deit = recipe("deit", 512, {"erasing": 0})
    assert (deit["lr"], deit["mixup"], deit["cutmix"], deit["erasing"]) == (5e-4, 0.8, 1.0, 0)
    modern = recipe("torchvision-v2", 1024, {})
    assert (modern["lr"], modern["weight_decay"], modern["label_smoothing"], modern["mixup"]) == (0.5, 2e-5, 0.1, 0.2)


def test_the_average_of_a_preset_is_that_of_torchvision():
    "Its formula at its own size; on fewer images as many averages in an epoch, and the same part of the run in them."
    from rcka.distillation import IMAGENET, PRESETS, scaled_ema

    assert {name for name, p in PRESETS.items() if p.ema} == {"torchvision-v2"}  # DeiT and CRD average nothing
    ema = PRESETS["torchvision-v2"].ema
    for batch, epochs in ((1024, 600), (256, 90)):
        adjust = 1 * batch * 32 / epochs  # world_size * batch_size * model_ema_steps / epochs
        decay, every = scaled_ema(ema, IMAGENET, IMAGENET / batch, epochs)
        adjust *= every / 32
        assert decay == pytest.approx(1 - min(1, (1 - 0.99998) * adjust), rel=1e-9)
    assert scaled_ema(ema, IMAGENET, IMAGENET / 1024, 600)[1] == 32
    whole = [
        (1 - d) * epochs * updates / k
        for images, updates, epochs in ((IMAGENET, IMAGENET / 1024, 600), (5000, 79, 20))
        for d, k in [scaled_ema(ema, images, updates, epochs)]
    ]
    assert whole[0] == pytest.approx(whole[1])


@pytest.mark.slow
def test_a_precision_is_chosen_once_and_kept(tmp_path, monkeypatch):
    "As another machine, which would choose another one, goes on with a folder; scores are those of what is shipped."
    from rcka import distillation
    from rcka.train.checkpoint import last_checkpoint
    from rcka.train.classification import evaluate

    given = dict(
        data="digits", teacher="resnet8", student="resnet8", method="kd", epochs=1, device="cpu", progress=False
    )
    asked = []
    monkeypatch.setattr(distillation, "auto_precision", lambda device: asked.append(device) or "bf16")
    results = rcka.distill(**given, output=tmp_path / "a")
    about = json.loads((tmp_path / "a" / "student.json").read_text())
    assert asked == ["cpu"] and about["made_by"]["settings"]["precision"] == "bf16"
    for who in ("teacher", "student"):
        state = last_checkpoint(tmp_path / "a" / who)
        assert state["config"]["precision"] == "bf16" and state["setting"]["channels_last"]
    student = rcka.load_student(tmp_path / "a")
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    data = load_dataset("digits")
    assert evaluate(student, data.batches(train=False)).top1 == results["student"]["top1"]
    assert "1 epochs in bf16, scores in fp32" in (tmp_path / "a" / "report.md").read_text()

    monkeypatch.setattr(distillation, "auto_precision", lambda device: "fp32")
    assert rcka.distill(**given, output=tmp_path / "a") == results
    with pytest.raises(ValueError, match="precision: 'bf16' there, 'fp32' here"):
        rcka.distill(**given, precision="fp32", output=tmp_path / "a")
    log = tmp_path / "a" / "distill.json"
    log.write_text(json.dumps(json.loads(log.read_text()) | {"results": None}))  # as if it had been stopped
    again = rcka.distill(**given, output=tmp_path / "a")
    assert again["student"]["top1"] == results["student"]["top1"]

    rcka.distill(**given, output=tmp_path / "b")
    assert not last_checkpoint(tmp_path / "b" / "student")["setting"]["channels_last"]
    crd = distillation.PRESETS["crd"]
    named = crd._replace(epochs=1, fields=crd.fields | {"precision": "bf16"})
    monkeypatch.setitem(distillation.PRESETS, "crd", named)
    rcka.distill(**given, preset="crd", output=tmp_path / "c")
    assert last_checkpoint(tmp_path / "c" / "student")["config"]["precision"] == "bf16"


@pytest.mark.slow
def test_what_is_shipped_is_the_average(tmp_path):
    "It is what is evaluated and saved; the report says so, and what the last step's weights score."
    from safetensors.torch import load_file

    given = dict(teacher="resnet8", student="resnet8", method="kd", epochs=2, device="cpu", progress=False)
    results = rcka.distill("digits", preset="torchvision-v2", output=tmp_path / "a", **given)
    shipped, averaged, last = (
        load_file(tmp_path / "a" / name)
        for name in ("student.safetensors", "student/ema.safetensors", "student/last.safetensors")
    )
    assert all(torch.equal(shipped[k], averaged[k]) for k in averaged)
    assert not all(torch.equal(shipped[k], last[k]) for k in last)
    from rcka.train.classification import evaluate

    student = rcka.load_student(tmp_path / "a")
    data = load_dataset("digits")
    data = type(data)(**vars(data) | {"mean": student.input_config.mean, "std": student.input_config.std})
    assert evaluate(student, data.batches(train=False)).top1 == pytest.approx(results["student"]["top1"])
    assert results["student"]["last_step_top1"] >= 0
    for name in ("report.md", "README.md"):
        assert "exponential average along training (decay" in (tmp_path / "a" / name).read_text()
    assert f"{results['student']['last_step_top1']:.2f}" in (tmp_path / "a" / "report.md").read_text()
    assert rcka.distill("digits", preset="torchvision-v2", output=tmp_path / "a", **given) == results
    plain = rcka.distill("digits", ema=0, preset="torchvision-v2", output=tmp_path / "b", **given)
    assert "last_step_top1" not in plain["student"] and not list((tmp_path / "b").rglob("ema.safetensors"))
    with pytest.raises(ValueError, match="decay must be at least 0 and below 1"):
        rcka.distill("digits", ema=1.5, output=tmp_path / "c", **given)


@pytest.mark.slow
def test_an_encoder_of_timm_teaches_without_labels(loose, tmp_path):
    "As those of DINO and CLIP: no classifier, tokens, a normalisation of its own, weights from a file."
    pytest.importorskip("timm")
    torch.manual_seed(0)
    data, options = loose[0], {"img_size": 32, "patch_size": 8}
    encoder = rcka.create_model("timm/vit_tiny_patch16_224", 0, **options)
    rcka.save_weights(encoder, tmp_path / "encoder.safetensors")
    given = dict(teacher_weights=str(tmp_path / "encoder.safetensors"), teacher_options=options, size=48, **SMALL)
    found = rcka.distill(
        *(data, "timm/vit_tiny_patch16_224", "rcka/resnet8", "sp"),
        output=tmp_path / "out",
        method_args={"stages": "pooled"},
        **given,
    )
    assert -100 <= found["student"]["cka"] <= 100
    student = rcka.load_student(tmp_path / "out")
    assert student(torch.zeros(2, 3, 48, 48)).shape == (2, 64) and input_config(student).size == 48


@pytest.mark.slow
def test_features_by_their_paths(tmp_path, monkeypatch):
    "Paths are kept in the results; one that is not there is refused with its neighbours, before anything is written."
    asked, compiled = nn.Module.compile, []

    def without_a_compiler(net, **options):
        compiled.append(net)
        asked(net, backend="eager")

    monkeypatch.setattr(nn.Module, "compile", without_a_compiler)
    given = dict(data="digits", teacher="resnet14", student="resnet8", method="fcka", **SMALL)
    with pytest.raises(ValueError, match="layer2.0"):
        rcka.distill(**given, output=tmp_path / "no", student_paths=["layer9.0"], teacher_paths=["layer2.0"])
    with pytest.raises(ValueError, match="equally many paths"):
        rcka.distill(**given, output=tmp_path / "no", student_paths=["layer1", "layer2"], teacher_paths=["layer2"])
    assert not (tmp_path / "no").exists()
    paths = dict(student_paths=["layer1.0", "layer2.0"], teacher_paths=["layer1.1", "layer2.1"])
    found = rcka.distill(**given, output=tmp_path / "out", compile=True, **paths)
    assert len(compiled) >= 2 and found["student"]["flops"] > 0
    settings = json.loads((tmp_path / "out" / "distill.json").read_text())["settings"]
    assert {name: settings[name] for name in paths} == paths and settings["compile"]
    assert rcka.load_student(tmp_path / "out")(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    with pytest.raises(ValueError, match="teacher_paths: "):
        rcka.distill(**given, output=tmp_path / "out", compile=True, **(paths | {"teacher_paths": ["layer1.1"]}))


@pytest.mark.slow
def test_grey_images_and_a_network_described_for_colours(tmp_path):
    "timm's description has three channels whatever the network reads; the digits get the mean of the three."
    pytest.importorskip("timm")
    given = dict(
        epochs=1, batch_size=256, device="cpu", progress=False, student_options={"img_size": 8, "patch_size": 4}
    )
    rcka.distill("digits", "resnet8", "timm/vit_tiny_patch16_224", "kd", output=tmp_path, **given)
    assert input_config(rcka.load_student(tmp_path)).mean == (0.5,)
