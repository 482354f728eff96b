"A step that is recorded and repeated: the twin against ordinary steps on the CPU, the graph against them on a GPU."

import copy

import pytest
import torch
from interruption import interrupt_at
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rcka.core import Batch
from rcka.data.datasets import load_dataset
from rcka.methods import FOR_CLASSIFIERS  # not list_methods(): other tests register more
from rcka.methods.base import create_method
from rcka.models.registry import create_model
from rcka.train.callbacks import EMA
from rcka.train.classification import Distiller
from rcka.train.config import TrainConfig
from rcka.train.graph import WARM_UP, EagerStep, settings_of, why_eager
from rcka.train.learner import Trainer, fit_many
from rcka.train.teacher_cache import TeacherCache

CAPTURED = [n for n in sorted(FOR_CLASSIFIERS) if create_method(n).capturable]


@pytest.fixture(scope="module")
def data():
    return load_dataset("digits", limit=150, test_limit=60)  # batches of 40 leave one of 30


def network(seed, device="cpu"):
    torch.manual_seed(seed)
    return create_model("resnet8", num_classes=10, in_channels=1).to(device)


def trainer(data, folder, method="rcka", device="cpu", teacher=None, train=None, test=None, seed=1, **options):
    settings = {k: options.pop(k) for k in list(options) if hasattr(TrainConfig, k)}
    config = TrainConfig(**({"epochs": 2, "schedule": "onecycle"} | settings))
    task = Distiller(network(seed, device), create_method(method), teacher or network(0, device))
    train = train or data.batches(40, device=device)
    return Trainer(task, train, test or data.batches(train=False, device=device), config, folder, **options)


def same(a, b):
    return all(
        torch.equal(x, y)
        for x, y in zip(a.parts["student"].state_dict().values(), b.parts["student"].state_dict().values(), strict=True)
    )


ADAMW = {"optimizer": "adamw", "lr": 3e-3, "decay_norms": False, "grad_clip": 1.0}


@pytest.mark.parametrize(
    "method, settings",
    [
        ("rcka", {}),
        ("kd+vid", {"nesterov": True, "weight_decay": 1e-3}),
        ("mgd", {}),  # draws random numbers
        ("dkd", ADAMW),  # warms up over epochs
        ("fitnet", {"precision": "bf16"}),
        ("kd", {"precision": "fp16"}),
    ],
)
@pytest.mark.slow
def test_the_twin_ends_at_the_bits_of_ordinary_steps(data, tmp_path, method, settings):
    plain = trainer(data, tmp_path / "plain", method, **settings)
    graphed = trainer(data, tmp_path / "graphed", method, cuda_graph=True, **settings)
    assert graphed.fit(progress=False) == plain.fit(progress=False) and same(graphed, plain)
    counts = graphed.graphed.counts
    assert counts["warm-up"] == WARM_UP and counts["eager"] == 2  # the smaller last batches
    assert counts["replayed"] == 2 * 4 - 2 - WARM_UP
    assert counts["captured"] == 1
    saved, expected = graphed.optimizer.state_dict(), plain.optimizer.state_dict()
    assert saved["param_groups"] == expected["param_groups"]  # no tensor, no flag stays behind


def test_a_setting_that_changes_with_the_epoch_is_recorded_again(data, tmp_path):
    one, two = (
        trainer(data, tmp_path / "kd", "kd", epochs=3, cuda_graph=True),
        trainer(data, tmp_path / "dkd", "dkd", epochs=3, cuda_graph=True),
    )
    for t in (one, two):
        t.fit(progress=False)
    assert one.graphed.counts["captured"] == 1 and two.graphed.counts["captured"] == 2  # from the second epoch on
    assert two.graphed.settings != settings_of(create_method("dkd"))


class Recording(EagerStep):
    "Notes what is asked of it, and refuses work that was not recorded."

    def __init__(self):
        self.calls = []

    def warm_up(self):
        self.calls.append("warm up")
        return super().warm_up()

    def capture(self, work):
        self.calls.append("capture")
        super().capture(work)

    def replay(self):
        self.calls.append("replay")
        return super().replay()


def test_the_order_of_the_calls(data, tmp_path):
    t = trainer(data, tmp_path, "kd", cuda_graph=True)
    t.graphed.record = Recording()
    t.fit(progress=False)
    assert t.graphed.record.calls == ["warm up"] * WARM_UP + ["capture"] + ["replay"] * 3


