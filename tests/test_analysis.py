"Comparing two networks: against definitions, for strangers' networks, within a budget, and on bad input."

import copy
import math
import weakref

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

import rcka
from rcka.analysis.compare import choose_layers, compare, load_comparison, memory_needed, relations, save_comparison
from rcka.analysis.plots import (
    class_relations,
    gram_frame,
    plot_along,
    plot_before_after,
    plot_class_relations,
    plot_cost,
    plot_grams,
    plot_predicts,
    plot_similarity,
    rank_correlation,
    save_figure,
)
from rcka.features import Taps
from rcka.similarity.measures import Gaussian, center, cka, gram

pytest.importorskip("matplotlib").use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    return tuple(rcka.create_model(name, num_classes=10, in_channels=1) for name in ("resnet14", "resnet8"))


IMAGES = torch.randn(36, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def features(model, images, paths):
    model.eval()
    with torch.no_grad(), Taps(model, paths) as taps:
        return [f.double() for f in taps(images).features]


# ---- relations


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 9),
    st.lists(st.integers(1, 5), min_size=0, max_size=3),
    st.integers(1, 300),
    st.booleans(),
    st.sampled_from(["linear", "gaussian", "polynomial", Gaussian(0.7)]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_relations_are_gram_matrices_whatever_the_block_layout_and_dtype(n, shape, block, flip, kernel, dtype):
    x = torch.randn(n, *shape, dtype=torch.float64).to(dtype)
    if flip:
        x = x.flip(0).transpose(-1, 0).contiguous().transpose(-1, 0)
    before = x.clone()
    got, want = center(relations(x, kernel, block)), center(gram(x.double(), kernel))
    assert torch.equal(x, before) and got.dtype == torch.float64
    assert (got - want).abs().max() <= (1e-10 if dtype == torch.float64 else 1e-4) * want.abs().max().clamp_min(1)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e20, 3e-30, 12345.678])
@pytest.mark.parametrize("kernel", ["linear", "gaussian"])
def test_constant_features_have_no_relations(value, kernel):
    for n in (5, 64, 100):
        assert not center(relations(torch.full((n, 37), value), kernel)).any()


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1.0, 1e15, 1e30])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_size_and_mean_cost_few_digits(scale, offset):
    x = torch.randn(20, 400, dtype=torch.float64) + offset
    got, want = center(relations((x * scale).float())) / scale**2, center(gram((x * scale).float().double() / scale))
    assert (got - want).norm() < 1e-4 * want.norm()


def test_an_outlier_does_not_drown_the_rest():
    x = torch.randn(20, 400, dtype=torch.float64)
    x[0] *= 1e3
    assert (center(relations(x.float())) - center(gram(x.float().double()))).abs().max() < 1e-5 * center(
        gram(x)
    ).abs().max()


# ---- compare, against the definition


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("kernel", ["linear", "gaussian", Gaussian(5.0), "polynomial"])
def test_one_batch_is_cka_of_every_pair(pair, kernel, unbiased):
    paths = ["conv1", "layer1.0.bn2", "layer2.0", "fc:input", "fc"]
    frame = compare(*pair, [IMAGES], paths, kernel=kernel, unbiased=unbiased)
    a, b = (features(m, IMAGES, paths) for m in pair)
    want = [[cka(x, y, kernel, unbiased=unbiased).item() for y in b] for x in a]
    assert np.abs(frame.values - want).max() < 1e-4
    assert list(frame.index) == list(frame.columns) == paths


def test_many_batches_are_ratios_of_summed_estimates(pair):
    from ckatorch.core import cka_batch

    paths = ["conv1", "layer2.0", "fc"]
    frame = compare(*pair, IMAGES.split(12), paths)
    a, b = (features(m, IMAGES, paths) for m in pair)
    stack = lambda f: f.flatten(1).view(3, 12, -1)
    want = [[cka_batch(stack(x), stack(y)).item() for y in b] for x in a]
    assert np.abs(frame.values - want).max() < 1e-4


def test_several_at_once_are_the_single_ones(pair):
    many = compare(*pair, IMAGES.split(18), "layer?.?", kernel=["linear", "gaussian"], unbiased=(True, False))
    assert set(many) == {(k, u) for k in ("linear", "gaussian") for u in (True, False)}
    for (kernel, unbiased), frame in many.items():
        single = compare(*pair, IMAGES.split(18), "layer?.?", kernel=kernel, unbiased=unbiased)
        pd.testing.assert_frame_equal(frame, single, rtol=1e-12)
        assert frame.attrs["kernel"] == kernel and frame.attrs["estimator"] == ("debiased" if unbiased else "biased")


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("kernel", ["linear", "gaussian"])
@pytest.mark.parametrize("other", ["same", None, "copy"])
def test_the_same_network_twice_has_a_diagonal_of_one(pair, kernel, unbiased, other):
    model = pair[1]
    frame = compare(
        model,
        {"same": model, None: None, "copy": copy.deepcopy(model)}[other],
        IMAGES.split(12),
        kernel=kernel,
        unbiased=unbiased,
    )
    assert frame.shape[0] == frame.shape[1] == len(choose_layers(model))
    assert np.abs(np.diag(frame) - 1).max() < 1e-9 and np.abs(frame.values).max() < 1 + 1e-9


