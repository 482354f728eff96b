"Scenes with masks: layout, ids, bad input, the loss and the score against naive ones, networks, resuming."

import json
import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from interruption import interrupt_at
from PIL import Image
from processes import launch
from torch import nn

from rcka.core import FeaturePaths
from rcka.data.scenes import IGNORED, SceneBatch, label_table, load_scenes, read_scene, scenes_from_boxes, window
from rcka.distributed import average_gradients, rank, shard
from rcka.experiments.experiment import run
from rcka.experiments.segmentation import SegmentationExperiment
from rcka.methods.base import create_method
from rcka.models.segmenters import create_segmenter, segmenter_paths
from rcka.train.checkpoint import checkpoints
from rcka.train.config import TrainConfig
from rcka.train.learner import Trainer
from rcka.train.segmentation import SegmentationDistiller, confusion, evaluate_segmentation, iou, pixel_ce

SIZE, COLOURS = (24, 40), {7: (90, 90, 90), 23: (120, 160, 190), 26: (150, 40, 40)}


def draw(root, part, n, seed=0, form="labelIds", size=SIZE):
    "Scenes of sky, road and a car, in Cityscapes' layout and label ids."
    g = np.random.default_rng(seed)
    for k in range(n):
        ids = np.full(size, 7, np.uint8)
        ids[: size[0] // 2], ids[-2:] = 23, 1
        y, x = g.integers(4, size[0] - 12), g.integers(0, size[1] - 16)
        ids[y : y + 8, x : x + 14] = 26
        rgb = g.integers(0, 50, (*size, 3))
        for label, colour in COLOURS.items():
            rgb[ids == label] += colour
        save(root, part, f"{part}{k}", rgb.astype(np.uint8), ids, form)
    return root


def save(root, part, name, rgb, ids, form="labelIds", city="ulm"):
    for kind, array, end in (("leftImg8bit", rgb, ""), ("gtFine", ids, f"_{form}")):
        path = root / kind / part / city / f"{name}_{kind}{end}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(path)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    draw(root, "train", 10), draw(root, "val", 3, seed=1)
    return root


@pytest.fixture(scope="module")
def scenes(root):
    return load_scenes(f"cityscapes:{root}")


class Tiny(nn.Module):
    "A network that is not of torchvision: two convolutions, and a decode head at half the size."

    def __init__(self, classes=19, width=8, seed=0, stride=2):
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, stride, 1), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout2d(0.1)
        )
        self.body = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.score = nn.Conv2d(width, classes, 1)
        self.layers = FeaturePaths(("stem", "body"), head="score")

    def forward(self, x):
        return {"out": nn.functional.interpolate(self.score(self.body(self.stem(x))), x.shape[-2:], mode="bilinear")}


# the folder


def test_layout(root, scenes):
    assert (len(scenes.train), len(scenes.val), scenes.size, scenes.num_classes) == (10, 3, SIZE, 19)
    assert [p.name for p, _ in scenes.val] == [f"val{k}_leftImg8bit.png" for k in range(3)]
    assert scenes.train[3][1].name == "train3_gtFine_labelIds.png"


def test_ids(root, scenes):
    "Label ids become train ids; the ids around the classes are ignored."
    _, mask = read_scene(scenes.train[0])
    ids = np.asarray(Image.open(scenes.train[0][1]))
    for label, train_id in {7: 0, 23: 10, 26: 13, 1: IGNORED}.items():
        assert (mask[ids == label] == train_id).all()
    assert sorted(set(label_table()[:34].tolist())) == [*range(19), IGNORED]
    assert label_table(5, train_ids=True)[[0, 4, 255]].tolist() == [0, 4, IGNORED]


def test_train_ids_are_taken_first(tmp_path):
    "Where both forms of a mask are there, as the usual script leaves them."
    draw(tmp_path, "train", 2), draw(tmp_path, "val", 2)
    ids = np.full(SIZE, 18, np.uint8)
    ids[0] = 255
    Image.fromarray(ids).save(tmp_path / "gtFine/train/ulm/train1_gtFine_labelTrainIds.png")
    _, mask = read_scene(load_scenes(f"cityscapes:{tmp_path}").train[1])
    assert (mask == ids).all()


