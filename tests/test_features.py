"Features by module path, under everything a training loop does to a network."

import copy
import gc
import pickle
import weakref
from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rcka.features import Taps, as_logits, feature_paths, find_module

KINDS = {
    "conv": lambda inplace: nn.Conv2d(4, 4, 3, padding=1),
    "bn": lambda inplace: nn.BatchNorm2d(4),
    "relu": lambda inplace: nn.ReLU(inplace=inplace),
    "elu": lambda inplace: nn.ELU(inplace=inplace),
    "dropout": lambda inplace: nn.Dropout(0.5, inplace=inplace),
    "identity": lambda inplace: nn.Identity(),
}
MODES = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


def two(kinds):
    "The same network twice: with operations in place, and without."
    torch.manual_seed(0)
    loud = nn.Sequential(nn.Conv2d(3, 4, 3), *(KINDS[k](True) for k in kinds))
    quiet = copy.deepcopy(loud)
    for m in quiet.modules():
        if hasattr(m, "inplace"):
            m.inplace = False
    return loud, quiet


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=6),
    st.lists(st.sampled_from(sorted(MODES)), min_size=1, max_size=4),
    st.booleans(),
)
def test_what_is_tapped_is_what_the_module_gave(kinds, modes, training):
    loud, quiet = (m.train(training) for m in two(kinds))
    paths = [f"{i}{end}" for i in range(len(kinds) + 1) for end in ("", ":input")]
    taps, x = Taps(loud, paths), torch.randn(5, 3, 6, 6)
    for step, mode in enumerate(modes):
        with MODES[mode]():
            torch.manual_seed(step)
            want, value = [], x
            for module in quiet:
                want.append((value, value := module(value)))
            torch.manual_seed(step)
            logits, features = taps(x)
        assert torch.equal(logits, value)
        for i, (given_, gave) in enumerate(want):
            assert torch.equal(features[2 * i], gave) and torch.equal(features[2 * i + 1], given_)


@pytest.mark.parametrize("kinds", [["bn", "relu"], ["bn", "elu", "conv"], ["conv", "bn", "relu", "conv"]])
def test_gradients_of_taps_are_those_without_in_place_operations(kinds):
    grads = []
    for model in two(kinds):
        taps, x = (
            Taps(model, [str(i) for i in range(len(kinds) + 1)]),
            torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(1)),
        )
        for _ in range(2):
            model.zero_grad()
            torch.manual_seed(3)
            logits, features = taps(x)
            (logits.square().sum() + sum(f.pow(3).mean() for f in features)).backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


class Moody(nn.Module):
    "Writes to the output of `bn` only when told."

    def __init__(self):
        super().__init__()
        self.bn, self.write = nn.BatchNorm1d(3), False

    def forward(self, x):
        out = self.bn(x)
        return out.mul_(2) if self.write else out * 2


def test_a_write_that_comes_late_is_an_error_and_never_a_wrong_value():
    model = Moody()
    taps, x = Taps(model, ["bn"]), torch.randn(4, 3)
    taps(x)
    model.write = True
    with pytest.raises(RuntimeError, match="modified in place"):
        taps(x)
    logits, (bn,) = taps(x)
    torch.testing.assert_close(bn * 2, logits)
    model.eval()
    model.write = False
    taps(x)


def test_the_network_is_left_alone():
    model = nn.Sequential(OrderedDict(a=nn.Linear(3, 3), b=nn.Linear(3, 3)))
    keys, before = list(model.state_dict()), copy.deepcopy(vars(model.a))
    with Taps(model, ["a", "b", "a:input", "a"]) as taps:
        assert taps.paths == ("a", "b", "a:input", "a")
        logits, (a, b, x, again) = taps(torch.ones(2, 3))
        assert a is again and b is logits and not x.requires_grad
        assert list(model.state_dict()) == keys
    assert vars(model.a).keys() == before.keys() and not model.a._forward_hooks and not model.a._forward_pre_hooks


def test_two_taps_at_once_and_the_network_used_beside_them():
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), torch.randn(2, 3)
    one, two_ = Taps(model, ["0"]), Taps(model, ["1", "0"])
    assert torch.equal(one(x).features[0], two_(x).features[1])
    one.remove()
    assert torch.equal(model(x), two_(x).logits)


