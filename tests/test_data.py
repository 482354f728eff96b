"rcka.data: what needs files, processes, a server or many random cases."

import hashlib
import http.server
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import threading
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import datasets

from rcka.core import seed_of
from rcka.data.datasets import KNOWN, list_datasets, load_dataset, main
from rcka.data.memory import Batches, Dataset, balanced_slice, channel_stats, crop_flip, draw_epoch, validation_split
from rcka.files import data_root

REPO = Path(__file__).resolve().parents[1]


def random_set(n, c=1, h=4, w=4, classes=3):
    g = torch.Generator().manual_seed(n)
    return torch.randint(0, 256, (n, c, h, w), dtype=torch.uint8, generator=g), torch.randint(
        0, classes, (n,), generator=g
    )


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# batches


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(4, 60),
    size=st.integers(1, 20),
    seed=st.integers(-5, 2**40),
    e=st.integers(0, 300),
    train=st.booleans(),
    pick=st.integers(0, 100),
)
def test_resumed_epoch_is_the_same_to_the_bit(n, size, seed, e, train, pick):
    b = Batches(*random_set(n), size, (0.5,), (0.25,), train=train, seed=seed, pad=1)
    full = list(b.epoch(e))
    start = pick % (len(b) + 1)
    rest = list(b.epoch(e, start=start))
    assert len(full) == len(b) and len(rest) == len(b) - start
    assert all(same(x, y) for x, y in zip(full[start:], rest))
    seen = torch.cat([x.index for x in full]).tolist()
    assert len(set(seen)) == len(seen) == b.samples
    sizes = [len(x.index) for x in full]
    assert all(s == size for s in sizes[:-1])
    if train:
        assert n - b.samples < min(4, size) and sizes[-1] >= min(4, size)
    else:
        assert seen == list(range(n))


def test_a_new_object_gives_the_same_epoch():
    make = lambda: Batches(*random_set(30), 8, (0.5,), (0.25,), seed=7)
    assert all(same(x, y) for x, y in zip(make().epoch(2), make().epoch(2), strict=True))


def test_targets_and_index_belong_to_the_images():
    images, targets = random_set(50)
    for b in Batches(images, targets, 8, (0.0,), (1.0,), pad=0, flip=False).epoch(1):
        assert torch.equal(b.targets, targets[b.index])
        assert torch.equal((b.images * 255).round().byte(), images[b.index])


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 8),
    c=st.integers(1, 4),
    h=st.integers(1, 9),
    w=st.integers(1, 9),
    pad=st.integers(0, 5),
    seed=st.integers(0, 999),
)
def test_crop_and_flip_are_those_of_torchvision(n, c, h, w, pad, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (n, c, h, w), dtype=torch.uint8, generator=g)
    offsets, flips = torch.randint(0, 2 * pad + 1, (2, n), generator=g), torch.rand(n, generator=g) < 0.5
    for image, top, left, flip, got in zip(x, *offsets.tolist(), flips, crop_flip(x, pad, offsets, flips)):
        want = TF.crop(TF.pad(image, [pad]), top, left, h, w)
        assert torch.equal(got, TF.hflip(want) if flip else want)


def test_whole_batch_is_that_of_torchvisions_pil_transforms():
    "Pad, crop and flip a PIL image, ToTensor, Normalize: equal to the bit, at the offsets that were drawn."
    images, targets = random_set(20, c=3, h=8, w=8)
    mean, std = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
    draws = draw_epoch(20, 4, True, 3, 5)
    got = next(Batches(images, targets, 20, mean, std, seed=3).epoch(5))
    assert torch.equal(got.index, draws.order)
    finish = T.Compose([T.ToTensor(), T.Normalize(mean, std)])
    for i, at in enumerate(got.index):
        image = TF.pad(Image.fromarray(images[at].permute(1, 2, 0).numpy()), 4, fill=0)
        image = TF.crop(image, *draws.offsets[:, i].tolist(), 8, 8)
        assert torch.equal(got.images[i], finish(TF.hflip(image) if draws.flips[i] else image))


def test_chance_is_fair():
    "Every offset and both sides about equally often; not the same in every epoch."
    d = draw_epoch(20_000, 2, True, 0, 0)
    for row in d.offsets:
        assert (row.bincount(minlength=5) / 20_000 - 0.2).abs().max() < 0.02
    assert abs(d.flips.double().mean() - 0.5) < 0.02
    assert abs(torch.corrcoef(torch.stack([d.offsets[0], d.offsets[1], d.flips]).double()).triu(1)).max() < 0.03
    assert not draw_epoch(100, 2, False, 0, 0).flips.any()
    assert not torch.equal(d.offsets, draw_epoch(20_000, 2, True, 0, 1).offsets)


def test_dtype_and_memory_format():
    x, t = random_set(12, c=3)
    make = lambda **kw: next(Batches(x, t, 12, (0.5,) * 3, (0.2,) * 3, **kw).epoch(0)).images
    half = make(dtype=torch.bfloat16, channels_last=True)
    assert half.dtype == torch.bfloat16 and half.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(half, make().bfloat16())


