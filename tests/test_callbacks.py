"""Callbacks of the trainer: order, state, averages, kept weights, the clock, groups; optimisers, clipping,
accumulation; plain loaders."""

import copy
import math
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rcka.core import LoaderBatches, as_batches
from rcka.methods import create_method
from rcka.models import create_model
from rcka.train import Callback, Distiller, Learner, TrainConfig, Trainer, fit_many
from rcka.train.callbacks import EMA, Checkpoint, KeepWeights, Progress, SaveResults, StopAfter
from rcka.train.checkpoint import checkpoints, last_checkpoint
from rcka.train.config import make_optimizer, parameter_groups
from rcka.train.learner import Stopped

CONFIG = TrainConfig(epochs=2, lr=0.02, schedule="onecycle")


def network(seed=1):
    torch.manual_seed(seed)
    return create_model("resnet8", num_classes=10, in_channels=1)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


@pytest.fixture
def batches(images):
    return images.batches(64), images.batches(train=False)  # 4 training batches


class Calls(Callback):
    "Write down what is called, and where the run stands."

    def __init__(self):
        self.calls = []

    def note(self, point, learner):
        self.calls.append((point, learner.epoch, learner.step))


def _noting(point):
    return lambda self, learner, *args: self.note(point, learner)


POINTS = [name for name in vars(Callback) if name.startswith(("before", "after", "on_"))]
for point in POINTS:
    setattr(Calls, point, _noting(point))


def test_points_in_order(batches, tmp_path):
    calls = Calls()
    Trainer(Distiller(network()), *batches, CONFIG, tmp_path, callbacks=[calls]).fit(progress=False)
    steps = len(batches[0])
    expected = [("before_fit", 0, 0)]
    for epoch in range(2):
        expected.append(("before_epoch", epoch, 0))
        for step in range(steps):
            expected += [("before_step", epoch, step), ("after_step", epoch, step + 1)]
        expected += [("before_evaluate", epoch, steps), ("after_epoch", epoch + 1, 0)]
    assert calls.calls == [*expected, ("before_save", 2, 0), ("after_fit", 2, 0)]


def test_points_of_a_run_that_stops_and_goes_on(batches, tmp_path):
    first = Calls()
    with pytest.raises(Stopped):
        Trainer(Distiller(network()), *batches, CONFIG, tmp_path, callbacks=[first, StopAfter(0)]).fit(progress=False)
    assert first.calls[-3:] == [("on_stop", 0, 1), ("before_save", 0, 1), ("after_fit", 0, 1)]
    again = Calls()
    Trainer(Distiller(network()), *batches, CONFIG, tmp_path, callbacks=[again]).fit(progress=False)
    assert again.calls[:3] == [("before_fit", 0, 0), ("before_epoch", 0, 1), ("before_step", 0, 1)]


def test_after_fit_is_called_after_an_error(batches, tmp_path):
    class Fails(Callback):
        def before_fit(self, learner):
            raise RuntimeError("not today")

    calls = Calls()
    learner = Learner(Distiller(network()), *batches, CONFIG, [calls, Fails()])
    with pytest.raises(RuntimeError, match="not today"):
        learner.fit(progress=False)
    assert [point for point, *_ in calls.calls] == ["before_fit", "after_fit"]


class Norms(Callback):
    "Remember a value of every step, also over interruptions."

    def __init__(self):
        self.norms = []

    def after_step(self, learner):
        self.norms.append(learner.parameters[0].detach().norm())

    def state_dict(self):
        return {"norms": self.norms}

    def load_state_dict(self, state):
        self.norms = list(state["norms"])


@pytest.mark.parametrize("own_first", [True, False], ids=["before Checkpoint", "after Checkpoint"])
def test_state_is_saved_and_restored(batches, tmp_path, own_first):
    "An interrupted run goes on with the state of its callbacks, wherever they stand beside the one that loads them."

    def learner(folder, seed, *more):
        own, save = [Norms(), EMA(0.8)], [Checkpoint(folder)]
        callbacks = [*own, *more, *save] if own_first else [*save, *own, *more]
        return own, Learner(Distiller(network(seed)), *batches, CONFIG, callbacks)

    (norms, average), whole = learner(tmp_path / "whole", 1)
    whole.fit(progress=False)
    folder, n = tmp_path / "run", 0
    for _ in range(20):
        (again, again_average), broken = learner(folder, 1 if n == 0 else 9, StopAfter(0))
        n += 1
        try:
            broken.fit(progress=False)
            break
        except Stopped as e:
            assert "time limit of 0 seconds" in str(e)
    assert n > 2 * len(batches[0])  # a stop after each step
    assert torch.equal(torch.stack(again.norms), torch.stack(norms.norms))
    assert same(again_average.average, average.average)
    assert same(broken.task.student.state_dict(), whole.task.student.state_dict())