def test_in_place_operations_come_too_late():
    torch.manual_seed(0)
    loud = torchvision.models.resnet18(num_classes=5)
    quiet = copy.deepcopy(loud)
    for m in quiet.modules():
        if isinstance(m, nn.ReLU):
            m.inplace = False
    x = torch.randn(8, 3, 32, 32)
    paths = ["bn1", "layer1.0.bn1", "layer1.0.bn2", "layer2.0.downsample.1"]
    a, b = compare(loud, None, [x], paths), compare(quiet, None, [x], paths)
    pd.testing.assert_frame_equal(a, b, rtol=1e-12)

    class Safe(nn.Module):  # the sum at the end of a block, not in place
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x):
            out = self.bn(x)
            kept = out.clone()
            out += 100 * torch.randn_like(x)
            return kept

    net = Safe().eval()
    assert compare(net, None, [x], ["bn"]).iloc[0, 0] == pytest.approx(1)
    assert (
        np.abs(compare(net, quiet, [x], ["bn"], ["conv1:input"]).iloc[0, 0] - 1) < 1e-6
    )  # a fresh batch norm in eval mode does nothing


# ---- loaders


def test_loaders_of_every_kind_give_the_same(pair):
    targets = torch.zeros(36)
    digits = rcka.load_dataset("digits", test_limit=40)
    want = compare(*pair, IMAGES.split(12), "layer?.?")
    for loader in [
        list(IMAGES.split(12)),
        iter(IMAGES.split(12)),
        [(i, 0) for i in IMAGES.split(12)],
        [[i] for i in IMAGES.split(12)],
        DataLoader(TensorDataset(IMAGES, targets), batch_size=12),
    ]:
        pd.testing.assert_frame_equal(compare(*pair, loader, "layer?.?"), want, rtol=1e-6)
    assert compare(*pair, digits.batches(20, train=False), "fc").attrs["samples"] == 40


def test_small_last_batches_are_left_out_and_counted(pair):
    frame = compare(*pair, IMAGES[:27].split(12), "fc")
    assert (frame.attrs["samples"], frame.attrs["samples_left_out"], frame.attrs["largest_batch"]) == (24, 3, 12)
    assert compare(*pair, IMAGES[:27].split(12), "fc", unbiased=False).attrs["samples"] == 27


@pytest.mark.parametrize(
    "loader, error, words",
    [
        ([], ValueError, "no usable batch"),
        ([IMAGES[:3]], ValueError, "no usable batch"),
        (IMAGES, TypeError, "one tensor"),
        ([{"image": IMAGES}], TypeError, "tuples that begin with the images"),
        ([[]], TypeError, "tuples"),
        ([("a", 1)], TypeError, "images"),
    ],
)
def test_loaders_that_will_not_do(pair, loader, error, words):
    with pytest.raises(error, match=words):
        compare(*pair, loader, "fc")


# ---- layers


def test_a_pattern_that_fits_nothing_names_what_is_near(pair):
    with pytest.raises(ValueError, match="did you mean .*layer1"):
        compare(*pair, [IMAGES], "layers1*")
    with pytest.raises(ValueError, match="layer1.0.bn2"):
        compare(*pair, [IMAGES], ["layer1.0.bn9"])
    with pytest.raises(ValueError, match="empty"):
        compare(*pair, [IMAGES], [])


def test_leaves_that_have_no_feature_of_each_image_are_left_out_and_listed():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.unused, self.gru = nn.Conv2d(1, 4, 3), nn.Linear(3, 3), nn.GRU(6, 5, batch_first=True)
            self.windows, self.head = nn.Identity(), nn.Linear(5, 2)

        def forward(self, x):
            x = self.body(x)
            self.windows(x.flatten(0, 1))
            return self.head(self.gru(x.mean(1))[0][:, -1])

    net = Odd()
    frame = compare(net, None, [IMAGES])
    assert (
        list(frame.index) == ["body", "head"] and frame.attrs["layers_left_out"] == [["unused", "gru", "windows"]] * 2
    )
    for path, error in [("windows", ValueError), ("gru", TypeError), ("unused", RuntimeError)]:
        with pytest.raises(error, match=path):
            compare(net, None, [IMAGES], [path])
    assert compare(net, None, [IMAGES], ["gru[0]", "head:input"]).shape == (2, 2)