@pytest.mark.parametrize("device, size", [("cpu", 125), ("meta", 500)])
def test_evaluation_batches_fit_the_cache_of_a_cpu(images, device, size):
    test = replace(
        images, test_images=images.test_images.repeat(6, 1, 1, 1), test_targets=images.test_targets.repeat(6)
    )
    with mock.patch("rcka.data.memory._check_images"):  # it looks at values
        assert test.batches(train=False, device=device).batch_size == size
        assert test.batches(40, train=False, device=device).batch_size == 40
    if device == "cpu":  # the images, their order and what a run is known by are the same
        default, whole = test.batches(train=False), test.batches(500, train=False)
        assert default.identity() == whole.identity()
        for a, b in zip(zip(*default.epoch()), zip(*whole.epoch()), strict=True):
            assert torch.equal(torch.cat(a), torch.cat(b))


@pytest.mark.cuda
def test_cuda_sees_the_same_epoch():
    x, t = random_set(70, c=3)
    one, two = (list(Batches(x, t, 16, (0.5,) * 3, (0.2,) * 3, device=d).epoch(1)) for d in ("cpu", "cuda"))
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.index, b.index.cpu()) and torch.allclose(a.images, b.images.cpu(), atol=1e-6)


def test_the_set_itself_is_not_changed():
    x, t = random_set(20)
    before = x.clone()
    for b in Batches(x, t, 8, (0.5,), (0.2,)).epoch(0):
        b.images.zero_()
        b.targets.zero_()
    for b in Batches(x, t, 8, (0.5,), (0.2,), train=False).epoch(0):
        b.images.zero_()
        b.targets.zero_()
    assert torch.equal(x, before) and torch.equal(t, random_set(20)[1])


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(batch_size=0), "batch_size"),
        (dict(batch_size=2.0), "batch_size"),
        (dict(batch_size=True), "batch_size"),
        (dict(pad=-1), "pad"),
        (dict(std=(0.0,)), "std"),
        (dict(mean=(0.5,) * 3), "1 channel"),
        (dict(dtype=torch.uint8), "floating"),
        (dict(images=torch.zeros(9, 1, 4, 4)), "uint8"),
        (dict(images=np.zeros((9, 1, 4, 4), np.uint8)), "uint8 tensor"),
        (dict(images=torch.zeros(9, 4, 4, dtype=torch.uint8)), r"\(N, C, H, W\)"),
        (dict(images=torch.zeros(0, 1, 4, 4, dtype=torch.uint8)), "empty"),
        (dict(targets=torch.zeros(9)), "int64"),
        (dict(targets=torch.zeros(8, dtype=torch.long)), "9 images and 8 targets"),
        (dict(targets=torch.full((9,), 3), num_classes=3), "0 to 2"),
        (dict(targets=torch.full((9,), -1)), "got -1"),
    ],
)
def test_bad_input_is_told(change, message):
    given = dict(images=random_set(9)[0], targets=random_set(9)[1], batch_size=4, mean=(0.5,), std=(0.2,)) | change
    with pytest.raises((ValueError, TypeError), match=message):
        Batches(**given)


def test_bad_epochs_are_told_at_once():
    b = Batches(*random_set(9), 4, (0.5,), (0.2,))
    for kw in (dict(e=-1), dict(start=-1), dict(start=len(b) + 1)):
        with pytest.raises(ValueError, match="must be"):
            b.epoch(**kw)


# slices


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.data())
def test_slices_are_balanced_nested_and_the_first(labels, data):
    t = torch.tensor(labels)
    limit = data.draw(st.integers(1, len(labels)))
    keep = balanced_slice(t, limit)
    assert keep.tolist() == sorted(set(keep.tolist())) and len(keep) == limit
    assert set(balanced_slice(t, max(1, limit - 1)).tolist()) <= set(keep.tolist())
    have, kept = t.bincount(minlength=5), t[keep].bincount(minlength=5)
    for a in range(5):
        members = [i for i, x in enumerate(labels) if x == a]
        assert [i for i in keep.tolist() if labels[i] == a] == members[: kept[a]]  # the first ones
        if kept[a] < have[a]:
            assert kept.max() <= kept[a] + 1  # nobody has two more than one who could have had more


# the root


def test_root_order(tmp_path, monkeypatch):
    monkeypatch.delenv("RCKA_DATA", raising=False)
    deep = tmp_path / "checkout" / "nbs" / "method"
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    (tmp_path / "checkout" / "nbs" / "settings.ini").write_text("[DEFAULT]\nlib_name = other\n")
    (deep / "settings.ini").write_text("no ini file at all")
    assert data_root() == Path.cwd() / "data"
    (tmp_path / "checkout" / "settings.ini").write_text("[DEFAULT]\nlib_name = rcka\ndescription = 100%\n")
    assert data_root().resolve() == (tmp_path / "checkout" / "data").resolve()
    monkeypatch.setenv("RCKA_DATA", str(tmp_path / "env"))
    assert data_root() == tmp_path / "env"
    assert data_root("arg") == Path("arg")
    assert data_root("~/x") == Path.home() / "x"


def test_digits_are_the_same_every_time():
    a, b = load_dataset("digits"), load_dataset("digits")
    assert torch.equal(a.train_images, b.train_images)
    assert (len(a.train_images), len(a.test_images), a.num_classes, a.channels, a.pad, a.flip) == (
        896,
        901,
        10,
        1,
        1,
        False,
    )
    digest = hashlib.md5(
        a.train_images.numpy().tobytes() + a.test_targets.numpy().tobytes(), usedforsecurity=False
    ).hexdigest()
    assert digest == "e6112844dfe4dfdaa586c570a6a14df3"


def test_unknown_names():
    with pytest.raises(ValueError, match="did you mean fashion_mnist"):
        load_dataset("Fashion-MNIST")
    with pytest.raises(ValueError, match="Known: digits"):
        load_dataset("xyzzy")
    with pytest.raises(ValueError, match="imagefolder"):
        load_dataset("imagefolder:")


