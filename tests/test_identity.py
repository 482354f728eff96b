"What a run is: what decides its result is compared before a folder, a checkpoint or a result is used again."

import inspect
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import rcka.train.checkpoint as C
from rcka.data.datasets import load_dataset
from rcka.experiments.experiment import Experiment, run, run_many
from rcka.experiments.launch import kind_of, main, parse
from rcka.experiments.result import RESULT_FORMAT
from rcka.experiments.sweep import grid, sweep
from rcka.files import listing
from rcka.methods import BUILT_IN  # not list_methods(): other tests register more
from rcka.methods.base import METHODS, Method, create_method
from rcka.models.registry import create_model
from rcka.train.checkpoint import checkpoints
from rcka.train.classification import Distiller
from rcka.train.config import TrainConfig, auto_precision, cublas_workspace
from rcka.train.learner import Trainer

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def data():
    return load_dataset("digits", limit=96, test_limit=60)


def network(seed, name="resnet8"):
    torch.manual_seed(seed)
    return create_model(name, num_classes=10, in_channels=1)


def trainer(
    data, folder, method="rcka", args=None, teacher=0, student="resnet8", config=None, batches=None, paths=None, **how
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
        config or TrainConfig(epochs=1, lr=0.01),
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
    with pytest.warns(UserWarning, match="another environment"):
        assert trainer(data, trained, channels_last=True).fit(progress=False)


def small(name):
    return {"crd": {"negatives": 16, "width": 8}, "dpk": {}}.get(name, {})


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_identity_of_a_method_outlasts_training(data, tmp_path, name):
    "What counts as a setting does not change while a method learns, or a run would not find its own checkpoint."
    if name != "none" and create_method(name).dense:
        pytest.skip("of dense methods: see the next test")
    t = trainer(data, tmp_path, name, small(name), teacher=None if name == "none" else 0)
    before = t.identity()
    t.begin_epoch()
    for batch in t.train.epoch(0):
        t.train_step(batch)
    t.task.method.set_epoch(7)
    assert t.identity() == before


@pytest.mark.parametrize("name", [n for n in sorted(BUILT_IN) if create_method(n).dense])
def test_identity_of_a_dense_method_knows_its_arguments(name):
    plain = C.method_identity(create_method(name))
    assert plain == C.method_identity(create_method(name))
    numbers = [
        (k, p.default)
        for k, p in inspect.signature(type(create_method(name))).parameters.items()
        if isinstance(p.default, float) and p.default > 0
    ]
    for k, default in numbers:
        assert C.method_identity(create_method(name, {k: default / 2})) != plain, k


def test_identity_of_a_sum_names_the_part():
    a, b = (C.method_identity(create_method("kd+fcka", {"fcka.weight": w})) for w in (1.0, 2.0))
    assert {k for k in a if a[k] != b[k]} == {"parts.1.weight"}


# data in files


def test_files_are_compared_by_name_and_size(tmp_path):
    "An image that is gone, one that is larger, one that has another name."
    for name in ("a/1.jpg", "a/2.jpg", "b/1.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    files = sorted(tmp_path.glob("*/*"))
    found = [listing(tmp_path, files), listing(tmp_path, files[:2])]
    (tmp_path / "a" / "2.jpg").write_bytes(b"longer than before")
    found.append(listing(tmp_path, files))
    (tmp_path / "a" / "2.jpg").rename(tmp_path / "b" / "2.jpg")
    found.append(listing(tmp_path, sorted(tmp_path.glob("*/*"))))
    assert len(set(found)) == 4
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert listing(moved, sorted(moved.glob("*/*"))) == found[-1], "where the folder lies does not matter"


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
    assert C.data_identity(Own()) == C.data_identity(Own()) != C.data_identity(other)
    assert C.data_identity(Says()) == {"version": 7}


# random numbers


def connectors(data, folder, seed, outside):
    t = trainer(data, folder, "crd", small("crd"), config=TrainConfig(epochs=1, lr=0.01, seed=seed))
    torch.manual_seed(outside)
    t = Trainer(t.task, t.train, t.test, t.config, folder)
    return torch.cat([p.detach().flatten() for p in t.task.method.parameters()]), t.fit(progress=False)[0]["crd"]


def test_config_seed_decides_what_is_random(data, tmp_path):
    "Connectors and random negatives follow from the seed of the configuration, whatever was drawn before."
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
    Trainer(t.task, t.train, t.test, t.config, tmp_path)
    assert torch.equal(torch.rand(3), expected)


# determinism


@pytest.mark.slow
def test_import_leaves_the_environment_alone():
    "The workspace of cuBLAS is a global setting: only deterministic=True asks for it."
    env = {k: v for k, v in os.environ.items() if k != "CUBLAS_WORKSPACE_CONFIG"} | {"PYTHONPATH": str(REPO)}
    code = "import os, rcka.train, rcka.experiments; print('CUBLAS_WORKSPACE_CONFIG' in os.environ)"
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("running", [False, True])
def test_workspace_is_set_when_asked_for(monkeypatch, recwarn, running):
    "Before CUDA starts in silence; after that with a warning that says what to do."
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is put back
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: running)
    cublas_workspace()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    said = [str(w.message) for w in recwarn]
    assert bool(said) == running and all("CUBLAS_WORKSPACE_CONFIG=:4096:8" in s for s in said)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    cublas_workspace()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_older_checkpoints_are_refused(data, trained, tmp_path, monkeypatch):
    "They do not say what they were made with."
    with monkeypatch.context() as m:
        m.setattr(C, "CHECKPOINT_FORMAT", C.CHECKPOINT_FORMAT - 1)
        trainer(data, tmp_path).fit(progress=False)
    assert checkpoints(tmp_path)
    with pytest.raises(
        ValueError, match=f"format {C.CHECKPOINT_FORMAT - 1}, but this version reads format {C.CHECKPOINT_FORMAT}"
    ):
        trainer(data, tmp_path).fit(progress=False)


# experiments: the key


GOLDEN = {
    "classification": (
        dict(dataset="cifar100", student="resnet8x4", teacher="resnet32x4", method="rcka"),
        "cifar100-resnet32x4-resnet8x4-rcka-s0-4f353653",
    ),
    "detection": (
        dict(dataset="coco", detector="retinanet", student="resnet50", teacher="resnet101", method="pcka"),
        "coco-retinanet-resnet101-resnet50-pcka-s0-20773cc2",
    ),
    "segmentation": (
        dict(dataset="cityscapes", student="pspnet/resnet18", teacher="pspnet/resnet101", method="lcka"),
        "cityscapes-pspnet.resnet101-pspnet.resnet18-lcka-s0-c7c9c610",
    ),
}


def kind(name):
    return kind_of(["--kind", name])


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_key(name):
    """The key of an experiment changes only where somebody means it to: with a default, a field or an argument of its
    method.

    Old results are then those of another experiment, and are made again: change the literal and say so in
    CHANGELOG.md."""
    fields, key = GOLDEN[name]
    assert kind(name)(**fields).key == key


@pytest.mark.parametrize("name", GOLDEN)
def test_experiments_hold_all_arguments(name):
    """Those of the method with their values, the same after a round trip through JSON and when they are given one by
    one."""
    fields, _ = GOLDEN[name]
    e = kind(name)(**fields)
    arguments = inspect.signature(type(create_method(e.method))).parameters
    assert set(e.method_args) == set(arguments)
    again = kind(name).from_dict(json.loads(json.dumps(e.to_dict())))
    assert again == e and again.key == e.key
    some = next(k for k, v in e.method_args.items() if isinstance(v, float))
    assert replace(e, method_args={some: e.method_args[some]} | e.method_args).key == e.key
    assert replace(e, method_args=e.method_args | {some: e.method_args[some] + 1}).key != e.key


def test_a_changed_default_is_another_experiment(monkeypatch):
    "As rcka's alpha went from 4 to 16."

    def make(default):
        class Changing(Method):
            def __init__(self, alpha: float = default, stages=(-1,)):
                super().__init__()
                self.alpha, self.stages = alpha, stages

        monkeypatch.setitem(METHODS, "changing", Changing)
        return Experiment("digits", "resnet8", "resnet14", "changing")

    old, new = make(4.0), make(16.0)
    assert old.method_args == {"alpha": 4.0, "stages": [-1]} and new.method_args["alpha"] == 16.0
    assert old.key != new.key
    assert Experiment.from_dict(old.to_dict()).key == old.key  # an old result keeps its own
    assert replace(new, method_args={"alpha": 4}).key == old.key  # 4 and 4.0 are one value


OPTIMISATION = dict(
    optimizer="adamw",
    betas=(0.8, 0.9),
    decay_norms=False,
    grad_clip=1.0,
    accumulate=2,
    warmup_steps=5,
    nesterov=True,
    lr_steps=(0.5,),
    lr_decay=0.2,
)


@pytest.mark.parametrize("name", GOLDEN)
def test_experiments_of_all_kinds_say_how_to_optimise(name):
    "A value is in the key and reaches `TrainConfig`; a default, given or left out, is one configuration and one key."
    plain = kind(name)()
    assert set(OPTIMISATION) >= set(plain.same_as_default)
    defaults = {field: getattr(TrainConfig, field) for field in plain.same_as_default}
    assert replace(plain, **defaults).key == plain.key and replace(plain, **defaults).train_config == plain.train_config
    for field, value in OPTIMISATION.items():
        e = replace(plain, **{field: value})
        assert e.key != plain.key and getattr(e.train_config, field) == value
    adam = replace(plain, **OPTIMISATION)
    again = kind(name).from_dict(json.loads(json.dumps(adam.to_dict())))
    assert again == adam and again.train_config == adam.train_config


@pytest.mark.parametrize("name", GOLDEN)
def test_groups_of_fields(name):
    "An experiment is composed of groups of fields, and gives each back with what is None filled in."
    fields, _ = GOLDEN[name]
    e = kind(name)(**fields, seed=3, data_seed=5, teacher_epochs=7, batch_size=8, lr=0.3)
    assert e.teacher_config.teacher_epochs == e.teacher_experiment.epochs == 7
    assert e.teacher_config.teacher_lr == e.teacher_experiment.lr > 0
    assert (e.data_config.data_seed, replace(e, data_seed=None).data_config.data_seed) == (5, 3)
    assert (e.data_config.dataset, e.data_config.batch_size) == (fields["dataset"], 8)
    assert kind(name)().teacher_config is None


def test_arguments_of_a_sum_are_those_of_its_parts():
    e = Experiment("digits", "resnet8", "resnet14", "kd+fcka", method_args={"fcka.weight": 3})
    assert e.method_args["fcka.weight"] == 3.0 and e.method_args["kd.temperature"] == 4.0
    assert e.key == replace(e, method_args={"fcka.weight": 3.0}).key
    assert (
        Experiment("digits", "resnet8", "resnet14", "kd", method_args={"kd.temperature": 2}).method_args
        == Experiment("digits", "resnet8", "resnet14", "kd", method_args={"temperature": 2.0}).method_args
    )


# a teacher without a method


@pytest.mark.parametrize(
    "name, fields",
    [
        ("classification", dict(dataset="digits", teacher="resnet14")),
        ("classification", dict(dataset="digits", teacher="resnett14")),
        ("classification", dict(dataset="digits", teacher_weights="teacher.pth")),
        ("detection", dict(teacher="resnet101")),
        ("segmentation", dict(teacher="pspnet/resnet101")),
    ],
)
def test_a_teacher_without_a_method_is_refused(name, fields, tmp_path, capsys):
    with pytest.raises(ValueError, match="method 'none' trains the student alone: give a method"):
        kind(name)(**fields)
    options = [text for k, v in fields.items() for text in (f"--{k}", v)]
    assert main(["--kind", name, *options, "--root", str(tmp_path)]) == 1
    assert "trains the student alone" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_grids_and_pages_leave_the_teacher_of_a_student_alone_out():
    alone, distilled = grid("digits", "resnet14:resnet8", "none,kd", [0], teacher_epochs=3, teacher_weights="t.pth")
    assert alone == Experiment("digits", "resnet8") and distilled.teacher_weights == "t.pth"
    page = dict(dataset="digits", student="resnet8", teacher="resnet14", teacher_epochs=3)
    assert Experiment.from_parameters(page | {"method": "none"}) == Experiment("digits", "resnet8")
    assert distilled.teacher_experiment.teacher is None and distilled.teacher_experiment.student == "resnet14"


# results, and what they were made from


@pytest.fixture
def folder(tmp_path):
    "Forty small images in two classes."
    g = torch.Generator().manual_seed(0)
    for part, n in (("train", 12), ("test", 8)):
        for c in ("cat", "dog"):
            (tmp_path / "data" / part / c).mkdir(parents=True)
            for i in range(n):
                picture(tmp_path / "data" / part / c / f"{i:02}.png", g)
    return tmp_path / "data"


def picture(path, g=None):
    pixels = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8, generator=g or torch.Generator().manual_seed(5))
    Image.fromarray(pixels.numpy()).save(path)


