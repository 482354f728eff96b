"Loaders of one's own: what `rcka.distill` takes, what it makes of them, and what it refuses."

import json
import sys

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

import rcka
from rcka.core import as_batches, unpack_batch
from rcka.data.datasets import load_dataset
from rcka.data.loaders import open_loaders
from rcka.models.sources import InputConfig, input_config
from rcka.models.student import save_student
from rcka.train.callbacks import Checkpoint

MEAN, STD = [0.3], [0.35]
SMALL = dict(epochs=1, device="cpu", progress=False)


def digits(mean=MEAN, std=STD, batch_size=32, n=200, drop_last=False):
    "Loaders of scikit-learn's digits, normalised."
    data = load_dataset("digits", limit=n, test_limit=100)
    parts = [
        TensorDataset((images / 255 - mean[0]) / std[0], targets)
        for images, targets in ((data.train_images, data.train_targets), (data.test_images, data.test_targets))
    ]
    return DataLoader(parts[0], batch_size, shuffle=True, drop_last=drop_last), DataLoader(parts[1], 50)


def plain():
    return (*digits(), {"mean": MEAN, "std": STD, "classes": [f"digit {i}" for i in range(10)]})


def dicts():
    "The same as dicts, as of `datasets` and transformers."

    class Dicts(torch.utils.data.Dataset):
        def __init__(self, dataset):
            self.dataset = dataset

        def __len__(self):
            return len(self.dataset)

        def __getitem__(self, i):
            image, target = self.dataset[i]
            return {"pixel_values": image, "labels": target}

    return (*(DataLoader(Dicts(loader.dataset), 32) for loader in digits()), {"classes": range(10)})


def mixed():
    "Training targets are class probabilities, mixed in the loader."
    from torchvision.transforms import v2

    mix, (train, val) = v2.MixUp(alpha=0.2, num_classes=10), digits()
    collate = lambda rows: mix(*torch.utils.data.default_collate(rows))
    return DataLoader(train.dataset, 32, shuffle=True, collate_fn=collate), val


def unlabelled():
    "Images alone."
    train, val = (loader.dataset.tensors[0] for loader in digits())
    return DataLoader(train, 32, shuffle=True), DataLoader(val, 32), {"mean": MEAN, "std": STD}


def one_is_left():
    "The last training batch has one image."
    return digits(batch_size=32, n=193)


HERE = __name__


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setitem(sys.modules, "my_loaders", sys.modules[HERE])


@pytest.mark.filterwarnings("ignore:.*does not say how")
@pytest.mark.parametrize(
    "factory, method", [("plain", "kd+fcka"), ("dicts", "fcka"), ("mixed", "kd"), ("one_is_left", "fcka")]
)
def test_distilled_to_the_end(factory, method, tmp_path):
    given = dict(SMALL, data=f"my_loaders:{factory}", teacher="resnet8", student="resnet8", method=method)
    results = rcka.distill(**given, output=tmp_path / "out")
    assert results["student"]["top1"] >= 0 and results["teacher"]["top1"] is not None
    assert rcka.distill(**given, output=tmp_path / "out") == results
    settings = json.loads((tmp_path / "out" / "distill.json").read_text())["settings"]
    assert settings["data"] == f"my_loaders:{factory}" and settings["batch_size"] is None


def test_what_is_shipped_normalises_as_the_loader(tmp_path):
    """Classes and constants are the factory's; the score is that of the saved student on its own preprocessing; exports
    agree."""
    from torchvision.transforms.v2.functional import to_pil_image

    results = rcka.distill(
        plain_of_module(), "resnet8", "resnet8", "kd", output=tmp_path, export="torch", **SMALL | {"epochs": 3}
    )
    student = rcka.load_student(tmp_path)
    assert student.about["classes"][3] == "digit 3" and input_config(student) == InputConfig((0.3,), (0.35,), 8)
    data, transform = load_dataset("digits", limit=200, test_limit=100), rcka.student_transform(student)
    with torch.no_grad():
        logits = student(torch.stack([transform(to_pil_image(image)) for image in data.test_images]))
    assert abs(100 * (logits.argmax(1) == data.test_targets).float().mean().item() - results["student"]["top1"]) < 1e-3
    assert (tmp_path / "student.pt2").is_file()


def plain_of_module():
    "The function itself, which is found again by its name."
    return sys.modules["my_loaders"].plain


def test_a_teacher_sees_its_own_normalisation(tmp_path):
    "The teacher of a folder normalises otherwise; its score is that which it has on its own images."
    torch.manual_seed(0)
    teacher = rcka.create_model("resnet8", 10, 1)
    config = InputConfig((0.5,), (0.25,), 8)
    save_student(
        teacher,
        tmp_path / "teacher",
        "resnet8",
        classes=[f"digit {i}" for i in range(10)],
        config=config,
        in_channels=1,
    )
    results = rcka.distill(
        "my_loaders:plain", str(tmp_path / "teacher"), "resnet8", "kd", output=tmp_path / "out", **SMALL
    )
    from rcka.train.classification import evaluate

    own = evaluate(rcka.load_student(tmp_path / "teacher"), digits((0.5,), (0.25,))[1])
    assert results["teacher"]["top1"] == pytest.approx(own.top1)
    with pytest.raises(
        ValueError, match="does not say how its images are normalised, and the weights of the teacher are for mean"
    ):
        rcka.distill("my_loaders:dicts", str(tmp_path / "teacher"), "resnet8", "fcka", output=tmp_path / "no", **SMALL)


