"What holds for every method: sums in any order, stages that are not there, soft labels, the teacher's statistics."

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rcka.core import Batch, FeaturePaths, Outputs
from rcka.methods import BUILT_IN, FOR_CLASSIFIERS  # not list_methods(): other tests register more
from rcka.methods.base import Method, create_method
from rcka.train.classification import Distiller

CLASSES, SAMPLES, N = 5, 20, 6
SMALL = {
    "crd": dict(negatives=7, width=8),
    "dpk": dict(width=8),
    "cc": dict(width=8),
    "reviewkd": dict(width=8),
    "fitnet": dict(stages=(1,)),
}
METHODS = sorted(FOR_CLASSIFIERS)
TARGETS = torch.arange(SAMPLES) % CLASSES
ONE_EACH = [{"fcka", "rcka"}, {"fcka", "rcka_released"}, {"lcka", "rcka"}, {"lcka", "rcka_released"}]
ONE_EACH.append({"rcka", "rcka_released"})  # sums that would have two terms of one name


def create(name):
    return create_method(name, {f"{part}.{k}": v for part in name.split("+") for k, v in SMALL.get(part, {}).items()})


def features_of(name, stages, width, generator):
    "What a method compares in a network with so many stages."
    shapes = {"pooled": (width,)}
    for i in range(stages):
        shapes[f"stage{i}"] = shapes[f"pre{i}"] = (width, 4, 4)
    names = tuple(f"stage{i}" for i in range(stages))
    wanted = create(name).wants(FeaturePaths(names, tuple(f"pre{i}" for i in range(stages)), "pooled", "fc"))
    return tuple(torch.randn(N, *shapes[path], generator=generator) for path in wanted)


def heads():
    return {"head": nn.Linear(8, CLASSES), "student_head": nn.Linear(4, CLASSES)}


def runs(student, teacher):
    "Stand-ins for the networks of a method that runs them on: whatever is in between, they return what they returned."
    return {"run_on": tuple(lambda i, feature, of=outputs: of for outputs in (student, teacher))}


@pytest.mark.parametrize("stages", [3, 4])
@pytest.mark.parametrize("first", METHODS)
def test_sums_in_both_orders_by_paths_of_ones_own(first, stages):
    "Nobody calls `wants`: only the features come, those of the parts one after another."
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(N, CLASSES, generator=generator), torch.randn(N, CLASSES, generator=generator)
    index = torch.arange(N)
    for second in METHODS:
        if first == second:
            continue
        ours, theirs = ([features_of(m, stages, w, generator) for m in (first, second)] for w in (4, 8))
        method = create(f"{first}+{second}")
        student, teacher = (Outputs(z, a + b) for z, (a, b) in zip(logits, (ours, theirs)))
        for outputs, parts in ((student, ours), (teacher, theirs)):
            for got, want in zip(method.split(outputs), parts, strict=True):
                assert len(got.features) == len(want) and all(a is b for a, b in zip(got.features, want)), second
        method.build(student, teacher, **heads(), **runs(student, teacher), targets=TARGETS)
        if {first, second} in ONE_EACH:
            with pytest.raises(ValueError, match="of the same name"):
                method(student, teacher, TARGETS[index], index)
            continue
        terms = method(student, teacher, TARGETS[index], index)
        assert all(v.isfinite() for v in terms.values())
        parts = zip(method.parts, method.split(student), method.split(teacher))
        own = [set(part.terms(a, b, TARGETS[index], index)) for part, a, b in parts]
        assert terms.keys() - {"ce"} == own[0] | own[1]
        assert all(own[i] or m == "none" for i, m in enumerate((first, second)))


def test_dense_methods_share_out_features_too():
    names = tuple(map(str, range(5)))
    layers = FeaturePaths(names, names, "pooled", "head")
    for pair in itertools.permutations(sorted(BUILT_IN), 2):
        wanted = [len(create(name).wants(layers)) for name in pair]
        assert create("+".join(pair)).feature_counts(sum(wanted)) == wanted, pair


def test_features_that_cannot_be_divided_are_refused():
    z = torch.randn(N, CLASSES)
    with pytest.raises(ValueError, match=r"at\+fcka cannot divide 1 features"):
        create_method("at+fcka").split(Outputs(z, (torch.randn(N, 4, 2, 2),)))
    with pytest.raises(ValueError, match="cannot divide 3 features"):
        create_method("fcka+rkd").split(Outputs(z, (torch.randn(N, 4),) * 3))
    three = create_method("rkd+fcka", {"fcka.stages": (1, 2, 3)})
    assert three.feature_counts(4) == [1, 3]
    assert create_method("kd+fcka+lcka").feature_counts(7) == [0, 7, 0]  # one part alone compares features