def test_a_folder_by_its_bare_name_is_understood(tmp_path):
    (tmp_path / "pets").mkdir()
    with pytest.raises(ValueError, match="imagefolder:pets"):
        load_dataset("pets", root=tmp_path)


def test_a_dataset_checks_itself():
    x, t = random_set(9)
    with pytest.raises(ValueError, match="train targets must be 0 to 1"):
        Dataset("d", x, t, x, t, ("a", "b"), (0.5,), (0.5,))
    with pytest.raises(ValueError, match="must have the same shape"):
        Dataset("d", x, t, x[..., :2], t, ("a", "b", "c"), (0.5,), (0.5,))


# image folders


def make_folder(base, classes=("a", "b"), parts=("train", "test"), n=3, size=(5, 7), suffix="png", mode="RGB"):
    rng = np.random.default_rng(0)
    for part in parts:
        for c in classes:
            (base / part / c).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).convert(mode).save(
                    base / part / c / f"{i}.{suffix}"
                )
    return base


def files(root):
    return sorted(p.name for p in (root / ".cache").iterdir())


def test_folder_is_read_as_torchvision_does(tmp_path):
    make_folder(tmp_path / "f", suffix="jpg", n=4)
    d, want = load_dataset("imagefolder:f", root=tmp_path), datasets.ImageFolder(tmp_path / "f" / "train")
    assert d.classes == tuple(want.classes) and d.train_targets.tolist() == want.targets
    for got, (image, _) in zip(d.train_images, want, strict=True):
        assert np.array_equal(got.permute(1, 2, 0), image)
    x = d.train_images.double() / 255
    assert torch.allclose(torch.tensor(d.mean).double(), x.mean((0, 2, 3)), atol=1e-4)
    assert torch.allclose(torch.tensor(d.std).double(), x.std((0, 2, 3), correction=0), atol=1e-4)


def test_relative_paths_are_below_the_root_then_here(tmp_path, monkeypatch):
    (tmp_path / "root").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    make_folder(tmp_path / "here" / "f", n=1)
    assert len(load_dataset("imagefolder:f", root=tmp_path / "root").train_images) == 2
    make_folder(tmp_path / "root" / "f", n=2)
    assert len(load_dataset("imagefolder:f", root=tmp_path / "root").train_images) == 4
    assert len(load_dataset(f"imagefolder:{tmp_path / 'here' / 'f'}", root=tmp_path / "root").train_images) == 2
    with pytest.raises(FileNotFoundError, match="no folder .*root.*g or .*here.*g"):
        load_dataset("imagefolder:g", root=tmp_path / "root")


def test_cache_is_used_and_made_anew_when_the_folder_changes(tmp_path, monkeypatch):
    base = make_folder(tmp_path / "f")
    first = load_dataset("imagefolder:f", root=tmp_path)
    assert len(files(tmp_path)) == 1
    with monkeypatch.context() as m:
        m.setattr("rcka.data.folder.decode_images", lambda *a: pytest.fail("decoded again"))
        again = load_dataset("imagefolder:f", root=tmp_path)
    assert same(
        [first.train_images, first.test_images, first.train_targets],
        [again.train_images, again.test_images, again.train_targets],
    )
    assert (first.mean, first.std, first.pad) == (again.mean, again.std, again.pad)
    one = base / "train" / "a" / "0.png"
    Image.fromarray(np.zeros((5, 7, 3), np.uint8)).save(one)
    os.utime(one, ns=(1, 1))
    changed = load_dataset("imagefolder:f", root=tmp_path)
    assert not changed.train_images[0].any() and torch.equal(changed.train_images[1:], first.train_images[1:])
    assert load_dataset("imagefolder:f", root=tmp_path, size=4).shape == (3, 4, 4)
    assert len(files(tmp_path)) == 3