@pytest.mark.slow
def test_without_labels(tmp_path):
    torch.manual_seed(0)
    save_student(
        rcka.create_model("resnet14", 10, 1),
        tmp_path / "teacher",
        "resnet14",
        classes=list("abcdefghij"),
        in_channels=1,
    )
    results = rcka.distill(
        "my_loaders:unlabelled", str(tmp_path / "teacher"), "resnet8", "kd", output=tmp_path / "out", **SMALL
    )
    assert results["student"]["top1"] is None and 0 <= results["student"]["agreement"] <= 100


@pytest.mark.slow
def test_an_interrupted_run_goes_on_from_the_start_of_its_epoch(tmp_path, monkeypatch):
    "Stopped in the second epoch: the same bits as unbroken, since an epoch's order depends on the seed and the epoch."
    given = dict(SMALL, data="my_loaders:plain", teacher="resnet8", student="resnet8", method="kd", epochs=3, mixup=0.2)
    whole = rcka.distill(**given, output=tmp_path / "whole")
    steps, after = [], Checkpoint.after_step

    def stops(self, learner):
        after(self, learner)
        steps.append((learner.name, learner.epoch, learner.step))
        if steps[-1] == ("student", 1, 3):
            learner.stop("for the test")

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "after_step", stops)
        with pytest.raises(KeyboardInterrupt):
            rcka.distill(**given, output=tmp_path / "parts")
    monkeypatch.setattr(
        Checkpoint,
        "after_step",
        lambda self, learner: (after(self, learner), steps.append((learner.name, learner.epoch, learner.step)))[0],
    )
    parts = rcka.distill(**given, output=tmp_path / "parts")
    resumed = steps[steps.index(("student", 1, 3)) + 1 :]
    assert (
        resumed[0][0] == "student" and resumed[0][2] == 1
    )  # the first step of an epoch, the second where it was saved
    assert parts["student"]["top1"] == whole["student"]["top1"]
    digests = [json.loads((tmp_path / name / "student.json").read_text())["sha256"] for name in ("whole", "parts")]
    assert digests[0] == digests[1]


def returns(*found):
    "Return a factory of these."
    return found if len(found) != 1 else found[0]


class Endless(IterableDataset):
    def __iter__(self):
        yield from ()


def images(n=16, channels=1, **kw):
    return torch.rand(n, channels, 8, 8, **kw)


def pair(x, y, batch_size=8):
    return DataLoader(TensorDataset(x, y), batch_size)


