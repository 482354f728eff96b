"Every baseline on random outputs of networks of different kinds, against oracles where one exists."

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rcka.core import FeaturePaths, Outputs
from rcka.methods.base import create_method, list_methods
from rcka.methods.features import Negatives, paper_args

NAMES = [
    "kd",
    "fitnet",
    "at",
    "sp",
    "cc",
    "rkd",
    "vid",
    "crd",
    "ofd",
    "reviewkd",
    "ickd_c",
    "dpk",
    "dkd",
    "dist",
    "ikl_kd",
    "nkd",
    "srrl",
    "pkt",
    "nst",
    "mgd",
]
CONNECTED = ["fitnet", "cc", "vid", "crd", "ofd", "reviewkd", "ickd_c", "dpk", "srrl", "mgd"]
SMALL = {
    "crd": dict(negatives=7, width=8),
    "dpk": dict(width=8),
    "cc": dict(width=8),
    "mgd": dict(weight=1e-2),
    "reviewkd": dict(width=8),
}
CLASSES, SAMPLES = 5, 20

# (stem and stages of the student, its pooled width), the same of the teacher
FAMILIES = {
    "resnets": (
        ([(4, 8, 8), (4, 8, 8), (6, 4, 4), (8, 2, 2)], 8),
        ([(8, 8, 8), (8, 8, 8), (12, 4, 4), (16, 2, 2)], 16),
    ),
    "vgg to mobilenet": (
        ([(4, 8, 8), (3, 8, 8), (4, 4, 4), (6, 4, 4), (10, 2, 2)], 20),
        ([(8, 16, 16), (8, 8, 8), (12, 8, 8), (16, 4, 4), (16, 4, 4)], 16),
    ),
}
TARGETS = torch.arange(SAMPLES) % CLASSES


def feature_paths(shapes):
    names = tuple(f"stage{i}" for i in range(len(shapes)))
    return FeaturePaths(names, tuple("pre_" + n for n in names), "pooled", "fc")


def random_outputs(method, family, n, dtype=torch.float32, grad=False, fill=None):
    shapes, pooled = family
    layers = feature_paths(shapes)
    sizes = {"pooled": (pooled,)}
    for name, pre, shape in zip(layers.stages, layers.preacts, shapes):
        sizes[name] = sizes[pre] = shape
    make = (lambda *s: torch.randn(*s, dtype=dtype)) if fill is None else (lambda *s: torch.full(s, fill, dtype=dtype))
    features = tuple(make(n, *sizes[p]).requires_grad_(grad) for p in method.wants(layers))
    return Outputs(make(n, CLASSES).requires_grad_(grad), features)


def used(method, outputs):
    "The student's tensors that the method reads."
    f = outputs.features
    if method.name == "reviewkd":
        f = f[: len(f) // 2] + f[-1:]
    if method.name == "srrl":
        f = f[:1]
    return f if f else (outputs.logits,)


def make(name, family, n=4, dtype=torch.float32, **kw):
    "A built method with a batch: (method, student, teacher, target, index)."
    method = create_method(name, {**SMALL.get(name, {}), **kw})
    s, t = (random_outputs(method, f, n, dtype, grad) for f, grad in zip(FAMILIES[family], (True, False)))
    head = nn.Linear(FAMILIES[family][1][1], CLASSES, dtype=dtype)
    method.build(s, t, head=head, targets=TARGETS)
    index = torch.randperm(SAMPLES)[:n]
    return method, s, t, TARGETS[index], index


def test_all_are_registered():
    assert set(NAMES) <= set(list_methods())
    assert create_method("kd").ce == 0.1 and create_method("dkd").ce == create_method("dist").ce == 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_values_are_finite_and_gradients_reach_student_and_connectors(name, family):
    torch.manual_seed(0)
    method, s, t, target, index = make(name, family)
    terms = method(s, t, target, index)
    assert terms and all(v.dim() == 0 and v.isfinite() and v.dtype == torch.float32 for v in terms.values())
    assert all(key == "ce" or key.startswith(name) for key in terms)
    sum(v for k, v in terms.items() if k != "ce").backward()
    deepest = used(method, s) if family == "resnets" else used(method, s)[-1:]
    for x in deepest:
        assert x.grad is not None and x.grad.isfinite().all() and x.grad.abs().sum() > 0
    for key, p in method.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), key
    assert all(x.grad is None for x in (t.logits, *t.features))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_in_float64(name):
    torch.manual_seed(0)
    method, s, t, target, index = make(name, "resnets", dtype=torch.float64)
    method(s, t, target, index)  # CRD's constant is set
    method.eval()
    inputs = [x for x in (s.logits, *s.features, *method.parameters())]

    def f(*_):
        torch.manual_seed(1)  # the same masks and negatives
        return sum(method.terms(s, t, target, index).values())

    assert f().dtype == torch.float64
    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)


