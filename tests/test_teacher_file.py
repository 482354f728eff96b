"""A student from a teacher's file: the bits of one from the teacher and its cache, and every file that does not fit is
refused."""

import os
import struct

import pytest
import safetensors.torch
import torch
import torchvision
from interruption import interrupt_at

import rcka
from rcka.data.datasets import load_dataset
from rcka.files import remove_parts
from rcka.methods.base import create_method
from rcka.models.registry import create_model
from rcka.train import Distiller, TrainConfig, Trainer
from rcka.train.classification import UnlabelledDistiller, evaluate
from rcka.train.teacher_cache import TeacherCache, load_teacher, save_teacher


@pytest.fixture(scope="module")
def data():
    return load_dataset("digits", limit=160, test_limit=60)


def network(seed, name="resnet8"):
    torch.manual_seed(seed)
    return create_model(name, 10, 1)


def fit(data, folder, method, teacher, width=None, views=2, kind=Distiller, paths=None, **options):
    "Train with a file, or with a network and its cache; return the trainer and its history."
    train = data.batches(32, views=views, seed=1)
    task = kind(network(1), create_method(method), teacher, teacher_paths=paths)
    if isinstance(teacher, rcka.models.resnet.ResNet):
        options["teacher_cache"] = TeacherCache(teacher, train, task.teacher_taps.paths, width=width)
    trainer = Trainer(task, train, data.batches(train=False), TrainConfig(epochs=2, lr=0.02), folder, **options)
    return trainer, trainer.fit(progress=False)


def save(data, path, teacher, paths=None, width=None, views=2, **options):
    layers = teacher.layers
    paths = [*layers.stages, layers.pooled] if paths is None else paths
    cache = TeacherCache(teacher.eval(), data.batches(48, views=views, seed=7), paths, width=width, **options)
    save_teacher(path, cache, data.batches(train=False), name="a teacher")
    return path


def same(a, b):
    a, b = (t.network.state_dict() for t in (a, b))
    return all(torch.equal(a[k], b[k]) for k in a | b)


@pytest.mark.parametrize("method", ["kd", "rcka", "fitnet", "simkd", "srrl", "crd", "wkd_l"])
def test_the_same_student_to_the_last_bit(data, tmp_path, method):
    "Whatever the method builds from the teacher: connectors, a memory, its classifier."
    teacher = network(0)
    expected, history = fit(data, tmp_path / "cache", method, teacher)
    stored = load_teacher(save(data, tmp_path / "teacher.safetensors", teacher))
    found, again = fit(data, tmp_path / "file", method, stored)
    assert again == history and same(found, expected)
    assert evaluate(stored, data.batches(train=False)) == evaluate(teacher, data.batches(train=False))


def test_projected_features_and_fewer_augmentations(data, tmp_path):
    teacher = network(0)
    stored = load_teacher(save(data, tmp_path / "t.safetensors", teacher, width=16, views=3))
    for views in (3, 1):
        expected, history = fit(data, tmp_path / f"cache{views}", "rcka", teacher, 16, views)
        found, again = fit(data, tmp_path / f"file{views}", "rcka", stored, None, views)
        assert again == history and same(found, expected)
    with pytest.raises(ValueError, match="Gram matrix only"):
        fit(data, tmp_path / "no", "fitnet", stored)
    with pytest.raises(ValueError, match="projected to width 16"):
        TeacherCache(stored, data.batches(32, views=3), width=8)


def test_without_labels(data, tmp_path):
    teacher = network(0)
    stored = load_teacher(save(data, tmp_path / "t.safetensors", teacher))
    expected, history = fit(data, tmp_path / "cache", "kd", teacher, kind=UnlabelledDistiller)
    found, again = fit(data, tmp_path / "file", "kd", stored, kind=UnlabelledDistiller)
    assert same(found, expected)
    assert again[-1]["agreement"] == history[-1]["agreement"]
    assert again[-1]["cka"] == pytest.approx(history[-1]["cka"])  # the teacher's logits of other batch sizes


