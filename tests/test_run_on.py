"""Methods that run parts of the networks: FCFD against its formula written with the layers of both networks one after
another, CrossKD against its formula anchor by anchor; what they leave as it was; what they refuse."""

import copy
import math

import pytest
import torch
from interruption import interrupt_at
from torch import nn
from torchvision.models import VisionTransformer

from rcka.core import FeaturePaths, Outputs
from rcka.data.datasets import load_dataset
from rcka.features import Taps, feature_paths
from rcka.methods.base import create_method
from rcka.methods.features import paper_args
from rcka.methods.features_recent import bridge, match_moments
from rcka.models.registry import create_model, list_models
from rcka.pair import Pair
from rcka.train.classification import Distiller
from rcka.train.config import TrainConfig
from rcka.train.learner import Trainer, fit_many
from rcka.train.teacher_cache import TeacherCache, load_teacher, save_teacher

CLASSES = 6


def images(n=6, size=16):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(3))


def networks(student="resnet8", teacher="resnet14"):
    torch.manual_seed(0)
    return [create_model(name, CLASSES) for name in (student, teacher)]


# Taps.run_on


FEW = ("resnet8", "wrn_16_1", "vgg8", "mobilenet_v2_half", "shufflenet_v1", "shufflenet_v2")
OTHERS = sorted({*list_models()} - {*FEW})


