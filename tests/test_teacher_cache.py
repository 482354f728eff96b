"The teacher's outputs, kept: same crops for both networks, same losses to rounding, same bits after a kill."

from dataclasses import replace

import pytest
import torch
from interruption import interrupt_at

from rcka.data.datasets import load_dataset
from rcka.experiments.experiment import Experiment, run, run_many
from rcka.methods.base import create_method
from rcka.models.registry import create_model
from rcka.train import Distiller, TrainConfig
from rcka.train.checkpoint import checkpoints
from rcka.train.learner import Learner, Trainer
from rcka.train.teacher_cache import TeacherCache


@pytest.fixture(scope="module")
def data():
    return load_dataset("digits", limit=160, test_limit=60)


def network(seed):
    torch.manual_seed(seed)
    return create_model("resnet8", 10, 1)


def make(data, folder, method="rcka", cache=True, width=None, where=None, epochs=3, **options):
    train, teacher = data.batches(32, views=2, seed=1), network(0)
    task = Distiller(network(1), create_method(method), teacher)
    kept = TeacherCache(teacher, train, task.teacher_taps.paths, where, width=width) if cache else None
    config = TrainConfig(epochs=epochs, lr=0.02)
    return Trainer(task, train, data.batches(train=False), config, folder, teacher_cache=kept, **options)


def test_a_stored_augmentation_is_of_the_image_alone(data):
    """Whatever seed, batch size and number of augmentations: image i in augmentation k is the same pixels, and all are
    used."""
    one, other = data.batches(32, views=2, seed=1), data.batches(48, views=4, seed=2)
    index = torch.tensor([5, 3, 77])
    pixels = [torch.cat([next(b.view(k, [index])) for k in range(b.views)]) for b in (one, other)]
    assert torch.equal(pixels[0], pixels[1][:6]) and not torch.equal(pixels[0][:3], pixels[0][3:])
    for epoch in (0, 3):
        batch = next(iter(one.epoch(epoch)))
        view = one.view_at(epoch)[batch.index]
        for k in range(2):
            assert torch.equal(batch.images[view == k], next(one.view(k, [batch.index[view == k]])))
    assert {tuple(sorted(v)) for v in zip(*(other.view_at(e).tolist() for e in range(4)))} == {(0, 1, 2, 3)}
    plain = [data.batches(32, seed=1).epoch(e) for e in (0, 1)]
    orders = [one.epoch(0), one.epoch(1)]
    for a, b in zip(plain, orders):  # the order of the images does not change
        assert all(torch.equal(x.index, y.index) for x, y in zip(a, b))
    assert one.identity() != data.batches(32, seed=1).identity()


@pytest.mark.parametrize("method", ["kd", "rcka", "fitnet"])
def test_losses_are_those_of_the_teacher_itself(data, tmp_path, method):
    "Same crops, with and without the cache: all terms of all epochs agree to the rounding of bf16 features."
    plain = make(data, tmp_path / "plain", method, cache=False).fit(progress=False)
    kept = make(data, tmp_path / "kept", method).fit(progress=False)
    for a, b in zip(plain, kept):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("on_disk", [False, True])
def test_resume_to_the_same_bits(data, tmp_path, on_disk):
    where = tmp_path / "cache" if on_disk else None
    whole = make(data, tmp_path / "whole", where=where)
    expected = whole.fit(progress=False)
    broken = make(data, tmp_path / "broken", where=where, checkpoint_seconds=0)
    interrupt_at(broken, 5 + 4)  # of the second epoch
    with pytest.raises(KeyboardInterrupt):
        broken.fit(progress=False)
    assert checkpoints(broken.folder)
    again = make(data, tmp_path / "broken", where=where)
    assert again.fit(progress=False) == expected
    a, b = (t.task.student.state_dict() for t in (whole, again))
    assert all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(ValueError, match="another run"):  # without the cache it would be another one
        make(data, tmp_path / "broken", cache=False).fit(progress=False)


def test_an_interrupted_cache_goes_on(data, tmp_path):
    "Cut off in the second augmentation: the first is kept, and the bits are those of a cache made at once."
    train, teacher = data.batches(32, views=3, seed=1), network(0).eval()
    paths = [teacher.layers.stages[-1], teacher.layers.pooled]
    options = dict(width=16, batch_size=40)
    expected, seen = TeacherCache(teacher, train, paths, **options), []

    def count(*_):
        seen.append(1)
        if len(seen) == 1 + 4 + 4 + 2:  # shapes, basis, a whole augmentation, half of the next
            raise KeyboardInterrupt

    handle = teacher.register_forward_hook(count)
    with pytest.raises(KeyboardInterrupt):
        TeacherCache(teacher, train, paths, tmp_path, **options)
    again = TeacherCache(teacher, train, paths, tmp_path, **options)
    handle.remove()
    assert len(seen) == 11 + 1 + 8  # shapes again, and two augmentations
    for path, store in expected.stores.items():
        assert torch.equal(store.rows, again.stores[path].rows)
    assert again.left_out == pytest.approx(expected.left_out)


def test_a_projection_is_for_relations_only(data, tmp_path):
    for method in ("rcka", "sp", "rkd", "pkt", "kd+fcka", "kd"):
        make(data, tmp_path / method, method, width=16)
    for method in ("fitnet", "at", "fcka+at"):
        with pytest.raises(ValueError, match="Gram matrix only"):
            make(data, tmp_path / method, method, width=16)
    train, teacher = data.batches(32, views=2), network(0)
    task = Distiller(network(1), create_method("fcka"), teacher)
    with pytest.raises(ValueError, match="made with another teacher or other training batches"):
        cache = TeacherCache(teacher, data.batches(32, views=2), task.teacher_taps.paths)
        Learner(task, train, train, TrainConfig(epochs=1), teacher_cache=cache)
    with pytest.raises(ValueError, match="for training"):
        data.batches(train=False, views=2)


@pytest.mark.slow
def test_experiments_with_a_cache(tmp_path):
    "Alone and in a group to the same bits; one cache for all methods and seeds; another key than without it."
    e = Experiment(
        "digits",
        "resnet8",
        "resnet8",
        "kd",
        epochs=2,
        teacher_epochs=1,
        train_limit=100,
        test_limit=50,
        teacher_cache=2,
    )
    assert e.key != replace(e, teacher_cache=None).key and e.teacher_experiment.teacher_cache is None
    with pytest.raises(ValueError, match="teacher_cache"):
        replace(e, teacher_cache=None, teacher_projection=16)
    runs = [replace(e, teacher_projection=16, method=m, method_args={}) for m in ("kd", "fcka")]
    how = dict(device="cpu", progress=False)
    alone = [run(x, tmp_path / "alone", **how) for x in runs]
    group = run_many(runs, tmp_path / "group", **how)
    assert [r.last for r in group] == [r.last for r in alone]
    for x in runs:
        a, b = ((tmp_path / where / x.key / "last.safetensors").read_bytes() for where in ("alone", "group"))
        assert a == b
    run(replace(runs[0], seed=1), tmp_path / "group", **how)
    assert len(list((tmp_path / "group" / ".teacher-cache").iterdir())) == 1
    with pytest.raises(ValueError, match="budget"):
        run(replace(runs[0], seed=2), tmp_path / "group", cache_budget=1000, **how)
