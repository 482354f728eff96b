"The trainer: full disks, read-only folders, precisions, fast paths against plain ones, groups of runs."

import copy
import errno
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from interruption import interrupt_at

from rcka.data.datasets import load_dataset
from rcka.experiments.experiment import Experiment
from rcka.methods.base import create_method
from rcka.models.registry import create_model
from rcka.train.callbacks import EMA, NonFiniteLoss
from rcka.train.checkpoint import checkpoints, last_checkpoint
from rcka.train.classification import Distiller, evaluate
from rcka.train.config import TrainConfig
from rcka.train.learner import RunsFailed, Trainer, fit_many
from rcka.train.teacher_cache import TeacherCache

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.fixture(scope="module")
def data():
    return load_dataset("digits", limit=160, test_limit=150)


def network(seed, name="resnet8"):
    torch.manual_seed(seed)
    return create_model(name, num_classes=10, in_channels=1)


def trainer(
    data,
    folder,
    seed=1,
    method="rcka",
    device="cpu",
    teacher=None,
    train=None,
    test=None,
    epochs=3,
    config=None,
    **kwargs,
):
    train, test = train or data.batches(32, device=device), test or data.batches(train=False, device=device)
    teacher = teacher or network(0).to(device)
    return Trainer(
        Distiller(network(seed).to(device), create_method(method), teacher),
        train,
        test,
        TrainConfig(epochs=epochs, schedule="onecycle", **(config or {})),
        folder,
        **kwargs,
    )


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# disks


def mounted(folder, *options):
    "A small file system of its own, where this process may make one."
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("no right to mount")
    return folder


def test_disk_full(data, tmp_path):
    "The error says what to do, the checkpoint before is whole, and the run goes on from it to the same bits."
    whole = trainer(data, tmp_path / "whole")
    expected = whole.fit(progress=False)
    disk = mounted(tmp_path / "disk", "-o", "size=3m")
    try:
        t = trainer(data, disk / "run", checkpoint_seconds=0)
        step = t.train_step

        def fill(*args):
            if t.epoch == 1:
                with open(disk / "ballast", "wb", buffering=0) as f:
                    try:
                        while True:
                            f.write(bytes(4096))
                    except OSError:
                        pass
            step(*args)

        t.train_step = fill
        with pytest.raises(
            OSError, match="No space left.*has a checkpoint after 1 epochs and 0 steps.*Free space"
        ) as e:
            t.fit(progress=False)
        assert e.value.errno == errno.ENOSPC
        assert last_checkpoint(disk / "run")["epoch"] == 1 and not list((disk / "run").glob(".*.tmp"))
        (disk / "ballast").unlink()
        again = trainer(data, disk / "run", seed=9)
        assert again.fit(progress=False) == expected
        assert same(again.task.student, whole.task.student)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_read_only_folder(data, tmp_path):
    "Said before anything is trained; the run that is there stays as it is."
    disk = mounted(tmp_path / "disk")
    try:
        trainer(data, disk / "run", epochs=1).fit(progress=False)
        before = {p.name: p.read_bytes() for p in (disk / "run").iterdir()}
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for folder in ("run", "new"):
            with pytest.raises(
                OSError, match="cannot write to the folder of the run .Read-only file system.; nothing was changed"
            ):
                trainer(data, disk / folder, epochs=1).fit(progress=False)
        assert before == {p.name: p.read_bytes() for p in (disk / "run").iterdir()}
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_disk_errors_without_a_disk(data, tmp_path, monkeypatch, code):
    t = trainer(data, tmp_path, checkpoint_seconds=0)
    calls, fsync = [], os.fsync

    def fail(fd):
        calls.append(1)
        if len(calls) > 12:
            raise OSError(code, os.strerror(code))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="has a checkpoint after") as e:
        t.fit(progress=False)
    assert e.value.errno == code and last_checkpoint(tmp_path) and not list(tmp_path.glob(".*.tmp"))