def command(folder, tmp_path, *more):
    fields = ["--dataset", f"imagefolder:{folder}", "--student", "resnet8", "--epochs", "1", "--batch_size", "8"]
    return main([*fields, "--root", str(tmp_path / "runs"), "--device", "cpu", "--quiet", *more])


def delete(folder):
    (folder / "train" / "cat" / "03.png").unlink()


def add(folder):
    picture(folder / "test" / "dog" / "more.png")


def add_a_class(folder):
    for part in ("train", "test"):
        (folder / part / "emu").mkdir()
        picture(folder / part / "emu" / "0.png")


def relabel(folder):
    (folder / "train" / "cat" / "03.png").rename(folder / "train" / "dog" / "03x.png")


@pytest.mark.parametrize("change", [delete, add, add_a_class, relabel])
def test_train_refuses_the_result_of_other_images(folder, tmp_path, capsys, change):
    "Found and announced while the images are those it was made from; afterwards an error that says what changed."
    assert command(folder, tmp_path) == 0
    first = capsys.readouterr()
    assert "found" not in first.err
    assert command(folder, tmp_path) == 0
    second = capsys.readouterr()
    assert second.out == first.out and re.search(r"found \S+, finished on 20\d\d-", second.err)
    change(folder)
    before = {p: p.read_bytes() for p in (tmp_path / "runs").glob("*/*") if p.is_file()}
    assert command(folder, tmp_path) == 1
    said = capsys.readouterr()
    assert not said.out and "files of the dataset: 40 " in said.err and "remove the folder" in said.err
    assert {p: p.read_bytes() for p in (tmp_path / "runs").glob("*/*") if p.is_file()} == before