@pytest.mark.parametrize("harm", ["empty", "half", "foreign", "pickle", "other"])
def test_a_broken_cache_is_made_again(tmp_path, harm):
    make_folder(tmp_path / "f", n=30, size=(16, 16))
    first = load_dataset("imagefolder:f", root=tmp_path)
    cache = tmp_path / ".cache" / files(tmp_path)[0]
    raw = cache.read_bytes()
    if harm == "empty":
        cache.write_bytes(b"")
    elif harm == "half":
        cache.write_bytes(raw[: len(raw) // 2])
    elif harm == "foreign":
        cache.write_bytes(b"not a tensor file")
    elif harm == "pickle":
        cache.write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    else:
        torch.save({"images": torch.zeros(1)}, cache)
    with pytest.warns(UserWarning, match="cannot be read"):
        again = load_dataset("imagefolder:f", root=tmp_path)
    assert torch.equal(first.train_images, again.train_images) and not (tmp_path / "sprung").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_dataset("imagefolder:f", root=tmp_path)


class Trap:
    "Unpickling it would make a file."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_root_that_cannot_be_written_to_goes_without(tmp_path):
    make_folder(tmp_path / "f")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / ".cache").write_text("a file where the folder would be")  # also stops the superuser
    assert len(load_dataset(f"imagefolder:{tmp_path / 'f'}", root=tmp_path / "root").train_images) == 6


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    make_folder(tmp_path / "f")

    def broken(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(os, "replace", broken)  # the file is written under another name, then renamed
        load_dataset("imagefolder:f", root=tmp_path)
    assert files(tmp_path) == []


def test_sizes_that_differ_are_named(tmp_path):
    base = make_folder(tmp_path / "f")
    Image.new("RGB", (9, 8)).save(base / "train" / "b" / "1.png")
    with pytest.raises(ValueError, match=r"a.0\.png is 5 x 7 .*b.1\.png is 8 x 9.*size="):
        load_dataset("imagefolder:f", root=tmp_path)
    assert load_dataset("imagefolder:f", root=tmp_path, size=(6, 4)).shape == (3, 6, 4)


@pytest.mark.parametrize("size", [0, -3, (4,), (4, 0), "4", 2.5])
def test_bad_sizes(tmp_path, size):
    make_folder(tmp_path / "f")
    with pytest.raises(ValueError, match="size must be"):
        load_dataset("imagefolder:f", root=tmp_path, size=size)


def test_broken_images_are_all_named(tmp_path):
    base = make_folder(tmp_path / "f", suffix="jpg", size=(64, 64))
    (base / "train" / "a" / "0.jpg").write_bytes(b"")
    whole = (base / "test" / "b" / "2.jpg").read_bytes()
    (base / "test" / "b" / "2.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"2 of 12 images cannot be decoded: .*a.0\.jpg.*b.2\.jpg"):
        load_dataset("imagefolder:f", root=tmp_path)
    assert not (tmp_path / ".cache").exists()


def test_every_kind_of_picture_becomes_rgb(tmp_path):
    for mode, suffix in (("L", "png"), ("CMYK", "jpg"), ("P", "gif"), ("RGBA", "png"), ("1", "tif")):
        make_folder(tmp_path / mode, suffix=suffix, mode=mode)
        assert load_dataset(f"imagefolder:{mode}", root=tmp_path).shape == (3, 5, 7)
    base = make_folder(tmp_path / "deep")
    Image.fromarray(np.full((5, 7), 40_000, np.uint16)).save(base / "train" / "a" / "0.png")
    with pytest.raises(ValueError, match="more than 8 bits"):
        load_dataset("imagefolder:deep", root=tmp_path)


def test_folders_that_are_not_as_they_should_be(tmp_path):
    load = lambda: load_dataset("imagefolder:f", root=tmp_path)
    base = tmp_path / "f"
    base.mkdir()
    with pytest.raises(ValueError, match="no folder train/"):
        load()
    (base / "train").mkdir()
    with pytest.raises(ValueError, match="neither test/ nor val/"):
        load()
    (base / "val").mkdir()
    with pytest.raises(ValueError, match="train has no class folders"):
        load()
    Image.new("RGB", (4, 4)).save(base / "train" / "loose.png")
    with pytest.raises(ValueError, match="train has no class folders"):
        load()
    (base / "train" / "cat").mkdir()
    (base / "train" / "cat" / "notes.txt").write_text("no image")
    (base / "train" / "cat" / "._0.png").write_text("hidden")
    with pytest.raises(ValueError, match="no images in cat"):
        load()
    Image.new("RGB", (4, 4)).save(base / "train" / "cat" / "0.PNG")
    (base / "val" / "dog").mkdir()
    Image.new("RGB", (4, 4)).save(base / "val" / "dog" / "0.png")
    with pytest.raises(ValueError, match="not in train: dog; only in train: cat"):
        load()
    (base / "val" / "dog").rename(base / "val" / "cat")
    (base / "test").mkdir()
    (base / "test" / "unlabelled.png").write_bytes(b"")  # val/ is the one with classes
    assert load().classes == ("cat",)


def test_a_constant_channel_can_be_normalised(tmp_path):
    for part in ("train", "test"):
        (tmp_path / "f" / part / "a").mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (4, 4), (10, 20, 30)).save(tmp_path / "f" / part / "a" / f"{i}.png")
    d = load_dataset("imagefolder:f", root=tmp_path)
    assert d.std == (1.0, 1.0, 1.0) and next(d.batches(4).epoch(0)).images.isfinite().all()


def test_listing_finds_folders(tmp_path):
    make_folder(tmp_path / "pets")
    make_folder(tmp_path / "only", parts=("train",))
    (tmp_path / "file").touch()
    found = {i.name: i for i in list_datasets(tmp_path)}
    assert list(found) == ["digits", "fashion_mnist", "cifar10", "cifar100", "imagenet", "imagefolder:pets"]
    assert found["imagefolder:pets"].classes == 2 and found["imagefolder:pets"].shape == (3, 5, 7)
    assert not found["cifar100"].there and "rcka.data cifar100" in found["cifar100"].how


# downloads, from a server of our own


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    "A tiny CIFAR-100 behind a server; gives (root, folder that is served, archive name)."
    src, web, root = (tmp_path / n for n in ("src", "web", "root"))
    (src / "cifar-100-python").mkdir(parents=True)
    web.mkdir()
    root.mkdir()
    rng = np.random.default_rng(0)
    for name, n in (("train", 40), ("test", 20)):
        (src / "cifar-100-python" / name).write_bytes(
            pickle.dumps(
                {"data": rng.integers(0, 256, (n, 3072), dtype=np.uint8), "fine_labels": [i % 100 for i in range(n)]}
            )
        )
    (src / "cifar-100-python" / "meta").write_bytes(
        pickle.dumps({"fine_label_names": [f"class {i}" for i in range(100)]})
    )
    archive = web / "cifar-100-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(src / "cifar-100-python", "cifar-100-python")
    md5 = lambda p: hashlib.md5(p.read_bytes(), usedforsecurity=False).hexdigest()
    handler = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *a: None})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(web)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(datasets.CIFAR100, "url", f"http://127.0.0.1:{server.server_port}/{archive.name}")
    monkeypatch.setattr(datasets.CIFAR100, "tgz_md5", md5(archive))
    for field, name in (("train_list", "train"), ("test_list", "test")):
        monkeypatch.setattr(datasets.CIFAR100, field, [[name, md5(src / "cifar-100-python" / name)]])
    monkeypatch.setattr(
        datasets.CIFAR100,
        "meta",
        {"filename": "meta", "key": "fine_label_names", "md5": md5(src / "cifar-100-python" / "meta")},
    )
    yield root, archive, src / "cifar-100-python"
    server.shutdown()
    server.server_close()


