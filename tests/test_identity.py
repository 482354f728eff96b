"What a run is: what decides its result is compared before a folder, a checkpoint or a result is used again."

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import rcka.trainer as T
from rcka.data import load_dataset
from rcka.losses import create_method, list_methods
from rcka.models import create_model
from rcka.trainer import Distiller, Recipe, Trainer, checkpoints

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def data():
    return load_dataset("digits", limit=96, test_limit=60)


def network(seed, name="resnet8"):
    torch.manual_seed(seed)
    return create_model(name, num_classes=10, in_channels=1)


def trainer(
    data, folder, method="rcka", args=None, teacher=0, student="resnet8", recipe=None, batches=None, paths=None, **how
):
    return Trainer(
        Distiller(
            network(1, student),
            create_method(method, args),
            None if teacher is None else network(teacher),
            *(paths or ()),
        ),
        data.batches(32, **(batches or {})),
        data.batches(train=False),
        recipe or Recipe(epochs=1, lr=0.01),
        folder,
        **how,
    )


# a folder of the trainer


def other_test(data):
    images = data.test_images.clone()
    images[3, 0, 0, 0] += 1
    return replace(data, test_images=images)


def other_targets(data):
    targets = data.train_targets.clone()
    targets[0] = (targets[0] + 1) % 10
    return replace(data, train_targets=targets)


OTHERS = {
    "method": (dict(method="kd"), None, "method: class: 'RCKA' there, 'KD' here"),
    "argument": (dict(args={"alpha": 4}), None, r"method: fcka.weight: '16.0' there, '4' here"),
    "nested argument": (dict(args={"temperature": 2.0}), None, r"lcka.options: .*'temperature': 2.0"),
    "another teacher": (dict(teacher=5), None, "teacher: 'weights .*' there, 'weights .*' here"),
    "no teacher": (dict(method="none", teacher=None), None, "teacher: 'weights .*' there, 'none' here"),
    "student": (dict(student="resnet14"), None, "student: '.* parameters"),
    "features": (dict(paths=(["conv1"], ["conv1"])), None, "features of the student"),
    "test images": ({}, other_test, "test data: content"),
    "training targets": ({}, other_targets, "training data: content"),
    "order of the data": (dict(batches={"seed": 3}), None, "training data: seed: 0 there, 3 here"),
    "augmentation": (dict(batches={"pad": 2}), None, "training data: pad: 1 there, 2 here"),
}


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    trainer(data, folder).fit(progress=False)
    return folder


@pytest.mark.parametrize("what", OTHERS)
def test_a_folder_of_another_run_is_refused(data, trained, what):
    "The history of a run is nobody else's, and the error says what differs."
    given, changed, said = OTHERS[what]
    before = {p.name: p.read_bytes() for p in trained.iterdir()}
    with pytest.raises(ValueError, match=f"belongs to another run .*{said}.*Use another folder"):
        trainer(changed(data) if changed else data, trained, **given).fit(progress=False)
    assert {p.name: p.read_bytes() for p in trained.iterdir()} == before


def test_alone_is_not_distilled(data, tmp_path):
    "The other way round: a folder where a student was trained alone."
    trainer(data, tmp_path, "none", teacher=None).fit(progress=False)
    with pytest.raises(ValueError, match="teacher: 'none' there, 'weights"):
        trainer(data, tmp_path).fit(progress=False)


def test_the_same_run_is_found(data, trained):
    "Equal objects, made again: the history is read and nothing is trained."
    again = trainer(data, trained)
    again.train_step = None
    assert len(again.fit(progress=False)) == 1
    assert again.epoch == 1


def test_memory_layout_and_initial_weights_are_no_identity(data, trained):
    with pytest.warns(UserWarning, match="another setting"):
        assert trainer(data, trained, channels_last=True).fit(progress=False)


def small(name):
    return {"crd": {"negatives": 16, "width": 8}, "dpk": {}}.get(name, {})


@pytest.mark.parametrize("name", list_methods())
def test_identity_of_a_method_outlasts_training(data, tmp_path, name):
    "What counts as a setting does not change while a method learns, or a run would not find its own checkpoint."
    if name != "none" and create_method(name).dense:
        pytest.skip("of dense methods: see the next test")
    t = trainer(data, tmp_path, name, small(name), teacher=None if name == "none" else 0)
    t.resume()
    before = dict(t.identity)
    t.begin_epoch()
    for batch in t.train.epoch(0):
        t.train_step(batch)
    t.task.method.set_epoch(7)
    t.resume()
    assert t.identity == before