def test_own_classes(tmp_path):
    for split in ("train", "val"):
        draw(tmp_path, split, 2, form="labelTrainIds")
    (tmp_path / "classes.txt").write_text("\n".join(f"c{i}" for i in range(27)) + "\n")
    scenes = load_scenes(f"cityscapes:{tmp_path}")
    assert scenes.num_classes == 27 and scenes.classes[26] == "c26"
    assert set(np.unique(read_scene(scenes.train[0], 27)[1])) == {1, 7, 23, 26}
    (tmp_path / "classes.txt").write_text("one\n")
    with pytest.raises(ValueError, match="must name 2 to 253 classes"):
        load_scenes(f"cityscapes:{tmp_path}")


def broken(tmp_path):
    draw(tmp_path, "train", 3), draw(tmp_path, "val", 2)
    return tmp_path


@pytest.mark.parametrize(
    "what, error",
    [
        ("no mask", r"1 of 3 images in train have no mask: .*gtFine/train/ulm/train1_gtFine_labelIds.png"),
        ("size", r"train1_gtFine_labelIds.png has 12 x 12 pixels, but those before it 24 x 40"),
        ("other size", r"val0_leftImg8bit.png has 20 x 40 pixels"),
        ("no images", r"no images .*leftImg8bit/val/CITY"),
        ("broken header", r"train2_leftImg8bit.png cannot be read as an image"),
        (
            "form",
            r"classes.txt needs masks with train ids, but .*train0_gtFine_labelIds.png is not called labelTrainIds",
        ),
    ],
)
def test_what_is_wrong_is_named_when_opened(tmp_path, what, error):
    root = broken(tmp_path)
    mask = root / "gtFine/train/ulm/train1_gtFine_labelIds.png"
    if what == "no mask":
        mask.unlink()
    if what == "size":
        Image.new("L", (12, 12)).save(mask)
    if what == "other size":
        draw(root, "val", 1, size=(20, 40))
    if what == "no images":
        [p.unlink() for p in (root / "leftImg8bit/val/ulm").iterdir()]
    if what == "broken header":
        (root / "leftImg8bit/train/ulm/train2_leftImg8bit.png").write_bytes(b"nothing")
    if what == "form":
        (root / "classes.txt").write_text("a\nb\n")
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        load_scenes(f"cityscapes:{root}")


@pytest.mark.parametrize(
    "what, error",
    [
        ("id", r"train1_gtFine_labelIds.png has unknown label ids: 40, 77; ids must be 0 to 33"),
        ("colours", r"train1_gtFine_labelIds.png has mode RGB, but a mask must have one byte per pixel"),
        ("16 bits", r"train1_gtFine_labelIds.png has mode I;16"),
        ("cut", r"train1_leftImg8bit.png or .* cannot be decoded"),
    ],
)
@pytest.mark.parametrize("memory", [0, 8])
def test_what_is_wrong_is_named_when_decoded(tmp_path, what, error, memory):
    root = broken(tmp_path)
    ids = np.full(SIZE, 7, np.uint8)
    if what == "id":
        ids[3, :2] = 40, 77
    mask = {"colours": Image.new("RGB", SIZE[::-1]), "16 bits": Image.fromarray(ids.astype(np.uint16))}.get(what, ids)
    save(root, "train", "train1", np.zeros((*SIZE, 3), np.uint8), mask)
    if what == "cut":
        image = root / "leftImg8bit/train/ulm/train1_leftImg8bit.png"
        Image.effect_noise(SIZE[::-1], 90).save(image)
        image.write_bytes(image.read_bytes()[:200])
    with pytest.raises(ValueError, match=error):
        list(load_scenes(f"cityscapes:{root}").batches(3, crop=None, memory=memory).epoch())


def test_images_of_other_kinds(tmp_path):
    "Grey and palette images become RGB; a palette mask is its indices."
    root = broken(tmp_path)
    ids = Image.fromarray(np.full(SIZE, 26, np.uint8)).copy()
    ids.putpalette([9] * 768)
    for split in ("train", "val"):
        save(root, split, f"{split}1", Image.new("L", SIZE[::-1], 128), ids)
    rgb, mask = read_scene(load_scenes(f"cityscapes:{root}").train[1])
    assert (rgb == 128).all() and rgb.shape == (*SIZE, 3) and (mask == 13).all()