@pytest.mark.parametrize("name", [*FEW, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_networks_run_on_from_every_stage_to_their_own_logits(name):
    torch.manual_seed(0)
    network = create_model(name, CLASSES).eval()
    paths = feature_paths(network).stages
    with Taps(network, paths) as taps, torch.no_grad():
        whole = taps(images(3, 32))
        for i, path in enumerate(paths):
            on = taps.run_on(path, whole.features[i])
            torch.testing.assert_close(on.logits, whole.logits)
            assert all(f.numel() == 0 for f in on.features[:i])
            for got, want in zip(on.features[i:], whole.features[i:], strict=True):
                torch.testing.assert_close(got, want)
        again = taps(images(3, 32))
    assert torch.equal(again.logits, whole.logits)


def test_the_gradient_passes_through_the_layers_that_follow_alone():
    network = create_model("resnet8", CLASSES)
    with Taps(network, ["layer1", "layer2"]) as taps:
        feature = taps(images()).features[0].detach().requires_grad_()
        taps.run_on("layer1", feature).logits.sum().backward()
    assert feature.grad.any() and network.layer2[0].conv1.weight.grad.any()
    assert network.conv1.weight.grad is None or not network.conv1.weight.grad.any()


def test_what_cannot_be_run_on_is_said():
    network = create_model("resnet8", CLASSES)
    with Taps(network, ["layer1", "fc:input"]) as taps:
        with pytest.raises(RuntimeError, match="run the network on images before"):
            taps.run_on("layer1", torch.zeros(2, 16, 4, 4))
        taps(images())
        with pytest.raises(ValueError, match="output of a module alone; got the path 'fc:input'"):
            taps.run_on("fc:input", torch.zeros(2, 64))
        with pytest.raises(ValueError, match=r"returns \(16, 16, 16\) for each image, got \(3, 4, 4\)"):
            taps.run_on("layer1", torch.zeros(2, 3, 4, 4))
        assert taps(images()).logits.isfinite().all()  # they work afterwards


# FCFD


def naive_fcfd(pair, student, teacher, x, paths, weight, tau):
    "The terms with the layers of the two networks called by name, all in the mode of training."
    stages = lambda net, z: {"layer1": net.layer1, "layer2": net.layer2, "layer3": net.layer3}[z]
    names = ("layer1", "layer2", "layer3")

    def run(net, feature, after):
        maps = []
        for name in names[after:]:
            feature = stages(net, name)(feature)
            maps.append(feature)
        return maps, net.fc(feature.mean((2, 3)))

    def kl(z, target):
        loss = 0
        for a, b in zip(z, target):
            q, p = (b / tau).softmax(0), (a / tau).softmax(0)
            loss = loss + tau**2 * sum(u * (u / v).log() for u, v in zip(q, p)) / len(z)
        return loss

    def error(a, b, last):
        loss = ((a - b) ** 2).sum() / b.numel()
        if last:
            means = a.clamp_min(0).mean((2, 3)) - b.clamp_min(0).mean((2, 3))
            loss = loss + (means**2).sum() / means.numel()
        return loss

    stem = lambda net: net.conv1(x).relu() if isinstance(net.bn1, nn.Identity) else net.bn1(net.conv1(x)).relu()
    ours, z = run(student, stem(student), 0)
    with torch.no_grad():
        theirs, target = run(teacher, stem(teacher), 0)
    method = pair.method
    bridged = [b(s) for b, s in zip(method.to_teacher, ours)]
    maps = sum(error(b, t, i == 2) for i, (b, t) in enumerate(zip(bridged, theirs)))
    mixed = 0
    for to_teacher, l in paths:
        if to_teacher:
            found, logits = run(teacher, bridged[l], l + 1)
            maps = maps + sum(error(f, theirs[l + 1 + k], l + 1 + k == 2) for k, f in enumerate(found))
        else:
            _, logits = run(student, method.to_student[l](theirs[l]), l + 1)
        mixed = mixed + kl(logits, target)
    return {"fcfd_kd": kl(z, target), "fcfd_maps": weight * maps, "fcfd_mixed": mixed}


def fcfd_pair(args=None, dtype=torch.float64, names=("resnet8", "resnet14")):
    student, teacher = (net.to(dtype) for net in networks(*names))
    pair = Pair(student, teacher, create_method("fcfd", args), images().to(dtype))
    pair.method.to(dtype)
    return pair, student, teacher


@pytest.mark.parametrize("drawn", [[0, 1, 2, 3], [3, 0], [2, 1], [1], []])
def test_fcfd_against_the_layers_called_by_hand(drawn, monkeypatch):
    pair, student, teacher = fcfd_pair({"paths": len(drawn), "temperature": 3.0, "weight": 0.7})
    monkeypatch.setattr("rcka.methods.features_recent.draw_paths", lambda n, most: drawn[:most] if n == 4 else 1 / 0)
    x = images().double()
    terms = pair(x)
    own = torch.autograd.grad(sum(terms.values()), list(student.parameters()), allow_unused=True)
    teacher.train()  # the statistics of the batch
    expected = naive_fcfd(pair, student, teacher, x, [(p < 2, p % 2) for p in drawn], 0.7, 3.0)
    theirs = torch.autograd.grad(sum(expected.values()), list(student.parameters()), allow_unused=True)
    for key, value in terms.items():
        torch.testing.assert_close(value, expected[key])
    assert ("fcfd_mixed" in terms) == bool(drawn)
    for a, b in zip(own, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "names",
    [
        ("resnet8", "resnet14"),
        ("wrn_16_1", "wrn_16_2"),
        ("shufflenet_v1", "resnet8x4"),
        ("vgg8", "vgg8"),
        ("mobilenet_v2_half", "vgg8"),
    ],
)
def test_fcfd_reaches_the_student_and_leaves_the_teacher(names):
    student, teacher = networks(*names)
    before = copy.deepcopy(teacher.state_dict())
    with Pair(student, teacher, create_method("fcfd", {"paths": 99}), images(6, 32)) as pair:
        assert all(v.eq(0).all() for k, v in student.state_dict().items() if k.endswith("num_batches_tracked"))
        terms = pair(images(6, 32), torch.arange(6))
        assert set(terms) == {"ce", "fcfd_kd", "fcfd_maps", "fcfd_mixed"}
        sum(v for k, v in terms.items() if k != "ce").backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in pair.parameters())
        assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
        assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
        # one forward pass of the student has entered its running statistics, none of the mixed paths
        assert all(v.eq(1).all() for k, v in student.state_dict().items() if k.endswith("num_batches_tracked"))
        copied = copy.deepcopy(pair.method)
        assert copied.run_student.taps.model is not student
    assert not any(m._forward_hooks for net in (student, teacher) for m in net.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fcfd_under_autocast_and_with_a_teacher_in_half_precision(dtype):
    student, teacher = networks()
    pair = Pair(student, teacher.to(dtype), create_method("fcfd", {"paths": 4}), images(6, 32))
    with torch.autocast("cpu", torch.bfloat16):
        terms = pair(images(6, 32), torch.arange(6))
    sum(terms.values()).backward()
    assert all(v.isfinite() and v.dtype == torch.float32 for v in terms.values())
    assert all(p.grad.isfinite().all() for p in pair.parameters())


def test_fcfd_warms_up_and_adds_up():
    pair, *_ = fcfd_pair({"warmup": 4, "paths": 0})
    full = pair(images().double())["fcfd_maps"]
    pair.method.set_epoch(0)
    torch.testing.assert_close(pair(images().double())["fcfd_maps"], full / 4)
    student, teacher = networks()
    both = create_method("at+fcfd+rkd", {"fcfd.paths": 4})
    pair = Pair(student, teacher, both, images())
    alone = create_method("fcfd", {"paths": 4})
    other = Pair(*networks(), alone, images())
    alone.load_state_dict(both.parts[1].state_dict())
    x, y = images(), torch.arange(6)
    for key, value in other(x, y).items():
        if key != "ce":
            torch.testing.assert_close(pair(x, y)[key], value)


def test_fcfd_draws_paths_without_repeating_one():
    from rcka.methods.features_recent import draw_paths

    torch.manual_seed(0)
    seen = [tuple(draw_paths(4, 2)) for _ in range(200)]
    assert all(len(set(p)) == 2 and set(p) <= {0, 1, 2, 3} for p in seen) and len(set(seen)) == 12
    assert sorted(draw_paths(3, 9)) == [0, 1, 2] and draw_paths(0, 2) == []


def test_fcfd_refuses_what_it_cannot_run():
    class Skips(nn.Module):
        "The classifier reads the first stage, too: nothing in it is a network from the first stage on."

        def __init__(self, width):
            super().__init__()
            self.stem, self.a = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
            self.b, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(16, CLASSES)
            self.layers = FeaturePaths(("stem", "a", "b"), (), "fc:input", "fc")

        def forward(self, x):
            stem = self.stem(x)
            return self.fc(torch.cat([self.b(self.a(stem)).mean((2, 3)), stem.mean((2, 3))], 1))

    class Reads(Skips):
        "Reads its images again at the end, in as many rows as the layers return."

        def forward(self, x):
            later = self.b(self.a(self.stem(x))).mean((2, 3))
            return self.fc(torch.cat([later, x.mean((1, 2, 3))[:1, None].expand(len(later), 8)], 1))

    torch.manual_seed(0)
    for network in (Skips(8), Reads(8)):
        with pytest.raises(ValueError, match="fcfd cannot run the teacher on from its feature 0"):
            Pair(Small(8), network, "fcfd", images())
        with pytest.raises(ValueError, match="fcfd cannot run the student on from its feature 0"):
            Pair(network, Small(8), "fcfd", images())
    with pytest.raises(ValueError, match="output of a module alone"):
        Pair(Small(8), Small(8), "fcfd", images(), ["b:input", "b"], ["b:input", "b"])
    shape = dict(image_size=16, patch_size=4, num_layers=3, num_heads=2, hidden_dim=8, mlp_dim=8)
    tokens = VisionTransformer(**shape, num_classes=CLASSES)
    with pytest.raises(
        ValueError, match="got the path 'encoder.layers.encoder_layer_0:map'.*fcfd needs networks whose"
    ):
        Pair(
            tokens,
            Small(8),
            "fcfd",
            images(),
            ["encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_2"],
            ["a", "b"],
        )
    with pytest.raises(ValueError, match=r"twice as large; got \(16, 16\) and \(4, 4\)"):
        Pair(*networks("resnet8", "resnet8"), "fcfd", images(), ["layer1", "layer3"], ["layer3", "layer3"])
    with pytest.raises(ValueError, match="compares feature maps"):
        Pair(*networks(), "fcfd", images(), ["fc:input"], ["fc:input"])


class Small(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.stem, self.a = nn.Conv2d(3, width, 1), nn.Conv2d(width, width, 3, padding=1)
        self.b, self.fc = nn.Conv2d(width, width, 3, padding=1), nn.Linear(width, CLASSES)
        self.layers = FeaturePaths(("stem", "a", "b"), (), "fc:input", "fc")

    def forward(self, x):
        return self.fc(self.b(self.a(self.stem(x)).relu_()).mean((2, 3)))  # overwrites the output of `a`


def test_fcfd_keeps_what_later_layers_overwrite():
    torch.manual_seed(0)
    pair = Pair(Small(4), Small(6), create_method("fcfd", {"paths": 2}), images())
    for _ in range(2):
        terms = pair(images(), torch.arange(6))
        sum(terms.values()).backward()
    assert pair.student.stem.weight.grad.any() and all(v.isfinite() for v in terms.values())


@pytest.mark.parametrize(
    ("source", "target", "kind"), [(8, 8, nn.Conv2d), (8, 4, nn.Conv2d), (4, 8, nn.ConvTranspose2d)]
)
def test_bridges_bring_maps_to_the_other_size(source, target, kind):
    x, y = torch.rand(2, 3, source, source), torch.rand(2, 5, target, target)
    for other, parts in ((y, 3), (-y, 2)):  # a leaky ReLU at the end where the target comes out of a ReLU
        module = bridge(x, other)
        assert module(x).shape == y.shape and isinstance(module[0], kind) and len(module) == parts


def test_the_authors_weights_for_a_pair():
    assert paper_args("fcfd", "vgg13", "vgg8") == {}
    assert paper_args("fcfd", "wrn_40_2", "wrn_16_2") == {"mixed": 0.2}
    assert paper_args("fcfd", "resnet56", "resnet20") == {"weight": 0.02}
    assert paper_args("fcfd", "resnet32x4", "shufflenet_v2") == {"temperature": 8.0}


# FCFD in training


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits", limit=96, test_limit=60)


def trainer(data, folder, seed=1, method="fcfd", **config):
    torch.manual_seed(seed)
    student = create_model("resnet8", data.num_classes, data.channels)
    torch.manual_seed(0)
    teacher = create_model("resnet14", data.num_classes, data.channels)
    task = Distiller(student, create_method(method, {"warmup": 1} if method == "fcfd" else None), teacher)
    config = TrainConfig(**({"epochs": 3, "lr": 0.02} | config))
    return Trainer(task, data.batches(32), data.batches(train=False), config, folder)


def weights(trainer):
    return {**trainer.task.student.state_dict(), **{f"m.{k}": v for k, v in trainer.task.method.state_dict().items()}}


def test_fcfd_trains_and_resumes_to_the_same_bits(digits, tmp_path):
    whole = trainer(digits, tmp_path / "whole")
    rows = whole.fit(progress=False)
    assert all(math.isfinite(v) for row in rows for v in row.values())
    assert rows[-1]["loss"] < rows[0]["loss"]
    part = trainer(digits, tmp_path / "part")
    interrupt_at(part, 5)
    with pytest.raises(KeyboardInterrupt):
        part.fit(progress=False)
    again = trainer(digits, tmp_path / "part")
    again.fit(progress=False)
    one, two = weights(whole), weights(again)
    assert any(k.startswith("m.to_student") for k in one)
    assert all(torch.equal(v, two[k]) for k, v in one.items())


def test_fcfd_shares_a_teacher_and_ends_with_the_bits_of_a_run_alone(digits, tmp_path):
    alone = trainer(digits, tmp_path / "alone", epochs=2)
    alone.fit(progress=False)
    first, many = trainer(digits, tmp_path / "x"), []
    for method in ("fcfd", "kd"):
        one = trainer(digits, tmp_path / method, method=method, epochs=2)
        task = Distiller(one.task.student, one.task.method, first.task.teacher)
        many.append(Trainer(task, first.train, first.test, one.config, tmp_path / f"many-{method}"))
    fit_many(many, progress=False)
    assert all(torch.equal(v, weights(many[0])[k]) for k, v in weights(alone).items())


def test_fcfd_needs_the_teacher_itself(digits, tmp_path):
    "Neither a cache nor a file of its outputs; said before anything is trained."
    one, train = trainer(digits, tmp_path / "one"), digits.batches(32, views=2)
    cache = TeacherCache(one.task.teacher, train, ["layer1", "layer2", "layer3"])
    refused = pytest.raises(ValueError, match="fcfd runs the teacher's layers on the student's features")
    with refused:
        Trainer(one.task, train, one.test, one.config, tmp_path / "cached", teacher_cache=cache)
    save_teacher(tmp_path / "t.safetensors", cache, one.test)
    stored = load_teacher(tmp_path / "t.safetensors")
    with refused:
        task = Distiller(one.task.student, create_method("fcfd"), stored, teacher_paths=["layer1", "layer2", "layer3"])
        Trainer(task, train, one.test, one.config, tmp_path / "file").fit(progress=False)
    assert not list(tmp_path.glob("file/*.csv"))
    with pytest.raises(ValueError, match="fcfd runs the layers of both networks, and got none"):
        outputs = Outputs(torch.zeros(2, CLASSES), (torch.zeros(2, 3, 4, 4),))
        create_method("fcfd").build(outputs, outputs)


# CrossKD


def detectors(kind):
    create_detector = pytest.importorskip("rcka.models.detectors").create_detector
    torch.manual_seed(0)
    width, extra = (64, {"head_convs": 4}) if kind == "fcos" else (16, {})
    found = [create_detector(kind, "mobilenet_v3_small", 3, channels=width, norm="group", **extra) for _ in range(2)]
    with torch.no_grad():  # predictions of some size, not those of a head that has not learnt
        for d in found:
            for m in d.head.modules():
                if isinstance(m, nn.Conv2d):
                    m.weight.normal_(std=(1 / m.weight[0].numel()) ** 0.5)
                    m.bias.normal_(std=0.2)
            if kind == "fcos":
                d.head.regression_head.bbox_reg.bias.add_(1.5)
    return [d.double().eval() for d in found]


def scene():
    generator = torch.Generator().manual_seed(2)
    pictures = [torch.rand(3, 64, 96, generator=generator, dtype=torch.float64) for _ in range(2)]
    boxes = [[[10.0, 12, 42, 44], [30, 8, 80, 60]], []]  # the second image shows nothing
    labels = [[2, 3], []]
    target = [
        {
            "boxes": torch.tensor(b, dtype=torch.float64).view(-1, 4),
            "labels": torch.tensor(k, dtype=torch.int64),
            "input_size": (64, 96),
        }
        for b, k in zip(boxes, labels)
    ]
    return pictures, target


def levels_of(detector, pictures):
    trunk = pytest.importorskip("rcka.models.detectors").Trunk
    return Outputs(None, tuple(trunk(detector)(pictures).values()))


def its_anchors(detector, pictures, target):
    "The anchors that the detector itself makes when it trains, (anchors, 4)."
    seen = []
    handle = detector.anchor_generator.register_forward_hook(lambda m, args, found: seen.append(found))
    with torch.no_grad():
        detector.eval()(pictures)
    handle.remove()
    return seen[0][0].double()


def naive_weights(kind, anchors, target, sizes):
    "Which anchors count, image by image, and the number that sums are divided by."
    from torchvision.ops import box_iou

    counts, number = [], 0.0
    for t in target:
        boxes = t["boxes"]
        count = torch.ones(len(anchors), dtype=torch.float64)
        if kind == "retinanet":
            positive = torch.zeros(len(anchors), dtype=torch.bool)
            if len(boxes):
                iou = box_iou(anchors, boxes)
                best = iou.max(1).values
                closest = (iou == iou.max(0).values).any(1)  # of each box, however little they overlap
                positive = (best >= 0.5) | closest
                count[(best >= 0.4) & ~positive] = 0
            number += max(1, int(positive.sum()))
        else:
            first, last = sizes[0], len(anchors) - sizes[-1]
            for i, a in enumerate(anchors):
                x, y, side = (a[0] + a[2]) / 2, (a[1] + a[3]) / 2, a[2] - a[0]
                found = []
                for x0, y0, x1, y1 in boxes:
                    sides = torch.stack([x - x0, x1 - x, y - y0, y1 - y])
                    near = max(abs(x - (x0 + x1) / 2), abs(y - (y0 + y1) / 2)) < 1.5 * side
                    low, high = 0 if i < first else 4 * side, math.inf if i >= last else 8 * side
                    if near and sides.min() > 0 and low < sides.max() < high:
                        found.append(((x1 - x0) * (y1 - y0), sides))
                if found:
                    left, right, up, down = min(found, key=lambda pair: pair[0])[1]
                    number += math.sqrt(min(left, right) / max(left, right) * min(up, down) / max(up, down))
        counts.append(count)
    return torch.cat(counts), number


def naive_crosskd(kind, ours, theirs, student, teacher, target, anchors, k):
    from torchvision.ops import box_iou, generalized_box_iou

    def layers(head):
        "The convolutions of a head, each with its norm, without the activation."
        if kind == "retinanet":
            return [nn.Sequential(*list(block)[:-1]) for block in head.conv]
        return [head.conv[3 * i : 3 * i + 2] for i in range(len(head.conv) // 3)]

    def branch(name, last):
        own, other = (layers(getattr(d.head, name)) for d in (ours, theirs))
        crossed, expected = [], []
        for s, t in zip(student.features, teacher.features):
            for i in range(k):
                s, t = own[i](s.relu() if i else s), other[i](t.relu() if i else t)
            columns = []
            for a, b in zip(s.movedim(1, 0), t.movedim(1, 0)):  # channel by channel
                n = a.numel()
                a, mean, spread = a - a.sum() / n, b.sum() / n, (b - b.sum() / n).pow(2).sum() / (n - 1)
                columns.append(a / (((a**2).sum() / (n - 1)).sqrt() + 1e-6) * spread.sqrt() + mean)
            for x, out in ((torch.stack(columns, 1), crossed), (t, expected)):
                for i in range(k, len(other)):
                    x = other[i](x.relu() if i else x)
                x = last(getattr(theirs.head, name))(x.relu())
                size = 4 if name == "regression_head" else 3 + 1
                rows = [
                    x[:, a * size : (a + 1) * size].permute(0, 2, 3, 1).flatten(1, 2) for a in range(x.shape[1] // size)
                ]
                out.append(torch.stack(rows, 2).flatten(1, 2))
        return torch.cat(crossed, 1).flatten(0, 1), torch.cat(expected, 1).flatten(0, 1), [x.shape[1] for x in crossed]

    z, p, sizes = branch("classification_head", lambda head: head.cls_logits)
    counts, number = naive_weights(kind, anchors, target, sizes)
    p, q = p.sigmoid(), z.sigmoid()
    classes = ((p - q).abs() * -(p * q.log() + (1 - p) * (1 - q).log())).sum(1)
    a, b, _ = branch("regression_head", lambda head: head.bbox_reg)
    every = anchors.repeat(2, 1)
    size, centre = every[:, 2:] - every[:, :2], (every[:, 2:] + every[:, :2]) / 2
    if kind == "retinanet":
        box = lambda d: torch.cat(
            [
                centre + d[:, :2] * size - (d[:, 2:].exp() * size) / 2,
                centre + d[:, :2] * size + (d[:, 2:].exp() * size) / 2,
            ],
            1,
        )
        loss = 1 - generalized_box_iou(box(a), box(b)).diagonal()
    else:
        box = lambda d: torch.cat([centre - d[:, :2].relu() * size, centre + d[:, 2:].relu() * size], 1)
        loss = -box_iou(box(a), box(b)).diagonal().clamp_min(1e-6).log()
    boxes = counts * p.max(1).values * loss
    return {"crosskd_classes": (counts * classes).sum() / number, "crosskd_boxes": boxes.sum() / number}


@pytest.mark.parametrize(
    ("kind", "convolutions"),
    [
        ("fcos", 2),
        *(pytest.param("fcos", i, marks=pytest.mark.slow) for i in (0, 4)),
        *(pytest.param("retinanet", i, marks=pytest.mark.slow) for i in (0, 2, 3, 4)),
    ],
)
def test_crosskd_against_the_formula(kind, convolutions):
    ours, theirs = detectors(kind)
    pictures, target = scene()
    student, teacher = levels_of(ours, pictures), levels_of(theirs, pictures)
    method = create_method("crosskd", {"classification": 0.5, "regression": 2.0, "convolutions": convolutions})
    method.build(student, teacher, detectors=(ours, theirs))
    terms = method.terms(student, teacher, target)
    expected = naive_crosskd(
        kind, ours, theirs, student, teacher, target, its_anchors(ours, pictures, target), convolutions
    )
    torch.testing.assert_close(terms["crosskd_classes"], 0.5 * expected["crosskd_classes"], rtol=1e-5, atol=0)
    torch.testing.assert_close(terms["crosskd_boxes"], 2 * expected["crosskd_boxes"], rtol=1e-5, atol=0)
    parameters = [p for p in ours.parameters() if p.requires_grad]
    found = [
        torch.autograd.grad(sum(t.values()), parameters, allow_unused=True, retain_graph=True)
        for t in (terms, {"a": 0.5 * expected["crosskd_classes"], "b": 2 * expected["crosskd_boxes"]})
    ]
    scale = max(g.abs().max().item() for g in found[1] if g is not None)
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * scale)


@pytest.mark.parametrize("kind", ["retinanet", "fcos"])
def test_crosskd_reaches_the_head_up_to_the_crossing_and_leaves_the_teacher(kind):
    ours, theirs = detectors(kind)
    theirs.requires_grad_(False)
    pictures, target = scene()
    student, teacher = levels_of(ours, pictures), levels_of(theirs, pictures)
    method = create_method("crosskd", {"convolutions": 2})
    before = copy.deepcopy(theirs.state_dict())
    method.build(student, teacher, detectors=(ours, theirs))
    assert not list(method.parameters()) and not method.state_dict()
    sum(method.terms(student, teacher, target).values()).backward()
    reached = {n for n, p in ours.head.named_parameters() if p.grad is not None and p.grad.any()}
    step = 1 if kind == "retinanet" else 3
    for branch in ("classification_head", "regression_head"):
        index = {int(n.split(".")[2]) for n in reached if n.startswith(branch)}
        assert index and max(index) < 2 * step
    assert all(p.grad is not None for n, p in ours.backbone.named_parameters() if p.requires_grad and "fpn" in n)
    assert all(p.grad is None for p in theirs.parameters())
    assert all(torch.equal(v, before[k]) for k, v in theirs.state_dict().items())
    # nothing to learn where both are the same
    method.build(teacher, teacher, detectors=(theirs, copy.deepcopy(theirs)))
    assert all(v.abs() < 1e-4 for v in method.terms(teacher, teacher, target).values())


def test_matched_moments_of_constant_channels_and_single_places_are_finite():
    for shape, value in (((2, 3, 4, 4), 0.3), ((1, 3, 1, 1), None)):
        x = (torch.randn(shape) if value is None else torch.full(shape, value)).requires_grad_()
        y = torch.randn(shape)
        out = match_moments(x, y)
        out.sum().backward()
        assert out.isfinite().all() and x.grad.isfinite().all()
        torch.testing.assert_close(out.mean((0, 2, 3)), y.mean((0, 2, 3)))
    x, y = torch.randn(2, 5, 6, 6), 3 * torch.randn(2, 5, 3, 3) + 1
    torch.testing.assert_close(
        torch.std_mean(match_moments(x, y), (0, 2, 3)), torch.std_mean(y, (0, 2, 3)), rtol=1e-4, atol=1e-4
    )


def test_crosskd_refuses_what_it_cannot_run():
    (ours, theirs), (other, _) = detectors("retinanet"), detectors("fcos")
    create_detector = pytest.importorskip("rcka.models.detectors").create_detector
    pictures, target = scene()
    student, teacher = levels_of(ours, pictures), levels_of(theirs, pictures)
    build = lambda *pair, **args: create_method("crosskd", args).build(student, teacher, detectors=pair)
    for pair, got in (((ours, other), "RetinaNet and FCOS"), ((ours, nn.Linear(1, 1)), "RetinaNet and Linear")):
        with pytest.raises(ValueError, match=f"both of one kind; got {got}"):
            build(*pair)
    two_stage = create_detector("faster_rcnn", "mobilenet_v3_small", 3, channels=64, norm="group")
    with pytest.raises(ValueError, match="got FasterRCNN and FasterRCNN"):
        build(two_stage, two_stage)
    with pytest.raises(ValueError, match="convolutions must be 0 to 4, those of the heads; got 5"):
        build(ours, theirs, convolutions=5)
    more = create_detector("retinanet", "mobilenet_v3_small", 5, channels=16, norm="group")
    with pytest.raises(ValueError, match="predictions at the same anchors"):
        build(ours, more)
    wide = create_detector("retinanet", "mobilenet_v3_small", 3, channels=32, norm="group").double()
    with pytest.raises(ValueError, match="heads of one width"):
        create_method("crosskd").build(student, levels_of(wide, pictures), detectors=(ours, wide))
    method = create_method("crosskd+pkd")
    both = lambda o: Outputs(None, o.features + o.features[:4])
    method.build(both(student), both(teacher), detectors=(ours, theirs))
    terms = method.terms(both(student), both(teacher), target)
    assert set(terms) == {"crosskd_classes", "crosskd_boxes", "pkd"}
    with pytest.raises(ValueError, match="crosskd needs a target for each of the 2 images"):
        method.terms(both(student), both(teacher), target[:1])
