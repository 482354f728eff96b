"Images from files, in batches that worker processes decode; runs on them."

import os
import shutil
import signal
import sys
import urllib.error
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from processes import launch
from sklearn.datasets import load_sample_image
from torch import nn
from torchvision import datasets, models
from torchvision.transforms import v2

from rcka import create_method
from rcka.core import BatchesFailed, FeaturePaths
from rcka.data import imagenet
from rcka.data.datasets import list_datasets, load_dataset, main
from rcka.data.imagenet import Decoder, FileBatches, chance, decode, list_files, load_imagenet
from rcka.distributed import init_distributed, rank, shard
from rcka.experiments.experiment import Experiment, run
from rcka.experiments.launch import parse
from rcka.methods.features import paper_args
from rcka.models.registry import create_model
from rcka.train.classification import Distiller
from rcka.train.config import TrainConfig
from rcka.train.learner import Trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:The image decoding and encoding:DeprecationWarning", "ignore:This DataLoader will create:UserWarning"
)
REPO = Path(__file__).resolve().parents[1]
PHOTOS = [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]


def make_folder(base, train=10, val=3, classes=4):
    "Pieces of two photographs, JPEG: even classes of the one, odd ones of the other."
    rng = np.random.default_rng(0)
    for c in range(classes):
        for where, n in (("train", train), ("val", val)):
            folder = Path(base, where, f"n{c:02}")
            folder.mkdir(parents=True)
            for i in range(n):
                photo, (h, w) = PHOTOS[c % 2], rng.integers(50, 90, 2)
                y, x = rng.integers(0, photo.shape[0] - h), rng.integers(0, photo.shape[1] - w)
                Image.fromarray(photo[y : y + h, x : x + w]).save(folder / f"n{c:02}_{i}.JPEG", quality=90)
    return Path(base)


@pytest.fixture(autouse=True)
def workers_end(monkeypatch):
    """End the workers of each test: a loader that is collected as part of a reference cycle waits 5 s for each of its
    own."""
    made, real = [], imagenet._loader
    monkeypatch.setattr(imagenet, "_loader", lambda *args, **how: made.append(real(*args, **how)) or made[-1])
    yield
    for loader in made:
        if loader.num_workers and loader._iterator is not None:
            loader._iterator._shutdown_workers()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data") / "imagenet")


def batches(folder, train=True, **how):
    return load_imagenet(folder, size=32).batches(
        how.pop("batch_size", 7), train=train, **{"workers": 0, "seed": 3, **how}
    )


def same(a, b):
    return all(torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))


# files


def test_listing_is_that_of_torchvision(folder):
    classes, files = list_files(folder / "train")
    theirs = datasets.ImageFolder(folder / "train")
    assert list(classes) == theirs.classes
    assert [(files.path(i), t) for i, t in enumerate(files.targets.tolist())] == theirs.samples


def test_what_is_no_image_is_passed_over(tmp_path):
    base = make_folder(tmp_path, 2, 1, 2)
    for name in ("notes.txt", ".hidden.JPEG", "n00_0.JPEG.part"):
        (base / "train" / "n00" / name).write_text("x")
    (base / "train" / "README").write_text("x")
    (base / "train" / ".cache").mkdir()
    assert len(list_files(base / "train")[1]) == 4


def test_names_that_are_not_text(tmp_path):
    base = make_folder(tmp_path, 1, 1, 1)
    os.rename(base / "train/n00/n00_0.JPEG", os.fsencode(base / "train/n00") + b"/caf\xe9 \xff.JPEG")
    _, files = list_files(base / "train")
    assert decode(files.path(0)).shape[0] == 3