@pytest.mark.parametrize(
    "bad, error",
    [
        ({"batch_size": 0}, "batch_size must be"),
        ({"crop": (0, 4)}, "crop must be"),
        ({"scales": (0, 1)}, "scales must be"),
        ({"crop": (8.5, 4)}, "crop must be"),
    ],
)
def test_arguments_of_batches(scenes, bad, error):
    with pytest.raises(ValueError, match=error):
        scenes.batches(**{"batch_size": 4, **bad})


# batches


def naive_window(image, mask, scale, corner, flip, crop):
    "Pixel by pixel: where it lies, between which four pixels, or outside."
    (h, w), (H, W) = crop, mask.shape
    origin = [round(math.floor(max(0, scale * n - c)) * share) for n, c, share in zip((H, W), crop, corner)]
    out, classes = np.zeros((len(image), h, w)), np.full((h, w), IGNORED)
    for i, j in product(range(h), range(w)):
        y, x = ((k + 0.5 + o) / scale for k, o in zip((i, w - 1 - j if flip else j), origin))
        if y >= H or x >= W:
            continue
        classes[i, j] = mask[int(y), int(x)]
        y0, x0 = math.floor(y - 0.5), math.floor(x - 0.5)
        for dy, dx in product((0, 1), (0, 1)):
            weight = (1 - abs(y - 0.5 - (y0 + dy))) * (1 - abs(x - 0.5 - (x0 + dx)))
            out[:, i, j] += weight * image[:, min(max(y0 + dy, 0), H - 1), min(max(x0 + dx, 0), W - 1)]
    return out, classes


def test_window():
    g = torch.Generator().manual_seed(0)
    images, masks = (
        torch.rand(6, 2, 13, 18, generator=g),
        torch.randint(0, 19, (6, 13, 18), generator=g, dtype=torch.uint8),
    )
    scale, corner, flip = (
        0.5 + 1.5 * torch.rand(6, generator=g),
        torch.rand(2, 6, generator=g),
        torch.tensor([0, 1] * 3).bool(),
    )
    out, classes = window(images, masks, scale, corner, flip, (11, 14))
    for i in range(6):
        a, b = naive_window(
            images[i].double().numpy(), masks[i].numpy(), scale[i].item(), corner[:, i].tolist(), flip[i], (11, 14)
        )
        assert np.abs(out[i].numpy() - a).max() < 1e-4
        assert (classes[i].numpy() != b).mean() < 0.01  # a pixel on an edge may be rounded to either side
    assert (classes == IGNORED).any() and (classes != IGNORED).any()


def test_an_epoch_depends_on_seed_and_number_alone(scenes):
    make = lambda seed=0, **kw: scenes.batches(4, crop=(16, 24), seed=seed, **kw)
    same = lambda a, b: all(torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q))
    first = list(make().epoch(5))
    other = make(memory=0)
    list(other.epoch(2))
    assert same(first, other.epoch(5)) and same(first[2:], make().epoch(5, start=2))
    assert not same(first, make(seed=1).epoch(5)) and not same(first, make().epoch(6))
    assert (
        sorted(torch.cat([b.index for b in first]).tolist()) == list(range(10))
        and len(make()) == 3
        and make().samples == 10
    )
    assert [len(b.index) for b in scenes.batches(9, crop=(16, 24)).epoch()] == [9]  # one image is no training batch
    assert first[0].images.dtype == torch.float32 and first[0].targets.dtype == torch.int64


def test_evaluation_batches_are_whole_images_in_order(scenes):
    (batch,) = scenes.batches(3, train=False).epoch()
    rgb, mask = read_scene(scenes.val[2])
    mean, std = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))
    assert (
        np.allclose(batch.images[2].permute(1, 2, 0), (rgb / 255 - mean) / std, atol=1e-5)
        and (batch.targets[2].numpy() == mask).all()
    )


def test_identity_of_batches(scenes):
    "In training all by which batches are drawn; not where the images are kept."
    first = scenes.batches(4, crop=(16, 24)).identity()
    assert scenes.batches(4, crop=(16, 24), memory=0).identity() == first
    for kw in ({"seed": 1}, {"crop": (16, 16)}, {"scales": (1.0, 1.5)}, {"flip": False}):
        assert scenes.batches(4, **{"crop": (16, 24), **kw}).identity() != first
    assert scenes.batches(3, crop=(16, 24)).identity() != first
    assert scenes.batches(4, False).identity() == scenes.batches(3, False, seed=1).identity()


# networks