def test_train_refuses_the_result_of_other_weights(folder, tmp_path, capsys):
    "Another file behind --teacher_weights; a teacher that was trained again; a file that is gone is not compared."
    weights = tmp_path / "teacher.pth"
    options = ["--teacher", "resnet14", "--method", "kd", "--teacher_weights", str(weights)]
    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.save(create_model("resnet14", num_classes=2).state_dict(), weights)
        assert command(folder, tmp_path, *options) == seed
    assert "teacher_weights: " in capsys.readouterr().err
    weights.unlink()
    assert command(folder, tmp_path, *options) == 0
    assert "found" in capsys.readouterr().err

    options = ["--teacher", "resnet14", "--method", "kd", "--lr", "0.01"]
    assert command(folder, tmp_path, *options) == 0
    assert "found" not in capsys.readouterr().err
    assert command(folder, tmp_path, *options, "--method", "fcka") == 0
    assert re.search(r"found data-resnet14-none-\S+, finished on 20", capsys.readouterr().err)  # its teacher was there
    teacher = next((tmp_path / "runs").glob("data-resnet14-none-*/last.safetensors"))
    teacher.write_bytes(teacher.read_bytes()[:-4] + b"\0\0\0\0")
    assert command(folder, tmp_path, *options) == 1
    assert "the teacher's weights: " in capsys.readouterr().err