@pytest.mark.parametrize("n", [2, 3, 7])
@pytest.mark.parametrize("name", NAMES)
def test_tiny_batches(name, n):
    torch.manual_seed(0)
    method, s, t, target, index = make(name, "resnets", n=n)
    total = sum(method(s, t, target, index).values())
    total.backward()
    assert total.isfinite() and all(x.grad.isfinite().all() for x in used(method, s))


@pytest.mark.parametrize("name", NAMES)
def test_a_single_sample(name):
    torch.manual_seed(0)
    method, s, t, target, index = make(name, "resnets", n=4)
    one = lambda o: Outputs(o.logits[:1], tuple(f[:1] for f in o.features))
    method.eval()  # batch normalisation cannot train on one vector
    total = sum(method(one(s), one(t), target[:1], index[:1]).values())
    total.backward()
    assert total.isfinite() and all(x.grad is None or x.grad.isfinite().all() for x in s.features)


@pytest.mark.parametrize("fill", [0.0, 1.5, -2.0])
@pytest.mark.parametrize("name", NAMES)
def test_constant_features_never_give_nan(name, fill):
    torch.manual_seed(0)
    method, s, t, target, index = make(name, "resnets")
    for student, teacher in [(fill, None), (None, fill), (fill, fill)]:
        s = random_outputs(method, FAMILIES["resnets"][0], 4, grad=True, fill=student)
        t = random_outputs(method, FAMILIES["resnets"][1], 4, fill=teacher)
        total = sum(method(s, t, target, index).values())
        total.backward()
        assert total.isfinite()
        for x in (s.logits, *s.features):
            assert x.grad is None or x.grad.isfinite().all()
        assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)
        assert all(b.isfinite().all() for b in method.buffers())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_inputs(name, dtype):
    torch.manual_seed(0)
    method, s, t, target, index = make(name, "resnets")
    half = lambda o: Outputs(
        o.logits.detach().to(dtype).requires_grad_(), tuple(f.detach().to(dtype).requires_grad_() for f in o.features)
    )
    s, t = half(s), half(t)
    torch.manual_seed(1)
    low = method.eval().terms(s, t, target, index)
    wide = lambda o: Outputs(o.logits.float(), tuple(f.float() for f in o.features))
    torch.manual_seed(1)
    high = method.terms(wide(s), wide(t), target, index)
    for key in low:
        torch.testing.assert_close(low[key], high[key])
    sum(low.values()).backward()
    assert all(x.grad.isfinite().all() for x in used(method, s))


@pytest.mark.parametrize("name", NAMES)
def test_under_autocast(name):
    torch.manual_seed(0)
    method, s, t, target, index = make(name, "resnets")
    with torch.autocast("cpu", torch.bfloat16):
        terms = method(s, t, target, index)
    sum(terms.values()).backward()
    assert all(v.isfinite() and v.dtype == torch.float32 for v in terms.values())
    assert all(x.grad.isfinite().all() for x in used(method, s))


@pytest.mark.parametrize("name", [n for n in NAMES if n != "kd"])
def test_sums_with_kd(name):
    torch.manual_seed(0)
    method, s, t, target, index = make(name, "resnets")
    both = create_method(f"kd+{name}", {f"{name}.{k}": v for k, v in SMALL.get(name, {}).items()})
    assert both.wants(feature_paths(FAMILIES["resnets"][0][0])) == method.wants(
        feature_paths(FAMILIES["resnets"][0][0])
    )
    both.build(s, t, head=nn.Linear(16, CLASSES), targets=TARGETS)
    terms = both(s, t, target, index)
    assert {"ce", "kd"} < set(terms) and all(v.isfinite() for v in terms.values())


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_resumes(name):
    torch.manual_seed(0)
    method, s, t, target, index = make(name, "resnets")
    for _ in range(2):
        method(s, t, target, index)
    torch.manual_seed(5)
    other = make(name, "resnets")[0]
    if name == "srrl":
        other.head = method.head  # the teacher's, not the method's
    other.load_state_dict(copy.deepcopy(method.state_dict()))
    for _ in range(2):  # the state moves on in step
        values = []
        for m in (method, other):
            torch.manual_seed(7)
            values.append(m(s, t, target, index))
        for key in values[0]:
            torch.testing.assert_close(values[0][key], values[1][key], rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_falls(name):
    torch.manual_seed(0)
    method, s, t, target, index = make(name, "resnets", n=8)
    opt = torch.optim.Adam([*method.parameters(), s.logits, *s.features], lr=0.02)
    path = []
    for _ in range(40):
        torch.manual_seed(1)  # the same masks and negatives: the fall is the optimiser's
        loss = sum(method.terms(s, t, target, index).values())
        path.append(loss.item())
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert path[-1] < path[0] - 0.02 * abs(path[0])


@pytest.mark.parametrize("name", CONNECTED)
def test_connectors_must_be_built_before_use(name):
    method = create_method(name, SMALL.get(name, {}))
    s, t = (random_outputs(method, f, 4) for f in FAMILIES["resnets"])
    with pytest.raises(RuntimeError, match="call method.build"):
        method(s, t, TARGETS[:4], torch.arange(4))


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(CONNECTED)))
def test_others_need_no_build_and_keep_nothing(name):
    method = create_method(name)
    s, t = (random_outputs(method, f, 4) for f in FAMILIES["resnets"])
    assert all(v.isfinite() for v in method(s, t, TARGETS[:4]).values())
    assert not method.state_dict()