@pytest.mark.parametrize(
    "architecture, backbone",
    [
        ("pspnet", "resnet18"),
        ("deeplabv3", "resnet18"),
        ("fcn", "resnet50"),
        ("deeplabv3", "mobilenet_v3_large"),
        ("lraspp", "mobilenet_v3_large"),
    ],
)
def test_networks(architecture, backbone):
    model = create_segmenter(architecture, backbone, 7)
    layers, x = segmenter_paths(model), torch.randn(2, 3, 32, 48)
    distiller = SegmentationDistiller(model, create_method("fcka"), create_segmenter("pspnet", "resnet18", 7))
    assert distiller.student_taps.paths == (layers.stages[-1], "classifier")
    out = model(x)["out"]
    assert out.shape == (2, 7, 32, 48)
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.slow
def test_torchvisions_networks_are_known():
    "Those that a user made by torchvision's own functions, and the same numbers as theirs."
    from torchvision.models.segmentation import deeplabv3_resnet50, fcn_resnet50

    for architecture, make in {"deeplabv3": deeplabv3_resnet50, "fcn": fcn_resnet50}.items():
        theirs, ours = (
            make(weights=None, weights_backbone=None, num_classes=7, aux_loss=False).eval(),
            create_segmenter(architecture, "resnet50", 7).eval(),
        )
        ours.load_state_dict(theirs.state_dict())
        assert segmenter_paths(theirs).head == "classifier" and segmenter_paths(theirs).stages[-1] == "backbone.layer4"
        with torch.no_grad():
            assert torch.equal(ours(x := torch.randn(1, 3, 33, 40))["out"], theirs(x)["out"])


def test_unknown_networks():
    with pytest.raises(ValueError, match="did you mean deeplabv3"):
        create_segmenter("deeplab", "resnet18")
    with pytest.raises(ValueError, match="unknown backbone of fcn 'mobilenet_v3_large'"):
        create_segmenter("fcn", "mobilenet_v3_large")
    with pytest.raises(ValueError, match="num_classes"):
        create_segmenter("fcn", "resnet18", 1)
    with pytest.raises(ValueError, match="head is the module that returns the logits"):
        segmenter_paths(nn.Conv2d(3, 3, 1))


# the loss


def batch_of(n=4, size=(12, 16), classes=5, seed=0, all_ignored=False):
    g = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, classes, (n, *size), generator=g)
    targets[torch.rand(n, *size, generator=g) < 0.2] = IGNORED
    if all_ignored:
        targets[:] = IGNORED
    return SceneBatch(torch.randn(n, 3, *size, generator=g), targets, torch.arange(n))


def naive_lcka(z, w, center, normalize_rows):
    "intra and inter from (n, n) and (p, p) Gram matrices."
    found = []
    for x, y in ((z, w), (z.T, w.T)):
        k, l = x @ x.T, y @ y.T
        if center:
            k, l = (a - a.mean(0) - a.mean(1, keepdims=True) + a.mean() for a in (k, l))
        if normalize_rows:
            k, l = (a / np.sqrt(np.diag(a))[:, None] for a in (k, l))
        found.append((k * l).sum() / np.linalg.norm(k) / np.linalg.norm(l))
    return found


@pytest.mark.parametrize("form", [dict(center=True), dict(center=False), dict(center=False, normalize_rows=True)])
def test_loss(form):
    "Logits form and cross-entropy against both written out; a larger map of the teacher is resized."
    student, teacher, batch = Tiny(5, seed=1).eval(), Tiny(5, seed=2, stride=1), batch_of()
    task = SegmentationDistiller(student, create_method("lcka", {"intra": 10.0, "inter": 7.0, **form}), teacher)
    terms, counts = task(batch)
    decode = lambda net: net.score(net.body(net.stem(batch.images)))
    with torch.no_grad():
        z, w = decode(student), nn.functional.interpolate(decode(teacher), (6, 8), mode="bilinear")
    intra, inter = naive_lcka(
        *(a.flatten(1).double().numpy() for a in (z, w)), form["center"], form.get("normalize_rows")
    )
    assert terms["lcka_intra"].item() == pytest.approx(10 * (1 - intra), abs=2e-4) and terms[
        "lcka_inter"
    ].item() == pytest.approx(7 * (1 - inter), abs=2e-4)
    with torch.no_grad():
        p = student(batch.images)["out"].double().softmax(1).numpy()
    counted = [(i, y, x, c) for (i, y, x), c in np.ndenumerate(batch.targets.numpy()) if c != IGNORED]
    assert terms["ce"].item() == pytest.approx(
        -sum(math.log(p[i, c, y, x]) for i, y, x, c in counted) / len(counted), rel=1e-5
    )
    right, n = counts["train_accuracy"]
    assert (right.item(), n.item()) == (sum(p[i, :, y, x].argmax() == c for i, y, x, c in counted), len(counted))
    sum(terms.values()).backward()
    assert all(q.grad is not None for q in student.parameters()) and all(q.grad is None for q in teacher.parameters())