@pytest.mark.parametrize("name", [n for n in list_methods() if create_method(n).dense])
def test_identity_of_a_dense_method_knows_its_arguments(name):
    import inspect

    plain = T.method_identity(create_method(name))
    assert plain == T.method_identity(create_method(name))
    numbers = [
        (k, p.default)
        for k, p in inspect.signature(type(create_method(name))).parameters.items()
        if isinstance(p.default, float) and p.default > 0
    ]
    for k, default in numbers:
        assert T.method_identity(create_method(name, {k: default / 2})) != plain, k


def test_identity_of_a_sum_names_the_part():
    a, b = (T.method_identity(create_method("kd+fcka", {"fcka.weight": w})) for w in (1.0, 2.0))
    assert {k for k in a if a[k] != b[k]} == {"parts.1.weight"}


# data in files


def test_files_are_compared_by_name_and_size(tmp_path):
    "An image that is gone, one that is larger, one that has another name."
    for name in ("a/1.jpg", "a/2.jpg", "b/1.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    files = sorted(tmp_path.glob("*/*"))
    found = [T.listing(tmp_path, files), T.listing(tmp_path, files[:2])]
    (tmp_path / "a" / "2.jpg").write_bytes(b"longer than before")
    found.append(T.listing(tmp_path, files))
    (tmp_path / "a" / "2.jpg").rename(tmp_path / "b" / "2.jpg")
    found.append(T.listing(tmp_path, sorted(tmp_path.glob("*/*"))))
    assert len(set(found)) == 4
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert T.listing(moved, sorted(moved.glob("*/*"))) == found[-1], "where the folder lies does not matter"


def test_other_batches(data):
    "A loader of one's own is compared by its targets and its length, or by what it says."

    class Own:
        targets = torch.tensor([1, 2])

        def __len__(self):
            return 3

    class Says(Own):
        def identity(self):
            return {"version": 7}

    other = Own()
    other.targets = torch.tensor([2, 1])
    assert T.data_identity(Own(), True) == T.data_identity(Own(), True) != T.data_identity(other, True)
    assert T.data_identity(Says(), True) == {"version": 7}


# random numbers


def connectors(data, folder, seed, outside):
    t = trainer(data, folder, "crd", small("crd"), recipe=Recipe(epochs=1, lr=0.01, seed=seed))
    torch.manual_seed(outside)
    t = Trainer(t.task, t.train, t.test, t.recipe, folder)
    return torch.cat([p.detach().flatten() for p in t.task.method.parameters()]), t.fit(progress=False)[0]["crd"]


def test_recipe_seed_decides_what_is_random(data, tmp_path):
    "Connectors and random negatives follow from the recipe's seed, whatever was drawn before."
    a, b, c = (
        connectors(data, tmp_path / str(i), seed, outside) for i, (seed, outside) in enumerate([(0, 1), (0, 2), (3, 1)])
    )
    assert torch.equal(a[0], b[0]) and a[1] == b[1]
    assert not torch.equal(a[0], c[0])


def test_making_a_trainer_draws_nothing_outside(data, tmp_path):
    t = trainer(data, tmp_path, "crd", small("crd"))
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    Trainer(t.task, t.train, t.test, t.recipe, tmp_path)
    assert torch.equal(torch.rand(3), expected)


# determinism


def test_import_leaves_the_environment_alone():
    "The workspace of cuBLAS is a global setting: only deterministic=True asks for it."
    env = {k: v for k, v in os.environ.items() if k != "CUBLAS_WORKSPACE_CONFIG"} | {"PYTHONPATH": str(REPO)}
    code = "import os, rcka.trainer, rcka.experiments; print('CUBLAS_WORKSPACE_CONFIG' in os.environ)"
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("running", [False, True])
def test_workspace_is_set_when_asked_for(monkeypatch, recwarn, running):
    "Before CUDA starts in silence; after that with a warning that says what to do."
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is put back
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: running)
    T.cublas_workspace()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    said = [str(w.message) for w in recwarn]
    assert bool(said) == running and all("CUBLAS_WORKSPACE_CONFIG=:4096:8" in s for s in said)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    T.cublas_workspace()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_older_checkpoints_are_refused(data, trained, tmp_path, monkeypatch):
    "They do not say what they were made with."
    with monkeypatch.context() as m:
        m.setattr(T, "CHECKPOINT_FORMAT", 3)
        trainer(data, tmp_path).fit(progress=False)
    assert checkpoints(tmp_path)
    with pytest.raises(ValueError, match="format 3 and this version reads 4"):
        trainer(data, tmp_path).fit(progress=False)