@pytest.mark.slow
def test_damaged_checkpoint(data, tmp_path):
    "A flipped byte in the newest: said, set aside, and the run ends with the same bits from the one before."
    whole = trainer(data, tmp_path / "whole")
    expected = whole.fit(progress=False)
    t = trainer(data, tmp_path / "run", checkpoint_seconds=0)
    interrupt_at(t, 8)
    with pytest.raises(KeyboardInterrupt):
        t.fit(progress=False)
    newest = checkpoints(t.folder)[-1]
    content = bytearray(newest.read_bytes())
    content[len(content) // 3] ^= 16
    newest.write_bytes(content)
    again = trainer(data, tmp_path / "run", seed=7)
    with pytest.warns(UserWarning, match=f"{newest.name} is damaged.*checkpoint before it is used"):
        assert again.fit(progress=False) == expected
    assert same(again.task.student, whole.task.student)


def test_other_setting_is_said(data, tmp_path):
    trainer(data, tmp_path, epochs=1).fit(progress=False)
    with pytest.warns(UserWarning, match="another environment .channels_last: False there, True here"):
        trainer(data, tmp_path, epochs=1, channels_last=True).fit(progress=False)


# every optimisation keeps the numbers


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "fast, tolerance", [({"channels_last": True}, 1e-4), ({"precision": "bf16"}, 0.03), ({"precision": "fp16"}, 0.03)]
)
@pytest.mark.slow
def test_fast_paths_keep_the_loss_curve(data, tmp_path, device, fast, tolerance):
    """Relative difference of the epochs' mean losses to the plain path in fp32, at a rate at which rounding does not
    grow."""
    slow = {"lr": 0.002}
    plain = trainer(data, tmp_path / "plain", device=device, config=slow).fit(progress=False)
    config = slow | {k: fast[k] for k in fast if k == "precision"}
    quick = trainer(
        data, tmp_path / "quick", device=device, config=config, **{k: v for k, v in fast.items() if k != "precision"}
    ).fit(progress=False)
    for a, b in zip(plain, quick, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["kd", "rcka", "fitnet", "srrl", "crd"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_teacher_stored_in_bf16(data, tmp_path, precision, method):
    "Its images are brought to its precision, also where the connectors are built, outside of autocast."
    teacher = network(0)
    plain = trainer(data, tmp_path / "plain", method=method, teacher=copy.deepcopy(teacher), epochs=1).fit(False)
    stored = trainer(
        data, tmp_path / "bf16", method=method, teacher=teacher.bfloat16(), epochs=1, config={"precision": precision}
    )
    (row,) = stored.fit(progress=False)
    assert row["loss"] == pytest.approx(plain[0]["loss"], rel=0.1)


def test_a_group_with_a_teacher_stored_in_bf16(data, tmp_path):
    "Sharing its forward pass, or what was kept of it, gives the bits of its own runs."
    train, test, teacher = data.batches(32, views=2), data.batches(train=False), network(0).bfloat16()
    make = lambda where, m, **k: trainer(
        data, tmp_path / where / m, method=m, teacher=teacher, train=train, test=test, epochs=1, **k
    )
    together = fit_many([make("many", m) for m in ("kd", "rcka")], progress=False)
    assert together == [make("alone", m).fit(progress=False) for m in ("kd", "rcka")]
    cache = TeacherCache(teacher, train, ["layer3"])
    (row,) = make("cache", "rcka", teacher_cache=cache).fit(progress=False)
    assert row["loss"] == pytest.approx(together[1][0]["loss"], rel=1e-3)
    assert evaluate(teacher, test).top1 >= 0


@pytest.mark.parametrize("device", DEVICES)
def test_fused_optimiser_is_sgd(data, tmp_path, device):
    slow = {"lr": 0.002}  # at which rounding does not grow
    t = trainer(data, tmp_path / "fused", device=device, config=slow)
    plain = trainer(data, tmp_path / "plain", device=device, config=slow)
    plain.optimizer = torch.optim.SGD(plain.parameters, lr=0.002, momentum=0.9, weight_decay=5e-4, foreach=False)
    for a, b in zip(t.fit(progress=False), plain.fit(progress=False), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


@pytest.mark.skipif(
    not torch.cuda.is_available() and not os.environ.get("RCKA_SLOW"),
    reason="compiling takes minutes on a CPU; RCKA_SLOW=1 runs it",
)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.slow
def test_compile_keeps_the_loss_curve(data, tmp_path, device):
    plain = trainer(data, tmp_path / "plain", device=device).fit(progress=False)
    quick = trainer(data, tmp_path / "quick", device=device, compile=True).fit(progress=False)
    for a, b in zip(plain, quick, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


# groups of runs


@pytest.mark.slow
def test_a_group_gets_the_same_bits(data, tmp_path):
    """Three students with methods that draw random numbers and keep memory, together and alone; killed and resumed at
    different steps."""
    train, test, teacher = data.batches(32), data.batches(train=False), network(0)
    methods = ["crd+rcka", "kd", "at+fcka"]
    make = lambda where, i: trainer(
        data,
        tmp_path / where / str(i),
        seed=i,
        method=methods[i],
        teacher=teacher,
        train=train,
        test=test,
        checkpoint_seconds=0,
    )
    alone = [make("alone", i) for i in range(3)]
    expected = [t.fit(progress=False) for t in alone]
    broken = [make("together", i) for i in range(3)]
    interrupt_at(broken[1], 8)
    with pytest.raises(KeyboardInterrupt):
        fit_many(broken, progress=False)
    for old in checkpoints(broken[2].folder):
        old.unlink()  # the third begins again, the others wait for it
    again = [make("together", i) for i in range(3)]
    assert fit_many(again, progress=False) == expected
    for a, b in zip(alone, again):
        assert same(a.task.student, b.task.student)


@pytest.mark.slow
def test_a_run_that_fails_leaves_the_others_of_its_group_alone(data, tmp_path):
    "One diverges in the second epoch and one cannot write: the rest get the bits that they get alone."
    train, test, teacher = data.batches(32), data.batches(train=False), network(0)

    def make(where, i):
        shared = dict(teacher=teacher, train=train, test=test)
        return trainer(data, tmp_path / where / str(i), seed=i, method=["kd", "kd", "fcka", "at"][i], **shared)

    def breaks(learner, error):
        step = learner.train_step

        def failing(*args):
            if learner.epoch == 1:
                raise error
            step(*args)

        learner.train_step = failing

    alone = {i: make("alone", i) for i in (0, 3)}
    expected = {i: t.fit(progress=False) for i, t in alone.items()}
    group = [make("group", i) for i in range(4)]
    breaks(group[1], NonFiniteLoss("kd is not finite"))
    breaks(group[2], OSError("disk"))
    with pytest.raises(RunsFailed, match="kd is not finite.*OSError: disk") as found:
        fit_many(group, progress=False)
    assert list(found.value.failures) == group[1:3]
    for i, t in alone.items():
        assert group[i].history == expected[i] and same(t.task.student, group[i].task.student)
    breaks(single := make("single", 0), OSError("disk"))
    with pytest.raises(OSError, match="disk"):
        single.fit(progress=False)


def test_without_test_images(data, tmp_path):
    """Trained to the same losses; the last epoch counts as the best, averages and resume work, and images may not come
    later."""
    plain = trainer(data, tmp_path / "plain").fit(progress=False)
    parts = (Distiller(network(1), create_method("rcka"), network(0)), data.batches(32), None)
    config = TrainConfig(epochs=3, schedule="onecycle")
    alone = Trainer(*parts, config, tmp_path / "alone", callbacks=[EMA(0.9)])
    history = alone.fit()
    assert [row["loss"] for row in history] == [row["loss"] for row in plain] and "top1" not in history[0]
    assert alone.best is alone.history[-1] and (tmp_path / "alone" / "best.safetensors").is_file()
    again = Trainer(*parts, config, tmp_path / "alone", callbacks=[EMA(0.9)])
    assert again.fit(False) == history
    with pytest.raises(ValueError, match="belongs to another run .*test data"):
        trainer(data, tmp_path / "alone", callbacks=[EMA(0.9)]).fit(False)


def test_images_without_targets_are_refused(data, tmp_path):
    "Of a loader that yields images alone: they would pass for images of the first class."
    from torch.utils.data import DataLoader, TensorDataset

    images = data.train_images[:64] / 255
    labelled = DataLoader(TensorDataset(images, data.train_targets[:64]), batch_size=32)
    alone, config = DataLoader(images, batch_size=32), TrainConfig(epochs=1)
    task = Distiller(network(1), create_method("kd"), network(0))
    with pytest.raises(ValueError, match="training batches have no targets.* UnlabelledDistiller"):
        Trainer(task, alone, labelled, config, tmp_path / "a")
    with pytest.raises(ValueError, match="evaluation have no targets"):
        evaluate(network(1), alone)
    assert 0 <= evaluate(network(1), labelled).top1 <= 100


def test_a_trained_network_can_be_scripted(tmp_path):
    "Once the task is closed: torch.jit.script refuses hooks."
    data = load_dataset("digits", limit=64, test_limit=50)
    torch.manual_seed(0)
    student, teacher = (create_model("torchvision/shufflenet_v2_x0_5", 10, 1) for _ in range(2))
    task = Distiller(student, create_method("kd+fcka"), teacher)
    config = TrainConfig(epochs=1, lr=1e-3)
    Trainer(task, data.batches(32), data.batches(train=False), config, tmp_path).fit(False)
    task.close()
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(student.eval())(x), student(x))
    assert not any(m._forward_hooks or m._forward_pre_hooks for net in (student, teacher) for m in net.modules())


def test_random_numbers_outside_are_left_alone(data, tmp_path):
    torch.manual_seed(11)
    expected = torch.rand(3)
    t = trainer(data, tmp_path, method="crd", epochs=1)
    torch.manual_seed(11)
    t.fit(progress=False)
    assert torch.equal(torch.rand(3), expected)


# speed


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_no_host_synchronisation_in_a_step(data, tmp_path, precision):
    t = trainer(data, tmp_path, device="cuda", config={"precision": precision})
    batches = list(t.train.epoch(0))
    t.begin_epoch()
    t.train_step(batches[0])
    try:
        torch.cuda.set_sync_debug_mode("error")
        for batch in batches[1:]:
            t.train_step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_given_teacher_with_paths_of_its_own(tmp_path):
    "The student's module paths are the student's alone, also when the teacher's accuracy is measured."
    e = Experiment(
        "digits",
        "vgg8",
        "resnet8",
        "fcka",
        epochs=1,
        train_limit=64,
        test_limit=40,
        student_paths=("block0.0",),
        teacher_paths=("conv1",),
    )
    torch.manual_seed(0)
    weights = create_model("resnet8", num_classes=10, in_channels=1).state_dict()
    torch.save(weights, tmp_path / "resnet8.pth")
    parts = replace(e, teacher_weights=str(tmp_path / "resnet8.pth")).prepare(tmp_path, "cpu", False, {})
    assert set(parts.teacher_scores) == {"top1", "top5"} and list(parts.task.student_taps.paths) == ["block0.0"]
    assert not any(m._forward_hooks for m in parts.teacher.modules() if m is not parts.teacher.conv1)


@pytest.mark.slow
def test_speed_notebook(tmp_path):
    "The benchmark runs, small."
    import papermill

    done = papermill.execute_notebook(
        Path(__file__).parents[1] / "nbs/benchmarks/speed.ipynb",
        tmp_path / "speed.ipynb",
        cwd=tmp_path,
        progress_bar=False,
        kernel_name="python3",
        parameters=dict(
            teacher="resnet14",
            student="resnet8",
            batch_size=16,
            classes=10,
            image=16,
            rounds=1,
            maps=[[1, 16, 20, 24]],
            images=64,
            pairs=[["resnet14", "resnet8"]],
            seeds=[0, 1],
        ),
    )
    text = "".join(str(o.get("text", "")) for cell in done["cells"] for o in cell.get("outputs", []))
    assert "2 students together" in text and "RCKA's terms" in text


FREED = """
import resource, torch
from rcka.train.config import keep_freed_memory
kept = keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**22).add(1)  # 16 MB each
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(int(kept), faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.parametrize("tuned", [{}, {"MALLOC_ARENA_MAX": "2"}])
def test_freed_memory_is_kept_for_the_next_step(tuned):
    "The same large tensors again cost few page faults; an allocator that was tuned from outside is left alone."
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    done = subprocess.run([sys.executable, "-c", FREED], env=clean | tuned, capture_output=True, text=True, check=True)
    kept, faults = map(int, done.stdout.split())
    if tuned:
        assert not kept
    elif not kept:
        pytest.skip("another C library")
    else:
        assert faults < 20 * 4096 / 4, faults  # 20 tensors of 4,096 pages