def test_the_recorded_step_reads_its_own_tensors(data, tmp_path):
    "As a graph does: the batch it is given is copied, and what the step returned is not kept but copied."
    t = trainer(data, tmp_path, "rcka", cuda_graph=True)
    t.begin_epoch()
    batches = list(t.train.epoch(0))
    for batch in [*batches[:3], batches[0], batches[1]]:
        t.train_step(batch)
    own = t.graphed.inputs
    assert [x.shape for x in own] == [x.shape for x in batches[0]]
    assert not any(x.data_ptr() == y.data_ptr() for x, y in zip(own, batches[1]))
    assert all(torch.equal(x, y) for x, y in zip(own, batches[1]))
    assert len({row.data_ptr() for row in t.values}) == len(t.values) == 5


def test_killed_and_resumed(data, tmp_path):
    "In the middle of an epoch, with a callback that has a state; the new process warms up and records again."
    whole = trainer(data, tmp_path / "plain", callbacks=[EMA(0.9)])
    expected = whole.fit(progress=False)
    make = lambda: trainer(data, tmp_path / "run", cuda_graph=True, callbacks=[EMA(0.9)], checkpoint_seconds=0)
    broken = make()
    interrupt_at(broken, 6)
    with pytest.raises(KeyboardInterrupt):
        broken.fit(progress=False)
    assert broken.graphed.counts["replayed"] == 1
    again = make()
    assert again.fit(progress=False) == expected and same(again, whole)
    assert again.graphed.counts["warm-up"] == 2  # steps 6 and 7; step 8 is the smaller last one
    with pytest.warns(UserWarning, match="another environment .cuda_graph: True there, None here"):
        trainer(data, tmp_path / "run", callbacks=[EMA(0.9)]).fit(progress=False)


def test_a_checkpoint_taken_up_in_place_is_recorded_again(data, tmp_path):
    "Its tensors of the optimiser are new ones, which what was recorded does not know."
    t = trainer(data, tmp_path, "kd", cuda_graph=True)
    t.fit(progress=False)
    assert t.graphed.inputs
    t.load_state_dict(copy.deepcopy(t.state_dict()))
    assert not t.graphed.inputs and t.graphed.warm == 0


def test_a_group_and_a_kept_teacher(data, tmp_path):
    "The teacher's outputs are inputs of the recorded step, shared by a group or looked up."
    train, test, teacher = data.batches(40, views=2), data.batches(train=False), network(0)
    make = lambda where, method, **k: trainer(
        data, tmp_path / where / method, method, teacher=teacher, train=train, test=test, **k
    )
    methods = ("kd", "rcka")
    expected = fit_many([make("plain", m) for m in methods], progress=False)
    runs = [make("graphed", m, cuda_graph=True) for m in methods]
    assert fit_many(runs, progress=False) == expected
    assert all(one.graphed.counts["replayed"] == 3 for one in runs)
    assert [len(one.graphed.inputs) for one in runs] == [4, 5]  # images, targets, index, logits; and a feature
    cache = TeacherCache(teacher, train, ["layer3"])
    plain = make("cached", "rcka", teacher_cache=cache).fit(progress=False)
    assert make("cached graph", "rcka", teacher_cache=cache, cuda_graph=True).fit(progress=False) == plain


def test_what_is_not_recorded_says_why(data, tmp_path):
    sgd = lambda groups: torch.optim.SGD(groups, lr=0.1, foreach=False)
    cases = [
        ("crd", {}, "method crd has kernels that depend on values"),
        ("kd+procrustes", {}, "method kd.procrustes"),
        ("kd", {"accumulate": 2}, "gradients are accumulated over several batches"),
        ("kd", {"optimizer_factory": sgd}, "SGD is not one of the trainer's own"),
    ]
    for i, (method, options, reason) in enumerate(cases):
        with pytest.warns(UserWarning, match=f"no effect, since {reason}"):
            graphed = trainer(data, tmp_path / f"graphed{i}", method, epochs=1, cuda_graph=True, **options)
        plain = trainer(data, tmp_path / f"plain{i}", method, epochs=1, **options)
        assert graphed.fit(progress=False) == plain.fit(progress=False)
        assert graphed.graphed.counts == {"warm-up": 0, "captured": 0, "replayed": 0, "eager": 4}
    graphed.task = object()
    assert "object is not classification" in why_eager(graphed)