def test_other_callbacks_are_refused(batches, tmp_path):
    def fit(folder, *callbacks):
        Trainer(Distiller(network()), *batches, CONFIG, tmp_path / folder, callbacks=callbacks).fit(progress=False)

    fit("with", EMA(0.9))
    with pytest.raises(ValueError, match="saved with a callback EMA, which is missing now"):
        fit("with")
    with pytest.raises(ValueError, match="decay 0.9, got 0.99"):
        fit("with", EMA(0.99))
    fit("without")
    with pytest.raises(ValueError, match="saved without the callback EMA"):
        fit("without", EMA(0.9))


class Weights(Callback):
    "Keep the weights after every step, in float64."

    def __init__(self):
        self.kept = []

    def after_step(self, learner):
        student = learner.task.student.state_dict()
        self.kept.append({k: v.double() if v.is_floating_point() else v.clone() for k, v in student.items()})


def test_ema_is_the_weighted_sum_of_the_weights(batches, tmp_path):
    "In closed form in float64: d^n w_0 + (1 - d) sum_i d^(n-i) w_i."
    weights, average, decay = Weights(), EMA(0.9, folder=tmp_path), 0.9
    start = {k: v.double() for k, v in network().state_dict().items()}
    task = Distiller(network())
    history = Learner(task, *batches, CONFIG, [weights, average]).fit(progress=False)
    n = len(weights.kept)
    assert n == 2 * len(batches[0])
    for name, value in average.average.items():
        if not value.is_floating_point():
            assert torch.equal(value, weights.kept[-1][name])
            continue
        expected = decay**n * start[name]
        for i, kept in enumerate(weights.kept, 1):
            expected = expected + (1 - decay) * decay ** (n - i) * kept[name]
        torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-5)
    assert same(load_file(tmp_path / "ema.safetensors"), average.average)
    student = copy.deepcopy(task.student.state_dict())
    task.student.load_state_dict(average.average)
    assert task.evaluate(batches[1], "fp32", lambda: None)["top1"] == history[-1]["ema_top1"]
    assert not same(student, average.average)  # the student went on from its own weights


def test_ema_leaves_the_run_alone_and_begins_afresh_with_another(batches):
    plain = Learner(Distiller(network()), *batches, CONFIG)
    expected = plain.fit(progress=False)
    average = EMA(0.9)
    for _ in range(2):
        learner = Learner(Distiller(network()), *batches, CONFIG, [average])
        history = learner.fit(progress=False)
        assert [{k: v for k, v in row.items() if not k.startswith("ema_")} for row in history] == expected
        assert same(learner.task.student.state_dict(), plain.task.student.state_dict())
    once = EMA(0.9)
    Learner(Distiller(network()), *batches, CONFIG, [once]).fit(progress=False)
    assert same(once.average, average.average)


def test_ema_is_torch_s_average(batches):
    """As torchvision's references use `AveragedModel`: at every third update of an epoch, and copies in the first one.

    Its buffers are averaged too, as there."""
    from torch.optim.swa_utils import AveragedModel

    decay, every, steps = 0.8, 3, len(batches[0])

    class Theirs(Callback):
        def before_fit(self, learner):
            step = lambda mean, value, n: decay * mean + (1 - decay) * value
            self.average = AveragedModel(learner.network, avg_fn=step, use_buffers=True)

        def after_step(self, learner):
            if (learner.step - 1) % every == 0:
                self.average.update_parameters(learner.network)
                if learner.epoch < 1:
                    self.average.n_averaged.fill_(0)

    ours, theirs = EMA(decay, every=every, copy_steps=steps), Theirs()
    Learner(Distiller(network()), *batches, replace(CONFIG, epochs=3), [ours, theirs]).fit(progress=False)
    for name, value in theirs.average.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(ours.average[name], value, rtol=1e-5, atol=1e-6)


def test_an_interrupted_average_goes_on(batches, tmp_path):
    "Stopped while it still copies: the same average as unbroken; with another interval it is refused."
    averages = {}
    for name, stop in (("whole", None), ("parts", 2)):
        for _ in range(2 if stop else 1):
            average = EMA(0.8, every=2, copy_steps=len(batches[0]) + 2)
            checkpoint = Checkpoint(tmp_path / name, seconds=0)
            learner = Learner(Distiller(network()), *batches, replace(CONFIG, epochs=3), [average, checkpoint])
            if stop:
                learner.callbacks.append(StopAfter(0))
                with pytest.raises(Stopped):
                    learner.fit(progress=False)
                stop = None
            else:
                learner.fit(progress=False)
        averages[name] = average.average
    assert same(averages["whole"], averages["parts"])
    learner = Learner(
        Distiller(network()), *batches, replace(CONFIG, epochs=3), [EMA(0.8), Checkpoint(tmp_path / "whole")]
    )
    with pytest.raises(ValueError, match="has EMA every 2, got 1: give the same every"):
        learner.fit(progress=False)