def test_results_of_shared_runs_and_sweeps_are_compared(folder, tmp_path):
    runs = [
        Experiment(f"imagefolder:{folder}", "resnet8", "resnet14", m, epochs=1, batch_size=8, data_seed=0)
        for m in ("kd", "fcka")
    ]
    first = run_many(runs, tmp_path / "runs", "cpu", progress=False)
    assert all(r.inputs["files of the dataset"].startswith("40 ") and r.inputs["the teacher's weights"] for r in first)
    assert run_many(runs, tmp_path / "runs", "cpu", progress=False) == first
    add(folder)
    with pytest.raises(ValueError, match="files of the dataset: 40 .* then, 41 "):
        run_many(runs, tmp_path / "runs", "cpu", progress=False)
    out = sweep(runs, tmp_path / "runs", ThreadPoolExecutor(1), every=0.1)
    assert len(out) == 3 and all(o.state == "failed" and "41 " in o.error for o in out)
    assert not list((tmp_path / "runs").glob("*/failure.json"))


def test_results_without_all_arguments_are_refused(folder, tmp_path):
    "Format 1 does not say them, so that today's defaults would be taken for those of then."
    e = Experiment(f"imagefolder:{folder}", "resnet8", epochs=1, batch_size=8)
    run(e, tmp_path, device="cpu", progress=False)
    path = tmp_path / e.key / "result.json"
    text = path.read_text()
    path.write_text(
        text.replace('"group_size": 1', '"company": 1').replace(f'"format": {RESULT_FORMAT}', '"format": 2')
    )
    assert run(e, tmp_path, device="cpu", progress=False).group_size == 1  # format 2 had another name
    path.write_text(text.replace(f'"format": {RESULT_FORMAT}', '"format": 1'))
    with pytest.raises(ValueError, match=f"result format 1, but this version reads format {RESULT_FORMAT}"):
        run(e, tmp_path, device="cpu", progress=False)