def test_a_refused_capture_says_what_to_do(data, tmp_path):
    t = trainer(data, tmp_path, "kd", cuda_graph=True)

    def refuse(work):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    t.graphed.record.capture = refuse
    with pytest.raises(RuntimeError, match="operation not permitted.*train without cuda_graph, or set.*method kd"):
        t.fit(progress=False)


# what can be recorded, on a CUDA device that is not there


class Hosts(TorchDispatchMode):
    "Notes operations that leave the device, or wait for it."

    WAITING = ("_linalg_check_errors", "_linalg_svd", "_linalg_eigh", "_local_scalar_dense", "nonzero", "bincount")

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in self.WAITING or any(t.device.type == "cpu" for t in tree_leaves(out) if isinstance(t, torch.Tensor)):
            self.seen.add(name)
        return out


def fake_step(name):
    "What a forward pass of a method does on the host, and which of its tensors are not those of the pass before."
    from test_placement import AnyNegatives, images, moved, zeros

    with pytest.MonkeyPatch.context() as patch, FakeTensorMode():
        patch.setattr(nn.Module, "to", moved)
        patch.setattr("rcka.methods.features.Negatives", AnyNegatives)
        teacher, student = (create_model(n, 10).to("cuda") for n in ("resnet14", "resnet8"))
        distiller = Distiller(student, create_method(name), teacher)
        distiller.build(images(), torch.zeros(100, dtype=torch.int64))
        batch = Batch(images(), zeros(8), zeros(8))
        distiller(batch)  # taps and fusions settle in the first pass
        tensors = [*distiller.method.named_parameters(), *distiller.method.named_buffers()]
        before, settings = {k: id(t) for k, t in tensors}, settings_of(distiller.method)
        with Hosts() as hosts:
            distiller(batch)
        tensors = [*distiller.method.named_parameters(), *distiller.method.named_buffers()]
        replaced = {k for k, t in tensors if before.get(k) != id(t)}
        return hosts.seen, replaced, settings == settings_of(distiller.method)


def fakes_work():
    from test_placement import fakes_work

    return fakes_work()


@pytest.mark.skipif(not fakes_work(), reason="this torch has no fake CUDA device")
@pytest.mark.parametrize("name", CAPTURED)
def test_a_method_that_is_recorded_stays_on_the_device(name):
    "No tensor on the host, nothing that waits, no tensor of its own replaced, no setting changed in a step."
    assert fake_step(name) == (set(), set(), True)


@pytest.mark.skipif(not fakes_work(), reason="this torch has no fake CUDA device")
@pytest.mark.parametrize("name, why", [("crd", 1), ("explained_variance", 0), ("procrustes", 0), ("skd", 0)])
def test_a_method_that_is_not_recorded_has_a_reason(name, why):
    "So the test above can fail."
    assert not create_method(name).capturable and fake_step(name)[why]


# on a GPU


@pytest.mark.cuda
@pytest.mark.parametrize("settings", [{}, {"precision": "bf16"}, {"precision": "fp16"}, ADAMW], ids=str)
@pytest.mark.parametrize("method", ["kd", "rcka", "mgd+fcka", "dkd"])
def test_graph_against_ordinary_steps(data, tmp_path, method, settings):
    "Mean losses of the epochs agree to rounding, at a rate at which rounding does not grow."
    settings = {"lr": 0.002} | settings | {"epochs": 4}
    plain = trainer(data, tmp_path / "plain", method, "cuda", **settings)
    graphed = trainer(data, tmp_path / "graphed", method, "cuda", cuda_graph=True, **settings)
    expected, got = plain.fit(progress=False), graphed.fit(progress=False)
    assert graphed.graphed.counts["replayed"] == 4 * 4 - 4 - WARM_UP
    tolerance = 1e-3 if settings.get("precision", "fp32") == "fp32" else 0.03
    for a, b in zip(expected, got, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=tolerance)


@pytest.mark.cuda
def test_graph_resumes_to_the_same_bits(data, tmp_path):
    "Two unbroken runs with graphs agree to the bit in deterministic mode, and so does one that was stopped."
    make = lambda where: trainer(
        data, tmp_path / where, "rcka", "cuda", epochs=3, deterministic=True, cuda_graph=True, checkpoint_seconds=0
    )
    whole = make("whole")
    expected = whole.fit(progress=False)
    broken = make("broken")
    interrupt_at(broken, 6)
    with pytest.raises(KeyboardInterrupt):
        broken.fit(progress=False)
    again = make("broken")
    assert again.fit(progress=False) == expected and same(again, whole)