class Net(nn.Module):
    "Two stages, batch normalisation before each ReLU, a linear classifier."

    def __init__(self, width, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.a = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width))
        self.b = nn.Sequential(nn.Conv2d(width, width, 3, stride=2, padding=1), nn.BatchNorm2d(width))
        self.c = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width))
        self.fc = nn.Linear(width, CLASSES)
        for bn in (self.a[1], self.b[1], self.c[1]):  # as after training: not those of any batch here
            bn.running_mean.normal_(), bn.running_var.uniform_(0.5, 2)

    def forward(self, x):
        for block in (self.a, self.b, self.c):
            x = block(x).relu()
        return self.fc(x.mean((2, 3)))


def batch():
    torch.manual_seed(5)
    return Batch(torch.randn(N, 3, 8, 8), TARGETS[:N], torch.arange(N))


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        ("at+fcka", ["a", "b", "c"]),
        ("fcka+at", ["c", "a", "b"]),
        ("at+vid", ["a", "b", "a", "b"]),
        ("kd+at+rkd", ["a", "b", "fc:input"]),
        ("rkd+at+kd", ["fc:input", "a", "b"]),
    ],
)
def test_a_distiller_shares_out_paths(name, paths):
    "The terms are those of each method alone with its own paths."
    own = {"fcka": ["c"], "rkd": ["fc:input"], "kd": []}
    distil = lambda name, paths: Distiller(Net(4, 1), create_method(name), Net(6, 2), paths, paths)
    got = distil(name, paths)
    torch.manual_seed(0)
    got.build(batch().images, TARGETS)
    terms = got(batch()).terms
    for part in name.split("+"):
        alone = distil(part, own.get(part, ["a", "b"]))
        torch.manual_seed(0)
        alone.build(batch().images, TARGETS)
        for key, value in alone(batch()).terms.items():
            if key != "ce":
                torch.testing.assert_close(terms[key], value)


@pytest.mark.parametrize("name", ["fcka", "rcka", "rcka_released", "sp", "at", "pcka"])
@pytest.mark.parametrize("stages", [(4,), (-1, -5)])
def test_a_stage_that_is_not_there_is_named(name, stages):
    layers = FeaturePaths(("stem", "layer1", "layer2", "layer3"))
    with pytest.raises(ValueError) as error:
        create_method(name, {"stages": stages}).wants(layers)
    for part in (name, f"stages={stages}", "has 4 stages", "stem, layer1, layer2, layer3"):
        assert part in str(error.value)
    assert create_method(name, {"stages": (-4, 3)}).wants(layers) == ["stem", "layer3"]


NEED_CLASSES = ["crd", "dkd", "label_cka", "nkd", "ofa", "rld", "sdd", "wkd_l"]


def mixup():
    a, b = F.one_hot(TARGETS[:N], CLASSES), F.one_hot(TARGETS[1 : N + 1], CLASSES)
    return (0.7 * a + 0.3 * b).double()


@pytest.mark.parametrize("name", METHODS)
def test_soft_labels(name):
    "Every method takes the class probabilities of mixup, or refuses them by name."
    torch.manual_seed(0)
    s, t = (features_of(name, 4, w, torch.Generator().manual_seed(w)) for w in (4, 8))
    logits = torch.randn(N, CLASSES, requires_grad=True)
    student, teacher, index = Outputs(logits, s), Outputs(torch.randn(N, CLASSES), t), torch.arange(N)
    method = create(name)
    given = runs(student, teacher) if method.runs_networks else {}
    method.build(student, teacher, **heads(), **given, targets=TARGETS)
    if name in NEED_CLASSES:
        for run in (method, method.terms):
            with pytest.raises(ValueError, match=f"method {name} needs the class of each sample.*mixup"):
                run(student, teacher, mixup(), index)
        with pytest.raises(ValueError, match=f"method {name} needs"):
            create("kd+" + name).terms(student, teacher, mixup(), index)
        return
    terms = method(student, teacher, mixup(), index)
    assert all(v.isfinite() for v in terms.values())
    want = -(mixup() * logits.double().log_softmax(1)).sum(1).mean()
    assert ("ce" in terms) == bool(method.ce)
    torch.testing.assert_close(terms.get("ce", torch.zeros(())).double(), method.ce * want)