@pytest.mark.parametrize("name", ["dkd", "ikl_kd", "reviewkd"])
def test_warm_up(name):
    torch.manual_seed(0)
    method, s, t, target, index = make(name, "resnets")
    method.eval()
    full = method(s, t, target, index)[name]
    for epoch, share in [(0, 1 / 20), (9, 0.5), (19, 1), (100, 1)]:
        method.set_epoch(epoch)
        torch.testing.assert_close(method(s, t, target, index)[name], share * full)


def test_tokens_where_maps_are_needed_are_named():
    for name in ["at", "nst"]:
        with pytest.raises(ValueError, match=r"\(4, 9, 6\) of the student"):
            create_method(name)(
                Outputs(torch.randn(4, 5), (torch.randn(4, 9, 6),)),
                Outputs(torch.randn(4, 5), (torch.randn(4, 6, 3, 3),)),
                torch.arange(4),
            )


def test_features_that_do_not_come_are_named():
    with pytest.raises(ValueError, match="method.wants"):
        create_method("sp")(Outputs(torch.randn(4, 5)), Outputs(torch.randn(4, 5)), torch.arange(4))
    for name in ("at", "nst", "vid", "ofd", "fitnet", "sp", "rkd"):  # never the deepest of a longer list
        student, teacher = (
            Outputs(torch.randn(4, 5), tuple(torch.randn(4, 6, 4, 4) for _ in range(k))) for k in (3, 4)
        )
        with pytest.raises(ValueError, match="3 .*and 4"):
            create_method(name, SMALL.get(name, {})).pairs(student, teacher)
    with pytest.raises(ValueError, match="FeaturePaths.preacts"):
        create_method("ofd").wants(FeaturePaths(("a", "b")))


