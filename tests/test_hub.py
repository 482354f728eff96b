"Data sets of the Hugging Face hub, as `save_to_disk` writes them and as parquet files; read offline."

import json

import numpy as np
import pytest
import torch
from PIL import Image

import rcka
from rcka.data.datasets import load_dataset
from rcka.data.hub import is_hub_folder, open_hub
from rcka.data.own import open_data

hf = pytest.importorskip("datasets", reason="pip install rcka[datasets]")
SMALL = dict(epochs=1, batch_size=16, device="cpu", workers=0, progress=False, size=32)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    "What `datasets` keeps goes into a folder of the test."
    before = hf.config.HF_DATASETS_CACHE
    hf.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    yield
    hf.config.HF_DATASETS_CACHE = before


def table(images, **columns):
    "A split of images (n, h, w), and of label columns given as (values, feature)."
    pictures = [Image.fromarray(np.asarray(image)) for image in images]
    features = hf.Features(image=hf.Image(), **{name: feature for name, (_, feature) in columns.items()})
    return hf.Dataset.from_dict({"image": pictures} | {k: v for k, (v, _) in columns.items()}, features=features)


@pytest.fixture(scope="module")
def digits():
    "Three classes of scikit-learn's digits, enlarged: the splits, and their images and targets."
    data, kept, splits = load_dataset("digits"), {}, {}
    for split, images, targets, n in (
        ("train", data.train_images, data.train_targets, 20),
        ("test", data.test_images, data.test_targets, 8),
    ):
        rows = torch.cat([(targets == c).nonzero()[:n, 0] for c in range(3)]).sort().values
        large = [np.array(Image.fromarray(image[0].numpy()).resize((40, 40))) for image in images[rows]]
        kept[split] = (large, targets[rows].tolist())
        names = hf.ClassLabel(names=["zero", "one", "two"])
        splits[split] = table(large, label=(targets[rows].tolist(), names))
    return hf.DatasetDict(splits), kept


