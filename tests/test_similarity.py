"Properties of the similarity measures on drawn inputs, and libraries we did not write as oracles."

import ckatorch
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rcka import Gaussian, cka, fcka, gram, hsic, lcka, mmd2

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
    with pytest.raises(ValueError, match="one space"):
        mmd2(x, x[:, :2])
    with pytest.raises(ValueError, match="same samples"):
        fcka(x, x[:7])
    with pytest.raises(ValueError, match="of one shape"):
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