def test_download_and_what_comes_of_it(cifar):
    root, _, src = cifar
    d = load_dataset("cifar100", root=root)
    raw = pickle.loads((src / "train").read_bytes())
    assert (
        d.num_classes == 100
        and d.classes[3] == "class 3"
        and d.shape == (3, 32, 32)
        and d.train_targets[:3].tolist() == [0, 1, 2]
    )
    assert np.array_equal(d.train_images.numpy(), raw["data"].reshape(-1, 3, 32, 32)) and d.train_images.is_contiguous()
    assert d.mean == (0.5071, 0.4867, 0.4408) and d.std == (0.2675, 0.2565, 0.2761)
    assert {i.name: i.there for i in list_datasets(root)}["cifar100"]


def test_a_download_that_broke_off_is_not_taken_for_whole(cifar):
    root, archive, _ = cifar
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match="download failed"):
            load_dataset("cifar100", root=root)
    archive.write_bytes(whole)
    assert len(load_dataset("cifar100", root=root).train_images) == 40


def test_an_archive_put_there_by_hand_needs_no_network(cifar, monkeypatch):
    root, archive, _ = cifar
    monkeypatch.setattr(datasets.CIFAR100, "url", f"http://127.0.0.1:9/{archive.name}")
    archive.rename(root / archive.name)
    assert len(load_dataset("cifar100", root=root).test_images) == 20


def test_broken_files_are_fetched_again(cifar):
    root, archive, _ = cifar
    load_dataset("cifar100", root=root)
    (root / "cifar-100-python" / "train").write_bytes(b"half")
    with pytest.raises(FileNotFoundError, match="broken"):
        load_dataset("cifar100", root=root, download=False)
    assert len(load_dataset("cifar100", root=root).train_images) == 40


def test_no_network_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    with pytest.raises(FileNotFoundError) as err:
        load_dataset("cifar10", root=tmp_path)
    for part in (
        "http://127.0.0.1:9/cifar-10-python.tar.gz",
        str(tmp_path / "cifar-10-batches-py"),
        f"python -m rcka.data cifar10 --root {tmp_path}",
        "RCKA_DATA",
    ):
        assert part in str(err.value)


def test_fashion_mnist_files_of_a_wrong_size_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for f in KNOWN["fashion_mnist"].files:
        (tmp_path / f).write_bytes(b"half")
    assert not {i.name: i.there for i in list_datasets(tmp_path)}["fashion_mnist"]
    with pytest.raises(FileNotFoundError, match="http://127.0.0.1:9/"):
        load_dataset("fashion_mnist", root=tmp_path)


# a validation part


def test_validation_images_are_chosen_by_the_rule_and_nothing_else():
    "The rule that runs rely on, written out once more."
    t = torch.tensor([0, 1, 2] * 15 + [1] * 5)
    g, want = torch.Generator().manual_seed(seed_of("validation", 3)), []
    for c, n in ((0, 3), (1, 4), (2, 3)):  # round(0.2 * 15), round(0.2 * 20)
        members = [i for i, x in enumerate(t.tolist()) if x == c]
        want += [members[i] for i in torch.randperm(len(members), generator=g)[:n].tolist()]
    torch.manual_seed(5)  # nothing else has a say
    assert validation_split(t, 0.2, 3).nonzero()[:, 0].tolist() == sorted(want)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(5, 40), classes=st.integers(1, 6), fraction=st.floats(0.15, 0.85), seed=st.integers(0, 99))
def test_validation_part_is_balanced_and_disjoint(n, classes, fraction, seed):
    t = torch.arange(n * classes) % classes
    chosen = validation_split(t, fraction, seed)
    assert t[chosen].bincount(minlength=classes).tolist() == [round(fraction * n)] * classes
    # which members of a class are chosen does not depend on the order across classes
    order = torch.argsort(t, stable=True)
    assert torch.equal(validation_split(t[order], fraction, seed), chosen[order])


def test_a_dataset_with_a_validation_part():
    whole, d = load_dataset("digits"), load_dataset("digits", val_fraction=0.1)
    assert (whole.evaluated_on, d.evaluated_on) == ("test", "validation")
    assert repr(d) == "Dataset(digits: 806 training and 90 validation images of 1x8x8 in 10 classes)"
    chosen = validation_split(whole.train_targets, 0.1, 0)
    assert torch.equal(d.test_images, whole.train_images[chosen])
    assert torch.equal(d.test_targets, whole.train_targets[chosen])
    assert torch.equal(d.train_images, whole.train_images[~chosen])
    assert torch.equal(d.train_targets, whole.train_targets[~chosen])
    assert (d.mean, d.std) == (whole.mean, whole.std)
    other = load_dataset("digits", val_fraction=0.1, val_seed=1)
    assert not torch.equal(other.test_images, d.test_images)