def test_nothing_is_kept_alive():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True))
    taps = Taps(model, ["0"])
    out = taps(torch.randn(2, 3))
    seen = weakref.ref(out.features[0])
    del out
    gc.collect()
    assert seen() is None
    model(torch.randn(2, 3))
    assert not taps._seen


def test_a_forward_that_fails_leaves_the_taps_usable():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    taps = Taps(model, ["0"])
    with pytest.raises(RuntimeError):
        taps(torch.randn(2, 5))
    assert taps(torch.randn(2, 3)).features[0].shape == (2, 3)


def test_copies_and_pickles_of_a_tapped_network():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True))
    taps, x = Taps(model, ["0"]), torch.randn(2, 3)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), taps(x).logits)
        assert torch.equal(Taps(twin, ["0"])(x).features[0], taps(x).features[0])
    assert torch.equal(pickle.loads(pickle.dumps(taps))(x).features[0], taps(x).features[0])


def test_checkpointed_activations_do_not_disturb():
    from torch.utils.checkpoint import checkpoint

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return checkpoint(lambda t: self.b(self.a(t)), x, use_reentrant=False)

    model = Net()
    taps = Taps(model, ["a", "b"])
    logits, (a, b) = taps(torch.randn(4, 3))
    (logits.sum() + a.square().sum()).backward()
    assert b is not None and model.a.weight.grad.abs().sum() > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_networks():
    torch._dynamo.reset()
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)).eval()
    x, paths = torch.randn(2, 3, 6, 6), ["1", "2", "2:input"]
    want = Taps(copy.deepcopy(plain), paths)(x)
    compiled = torch.compile(plain, backend="aot_eager", fullgraph=True)
    taps = Taps(compiled, paths)
    for _ in range(2):
        for a, b in zip(taps(x).features, want.features):
            torch.testing.assert_close(a, b)
    torch.testing.assert_close(compiled(x), want.logits)
    for a, b in zip(taps(x).features, want.features):
        torch.testing.assert_close(a, b)
    late = torch.compile(nn.Sequential(nn.Linear(3, 3)), backend="eager")
    late(torch.ones(2, 3))
    try:
        assert Taps(late, ["0"])(torch.ones(2, 3)).features[0].shape == (2, 3)
    except RuntimeError as error:
        assert "create the taps before" in str(error)


def test_distributed_wrapper():
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True)))
        logits, (a,) = Taps(model, ["0"])(torch.randn(4, 3))
        assert torch.equal(a.relu(), logits)
        a.sum().backward()
    finally:
        dist.destroy_process_group()


@dataclass
class ModelOutput:
    logits: torch.Tensor
    loss: float = 0.0


def test_logits_of_other_libraries():
    z = torch.zeros(2, 3)
    for output in (z, ModelOutput(z), {"out": z, "aux": z + 1}, {"logits": z}, [z, 3]):
        assert as_logits(output) is z
    for output in ({"boxes": z}, [], None, ModelOutput(None), ({"a": z},)):
        with pytest.raises(TypeError, match="logits=function"):
            as_logits(output)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x, *, scale):
            return {"boxes": self.a(input=x) * scale}

    model = Two()
    logits, (x, a) = Taps(model, ["a:input", "a"], logits=lambda out: out["boxes"])(z, scale=2)
    assert x is z and torch.equal(logits, 2 * a)


@pytest.mark.parametrize("path", ["a:output", "a[", "a]0[", "a[]", "a:input:input", 3, None])
def test_paths_that_cannot_be_read(path):
    with pytest.raises(ValueError, match="cannot read the path"):
        Taps(nn.Linear(2, 2), [path])


def test_paths_that_are_not_there():
    model = nn.Sequential(OrderedDict(layer1=nn.Linear(2, 2), layer2=nn.Linear(2, 2)))
    with pytest.raises(
        ValueError, match=r"unknown Sequential module 'layer3'; did you mean layer[12] or layer[12].*named_modules"
    ):
        find_module(model, "layer3")
    with pytest.raises(ValueError, match="do not know the stages of a Sequential"):
        feature_paths(model)