@pytest.mark.parametrize("decay", [-0.1, 1.0, math.nan])
def test_ema_refuses_a_decay(decay):
    with pytest.raises(ValueError, match="decay must be at least 0 and below 1"):
        EMA(decay)


def test_keep_weights(batches, tmp_path):
    class Copies(Callback):
        def __init__(self):
            self.copies = []

        def after_epoch(self, learner):
            self.copies.append(copy.deepcopy(learner.task.student.state_dict()))

    copies, config = Copies(), replace(CONFIG, epochs=4)
    Learner(Distiller(network()), *batches, config, [copies, KeepWeights(tmp_path / "kept", every=2)]).fit(
        progress=False
    )
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == ["epoch-0002.safetensors", "epoch-0004.safetensors"]
    for epoch in (2, 4):
        assert same(load_file(tmp_path / "kept" / f"epoch-{epoch:04}.safetensors"), copies.copies[epoch - 1])
    with pytest.raises(ValueError, match="every must be a whole number of 1 or more, got 0"):
        KeepWeights(tmp_path, every=0)
    with pytest.raises(ValueError, match="give a folder"):
        Learner(Distiller(network()), *batches, config, [KeepWeights()]).fit(progress=False)


def test_keep_weights_in_the_folder_of_each_run(batches, tmp_path):
    "One callback serves several runs: the weights of each lie in its own folder."
    keep = KeepWeights()
    for seed in (1, 2):
        trainer = Trainer(Distiller(network(seed)), *batches, CONFIG, tmp_path / str(seed), callbacks=[keep])
        trainer.fit(progress=False)
        kept = load_file(tmp_path / str(seed) / "weights" / f"epoch-{CONFIG.epochs:04}.safetensors")
        assert same(kept, trainer.task.student.state_dict())


def test_stop_after(batches, tmp_path):
    "The end is orderly, says what is saved, and the run goes on to the bits of an unbroken one."
    teacher = network(0)

    def trainer(folder, seed, *callbacks):
        task = Distiller(network(seed), create_method("kd"), teacher)
        return Trainer(task, *batches, CONFIG, tmp_path / folder, callbacks=callbacks)

    whole = trainer("whole", 1)
    expected = whole.fit(progress=False)
    stopped = trainer("run", 1, StopAfter(0))
    for step in (1, 2):  # the same object goes on, too
        with pytest.raises(
            Stopped, match=f"time limit of 0 seconds in epoch 1, after step {step}.*0 epochs and {step} st"
        ) as e:
            stopped.fit(progress=False)
        assert e.value.signum is None
    assert last_checkpoint(tmp_path / "run")["step"] == 2
    again = trainer("run", 9, StopAfter(1e9))
    assert again.fit(progress=False) == expected
    assert same(again.task.student.state_dict(), whole.task.student.state_dict())


def test_stopping_without_a_checkpoint_is_said(batches):
    with pytest.raises(Stopped, match="Nothing was saved"):
        Learner(Distiller(network()), *batches, CONFIG, [StopAfter(0)]).fit(progress=False)


def test_a_group_with_different_callbacks(batches, tmp_path):
    "Each run has its own callbacks, and gets the bits that it gets alone."
    teacher = network(0)

    def learners(folder):
        first, second = EMA(0.9), Norms()
        tasks = [Distiller(network(seed), create_method(m), teacher) for seed, m in ((1, "kd"), (2, "rcka"))]
        return (
            first,
            second,
            [
                Learner(tasks[0], *batches, CONFIG, [first, KeepWeights(tmp_path / folder)]),
                Learner(
                    tasks[1], *batches, CONFIG, [second, SaveResults(tmp_path), Checkpoint(tmp_path / folder / "run")]
                ),
            ],
        )

    average, norms, alone = learners("alone")
    expected = [learner.fit(progress=False) for learner in alone]
    group_average, group_norms, group = learners("group")
    assert fit_many(group, progress=False) == expected
    assert "ema_top1" in expected[0][-1] and "ema_top1" not in expected[1][-1]
    assert same(group_average.average, average.average)
    assert torch.equal(torch.stack(group_norms.norms), torch.stack(norms.norms))
    assert not any(isinstance(c, Progress) for learner in group for c in learner.callbacks)
    for a, b in zip(alone, group):
        assert same(a.task.student.state_dict(), b.task.student.state_dict())