def test_limit_is_taken_of_the_rest():
    whole = load_dataset("digits", val_fraction=0.2)
    d = load_dataset("digits", val_fraction=0.2, limit=50, test_limit=20)
    assert d.train_targets.bincount().tolist() == [5] * 10 and d.test_targets.bincount().tolist() == [2] * 10
    assert torch.equal(d.train_images, whole.train_images[balanced_slice(whole.train_targets, 50)])
    assert torch.equal(d.test_images, whole.test_images[balanced_slice(whole.test_targets, 20)])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"val_fraction": 0.001}, "leaves class 0, of 89 training images, without validation images"),
        ({"val_fraction": 0.999}, "without training images"),
        ({"val_fraction": 0}, "between 0 and 1, got 0"),
        ({"val_fraction": 1.0}, "between 0 and 1"),
        ({"val_fraction": "0.1"}, "between 0 and 1"),
        ({"val_fraction": float("nan")}, "between 0 and 1"),
        ({"val_fraction": True}, "between 0 and 1"),
        ({"val_fraction": 0.1, "val_seed": 0.5}, "val_seed must be an integer"),
    ],
)
def test_bad_validation_parts(options, message):
    with pytest.raises(ValueError, match=message):
        load_dataset("digits", **options)


def test_imagenet_has_no_validation_part_in_memory(tmp_path):
    with pytest.raises(ValueError, match="val_fraction cannot be used with imagenet"):
        load_dataset("imagenet", root=tmp_path, val_fraction=0.1)


def test_an_experiment_hands_it_on():
    from rcka.experiments.experiment import Experiment

    of = lambda **kw: Experiment("digits", "resnet8", train_limit=50, **kw)
    d = of(val_fraction=0.1).load_data()
    assert d.evaluated_on == "validation" and len(d.train_images) == 50 and len(d.test_images) == 90
    assert of().load_data().evaluated_on == "test"
    assert of(val_fraction=0.1).key != of().key == of(val_fraction=None).key


# CIFAR in the other forms in which it circulates


@pytest.fixture
def small(monkeypatch):
    "CIFAR-10 is complete with 3 training and 2 test images in each class, CIFAR-100 with 2 and 1."
    for name, counts in (("cifar10", (3, 2)), ("cifar100", (2, 1))):
        monkeypatch.setitem(KNOWN, name, KNOWN[name]._replace(per_class=counts))


def make_images(name, size=(32, 32)):
    "PNG bytes of random images by part, class and number."
    rng = np.random.default_rng(1)
    known, found = KNOWN[name], {}
    for part, n in zip(("train", "test"), known.per_class):
        for c in known.names:
            for i in range(n):
                png = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(png, "png")
                found[part, c, i] = png.getvalue()
    return found


def as_folder(images, base):
    for (part, c, i), png in images.items():
        (base / part / c).mkdir(parents=True, exist_ok=True)
        (base / part / c / f"{i}.png").write_bytes(png)