def test_soft_labels_that_do_not_fit():
    z = Outputs(torch.randn(N, CLASSES))
    for wrong in (torch.rand(N), torch.rand(N, CLASSES + 1)):
        with pytest.raises(ValueError, match=rf"class probabilities, \({N}, {CLASSES}\).*got"):
            Method()(z, None, wrong)
    hard = Method()(z, None, TARGETS[:N])["ce"]
    torch.testing.assert_close(Method()(z, None, F.one_hot(TARGETS[:N], CLASSES).half())["ce"], hard)
    ikl = create_method("ikl_kd", {"by_class": True})
    ikl.build(z, z)
    with pytest.raises(ValueError, match="ikl_kd with by_class=True needs the class"):
        ikl(z, z, mixup())


def test_a_distiller_counts_hits_of_soft_labels():
    "The most probable class counts."
    distiller = Distiller(Net(4, 1), create_method("kd"), Net(6, 2))
    soft = batch()._replace(targets=mixup().float())
    want, got = (distiller(b).counts["train_top1"] for b in (batch(), soft))
    assert [int(x) for x in want] == [int(x) for x in got] and int(got[1]) == N


@pytest.mark.parametrize("own", [True, False])
def test_ofd_lets_the_teacher_use_the_statistics_of_the_batch(own):
    teacher = Net(6, 2)
    before = copy.deepcopy(teacher.state_dict())
    distiller = Distiller(
        Net(4, 1), create_method("ofd", {"teacher_batch_stats": own}), teacher, ["a", "b"], ["a", "b"]
    )
    distiller.build(batch().images, TARGETS)
    seen = {}
    distiller.method.terms = lambda student, teacher, *_: seen.update(got=teacher) or {}
    distiller(batch())
    as_published = copy.deepcopy(teacher).train(own)
    x = as_published.a(batch().images)
    maps = [x, as_published.b(x.relu())]
    torch.testing.assert_close(list(seen["got"].features), maps)
    other = copy.deepcopy(teacher).train(not own).a(batch().images)
    assert (other - maps[0]).abs().max() > 0.1
    # the teacher itself is as it was
    assert not any(m.training for m in teacher.modules())
    assert all(m.track_running_stats for m in teacher.modules() if isinstance(m, nn.BatchNorm2d))
    assert all(value.equal(before[key]) for key, value in teacher.state_dict().items())
    # outputs in eval mode, made for other methods, are not used where the batch's statistics are asked for
    given = Outputs(torch.zeros(N, CLASSES), tuple(torch.zeros_like(m) for m in maps))
    distiller(batch(), given)
    assert (seen["got"].features[0].abs().max() > 0) == own


def test_the_teacher_is_in_eval_mode_for_all_others():
    asked = [name for name in sorted(BUILT_IN) if create_method(name).teacher_batch_stats]
    assert asked == ["fcfd", "ofd"] and create_method("kd+ofd").teacher_batch_stats
    assert not create_method("kd+ofd", {"ofd.teacher_batch_stats": False}).teacher_batch_stats
    assert not create_method("kd+fcka").teacher_batch_stats


def test_rcka_released_is_the_last_stage_and_says_where_its_term_is_from():
    """The released class sums its feature term over stages: here it is that of the last one, or a mean, and the sum by
    `alpha`."""
    generator = torch.Generator().manual_seed(0)
    names = tuple(f"stage{i}" for i in range(3))
    layers = FeaturePaths(names, names, "pooled", "fc")
    assert create_method("rcka_released").wants(layers) == ["stage2"]
    student, teacher = (tuple(torch.randn(N, c, 4, 4, generator=generator) for _ in range(3)) for c in (4, 8))
    z = torch.randn(N, CLASSES, generator=generator)

    def features(alpha, *stages):
        method = create_method("rcka_released", {"alpha": alpha, "stages": stages})
        taken = (tuple(f[i] for i in stages) for f in (student, teacher))
        return method.terms(*(Outputs(z, f) for f in taken), TARGETS[:N])["fcka"]

    summed = sum(features(1.0, i) for i in range(3))
    torch.testing.assert_close(features(1.0, 0, 1, 2), summed / 3)
    torch.testing.assert_close(features(3.0, 0, 1, 2), summed)
    said = " ".join(type(create_method("rcka_released")).__doc__.split())
    assert "sums the feature term over all stages" in said and "another paper" in said and "BMVC 2022" in said