def test_networks_are_left_as_they_were(pair):
    model = copy.deepcopy(pair[0]).train()
    model.bn1.eval()
    modes, state = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
    compare(model, pair[1], [IMAGES], progress=False)
    with pytest.raises(ValueError):
        compare(model, pair[1], [IMAGES, IMAGES[:, :, :1, :1] * math.nan], "layer?.?")
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_features_that_are_not_finite_are_named(pair):
    bad = copy.deepcopy(pair[1])
    with torch.no_grad():
        bad.layer2[0].conv2.weight.fill_(math.inf)
    with pytest.raises(ValueError, match="not finite at layer2.0"):
        compare(pair[0], bad, [IMAGES], "layer?.?")


def test_dead_layers_have_similarity_zero(pair):
    dead = copy.deepcopy(pair[1])
    with torch.no_grad():
        dead.layer1[0].bn2.weight.zero_()
        dead.layer1[0].bn2.bias.zero_()
    frame = compare(dead, pair[0], [IMAGES], ["layer1.0.bn2", "fc"])
    assert (frame.loc["layer1.0.bn2"] == 0).all() and frame.loc["fc", "fc"] != 0


@pytest.mark.slow
def test_wrapped_and_half_precision_networks(pair):
    want = compare(*pair, [IMAGES], "layer?.?")
    pd.testing.assert_frame_equal(
        compare(nn.DataParallel(pair[0]), torch.compile(pair[1]), [IMAGES], "layer?.?"), want, rtol=1e-6
    )
    low = compare(copy.deepcopy(pair[0]).bfloat16(), pair[1], [IMAGES], "layer?.?")
    assert np.abs(low - want).values.max() < 0.05


@pytest.mark.cuda
def test_devices_may_differ(pair):
    want = compare(*pair, [IMAGES], "layer?.?")
    got = compare(copy.deepcopy(pair[0]).cuda(), pair[1], [IMAGES], "layer?.?")
    assert np.abs(got - want).values.max() < 1e-3


# ---- memory


class Peak(TorchDispatchMode):
    "Bytes of the tensors that live at once and were not there before; views are counted once."

    def __init__(self, *before):
        super().__init__()
        self.live, self.now, self.most = {t.untyped_storage()._cdata: 0 for t in before}, 0, 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if not isinstance(t, torch.Tensor):
                continue
            storage = t.untyped_storage()
            if storage._cdata in self.live:
                continue
            self.live[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self.gone, storage._cdata)
        self.most = max(self.most, self.now)
        return out

    def gone(self, key):
        self.now -= self.live.pop(key, 0)


def test_relations_of_a_wide_layer_hold_one_block():
    x = torch.randn(8, 64, 100, 100)  # 20 MB
    for layout in (x, x.to(memory_format=torch.channels_last)):
        with Peak(layout) as peak:
            relations(layout, block=2**16)
        assert peak.most < 12 * 2**16


@pytest.mark.parametrize("budget", [2 * 2**20, 8 * 2**20, 32 * 2**20])
def test_budgets_are_kept_and_stated(pair, budget):
    class Nothing(nn.Module):  # networks whose forward holds nothing of its own
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Identity() for _ in range(20))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    images = torch.randn(300, 2000)
    with Peak(images) as peak:
        frame = compare(Nothing(), Nothing(), [images], budget=budget)
    assert peak.most <= budget
    assert frame.attrs["budget"] == budget and frame.attrs["samples"] == 300 and np.allclose(frame, 1)
    assert memory_needed(frame.attrs["largest_batch"], 40, 0) <= budget


def test_a_budget_too_small_says_what_would_do(pair):
    with pytest.raises(ValueError, match="give at least (\\d+)") as e:
        compare(*pair, [IMAGES], budget=1000)
    enough = int(str(e.value).split("at least ")[1].split(",")[0])
    assert compare(*pair, [IMAGES], budget=enough).attrs["samples"] == 36


@given(st.integers(4, 400), st.integers(7, 60))
def test_parts_are_neither_too_large_nor_too_small(n, most):
    from rcka.analysis.compare import _parts

    sizes = [len(p) for p in _parts(torch.zeros(n, 1), most)]
    assert sum(sizes) == n and max(sizes) <= max(most, 4) and min(sizes) >= min(n, 4)


# ---- files and pictures