def test_resume_with_a_file(data, tmp_path):
    path = save(data, tmp_path / "t.safetensors", network(0))
    whole, expected = fit(data, tmp_path / "whole", "rcka", load_teacher(path))
    train = data.batches(32, views=2, seed=1)

    def trainer(stored):
        task = Distiller(network(1), create_method("rcka"), stored)
        test, config = data.batches(train=False), TrainConfig(epochs=2, lr=0.02)
        return Trainer(task, train, test, config, tmp_path / "broken", checkpoint_seconds=0)

    broken = trainer(load_teacher(path))
    interrupt_at(broken, 5 + 3)
    with pytest.raises(KeyboardInterrupt):
        broken.fit(progress=False)
    again = trainer(load_teacher(path))
    assert again.fit(progress=False) == expected and same(again, whole)
    other = save(data, tmp_path / "other.safetensors", network(5))
    with pytest.raises(ValueError, match="another run"):
        trainer(load_teacher(other)).fit(progress=False)


def test_a_file_that_does_not_fit(data, tmp_path):
    teacher = network(0)
    path = save(data, tmp_path / "t.safetensors", teacher, ["layer3"])
    stored = load_teacher(path)
    with pytest.raises(ValueError, match=r"no features at layer1, layer2; it has layer3.*paths=\[\.\.\.\]"):
        Distiller(network(1), create_method("at"), stored)
    with pytest.raises(ValueError, match=r"2 stored augmentations.*views=3"):
        TeacherCache(stored, data.batches(32, views=3))
    with pytest.raises(ValueError, match=r"views=None.*data\.batches\(64, views=2\)"):
        Trainer(
            Distiller(network(1), create_method("kd"), stored),
            data.batches(32),
            data.batches(train=False),
            TrainConfig(epochs=1),
            tmp_path / "run",
        )
    other = load_dataset("digits", limit=150, test_limit=50)
    with pytest.raises(ValueError, match="other training images.*content"):
        TeacherCache(stored, other.batches(32, views=2))
    with pytest.raises(ValueError, match="other training images.*pad: 1 there, 3 here"):
        TeacherCache(stored, data.batches(32, views=2, pad=data.pad + 2))
    with pytest.raises(ValueError, match="other held-out images"):
        evaluate(stored, other.batches(train=False))
    images = next(iter(data.batches(32).epoch(0))).images
    for use in (lambda: stored(images), lambda: rcka.Pair(network(1), stored, "kd", images)):
        with pytest.raises(RuntimeError, match="not its network"):
            use()
    headless = torch.nn.Sequential(teacher).eval()  # its feature paths are not known, so neither is its classifier
    cache = TeacherCache(headless, data.batches(32, views=2), ["0.layer3", "0.fc:input"])
    save_teacher(tmp_path / "headless.safetensors", cache, data.batches(train=False))
    with pytest.raises(ValueError, match="srrl needs the teacher's classifier"):
        paths = ["0.layer3", "0.fc:input"]
        fit(data, tmp_path / "srrl", "srrl", load_teacher(tmp_path / "headless.safetensors"), paths=paths)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, torch.zeros(32).long()))
    with pytest.raises(ValueError, match="index is None"):
        save_teacher(path, TeacherCache(teacher, data.batches(32, views=2)), loader)


def test_a_file_that_is_no_teacher(data, tmp_path):
    with pytest.raises(FileNotFoundError, match="save_teacher"):
        load_teacher(tmp_path / "missing.safetensors")
    path = save(data, tmp_path / "t.safetensors", network(0), ["layer3"])
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="damaged"):
        load_teacher(path)
    path.write_bytes(whole[:-50] + bytes([whole[-50] ^ 1]) + whole[-49:])
    with pytest.raises(ValueError, match="damaged: the digest"):
        load_teacher(path)
    path.write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match="damaged"):
        load_teacher(path)
    rcka.save_weights(network(0), path)
    with pytest.raises(ValueError, match="perhaps weights"):
        load_teacher(path)
    path.write_bytes(whole.replace(b'\\"format\\": 1', b'\\"format\\": 9', 1))
    with pytest.raises(ValueError, match="format 9"):
        load_teacher(path)