def test_folders_that_are_not_as_they_should_be(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="image-net.org"):
        load_imagenet("nothing", root=tmp_path)
    base = make_folder(tmp_path / "a", 2, 1, 2)
    os.rename(base / "val", base / "elsewhere")
    with pytest.raises(FileNotFoundError, match="no folder val/.*val='train'"):
        load_imagenet(base)
    assert "evaluated on the training images" in repr(load_imagenet(base, val="train"))
    (base / "val").mkdir()
    Image.new("RGB", (9, 9)).save(base / "val" / "ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(ValueError, match="It has 1 images outside of class folders"):
        load_imagenet(base)
    (base / "val" / "n00").mkdir()
    with pytest.raises(ValueError, match="no images in n00"):
        load_imagenet(base)
    os.rename(base / "val" / "ILSVRC2012_val_00000001.JPEG", base / "val" / "n00" / "1.JPEG")
    with pytest.raises(ValueError, match="only in train: n01"):
        load_imagenet(base)
    for name in ("batch_size", "workers"):
        with pytest.raises(ValueError, match=name):
            batches(folder, **{name: -1})
    with pytest.raises(ValueError, match="too few for a training batch"):
        load_imagenet(folder, limit=2).batches(64)


def test_by_name(folder, capsys):
    root = folder.parent
    (there,) = [d for d in list_datasets(root) if "imagenet" in d.name]
    assert there.name == "imagenet" and there.there
    data = load_dataset("imagenet", root)
    assert (data.shape, len(data.train), len(data.test), data.num_classes) == ((3, 224, 224), 40, 12, 4)
    assert load_dataset(f"imagenet:{folder}", "nowhere", limit=8, size=64).train.targets.tolist() == [
        0,
        0,
        1,
        1,
        2,
        2,
        3,
        3,
    ]
    assert main(["imagenet", "--root", str(root)]) == 0
    assert "40 training images in 4 classes, 12 test images; seen at 224 x 224" in capsys.readouterr().out
    with pytest.raises(ValueError, match="unknown dataset"):
        load_dataset("imagenet:", root)


# pixels


def test_training_images_are_those_of_torchvision_on_pillow(folder):
    "The same chance gives the same crop; the resize rounds at another place."
    files = list_files(folder / "train")[1]
    theirs = v2.Compose([v2.RandomResizedCrop(48), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    ours, index, broken = Decoder(files, 48, True, 5, False)[2, list(range(40))]
    assert index == list(range(40)) and not broken
    for i, image in enumerate(ours):
        with chance(5, 2, i):
            want = theirs(Image.open(files.path(i)).convert("RGB"))
        assert (image.int() - want.int()).abs().max() <= 2


def test_chance_is_of_its_key_alone():
    before = torch.get_rng_state()
    draws = []
    for key in [(0, 1, 2), (0, 12), (1, 1, 2), (0, 1, 2)]:
        with chance(*key):
            draws.append(torch.rand(3).tolist())
    assert draws[0] == draws[3] and len({*map(tuple, draws)}) == 3
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "mode, kind",
    [("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"), ("RGBA", "PNG"), ("RGB", "WEBP"), ("RGB", "BMP"), ("L", "TIFF")],
)
def test_modes_and_kinds(tmp_path, mode, kind):
    Image.fromarray(PHOTOS[0][:40, :50]).convert(mode).save(tmp_path / "i.JPEG", kind)
    assert np.array_equal(
        decode(tmp_path / "i.JPEG").permute(1, 2, 0).numpy(), np.asarray(Image.open(tmp_path / "i.JPEG").convert("RGB"))
    )


# batches


def test_workers_and_resuming_change_nothing(folder):
    whole = [list(batches(folder).epoch(e)) for e in range(2)]
    assert (
        [len(b.index) for b in whole[0]] == [7] * 5 + [5]
        and len(batches(folder)) == 6
        and batches(folder).samples == 40
    )
    assert sorted(torch.cat([b.index for b in whole[0]]).tolist()) == list(range(40)) and not same(
        whole[0][:1], whole[1][:1]
    )
    for workers in (1, 3):
        some = batches(folder, workers=workers)
        assert same(whole[0], some.epoch(0))
        pids = {w.pid for w in some._loader._iterator._workers}
        for start in (4, 0, 6, 1):
            assert same(whole[1][start:], some.epoch(1, start=start))
        assert {w.pid for w in some._loader._iterator._workers} == pids and len(pids) == workers  # they stayed
    assert not same(whole[0][:1], list(batches(folder, seed=4).epoch(0))[:1])


def test_outside_randomness_is_neither_used_nor_changed(folder):
    states = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before, got = torch.get_rng_state(), [list(batches(folder, workers=w).epoch(0)) for w in (0, 1)]
        assert torch.equal(before, torch.get_rng_state()) and same(*got)
        states.append(got[0])
    assert same(*states)


def test_evaluation_is_in_order_and_whole(folder):
    seen = list(batches(folder, train=False, batch_size=5).epoch(0))
    assert (
        torch.cat([b.index for b in seen]).tolist() == list(range(12))
        and torch.cat([b.targets for b in seen]).tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    )


@pytest.mark.parametrize("world", [2, 3])
def test_each_process_decodes_its_part(folder, monkeypatch, world):
    "Training batches in blocks as `shard` cuts them, evaluation in turns as `evaluate` does."
    whole, tested = list(batches(folder).epoch(0)), list(batches(folder, train=False).epoch(0))
    for r in range(world):
        monkeypatch.setattr("rcka.distributed.rank", lambda: r)
        monkeypatch.setattr("rcka.distributed.world_size", lambda: world)
        for b, mine in zip(whole, batches(folder).epoch(0), strict=True):
            each = len(b.targets) // world
            assert len(mine.targets) == len(b.targets) and len(mine.images.rows) == each
            assert same([shard(mine)], [type(b)(*(t[r * each : (r + 1) * each] for t in b))])
            with pytest.raises(RuntimeError, match="rcka.distributed"):
                mine.images[:]
        for b, mine in zip(tested, batches(folder, train=False).epoch(0), strict=True):
            assert all(torch.equal(t[r::world], m[r::world]) for t, m in zip(b, mine, strict=True))
    monkeypatch.undo()


def test_a_worker_that_dies_is_said_and_replaced(folder, tmp_path):
    train, test = batches(folder, workers=2, batch_size=4), batches(folder, train=False)
    trainer = Trainer(Distiller(Net()), train, test, TrainConfig(epochs=1), tmp_path)
    step = trainer.train_step

    def deadly(*args):
        if trainer.step == 1:
            for w in train._loader._iterator._workers:
                os.kill(w.pid, signal.SIGKILL)
        return step(*args)

    trainer.train_step = deadly
    with pytest.raises(BatchesFailed, match="a worker process that decodes images died.*The state was saved"):
        trainer.fit(progress=False)
    assert same(train.epoch(0), batches(folder, batch_size=4).epoch(0))


def test_a_worker_that_dies_in_an_evaluation_is_said(folder):
    test = batches(folder, train=False, workers=1, batch_size=1)
    seen = test.epoch(0)
    next(seen)
    for w in test._loader._iterator._workers:
        os.kill(w.pid, signal.SIGKILL)
    with pytest.raises(BatchesFailed, match="a worker process that decodes images died"):
        list(seen)


def test_identity_names_the_files_and_the_draws(folder, tmp_path):
    "In training all by which batches are drawn; no number of workers, and no path of the folder."
    first = batches(folder).identity()
    assert batches(folder, workers=2).identity() == first == batches(shutil.copytree(folder, tmp_path / "b")).identity()
    assert batches(folder, seed=4).identity() != first != batches(folder, batch_size=5).identity()
    assert batches(folder, False, seed=4).identity() == batches(folder, False).identity() != first
    next((tmp_path / "b" / "train" / "n00").iterdir()).unlink()
    assert batches(tmp_path / "b").identity() != first


# broken images


@pytest.fixture
def hurt(tmp_path):
    base = make_folder(tmp_path / "hurt", 5, 3, 2)
    bad = base / "train" / "n00" / "n00_2.JPEG", base / "val" / "n01" / "n01_1.JPEG"
    bad[0].write_bytes(bad[0].read_bytes()[:900])
    bad[1].write_bytes(b"no image")
    return base, *map(str, bad)


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images(hurt, workers):
    base, train, val = hurt
    for bad, of in ((train, True), (val, False)):
        with pytest.raises(ValueError, match="skip_broken=True") as error:
            list(batches(base, train=of, workers=workers).epoch(0))
        assert bad in str(error.value) and len(str(error.value)) < 500
    data = load_imagenet(base, size=32, skip_broken=True)
    some = data.batches(5, workers=workers)
    with pytest.warns(UserWarning, match="n00_2.JPEG"):
        seen = list(some.epoch(0))
    assert [len(b.index) for b in seen] == [5, 5] and sorted(torch.cat([b.index for b in seen]).tolist()) == [
        0,
        1,
        3,
        3,
        *range(4, 10),
    ]
    for b in seen:
        assert torch.equal(b.targets, data.train.targets[b.index])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # said once
        list(some.epoch(1))
    with pytest.warns(UserWarning, match="n01_1.JPEG"):
        assert [b.index.tolist() for b in data.batches(4, train=False, workers=workers).epoch(0)] == [[0, 1, 2, 3], [5]]


def test_nothing_but_broken_images(hurt):
    base = hurt[0]
    for p in (base / "train").glob("*/*"):
        p.write_bytes(b"")
    with pytest.raises(ValueError, match="is this the right folder"):
        list(load_imagenet(base, skip_broken=True).batches(5, workers=0).epoch(0))


# runs


def experiment(folder, **fields):
    return Experiment.paper(
        f"imagenet:{folder}",
        fields.pop("teacher", "torchvision/resnet18"),
        "resnet8",
        "rcka",
        **{
            "image_size": 32,
            "epochs": 2,
            "batch_size": 8,
            "lr": 0.01,
            "teacher_weights": None,
            "teacher_epochs": 1,
            "evaluate_on": "train",
            **fields,
        },
    )


@pytest.mark.slow
def test_a_run_that_breaks_off_ends_with_the_same_bits(folder, tmp_path, monkeypatch):
    e = experiment(folder, teacher="resnet14")
    how = dict(device="cpu", progress=False)
    whole = run(e, tmp_path / "whole", workers=0, **how)
    assert whole.last["epoch"] == 2 and {"ce", "fcka", "lcka_intra", "lcka_inter"} <= set(whole.train)

    to_device, calls = FileBatches._to_device, []

    def breaks(self, *args):
        if self.train:
            calls.append(1)
        if len(calls) == 5 + 1 + 1 + 5 + 3:
            raise OSError("the disk is gone")  # a first look each, the teacher's epoch, and into the student's second
        return to_device(self, *args)

    monkeypatch.setattr(FileBatches, "_to_device", breaks)
    with pytest.raises(BatchesFailed, match="the disk is gone"):
        run(e, tmp_path / "broken", workers=0, checkpoint_seconds=0, **how)
    again = run(e, tmp_path / "broken", workers=2, **how)
    assert again.last == whole.last and again.train == whole.train
    for name in ("last.safetensors", "metrics.csv"):
        assert (tmp_path / "whole" / e.key / name).read_bytes() == (tmp_path / "broken" / e.key / name).read_bytes()


@pytest.mark.parametrize("method", ["rcka", "reviewkd", "ofd", "srrl"])
def test_mobilenet_v1_as_a_student(method):
    torch.manual_seed(0)
    teacher, student = create_model("torchvision/resnet18", 5), create_model("mobilenet_v1", 5)
    distiller = Distiller(
        student, create_method(method, paper_args(method, "torchvision/resnet18", "mobilenet_v1", "imagenet")), teacher
    )
    x, y = torch.randn(4, 3, 64, 64), torch.arange(4)
    distiller.build(x, torch.arange(5).repeat(4))
    student.train()
    terms, _ = distiller(SimpleNamespace(images=x, targets=y, index=y))
    sum(terms.values()).backward()
    assert all(v.isfinite() for v in terms.values()) and student.model[0][0].weight.grad.abs().sum() > 0


def test_torchvisions_weights_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(url, *args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    e, data = (
        experiment("anywhere", teacher_weights="IMAGENET1K_V1"),
        SimpleNamespace(num_classes=1000, shape=(3, 224, 224)),
    )
    file = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    with pytest.raises(FileNotFoundError, match=f"{file} is not there.*https://.*no network.*teacher_weights"):
        e.given_teacher(data)
    torch.manual_seed(0)
    theirs = models.resnet18()
    torch.save(theirs.state_dict(), file)
    ours = e.given_teacher(data).state_dict()
    assert all(torch.equal(v, ours[k]) for k, v in theirs.state_dict().items())
    assert torch.equal(
        experiment("anywhere", teacher_weights=str(file)).given_teacher(data).fc.weight, theirs.fc.weight
    )  # a path
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is damaged"):
        e.given_teacher(data)
    with pytest.raises(ValueError, match="knows 1000 classes, imagenet:anywhere has 10"):
        e.given_teacher(SimpleNamespace(num_classes=10, shape=(3, 9, 9)))
    with pytest.raises(ValueError, match="IMAGENET1K_V1"):
        experiment("anywhere", teacher_weights="IMAGENET1K_V3").given_teacher(data)


def test_the_papers_protocol():
    e = Experiment.paper("imagenet", "torchvision/resnet34", "torchvision/resnet18", "rcka")
    assert (e.epochs, e.batch_size, e.momentum, e.weight_decay, e.teacher_weights) == (
        100,
        256,
        0.9,
        1e-4,
        "IMAGENET1K_V1",
    )
    for epoch, lr in [(0, 0.1), (29, 0.1), (30, 0.01), (60, 0.001), (90, 1e-4), (99, 1e-4)]:
        assert e.train_config.lr_at(epoch) == pytest.approx(lr)
    assert Experiment.paper("imagenet", None, "mobilenet_v1", "none", batch_size=512).lr == 0.2
    given, how = parse(
        [
            "--dataset",
            "imagenet",
            "--student",
            "mobilenet_v1",
            "--workers",
            "0",
            "--evaluate_on",
            "train",
            "--image_size",
            "64",
        ]
    )
    assert how["workers"] == 0 and (given.image_size, given.evaluate_on) == (64, "train")
    with pytest.raises(ValueError, match="are for imagenet"):
        Experiment("digits", evaluate_on="train")


# several processes


class Net(nn.Sequential):
    "Without batch normalisation, which sees its own device's images only."

    layers = FeaturePaths(("0", "2"), ("0", "2"), "4:input", "4")

    def __init__(self, seed=1):
        torch.manual_seed(seed)
        super().__init__(nn.Conv2d(3, 4, 5, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(36, 4))


def trained(folder, run_folder, workers):
    student, teacher, how = Net().double(), Net(2).double(), dict(workers=workers, dtype=torch.float64)
    train, test = batches(folder, **how), batches(folder, train=False, batch_size=5, **how)
    history = Trainer(
        Distiller(student, create_method("kd+fcka"), teacher), train, test, TrainConfig(epochs=2, lr=0.05), run_folder
    ).fit(progress=False)
    return history, torch.cat([p.detach().flatten() for p in student.parameters()])


@pytest.mark.slow
def test_two_processes_train_as_one(folder, tmp_path):
    launch(__file__, folder, tmp_path)
    # batches of 7 are cut to 3 and 3: compare with one process that sees those six
    cut = lambda b: type(b)(*(t[: len(b.targets) // 2 * 2] for t in b))

    class Even(FileBatches):
        def _epoch(self, e, start):
            return map(cut, super()._epoch(e, start)) if self.train else super()._epoch(e, start)

    original, imagenet.FileBatches = imagenet.FileBatches, Even
    try:
        history, weights = trained(folder, tmp_path / "one", 0)
    finally:
        imagenet.FileBatches = original
    for r in range(2):
        there = torch.load(tmp_path / f"{r}.pt", weights_only=False)
        torch.testing.assert_close(there["weights"], weights, rtol=1e-6, atol=1e-9)
        for a, b in zip(there["history"], history, strict=True):
            assert a == pytest.approx(b, rel=1e-6)


if __name__ == "__main__":
    init_distributed("cpu")
    history, weights = trained(Path(sys.argv[1]), Path(sys.argv[2]) / "two", 1)
    torch.save({"history": history, "weights": weights}, Path(sys.argv[2]) / f"{rank()}.pt")
