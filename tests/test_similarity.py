"Properties of the similarity measures on drawn inputs, and libraries we did not write as oracles."

import ckatorch
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from rcka import Gaussian, cka, fcka, gram, hsic, lcka, mmd2
from rcka.similarity.measures import as_features, in_memory_order

sizes = dict(seed=st.integers(0, 10**6), n=st.integers(4, 20), p=st.integers(1, 40), q=st.integers(1, 40))
forms = st.sampled_from(
    [
        dict(),
        dict(unbiased=True),
        dict(center=False),
        dict(kernel="gaussian"),
        dict(kernel="polynomial"),
        dict(kernel=Gaussian(3.0), unbiased=True),
    ]
)


def draw(seed, n, p, q, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, p, generator=g, dtype=dtype), torch.randn(n, q, generator=g, dtype=dtype)


@settings(max_examples=60, deadline=None)
@given(**sizes, form=forms)
def test_value_is_a_cosine(seed, n, p, q, form):
    x, y = draw(seed, n, p, q)
    value = cka(x, y, **form)
    assert abs(value) <= 1 + 1e-9 and (form.get("unbiased") or value >= -1e-12)
    assert torch.allclose(value, cka(y, x, **form), atol=1e-10)
    permuted = torch.randperm(n)
    assert torch.allclose(value, cka(x[permuted], y[permuted], **form), atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(**sizes, unbiased=st.booleans(), scale=st.sampled_from([1e-12, 1e-3, 1.0, 1e9]))
def test_rotation_scale_and_shift_do_not_matter(seed, n, p, q, unbiased, scale):
    x, y = draw(seed, n, p, q)
    rotation = torch.linalg.qr(torch.randn(p, p, dtype=torch.float64)).Q
    assert torch.allclose(
        cka(x, y, unbiased=unbiased), cka(scale * (x @ rotation + 5), y, unbiased=unbiased), atol=1e-7
    )


@settings(max_examples=60, deadline=None)
@given(**sizes)
def test_ckatorch_agrees(seed, n, p, q):
    x, y = draw(seed, n, p, q)
    biased, unbiased = (ckatorch.cka_base(x, y, kernel="linear", unbiased=u) for u in (False, True))
    assert torch.allclose(cka(x, y), biased, atol=1e-10)
    assert torch.allclose(cka(x, y, unbiased=True), unbiased.to(x), atol=1e-8)
    k, l = gram(x), gram(y)
    assert torch.allclose(hsic(k, l, unbiased=True), ckatorch.hsic1(k[None], l[None])[0], atol=1e-9)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("n, p, q", [(64, 16384, 4096), (64, 512, 100), (512, 64, 32)])
def test_float32_is_right_to_three_digits(n, p, q, unbiased):
    "After a ReLU every mean is positive; here the means are far larger than the spread."
    x, y = draw(0, n, p, q)
    shared = torch.randn(n, 10, dtype=torch.float64)
    x = (x + shared @ torch.randn(10, p, dtype=torch.float64)).relu() + 100
    y = (y + shared @ torch.randn(10, q, dtype=torch.float64)).relu() + 100
    assert abs(cka(x, y, unbiased=unbiased) - cka(x.float(), y.float(), unbiased=unbiased)) < 1e-3


@pytest.mark.parametrize(
    "form", [dict(), dict(unbiased=True), dict(center=False), dict(kernel="gaussian"), dict(kernel="polynomial")]
)
@pytest.mark.parametrize("fill", [0.0, 0.1, 3.3, -1e8, 1e-30])
def test_constant_features_give_zero_and_finite_gradients(form, fill):
    for dtype in (torch.float32, torch.float64):
        x = torch.full((8, 30), fill, dtype=dtype, requires_grad=True)
        y = torch.randn(8, 5, dtype=dtype, requires_grad=True)
        value = cka(x, y, **form)
        value.backward()
        assert value.isfinite() and x.grad.isfinite().all() and y.grad.isfinite().all()
        if form.get("center", True):
            assert value == 0


def test_bad_input_is_named():
    x = torch.randn(8, 5)
    with pytest.raises(ValueError, match=r"same samples: got \(8,\) and \(7,\)"):
        cka(x, x[:7])
    with pytest.raises(ValueError, match="centring needs at least 2"):
        cka(x[:1], x[:1])
    with pytest.raises(ValueError, match="unbiased estimate needs at least 4"):
        cka(x[:3], x[:3], unbiased=True)
    with pytest.raises(ValueError, match="use it with center=True"):
        cka(x, x, unbiased=True, center=False)
    with pytest.raises(TypeError, match="real floating point, got torch.int64"):
        cka(x.long(), x)
    with pytest.raises(TypeError, match="real floating point, got torch.complex64"):
        cka(x, x + 0j)
    with pytest.raises(TypeError, match="agree in dtype and device"):
        cka(x, x.double())
    with pytest.raises(TypeError, match="must be a torch.Tensor, got list"):
        cka([1.0], x)
    with pytest.raises(ValueError, match="is empty"):
        cka(x[:0], x[:0])
    with pytest.raises(ValueError, match="the same width"):
        mmd2(x, x[:, :2])
    with pytest.raises(ValueError, match="same samples"):
        fcka(x, x[:7])
    with pytest.raises(ValueError, match="the same shape"):
        lcka(x, x[:7])
    with pytest.raises(ValueError, match="at least 2 samples"):
        lcka(x[:1], x[:1])
    with pytest.raises(ValueError, match="at least 4 samples"):
        lcka(x[:3], x[:3], unbiased=True)


def test_nan_is_never_hidden():
    x = torch.randn(8, 5)
    y = x.clone()
    y[0, 0] = float("nan")
    assert cka(x, y).isnan() and cka(x, y, unbiased=True).isnan() and lcka(x, y).intra.isnan()


def test_autocast_and_half_precision():
    x, y = torch.randn(16, 64, 4, 4), torch.randn(16, 32, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = fcka(x, y)
    assert inside.dtype == torch.float32 and inside == fcka(x, y)
    assert abs(fcka(x.bfloat16(), y.bfloat16()) - fcka(x, y)) < 1e-2


# maps in channels_last


@pytest.mark.parametrize("form", [dict(), dict(center=False), dict(unbiased=True), dict(gram_of_gram=True)])
def test_fcka_of_maps_in_channels_last(form):
    "Value and gradient are those of the plain layout, and the gradient has the layout of the map."
    torch.manual_seed(0)
    maps = torch.randn(8, 6, 5, 4, dtype=torch.float64), torch.randn(8, 7, 3, 3, dtype=torch.float64)
    plain = [x.clone().requires_grad_() for x in maps]
    last = [x.clone(memory_format=torch.channels_last).requires_grad_() for x in maps]
    values = [fcka(*plain, **form), fcka(*last, **form), fcka(plain[0], last[1], **form)]
    torch.testing.assert_close(values[1], values[0])
    torch.testing.assert_close(values[2], values[0])
    for a, b in zip(torch.autograd.grad(values[0], plain), torch.autograd.grad(values[1], last)):
        torch.testing.assert_close(b, a)
        assert b.is_contiguous(memory_format=torch.channels_last)


class Copies(TorchDispatchMode):
    "Counts the operations that copy a tensor of `size` numbers."

    def __init__(self, size):
        super().__init__()
        self.size, self.seen = size, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        copies = {"clone", "copy_", "contiguous", "_reshape_copy", "_to_copy"}
        if func.overloadpacket.__name__ in copies and isinstance(out, torch.Tensor) and out.numel() == self.size:
            self.seen.append(str(func))
        return out


def test_fcka_copies_no_map():
    x = torch.randn(8, 6, 5, 4).to(memory_format=torch.channels_last)
    flat = as_features(in_memory_order(x))
    assert flat.data_ptr() == x.data_ptr() and flat.is_contiguous() and flat.shape == (8, 120)
    torch.testing.assert_close(flat.unflatten(1, (5, 4, 6)).permute(0, 3, 1, 2), x)
    maps = [torch.randn(8, 6, 5, 4).to(memory_format=torch.channels_last).requires_grad_() for _ in range(2)]
    with Copies(x.numel()) as found:
        fcka(*maps).backward()
    assert not found.seen
    with Copies(x.numel()) as found:  # so the line above can fail
        cka(*maps).backward()
    assert found.seen


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 3, 2), (4, 1, 5, 1), (1, 3, 2, 2), (4, 2, 3, 2, 2)])
def test_memory_order_of_plain_features_is_their_own(shape):
    x = torch.randn(shape)
    assert torch.equal(as_features(in_memory_order(x)), as_features(x))


def test_shapes_and_errors_of_features():
    assert as_features(torch.zeros(7, 5, 3), batch_dims=1).shape == (7, 5, 3)
    maps = torch.zeros(5, 3, 2, 4).to(memory_format=torch.channels_last)
    assert in_memory_order(maps).shape == (5, 2, 4, 3)
    for dtype, message in ((torch.long, r"convert it with x.float\(\)"), (torch.cfloat, "real floating point")):
        with pytest.raises(TypeError, match=message):
            as_features(torch.zeros(5, 3, dtype=dtype))
    with pytest.raises(ValueError, match="unknown kernel 'rbf'"):
        gram(torch.zeros(6, 4), "rbf")
    with pytest.raises(ValueError, match="at least 4"):
        hsic(torch.eye(3), torch.eye(3), unbiased=True)