def test_gradient():
    z = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[[0, 1], [2, IGNORED]], [[IGNORED, 1], [0, 0]]])
    assert torch.autograd.grad(pixel_ce(z, target), z)[0][0, :, 1, 1].abs().sum() == 0
    expected = nn.functional.cross_entropy(z, target, ignore_index=IGNORED)
    assert pixel_ce(z, target).item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_batch_with_nothing_to_count_is_no_nan():
    task = SegmentationDistiller(Tiny(5, seed=1), create_method("lcka"), Tiny(5))
    terms, counts = task(batch_of(all_ignored=True))
    assert terms["ce"] == 0 and all(t.isfinite() for t in terms.values()) and counts["train_accuracy"] == (0, 1)


@pytest.mark.parametrize("method", ["none", "lcka", "fcka", "rcka", "kd+lcka", "dense_kd", "at", "sp", "pcka"])
def test_methods(method):
    "On maps of logits and on features; those for vectors say what they want."
    student, teacher, batch = Tiny(5, seed=1), Tiny(5, width=12, seed=2), batch_of(size=(32, 32))
    task = SegmentationDistiller(student, create_method(method), teacher)
    task.prepare(type("Train", (), {"epoch": lambda self, e: iter([batch])})())
    if "kd+" in method:
        with pytest.raises(ValueError, match=r"\(n, classes\)"):
            task(batch)
        return
    terms = task(batch).terms
    assert all(t.isfinite() for t in terms.values()) and (len(terms) > 1) == (method != "none")
    sum(terms.values()).backward()


def test_a_network_of_ones_own_by_module_paths():
    task = SegmentationDistiller(
        Tiny(5, seed=1), create_method("fcka"), Tiny(5, width=12), student_paths=["stem"], teacher_paths=["body"]
    )
    assert task.student_taps.paths == ("stem", "score") and task(batch_of()).terms["fcka"] > 0


def test_classes_must_agree():
    task = SegmentationDistiller(Tiny(5), create_method("lcka"), Tiny(6))
    with pytest.raises(ValueError, match="the teacher's decode head has 6, the student's 5"):
        task(batch_of())


# the score


def test_miou():
    "Against counts by hand over all images; torchmetrics' own mean agrees."
    from torchmetrics.classification import MulticlassJaccardIndex

    g = torch.Generator().manual_seed(0)
    answer, target = torch.randint(0, 6, (3, 9, 11), generator=g), torch.randint(0, 6, (3, 9, 11), generator=g)
    target[torch.rand(3, 9, 11, generator=g) < 0.3] = IGNORED
    counts = torch.stack([confusion(a[None], t[None], 8) for a, t in zip(answer, target)]).sum(0)
    naive = np.zeros((8, 8), int)
    for a, t in zip(answer.flatten().tolist(), target.flatten().tolist()):
        if t != IGNORED:
            naive[t, a] += 1
    assert (counts.numpy() == naive).all()
    ratios = [naive[c, c] / (naive[c].sum() + naive[:, c].sum() - naive[c, c]) for c in range(6)]
    assert np.allclose(iou(counts)[:6], ratios) and iou(counts)[6:].isnan().all()  # 6 and 7 appear nowhere
    metric = MulticlassJaccardIndex(8, ignore_index=IGNORED)
    assert iou(counts).nanmean().item() == pytest.approx(metric(answer, target).item(), rel=1e-5)


class Oracle(nn.Module):
    "Answers what the red channel says."

    def __init__(self, scale):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(float(scale)))

    def forward(self, x):
        return {"out": nn.functional.one_hot((x[:, 0] * self.scale).long(), 19).movedim(-1, 1).float()}