def as_parquet(images, name, folder, columns=None, shards=1, image=lambda png: {"bytes": png, "path": None}):
    "The files of the hub; the classes take turns, as in no folder."
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder.mkdir(parents=True)
    first, second = columns or KNOWN[name].columns
    for part in ("train", "test"):
        rows = sorted((i, KNOWN[name].names.index(c), png) for (p, c, i), png in images.items() if p == part)
        for k in range(shards):
            mine = rows[k * len(rows) // shards : (k + 1) * len(rows) // shards]
            table = {first: [image(png) for *_, png in mine], second: [c for _, c, _ in mine]}
            parquet.write_table(pyarrow.table(table), folder / f"{part}-{k:05}-of-{shards:05}.parquet")


def by_class(images, targets):
    order = torch.argsort(targets, stable=True)
    return images[order], targets[order]


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_the_same_from_a_folder_and_from_parquet(tmp_path, small, name):
    images, known = make_images(name), KNOWN[name]
    as_folder(images, tmp_path / "a" / name)
    as_parquet(images, name, tmp_path / "b" / name)
    a, b = (load_dataset(name, root=tmp_path / root, download=False) for root in "ab")
    for d in (a, b):
        assert (d.name, d.classes, d.mean, d.std, d.pad, d.flip) == (
            name,
            known.names,
            known.mean,
            known.std,
            4,
            True,
        )
    assert same(by_class(a.train_images, a.train_targets), by_class(b.train_images, b.train_targets))
    assert same(by_class(a.test_images, a.test_targets), by_class(b.test_images, b.test_targets))
    v, w = (load_dataset(name, root=tmp_path / root, val_fraction=0.4) for root in "ab")
    assert same(by_class(v.test_images, v.test_targets), by_class(w.test_images, w.test_targets))
    assert b.train_targets[:3].tolist() == [0, 1, 2]  # the order of the file
    first = np.asarray(Image.open(io.BytesIO(images["train", known.names[0], 0])))
    assert np.array_equal(a.train_images[0].permute(1, 2, 0), first)
    assert np.array_equal(b.train_images[0].permute(1, 2, 0), first)
    forms = [{i.name: i for i in list_datasets(tmp_path / root)} for root in "ab"]
    assert [f[name].form for f in forms] == ["image folder", "parquet files"] and all(f[name].there for f in forms)
    assert all(f"imagefolder:{name}" not in f for f in forms)
    assert load_dataset(f"imagefolder:{name}", root=tmp_path / "a").name == f"imagefolder:{name}"  # as ever


def test_class_names_are_those_of_the_labels():
    "The official order is the alphabet's, so folders and labels agree."
    for name in ("cifar10", "cifar100"):
        known = KNOWN[name]
        assert len(set(known.names)) == known.classes and known.names == tuple(sorted(known.names))
    picks = {0: "apple", 9: "bottle", 26: "crab", 58: "pickup_truck", 78: "snake", 99: "worm"}
    assert {i: KNOWN["cifar100"].names[i] for i in picks} == picks


@pytest.mark.parametrize("form", ["folder", "parquet"])
def test_cifar_is_decoded_once(tmp_path, small, monkeypatch, form):
    images = make_images("cifar10")
    if form == "folder":
        as_folder(images, tmp_path / "cifar10")
    else:
        as_parquet(images, "cifar10", tmp_path / "cifar10", shards=2)
    first = load_dataset("cifar10", root=tmp_path)
    monkeypatch.setattr("rcka.data.datasets.decode_images", lambda *a: pytest.fail("decoded again"))
    again = load_dataset("cifar10", root=tmp_path)
    assert same([first.train_images, first.test_images], [again.train_images, again.test_images])
    assert same([first.train_targets, first.test_targets], [again.train_targets, again.test_targets])
    assert len(files(tmp_path)) == 1


@pytest.mark.parametrize("below", ["", "data", "cifar100"])
@pytest.mark.parametrize("shards", [1, 3])
def test_parquet_files_lie_where_the_hub_puts_them(tmp_path, small, below, shards):
    images = make_images("cifar100")
    as_parquet(images, "cifar100", tmp_path / "cifar100" / below, shards=shards)
    d = load_dataset("cifar100", root=tmp_path)
    assert d.train_targets.bincount().tolist() == [2] * 100 and d.test_targets.bincount().tolist() == [1] * 100


def test_torchvisions_files_come_first(cifar, small):
    root, _, _ = cifar
    load_dataset("cifar100", root=root)
    as_folder(make_images("cifar100"), root / "cifar100")
    assert {i.name: i.form for i in list_datasets(root)}["cifar100"] == "torchvision files"
    assert len(load_dataset("cifar100", root=root).train_images) == 40


def test_a_folder_with_missing_classes_or_images_is_refused(tmp_path, small):
    images = make_images("cifar100")
    as_folder(images, tmp_path / "cifar100")
    load = lambda: load_dataset("cifar100", root=tmp_path)
    one = tmp_path / "cifar100" / "train" / "crab"
    (one / "0.png").rename(tmp_path / "0.png")
    with pytest.raises(ValueError) as err:
        load()
    for said in (
        "expected 2 training images in each of 100 classes",
        "found 199 images in 100 classes",
        "1 of crab",
        "imagefolder:cifar100",
        str(tmp_path / "cifar100" / "train"),
    ):
        assert said in str(err.value)
    (one / "1.png").unlink()
    with pytest.raises(ValueError, match="other counts: 0 of crab"):
        load()
    one.rename(tmp_path / "cifar100" / "train" / "krab")
    with pytest.raises(ValueError, match="in 100 classes; missing classes: crab; unknown classes: krab"):
        load()
    assert not {i.name: i.there for i in list_datasets(tmp_path)}["cifar100"]
    (tmp_path / "cifar100" / "train" / "krab").rename(one)
    for i in range(2):
        (one / f"{i}.png").write_bytes(images["train", "crab", i])
    (tmp_path / "cifar100" / "test" / "apple" / "more.png").write_bytes(images["test", "apple", 0])
    with pytest.raises(ValueError, match="expected 1 test images .* found 101 images in 100 classes; .*2 of apple"):
        load()


def test_a_folder_of_other_images_is_not_cifar(tmp_path, small):
    make_folder(tmp_path / "cifar10", classes=("left", "right"))
    found = {i.name: i for i in list_datasets(tmp_path)}
    assert not found["cifar10"].there and found["imagefolder:cifar10"].classes == 2
    with pytest.raises(FileNotFoundError, match="download=False"):
        load_dataset("cifar10", root=tmp_path, download=False)
    as_folder(make_images("cifar100", size=(30, 32)), tmp_path / "cifar100")
    with pytest.raises(ValueError, match="30 x 32 pixels, but cifar100 has 32 x 32"):
        load_dataset("cifar100", root=tmp_path)


def test_parquet_without_the_columns_names_those_it_has(tmp_path, small):
    images = make_images("cifar100")
    as_parquet(images, "cifar100", tmp_path / "a" / "cifar100", columns=("image", "label"))
    with pytest.raises(ValueError, match="no column img and no column fine_label; its columns are image, label"):
        load_dataset("cifar100", root=tmp_path / "a")
    as_parquet(images, "cifar100", tmp_path / "b" / "cifar100", image=lambda png: png)
    with pytest.raises(ValueError, match="struct with the field bytes, got binary"):
        load_dataset("cifar100", root=tmp_path / "b")


def test_parquet_files_that_are_not_as_they_should_be(tmp_path, small):
    images = make_images("cifar10")
    folder = tmp_path / "cifar10" / "data"
    as_parquet(images, "cifar10", folder, shards=2)
    load = lambda: load_dataset("cifar10", root=tmp_path)
    shard = folder / "train-00001-of-00002.parquet"
    whole = shard.read_bytes()
    shard.unlink()
    with pytest.raises(ValueError, match="expected 3 training images .* found 15 images in 10 classes"):
        load()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="train-00001-of-00002.parquet is not a parquet file, or incomplete"):
        load()
    shard.write_bytes(whole)
    tests = sorted(folder.glob("test*"))
    for path in tests:
        path.rename(path.with_suffix(".away"))
    with pytest.raises(ValueError, match="no parquet file of the test images"):
        load()