def test_the_file_is_safetensors_without_pickle_and_is_replaced_as_a_whole(data, tmp_path, monkeypatch):
    teacher = network(0)
    path = save(data, tmp_path / "t.safetensors", teacher)
    tensors = safetensors.torch.load_file(path)
    assert tensors["logits"].shape == (2, 160, 10) and tensors["feature layer3"].dtype == torch.bfloat16
    assert torch.equal(tensors["head.weight"], teacher.fc.weight)
    before = path.read_bytes()
    (size,) = struct.unpack("<Q", before[:8])
    assert os.fsencode(tmp_path) not in before[: 8 + size], "a path of this machine is in the file"

    def fails(*_):
        raise OSError("no space")

    monkeypatch.setattr(safetensors.torch, "save_file", fails)
    with pytest.raises(OSError, match="no space"):
        save(data, path, network(3))
    remove_parts(tmp_path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_stand_in_draws_no_random_numbers(data, tmp_path):
    path = save(data, tmp_path / "t.safetensors", network(0))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    load_teacher(path)
    assert torch.equal(torch.get_rng_state(), state)


def test_distill_and_the_experiments_take_a_file(data, tmp_path):
    "A file where the name of the teacher's network, or the weights of the teacher, would be."
    whole = load_dataset("digits")
    teacher = network(0)
    path = save(whole, tmp_path / "t.safetensors", teacher, ["layer3"])
    how = dict(epochs=1, device="cpu", progress=False)
    results = rcka.distill("digits", path, "resnet8", output=tmp_path / "out", **how)
    assert results["teacher"] | {"flops": 0} == {
        "network": "a teacher",
        "top1": evaluate(teacher, whole.batches(train=False)).top1,
        "parameters": sum(p.numel() for p in teacher.parameters()),
        "flops": 0,
        "megabytes": results["teacher"]["megabytes"],
        "milliseconds": None,
    }
    text = (tmp_path / "out" / "report.md").read_text() + (tmp_path / "out" / "README.md").read_text()
    assert "distilled from a teacher" in text and "unknown" in text and str(tmp_path) not in text
    for wrong, said in (
        (dict(mixup=0.2), "mixup would change"),
        (dict(teacher_weights="pretrained"), "without a network"),
        (dict(method="at"), "no features at layer1, layer2"),
    ):
        with pytest.raises(ValueError, match=said):
            rcka.distill("digits", path, "resnet8", output=tmp_path / said[:5], **how, **wrong)
    e = rcka.Experiment(
        "digits", "resnet8", "resnet14", "kd+fcka", epochs=1, teacher_weights=str(path), teacher_cache=2
    )
    result = rcka.run(e, tmp_path / "runs", device="cpu", progress=False)
    assert result.teacher["top1"] == results["teacher"]["top1"]


def test_maps_of_a_transformer(data, tmp_path):
    "A method that wants maps gets those of the teacher's tokens, from the cache and from the file."
    torch.manual_seed(0)
    shape = dict(num_layers=4, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=10)
    teacher = torchvision.models.VisionTransformer(image_size=8, patch_size=2, **shape)
    teacher.conv_proj = torch.nn.Conv2d(1, 16, 2, 2)
    train, test = data.batches(32, views=2, seed=1), data.batches(train=False)

    def trained(folder, teacher, cache=None, maps=False):
        task = Distiller(network(1), create_method("fitnet"), teacher)
        if maps:
            task.find_maps(train)
        cache = cache and cache(task.teacher_taps.paths)
        trainer = Trainer(task, train, test, TrainConfig(epochs=1, lr=0.02), tmp_path / folder, teacher_cache=cache)
        return trainer, trainer.fit(progress=False)

    made = []
    with pytest.raises(ValueError, match="encoder_layer_1:map.*find_maps"):
        trained("tokens", teacher, lambda paths: TeacherCache(teacher, train, paths))
    expected, history = trained(
        "cache", teacher, lambda paths: made.append(TeacherCache(teacher, train, paths)) or made[0], True
    )
    assert history[0]["loss"] == pytest.approx(trained("plain", teacher)[1][0]["loss"], rel=0.02)
    save_teacher(tmp_path / "t.safetensors", made[0], test)
    found, again = trained("file", load_teacher(tmp_path / "t.safetensors"))
    assert again == history and same(found, expected)