@pytest.mark.parametrize("suffix", ["json", "csv"])
def test_files_bring_back_every_bit(pair, tmp_path, suffix):
    frame = compare(*pair, [IMAGES], names=('a "teacher", big', "b"))
    save_comparison(frame, tmp_path / f"x.{suffix}")
    back = load_comparison(tmp_path / f"x.{suffix}")
    pd.testing.assert_frame_equal(back, frame, check_exact=True)
    assert back.attrs == frame.attrs and list(tmp_path.iterdir()) == [tmp_path / f"x.{suffix}"]
    text = (tmp_path / f"x.{suffix}").read_text()
    for broken in [text[: len(text) // 50], "", "{}", "# {}\n,a\nb,1\n", text.replace('"format": 1', '"format": 2')]:
        (tmp_path / "broken").write_text(broken)
        with pytest.raises(ValueError, match="broken is not a comparison"):
            load_comparison(tmp_path / "broken")


def test_pictures_show_the_numbers_of_their_frame(pair, tmp_path):
    frame = compare(*pair, [IMAGES], "layer?.?", names=("big", "small"))
    ax = plot_similarity(frame)
    assert np.allclose(ax.images[0].get_array(), frame) and (ax.get_ylabel(), ax.get_xlabel()) == ("big", "small")
    assert [t.get_text() for t in ax.get_xticklabels()] == list(frame.columns)
    axes = plot_before_after(pd.concat({"alone": frame, "taught": frame + 0.1}))
    assert (
        len(axes) == 3
        and np.allclose(axes[2].images[0].get_array(), 0.1)
        and axes[2].get_title() == "taught less alone"
    )
    grams = gram_frame({"big": pair[0], "small": pair[1]}, IMAGES, torch.arange(36) % 3, "fc")
    both = (grams["big"].values * grams["small"].values).sum()
    assert both == pytest.approx(compare(*pair, [IMAGES], "fc", unbiased=False).iloc[0, 0], abs=1e-6)
    assert len(plot_grams(grams)) == 2
    runs = pd.DataFrame(
        {
            "method": list("aabbcc"),
            "seconds": range(6),
            "top1": [5, 6, 4, 5, 9, 9],
            "similarity": range(6),
            "epoch": [1, 2] * 3,
        }
    )
    assert "+0.50 over 3" in plot_predicts(runs).get_title()
    assert list(plot_cost(runs).lines[0].get_ydata()) == [5.5, 5.5, 9]
    assert len(plot_along(runs).lines) == 3
    classes = class_relations({"big": pair[0], "small": pair[1]}, [IMAGES], [str(i) for i in range(10)])
    assert np.allclose(np.diag(classes["big"]), 1) and len(plot_class_relations(classes)) == 1
    first, again = (save_figure(plot_similarity(frame), tmp_path / name) for name in ("a", "b"))
    assert [p.suffix for p in first] == [".png", ".svg"] and all(
        p.read_bytes() == q.read_bytes() for p, q in zip(first, again)
    )


def test_names_beside_points_touch_neither_points_nor_each_other():
    "Five methods near one another, as in the runs on digits."
    near = {"kd": (0.86, 90.8), "rkd": (0.87, 88.4), "rcka": (0.91, 88.6), "fcka": (0.91, 90.5), "sp": (0.71, 59.1)}
    runs = pd.DataFrame([{"method": m, "similarity": x, "top1": y} for m, (x, y) in near.items()])
    ax = plot_predicts(runs)
    boxes = [text.get_window_extent() for text in ax.texts]
    assert [text.get_text() for text in ax.texts] == list(near)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    points = ax.transData.transform(list(near.values()))
    assert not any(box.contains(*point) for box in boxes for point in points)


def test_rank_correlation_is_pearsons_of_ranks():
    for x, y in [([1, 2, 3, 4], [4, 3, 1, 2]), ([1, 1, 2, 5], [0, 3, 3, 3]), ([0.1, 0.5, 0.2], [3, 2, 9])]:
        assert rank_correlation(x, y) == pytest.approx(pd.Series(x).rank().corr(pd.Series(y).rank()))
    with pytest.warns(match="constant"):
        assert math.isnan(rank_correlation([1, 1], [1, 2]))


def test_ten_lines_in_a_strangers_project(tmp_path):
    "As in the README, with networks and images of a size for a test."
    import torch
    import torchvision

    from rcka.analysis.compare import compare, save_comparison
    from rcka.analysis.plots import plot_similarity, save_figure

    one = torchvision.models.resnet18(weights=None)  # your networks, on any device
    other = torchvision.models.mobilenet_v3_small(weights=None)
    loader = torch.utils.data.DataLoader(
        torch.randn(16, 3, 64, 64), batch_size=8
    )  # your loader: images, or (images, ...)
    frame = compare(
        one, other, loader, layers="layer*.bn?", layers_b="features.*.0.1"
    )  # a pandas table: rows of one, columns of other
    save_comparison(frame, tmp_path / "similarity.csv")
    save_figure(plot_similarity(frame), tmp_path / "similarity")  # similarity.png and similarity.svg

    assert frame.shape[0] == 16 and frame.shape[1] > 10 and np.isfinite(frame.values).all()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["similarity.csv", "similarity.png", "similarity.svg"]