# optimisers


def test_adamw_groups():
    "Every trainable parameter once; with decay_norms=False those of one dimension do not decay."
    student, connector = network(), nn.Linear(4, 4)
    student.conv1.weight.requires_grad_(False)
    config = TrainConfig(optimizer="adamw", lr=1e-3, weight_decay=0.1, betas=(0.8, 0.95), decay_norms=False)
    optimizer = make_optimizer([student, connector], config, torch.device("cpu"))
    assert isinstance(optimizer, torch.optim.AdamW)
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert decayed["betas"] == plain["betas"] == (0.8, 0.95)
    assert all(p.dim() > 1 for p in decayed["params"]) and all(p.dim() <= 1 for p in plain["params"])
    trainable = [p for m in (student, connector) for p in m.parameters() if p.requires_grad]
    assert sorted(map(id, decayed["params"] + plain["params"])) == sorted(map(id, trainable))
    norms = [p for m in student.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
    assert {*map(id, norms), id(connector.bias)} <= set(map(id, plain["params"]))
    (everything,) = parameter_groups([student, connector], replace(config, decay_norms=True))
    assert [id(p) for p in everything["params"]] == [id(p) for p in trainable]


def by_hand(batches, config, optimizer_of, clip=None, group=1):
    "A student trained alone in a loop of its own."
    student, (train, _) = network(), batches
    optimizer = optimizer_of(student)
    for epoch in range(config.epochs):
        student.train()
        waiting = []
        for step, (images, targets, _) in enumerate(train.epoch(epoch)):
            for g in optimizer.param_groups:
                g["lr"] = config.lr_at(epoch, step, len(train))
            loss = nn.functional.cross_entropy(student(images), targets)
            waiting.append(torch.autograd.grad(loss, list(student.parameters())))
            if len(waiting) == group or step + 1 == len(train):
                for p, *grads in zip(student.parameters(), *waiting):
                    p.grad = torch.stack(grads).mean(0)
                if clip:
                    norm = torch.stack([p.grad.norm() for p in student.parameters()]).norm()
                    for p in student.parameters():
                        p.grad *= min(1, clip / (norm.item() + 1e-6))
                optimizer.step()
                waiting = []
    return torch.cat([p.detach().flatten() for p in student.parameters()])


def by_learner(batches, config, **how):
    task = Distiller(network())
    Learner(task, *batches, config, **how).fit(progress=False)
    return torch.cat([p.detach().flatten() for p in task.student.parameters()])


def sgd(student):
    return torch.optim.SGD(student.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)


def moved(weights):
    return (weights - torch.cat([p.detach().flatten() for p in network().parameters()])).norm()


def close(a, b):
    "Up to rounding, which a few steps at a small rate do not amplify beyond a thousandth of what was learnt."
    assert (a - b).norm() < 1e-3 * moved(b)


SLOW = TrainConfig(epochs=2, lr=0.005, schedule="cosine")


def test_clipping(batches):
    clipped = by_learner(batches, replace(SLOW, grad_clip=0.5))
    close(clipped, by_hand(batches, SLOW, sgd, clip=0.5))
    assert (clipped - by_learner(batches, SLOW)).norm() > 0.1 * moved(clipped)  # it had to clip


def test_adamw_is_torchs(batches):
    config = replace(SLOW, optimizer="adamw", weight_decay=0.1, lr=1e-3)
    expected = by_hand(batches, config, lambda s: torch.optim.AdamW(s.parameters(), 1e-3, weight_decay=0.1))
    close(by_learner(batches, config), expected)


def test_an_optimizer_by_a_function(batches):
    found = by_learner(batches, SLOW, optimizer_factory=lambda groups: torch.optim.RMSprop(groups, lr=1.0))
    close(found, by_hand(batches, SLOW, lambda s: torch.optim.RMSprop(s.parameters(), lr=1.0)))


@pytest.mark.parametrize("k", [2, 3])
def test_accumulation_takes_the_mean_gradient(batches, k):
    "Of every k batches, and of what is left at the end of an epoch: 4 batches are groups of 2 and 2, or of 3 and 1."
    close(by_learner(batches, replace(SLOW, accumulate=k)), by_hand(batches, SLOW, sgd, group=k))


def test_an_interruption_waits_for_the_update(batches, tmp_path):
    "With gradients of three batches to an update, the state is saved only between updates."
    config = replace(CONFIG, accumulate=3)
    whole = Trainer(Distiller(network()), *batches, config, tmp_path / "whole")
    expected = whole.fit(progress=False)
    places = []
    for _ in range(20):
        run = Trainer(Distiller(network()), *batches, config, tmp_path / "run", 0, callbacks=[StopAfter(0)])
        try:
            history = run.fit(progress=False)
            break
        except Stopped:
            state = last_checkpoint(tmp_path / "run")
            places.append((state["epoch"], state["step"]))
    assert set(places) == {(0, 3), (0, 4), (1, 3), (1, 4)}
    assert history == expected and same(run.task.student.state_dict(), whole.task.student.state_dict())


def test_an_interrupted_step_leaves_no_gradient(batches):
    "Ctrl-C in the middle of a group of batches: the same object goes on without the gradients of a part of it."
    config = replace(CONFIG, accumulate=2)
    learner = Learner(Distiller(network()), *batches, config)
    learner.begin_epoch()
    learner.train_step(next(iter(learner.train.epoch(0))))
    assert not learner.between_updates
    learner.begin_epoch()
    assert learner.between_updates and all(p.grad is None for p in learner.parameters)


# plain loaders


def loaders(images, **how):
    data = images.batches(64)
    tensors = next(iter(images.batches(200, train=False).epoch(0)))
    training = TensorDataset((data.images.float() / 255 - 0.5), data.targets)
    return DataLoader(training, batch_size=64, shuffle=True, **how), DataLoader(TensorDataset(*tensors[:2]), 50)


def test_plain_loaders_train(images, tmp_path):
    """A DataLoader of (images, targets) is enough, with a teacher, several students, and no random numbers taken
    outside."""
    train, test = loaders(images)
    teacher = network(0)
    make = lambda seed, folder: Trainer(
        Distiller(network(seed), create_method("rcka"), teacher), train, test, CONFIG, tmp_path / folder
    )
    torch.manual_seed(5)
    expected = torch.rand(3)
    with pytest.warns(UserWarning, match="resumes at the start of its epoch") as said:
        torch.manual_seed(5)
        alone = [make(seed, f"alone{seed}") for seed in (1, 2)]
        torch.manual_seed(5)
        histories = [t.fit(progress=False) for t in alone]
        assert torch.equal(torch.rand(3), expected)
    assert len(said) == 2  # once a run
    assert all(math.isfinite(row["loss"]) and 0 <= row["top1"] <= 100 for h in histories for row in h)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert fit_many([make(1, "a"), make(2, "b")], progress=False) == histories


@pytest.mark.filterwarnings("ignore:a plain DataLoader")
def test_plain_loaders_go_on_from_the_start_of_the_epoch(images, tmp_path):
    train, test = loaders(images)

    class StopAt(Callback):
        def after_step(self, learner):
            if (learner.epoch, learner.step) == (1, 2):
                learner.stop("enough")

    whole = Trainer(Distiller(network()), train, test, CONFIG, tmp_path / "whole")
    expected = whole.fit(progress=False)
    broken = Trainer(Distiller(network()), train, test, CONFIG, tmp_path / "run", 0, callbacks=[StopAt()])
    with pytest.raises(Stopped, match="epoch 2, after step 2.*has a checkpoint after 1 epochs and 0 steps"):
        broken.fit(progress=False)
    assert [p.name[:22] for p in checkpoints(tmp_path / "run")] == ["checkpoint-0000-000004", "checkpoint-0001-000000"]
    again = Trainer(Distiller(network(9)), train, test, CONFIG, tmp_path / "run")
    assert again.fit(progress=False) == expected
    assert same(again.task.student.state_dict(), whole.task.student.state_dict())


def test_loader_batches():
    dataset = TensorDataset(torch.arange(10.0), torch.arange(10) % 3)
    found = as_batches(DataLoader(dataset, batch_size=4, shuffle=True), torch.device("cpu"))
    assert (
        isinstance(found, LoaderBatches) and len(found) == 3 and found.targets.tolist() == dataset.tensors[1].tolist()
    )
    epochs = [torch.cat([b.images for b in found.epoch(e)]).tolist() for e in (0, 1, 0)]
    assert epochs[0] == epochs[2] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1]) == dataset.tensors[0].tolist()
    assert list(found.epoch(0, start=3)) == []
    with pytest.raises(ValueError, match="can begin an epoch only at its first batch, start=0; got start=1"):
        next(found.epoch(0, start=1))
    assert as_batches(found, torch.device("cpu")) is found
    with pytest.raises(TypeError, match="batches must have .*got int"):
        as_batches(3, torch.device("cpu"))
