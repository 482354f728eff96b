"""The methods published since 2022: each against its formula written naively in float64, against an oracle where there
is one, and on odd inputs."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import rcka.experiments.study  # noqa: F401  registers the method `scaled`
from rcka.core import Batch, FeaturePaths, Outputs
from rcka.features import ProjectedNetwork, Projector, Taps, feature_paths
from rcka.methods.base import create_method, list_methods
from rcka.methods.candidates import (
    angular_distance,
    explained_variance,
    kernel_cka,
    label_alignment,
    procrustes_similarity,
    rotated_similarities,
)
from rcka.methods.cka import fcka
from rcka.methods.features_recent import (
    cat_loss,
    itrd_correlation_loss,
    itrd_mutual_loss,
    ofa_loss,
    place_cka,
    srd_loss,
    wkd_feature_loss,
)
from rcka.methods.logits import correlation, kd_loss
from rcka.methods.logits_recent import (
    class_costs,
    class_maps,
    mlkd_losses,
    normkd_loss,
    rld_loss,
    sdd_loss,
    skd_direction_loss,
    standardize,
    transport_cost,
    ttm_loss,
    wkd_logit_losses,
)
from rcka.models.registry import create_model, load_weights
from rcka.models.student import load_student, save_student
from rcka.pair import Pair
from rcka.similarity.measures import cka
from rcka.train.callbacks import EMA
from rcka.train.classification import Distiller, evaluate
from rcka.train.config import TrainConfig
from rcka.train.learner import Trainer

LOGITS = ["lskd", "standardized", "ttm", "wttm", "normkd", "rld", "mlkd", "skd", "wkd_l"]
CANDIDATES = ["cka_angle", "procrustes", "explained_variance", "label_cka", "kernel_cka"]  # ours
FEATURES = ["cka_places", "wkd_f", "itrd", "srd", "ofa", "cat_kd", "sdd", "simkd", *CANDIDATES]
NAMES = LOGITS + FEATURES
BUILT = ["wkd_l", "wkd_f", "itrd", "srd", "ofa", "cat_kd", "sdd", "simkd"]  # need `build` before use
CLASSES = 6
STUDENT = ([(4, 8, 8), (4, 8, 8), (6, 4, 4), (8, 2, 2)], 8)  # stem and stages, pooled width
TEACHER = ([(8, 8, 8), (8, 8, 8), (12, 4, 4), (16, 2, 2)], 16)
NAMED = FeaturePaths(tuple(f"stage{i}" for i in range(4)), tuple(f"pre{i}" for i in range(4)), "pooled", "fc")


def outputs(method, family, n=8, dtype=torch.float64, grad=False, fill=None):
    shapes, pooled = family
    sizes = {"pooled": (pooled,)} | {f"stage{i}": shape for i, shape in enumerate(shapes)}
    make = (lambda *s: torch.randn(*s, dtype=dtype)) if fill is None else (lambda *s: torch.full(s, fill, dtype=dtype))
    features = tuple(make(n, *sizes[p]).requires_grad_(grad) for p in method.wants(NAMED))
    return Outputs(make(n, CLASSES).requires_grad_(grad), features)


def heads(dtype=torch.float64):
    "The classifiers of both networks, as `build` takes them."
    return {"head": nn.Linear(16, CLASSES, dtype=dtype), "student_head": nn.Linear(8, CLASSES, dtype=dtype)}


def make(name, n=8, dtype=torch.float64, args=None, **kw):
    "A built method with a batch."
    torch.manual_seed(0)
    method = create_method(name, args)
    s, t = outputs(method, STUDENT, n, dtype, grad=True, **kw), outputs(method, TEACHER, n, dtype, **kw)
    method.build(s, t, **heads(dtype), targets=torch.arange(20) % CLASSES)
    return method, s, t, torch.arange(n) % CLASSES


def leaves(outputs):
    return [x for x in (outputs.logits, *outputs.features) if x.requires_grad]


def total(terms):
    return sum(v for k, v in terms.items() if k != "ce")


# the formulas, one sample, class or channel at a time


def naive_kl(p, q):
    return sum(a * (a / b).log() for a, b in zip(p, q))


def naive_kd(s, t, tau):
    return tau**2 * sum(naive_kl((b / tau).softmax(0), (a / tau).softmax(0)) for a, b in zip(s, t)) / len(s)


def naive_z(z):
    return torch.stack([(row - row.mean()) / row.std() for row in z])


def naive_ttm(s, t, gamma, weighted):
    loss = 0
    for a, b in zip(s, t):
        u = sum(x**gamma for x in b.softmax(0))
        loss = loss + (u if weighted else 1) * naive_kl(b.softmax(0) ** gamma / u, a.softmax(0)) / len(s)
    return loss


def naive_normkd(s, t, tau):
    return sum(naive_kd((a / a.std())[None], (b / b.std())[None], tau) * b.std() ** 2 for a, b in zip(s, t)) / len(s)


def naive_rld(s, t, target, alpha, beta, tau, tau1):
    loss = 0
    for a, b, y in zip(s, t, target):
        q, p = (a / tau1).softmax(0)[y], (b / tau1).softmax(0).max()
        loss = loss + alpha * tau1**2 * naive_kl((p, 1 - p), (q, 1 - q))
        less = [j for j in range(len(b)) if b[j] < b[y]]
        if less:
            loss = loss + beta * tau**2 * naive_kl((b[less] / tau).softmax(0), (a[less] / tau).softmax(0))
    return loss / len(s)


def naive_mlkd(s, t, taus):
    instance = batch = classes = 0
    for tau in taus:
        a, b = (s / tau).softmax(1), (t / tau).softmax(1)
        instance = instance + naive_kd(s, t, tau)
        batch = batch + sum((x @ y - u @ v) ** 2 for x, u in zip(a, b) for y, v in zip(a, b)) / len(s)
        classes = classes + sum((x @ y - u @ v) ** 2 for x, u in zip(a.T, b.T) for y, v in zip(a.T, b.T)) / s.shape[1]
    return instance, batch, classes


def naive_skd(s, t, lam, divide):
    n, p = s.shape
    u, v = F.normalize(s), F.normalize(t)
    d = (u @ u.T - v @ v.T) / (p if divide else 1)
    inverse = torch.linalg.inv(torch.cov(d.T) + lam * torch.eye(n, dtype=s.dtype))
    return sum((row @ inverse @ row).sqrt() for row in d) / n


def naive_wkd(s, t, target, costs, tau, lam, iterations):
    true = others = 0
    for a, b, y in zip(s, t, target):
        true = true - b.softmax(0)[y] * a.log_softmax(0)[y] / len(s)
        keep = [j for j in range(len(a)) if j != y]
        c = costs[keep][:, keep]
        k, p, q = (-c / lam).exp(), (a[keep] / tau).softmax(0), (b[keep] / tau).softmax(0)
        u = torch.ones_like(p) / len(p)
        for _ in range(iterations):
            v = q / (k.T @ u)
            u = p / (k @ v)
        others = others + (torch.diag(u) @ k @ torch.diag(v) * c).sum() / len(s)
    return true, others


def naive_sdd(s, t, target, tau):
    "Cells of a 4 x 4 map: the whole, its quarters, its places."
    boxes = [(i, i + k, j, j + k) for k in (4, 2, 1) for i in range(0, 4, k) for j in range(0, 4, k)]
    loss = 0
    for a, b, y in zip(s, t, target):
        whole = b.mean((1, 2)).argmax() == y
        for i, k, j, l in boxes:
            u, v = (x[:, i:k, j:l].mean((1, 2)) for x in (a, b))
            weight = 1 if (v.argmax() == y) == whole else 2
            loss = loss + weight * naive_kd(u[None], v[None], tau) / (len(s) * len(boxes))
    return loss


def naive_sdd_dkd(s, t, target, alpha, beta, tau):
    "The same cells, with DKD: two binary distributions and the other classes among themselves."
    boxes = [(i, i + k, j, j + k) for k in (4, 2, 1) for i in range(0, 4, k) for j in range(0, 4, k)]
    loss = 0
    for a, b, y in zip(s, t, target):
        whole = b.mean((1, 2)).argmax() == y
        for i, k, j, l in boxes:
            u, v = (x[:, i:k, j:l].mean((1, 2)) for x in (a, b))
            weight = 1 if (v.argmax() == y) == whole else 2
            p, q = (v / tau).softmax(0), (u / tau).softmax(0)
            rest = [c for c in range(len(p)) if c != y]
            true = naive_kl((p[y], 1 - p[y]), (q[y], 1 - q[y]))
            others = naive_kl(p[rest] / p[rest].sum(), q[rest] / q[rest].sum())
            loss = loss + weight * tau**2 * (alpha * true + beta * others) / (len(s) * len(boxes))
    return loss


def naive_class_maps(x, head, bias):
    "The classifier, one place at a time."
    maps = [[x[:, :, i, j] @ head.weight.T + (head.bias if bias else 0) for j in range(4)] for i in range(4)]
    return torch.stack([torch.stack(row, -1) for row in maps], -2)


def naive_wkd_f(s, t, ratio, eps):
    loss = 0
    for a, b in zip(s, t):
        for x, y in zip(a.flatten(1), b.flatten(1)):
            loss = loss + ratio * (x.mean() - y.mean()) ** 2 + ((x.var() + eps).sqrt() - (y.var() + eps).sqrt()) ** 2
    return loss / len(s)


def naive_itrd(s, t, alpha):
    n, std = len(s), lambda z: (z - z.mean(0)) / z.std(0)
    correlations = [(x * y).sum() / n for x, y in zip(std(s).T, std(t).T)]
    return math.log2(math.e) * sum((c - 1).abs() ** (2 * alpha) for c in correlations).log()


def naive_mutual(s, t):
    g, h = (F.normalize(z) @ F.normalize(z).T for z in (s, t))
    return (g / g.trace()).pow(2).sum() - (g * h / (g * h).trace()).pow(2).sum()


def naive_srd(s, t, power, eps):
    bn = lambda z: (z - z.mean(0)) / (z.var(0, correction=0) + eps).sqrt()
    return sum((x - y).abs() ** power for x, y in zip(bn(s).flatten(), bn(t).flatten())).log()


def naive_ofa(s, t, target, eps, tau):
    loss = 0
    for a, b, y in zip(s, t, target):
        p, q = (b / tau).softmax(0), (a / tau).softmax(0)
        loss = loss - sum(((p[j] + (j == y)) ** eps - 1.0 * (j == y)) * q[j].log() for j in range(len(a))) / len(s)
    return loss


def naive_places(s, t):
    "CKA by the nhw x nhw Gram matrices."
    x, y = (z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]) for z in (s, t))
    h = torch.eye(len(x), dtype=x.dtype) - 1 / len(x)
    k, l = (h @ z @ z.T @ h for z in (x, y))
    return (k * l).sum() / (k.norm() * l.norm())


def naive_procrustes(s, t):
    "1 - half the squared distance after the best rotation."
    x, y = (z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]) for z in (s, t))
    x, y = ((z - z.mean(0)) / (z - z.mean(0)).norm() for z in (x, y))
    u, _, v = torch.linalg.svd((x.T @ y).detach(), full_matrices=False)  # the best rotations, constants by optimality
    return 1 - 0.5 * (x.square().sum() + y.square().sum() - 2 * ((x @ u) * (y @ v.T)).sum())


def naive_explained(s, t):
    "1 - the residual of a least-squares fit with a penalty on its coefficients, solved as one larger fit without."
    x, y = (z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]) for z in (s, t))
    x, y = ((z - z.mean(0)) / (z - z.mean(0)).norm() for z in (x, y))
    width, ridge = x.shape[1], 1e-4
    longer = torch.cat([x, (ridge / width) ** 0.5 * torch.eye(width, dtype=x.dtype)])
    wanted = torch.cat([y, torch.zeros(width, y.shape[1], dtype=y.dtype)])
    w = torch.linalg.lstsq(longer, wanted).solution
    return 1 - (longer @ w - wanted).square().sum()


def naive_gaussian(s, t):
    "The widths are constants."
    h, grams = torch.eye(len(s), dtype=s.dtype) - 1 / len(s), []
    for z in (s, t):
        d2 = torch.stack([torch.stack([(a - b).square().sum() for b in z]) for a in z])
        width = torch.stack([d2[i, j].detach() for i in range(len(z)) for j in range(i)]).median()
        grams.append(h @ (-d2 / (2 * width)).exp() @ h)
    k, l = grams
    return (k * l).sum() / (k.norm() * l.norm())


def naive_linear(x, y):
    h = torch.eye(len(x), dtype=x.dtype) - 1 / len(x)
    k, l = (h @ z @ z.T @ h for z in (x, y))
    return (k * l).sum() / (k.norm() * l.norm())


def naive_label(x):
    return naive_linear(x, torch.stack([1.0 * (Y == c) for c in range(CLASSES)], 1).to(x.dtype))


def naive_cat(s, t, normalize):
    "4 x 4 and 2 x 2 maps down to 2 x 2."
    s = torch.stack([s[:, :, i : i + 2, j : j + 2].mean((2, 3)) for i in (0, 2) for j in (0, 2)], 2)
    t = t.flatten(2)
    if normalize:
        s, t = (x / x.norm(dim=2, keepdim=True) for x in (s, t))
    return (s - t).pow(2).mean()


HEADS = [nn.Linear(c, CLASSES, dtype=torch.float64).requires_grad_(False) for c in (5, 7)]


def by_classifiers(name, s, t, maps):
    "A method on class maps: as registered, or from maps made in another way, its weight times the formula."
    if maps is class_maps:
        method = create_method(name)
        method.build(*(Outputs(x[:, :CLASSES, 0, 0], (x,)) for x in (s, t)), head=HEADS[1], student_head=HEADS[0])
        return method.terms(Outputs(None, (s,)), Outputs(None, (t,)), Y[:3])[name]
    a, b = (maps(x, head, name == "sdd") for x, head in zip((s, t.detach()), HEADS))
    return 0.9 * naive_sdd(a, b, Y[:3], 4.0) if name == "sdd" else 15 * naive_cat_whole(a, b)


def naive_cat_whole(s, t):
    "Two 4 x 4 maps down to 2 x 2."
    pool = lambda x: torch.stack([x[:, :, i : i + 2, j : j + 2].mean((2, 3)) for i in (0, 2) for j in (0, 2)], 2)
    return (pool(s) - pool(t)).pow(2).mean()


Y = torch.arange(8) % CLASSES
COSTS = class_costs(torch.randn(CLASSES, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))
FORMULAS = {
    "standardize": (standardize, naive_z, [(8, 6)]),
    "lskd": (
        lambda s, t: kd_loss(standardize(s), standardize(t), 2.0),
        lambda s, t: naive_kd(naive_z(s), naive_z(t), 2.0),
        [(8, 6)] * 2,
    ),
    "ttm": (lambda s, t: ttm_loss(s, t, 0.3), lambda s, t: naive_ttm(s, t, 0.3, False), [(8, 6)] * 2),
    "wttm": (lambda s, t: ttm_loss(s, t, 0.3, True), lambda s, t: naive_ttm(s, t, 0.3, True), [(8, 6)] * 2),
    "normkd": (
        lambda s, t: normkd_loss(s, t.detach(), 1.5),
        lambda s, t: naive_normkd(s, t.detach(), 1.5),
        [(8, 6)] * 2,
    ),
    "rld": (
        lambda s, t: rld_loss(s, t, Y, 2.0, 3.0, 4.0, 1.5),
        lambda s, t: naive_rld(s, t, Y, 2.0, 3.0, 4.0, 1.5),
        [(8, 6)] * 2,
    ),
    **{
        f"mlkd {i}": (
            lambda s, t, i=i: mlkd_losses(s, t, (2.0, 5.0))[i],
            lambda s, t, i=i: naive_mlkd(s, t, (2.0, 5.0))[i],
            [(8, 6)] * 2,
        )
        for i in range(3)
    },
    **{
        f"skd {d}": (
            lambda s, t, d=d: skd_direction_loss(s, t, 0.1, d),
            lambda s, t, d=d: naive_skd(s, t, 0.1, d),
            [(8, 6)] * 2,
        )
        for d in (True, False)
    },
    **{
        f"wkd_l {i}": (
            lambda s, t, i=i: wkd_logit_losses(s, t, Y, COSTS, 2.0)[i],
            lambda s, t, i=i: naive_wkd(s, t, Y, COSTS, 2.0, 0.05, 10)[i],
            [(8, 6)] * 2,
        )
        for i in range(2)
    },
    "sdd": (lambda s, t: sdd_loss(s, t, Y[:3]), lambda s, t: naive_sdd(s, t, Y[:3], 4.0), [(3, 6, 4, 4)] * 2),
    "sdd dkd": (
        lambda s, t: sdd_loss(s, t, Y[:3], dkd=(2.0, 5.0)),
        lambda s, t: naive_sdd_dkd(s, t, Y[:3], 2.0, 5.0, 4.0),
        [(3, 6, 4, 4)] * 2,
    ),
    **{
        f"{name} by the classifiers": (
            lambda s, t, name=name: by_classifiers(name, s, t, class_maps),
            lambda s, t, name=name: by_classifiers(name, s, t, naive_class_maps),
            [(3, 5, 4, 4), (3, 7, 4, 4)],
        )
        for name in ("sdd", "cat_kd")
    },
    "wkd_f": (
        lambda s, t: wkd_feature_loss(s, t, 3.0),
        lambda s, t: naive_wkd_f(s, t, 3.0, 1e-5),
        [(3, 5, 4, 4), (3, 5, 2, 3)],
    ),
    "itrd correlation": (
        lambda s, t: itrd_correlation_loss(s, t, 1.5),
        lambda s, t: naive_itrd(s, t, 1.5),
        [(8, 5)] * 2,
    ),
    "itrd mutual": (itrd_mutual_loss, naive_mutual, [(8, 5), (8, 7)]),
    "srd": (lambda s, t: srd_loss(s, t, 4.0), lambda s, t: naive_srd(s, t, 4.0, 1e-4), [(8, 5)] * 2),
    "ofa": (lambda s, t: ofa_loss(s, t, Y, 1.4, 2.0), lambda s, t: naive_ofa(s, t, Y, 1.4, 2.0), [(8, 6)] * 2),
    "cka_places": (place_cka, naive_places, [(3, 5, 4, 4), (3, 7, 4, 4)]),
    "cka_angle": (
        lambda s, t: angular_distance(place_cka(s, t)),
        lambda s, t: naive_places(s, t).arccos() * 2 / math.pi,
        [(3, 5, 4, 4), (3, 7, 4, 4)],
    ),
    "procrustes": (procrustes_similarity, naive_procrustes, [(3, 5, 4, 4), (3, 7, 4, 4)]),
    "explained_variance": (explained_variance, naive_explained, [(3, 5, 4, 4), (3, 7, 4, 4)]),
    "label_cka": (lambda s: label_alignment(s, Y, CLASSES), naive_label, [(8, 5)]),
    "kernel_cka gaussian": (kernel_cka, naive_gaussian, [(8, 5), (8, 7)]),
    "kernel_cka cosine": (
        lambda s, t: kernel_cka(s, t, "cosine"),
        lambda s, t: naive_linear(F.normalize(s), F.normalize(t)),
        [(8, 5), (8, 7)],
    ),
    "cat": (lambda s, t: cat_loss(s, t), lambda s, t: naive_cat(s, t, False), [(3, 6, 4, 4), (3, 6, 2, 2)]),
    "cat normalised": (
        lambda s, t: cat_loss(s, t, normalize=True),
        lambda s, t: naive_cat(s, t, True),
        [(3, 6, 4, 4), (3, 6, 2, 2)],
    ),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", FORMULAS)
def test_value_and_gradient_against_the_formula(name, seed):
    loss, naive, shapes = FORMULAS[name]
    torch.manual_seed(seed)
    inputs = [torch.randn(*shape, dtype=torch.float64) + 1 for shape in shapes]
    results = []
    for f in (loss, naive):
        x = [z.clone().requires_grad_() for z in inputs]
        value = f(*x)
        direction = torch.ones_like(value) if value.dim() == 0 else inputs[0].sin()
        results.append((value, torch.autograd.grad((value * direction).sum(), x, allow_unused=True)))
    (value, grads), (expected, expected_grads) = results
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-11)
    assert expected_grads[0].abs().sum() > 0
    for got, want in zip(grads, expected_grads):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-10)


# oracles


def io(**kw):
    return {k: {"output": v} for k, v in kw.items()}


def test_lskd_against_torchdistill():
    levels = pytest.importorskip("torchdistill.losses.mid_level")
    if not hasattr(levels, "LogitStdKDLoss"):
        pytest.skip("an older torchdistill")
    method, s, t, target = make("lskd")
    oracle = levels.LogitStdKDLoss("z", "output", "z", "output", temperature=2.0, alpha=0.1, beta=9.0)
    expected = oracle(io(z=s.logits), io(z=t.logits), target)
    torch.testing.assert_close(sum(method(s, t, target).values()), expected, rtol=1e-5, atol=1e-6)  # it adds 1e-7


def test_skd_against_torchdistill(monkeypatch):
    levels = pytest.importorskip("torchdistill.losses.mid_level")
    if not hasattr(levels, "SKDDirectionLoss"):
        pytest.skip("an older torchdistill")
    method, s, t, _ = make("skd", dtype=torch.float32, args={"divide": False})
    s, t = (Outputs(x.logits.detach()) for x in (s, t))
    args = ("z", "output", "z", "output")
    terms = method.terms(s, t)
    expected = levels.SKDDirectionLoss(*args, mode="paper")(io(z=s.logits), io(z=t.logits))
    torch.testing.assert_close(terms["skd_direction"], 0.45 * expected)
    expected = levels.SKDInstanceLoss(*args, mode="paper")(io(z=s.logits), io(z=t.logits))
    torch.testing.assert_close(terms["skd_instance"], 0.45 * 16 * expected)


def test_srd_against_torchdistill():
    levels = pytest.importorskip("torchdistill.losses.mid_level")
    if not hasattr(levels, "SRDLoss"):
        pytest.skip("an older torchdistill")
    method, s, t, _ = make("srd")
    bn = lambda z: F.batch_norm(z, None, None, training=True, eps=1e-4)
    oracle = levels.SRDLoss("f", "output", "f", "output", "z", "output", "z", "output", exponent=4.0)
    projected = bn(method.connectors[0](s.features[0]))
    expected = oracle(io(f=projected, z=s.logits), io(f=bn(t.features[0]), z=t.logits))
    torch.testing.assert_close(total(method.terms(s, t)), expected)


def test_transport_cost_is_that_of_the_best_plan_where_the_entropy_counts_little():
    linprog = pytest.importorskip("scipy.optimize").linprog
    torch.manual_seed(0)
    p, q = (torch.rand(2, 3, 5, dtype=torch.float64)).softmax(-1)
    costs = class_costs(torch.randn(5, 3, dtype=torch.float64))
    got = transport_cost(p, q, costs, regularization=0.01, iterations=2000)
    marginals = torch.cat([torch.eye(5).repeat_interleave(5, 1), torch.eye(5).repeat(1, 5)])
    for a, b, cost in zip(p, q, got):
        best = linprog(costs.flatten().numpy(), A_eq=marginals.numpy(), b_eq=torch.cat([a, b]).numpy()).fun
        assert (
            best - 1e-6 <= cost <= best + 0.01 * math.log(25)
        )  # the entropy of a plan of 25 entries bounds what it costs


# what must hold of the losses


def test_standardised_logits_are_blind_to_scale_and_shift():
    _, s, t, _ = make("lskd")
    method = create_method("lskd")
    base = method.terms(s, t)["lskd"]
    moved = Outputs(3 * t.logits - 2)
    torch.testing.assert_close(method.terms(s, moved)["lskd"], base)
    assert abs(method.terms(moved, t)["lskd"]) < 1e-12


@pytest.mark.parametrize("inner", ["kd", "dkd", "dist", "nkd", "rld", "mlkd", "kd+dist"])
def test_any_method_on_logits_can_be_standardised(inner):
    _, s, t, target = make("kd")
    wrapped, plain = create_method("standardized", {"method": inner}), create_method(inner)
    assert wrapped.wants(NAMED) == plain.wants(NAMED) == []
    got = wrapped(s, t, target)
    expected = plain(Outputs(standardize(s.logits)), Outputs(standardize(t.logits)), target)
    torch.testing.assert_close(got["ce"], wrapped.ce * F.cross_entropy(s.logits.float(), target))
    assert wrapped.ce == plain.ce
    for key, value in got.items():
        if key != "ce":
            torch.testing.assert_close(value, expected[key.removesuffix("_standardized")])


def test_standardised_passes_on_epochs_features_and_connectors():
    method = create_method("standardized", {"method": "dkd", "args": {"warmup": 10}})
    method.set_epoch(4)
    assert method.inner.warm == 0.5
    method = create_method("standardized", {"method": "kd+wkd_f"})
    s, t = outputs(method, STUDENT), outputs(method, TEACHER)
    assert method.wants(NAMED) == ["stage3"]
    method.build(s, t)
    assert list(method.parameters()) and set(method.terms(s, t)) == {"kd_standardized", "wkd_f_standardized"}


SAME = ["lskd", "standardized", "normkd", "mlkd", "skd"]  # 0 where student and teacher agree


@pytest.mark.parametrize("name", SAME)
def test_zero_where_student_and_teacher_agree(name):
    method, _, t, target = make(name)
    same = t._replace(logits=t.logits.clone().requires_grad_())
    loss = total(method.terms(same, t, target))
    loss.backward()
    assert abs(loss) < 1e-10 and same.logits.grad.abs().max() < 1e-7


def test_optima_of_the_others():
    torch.manual_seed(0)
    t = 2 * torch.randn(8, CLASSES, dtype=torch.float64)
    right = t.argmax(1)
    assert abs(ttm_loss(0.2 * t, t, 0.2)) < 1e-12 and abs(ttm_loss(0.2 * t, t, 0.2, weighted=True)) < 1e-12
    assert abs(rld_loss(t, t, right)) < 1e-12 and rld_loss(t, t, (right + 1) % CLASSES) > 0.1
    maps = torch.randn(3, 5, 4, 4, dtype=torch.float64)
    assert abs(wkd_feature_loss(maps, maps)) < 1e-15 and abs(sdd_loss(maps, maps, Y[:3])) < 1e-12
    assert abs(1 - place_cka(maps, maps)) < 1e-12 and cat_loss(maps, maps) == 0
    z = t.clone().requires_grad_()  # soft cross-entropy with the teacher
    ofa_loss(z, t, right).backward()
    assert z.grad.abs().max() < 1e-12
    z = t.clone().requires_grad_()  # a larger epsilon wants more of the true class
    ofa_loss(z, t, right, epsilon=1.5).backward()
    assert (z.grad.gather(1, right[:, None]) < 0).all()


def test_rld_never_teaches_a_wrong_class():
    "The gradient of the masked part is on classes that the teacher ranks below the true one."
    torch.manual_seed(0)
    s, t = (
        torch.randn(8, CLASSES, dtype=torch.float64, requires_grad=True),
        torch.randn(8, CLASSES, dtype=torch.float64),
    )
    rld_loss(s, t, Y, alpha=0.0).backward()
    above = t >= t.gather(1, Y[:, None])
    assert (s.grad[above] == 0).all() and (s.grad[~above] != 0).any()


def test_a_teacher_that_ranks_the_true_class_last_or_knows_ties():
    s = torch.randn(2, 4, requires_grad=True)
    t = torch.tensor([[0.0, 1.0, 2.0, 3.0], [1.0, 1.0, 1.0, 1.0]])
    loss = rld_loss(s, t, torch.tensor([0, 2]))
    loss.backward()
    assert loss.isfinite() and s.grad.isfinite().all()


def test_decay_is_half_a_cosine():
    for name in ("wkd_l", "wkd_f"):
        method = create_method(name, {"decay": (150, 240)})
        for epoch, share in [(0, 1), (150, 1), (195, 0.5), (240, 0), (300, 0)]:
            method.set_epoch(epoch)
            assert method.share == pytest.approx(share)
        constant = create_method(name)
        constant.set_epoch(200)
        assert constant.share == 1


def test_warm_up_of_rld():
    method, s, t, target = make("rld")
    full = method.terms(s, t, target)["rld"]
    method.set_epoch(9)
    torch.testing.assert_close(method.terms(s, t, target)["rld"], 0.5 * full)


# CKA over places


def test_place_cka_is_cka_of_the_places_for_every_memory_format_and_size():
    torch.manual_seed(0)
    x, y = torch.randn(4, 5, 8, 6, dtype=torch.float64), torch.randn(4, 7, 8, 6, dtype=torch.float64).relu() + 3
    rows = lambda z: z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
    expected = cka(rows(x), rows(y))
    for formats in [
        (torch.contiguous_format,) * 2,
        (torch.channels_last,) * 2,
        (torch.channels_last, torch.contiguous_format),
    ]:
        a, b = (z.clone(memory_format=f).requires_grad_() for z, f in zip((x, y), formats))
        got = place_cka(a, b)
        torch.testing.assert_close(got, expected)
        got.backward()
        assert a.grad.sum((0, 2, 3)).abs().max() < 1e-12  # blind to a shift of each channel
    big = x.repeat_interleave(2, 2).repeat_interleave(2, 3)  # averaged down to the other's size
    torch.testing.assert_close(place_cka(big, y), expected)
    torch.testing.assert_close(place_cka(y, big), expected)


def test_place_cka_knows_one_rotation_and_places():
    torch.manual_seed(0)
    y = torch.randn(4, 7, 8, 8, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64))[0]
    torch.testing.assert_close(
        place_cka(2 * torch.einsum("ncij,cd->ndij", y, rotation) + 1, y), torch.ones(()).double()
    )
    assert place_cka(y.flip(2), y) < 0.3  # other places
    assert place_cka(y.flip(0), y) < 0.3  # other samples


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e6, 1e12])
def test_place_cka_of_values_of_any_size(scale):
    torch.manual_seed(0)
    x, y = torch.randn(4, 5, 4, 4), torch.randn(4, 7, 4, 4)
    expected = place_cka(x, y)
    a = (scale * x).requires_grad_()
    got = place_cka(a, y)
    got.backward()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert a.grad.isfinite().all() and a.grad.abs().sum() > 0


@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e6])
def test_place_cka_of_constant_channels_is_zero_without_a_gradient(value):
    torch.manual_seed(0)
    constant = torch.full((4, 5, 6, 7), value) * torch.rand(1, 5, 1, 1)
    for x, y in [(constant, torch.randn(4, 3, 6, 7)), (torch.randn(4, 3, 6, 7), constant), (constant, constant)]:
        x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
        got = place_cka(x, y)
        got.backward()
        assert got == 0 and (x.grad == 0).all() and (y.grad == 0).all()


def test_place_cka_loses_no_digits_to_a_large_mean():
    torch.manual_seed(0)
    x, y = torch.randn(8, 5, 8, 8, dtype=torch.float64), torch.randn(8, 7, 8, 8, dtype=torch.float64)
    expected = place_cka(x, y)
    torch.testing.assert_close(
        place_cka((x + 1000).float(), (y - 1000).float()).double(), expected, rtol=1e-3, atol=1e-4
    )


def test_place_cka_refuses_a_second_derivative():
    x, y = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4)
    (grad,) = torch.autograd.grad(place_cka(x, y), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        grad.sum().backward()


def test_weights_by_stage():
    method, s, t, _ = make("cka_places", args={"weight": 10.0})
    each = [1 - place_cka(a, b) for a, b in zip(s.features, t.features)]
    torch.testing.assert_close(method.terms(s, t)["cka_places"], 10 * sum(each) / 3)
    weighted = create_method("cka_places", {"weight": 10.0, "stage_weights": (1, 0, 3)})
    torch.testing.assert_close(weighted.terms(s, t)["cka_places"], 10 * (each[0] + 3 * each[2]) / 4)
    for wrong in [(1, 2), (0, 0, 0), (1, -1, 1)]:
        with pytest.raises(ValueError, match="stage_weights"):
            create_method("cka_places", {"stage_weights": wrong})
    with pytest.raises(ValueError, match="3 stages, but got 2"):
        method.terms(s._replace(features=s.features[:2]), t._replace(features=t.features[:2]))
    with pytest.raises(ValueError, match="network has 2"):
        method.wants(FeaturePaths(("a", "b")))


def test_the_angle_at_its_ends():
    s = torch.tensor([1.0, 1.0 - 1e-9, -1.0, 0.0, 0.5], requires_grad=True)
    value = angular_distance(s)
    value.sum().backward()
    torch.testing.assert_close(value, torch.tensor([0.0, 0.0, 2.0, 1.0, 2 / 3]))
    assert s.grad.isfinite().all()


def test_the_gradient_of_the_angle_keeps_its_length_near_the_optimum():
    torch.manual_seed(0)
    y, noise = torch.randn(2, 6, 5, 4, 4, dtype=torch.float64)
    lengths = []
    for share in (1e-2, 1e-4):
        x = (y + share * noise).requires_grad_()
        lengths += [torch.autograd.grad(f(place_cka(x, y)), x)[0].norm() for f in (angular_distance, lambda s: 1 - s)]
    assert lengths[2] > 0.9 * lengths[0] and lengths[3] < 0.02 * lengths[1]


def test_candidates_know_their_optima():
    torch.manual_seed(0)
    y = torch.randn(4, 7, 8, 8, dtype=torch.float64)
    rotated = 2 * torch.einsum("ncij,cd->ndij", y, torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64))[0]) + 1
    for similarity in (procrustes_similarity, kernel_cka, place_cka):
        assert abs(1 - similarity(rotated, y)) < 1e-10
    assert abs(1 - kernel_cka(y * torch.rand(4, 1, 1, 1), y, "cosine")) < 1e-10
    simplex = torch.eye(CLASSES, dtype=torch.float64)[Y]
    assert abs(1 - label_alignment(3 * simplex - 1, Y, CLASSES)) < 1e-12
    assert label_alignment(simplex, Y, CLASSES) > label_alignment(simplex.roll(1, 0), Y, CLASSES) + 0.1
    mixed = torch.einsum("ncij,cd->ndij", y, torch.randn(7, 9, dtype=torch.float64)) + 1
    assert 1 - 1e-3 < explained_variance(mixed, y) <= 1  # in any coordinates, but for the ridge
    # the nuclear norm lies between the Frobenius norm and the root of the rank times it
    x = torch.randn(4, 7, 8, 8, dtype=torch.float64)
    assert 0 < procrustes_similarity(x, y) < 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("similarity", [procrustes_similarity, explained_variance, place_cka])
def test_values_that_are_not_finite_reach_the_loss(similarity, bad):
    "The watch of the trainer then names the term; a decomposition that raises would say nothing of it."
    x, y = torch.randn(4, 3, 4, 4), torch.randn(4, 5, 4, 4)
    x[0, 0, 0, 0] = bad
    assert similarity(x, y).isnan() and similarity(y, x).isnan()


def test_levels_are_cosines_after_one_rotation():
    """Against the formula with scipy's rotation: the first is that of single places, the others are of means over
    blocks."""
    scipy_linalg = pytest.importorskip("scipy.linalg")
    x, y = torch.randn(6, 4, 16, 16, dtype=torch.float64), torch.randn(6, 4, 16, 16, dtype=torch.float64)
    y = y + 3 * x.flip(1) + torch.randn(6, 4, 1, 1, dtype=torch.float64)
    rows = [z.reshape(6, 4, 8, 2, 8, 2).mean((3, 5)).movedim(1, -1) for z in (x, y)]  # size 8: means over 2 x 2 places
    a, b = ((z - z.mean((0, 1, 2))).numpy() for z in rows)
    rotation, _ = scipy_linalg.orthogonal_procrustes(a.reshape(-1, 4), b.reshape(-1, 4))
    a = a @ rotation
    wanted = []
    for block in (1, 2, 8):
        u, v = (z.reshape(6, 8 // block, block, 8 // block, block, 4).mean((2, 4)).ravel() for z in (a, b))
        wanted.append(u @ v / (u @ u * (v @ v)) ** 0.5)
    found = rotated_similarities(x, y, size=8, levels=(4, 1, 16))  # 16 is no mean of 8 x 8 places
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64))
    one, two = (create_method("procrustes", {"size": 8, "levels": levels}) for levels in ((), (4, 1)))
    for method, similarities in ((one, found[:1]), (two, found)):
        term = method.terms(Outputs(None, (x,)), Outputs(None, (y,)))["procrustes"]
        torch.testing.assert_close(term, 16 * (1 - similarities.mean()))


@pytest.mark.parametrize(
    "args, word", [({"size": 0}, "size"), ({"levels": (4, 0.5)}, "levels"), ({"levels": (-1,)}, "levels")]
)
def test_sizes_of_procrustes(args, word):
    with pytest.raises(ValueError, match=word):
        create_method("procrustes", args)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
@pytest.mark.parametrize("similarity", [procrustes_similarity, explained_variance])
def test_constant_channels_give_zero_without_a_gradient(similarity, value):
    torch.manual_seed(0)
    constant = torch.full((4, 5, 6, 7), value) * torch.rand(1, 5, 1, 1)
    for x, y in [(constant, torch.randn(4, 3, 6, 7)), (torch.randn(4, 3, 6, 7), constant)]:
        x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
        got = similarity(x, y)
        got.backward()
        assert got == 0 and (x.grad == 0).all() and (y.grad == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("width", [8, 512])
def test_explained_variance_with_copied_and_dead_channels(width):
    """A covariance without an inverse: value and gradient are finite, and copies explain no more than the channel
    itself."""
    torch.manual_seed(0)
    x, y = torch.randn(4, width, 4, 4), torch.randn(4, 6, 4, 4)
    x[:, width // 2 :] = x[:, : width // 2]
    x[:, 0] = 0
    y[:, :2] = x[:, 1:3]
    x.requires_grad_()
    value = explained_variance(x, y)
    value.backward()
    assert 0.3 < value <= 1 + 1e-6 and x.grad.isfinite().all()
    oracle = pytest.importorskip("sklearn.linear_model").LinearRegression()
    a, b = (z.detach().double().permute(0, 2, 3, 1).flatten(0, 2).numpy() for z in (x[:, 1:4], y))
    few = explained_variance(x[:, 1:4].double(), y.double()).item()
    b = b - b.mean(0)
    residual = b - oracle.fit(a, b).predict(a)
    assert abs(few - (1 - (residual**2).sum() / (b**2).sum())) < 1e-3


def test_fcka_takes_several_stages():
    method, s, t, _ = make("fcka", args={"stages": (-3, -2, -1), "weight": 6.0})
    each = [1 - fcka(a, b) for a, b in zip(s.features, t.features)]
    torch.testing.assert_close(method.terms(s, t)["fcka"], 6 * sum(each) / 3)


# every method: odd inputs, precision, state, training


def test_all_are_registered_and_none_is_untested():
    assert set(NAMES) <= set(list_methods())
    import rcka.methods.candidates as candidates
    import rcka.methods.features_recent as features
    import rcka.methods.logits_recent as logits
    from rcka.methods.base import METHODS

    modules = {m.__name__ for m in (features, logits, candidates)}
    ours = {name for name, cls in METHODS.items() if cls.__module__ in modules}
    assert ours == {*NAMES, "fcfd", "crosskd"}  # these two run networks: tests/test_run_on.py


@pytest.mark.parametrize("name", NAMES)
def test_terms_are_named_finite_and_reach_what_is_trained(name):
    method, s, t, target = make(name, dtype=torch.float32)
    terms = method(s, t, target)
    assert all(v.dim() == 0 and v.isfinite() and v.dtype == torch.float32 for v in terms.values())
    assert all(key == "ce" or key.startswith(name) or name == "standardized" for key in terms)
    total(terms).backward()
    wanted = [s.logits] if name in LOGITS else s.features
    assert all(x.grad is not None and x.grad.isfinite().all() and x.grad.abs().sum() > 0 for x in wanted)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())
    assert not any(x.requires_grad for x in (t.logits, *t.features))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_in_float64(name):
    # the width of the Gaussian kernel is held constant, which differences do not know
    method, s, t, target = make(name, n=5, args={"kernel": "cosine"} if name == "kernel_cka" else None)
    method.eval()
    inputs = [*leaves(s), *method.parameters()]
    f = lambda *_: total(method.terms(s, t, target))
    assert f().dtype == torch.float64
    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
def test_under_autocast(name):
    method, s, t, target = make(name, dtype=torch.float32)
    method.eval()
    expected = method.terms(s, t, target)
    with torch.autocast("cpu", torch.bfloat16):
        terms = method.terms(s, t, target)
    total(terms).backward()
    for key, value in terms.items():
        assert value.dtype == torch.float32
        # connectors run in bfloat16, and the logarithms of itrd and srd may be near zero
        torch.testing.assert_close(value, expected[key], rtol=0.05, atol=0.1)
    assert all(x.grad is None or x.grad.isfinite().all() for x in leaves(s))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_inputs(name, dtype):
    method, s, t, target = make(name, dtype=torch.float32)
    method.eval()
    half = lambda o: Outputs(
        o.logits.detach().to(dtype).requires_grad_(), tuple(f.detach().to(dtype).requires_grad_() for f in o.features)
    )
    s, t = half(s), half(t)
    wide = lambda o: Outputs(o.logits.float(), tuple(f.float() for f in o.features))
    low, high = method.terms(s, t, target), method.terms(wide(s), wide(t), target)
    for key in low:
        torch.testing.assert_close(low[key], high[key])
    total(low).backward()
    assert all(x.grad is None or x.grad.isfinite().all() for x in leaves(s))


@pytest.mark.parametrize("fill", [0.0, 1.5, -2.0])
@pytest.mark.parametrize("name", NAMES)
def test_constant_inputs_never_give_nan(name, fill):
    method, s, t, target = make(name, dtype=torch.float32)
    for ours, theirs in [(fill, None), (None, fill), (fill, fill)]:
        s = outputs(method, STUDENT, dtype=torch.float32, grad=True, fill=ours)
        t = outputs(method, TEACHER, dtype=torch.float32, fill=theirs)
        loss = total(method.terms(s, t, target))
        loss.backward()
        assert loss.isfinite() and all(x.grad is None or x.grad.isfinite().all() for x in leaves(s))
        assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)


@pytest.mark.parametrize("size", [1e-3, 30.0, 300.0])
@pytest.mark.parametrize("name", LOGITS)
def test_logits_of_any_size_never_give_nan(name, size):
    "Probabilities underflow to zero at the larger sizes."
    method, s, t, target = make(name, dtype=torch.float32)
    s, t = Outputs((size * s.logits.detach()).requires_grad_()), Outputs(size * t.logits)
    loss = total(method.terms(s, t, target))
    loss.backward()
    assert loss.isfinite() and s.logits.grad.isfinite().all()


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_tiny_batches(name, n):
    if n == 1 and name in ("label_cka", "kernel_cka"):
        pytest.skip("CKA of one sample is refused, as by fcka")
    method, s, t, target = make(name, dtype=torch.float32)
    method.eval()  # batch normalisation cannot train on one vector
    few = lambda o: Outputs(o.logits[:n], tuple(f[:n] for f in o.features))
    loss = total(method.terms(few(s), few(t), target[:n]))
    loss.backward()
    assert loss.isfinite() and all(x.grad is None or x.grad.isfinite().all() for x in leaves(s))


@pytest.mark.parametrize("name", BUILT)
def test_those_with_parts_of_their_own_must_be_built(name):
    method = create_method(name)
    s, t = outputs(method, STUDENT), outputs(method, TEACHER)
    with pytest.raises(RuntimeError, match="method.build"):
        method(s, t, Y)


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(BUILT)))
def test_the_others_need_no_build_and_keep_nothing(name):
    method = create_method(name)
    s, t = outputs(method, STUDENT), outputs(method, TEACHER)
    assert all(v.isfinite() for v in method(s, t, Y).values()) and not method.state_dict()


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_resumes(name):
    method, s, t, target = make(name)
    other = make(name)[0]
    for p in other.parameters():
        nn.init.constant_(p, 0.1)
    other.load_state_dict(copy.deepcopy(method.state_dict()))
    for key, value in method.terms(s, t, target).items():
        torch.testing.assert_close(other.terms(s, t, target)[key], value, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_falls(name):
    method, s, t, target = make(name)
    opt = torch.optim.Adam([*method.parameters(), *leaves(s)], lr=0.02)
    path = []
    for _ in range(40):
        loss = total(method.terms(s, t, target))
        path.append(loss.item())
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert path[-1] < path[0] - 0.02 * abs(path[0])


@pytest.mark.parametrize("name", [n for n in NAMES if n != "standardized"])
def test_adds_up_with_fcka(name):
    both = create_method(f"{name}+fcka")
    s, t = outputs(both, STUDENT), outputs(both, TEACHER)
    both.build(s, t, **heads(), targets=Y)
    terms = both(s, t, Y)
    assert "fcka" in terms and len(terms) > (2 if both.ce else 1) and all(v.isfinite() for v in terms.values())


@pytest.mark.parametrize("name", NAMES)
def test_one_step_on_a_small_network(name):
    "A step of the student on images lowers the loss on them; the teacher stays as it is."
    torch.manual_seed(0)
    student, teacher = create_model("resnet8", CLASSES), create_model("resnet14", CLASSES).eval().requires_grad_(False)
    images, target = torch.randn(12, 3, 32, 32), torch.arange(12) % CLASSES
    method = create_method(name, {"warmup": 1} if name == "rld" else None)
    ours, theirs = (Taps(net, method.wants(feature_paths(net))) for net in (student, teacher))
    own = (net.get_submodule(feature_paths(net).head) for net in (teacher, student))
    before = copy.deepcopy(teacher.state_dict())
    method.build(ours(images), theirs(images), **dict(zip(("head", "student_head"), own)), targets=target)
    opt = torch.optim.SGD([*student.parameters(), *method.parameters()], lr=1e-3)
    losses = []
    for _ in range(2):
        terms = method(ours(images), theirs(images), target)
        loss = sum(terms.values())
        losses.append(loss.item())
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*student.parameters(), *method.parameters()], 1.0)
        opt.step()
    assert losses[1] < losses[0]
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


# refusals


@pytest.mark.parametrize("name", LOGITS)
def test_other_shapes_and_integers_are_refused(name):
    method, s, t, target = make(name)
    with pytest.raises(ValueError, match=r"(8, 6).*(8, 4)"):
        method.terms(s, Outputs(t.logits[:, :4]), target)
    with pytest.raises(TypeError, match="float"):
        method.terms(Outputs(s.logits.long()), t, target)


def test_maps_are_asked_for():
    tokens = Outputs(torch.randn(4, 6), (torch.randn(4, 9, 6),) * 3)
    with pytest.raises(ValueError, match=r"\(4, 9, 6\) of the student"):
        create_method("cka_places").terms(tokens, tokens)
    with pytest.raises(ValueError, match="batches differ"):
        place_cka(torch.randn(4, 3, 2, 2), torch.randn(5, 3, 2, 2))
    with pytest.raises(TypeError, match="dtype"):
        place_cka(torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2).double())
    with pytest.raises(ValueError, match="channels differ: 3 of the student and 4"):
        wkd_feature_loss(torch.randn(2, 3, 4, 4), torch.randn(2, 4, 4, 4))
    with pytest.raises(ValueError, match="same classes"):
        cat_loss(torch.randn(2, 3, 4, 4), torch.randn(2, 4, 4, 4))
    with pytest.raises(ValueError, match="at least 4, the finest"):
        sdd_loss(torch.randn(2, 3, 2, 2), torch.randn(2, 3, 4, 4), Y[:2])
    with pytest.raises(ValueError, match="must begin with 1"):
        sdd_loss(torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), Y[:2], scales=(2, 4))


def test_options_of_the_candidates_are_checked():
    with pytest.raises(ValueError, match="over must be 'places' or 'samples', got 'rows'"):
        create_method("cka_angle", {"over": "rows"})
    for make_one in (
        lambda: create_method("kernel_cka", {"kernel": "linear"}),
        lambda: kernel_cka(torch.randn(4, 3), torch.randn(4, 3), "linear"),
    ):
        with pytest.raises(ValueError, match="for the linear one use fcka"):
            make_one()
    flattened = create_method("cka_angle", {"over": "samples", "stages": (-1,), "weight": 1.0})
    s, t = outputs(flattened, STUDENT), outputs(flattened, TEACHER)
    expected = fcka(s.features[0], t.features[0]).arccos() * 2 / math.pi
    torch.testing.assert_close(flattened.terms(s, t)["cka_angle"], expected)


def test_vectors_of_two_widths_are_refused():
    for loss in (itrd_correlation_loss, srd_loss):
        with pytest.raises(ValueError, match=r"same width, got \(4, 3\) and \(4, 5\)"):
            loss(torch.randn(4, 3), torch.randn(4, 5))


def test_what_skd_and_wkd_cannot_do_is_said():
    with pytest.raises(ValueError, match="tikhonov must be positive"):
        skd_direction_loss(torch.randn(4, 3), torch.randn(4, 3), tikhonov=0.0)
    method, s, t, _ = make("wkd_l")
    for head in (None, nn.Conv2d(3, CLASSES, 1)):
        with pytest.raises(ValueError, match="head=teacher_classifier"):
            create_method("wkd_l").build(s, t, head=head)
    with pytest.raises(ValueError, match="costs of 5 classes"):
        create_method("wkd_l").build(s, t, head=nn.Linear(3, 5))
    for wrong in ({"iterations": 0}, {"regularization": 0.0}):
        p = torch.full((2, CLASSES), 1 / CLASSES, dtype=torch.float64)
        with pytest.raises(ValueError, match="iterations must be at least 1 and regularization positive"):
            transport_cost(p, p, COSTS, **wrong)
    given = create_method("wkd_l", {"costs": COSTS})
    given.build(s, t)
    assert torch.equal(given.costs, COSTS)
    assert not list(method.buffers())  # processes that each see a part of the batch refuse a method with a memory


def test_ofa_reads_tokens_and_maps():
    torch.manual_seed(0)
    method = create_method("ofa")
    s = Outputs(torch.randn(4, CLASSES), (torch.randn(4, 9, 16), torch.randn(4, 9, 16), torch.randn(4, 9, 16)))
    t = Outputs(torch.randn(4, CLASSES), (torch.randn(4, 8, 8, 8), torch.randn(4, 12, 4, 4), torch.randn(4, 16, 2, 2)))
    for ours, theirs in [(s, t), (t, s)]:
        method.build(ours, theirs)
        assert all(v.isfinite() for v in method(ours, theirs, Y[:4]).values())


def test_itrd_uses_the_embedding_for_relations_only_where_widths_differ():
    torch.manual_seed(0)
    method = create_method("itrd")
    s, t = (Outputs(torch.randn(8, CLASSES), (torch.randn(8, 5),)) for _ in range(2))
    method.build(s, t)
    torch.testing.assert_close(method.terms(s, t)["itrd_mutual"], itrd_mutual_loss(s.features[0], t.features[0]))
    embedded = method.connectors[0](s.features[0])
    expected = (1 - correlation(embedded, t.features[0], 0) * 7 / 8).pow(2.02).sum().log2()
    torch.testing.assert_close(method.terms(s, t)["itrd_correlation"], 2 * expected)


# the classifiers of both networks


def test_class_maps_average_to_the_logits_of_a_network():
    torch.manual_seed(0)
    network = create_model("resnet8", CLASSES).eval()
    paths = feature_paths(network)
    with torch.no_grad():
        logits, (last,) = Taps(network, paths.stages[-1:])(torch.randn(4, 3, 32, 32))
        maps = class_maps(last, network.get_submodule(paths.head))
    torch.testing.assert_close(maps.mean((2, 3)), logits)


@pytest.mark.parametrize("name", ["cat_kd", "sdd"])
def test_the_classifier_of_the_student_is_trained_where_it_is(name):
    method, s, t, target = make(name)
    ours, theirs = method._heads
    total(method.terms(s, t, target)).backward()
    assert ours.weight.grad.abs().sum() > 0 and theirs.weight.grad is None
    assert not list(method.parameters()) and not method.state_dict()
    for missing in ({"head": theirs}, {"student_head": ours}, {"head": theirs, "student_head": nn.Conv2d(8, 6, 3)}):
        with pytest.raises(ValueError, match=f"{name} applies the .* linear classifier"):
            create_method(name).build(s, t, **missing)
    with pytest.raises(ValueError, match="classifier with 9 inputs"):
        create_method(name).build(s, t, head=theirs, student_head=nn.Linear(9, CLASSES, dtype=torch.float64))


def test_sdd_leaves_out_grids_that_are_finer_than_a_map():
    method, s, t, target = make("sdd")  # maps of 2 x 2
    fewer, *_ = make("sdd", args={"scales": (1, 2)})
    fewer._heads = method._heads
    torch.testing.assert_close(method.terms(s, t, target)["sdd"], fewer.terms(s, t, target)["sdd"])
    plain = create_method("sdd", {"scales": (1,), "weight": 1.0})
    plain._heads = method._heads
    logits = [h(o.features[0].mean((2, 3))) for h, o in zip(method._heads, (s, t))]
    torch.testing.assert_close(plain.terms(s, t, target)["sdd"], kd_loss(*logits, 4.0))
    warm = create_method("sdd", {"warmup": 4})
    warm._heads = method._heads
    warm.set_epoch(0)
    torch.testing.assert_close(warm.terms(s, t, target)["sdd"], method.terms(s, t, target)["sdd"] / 4)


def test_cat_kd_does_not_see_the_bias():
    method, s, t, _ = make("cat_kd")
    before = method.terms(s, t)["cat_kd"]
    with torch.no_grad():
        method._heads[0].bias += 3
    assert method.terms(s, t)["cat_kd"] == before


# SimKD


@pytest.mark.parametrize("larger", ["teacher", "student", "neither"])
def test_simkd_against_the_formula(larger):
    """The projector written as products of matrices and shifts, in eval mode with statistics of its own; the larger map
    averaged down."""
    torch.manual_seed(0)
    s = torch.randn(3, 5, *(4, 4) if larger == "student" else (2, 2), dtype=torch.float64, requires_grad=True)
    t = torch.randn(3, 6, *(4, 4) if larger == "teacher" else (2, 2), dtype=torch.float64)
    method, head = create_method("simkd", {"weight": 2.0}), nn.Linear(6, CLASSES).double()
    method.build(Outputs(None, (s,)), Outputs(None, (t,)), head=head)
    method.double().eval()
    for m in method.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(), m.running_var.uniform_(0.5, 2)
            nn.init.normal_(m.weight), nn.init.normal_(m.bias)
    convs, norms = ([m for m in method.modules() if isinstance(m, k)] for k in (nn.Conv2d, nn.BatchNorm2d))
    assert [tuple(c.weight.shape) for c in convs] == [(3, 5, 1, 1), (3, 3, 3, 3), (6, 3, 1, 1)]
    quarter = lambda x: (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4
    x, y = (quarter(z) if z.shape[-1] == 4 else z for z in (s, t))
    for conv, norm in zip(convs, norms):
        around, k = F.pad(x, (1, 1, 1, 1)), conv.weight.shape[-1]
        x = sum(
            torch.einsum(
                "dc,nchw->ndhw", conv.weight[:, :, i, j], around[:, :, i + 1 - k // 2 :, j + 1 - k // 2 :][:, :, :2, :2]
            )
            for i in range(k)
            for j in range(k)
        )
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        x = ((x - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]).clamp_min(0)
    expected = 2 * (x - y).square().sum() / y.numel()
    got = method.terms(Outputs(None, (s,)), Outputs(None, (t,)))["simkd"]
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, s), torch.autograd.grad(expected, s, retain_graph=True))
    torch.testing.assert_close(method.predicted, x.mean((2, 3)) @ head.weight.T + head.bias)
    network = method.predictor(nn.Sequential(nn.Identity(), nn.Flatten()), ["0"])
    torch.testing.assert_close(network(s), method.predicted)


def test_simkd_predicts_with_the_classifier_of_the_teacher_and_is_saved_with_it(tmp_path):
    torch.manual_seed(0)
    student, teacher = create_model("resnet8", CLASSES), create_model("resnet14", CLASSES)
    batches = [(torch.randn(16, 3, 16, 16), torch.randint(CLASSES, (16,))) for _ in range(2)]
    loader = DataLoader(TensorDataset(*(torch.cat(x) for x in zip(*batches))), 16)
    task = Distiller(student, create_method("simkd"), teacher)
    ema = EMA(0.5, tmp_path)
    with pytest.warns(UserWarning, match="plain DataLoader"):
        rows = Trainer(task, loader, loader, TrainConfig(epochs=2, lr=0.05), tmp_path, callbacks=[ema]).fit(
            progress=False
        )
    assert all(0 <= row[k] <= 100 for row in rows for k in ("top1", "train_top1", "ema_top1"))
    network = task.network.eval()
    assert isinstance(network, ProjectedNetwork) and network.network is student
    assert torch.equal(network.head.weight, teacher.fc.weight) and network.head is not teacher.fc
    assert evaluate(network, loader).top1 == rows[-1]["top1"]
    assert feature_paths(network).stages[-1] == "network." + feature_paths(student).stages[-1]

    images = batches[0][0]
    with torch.no_grad():
        expected = network(images)
    fresh = ProjectedNetwork(
        create_model("resnet8", CLASSES), network.path, Projector(*network.projector.shapes), nn.Linear(64, CLASSES)
    )
    for file in ("last", "ema"):
        load_weights(fresh, tmp_path / f"{file}.safetensors")
    load_weights(fresh, tmp_path / "last.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(fresh.eval()(images), expected)
    save_student(network, tmp_path, "resnet8", classes=tuple("abcdef"))
    with torch.no_grad():
        torch.testing.assert_close(load_student(tmp_path)(images), expected)


def test_simkd_in_a_sum_and_in_a_wrapper_predicts_too():
    torch.manual_seed(0)
    images = torch.randn(8, 3, 16, 16)
    for name, args in (("at+simkd", None), ("scaled", {"method": "simkd", "factor": 4.0})):
        student, teacher = create_model("resnet8", CLASSES), create_model("resnet14", CLASSES)
        task = Distiller(student, create_method(name, args), teacher)
        task.build(images, torch.arange(8) % CLASSES)
        task(Batch(images, torch.arange(8) % CLASSES, torch.arange(8)))
        assert isinstance(task.network, ProjectedNetwork) and task.network.path == feature_paths(student).stages[-1]
        task.method.eval(), task.network.eval()
        task(Batch(images, torch.arange(8) % CLASSES, torch.arange(8)))
    with Pair(student, teacher, "simkd", images) as pair:
        assert pair.predictor()(images).shape == (8, CLASSES)
    with pytest.raises(ValueError, match=r"linear classifier, with as many inputs as its map has channels \(64\)"):
        create_method("simkd").build(
            *(Outputs(None, (torch.randn(2, 64, 2, 2),)) for _ in range(2)), head=nn.Linear(8, 2)
        )