def test_a_broken_image_in_a_parquet_file_is_named(tmp_path, small):
    images = make_images("cifar10")
    images["test", "cat", 1] = b"no png"
    as_parquet(images, "cifar10", tmp_path / "cifar10")
    with pytest.raises(ValueError, match="1 of 50 images cannot be decoded: image 13 of test-00000-of-00001.parquet"):
        load_dataset("cifar10", root=tmp_path)


def test_pyarrow_is_optional(tmp_path, small, monkeypatch):
    as_parquet(make_images("cifar10"), "cifar10", tmp_path / "cifar10")
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"needs pyarrow: pip install 'rcka\[parquet\]"):
        load_dataset("cifar10", root=tmp_path)


# real files, where they are


def real(name):
    if not {i.name: i.there for i in list_datasets()}.get(name):
        pytest.skip(f"{name} is not under {data_root()}")
    return load_dataset(name, download=False)


@pytest.mark.real_data
def test_fashion_mnist(real_data):
    d = real("fashion_mnist")
    assert repr(d) == "Dataset(fashion_mnist: 60000 training and 10000 test images of 1x28x28 in 10 classes)"
    assert (d.mean, d.std) == channel_stats(d.train_images) and d.train_targets.bincount().tolist() == [6000] * 10


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["cifar10", "imagefolder:cifar10-jpeg"])
def test_cifar10(name, real_data):
    d = real(name)
    assert repr(d) == f"Dataset({name}: 50000 training and 10000 test images of 3x32x32 in 10 classes)"
    assert d.train_targets.bincount().tolist() == [5000] * 10 and d.pad == 4 and d.flip
    assert np.allclose(d.mean, KNOWN["cifar10"].mean, atol=3e-3) and np.allclose(d.std, KNOWN["cifar10"].std, atol=3e-3)


@pytest.mark.real_data
def test_cifar100(real_data):
    d = real("cifar100")
    assert repr(d) == "Dataset(cifar100: 50000 training and 10000 test images of 3x32x32 in 100 classes)"
    assert d.train_targets.bincount().tolist() == [500] * 100 and d.test_targets.bincount().tolist() == [100] * 100
    assert d.classes == KNOWN["cifar100"].names
    mean, std = channel_stats(d.train_images)
    assert np.allclose(mean, d.mean, atol=1e-3) and np.allclose(std, d.std, atol=1e-3)


# what decides a result


def test_identity_of_batches():
    "It has the pixels, targets and normalisation, and in training all by which batches are drawn."
    images, targets = random_set(20)

    def identity(images=images, targets=targets, size=4, mean=(0.5,), **kwargs):
        return Batches(images, targets, size, mean, (0.25,), **kwargs).identity()

    assert identity() == identity(images.clone(), targets.clone())
    other = images.clone()
    other[3, 0, 1, 2] += 1
    changes = [{"images": other}, {"targets": targets.flip(0)}, {"mean": (0.4,)}, {"dtype": torch.bfloat16}]
    draws = [{"seed": 1}, {"size": 5}, {"pad": 2}, {"flip": False}]
    for change in changes + draws:
        assert identity(**change) != identity(), change
    for change in draws:
        assert identity(train=False, **change) == identity(train=False), change
    for change in changes:
        assert identity(train=False, **change) != identity(train=False), change
    assert json.loads(json.dumps(identity())) == identity()


# the shell


def shell(*args, cwd=REPO, **env):
    return subprocess.run(
        [sys.executable, *args],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(REPO), **env},
    )


def test_commands(tmp_path, capsys):
    make_folder(tmp_path / "pets")
    assert main(["--root", str(tmp_path)]) == 0
    listed = capsys.readouterr()
    assert not listed.err and "imagefolder:pets" in listed.out and str(tmp_path) in listed.out
    assert "found as" in listed.out and "image folder" in listed.out
    assert main(["imagefolder:pets", "--root", str(tmp_path), "--size", "4"]) == 0
    done = capsys.readouterr()
    assert not done.err and "6 training and 6 test images of 3x4x4" in done.out


def test_command_from_a_shell(tmp_path):
    bad = shell("-m", "rcka.data", "imagefolder:pits", RCKA_DATA=str(tmp_path))
    assert (
        bad.returncode == 1 and bad.stderr.startswith(f"error: no folder {tmp_path}") and "Traceback" not in bad.stderr
    )


def test_importing_brings_in_nothing_heavy():
    code = "import sys, rcka.data; print([m for m in ('torchvision', 'sklearn', 'PIL') if m in sys.modules])"
    assert shell("-c", code).stdout.strip() == "[]"


def test_digits_are_those_of_scikit_learn():
    "They are read without importing scikit-learn: the images of each class, halves joined, are those of its loader."
    raw, digits = pytest.importorskip("sklearn.datasets").load_digits(), load_dataset("digits")
    for c in range(10):
        parts = (digits.train_images[digits.train_targets == c], digits.test_images[digits.test_targets == c])
        want = torch.from_numpy(raw.images[raw.target == c] * 255 / 16).round().to(torch.uint8)
        assert torch.equal(torch.cat(parts)[:, 0], want) and abs(len(parts[0]) - len(parts[1])) <= 1
