"""A search for counterexamples to every inequality of rcka.bounds, and oracles for what it computes.

The search looks where such inequalities break: ill-conditioned, rank one, two samples, many more features than samples,
constant rows, duplicates, huge and tiny scales, pairs that are nearly the same, and pairs near which each bound is
tight. It must find nothing against what is true, and something against a deliberately false variant of each claim."""

import functools
import itertools
import math

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import assume, given, settings

from rcka.similarity.bounds import (
    Bound,
    angle_bound,
    cka_gradient,
    feature_bound,
    feature_chain,
    linear_bound,
    lipschitz,
    procrustes,
    procrustes_bound,
    published_bound,
    random_pairs,
    relation_bound,
    relation_identity,
    transfer_bound,
    unit_features,
)
from rcka.similarity.measures import Gaussian, Linear, Polynomial, cka, gram, mmd2

SLACK = 1e-11  # all quantities are of order one, in float64
BATCH = 40


# ---------------------------------------------------------------- the draws


def normal(g, *shape):
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def uniform(g, *shape):
    return torch.rand(*shape, generator=g, dtype=torch.float64)


def orthonormal(g, b, n, k):
    return torch.linalg.qr(normal(g, b, n, k)).Q


def independent(g, b, n, p, q):
    return normal(g, b, n, p), normal(g, b, n, q) + 3 * uniform(g, b, 1, 1)


def related(g, b, n, p, q):
    "A linear image of the teacher and noise, in any proportion, after a ReLU."
    x = normal(g, b, n, p)
    a = uniform(g, b, 1, 1)
    return (x + uniform(g, b, 1, 1)).relu() + 1e-3, (
        (1 - a) * x @ normal(g, b, p, q) / p**0.5 + a * normal(g, b, n, q)
    ).relu() + 1e-3


def nearly_same(g, b, n, p, q):
    x = normal(g, b, n, p)
    return x, x @ orthonormal(g, b, p, p) + 10 ** (-9 * uniform(g, b, 1, 1)) * normal(g, b, n, p)


def ill_conditioned(g, b, n, p, q):
    column = lambda d: 10 ** (-12 * uniform(g, b, 1, d))
    return normal(g, b, n, p) * column(p), (normal(g, b, n, q) + 1) * column(q)


def rank_one(g, b, n, p, q):
    return normal(g, b, n, 1) * normal(g, b, 1, p), normal(g, b, n, 1) * normal(g, b, 1, q)


def constant_rows(g, b, n, p, q):
    "All samples the same but one or two."
    x, y = normal(g, b, 1, p).repeat(1, n, 1), normal(g, b, 1, q).repeat(1, n, 1)
    x[:, 0], y[:, -1] = x[:, 0] + normal(g, b, p), y[:, -1] + normal(g, b, q)
    y[::2, 0] += 1
    return x, y