@pytest.fixture(scope="module")
def saved(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    digits[0].save_to_disk(folder / "arrow")
    (folder / "parquet").mkdir()
    for split, rows in digits[0].items():
        rows.to_parquet(folder / "parquet" / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.mark.parametrize("form", ["arrow", "parquet"])
def test_the_images_are_those_that_were_saved(form, saved, digits):
    assert is_hub_folder(saved / form)
    data = open_data(saved / form, size=32)
    assert data.classes == ("zero", "one", "two") and data.num_classes == 3
    for split, rows in (("train", data.train), ("test", data.test)):
        images, targets = digits[1][split]
        assert rows.targets.tolist() == targets
        for i in (0, 7, len(images) - 1):
            assert torch.equal(rows.decode(i), torch.from_numpy(images[i]).expand(3, -1, -1))
    assert len(data.test.digest()) == 16 and data.test.digest() != data.train.digest()
    assert data.test.digest() == open_data(saved / form).test.digest()


def test_batches_are_those_of_files(saved, tmp_path):
    "The same crops as of the same pictures in a folder; in the middle of an epoch, and decoded by processes."
    data = open_data(saved / "arrow", size=32)
    for split, rows in (("train", data.train), ("val", data.test)):
        for i in range(len(rows)):
            path = tmp_path / split / str(int(rows.targets[i])) / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rows.decode(i).permute(1, 2, 0).numpy()).save(path)
    folder = open_data(tmp_path, size=32)
    order = torch.argsort(data.train.targets, stable=True)  # class by class, as the folders
    sorted_rows = data.train.keep(order)
    files = folder.batches(16, workers=0, seed=3)
    rows = type(data)("rows", sorted_rows, data.test, data.classes, 32).batches(16, workers=0, seed=3)
    want = list(files.epoch(2))
    for batches, start in ((rows, 0), (rows, 2)):
        for got, expected in zip(batches.epoch(2, start), want[start:], strict=True):
            assert torch.equal(got.images, expected.images) and torch.equal(got.targets, expected.targets)
    in_process = next(iter(data.batches(16, workers=0).epoch(0)))
    by_workers = next(iter(data.batches(16, workers=1).epoch(0)))
    assert torch.equal(in_process.images, by_workers.images)


@pytest.mark.parametrize("form", ["arrow", pytest.param("parquet", marks=pytest.mark.slow)])
def test_distilled_to_the_end(form, saved, tmp_path):
    given = dict(SMALL, data=saved / form, teacher="rcka/resnet14", student="rcka/resnet8", output=tmp_path / "out")
    results = rcka.distill(**given, export="torch")
    assert 0 <= results["student"]["top1"] <= 100 and (tmp_path / "out" / "student.pt2").is_file()
    assert rcka.load_student(tmp_path / "out").about["classes"] == ["zero", "one", "two"]
    assert rcka.distill(**given) == results
    for name in ("README.md", "student.json"):
        assert str(saved) not in (tmp_path / "out" / name).read_text(), name


def test_two_labels_are_chosen_between(tmp_path):
    "As CIFAR-100's, fine and coarse; what is chosen goes on in the name, and is found again."
    g = torch.Generator().manual_seed(0)
    fine, coarse = hf.ClassLabel(names=["a", "b", "c", "d"]), hf.ClassLabel(names=["x", "y"])
    splits = {}
    for split, n in (("train", 16), ("test", 8)):
        images = torch.randint(0, 256, (n, 12, 12), generator=g, dtype=torch.uint8)
        labels = torch.arange(n) % 4
        splits[split] = table(images, fine_label=(labels.tolist(), fine), coarse_label=((labels // 2).tolist(), coarse))
    hf.DatasetDict(splits).save_to_disk(tmp_path / "two")
    with pytest.raises(ValueError, match=r"fine_label, coarse_label: choose one, such as hfds/.*two\?label=fine_label"):
        open_data(tmp_path / "two")
    data = open_data(f"hfds/{tmp_path}/two?label=coarse_label")
    assert data.classes == ("x", "y") and data.train.targets.tolist() == [0, 0, 1, 1] * 4
    assert open_data(f"hfds/{tmp_path}/two?label=fine_label&val=train").test.targets.tolist() == [0, 1, 2, 3] * 4
    for query, says in (
        ("label=fine_lable", "did you mean fine_label"),
        ("label=image", "the labels in image of split train must be classes, got"),
        ("image=fine_label&label=fine_label", "no column of images fine_label; its columns are image, fine_label"),
        ("labels=fine_label", "did you mean label"),
        ("label=fine_label&val=tst", "did you mean test"),
        ("label=fine_label&train=training", "did you mean train"),
    ):
        with pytest.raises(ValueError, match=says):
            open_data(f"hfds/{tmp_path}/two?{query}")


def images(n, seed=0):
    return torch.randint(0, 256, (n, 12, 12), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_labels_that_are_texts_or_numbers(tmp_path):
    "Classes are their values in order; the held-out images must not have others."
    text, number = hf.Value("string"), hf.Value("int64")
    for name, feature, train, test in (
        ("texts", text, ["owl", "newt"] * 4, ["newt", "newt"]),
        ("numbers", number, [7, 3] * 4, [3, 3]),
        ("others", text, ["owl", "newt"] * 4, ["newt", "pike"]),
    ):
        splits = {
            "train": table(images(8), label=(train, feature)),
            "validation": table(images(2), label=(test, feature)),
        }
        hf.DatasetDict(splits).save_to_disk(tmp_path / name)
    assert open_data(tmp_path / "texts").classes == ("newt", "owl")
    data = open_data(tmp_path / "numbers")
    assert (
        data.classes == ("3", "7")
        and data.train.targets.tolist() == [1, 0] * 4
        and data.test.targets.tolist() == [0, 0]
    )
    with pytest.raises(ValueError, match="classes that are not in the training images: pike"):
        open_data(tmp_path / "others")


def test_without_labels_or_a_part_of_them(tmp_path):
    """A split without labels is passed over where another has them; without any label every tenth is held out."""
    names = hf.ClassLabel(names=["a", "b"])
    train = table(images(20), label=([0, 1] * 10, names))
    hidden = table(images(4), label=([-1] * 4, names))
    known = table(images(4), label=([0, 1, 1, 0], names))
    hf.DatasetDict(train=train, test=hidden, validation=known).save_to_disk(tmp_path / "both")
    assert open_data(tmp_path / "both").test.targets.tolist() == [0, 1, 1, 0]
    hf.DatasetDict(train=train, test=hidden).save_to_disk(tmp_path / "hidden")
    with pytest.raises(ValueError, match="split test has rows without a label in label"):
        open_data(tmp_path / "hidden")
    hf.DatasetDict(train=train).save_to_disk(tmp_path / "alone")
    with pytest.raises(ValueError, match=r"no split to evaluate on \(train only\).*train_test_split"):
        open_data(tmp_path / "alone")
    one = table(images(8), label=([0] * 8, hf.ClassLabel(names=["only"])))
    hf.DatasetDict(train=one, test=one).save_to_disk(tmp_path / "one")
    with pytest.raises(ValueError, match="has one class, only"):
        open_data(tmp_path / "one")
    table(images(90)).save_to_disk(tmp_path / "loose")
    data = open_data(tmp_path / "loose")
    assert data.num_classes == 0 and (len(data.train), len(data.test)) == (81, 9)
    table(images(40)).save_to_disk(tmp_path / "few")
    with pytest.raises(ValueError, match="has 4 images to hold out"):
        open_data(tmp_path / "few")


def test_broken_and_missing_images_are_named(tmp_path):
    features = hf.Features(
        image={"bytes": hf.Value("binary"), "path": hf.Value("string")}, label=hf.ClassLabel(names=["a", "b"])
    )
    good = table(images(6))[:]["image"]

    def png(image):
        from io import BytesIO

        file = BytesIO()
        image.save(file, "PNG")
        return {"bytes": file.getvalue(), "path": None}

    rows = [png(image) for image in good]
    rows[2], rows[4] = {"bytes": b"not a picture", "path": None}, {"bytes": None, "path": None}
    split = hf.Dataset.from_dict({"image": rows, "label": [0, 1] * 3}, features=features)
    hf.DatasetDict(train=split, test=split).save_to_disk(tmp_path / "broken")
    data = open_data(tmp_path / "broken", size=8)
    with pytest.raises(ValueError, match="cannot decode row 2 of split test"):
        list(data.batches(2, train=False, workers=0).epoch(0))
    with pytest.raises(ValueError, match="this row has no image"):
        data.test.decode(4)
    assert data.test.decode(0).shape == (3, 12, 12)


def test_what_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no column of images; its columns are label"):
        hf.Dataset.from_dict({"label": [0, 1]}).save_to_disk(tmp_path / "none")
        open_data(tmp_path / "none")
    unreachable = lambda *args, **kw: (_ for _ in ()).throw(ConnectionError("Couldn't reach the hub"))
    monkeypatch.setattr(hf, "load_dataset", unreachable)
    with pytest.raises(
        FileNotFoundError, match="no dataset nobody/nothing here, and it cannot be downloaded .*data=FOLDER"
    ):
        open_data("hfds/nobody/nothing")


@pytest.mark.real_data
def test_real_photographs_from_parquet(real_data, tmp_path):
    "Imagenette's photographs go into parquet files and come out as torchvision decodes the files."
    from torchvision.io import ImageReadMode, decode_image

    from rcka.files import data_root

    found = [p for name in ("imagenette2-160", "imagenette") if (p := data_root() / name / "train").is_dir()]
    if not found:
        pytest.skip("no imagenette below RCKA_DATA")
    classes = sorted(p for p in found[0].iterdir() if p.is_dir())[:2]
    files = [path for folder in classes for path in sorted(folder.iterdir())[:6]]
    features = hf.Features(image=hf.Image(), label=hf.ClassLabel(names=[c.name for c in classes]))
    columns = {"image": [str(path) for path in files], "label": [0] * 6 + [1] * 6}
    split = hf.Dataset.from_dict(columns, features=features)
    for name in ("train", "validation"):
        split.to_parquet(tmp_path / f"{name}-00000-of-00001.parquet")
    data = open_hub(f"hfds/{tmp_path}", size=64)
    for i in (0, 11):
        assert torch.equal(data.train.decode(i), decode_image(str(files[i]), mode=ImageReadMode.RGB))
    (batch,) = data.batches(12, train=False, workers=0).epoch(0)
    assert batch.images.shape == (12, 3, 64, 64) and json.dumps(data.batches(12, workers=0).identity())