def test_interrupted_run_of_other_images(folder, tmp_path):
    "A checkpoint is compared too: nothing goes on with images it did not begin with."
    e = Experiment(f"imagefolder:{folder}", "resnet8", epochs=2, batch_size=8)
    run(e, tmp_path, device="cpu", progress=False)
    (tmp_path / e.key / "result.json").unlink()
    delete(folder)
    with pytest.raises(ValueError, match="belongs to another run .training data: content"):
        run(e, tmp_path, device="cpu", progress=False)


@pytest.mark.parametrize("name", ["imagenet", "coco", "cityscapes"])
def test_files_of_every_kind(name, tmp_path, monkeypatch):
    "Their names and sizes, whatever is decoded later; none where there is no dataset."
    monkeypatch.setenv("RCKA_DATA", str(tmp_path))
    e = {
        "imagenet": Experiment("imagenet", "resnet8"),
        "coco": kind("detection")(dataset="coco", train_split="train", test_split="val"),
        "cityscapes": kind("segmentation")(),
    }[name]
    assert e.files() is None and set(e.data_inputs().values()) == {None}
    places = {
        "imagenet": ["train/n01/a.JPEG", "train/n02/b.JPEG", "val/n01/c.JPEG", "test/d.JPEG", "val/n01/.hidden.JPEG"],
        "coco": [
            "train/a.jpg",
            "train/b.jpg",
            "val/c.jpg",
            "annotations/instances_train.json",
            "annotations/instances_val.json",
        ],
        "cityscapes": [f"{k}/{p}/x/a_{k}.png" for k in ("leftImg8bit", "gtFine") for p in ("train", "val", "test")],
    }[name]
    for place in places:
        (tmp_path / name / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name / place).write_text(place)
    found = [e.data_inputs()]
    assert len([f for f in e.files()[1] if Path(f).is_file()]) == {"imagenet": 3, "coco": 5, "cityscapes": 4}[name]
    (tmp_path / name / places[0]).write_text("longer than it was before")
    found.append(e.data_inputs())
    (tmp_path / name / places[0]).unlink()
    found.append(e.data_inputs())
    if name == "coco":  # a box that moved: as many bytes as before
        (tmp_path / name / places[3]).write_text(places[3].upper())
        found.append(e.data_inputs())
    assert len({str(f) for f in found}) == len(found)


# precision="auto"


@pytest.fixture
def bf16(request, monkeypatch):
    "Whether this machine, as torch is made to see it, has units for bfloat16."
    auto_precision.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, probe, lambda: request.param, raising=False)
    yield request.param
    auto_precision.cache_clear()


@pytest.mark.parametrize("bf16", [True, False], indirect=True)
def test_auto_precision_is_settled_when_a_run_is_described(bf16, capsys):
    "What is stored, and the key, are those of the precision that it becomes; it is said once."
    expected = "bf16" if bf16 else "fp32"
    auto = Experiment("digits", precision="auto")
    assert auto.to_dict()["precision"] == TrainConfig(precision="auto").precision == expected
    assert auto == Experiment("digits", precision=expected) and auto.key == Experiment("digits", precision=expected).key
    said = capsys.readouterr().err
    assert said.count("precision 'auto' is") == 1 and f"is '{expected}': the cpu device" in said
    experiment, options = parse(["--dataset", "digits", "--precision", "auto"])
    assert experiment == auto and options.get("channels_last", False) == bf16
    assert "channels_last" not in parse(["--dataset", "digits", "--precision", expected])[1]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("bf16", [True], indirect=True)
def test_auto_precision_goes_on_elsewhere_with_what_it_became(bf16, monkeypatch):
    first = Experiment("digits", precision="auto", epochs=1, train_limit=40, test_limit=20)
    auto_precision.cache_clear()
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    assert Experiment.from_dict(json.loads(json.dumps(first.to_dict()))).precision == "bf16"
    assert Experiment("digits", precision="auto").precision == "fp32"
    assert auto_precision("meta") == "fp32"  # neither cuda nor cpu