def duplicates(g, b, n, p, q):
    "Every sample occurs several times."
    i = torch.randint(max(2, n // 3), (n,), generator=g)
    i[:2] = torch.tensor([0, 1])
    return normal(g, b, n, p)[:, i], normal(g, b, n, q)[:, i]


def scales(g, b, n, p, q):
    power = lambda *s: 10 ** (300 * uniform(g, *s) - 150)
    return normal(g, b, n, p) * power(b, 1, 1), normal(g, b, n, q) * power(b, 1, 1)


def outliers(g, b, n, p, q):
    x, y = normal(g, b, n, p), normal(g, b, n, q)
    return torch.cat([1e4 * x[:, :1], x[:, 1:]], 1), torch.cat([1e4 * y[:, :1], y[:, 1:]], 1)


def integers(g, b, n, p, q):
    "Small integers: ties and lost rank. The first two samples differ, so that there is a direction."
    x, y = (torch.randint(-1, 2, (b, n, d), generator=g).double() for d in (p, q))
    x[:, 0], y[:, 0], x[:, 1], y[:, 1] = 1, 1, -1, 0
    return x, y


def one_cloud_two_means(g, b, n, p, q):
    "The pairs near which the bounds on mean relations are tight."
    cloud = normal(g, b, n, p)
    cloud = unit_features(cloud, batch_dims=1)
    mean = lambda: 10 ** (-2 * uniform(g, b, 1, 1)) * torch.ones(b, n, 1, dtype=torch.float64) / n**0.5
    return torch.cat([cloud, mean()], -1), torch.cat([cloud, mean()], -1)


def shared_and_private(g, b, n, p, q):
    "The pairs for which the bound on features is tight, as far as n has room for them; also with a common mean."
    m = max(1, min(p, q, (n - 1) // 2) // 2)
    c = max(0, min(p, n - 1 - 2 * m))
    if 2 * m > n:
        return independent(g, b, n, p, q)
    basis = orthonormal(g, b, n, c + 2 * m)
    if n > c + 2 * m:
        basis = torch.linalg.qr(basis - basis.mean(1, keepdim=True)).Q
    gap = 10 ** (-4 * uniform(g, b, 1, 1))
    common = basis[..., :c] * (uniform(g, b, 1, c) + 0.1)
    common = unit_features(common, center=False, batch_dims=1) * (1 - gap) ** 0.25 if c else common
    private = basis[..., c:] * (gap / m) ** 0.25
    return torch.cat([common, private[..., :m]], -1), torch.cat([common, private[..., m:]], -1)


FAMILIES = [
    independent,
    related,
    nearly_same,
    ill_conditioned,
    rank_one,
    constant_rows,
    duplicates,
    scales,
    outliers,
    integers,
    one_cloud_two_means,
    shared_and_private,
]
SHAPES = [
    (2, 3, 2),
    (2, 1, 5),
    (3, 1, 1),
    (3, 4, 2),
    (4, 2, 3),
    (5, 5, 5),
    (6, 40, 30),
    (7, 3, 60),
    (8, 2, 2),
    (9, 6, 4),
    (10, 10, 3),
    (12, 4, 8),
]


@functools.lru_cache
def draws():
    "[(family, x, y)]: batches of pairs, all of which have a direction, centred or not."
    found = []
    for i, family in enumerate(FAMILIES):
        for j, (n, p, q) in enumerate(SHAPES):
            for k in range(2):
                x, y = family(torch.Generator().manual_seed(1000 * i + 10 * j + k), BATCH, n, p, q)
                moves = [(t - t[:, :1]).abs().amax((1, 2)) > 0 for t in (x, y)]
                found.append((family.__name__, x[moves[0] & moves[1]], y[moves[0] & moves[1]]))
    assert sum(len(x) for _, x, _ in found) >= 10_000
    return found


@functools.cache
def value(f, i, centred, *args):
    "f on the i-th batch of draws, worked out once for all claims that need it."
    _, x, y = draws()[i]
    return f(x, y, *args, center=centred, batch_dims=1)


def search(claim, centred):
    "The worst violation of lhs <= rhs over all draws, as (how many, by how much, which family)."
    many, worst, where, seen = 0, -math.inf, None, 0
    for i, (family, x, _) in enumerate(draws()):
        lhs, rhs = claim(i, centred)
        assert lhs.shape == rhs.shape == x.shape[:1]
        assert torch.isfinite(lhs).all() and torch.isfinite(rhs).all(), family
        excess = lhs - rhs
        many, seen = many + int((excess > SLACK).sum()), seen + len(lhs)
        if excess.max() > worst:
            worst, where = excess.max().item(), family
    assert seen >= 10_000
    return many, worst, where


# ---------------------------------------------------------------- what is true: functions of (i, centred), for `search`


def holds(f, *args):
    return lambda i, c: value(f, i, c, *args)


def equal(a, b):
    return Bound((a - b).abs(), torch.zeros_like(a))


def step(a, b):
    "Two members of the chain of Theorem 5."
    return lambda i, c: Bound(getattr(value(feature_chain, i, c), a), getattr(value(feature_chain, i, c), b))


def mean_vanishes(i, c):
    x = draws()[i][1]
    xh = unit_features(x, c, 1)
    return Bound((xh @ xh.mT).sum((-2, -1)).abs() / x.shape[1], torch.zeros(len(x), dtype=x.dtype))


def ceiling(i, c, less=0):
    "Theorem 9: CKA of a student of width p is at most the norm of the teacher's p largest eigenvalues."
    _, x, y = draws()[i]
    xh, yh = unit_features(x, c, 1), unit_features(y, c, 1)
    mu = torch.linalg.eigvalsh(yh @ yh.mT).flip(-1)[:, : x.shape[-1] - less]
    return Bound(cka(xh, yh, center=c, batch_dims=1), mu.square().sum(-1).sqrt())


def mmd_without_rotation(i, c):
    _, x, y = draws()[i]
    xh, yh = (unit_features(t, c, 1) * t.shape[1] ** 0.5 for t in (x, y))
    d = max(xh.shape[-1], yh.shape[-1])
    xh, yh = (torch.nn.functional.pad(t, (0, d - t.shape[-1])) for t in (xh, yh))
    return Bound(mmd2(xh, yh, Gaussian(1.0), batch_dims=1), feature(i, c).rhs)


def published(power):
    def claim(i, c):
        t = value(published_bound, i, c, draws()[i][1].shape[1] ** power)
        return equal(t.middle, t.cka)

    return claim


def changed(claim, lhs=lambda b, gap, chain: b.lhs, rhs=lambda b, gap, chain: b.rhs):
    "A variant of a claim: either side made anew from the bound, 1 - CKA and the chain."

    def variant(i, c):
        b, gap, chain = claim(i, c), value(relation_identity, i, c).rhs, value(feature_chain, i, c)
        return Bound(lhs(b, gap, chain), rhs(b, gap, chain))

    return variant


linear, angle, distance = holds(linear_bound), holds(angle_bound), holds(procrustes_bound)
wide, unit, fine = (holds(relation_bound, Gaussian(s)) for s in (100.0, 1.0, 0.3))
feature, feature_fine = (holds(feature_bound, Gaussian(s)) for s in (1.0, 0.1))

TRUE = {
    "Theorem 1, identity": lambda i, c: equal(*value(relation_identity, i, c)),
    "Theorem 1, linear bound": linear,
    "Theorem 2, angle bound": angle,
    "Theorem 2, linear below angle": lambda i, c: Bound(linear(i, c).lhs, angle(i, c).lhs),
    "Theorem 4, linear": holds(relation_bound, Linear()),
    "Theorem 4, Gaussian 100": wide,
    "Theorem 4, Gaussian 1": unit,
    "Theorem 4, Gaussian 0.3": fine,
    "Theorem 5, b": step("procrustes", "roots"),
    "Theorem 5, c": step("roots", "nuclear"),
    "Theorem 5, d": step("nuclear", "frobenius"),
    "Theorem 5, ends": distance,
    "Theorem 6, linear": holds(feature_bound, Linear()),
    "Theorem 6, Gaussian 1": feature,
    "Theorem 6, Gaussian 0.1": feature_fine,
    "Theorem 6, first step": lambda i, c: Bound(feature(i, c).lhs, value(feature_chain, i, c).procrustes),
    "Theorem 9, ceiling": ceiling,
}

FALSE = {  # a claim, and whether it is false when centred, too
    "Theorem 1, the published constants with N = n": (published(1), True),
    "Theorem 1, the published constants with N = n^2": (published(2), True),
    "Theorem 1, right-hand side 2 % smaller": (changed(linear, rhs=lambda b, gap, chain: 0.98 * b.rhs), False),
    "Theorem 1, without the one half": (changed(linear, lhs=lambda b, gap, chain: 2 * b.lhs), False),
    "Theorem 2, 1 % smaller": (changed(angle, rhs=lambda b, gap, chain: 0.99 * b.rhs), False),
    "Theorem 2, linear above angle": (lambda i, c: Bound(angle(i, c).lhs, linear(i, c).lhs), False),
    "Theorem 3, without centring": (lambda i, c: mean_vanishes(i, False), True),
    "Theorem 4, 2 % smaller, wide kernel": (
        changed(wide, lhs=lambda b, gap, chain: 1e4 * b.lhs, rhs=lambda b, gap, chain: 0.98e4 * b.rhs),
        False,
    ),
    "Theorem 4, without the Lipschitz constant": (changed(fine, rhs=lambda b, gap, chain: 2 * gap), True),
    "Theorem 5, b the other way": (step("roots", "procrustes"), True),
    "Theorem 5, c the other way": (step("nuclear", "roots"), True),
    "Theorem 5, d the other way": (step("frobenius", "nuclear"), True),
    "Theorem 5, without the rank": (changed(distance, rhs=lambda b, gap, chain: (2 * gap).sqrt()), True),
    "Theorem 5, 1 % smaller": (changed(distance, rhs=lambda b, gap, chain: 0.99 * b.rhs), True),
    "Theorem 5, linear in 1 - CKA": (changed(distance, rhs=lambda b, gap, chain: 2 * chain.rank * gap), True),
    "Theorem 6, without the rotation": (mmd_without_rotation, True),
    "Theorem 6, without L": (changed(feature_fine, rhs=lambda b, gap, chain: chain.frobenius), True),
    "Theorem 6, linear in 1 - CKA": (changed(feature, rhs=lambda b, gap, chain: 2 * chain.rank * gap), True),
    "Theorem 9, one component less": (functools.partial(ceiling, less=1), True),
}


@pytest.mark.parametrize("centred", [False, True], ids=["uncentred", "centred"])
@pytest.mark.parametrize("name", TRUE)
def test_no_counterexample(name, centred):
    many, worst, where = search(TRUE[name], centred)
    assert many == 0, f"{name}: {many} violations, the worst by {worst:.1e} among {where}"


def test_no_counterexample_to_the_mean_of_centred_relations():
    many, worst, where = search(mean_vanishes, True)
    assert many == 0, f"{many} violations, the worst by {worst:.1e} among {where}"


@pytest.mark.parametrize("name", FALSE)
def test_the_search_finds_what_is_false(name):
    claim, when_centred = FALSE[name]
    for centred in [False, True] if when_centred else [False]:
        many, worst, _ = search(claim, centred)
        assert many > 0, f"{name}: not found (centred: {centred}); the nearest misses by {worst:.1e}"


small = hnp.arrays(np.float64, st.tuples(st.integers(2, 5), st.integers(1, 4)), elements=st.integers(-3, 3).map(float))


@given(small, small, st.booleans())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_hypothesis_finds_no_counterexample_among_small_integers(x, y, centred):
    n = min(len(x), len(y))
    x, y = torch.tensor(x[:n]), torch.tensor(y[:n])
    for t in (x, y):
        assume((t - t[:1] if centred else t).abs().max() > 0)
    for claim in (linear_bound, angle_bound, relation_bound, procrustes_bound, feature_bound):
        b = claim(x, y, center=centred)
        assert b.lhs <= b.rhs + SLACK
    chain = feature_chain(x, y, centred)
    assert (
        chain.procrustes <= chain.roots + SLACK
        and chain.roots <= chain.nuclear + SLACK
        and chain.nuclear <= chain.frobenius + SLACK
    )


# ---------------------------------------------------------------- oracles


def pair(seed, n=9, p=12, q=12):
    g = torch.Generator().manual_seed(seed)
    return normal(g, n, p) + 0.5, normal(g, n, q)


@pytest.mark.parametrize("shape", [(9, 12, 12), (9, 4, 4), (9, 3, 6), (9, 30, 12), (2, 3, 3)])
def test_procrustes_agrees_with_scipy(shape):
    for seed in range(20):
        x, y = pair(seed, *shape)
        found = procrustes(x, y)
        d = max(shape[1:])
        px, py = (np.pad(t.numpy(), ((0, 0), (0, d - t.shape[1]))) for t in (x, y))
        r, nuclear = scipy.linalg.orthogonal_procrustes(py, px)
        assert torch.allclose(found.matrix @ found.matrix.T, torch.eye(d, dtype=torch.float64), atol=1e-12)
        np.testing.assert_allclose(found.distance, ((px - py @ r) ** 2).sum(), rtol=1e-10)
        np.testing.assert_allclose(found.distance, (px**2).sum() + (py**2).sum() - 2 * nuclear, rtol=1e-10)
        if d <= shape[0]:
            np.testing.assert_allclose(found.matrix, r, atol=1e-10)  # the solution is unique


@pytest.mark.parametrize("centred", [False, True])
def test_the_chain_agrees_with_scipy(centred):
    for seed in range(20):
        x, y = pair(seed, 9, 12, 14)
        xh, yh = (unit_features(t, centred).numpy() for t in (x, y))
        k, l = xh @ xh.T, yh @ yh.T
        if centred:  # sqrtm wants full rank: leave the constant direction out, where both are zero
            basis = scipy.linalg.null_space(np.ones((1, 9)))
            k, l = basis.T @ k @ basis, basis.T @ l @ basis
        chain = feature_chain(x, y, centred)
        root, other = scipy.linalg.sqrtm(k).real, scipy.linalg.sqrtm(l).real
        bures = k.trace() + l.trace() - 2 * scipy.linalg.sqrtm(root @ l @ root).real.trace()
        np.testing.assert_allclose(chain.procrustes, bures, atol=1e-10)
        np.testing.assert_allclose(chain.roots, ((root - other) ** 2).sum(), atol=1e-10)
        np.testing.assert_allclose(chain.nuclear, np.linalg.norm(k - l, "nuc"), atol=1e-10)
        assert chain.rank == np.linalg.matrix_rank(k - l) == 9 - centred
        np.testing.assert_allclose(chain.frobenius, chain.rank.sqrt().item() * np.linalg.norm(k - l), atol=1e-10)


def test_rank_of_the_difference():
    x, y = pair(0, 16, 3, 2)
    assert feature_chain(x, y).rank == 5 and feature_chain(x, y, center=False).rank == 5
    assert feature_chain(x, torch.cat([x[:, :2], y], 1)).rank <= 5


@pytest.mark.parametrize("kernel", [Linear(), Gaussian(0.3), Gaussian(5.0)])
def test_left_hand_sides_are_the_mmd_of_similarity(kernel):
    x, y = pair(0, 7, 3, 5)
    for c in [False, True]:
        xh, yh = unit_features(x, c), unit_features(y, c)
        relations = [(7 * t @ t.T).reshape(-1, 1) for t in (xh, yh)]
        assert torch.allclose(relation_bound(x, y, kernel, c).lhs, mmd2(*relations, kernel), atol=1e-12)
        rotated = yh @ procrustes(xh, yh).matrix
        expected = mmd2(7**0.5 * torch.nn.functional.pad(xh, (0, 2)), 7**0.5 * rotated, kernel)
        assert torch.allclose(feature_bound(x, y, kernel, c).lhs, expected, atol=1e-12)


def test_relation_mmd_in_pieces():
    from rcka.similarity.bounds import _relation_mmd2

    x, y = pair(0, 8, 3, 5)
    k, l = gram(x), gram(y)
    for batch in [(k, l), (torch.stack([k, l]), torch.stack([l, l]))]:
        whole = _relation_mmd2(*batch, Gaussian(2.0))
        assert torch.allclose(_relation_mmd2(*batch, Gaussian(2.0), room=1), whole, atol=1e-14)
        assert torch.allclose(_relation_mmd2(*batch, Gaussian(2.0), room=500), whole, atol=1e-14)


@pytest.mark.parametrize("centred", [False, True])
def test_gradient_agrees_with_autograd_on_all_draws(centred):
    found_false = 0
    for family, x, y in draws():
        xh, yh = unit_features(x, False, 1), unit_features(y, False, 1)  # scales autograd of cka can hold in x^2
        leaf = xh.clone().requires_grad_()
        cka(leaf, yh, center=centred, batch_dims=1).sum().backward()
        grad = cka_gradient(xh, yh, centred, 1)
        size = unit_features(x, centred, 1).norm(dim=(-2, -1)) / (
            xh - xh.mean(1, keepdim=True) if centred else xh
        ).norm(dim=(-2, -1))
        assert ((grad - leaf.grad).norm(dim=(-2, -1)) <= 1e-10 * size.clamp_min(1)).all(), family
        assert ((grad * xh).sum((-2, -1)).abs() <= 1e-10).all(), family
        pull = yh @ (yh.mT @ xh)  # without the second term it is not the gradient
        found_false += int(((2 * pull - leaf.grad).norm(dim=(-2, -1)) > 1e-3).sum())
    assert found_false > 1000


def test_gradient_follows_the_scale():
    x, y = pair(1)
    for s in [1e-120, 1e-3, 1e120]:
        assert torch.allclose(cka_gradient(s * x, y) * s, cka_gradient(x, y), rtol=1e-10)
        assert torch.allclose(cka_gradient(x, s * y), cka_gradient(x, y), rtol=1e-10)


# ---------------------------------------------------------------- how tight: Theorem 7, rank by rank


def centred_basis(n, k, seed=0):
    "k orthonormal vectors, all orthogonal to 1."
    basis = normal(torch.Generator().manual_seed(seed), n, k)
    return torch.linalg.qr(basis - basis.mean(0)).Q


def private_directions(alignment, m1, m2, n=16):
    "Two shared directions, and m1 and m2 private ones of equal strength on either side."
    b = centred_basis(n, 2 + m1 + m2)
    common = b[:, :2] * torch.tensor([0.8, 0.6], dtype=b.dtype).sqrt() * alignment**0.25
    own = [((1 - alignment) / m) ** 0.25 * v for m, v in zip((m1, m2), b[:, 2:].split([m1, m2], 1))]
    return torch.cat([common, own[0]], 1), torch.cat([common, own[1]], 1)


def part_reached(pair, centred=True):
    chain = feature_chain(*pair, centred)
    return chain.rank.item(), (chain.procrustes / chain.frobenius).item()


@pytest.mark.parametrize("alignment", [0.0, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("r", range(2, 10))
def test_theorem_7_equal_private_directions(r, alignment):
    pair = private_directions(alignment, r // 2, r - r // 2)
    rank, part = part_reached(pair)
    expected = 1.0 if r % 2 == 0 else math.sqrt((1 + math.sqrt(1 - 1 / r**2)) / 2)
    assert rank == r and abs(part - expected) < 1e-9
    assert abs(cka(*pair) - alignment) < 1e-12


@pytest.mark.parametrize("r", [3, 5, 7])
@pytest.mark.parametrize("ratio", [0.5, 1.0, 10.0, 100.0, 1000.0])
def test_theorem_7_odd_rank_tends_to_the_bound(r, ratio):
    m = (r - 1) // 2
    a, b, e = centred_basis(16, r + 1).split([m + 1, m, 1], 1)
    v = 0.5**0.5 * b[:, :1] + (ratio - 0.5) ** 0.5 * e
    pair = torch.cat([v, a], 1), torch.cat([v, b], 1)
    rank, part = part_reached(pair)
    assert rank == r
    assert abs(part - (1 - 2 * (math.sqrt(ratio**2 + 0.5) - ratio) / r)) < 1e-7
    assert 1 - 1 / (2 * r * ratio) - 1e-7 <= part < 1
    assert abs(1 - cka(*pair) - r / (2 * (ratio**2 + m + 1))) < 1e-9


def test_theorem_7_no_pair_of_unit_gram_matrices_differs_by_rank_one():
    g = torch.Generator().manual_seed(0)
    for _ in range(200):
        x, u = normal(g, 8, 3), normal(g, 8, 1)
        k, other = (t @ t.mT for t in (x, torch.cat([x, u], 1)))
        assert other.norm() > k.norm()  # a rank-one difference of one sign changes the norm
    ranks = torch.cat([feature_chain(x, y, c, 1).rank for _, x, y in draws()[::7] for c in (False, True)])
    gaps = torch.cat([relation_identity(x, y, c, 1).rhs for _, x, y in draws()[::7] for c in (False, True)])
    assert (ranks[gaps > 1e-6] >= 2).all()


def test_theorem_7_at_zero_alignment_the_odd_constant_is_the_largest():
    g = torch.Generator().manual_seed(0)
    for r in (3, 5):
        best = math.sqrt((1 + math.sqrt(1 - 1 / r**2)) / 2)
        for m in range(1, r):
            b = centred_basis(12, r, seed=m)
            for _ in range(50):
                x, y = (t * uniform(g, 1, t.shape[1]) for t in b.split([m, r - m], 1))
                rank, part = part_reached((x, y))
                assert rank == r and part <= best + 1e-9


# ---------------------------------------------------------------- where the gradient vanishes: Theorem 9


def components(mu, basis, kept, p):
    return torch.nn.functional.pad(basis[:, kept] * mu[kept].sqrt(), (0, p - len(kept)))


@pytest.mark.parametrize("p", [3, 5])
def test_theorem_9_stationary_points_and_the_way_up(p):
    mu = torch.tensor([1.0, 0.8, 0.6, 0.5], dtype=torch.float64)
    mu, basis = mu / mu.norm(), centred_basis(9, 4)
    teacher = basis * mu.sqrt()
    for size in range(1, min(p, 4) + 1):
        for kept in map(list, itertools.combinations(range(4), size)):
            student = components(mu, basis, kept, p)
            f = cka(student, teacher)
            assert cka_gradient(student, teacher).abs().max() < 1e-12
            assert abs(f - mu[kept].norm()) < 1e-12
            out = [i for i in range(4) if i not in kept]
            if not out:
                continue
            unit, v = unit_features(student), basis[:, out[:1]]
            w = torch.linalg.svd(unit).Vh[-1:]
            curve = mu[out[0]] - f * (unit @ w.mT).square().sum()
            measured = (cka(unit + 1e-3 * v @ w, teacher) - f) / 1e-6
            assert abs(measured - curve) < 1e-4
            largest = kept == list(range(min(p, 4)))
            assert (curve > 0) != largest


@pytest.mark.parametrize("rank", [1, 3])
def test_theorem_9_every_direction_leads_up_where_the_two_share_nothing(rank):
    "Width 3: at rank 3 no w has X w = 0, and the way leads up all the same."
    g = torch.Generator().manual_seed(0)
    basis = centred_basis(9, 7)
    teacher = basis[:, :4] * torch.tensor([1.0, 0.8, 0.6, 0.5], dtype=torch.float64)
    student = torch.nn.functional.pad(basis[:, 4 : 4 + rank], (0, 3 - rank)) @ orthonormal(g, 1, 3, 3)[0]
    assert cka(student, teacher) < 1e-25 and cka_gradient(student, teacher).abs().max() < 1e-12
    th, xh = unit_features(teacher), unit_features(student)
    for i in range(4):
        for _ in range(10):
            w = orthonormal(g, 1, 3, 1)[0].mT
            up = cka(xh + 1e-3 * basis[:, i : i + 1] @ w, teacher) / 1e-6
            assert abs(up - basis[:, i] @ th @ th.mT @ basis[:, i]) < 1e-3


def test_random_pairs_cover_all_values():
    x, y = random_pairs(500, n=12, p=6, q=4, seed=3)
    assert x.shape == (500, 12, 6) and y.shape == (500, 12, 4) and x.dtype == torch.float64
    values = cka(x, y, center=False, batch_dims=1)
    assert values.min() < 0.3 and values.max() > 0.99
    with pytest.raises(ValueError, match="at most p = 6"):
        random_pairs(2, p=6, q=7)


def test_the_trigonometry_of_theorem_2():
    sympy = pytest.importorskip("sympy")
    s, t = sympy.symbols("s t", real=True)
    gap = (sympy.cos(s) - sympy.cos(t)) ** 2 / 2 - sympy.sin((s + t) / 2) ** 2 * (1 - sympy.cos(s - t))
    assert sympy.simplify(sympy.expand(gap.rewrite(sympy.exp))) == 0


# ---------------------------------------------------------------- the teacher's head on the student


def heads(seed, n=60, p=7, q=5, classes=4):
    g = torch.Generator().manual_seed(seed)
    x = normal(g, n, p) * torch.linspace(0.2, 2, p, dtype=torch.float64) + 1
    y = x @ normal(g, p, q) * 10.0 ** -(seed % 3) + 0.3 * normal(g, n, q) * (seed % 4)
    weight, bias = normal(g, classes, p), normal(g, classes)
    target = (x @ weight.T + bias + normal(g, n, classes)).argmax(1)  # some the teacher gets wrong
    return x, y, weight, bias, target


def wrong(logits, target):
    "The share that is wrong, a tie counted as wrong."
    others = logits.scatter(1, target[:, None], -torch.inf).amax(1)
    return (logits.gather(1, target[:, None])[:, 0] <= others).double().mean()


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("width", [5, 7, 9])
def test_transfer_bound_against_scipy_and_in_order(seed, width):
    x, y, weight, bias, target = heads(seed, q=width)
    rotated, fitted = (transfer_bound(x, y, weight, bias, target, fitted=f) for f in (False, True))
    for found in (rotated, fitted):
        assert all(0 <= a <= b <= 1 for a, b in itertools.pairwise(found))
    z = (x @ weight.T + bias).numpy()
    inputs = np.column_stack([y.numpy(), np.ones(len(y))])
    fit = inputs @ scipy.linalg.lstsq(inputs, z - z.mean(1, keepdims=True))[0]
    assert fitted.wrong == wrong(torch.from_numpy(fit), target)
    xc, yc = (np.pad(t - t.mean(0), ((0, 0), (0, 9 - t.shape[1]))) for t in (x.numpy(), y.numpy()))
    scale = (np.linalg.norm(xc @ xc.T) / np.linalg.norm(yc @ yc.T)) ** 0.5
    turned = scale * yc @ scipy.linalg.orthogonal_procrustes(yc, xc)[0]
    moved = turned[:, :7] @ weight.numpy().T + (x.mean(0) @ weight.T + bias).numpy()
    assert rotated.wrong == wrong(torch.from_numpy(moved), target)


def test_transfer_bound_of_a_rotated_copy_leaves_the_errors_of_the_teacher():
    x, _, weight, bias, target = heads(3)
    turn = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    teacher = wrong(x @ weight.T + bias, target)
    for fitted in (False, True):
        found = transfer_bound(x, 3 * x @ turn + 5, weight, bias, target, fitted)
        assert 0 < teacher == found.wrong == found.logits
    noise = torch.randn(60, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert transfer_bound(x, noise, weight, bias, target).cka == 1


def test_the_lemma_of_the_budget_against_brute_force():
    x, y, weight, bias, target = heads(7, n=9)
    found = transfer_bound(x, y, weight, bias, target)
    margins = x @ weight.T + bias
    margins = (
        margins.gather(1, target[:, None]) - margins.scatter(1, target[:, None], -torch.inf).amax(1, True)
    ).clamp_min(0)
    xh, yh = unit_features(x), unit_features(y)
    size = gram(x - x.mean(0)).norm()
    moved = torch.nn.functional.pad(yh, (0, 2)) @ procrustes(xh, yh).matrix
    budget = size * ((xh - moved) @ (weight - weight.mean(0)).T).square().sum()
    most = max(
        len(s)
        for k in range(10)
        for s in itertools.combinations(margins[:, 0], k)
        if sum(m**2 for m in s) <= 2 * budget
    )
    assert found.logits.item() == pytest.approx(most / 9)


def test_transfer_bound_names_what_does_not_fit():
    x, y, weight, bias, target = heads(0)
    with pytest.raises(ValueError, match=r"weight must be \(classes, 7\)"):
        transfer_bound(x, y, weight[:, :5], bias, target)
    with pytest.raises(ValueError, match="y has a zero centred Gram matrix"):
        transfer_bound(x, torch.ones_like(y), weight, bias, target)


# ---------------------------------------------------------------- edges

EVERY = [
    relation_identity,
    linear_bound,
    angle_bound,
    relation_bound,
    procrustes_bound,
    feature_bound,
    feature_chain,
    published_bound,
]


@pytest.mark.parametrize("f", EVERY)
def test_batches_shapes_and_types(f):
    g = torch.Generator().manual_seed(0)
    x, y = normal(g, 2, 3, 6, 4, 2), normal(g, 2, 3, 6, 5)
    barrier = f(x, y, batch_dims=2)
    assert type(barrier).__name__ in ("Bound", "FeatureChain", "Published")
    for i in range(2):
        for j in range(3):
            for a, b in zip(barrier, f(x[i, j], y[i, j])):
                assert torch.allclose(a[i, j], b, atol=1e-12)
    for dtype in (torch.float32, torch.bfloat16):  # features as they come: what is computed is still float64
        low = f(x.to(dtype), y.to(dtype), batch_dims=2)
        assert low[0].dtype == torch.float64 and torch.allclose(
            low[0], f(x.to(dtype).double(), y.to(dtype).double(), batch_dims=2)[0]
        )


@pytest.mark.parametrize("f", EVERY)
def test_features_without_a_direction_are_an_error(f):
    x, y = pair(0)
    with pytest.raises(ValueError, match="x has a zero centred Gram matrix.*same for every sample"):
        f(torch.full((9, 3), 0.1, dtype=torch.float64), y)
    with pytest.raises(ValueError, match="y has a zero Gram matrix.*all zero"):
        f(x, torch.zeros_like(y), center=False)
    with pytest.raises(ValueError, match="y has NaN or infinite features"):
        f(x, y.clone().fill_(math.nan))
    with pytest.raises(ValueError, match="x has NaN or infinite features"):
        f(x / 0, y)
    with pytest.raises(ValueError, match="same samples"):
        f(x, y[:5])
    with pytest.raises(ValueError, match="at least 2"):
        f(x[:1], y[:1])
    with pytest.raises(TypeError, match="real floating point"):
        f(x.long(), y)
    for value in f(x[:1], y[:1], center=False)[:2]:
        assert torch.isfinite(value).all()  # one sample has an uncentred direction


def test_gradient_of_constant_features_is_zero():
    x, y = pair(0)
    for a, b in [(torch.full((9, 3), 0.1, dtype=torch.float64), y), (x, torch.full((9, 3), 0.1, dtype=torch.float64))]:
        assert (cka_gradient(a, b) == 0).all()
    assert (cka_gradient(torch.zeros(9, 3, dtype=torch.float64), y, center=False) == 0).all()
    assert cka_gradient(x.half().reshape(9, 3, 4), y.half()).dtype == torch.float16
    with pytest.raises(ValueError, match="NaN"):
        cka_gradient(x / 0, y)


def test_kernels_need_a_lipschitz_constant():
    class Laplace:  # not Lipschitz, but whoever claims a constant answers for it
        def __call__(self, x, y=None):
            return torch.exp(-torch.cdist(x, x if y is None else y))

    x, y = pair(0)
    assert lipschitz("linear") == lipschitz(Linear()) == 1 and lipschitz(Gaussian(0.25)) == 4
    for f in (relation_bound, feature_bound):
        with pytest.raises(ValueError, match="a fixed bandwidth"):
            f(x, y, "gaussian")
        with pytest.raises(ValueError, match="no known Lipschitz constant"):
            f(x, y, Polynomial())
        with pytest.raises(ValueError, match="no known Lipschitz constant"):
            f(x, y, Laplace())

    class Mean(Linear):
        lipschitz = 1.0

    assert lipschitz(Mean()) == 1


def test_the_gaussian_constant_is_the_least():
    for d in (1, 7):
        for s in (0.2, 3.0):
            a = (
                torch.randn(500, d, dtype=torch.float64, generator=torch.Generator().manual_seed(d))
                * 10 ** torch.linspace(-5, 1, 500, dtype=torch.float64)[:, None]
            )
            moved = (-2 * torch.expm1(-a.square().sum(-1) / (2 * s**2))).sqrt() / a.norm(
                dim=-1
            )  # |phi(a) - phi(0)| / |a|
            assert (moved <= lipschitz(Gaussian(s)) * (1 + 1e-12)).all()
            assert moved.max() > 0.999999 * lipschitz(Gaussian(s))


def test_wide_feature_maps_cost_no_more_than_their_gram_matrix():
    g = torch.Generator().manual_seed(0)
    x, y = normal(g, 32, 20_000), normal(g, 32, 64, 8, 8)
    b = feature_bound(x, y)
    assert b.lhs <= b.rhs and relation_bound(x, y).lhs <= relation_bound(x, y).rhs
