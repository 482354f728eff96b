"""PCKA and the other methods of dense tasks: against the formulas written out, on odd sizes, bad input and half
precision."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rcka.core import FeaturePaths, Outputs
from rcka.methods.base import create_method
from rcka.methods.cka import intra_inter, lcka, pcka
from rcka.methods.dense import box_weights, dense_dist_loss, dense_kd_loss, fgd_focal_losses, pkd_loss

DENSE = ["pcka", "mimic", "pkd", "fgd", "dense_kd", "dense_dist"]
MAPS = ["pcka", "mimic", "pkd", "fgd"]


def alignment(x, y, center=False):
    "CKA of the rows by its definition: both Gram matrices formed, centred with H = I - 1/n."
    k, l = x @ x.T, y @ y.T
    if center:
        h = torch.eye(len(x), dtype=x.dtype) - 1 / len(x)
        k, l = h @ k @ h, h @ l @ h
    return torch.trace(k @ l.T) / torch.sqrt(torch.trace(k @ k.T) * torch.trace(l @ l.T))


def channel_by_channel(student, teacher, k=16, center=False):
    "The published algorithm as it is described: resize, cut, one channel after the other."
    size = [math.ceil(x / k) * k for x in teacher.shape[2:]]
    s, t = (F.interpolate(x, size=size, mode="bilinear", align_corners=False) for x in (student, teacher))
    intra, inter = 0, 0
    for c in range(s.shape[1]):
        x, y = (
            torch.stack(
                [z[:, c, i : i + k, j : j + k].flatten() for i in range(0, size[0], k) for j in range(0, size[1], k)]
            )
            for z in (s, t)
        )
        intra = intra + alignment(x, y, center)
        inter = inter + alignment(x.T, y.T, center)
    return intra / s.shape[1], inter / s.shape[1]


def maps(*shape, seed=0, dtype=torch.float64, **kw):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed), **kw)


SHAPES = {  # student, teacher, patch size
    "multiples": ((2, 3, 16, 24), (2, 3, 16, 24), 8),
    "no multiples": ((2, 3, 11, 17), (2, 3, 11, 17), 4),
    "smaller student": ((2, 3, 7, 9), (2, 3, 13, 18), 4),
    "larger student": ((2, 3, 20, 31), (2, 3, 13, 18), 4),
    "more places than pixels in a patch": ((1, 2, 14, 15), (1, 2, 14, 15), 2),
    "patches of one pixel": ((3, 2, 4, 5), (3, 2, 4, 5), 1),
    "two patches": ((2, 3, 5, 7), (2, 3, 5, 7), 5),
}


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_pcka_is_the_published_loop(name, center):
    a, b, k = SHAPES[name]
    s, t = maps(*a).requires_grad_(), maps(*b, seed=1).requires_grad_()
    for ours, theirs in zip(pcka(s, t, k, center), channel_by_channel(s, t, k, center)):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
        for g, h in zip(
            torch.autograd.grad(ours, (s, t), retain_graph=True), torch.autograd.grad(theirs, (s, t), retain_graph=True)
        ):
            torch.testing.assert_close(g, h, rtol=1e-8, atol=1e-12)


def test_the_default_patch_is_16():
    s, t = maps(1, 2, 30, 33), maps(1, 2, 30, 33, seed=1)
    torch.testing.assert_close(pcka(s, t), pcka(s, t, 16, False))
    torch.testing.assert_close(pcka(s, t).intra, channel_by_channel(s, t)[0])


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("name", ["no multiples", "smaller student", "more places than pixels in a patch"])
def test_pcka_gradcheck(name, center):
    a, b, k = SHAPES[name]
    f = lambda s, t: tuple(pcka(s, t, k, center))
    inputs = maps(*a).requires_grad_(), maps(*b, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


@pytest.mark.parametrize("center", [False, True])
def test_pcka_without_inter(center):
    s, t = maps(2, 3, 9, 12), maps(2, 3, 9, 12, seed=1)
    for k in (2, 4):  # more places than pixels, and fewer
        both, one = pcka(s, t, k, center), pcka(s, t, k, center, inter=False)
        assert one.inter is None
        torch.testing.assert_close(one.intra, both.intra)


@pytest.mark.parametrize("center", [False, True])
def test_pcka_properties(center):
    s, t = maps(2, 6, 12, 20), maps(2, 6, 12, 20, seed=1)
    value, order = torch.stack(pcka(s, t, 4, center)), torch.randperm(6)
    torch.testing.assert_close(
        torch.stack(pcka(s[:, order], t[:, order], 4, center)), value
    )  # channels in another order
    torch.testing.assert_close(torch.stack(pcka(-3 * s, 0.01 * t, 4, center)), value)  # scales
    torch.testing.assert_close(torch.stack(pcka(t, s, 4, center)), value)
    torch.testing.assert_close(torch.stack(pcka(t, t, 4, center)), torch.ones(2, dtype=t.dtype))
    torch.testing.assert_close(torch.stack(pcka(s.to(memory_format=torch.channels_last), t, 4, center)), value)
    assert ((0 <= value) & (value <= 1)).all()
    shifted = torch.stack(pcka(s + 5, t - 2, 4, center))
    assert torch.allclose(shifted, value) == center  # centring takes a common shift away


@pytest.mark.parametrize("fill", [0.0, 0.1, -1e6])
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (3, 2)])
def test_constant_channels_have_a_defined_value(fill, size):
    s = maps(2, 3, *size, dtype=torch.float32)
    s[:, 1] = fill
    s.requires_grad_()
    t = maps(2, 3, *size, seed=1, dtype=torch.float32)
    for center in (False, True):
        for x, y in ((s, t), (t, s), (s, s)):
            value = pcka(x, y, 4, center)
            (grad,) = torch.autograd.grad(sum(value), s)
            assert torch.stack(value).isfinite().all() and grad.isfinite().all()
            if center or fill == 0:
                assert grad[:, 1].abs().max() == 0
    if size == (8, 8):
        torch.testing.assert_close(pcka(s, t, 4, True).intra, pcka(s[:, [0, 2]], t[:, [0, 2]], 4, True).intra * 2 / 3)


def test_a_channel_that_is_constant_in_each_image_has_nothing_to_compare_places_with():
    s = torch.tensor([0.1, 0.7])[:, None, None, None].expand(2, 3, 9, 11).clone().requires_grad_()
    intra, inter = pcka(s, maps(2, 3, 9, 11, dtype=torch.float32), 4, center=True)
    assert intra == 0 and inter > 0
    (grad,) = torch.autograd.grad(intra + inter, s)
    assert grad.isfinite().all() and grad.abs().max() < 1e3


def test_a_single_patch():
    s, t = maps(2, 3, 5, 6).requires_grad_(), maps(2, 3, 5, 6, seed=1)
    intra, inter = pcka(s, t, 16)
    torch.testing.assert_close(intra, torch.ones_like(intra))
    torch.testing.assert_close(inter, channel_by_channel(s, t)[1])
    assert torch.autograd.grad(intra, s, retain_graph=True)[0].abs().max() < 1e-12
    intra, inter = pcka(s, t, 16, center=True)
    assert intra == 0 and 0 < inter < 1


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_numbers_of_any_size(scale):
    s, t = maps(2, 3, 9, 12, dtype=torch.float32), maps(2, 3, 9, 12, seed=1, dtype=torch.float32)
    for center in (False, True):
        torch.testing.assert_close(
            torch.stack(pcka(scale * s, t / scale, 4, center)), torch.stack(pcka(s, t, 4, center))
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    s, t = maps(2, 4, 9, 12).to(dtype).requires_grad_(), maps(2, 4, 9, 12, seed=1).to(dtype)
    low, high = pcka(s, t, 4), pcka(s.double(), t.double(), 4)
    assert low.intra.dtype == torch.float32
    torch.testing.assert_close(torch.stack(low).double(), torch.stack(high), rtol=1e-5, atol=1e-6)
    sum(low).backward()
    assert s.grad.dtype == dtype and s.grad.isfinite().all()


def test_autocast_changes_nothing():
    s, t = maps(2, 4, 9, 12, dtype=torch.float32), maps(2, 4, 9, 12, seed=1, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = pcka(s, t, 4)
    torch.testing.assert_close(inside, pcka(s, t, 4), rtol=0, atol=0)


@pytest.mark.parametrize(
    "a, b, kw, error, message",
    [
        ((2, 3, 8, 8), (2, 4, 8, 8), {}, ValueError, "connector"),
        ((2, 3, 8, 8), (3, 3, 8, 8), {}, ValueError, "batches differ: 2 samples of the student and 3"),
        ((3, 8, 8), (2, 3, 8, 8), {}, ValueError, r"\(3, 8, 8\) of the student"),
        ((2, 3, 8, 8), (2, 3, 64), {}, ValueError, r"\(2, 3, 64\) of the teacher"),
        ((2, 3, 8, 8), (2, 3, 0, 8), {}, ValueError, "not empty"),
        ((2, 3, 8, 8), (2, 3, 8, 8), dict(patch_size=0), ValueError, "at least 1, got 0"),
        ((2, 3, 8, 8), (2, 3, 8, 8), dict(patch_size=2.5), ValueError, "whole number"),
    ],
)
def test_errors_say_what_would_do(a, b, kw, error, message):
    with pytest.raises(error, match=message):
        pcka(torch.zeros(a), torch.zeros(b), **kw)


def test_types_must_agree():
    with pytest.raises(TypeError, match="dtype"):
        pcka(torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8, dtype=torch.float64))
    with pytest.raises(TypeError, match="floating point"):
        pcka(torch.zeros(2, 3, 8, 8, dtype=torch.long), torch.zeros(2, 3, 8, 8))


def test_rows_that_are_all_alike_have_no_direction():
    "What rounding leaves of their differences is not taken for a relation."
    x = torch.randn(7, dtype=torch.float32).expand(5, 7) / 3
    y = torch.randn(5, 7)
    for unbiased in (False, True):
        assert intra_inter(x, y, unbiased=unbiased).intra == 0
        assert intra_inter(x.T, y.T, unbiased=unbiased).inter == 0


# --- maps of logits


def released(x, y):
    "Row-normalised alignment with both Gram matrices formed."
    k, l = x @ x.T, y @ y.T
    k, l = k / k.diag().sqrt()[:, None], l / l.diag().sqrt()[:, None]
    return torch.trace(k @ l.T) / torch.sqrt(torch.trace(k @ k.T) * torch.trace(l @ l.T))


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (4, 3, 1, 1), (9, 2, 1, 2), (1, 3, 2, 2)])
def test_row_normalised_logit_maps(shape):
    s, t = maps(*shape).requires_grad_(), maps(*shape, seed=1)
    x, y = s.flatten(1), t.flatten(1)
    for ours, theirs in zip(lcka(s, t, center=False, normalize_rows=True), (released(x, y), released(x.T, y.T))):
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(
            torch.autograd.grad(ours, s, retain_graph=True)[0],
            torch.autograd.grad(theirs, s, retain_graph=True)[0],
            rtol=1e-8,
            atol=1e-12,
        )
    assert torch.autograd.gradcheck(lambda s: tuple(lcka(s, t, center=False, normalize_rows=True)), s, fast_mode=True)


def test_logit_maps_are_rows():
    s, t = maps(5, 3, 2, 4), maps(5, 3, 2, 4, seed=1)
    for kw in (dict(), dict(unbiased=True), dict(center=False)):
        torch.testing.assert_close(lcka(s, t, **kw), lcka(s.flatten(1), t.flatten(1), **kw))
    soft = lcka(s, t, temperature=2.0)  # over the classes of each place
    torch.testing.assert_close(soft, lcka((s / 2).softmax(1).flatten(1), (t / 2).softmax(1).flatten(1)))


def test_zero_logits_somewhere():
    s = maps(2, 3, 4, 4, dtype=torch.float32)
    s[:, 1] = 0
    s.requires_grad_()
    value = lcka(s, maps(2, 3, 4, 4, seed=1, dtype=torch.float32), center=False, normalize_rows=True)
    sum(value).backward()
    assert s.grad.isfinite().all() and s.grad[:, 1].abs().max() < 10


# --- methods


def pyramid(channels, seed=0, classes=7, grad=False, sizes=((12, 20), (6, 10), (3, 5), (2, 3)), dtype=torch.float32):
    return Outputs(
        maps(40, classes, seed=seed + 9, dtype=dtype).requires_grad_(grad),
        tuple(
            maps(2, channels, *size, seed=seed + i, dtype=dtype).requires_grad_(grad) for i, size in enumerate(sizes)
        ),
    )


TARGET = [
    {"boxes": torch.tensor([[4.0, 4, 40, 60], [90, 10, 140, 90]]), "input_size": (96, 160)},
    {"boxes": torch.zeros(0, 4), "input_size": (96, 160)},
]


@pytest.mark.parametrize("channels", [6, 4])
@pytest.mark.parametrize("name", DENSE)
def test_terms_reach_student_and_connectors(name, channels):
    torch.manual_seed(0)
    method = create_method(name, dict(inter=10, mimic=1) if name == "pcka" else None)
    s, t = pyramid(channels, grad=True), pyramid(6, seed=50)
    method.build(s, t)
    terms = method.terms(s, t, TARGET)
    assert terms and all(v.dim() == 0 and v.isfinite() and v > 0 for v in terms.values())
    sum(terms.values()).backward()
    for x in s.features if name in MAPS else [s.logits]:
        assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
    for key, p in method.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), key
    assert any(
        isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and m.in_channels == 4 for m in method.modules()
    ) == (name in MAPS and channels == 4)


@pytest.mark.parametrize("name", DENSE)
def test_gradients_in_float64(name):
    torch.manual_seed(0)
    method = create_method(name)
    s, t = pyramid(4, grad=True, dtype=torch.float64), pyramid(6, seed=50, dtype=torch.float64)
    method.build(s, t)
    inputs = [*s.features, *method.parameters()] if name in MAPS else [s.logits]
    for p in method.parameters():  # not at the zeros where FGD's blocks begin
        with torch.no_grad():
            p.add_(0.1 * torch.randn_like(p))
    assert torch.autograd.gradcheck(lambda *_: sum(method.terms(s, t, TARGET).values()), inputs, fast_mode=True)


@pytest.mark.parametrize("name", DENSE)
def test_the_loss_falls_under_autocast(name):
    torch.manual_seed(0)
    method = create_method(name, dict(mimic=1) if name == "pcka" else None)
    s, t = pyramid(4, grad=True), pyramid(6, seed=50)
    method.build(s, t)
    optimizer = torch.optim.Adam([s.logits, *s.features, *method.parameters()], lr=0.03)
    path = []
    for _ in range(25):
        with torch.autocast("cpu", torch.bfloat16):
            terms = method.terms(s, t, TARGET)
        assert all(v.dtype == torch.float32 for v in terms.values())
        loss = sum(terms.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        path.append(loss.item())
    assert path[-1] < 0.9 * path[0]


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("fill", [0.0, 0.3])
def test_constant_outputs_never_give_nan(name, fill):
    torch.manual_seed(0)
    flat = lambda o: Outputs(
        torch.full_like(o.logits, fill, requires_grad=True),
        tuple(torch.full_like(f, fill, requires_grad=True) for f in o.features),
    )
    method, s, t = create_method(name), pyramid(6), pyramid(6, seed=50)
    method.build(s, t)
    for a, b in ((flat(s), t), (flat(s), flat(t))):
        total = sum(method.terms(a, b, TARGET).values())
        total.backward()
        assert total.isfinite() and all(x.grad is None or x.grad.isfinite().all() for x in (a.logits, *a.features))


@pytest.mark.parametrize("name", MAPS)
def test_maps_in_half_precision_outside_autocast(name):
    torch.manual_seed(0)
    half = lambda o: o._replace(features=tuple(f.detach().bfloat16().requires_grad_() for f in o.features))
    method, s, t = create_method(name), half(pyramid(4)), half(pyramid(6, seed=50))
    method.build(s, t)
    total = sum(method.terms(s, t, TARGET).values())
    total.backward()
    assert total.dtype == torch.float32 and all(f.grad.isfinite().all() for f in s.features)


@pytest.mark.parametrize("name", ["pcka", "mimic", "pkd", "fgd"])
@pytest.mark.parametrize("width", [4, 6])
def test_maps_need_build(name, width):
    "Whether the widths differ or not."
    with pytest.raises(RuntimeError, match=f"{name} has parameters of its own: call method.build"):
        create_method(name).terms(pyramid(4), pyramid(width), TARGET)


def built(name, student, teacher, **args):
    method = create_method(name, args)
    method.build(student, teacher)
    return method


def test_pcka_weights_levels_and_sums():
    layers = FeaturePaths(tuple(f"fpn[{i}]" for i in range(5)))
    assert create_method("pcka").wants(layers) == list(layers.stages[:4])
    assert create_method("pcka", dict(stages=(0, -1))).wants(layers) == ["fpn[0]", "fpn[4]"]
    assert create_method("fgd").wants(layers) == list(layers.stages)
    with pytest.raises(ValueError, match="but the network has 5"):
        create_method("pkd", dict(stages=(5,))).wants(layers)
    s, t = pyramid(6), pyramid(6, seed=50)
    terms = built("pcka", s, t, intra=3, inter=2, mimic=0.5, patch_size=4).terms(s, t)
    loop = [channel_by_channel(a.double(), b.double(), 4) for a, b in zip(s.features, t.features)]
    torch.testing.assert_close(terms["pcka_intra"].double(), 3 * sum(1 - i for i, _ in loop), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms["pcka_inter"].double(), 2 * sum(1 - i for _, i in loop), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms["mimic"], 0.5 * sum(F.mse_loss(a, b) for a, b in zip(s.features, t.features)))
    assert set(built("pcka", s, t, intra=0, mimic=1).terms(s, t)) == {"mimic"}
    both = create_method("pcka+pkd+dense_kd")
    wanted = both.wants(layers)
    assert len(wanted) == 8
    twice = lambda o: o._replace(features=o.features * 2)
    both.build(twice(s), twice(t))
    assert set(both.terms(twice(s), twice(t), TARGET)) == {"pcka_intra", "pkd", "dense_kd"}


def test_the_teacher_needs_no_gradient_and_gets_none():
    s, t = pyramid(6, grad=True), pyramid(6, seed=50, grad=True)
    for name in ("pcka", "mimic", "pkd"):
        sum(built(name, s, t).terms(s, t).values()).backward()
        assert all(f.grad is None for f in t.features)


def test_state_resumes():
    s, t = pyramid(4), pyramid(6, seed=50)
    for name in MAPS:
        values, state = [], None
        for seed in (0, 1):
            torch.manual_seed(seed)
            method = create_method(name)
            method.build(s, t)
            if seed:
                method.load_state_dict(state)
            state = method.state_dict()
            values.append(sum(method.terms(s, t, TARGET).values()))
        torch.testing.assert_close(*values, rtol=0, atol=0)


def test_pkd_is_the_error_of_standardised_maps():
    s, t = maps(2, 5, 7, 9).requires_grad_(), maps(2, 5, 13, 18, seed=1)

    def standard(x):
        x = x.transpose(0, 1).flatten(1)
        return (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True, unbiased=False)

    theirs = F.mse_loss(standard(F.interpolate(s, t.shape[2:], mode="bilinear")), standard(t)) / 2
    torch.testing.assert_close(pkd_loss(s, t), theirs)
    torch.testing.assert_close(torch.autograd.grad(pkd_loss(s, t), s)[0], torch.autograd.grad(theirs, s)[0])


def test_fgd_weights_by_hand():
    "One box after the other, cell by cell; also boxes over the edge, outside and without area."
    h, w, size = 8, 12, (64, 96)
    boxes = torch.tensor(
        [[3.0, 5, 40, 30], [10, 10, 20, 18], [70, 40, 150, 90], [-30, -30, -20, -20], [50, 50, 50, 50]]
    )
    expected = torch.zeros(h, w)
    for x0, y0, x1, y1 in boxes.tolist():
        x0, x1, y0, y1 = math.floor(x0 / 8), math.ceil(x1 / 8), math.floor(y0 / 8), math.ceil(y1 / 8)
        for i in range(h):
            for j in range(w):
                if y0 <= i <= y1 and x0 <= j <= x1:
                    expected[i, j] = max(expected[i, j], 1 / ((y1 - y0 + 1) * (x1 - x0 + 1)))
    foreground, background = box_weights([boxes, boxes[:0]], size, (h, w))
    torch.testing.assert_close(foreground[0], expected)
    torch.testing.assert_close(background[0], (expected == 0) / (expected == 0).sum())
    torch.testing.assert_close(background[1], torch.full((h, w), 1 / (h * w)))
    covered, none = box_weights([torch.tensor([[0.0, 0, 96, 64]])], size, (h, w))
    assert (covered > 0).all() and none.sum() == 0


def test_fgd_attention_has_mean_one_and_follows_the_teacher():
    t = maps(2, 5, 8, 12, seed=1)
    weights = box_weights([TARGET[0]["boxes"], TARGET[1]["boxes"]], (96, 160), (8, 12))
    assert all(x == 0 for x in fgd_focal_losses(t, t, *weights, 1, 1, 0.5))
    hot = t.clone()
    hot[:, :, 4, 4] *= 100  # at a high temperature all places count alike; at a low one only the hot place does
    change = torch.zeros_like(t)
    change[:, :, 4, 4] = 1
    flat, _ = fgd_focal_losses(hot + change, hot, *weights, 1, 1, 1e6)
    peaked, _ = fgd_focal_losses(hot + change, hot, *weights, 1, 1, 0.5)
    torch.testing.assert_close(peaked, 8 * 12 * flat, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    "target, message",
    [
        (torch.zeros(2), "a list of dicts"),
        (TARGET[:1], "each of the 2 images"),
        ([{"boxes": torch.zeros(0, 4)}] * 2, "'input_size'"),
        ([TARGET[0], TARGET[1] | {"input_size": (1, 2)}], "same input_size"),
    ],
)
def test_fgd_says_what_its_target_must_be(target, message):
    method, t = create_method("fgd"), pyramid(6)
    method.build(t, t)
    with pytest.raises(ValueError, match=message):
        method.terms(t, t, target)


def test_dense_kd_is_the_divergence():
    from torch.distributions import Bernoulli, Categorical, kl_divergence

    s, t = 4 * maps(30, 6).requires_grad_(), 4 * maps(30, 6, seed=1) - 3
    soft = 9 * kl_divergence(Categorical(logits=t / 3), Categorical(logits=s / 3)).mean()
    binary = (
        9 * kl_divergence(Bernoulli(logits=t / 3), Bernoulli(logits=s / 3)).sum() / max(1, t.sigmoid().amax(1).sum())
    )
    torch.testing.assert_close(dense_kd_loss(s, t, "softmax", 3), soft)
    torch.testing.assert_close(dense_kd_loss(s, t, "sigmoid", 3), binary)
    few = t - 50  # nothing is foreground to the teacher: the sum itself
    torch.testing.assert_close(
        dense_kd_loss(s - 50, few, "sigmoid"), kl_divergence(Bernoulli(logits=few), Bernoulli(logits=s - 50)).sum()
    )


@pytest.mark.parametrize("loss", [dense_kd_loss, dense_dist_loss])
@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
def test_rows_and_maps_of_logits_agree(loss, form):
    s, t = maps(2, 5, 3, 4), maps(2, 5, 3, 4, seed=1)
    rows = lambda x: x.permute(0, 2, 3, 1).reshape(-1, 5)
    torch.testing.assert_close(loss(s, t, form=form), loss(rows(s), rows(t), form=form))
    with pytest.raises(ValueError, match="softmax .* or sigmoid"):
        loss(s, t, form="tanh")
    with pytest.raises(ValueError, match="same shape"):
        loss(s, t[:1], form=form)


def test_fgd_relation_is_the_context_block_written_out():
    from rcka.methods.dense import ContextBlock, fgd_global_loss

    torch.manual_seed(0)
    blocks = [ContextBlock(6).double() for _ in "st"]
    s, t = maps(2, 6, 4, 5), maps(2, 6, 4, 5, seed=1)
    torch.testing.assert_close(
        fgd_global_loss(s, t, *blocks), (s - t).square().sum() / 2
    )  # before training it is the difference of the maps
    for p in blocks[0].parameters():
        nn.init.normal_(p, std=0.5)

    def related(x, block):
        first, norm, _, last = block.change
        out = []
        for one in x:
            places = [one[:, i, j] for i in range(4) for j in range(5)]
            attention = torch.stack(
                [(block.weigh.weight.flatten() * p).sum() + block.weigh.bias[0] for p in places]
            ).softmax(0)
            context = first.weight @ sum(a * p for a, p in zip(attention, places)) + first.bias
            context = (context - context.mean()) / (context.var(unbiased=False) + 1e-5).sqrt() * norm.weight + norm.bias
            out.append(one + (last.weight @ context.clamp_min(0) + last.bias)[:, None, None])
        return torch.stack(out)

    torch.testing.assert_close(
        fgd_global_loss(s, t, *blocks), (related(s, blocks[0]) - related(t, blocks[1])).square().sum() / 2
    )


def test_fgd_focal_written_out():
    s, t = maps(2, 3, 4, 5).requires_grad_(), maps(2, 3, 4, 5, seed=1)
    f, b = maps(2, 4, 5, seed=2).abs(), maps(2, 4, 5, seed=3).abs()

    def attention(x):  # of one image (C, H, W)
        return 20 * (x.abs().mean(0) / 0.7).flatten().softmax(0).reshape(4, 5), 3 * (
            x.abs().mean((1, 2)) / 0.7
        ).softmax(0)

    features, masks = 0, 0
    for i in range(2):
        (places, channels), (places_s, channels_s) = attention(t[i]), attention(s[i])
        for k in range(3):
            features = (
                features + ((0.3 * f[i] + 0.2 * b[i]) * places * channels[k] * (s[i, k] - t[i, k]) ** 2).sum() / 2
            )
        masks = masks + ((places - places_s).abs().sum() + (channels - channels_s).abs().sum()) / 2
    ours = fgd_focal_losses(s, t, f, b, 0.3, 0.2, 0.7)
    torch.testing.assert_close(ours, (features, masks))
    for a, b in zip(ours, (features, masks)):
        torch.testing.assert_close(
            torch.autograd.grad(a, s, retain_graph=True), torch.autograd.grad(b, s, retain_graph=True)
        )


def test_pkd_of_a_constant_channel_that_is_resized():
    s = torch.full((2, 3, 5, 7), 0.1, requires_grad=True)
    loss = pkd_loss(s, maps(2, 3, 9, 11, dtype=torch.float32))
    assert loss == 1 and torch.autograd.grad(loss, s)[0].abs().max() == 0


def test_gram_takes_any_gradient():
    from rcka.methods.cka import _Gram

    x, w = maps(2, 3, 4).requires_grad_(), maps(2, 3, 3, seed=1)  # no symmetric weights
    assert torch.autograd.gradcheck(lambda x: (w * _Gram.apply(x)).sum(), x) and torch.autograd.gradgradcheck(
        lambda x: (w * _Gram.apply(x)).sum(), x
    )
    torch.testing.assert_close(
        torch.func.vmap(torch.func.grad(lambda x: (w[0] * _Gram.apply(x)).sum()))(x),
        torch.func.vmap(torch.func.grad(lambda x: (w[0] * (x @ x.mT)).sum()))(x),
    )