def test_crd_against_torchdistill():
    from torchdistill.losses.mid_level import CRDLoss

    torch.manual_seed(0)
    method, s, t, target, index = make("crd", "resnets", width=8)
    oracle = CRDLoss(
        "s", "empty", "t", input_size=8, output_size=16, num_negative_samples=7, num_samples=SAMPLES
    )  # 16: its alias table works for powers of two
    oracle.memory_v1, oracle.memory_v2 = method.student_memory.clone(), method.teacher_memory.clone()
    for step in range(3):
        with torch.no_grad():
            a, b = (F.normalize(e) for e in method.connectors[0](s.features[0], t.features[0]))
        torch.manual_seed(step)
        rows = torch.cat([index[:, None], method.others(target, 7)], 1)
        torch.manual_seed(step)
        got = method(s, t, target, index)["crd"]
        supplement = {"pos_idx": index, "contrast_idx": rows}
        expected = oracle({"s": {"output": a}, "empty": {"input": supplement}}, {"t": {"output": b}})
        torch.testing.assert_close(got, 0.8 * expected.squeeze(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(method.student_memory, oracle.memory_v1)
        torch.testing.assert_close(method.teacher_memory, oracle.memory_v2)


def test_crd_contrasts_only_other_classes_and_follows_the_seed():
    targets = torch.tensor([3, 3, 0, 1, 3, 0, 1, 1, 3, 9])  # uneven classes, some without samples
    method = create_method("crd", SMALL["crd"])
    s, t = (random_outputs(method, f, 4) for f in FAMILIES["resnets"])
    method.build(s, t, targets=targets)
    draw = method.others(targets, 500)
    assert (targets[draw] != targets[:, None]).all()
    for row, own in zip(draw, targets):
        assert set(row.tolist()) == set((targets != own).nonzero()[:, 0].tolist())
    torch.manual_seed(3)
    a = method.others(targets, 9)
    torch.manual_seed(3)
    b = method.others(targets, 9)
    assert a.equal(b)
    with pytest.raises(ValueError, match="at least 2"):
        method.build(s, t, targets=torch.zeros(9).long())


def test_crd_draws_no_negative_twice():
    targets = torch.arange(40) % 4  # 30 of other classes
    s, t = (random_outputs(create_method("crd"), f, 4) for f in FAMILIES["resnets"])

    def draws(k, **kw):
        method = create_method("crd", {"width": 8, **kw})
        method.build(s, t, targets=targets)
        torch.manual_seed(0)
        return method.others(targets, k)

    for k in (1, 12, 30):
        assert all(len(row.unique()) == k for row in draws(k))
    others = [(targets != y).nonzero()[:, 0].tolist() for y in targets]
    assert [row.sort().values.tolist() for row in draws(30)] == others
    assert draws(31).shape == (40, 31)  # more than there are: some must come twice
    assert any(len(row.unique()) < 30 for row in draws(30, replacement=True))
    torch.manual_seed(0)
    seen = Negatives(targets)(targets[:1].expand(1000), 3).flatten().bincount(minlength=40)[targets != targets[0]]
    assert (seen / 3000 - 1 / 30).abs().max() < 0.02  # uniform: a standard deviation is 0.003


def test_crd_does_not_learn_from_evaluation():
    method, s, t, target, index = make("crd", "resnets")
    before = copy.deepcopy(method.state_dict())
    method.eval()(s, t, target, index)
    for key, value in method.state_dict().items():
        assert value.equal(before[key]), key


def test_srrl_keeps_the_teachers_classifier_out():
    method, s, t, target, index = make("srrl", "resnets")
    head = method.head[0]
    assert not any(p is q for p in method.parameters() for q in head.parameters())
    sum(method(s, t, target, index).values()).backward()
    assert head.weight.grad is None
    method.to(torch.float64)
    assert head.weight.dtype == torch.float32


def test_paper_args():
    assert paper_args("dkd", "resnet110", "resnet32") == {"beta": 2.0}
    assert paper_args("kd", "resnet34", "resnet18", "imagenet") == {"temperature": 1.0, "weight": 0.5, "ce": 0.5}
    assert paper_args("kd+dkd", "wrn_40_2", "wrn_40_1") == {"dkd.beta": 6.0}
    assert paper_args("fcka", "vgg13", "vgg8") == {}
    ikl = {("vgg13", "vgg8"): (1, 12), ("resnet32x4", "shufflenet_v2"): (3, 12), ("resnet50", "mobilenet_v2"): (1, 12)}
    for pair, (alpha, beta) in ikl.items():
        assert paper_args("ikl_kd", *pair) == {"alpha": alpha, "beta": beta}
    args = paper_args("ikl_kd", "torchvision/resnet50", "mobilenet_v1", "imagenet")
    assert (args["alpha"], args["beta"]) == (4, 1)
    assert paper_args("ikl_kd", "torchvision/resnet34", "torchvision/resnet18", "imagenet")["beta"] == 0.5
    for dataset, want in {"cifar100": (3.5, 3), "imagenet": (1.5, 1)}.items():
        nkd = create_method("nkd", paper_args("nkd", "resnet34", "resnet18", dataset))
        assert (nkd.options["gamma"], nkd.options["temperature"]) == want


@pytest.mark.parametrize("name", ["kd+ickd_c", "ickd_c+kd"])
def test_ickd_with_kd_has_the_weights_of_its_authors(name):
    method = create_method(name, paper_args(name, "resnet32x4", "resnet8x4"))
    kd, ickd = sorted(method.parts, key=lambda part: part.name != "kd")
    assert (method.ce, kd.weight, kd.temperature, ickd.weight) == (1, 1, 4, 2.5)


@pytest.mark.parametrize("pair", [("resnet20", "resnet8"), ("vgg8", "mobilenet_v2_half")])
def test_on_the_networks_of_the_zoo(pair):
    from rcka.models.registry import create_model, list_models

    if not set(pair) <= set(list_models()):
        pytest.skip("the zoo does not have both yet")
    from rcka.features import Taps
    from rcka.features import feature_paths as layers_in

    torch.manual_seed(0)
    teacher, student = (create_model(name, num_classes=CLASSES) for name in pair)
    teacher.eval()
    images, target, index = torch.randn(4, 3, 32, 32), TARGETS[:4], torch.arange(4)
    for name in NAMES:
        method = create_method(name, SMALL.get(name, {}))
        tap_s, tap_t = (Taps(net, method.wants(layers_in(net))) for net in (student, teacher))
        with torch.no_grad():
            method.build(
                tap_s(images), t := tap_t(images), head=teacher.get_submodule(layers_in(teacher).head), targets=TARGETS
            )
        total = sum(method(tap_s(images), t, target, index).values())
        student.zero_grad()
        total.backward()
        assert total.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in student.parameters()), name
        assert sum(p.grad is not None for p in student.parameters()) > 0