def test_evaluation():
    "A class nowhere leaves the mean alone; nothing to count is an error; the mode is put back."
    targets = torch.tensor([[[0, 0, 4, 4]], [[0, 0, 0, IGNORED]]])
    images = targets.where(targets != IGNORED, 3)[:, None].float().repeat(1, 3, 1, 1)
    make = lambda targets: type(
        "Test",
        (),
        {
            "num_classes": 19,
            "epoch": lambda self, e: iter([SceneBatch(images[i : i + 1], targets[i : i + 1], None) for i in range(2)]),
        },
    )()
    model = Oracle(1)
    assert evaluate_segmentation(model, make(targets)) == {"miou": 100.0, "accuracy": 100.0} and model.training
    half = evaluate_segmentation(Oracle(0), make(targets))  # all 0: five of seven right, class 4 never
    assert half == pytest.approx({"miou": 100 * (5 / 7 + 0) / 2, "accuracy": 100 * 5 / 7})
    with pytest.raises(ValueError, match="are ignored"):
        evaluate_segmentation(model, make(torch.full_like(targets, IGNORED)))


# runs


def trainer(scenes, folder, seed=1):
    task = SegmentationDistiller(Tiny(seed=seed), create_method("lcka"), Tiny(seed=9))
    torch.manual_seed(0)
    return Trainer(
        task,
        scenes.batches(4, crop=(16, 24)),
        scenes.batches(2, train=False),
        TrainConfig(epochs=3, lr=0.05, schedule="poly"),
        folder,
        checkpoint_seconds=0,
    )


def test_resume_gives_the_same_weights(scenes, tmp_path):
    "Stopped in the middle of an epoch, with dropout and random crops: the same history and the same bits."
    whole = trainer(scenes, tmp_path / "whole")
    expected = whole.fit(progress=False)
    broken = trainer(scenes, tmp_path / "broken")
    interrupt_at(broken, 6)
    with pytest.raises(KeyboardInterrupt):
        broken.fit(progress=False)
    assert checkpoints(tmp_path / "broken")
    again = trainer(scenes, tmp_path / "broken", seed=4)
    assert again.fit(progress=False) == expected
    for a, b in zip(whole.task.student.state_dict().values(), again.task.student.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert again.best["miou"] == max(row["miou"] for row in expected)


@pytest.mark.slow
def test_an_experiment(root, tmp_path):
    "Teacher and student through `run`: scores of both, the teacher found again, weights given by a file."
    e = SegmentationExperiment(
        f"cityscapes:{root}",
        "lraspp/mobilenet_v3_large",
        "lraspp/mobilenet_v3_large",
        "lcka",
        epochs=1,
        batch_size=4,
        crop=[24, 32],
        train_limit=8,
    )
    assert (
        SegmentationExperiment.from_dict(json.loads(json.dumps(e.to_dict()))) == e
        and e.crop == (24, 32)
        and e.teacher_experiment.teacher is None
    )
    result = run(e, tmp_path, device="cpu", progress=False)
    assert set(result.last) == {"epoch", "miou", "accuracy"} and set(result.train) == {
        "loss",
        "ce",
        "lcka_intra",
        "lcka_inter",
        "train_accuracy",
    }
    assert (
        0 <= result.last["miou"] <= 100 and result.teacher["miou"] == run(e.teacher_experiment, tmp_path).last["miou"]
    )
    given = SegmentationExperiment(
        **{**e.to_dict(), "teacher_weights": str(tmp_path / e.teacher_experiment.key / "last.safetensors")}
    )
    assert given.prepare(tmp_path, "cpu", False, {}).teacher_scores == pytest.approx(result.teacher)


@pytest.mark.parametrize(
    "bad, error",
    [
        ({"student": "resnet18"}, "architecture/backbone"),
        ({"student": "psp/resnet18"}, "architecture/backbone"),
        ({"method": "lcka"}, "needs a teacher"),
        ({"method": "lkca", "teacher": "pspnet/resnet18"}, "did you mean lcka"),
        ({"batch_size": 1}, "at least 2"),
        ({"schedule": "polly"}, "schedule must be"),
    ],
)
def test_experiments_that_cannot_be(bad, error):
    with pytest.raises(ValueError, match=error):
        SegmentationExperiment(**bad)


# masks from boxes


def test_boxes(tmp_path):
    "A small box lies on a larger one; images without a box of the classes are left out; images are cut to one size."
    boxes = [(1, 5, [10, 10, 20, 20]), (1, 2, [0, 0, 60, 40]), (2, 2, [5, 5, 10, 10]), (3, 8, [0, 0, 9, 9])]
    for split in ("train", "val"):
        (tmp_path / f"{split}2017").mkdir()
        for i, size in ((1, (60, 40)), (2, (50, 80)), (3, (30, 30))):
            Image.new("RGB", size, (i, 0, 0)).save(tmp_path / f"{split}2017" / f"{i:03}.jpg")
        told = {
            "images": [
                {"id": i, "file_name": f"{i:03}.jpg", "width": w, "height": h}
                for i, (w, h) in ((1, (60, 40)), (2, (50, 80)), (3, (30, 30)))
            ],
            "annotations": [{"image_id": i, "category_id": c, "bbox": b} for i, c, b in boxes],
            "categories": [{"id": 2, "name": "bed"}, {"id": 5, "name": "cat"}, {"id": 8, "name": "cup"}],
        }
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(told))
    scenes = load_scenes(f"cityscapes:{scenes_from_boxes(tmp_path, tmp_path / 'out', ['bed', 'cat'], (40, 60))}")
    assert scenes.classes == ("background", "bed", "cat") and len(scenes.train) == 2 and scenes.size == (40, 60)
    mask = read_scene(scenes.train[0], 3)[1]
    expected = np.full((40, 60), 1)
    expected[10:30, 10:30] = 2
    assert (mask == expected).all()
    with pytest.raises(ValueError, match="unknown category 'cot'; did you mean cat"):
        scenes_from_boxes(tmp_path, tmp_path / "none", ["cot"])


