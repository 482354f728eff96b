"""Streaming accumulators: any split, any order, any merge gives the number that the whole set (or the formula, naively)
gives."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rcka.similarity.measures import Gaussian, cka, hsic
from rcka.similarity.streaming import MinibatchCKA, StreamingCKA, batch_cka, chance_cka, effective_width

settings.register_profile("rcka", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("rcka")

widths = st.lists(st.integers(1, 30), min_size=1, max_size=4)


def make(seed, n, wa, wb, mean=0.0, scale=1.0):
    "Two lists of features of n samples that share causes, with unequal means and scales."
    g = torch.Generator().manual_seed(seed)
    rand = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)
    z = rand(n, 5)
    return [[(z @ rand(5, p) + rand(n, p) + mean * rand(p)) * scale for p in ws] for ws in (wa, wb)]


@st.composite
def problems(draw, least=4):
    n = draw(st.integers(least, 40))
    a, b = make(
        draw(st.integers(0, 2**31)),
        n,
        draw(widths),
        draw(widths),
        draw(st.sampled_from([0, 1, 1e3])),
        draw(st.sampled_from([1e-8, 1, 1e8])),
    )
    return n, a, b


def cuts(draw, n, least=1):
    "A random ordered split of n samples into batches of at least `least`."
    sizes = []
    while n:
        sizes.append(n if n < 2 * least else draw(st.integers(least, n - least) | st.just(n)))
        n -= sizes[-1]
    return sizes


@given(problems(), st.data())
def test_streaming_is_the_whole_set_for_any_split_and_order(problem, data):
    n, a, b = problem
    order = torch.tensor(data.draw(st.permutations(range(n))))
    acc = StreamingCKA()
    for i in order.split(cuts(data.draw, n)):
        acc.update([x[i] for x in a], [y[i] for y in b])
    assert acc.samples == n
    for unbiased in (False, True):
        whole = torch.stack([torch.stack([cka(x, y, unbiased=unbiased) for y in b]) for x in a])
        torch.testing.assert_close(acc.compute(unbiased), whole, rtol=0, atol=1e-8)


@given(problems(), st.data())
def test_streaming_merges_in_any_shape(problem, data):
    n, a, b = problem
    parts = []
    for i in torch.arange(n).split(cuts(data.draw, n)):
        parts.append(pickle.loads(pickle.dumps(StreamingCKA().update([x[i] for x in a], [y[i] for y in b]))))
    whole = StreamingCKA().update(a, b).compute(True)
    forwards, backwards = sum(parts, start=StreamingCKA()), sum(parts[::-1], start=StreamingCKA())
    while len(parts) > 1:  # a tree of merges
        j = data.draw(st.integers(0, len(parts) - 2))
        parts[j : j + 2] = [parts[j] + parts[j + 1]]
    for acc in (forwards, backwards, parts[0]):
        torch.testing.assert_close(acc.compute(True), whole, rtol=0, atol=1e-8)


@given(problems(), st.data(), st.sampled_from(["linear", "gaussian", Gaussian(2.0), "polynomial"]), st.booleans())
def test_minibatch_is_the_sum_over_batches_in_any_order_and_merge(problem, data, kernel, unbiased):
    n, a, b = problem
    if kernel != "linear":  # far apart, all samples are equally unlike for a Gaussian kernel, and CKA is 0 / 0
        a, b = ([t / t.abs().max() for t in s] for s in (a, b))
    batches = [([x[i] for x in a], [y[i] for y in b]) for i in torch.arange(n).split(cuts(data.draw, n, 4))]
    accs = [MinibatchCKA(kernel, unbiased).update(*batch) for batch in batches]
    straight = MinibatchCKA(kernel, unbiased)
    for batch in batches:
        straight.update(*batch)
    shuffled = MinibatchCKA(kernel, unbiased)
    for j in data.draw(st.permutations(range(len(batches)))):
        shuffled.merge(pickle.loads(pickle.dumps(accs[j])))
    torch.testing.assert_close(shuffled.compute(), straight.compute(), rtol=0, atol=1e-10)
    assert straight.samples == shuffled.samples == n and accs[0].samples == len(batches[0][0][0])
    if len(batches) == 1:
        whole = torch.stack([torch.stack([cka(x, y, kernel, unbiased=unbiased) for y in b]) for x in a])
        torch.testing.assert_close(straight.compute(), whole, rtol=0, atol=1e-8)


def test_minibatch_weighs_batches_by_their_samples():
    (a,), (b,) = make(0, 21, [6], [9])
    acc, sums = MinibatchCKA(), torch.zeros(3, dtype=torch.float64)
    for i in torch.arange(21).split([5, 12, 4]):
        K, L = a[i] @ a[i].T, b[i] @ b[i].T
        sums += len(i) * torch.stack([hsic(K, L, True), hsic(K, K, True), hsic(L, L, True)])
        acc.update(a[i], b[i])
    torch.testing.assert_close(acc.compute()[0, 0], sums[0] / (sums[1] * sums[2]).sqrt(), rtol=0, atol=1e-12)


@pytest.mark.slow
def test_minibatch_converges_to_the_population_whatever_the_batch_size():
    "Sigma_xy = M'N, known: the estimate does not depend on the batch size, the biased one does."
    g = torch.Generator().manual_seed(0)
    m, w = torch.randn(4, 6, generator=g), torch.randn(4, 5, generator=g)
    truth = (m.T @ w).norm() ** 2 / ((m.T @ m + torch.eye(6)).norm() * (w.T @ w + torch.eye(5)).norm())
    for n in (4, 8, 32):
        acc = MinibatchCKA()
        for _ in range(8000 // n):
            z = torch.randn(n, 4, generator=g)
            acc.update(z @ m + torch.randn(n, 6, generator=g), z @ w + torch.randn(n, 5, generator=g))
        assert abs(acc.compute().item() - truth) < 0.03


@pytest.mark.parametrize("mean", [0, 1e2, 1e4])
@pytest.mark.parametrize("make_acc", [MinibatchCKA, lambda: MinibatchCKA("gaussian"), StreamingCKA])
def test_float32_with_large_means_is_right_to_three_digits(mean, make_acc):
    a, b = make(1, 96, [50, 400], [30, 8], mean)
    a, b = ([t.float() for t in s] for s in (a, b))  # the reference sees the rounded values, too
    single, double = make_acc(), make_acc()
    for i in torch.arange(96).split(32):
        single.update([x[i] for x in a], [y[i] for y in b])
        double.update([x[i].double() for x in a], [y[i].double() for y in b])
    assert single.compute().dtype == torch.float64
    torch.testing.assert_close(single.compute(), double.compute(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("acc", [MinibatchCKA, StreamingCKA])
def test_itself_gives_ones_and_a_constant_layer_zero(acc):
    a, _ = make(2, 20, [3, 30], [1])
    table = acc().update(a).update([x + 1 for x in a]).compute()
    assert table.shape == (2, 2)
    torch.testing.assert_close(table.diag(), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-10)
    flat = [torch.full((20, 4), 0.3, dtype=torch.float64)]
    table = acc().update(flat + a, a).update(flat + a, a).compute()
    assert (table[0] == 0).all() and table.isfinite().all()


@pytest.mark.parametrize("kernel", ["linear", "polynomial", "gaussian"])
def test_what_rounding_leaves_of_a_constant_layer_is_zero(kernel):
    "U-centring subtracts equal numbers of some size: what is left has a direction, but no meaning."
    flat, other = torch.full((16, 5), 0.1), make(3, 16, [7], [1])[0][0].float()
    table = MinibatchCKA(kernel).update([flat, other]).compute()
    assert (table[0] == 0).all() and table[1, 0] == 0 and abs(table[1, 1] - 1) < 1e-6


def test_errors_of_the_accumulators_and_tiny_or_huge_features():
    torch.manual_seed(0)
    flat, x, y = torch.full((8, 5), 0.1), torch.randn(8, 3), torch.randn(8, 4)
    bad = x.clone()
    bad[2, 1] = float("nan")
    assert MinibatchCKA().update([flat, x], y).compute()[0, 0] == 0
    for message, wrong in {
        r"layer\(s\) \[1\] of a": lambda: MinibatchCKA().update([flat, bad], flat).compute(),
        "needs at least 4": lambda: MinibatchCKA().update(flat[:3], flat[:3]),
        "update": lambda: MinibatchCKA().compute(),
        "same samples": lambda: MinibatchCKA().update(flat, flat[:4]),
        r"a\[1\] has 4": lambda: MinibatchCKA().update([flat, flat[:4]], flat),
        "earlier batches": lambda: MinibatchCKA().update(flat, flat).update([flat, flat], flat),
        "same type": lambda: MinibatchCKA() + MinibatchCKA("gaussian"),
        r"got 0 sample\(s\)": lambda: StreamingCKA().compute(),
        "at least 4": lambda: StreamingCKA().update(x[:3], y[:3]).compute(unbiased=True),
        "keep their widths": lambda: StreamingCKA().update(x, y).update(y, x),
        "not finite": lambda: StreamingCKA().update(x * float("inf"), y).compute(),
    }.items():
        with pytest.raises((ValueError, RuntimeError, TypeError), match=message):
            wrong()
    x, y = x.double(), y.double()
    for scale in [1e-20, 1e15]:
        value = MinibatchCKA().update(x * scale, y).compute()
        torch.testing.assert_close(value, cka(x, y, unbiased=True).view(1, 1), rtol=1e-8, atol=1e-8)
    parts = [MinibatchCKA().update(x, y), MinibatchCKA().update(y, x)]
    sum(parts, start=MinibatchCKA())
    assert parts[0].samples == 8  # `+` leaves its operands alone


def test_half_precision_autocast_and_mixed_dtypes():
    a, b = make(3, 16, [12], [7])
    a, b = a[0].half(), b[0].half()
    want = cka(a.double(), b.double(), unbiased=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = MinibatchCKA().update(a, b).compute()
    torch.testing.assert_close(got[0, 0], want, rtol=0, atol=1e-5)
    torch.testing.assert_close(MinibatchCKA().update(a, b.double()).compute()[0, 0], want, rtol=0, atol=1e-5)
    torch.testing.assert_close(StreamingCKA().update(a, b).compute(True)[0, 0], want, rtol=0, atol=1e-10)


def test_does_not_touch_or_keep_the_features():
    a, b = make(4, 16, [12], [7])
    before = a[0].clone(), b[0].clone()
    x = a[0].requires_grad_()
    acc = MinibatchCKA().update(x, b), StreamingCKA().update(x, b)
    assert torch.equal(x, before[0]) and torch.equal(b[0], before[1])
    assert not any(s.compute().requires_grad for s in acc)


@given(st.integers(4, 40), st.integers(1, 50), st.integers(0, 2**31))
def test_effective_width_is_at_least_positive_and_blind_to_scale_and_shift(n, p, seed):
    x = torch.randn(n, p, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    d = effective_width(x)
    assert d > 0
    torch.testing.assert_close(effective_width(3e5 * x + 7), d, rtol=1e-6, atol=0)


def test_chance_cka():
    assert chance_cka(64, 16384, 16384) == pytest.approx(1 / (1 + 64 / 16384))
    assert chance_cka(64, 10, 20, unbiased=True) == 0
    with pytest.raises(ValueError, match="p and q positive"):
        chance_cka(64, 0, 3)


def test_batch_cka_against_the_moments_of_a_wishart_matrix():
    assert batch_cka(0, 64, 10, 20) == pytest.approx(chance_cka(64, 10, 20))
    assert batch_cka(1, 64, 10, 10) == pytest.approx(1)
    assert 1 - batch_cka(0.4, 16, 48, 48) == pytest.approx(16 / 64 * 0.6)
    with pytest.raises(ValueError, match="population from 0 to 1"):
        batch_cka(-0.1, 64, 10, 20)
    # the textbook moments of a Wishart matrix of m degrees of freedom, entry by entry:
    # E W_ij W_kl = m^2 S_ij S_kl + m (S_ik S_jl + S_il S_jk)
    g = torch.Generator().manual_seed(0)
    half = torch.randn(7, 7, generator=g, dtype=torch.float64)
    s, m, p = half @ half.T, 11, 4

    def second(a, b):  # E |W_ab|_F^2
        return sum(
            m * m * s[i, j] ** 2 + m * (s[i, i] * s[j, j] + s[i, j] ** 2) for i in range(*a) for j in range(*b)
        ).item()

    x, y = (0, p), (p, 7)
    expected = second(x, y) / (second(x, x) * second(y, y)) ** 0.5
    xx, yy, xy = s[:p, :p], s[p:, p:], s[:p, p:]
    rho = (xy.square().sum() / (xx.norm() * yy.norm())).item()
    widths = [(b.trace() ** 2 / b.square().sum()).item() for b in (xx, yy)]
    assert batch_cka(rho, m + 1, *widths) == pytest.approx(expected, rel=1e-12)


def worker(rank, port, path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    a, b = make(5, 40, [3, 9], [4])
    mine = [i for t, i in enumerate(torch.arange(40).split(8)) if t % 2 == rank]
    for make_acc in (MinibatchCKA, StreamingCKA):
        acc = make_acc()
        for i in mine:
            acc.update([x[i] for x in a], [y[i] for y in b])
        all_gather = [None, None]
        dist.all_gather_object(all_gather, acc)
        if rank == 0:
            torch.save(sum(all_gather, start=make_acc()).compute(), f"{path}/{make_acc.__name__}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(worker, (port, str(tmp_path)), nprocs=2)
    a, b = make(5, 40, [3, 9], [4])
    for make_acc in (MinibatchCKA, StreamingCKA):
        acc = make_acc()
        for i in torch.arange(40).split(8):
            acc.update([x[i] for x in a], [y[i] for y in b])
        torch.testing.assert_close(torch.load(tmp_path / f"{make_acc.__name__}.pt"), acc.compute(), rtol=0, atol=1e-12)