CLASSES = torch.arange(16) % 2
GOOD = lambda: pair(images(), CLASSES)
BAD = {
    "one loader": (lambda: GOOD(), TypeError, r"must return \(train, val\), two DataLoaders"),
    "numbers": (lambda: (1, 2), TypeError, "a length and an iterator"),
    "unknown key": (lambda: (GOOD(), GOOD(), {"clases": []}), ValueError, "did you mean classes"),
    "mean alone": (lambda: (GOOD(), GOOD(), {"mean": [0.5]}), ValueError, "both mean and std"),
    "three means": (lambda: (GOOD(), GOOD(), {"mean": [0.5] * 3, "std": [1] * 3}), ValueError, "for each of 1 channel"),
    "std of zero": (lambda: (GOOD(), GOOD(), {"mean": [0.5], "std": [0]}), ValueError, "std positive"),
    "no length": (lambda: (DataLoader(Endless()), GOOD()), TypeError, "IterableDataset"),
    "bytes": (
        lambda: (pair(images().mul(255).byte(), CLASSES), GOOD()),
        TypeError,
        "training loader .* float images .*uint8",
    ),
    "not finite": (lambda: (pair(images() / 0 - images() / 0, CLASSES), GOOD()), ValueError, "NaN or infinity"),
    "one image": (lambda: (pair(images(), CLASSES, 1), GOOD()), ValueError, r"1 image\(s\) in its first batch"),
    "no batch": (
        lambda: (DataLoader(GOOD().dataset, 32, drop_last=True), GOOD()),
        ValueError,
        "no batches; is its dataset",
    ),
    "other shapes": (lambda: (GOOD(), pair(torch.rand(16, 1, 9, 9), CLASSES)), ValueError, "they must agree"),
    "targets too high": (
        lambda: (GOOD(), pair(images(), CLASSES + 1)),
        ValueError,
        "validation loader .* targets 1 to 2, but there are 2",
    ),
    "real targets": (
        lambda: (pair(images(), CLASSES.float()), GOOD(), {"classes": "ab"}),
        ValueError,
        "must yield classes, integers",
    ),
    "soft validation": (
        lambda: (GOOD(), pair(images(), torch.eye(2)[CLASSES])),
        ValueError,
        "validation loader .* integers",
    ),
    "labels in one": (lambda: (GOOD(), DataLoader(images(), 8)), ValueError, "only one of the loaders yields targets"),
    "one class": (lambda: (pair(images(), 0 * CLASSES), GOOD()), ValueError, "has one class, 0"),
    "three values": (
        lambda: (DataLoader(TensorDataset(images(), CLASSES, CLASSES), 8), GOOD()),
        TypeError,
        "a tuple of 3|a list of 3",
    ),
    "other keys": (lambda: ([{"x": images(), "y": CLASSES}], GOOD()), TypeError, "a dict with x, y"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused(name, monkeypatch, tmp_path):
    factory, kind, says = BAD[name]
    monkeypatch.setattr(sys.modules["my_loaders"], "bad", factory, raising=False)
    with pytest.raises(kind, match=says):
        rcka.distill("my_loaders:bad", "resnet8", "resnet8", "kd", output=tmp_path / "out", **SMALL)
    assert not list(tmp_path.rglob("metrics.csv")) and not (tmp_path / "out" / "distill.json").exists()


@pytest.mark.parametrize(
    "changes, kind, says",
    [
        ({"data": "my_loaders:plian"}, ValueError, "did you mean plain"),
        ({"data": "no_such_module:loaders"}, ImportError, "no module no_such_module"),
        ({"batch_size": 32}, ValueError, "have a batch size of their own"),
        ({"data": lambda: 0}, ValueError, "function at the top level of a module"),
        ({"data": "my_loaders:mixed", "mixup": 0.2}, ValueError, "give class probabilities: mixup"),
        (
            {"data": "my_loaders:mixed", "method": "dkd"},
            ValueError,
            "method='dkd' .* the loaders make the targets class prob",
        ),
        (
            {"data": "my_loaders:dicts", "augment": "randaugment"},
            ValueError,
            "needs the mean and std",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*does not say how")
def test_settings_that_do_not_fit(changes, kind, says, tmp_path):
    given = dict(data="my_loaders:plain", teacher="resnet8", student="resnet8", method="kd", output=tmp_path / "out")
    with pytest.raises(kind, match=says):
        rcka.distill(**SMALL | given | changes)
    assert not list(tmp_path.rglob("metrics.csv"))


def test_batches_are_unpacked():
    x, y = images(4), CLASSES[:4]
    for found in ((x, y), [x, y], {"image": x, "label": y}, {"img": x, "target": y, "id": 3}):
        assert all(a is b for a, b in zip(unpack_batch(found), (x, y)))
    for found in (x, (x,), {"pixel_values": x}):
        assert unpack_batch(found) == (x, None) or unpack_batch(found)[1] is None
    with pytest.raises(TypeError, match="got a NoneType"):
        unpack_batch(None)


def test_targets_of_a_part_of_a_dataset(monkeypatch):
    "As of `random_split`; classes are those of the whole."
    whole = TensorDataset(images(), CLASSES)
    whole.classes = ["even", "odd"]
    part = Subset(Subset(whole, range(2, 14)), [1, 3, 5, 7, 2])
    loader = DataLoader(part, 5)
    assert as_batches(loader, torch.device("cpu")).targets.tolist() == [1, 1, 1, 1, 0]
    monkeypatch.setattr(sys.modules["my_loaders"], "parts", lambda: (loader, loader), raising=False)
    assert open_loaders("my_loaders:parts").classes == ("even", "odd")


def test_looking_at_loaders_draws_nothing(tmp_path):
    "Random numbers of the caller are as they were."
    torch.manual_seed(7)
    before = torch.get_rng_state()
    open_loaders("my_loaders:mixed")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
def test_on_the_command_line(tmp_path):
    "A module of the working directory; its student loads without it."
    import subprocess

    (tmp_path / "photos.py").write_text("""
import torch
from torch.utils.data import DataLoader, TensorDataset
def loaders():
    g = torch.Generator().manual_seed(0)
    images, targets = torch.rand(48, 3, 8, 8, generator=g), torch.arange(48) % 3
    dataset = TensorDataset(images + targets.view(-1, 1, 1, 1), targets)
    return DataLoader(dataset, 16, shuffle=True), DataLoader(dataset, 16), {"mean": [0, 0, 0], "std": [1, 1, 1]}
""")
    command = "distill --data photos:loaders --teacher resnet8 --student resnet8 --epochs 1 --device cpu --output out"
    done = subprocess.run(
        [sys.executable, "-m", "rcka", *command.split()], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "student: top-1, %:" in done.stdout
    assert rcka.load_student(tmp_path / "out").about["classes"] == ["0", "1", "2"]