# several processes


def gradient_and_score(path):
    "What one process has of a step and of an evaluation; the first one writes it."
    batch = batch_of()
    batch = batch._replace(targets=batch.targets.clamp_max(4))  # as many pixels count in each part
    task = SegmentationDistiller(Tiny(5, seed=1).eval(), create_method("rcka"), Tiny(5, seed=2))
    sum(task(shard(batch)).terms.values()).backward()
    average_gradients(list(task.student.parameters()))
    scores = evaluate_segmentation(
        task.student, type("Test", (), {"num_classes": 5, "epoch": lambda self, e: iter([batch])})()
    )
    if rank() == 0:
        torch.save((torch.cat([p.grad.flatten() for p in task.student.parameters()]), scores), path)


@pytest.mark.parametrize("world, memory", [(2, 8), (2, 0)])
def test_each_process_decodes_its_part(scenes, monkeypatch, world, memory):
    """Blocks of training batches, turns of evaluation, whether the images are held or decoded anew. Two images of ten
    are too few for a third batch: one for each process."""
    make = lambda train: scenes.batches(4, train, crop=(16, 24), seed=3, memory=memory)
    whole, tested = list(make(True).epoch(1)), list(make(False).epoch(0))
    equal = lambda a, b: all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    for r in range(world):
        monkeypatch.setattr("rcka.distributed.rank", lambda: r)
        for module in ("rcka.distributed", "rcka.data.scenes"):
            monkeypatch.setattr(f"{module}.world_size", lambda: world)
        assert len(make(True)) == 2 and make(True).samples == 8
        for b, mine in zip(whole[:2], make(True).epoch(1), strict=True):
            each = len(b.targets) // world
            assert len(mine.targets) == len(b.targets) and len(mine.images.rows) == each
            assert equal(shard(mine), [t[r * each : (r + 1) * each] for t in b])
        for b, mine in zip(tested, make(False).epoch(0), strict=True):
            assert equal([m[r::world] for m in mine], [t[r::world] for t in b])
    monkeypatch.setattr("rcka.data.scenes.world_size", lambda: 5)
    with pytest.raises(ValueError, match="batch_size and the number of images must be at least 10 for 5 processes"):
        make(True)


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    "The relations are taken over the whole batch, with gradients, and the score over all images."
    gradient_and_score(tmp_path / "one.pt")
    script = tmp_path / "two.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from rcka.distributed import init_distributed\ninit_distributed('cpu')\n"
        f"from test_segmentation import gradient_and_score\ngradient_and_score({str(tmp_path / 'two.pt')!r})\n"
    )
    launch(script)
    (one, scores), (two, same) = (torch.load(tmp_path / f"{n}.pt") for n in ("one", "two"))
    assert (one - two).norm() < 1e-5 * one.norm() and scores == same
