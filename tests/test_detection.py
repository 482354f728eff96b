"Images with boxes, the evaluation, and detectors that learn from others."

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import launch

pytest.importorskip("faster_coco_eval")

from rcka.data.coco import BrokenImage, draw_rectangles, load_coco, read_image
from rcka.distributed import init_distributed, rank, shard
from rcka.experiments.detection import DetectionExperiment, detection_args
from rcka.experiments.experiment import run
from rcka.experiments.result import Result
from rcka.features import Taps
from rcka.methods.base import create_method
from rcka.methods.cka import pcka
from rcka.models.detectors import DETECTORS, Trunk, class_logits, create_detector, detector_paths
from rcka.train.config import TrainConfig
from rcka.train.detection import METRICS, DetectionDistiller, as_detections, coco_metrics, detect, input_size
from rcka.train.learner import Trainer


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return load_coco(*draw_rectangles(tmp_path_factory.mktemp("drawn"))[:2])


def changed(folder, change, n=6, **kwargs):
    "A drawn dataset with something changed in its files."
    images, path, content = draw_rectangles(folder, n)
    change(content, images)
    path.write_text(json.dumps(content))
    return load_coco(images, path, **kwargs)


# ---- the evaluation, against the official tool


def official(data, detections):
    "The twelve numbers of pycocotools, in per cent."
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = COCO()
    truth.dataset = {
        "info": {},
        "images": [{"id": i, "width": w, "height": h} for i, (w, h) in zip(data.ids, data.sizes)],
        "annotations": [dict(a, id=k) for k, a in enumerate((a for raw in data.raw for a in raw), 1)],
        "categories": [{"id": c, "name": n} for c, n in zip(data.categories, data.classes)],
    }
    truth.createIndex()
    judge = COCOeval(truth, truth.loadRes(copy.deepcopy(detections)), "bbox")
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    return {name: 100 * v if v > -1 else -1 for name, v in zip(METRICS, judge.stats)}


def noisy(data, seed):
    "Boxes near the true ones, some of a wrong class, some twice, some of nothing."
    rng, found = np.random.default_rng(seed), []
    for i, f in enumerate(data.found):
        size = np.array(data.sizes[i])
        boxes = np.concatenate(
            [
                f.boxes.numpy()
                + rng.normal(0, 0.1, f.boxes.shape) * (f.boxes[:, 2:] - f.boxes[:, :2]).repeat(1, 2).numpy()
                for _ in range(2)
            ]
            + [np.sort(rng.uniform(0, size, (3, 2, 2)), 1).reshape(3, 4)]
        )
        labels = np.concatenate([f.labels.numpy(), f.labels.numpy(), rng.integers(1, data.num_classes + 1, 3)])
        labels = np.where(rng.random(len(labels)) < 0.15, rng.integers(1, data.num_classes + 1, len(labels)), labels)
        found += as_detections(
            data,
            i,
            {
                "boxes": torch.from_numpy(boxes),
                "labels": torch.from_numpy(labels),
                "scores": torch.from_numpy(rng.random(len(labels)).round(2)),
            },
            data.sizes[i],
        )
    return found


def crowded(content, images):
    "Crowd boxes, objects of several sizes, an image without boxes."
    rng = np.random.default_rng(0)
    for k in range(60):
        i = int(rng.integers(0, len(content["images"]) - 1))
        record = content["images"][i]
        w, h = (float(rng.uniform(3, s)) for s in (record["width"], record["height"]))
        content["annotations"].append(
            dict(
                id=100 + k,
                image_id=record["id"],
                category_id=int(rng.choice([3, 7, 20])),
                bbox=[float(rng.uniform(0, record["width"] - w)), float(rng.uniform(0, record["height"] - h)), w, h],
                area=w * h * float(rng.uniform(0.4, 1)),
                iscrowd=int(k % 9 == 0),
            )
        )
    last = content["images"][-1]["id"]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != last]


@pytest.mark.parametrize("seed", [0, 1])
def test_evaluation_is_the_official_one(tmp_path, seed):
    data = changed(tmp_path, crowded, n=12)
    found = noisy(data, seed)
    ours, theirs = coco_metrics(data, found), official(data, found)
    assert (
        ours == pytest.approx(theirs, abs=1e-9)
        and 5 < ours["AP"] < 95
        and data.notes["crowd"] == 7
        and data.notes["without boxes"] == 1
    )


@pytest.mark.real_data
def test_evaluation_on_real_images(real_data):
    root = real_data / "coco128"
    if not root.is_dir():
        pytest.skip(f"no {root}")
    data = load_coco(root / "val2017", root / "annotations" / "instances_val2017.json")
    assert len(data) == 128 and data.num_classes == 80 and data.categories[-1] == 90
    data = data.take(range(30))
    found = noisy(data, 0)
    ours = coco_metrics(data, found)
    assert ours == pytest.approx(official(data, found), abs=1e-9) and ours["APs"] > 0 and ours["APl"] > 0


# ---- what can be wrong with a dataset


def test_one_annotation_of_an_unknown_image_or_category(tmp_path):
    for key, value, message in (
        ("image_id", 999, "annotation 1 is of image 999"),
        ("category_id", 4, "annotation 1 is of category 4"),
        ("bbox", [1, 2], r"annotation 1 has the box \[1, 2\]"),
        ("bbox", [0, 0, float("nan"), 1], "annotation 1 has the box"),
    ):
        with pytest.raises(ValueError, match=message):
            changed(tmp_path, lambda c, _: c["annotations"][0].update({key: value}))


def test_broken_pictures_are_named_or_skipped(tmp_path):
    def damage(content, images):
        whole = (images / "0.png").read_bytes()
        (images / "0.png").write_bytes(whole[: len(whole) // 2])
        (images / "1.png").unlink()
        (images / "2.png").write_bytes(b"not a picture")
        Image.new("RGB", (5, 5)).save(images / "3.png")

    with pytest.raises(BrokenImage, match="1 of 6 images are missing in .*1.png"):
        changed(tmp_path, damage)
    data = changed(tmp_path, damage, skip_broken=True)
    assert (
        data.files == ("4.png", "5.png")
        and [any(f"{i}.png" in said for said in data.notes["broken"]) for i in range(6)] == [True] * 4 + [False] * 2
    )

    def truncated(content, images):
        (images / "4.png").write_bytes((images / "4.png").read_bytes()[:90])

    data = changed(tmp_path / "later", truncated)
    with pytest.raises(BrokenImage, match="4.png cannot be decoded"):
        list(data.batches(6, train=False).epoch(0))
    with pytest.raises(BrokenImage, match="4.png cannot be decoded"):
        list(data.batches(2, train=False, workers=2).epoch(0))

    def nothing(content, images):
        for p in images.iterdir():
            p.write_bytes(b"")

    with pytest.raises(BrokenImage, match="none of the 6"):
        changed(tmp_path / "none", nothing, skip_broken=True)


@pytest.mark.parametrize(
    "mode, suffix", [("L", "jpg"), ("CMYK", "jpg"), ("1", "png"), ("P", "png"), ("LA", "png"), ("RGBA", "png")]
)
def test_any_kind_of_picture(tmp_path, mode, suffix):
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(np.full((8, 12, 3), 255, dtype=np.uint8)).convert(mode).save(path)
    image = read_image(path, (12, 8))
    assert image.shape == (3, 8, 12) and image.dtype == torch.uint8 and image.min() > 250


def test_odd_boxes(tmp_path):
    def odd(content, images):
        new = lambda k, **kw: content["annotations"].append(
            dict(id=50 + k, image_id=100, category_id=3, bbox=[1, 1, 9, 9], iscrowd=0) | kw
        )
        new(0, bbox=[-10, -10, 30, 30])
        new(1, bbox=[5, 5, 0, 4])
        new(2, bbox=[500, 5, 4, 4])
        new(3, iscrowd=1)

    data = changed(tmp_path, odd)
    target = data.batches(6).targets[0]
    assert len(target["boxes"]) == 2 and target["boxes"][1].tolist() == [0, 0, 20, 20]
    assert {k: data.notes[k] for k in ("clipped", "no area", "crowd")} == {"clipped": 2, "no area": 2, "crowd": 1}
    assert sum(len(r) for r in data.raw) == 10  # the evaluation sees them all


def test_a_run_fails_where_the_classes_differ(tmp_path):
    draw_rectangles(tmp_path, 4)
    _, path, content = draw_rectangles(tmp_path, 4, "val2017")
    content["categories"].append(dict(id=30, name="more"))
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="the classes of val2017 are not those of train2017: 4 and 3"):
        run(tiny(tmp_path), tmp_path / "runs", progress=False)


# ---- batches


def test_batches_depend_on_seed_and_epoch_alone(drawn):
    batches = lambda seed, **kw: drawn.batches(3, size=(40, 64), max_size=96, seed=seed, **kw)
    flat = lambda b, e, **kw: [
        (x.index.tolist(), [i.sum().item() for i in x.images], [t["boxes"].tolist() for t in x.targets])
        for x in b.epoch(e, **kw)
    ]
    whole = flat(batches(0), 3)
    assert flat(batches(0, workers=3), 3) == whole and flat(batches(0), 3, start=1) == whole[1:]
    assert flat(batches(1), 3) != whole != flat(batches(0), 4)
    sides = {min(i.shape[1:]) for e in range(6) for b in batches(0).epoch(e) for i in b.images}
    assert len(sides) > 5 and min(sides) >= 40 and max(sides) <= 64
    for b in batches(0, flip=False).epoch(0):
        assert len({min(i.shape[1:]) for i in b.images}) == 1


def test_the_longer_side_is_bounded(drawn):
    for b in drawn.batches(8, train=False, size=60, max_size=60).epoch(0):
        assert all(max(i.shape[1:]) == 60 for i in b.images)


def test_identity_of_batches(drawn):
    "In training all by which batches are drawn, and the boxes; no number of threads."
    make = lambda data=drawn, train=True, **kw: data.batches(3, train, **{"size": (40, 64), "max_size": 96, **kw})
    first = make().identity()
    assert make(workers=2).identity() == first
    moved = drawn.found[0]._replace(boxes=drawn.found[0].boxes + 1)
    other = replace(drawn, found=(moved, *drawn.found[1:]))
    for changed in (make(seed=1), make(flip=False), make(size=64), make(max_size=80), make(other)):
        assert changed.identity() != first
    test = make(train=False).identity()
    assert make(train=False, seed=1).identity() == test != make(other, train=False).identity()


# ---- detectors


def small(name, channels=64, classes=3, backbone="mobilenet_v3_small", **options):
    if name == "faster_rcnn":
        options = dict(box_batch_size_per_image=16, rpn_post_nms_top_n_train=40, rpn_post_nms_top_n_test=20) | options
    if name == "fcos":
        options = dict(head_convs=1) | options
    return create_detector(name, backbone, classes, channels=channels, norm="group", **options)


METHODS = ("none", "pcka", "pcka+mimic", "mimic", "pkd", "fgd", "dense_kd", "dense_dist", "crosskd")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["faster_rcnn", "retinanet", "fcos"])
def test_every_method_trains_every_detector(name, drawn):
    torch.manual_seed(0)
    train = drawn.batches(4, size=64, max_size=96)
    teacher, wide, same = small(name), small(name, 128), small(name)
    batch = next(train.epoch(0))
    few = ("none", "pcka", "fgd", "dense_kd", *(("crosskd",) if name == "retinanet" else ()))
    for method in METHODS if name == "fcos" else few:
        args = detection_args(method, name) | (
            {f"{'pcka.' if '+' in method else ''}patch_size": 4} if "pcka" in method else {}
        )
        args |= {"convolutions": 1} if method == "crosskd" else {}  # the small FCOS has one
        student = copy.deepcopy(wide if method in ("pcka", "pkd") else same)
        task = DetectionDistiller(student, create_method(method, args), teacher if method != "none" else None)
        task.prepare(train)
        student.train()
        optimizer = torch.optim.SGD([*student.parameters(), *task.method.parameters()], lr=5e-3, momentum=0.9)
        losses = []
        for _ in range(4 if name == "faster_rcnn" else 2):  # its proposals change with its weights
            torch.manual_seed(1)  # of the anchors that Faster R-CNN draws
            terms = task(batch).terms
            assert all(v.isfinite() for v in terms.values()), (method, terms)
            losses.append(sum(terms.values()))
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        assert losses[-1] < losses[0], (method, losses)
        assert all(p.grad is None for p in teacher.parameters())


def test_terms_are_those_of_the_maps_by_hand(drawn):
    "The detector's own losses untouched; PCKA of the two pyramids as they come out of the two backbones."
    torch.manual_seed(0)
    student, teacher = small("fcos").train(), small("fcos")
    batch = next(drawn.batches(4, size=64, max_size=96).epoch(0))
    task = DetectionDistiller(student, create_method("pcka", {"patch_size": 4, "intra": 3.0}), teacher)
    task.prepare(drawn.batches(4, size=64, max_size=96))
    step, own = task(batch), student(batch.images, batch.targets)
    for k, v in own.items():
        torch.testing.assert_close(step.terms[k], v)
    x = student.transform(batch.images)[0].tensors
    maps = zip(list(student.backbone(x).values())[:4], list(teacher.backbone(x).values())[:4])
    torch.testing.assert_close(step.terms["pcka_intra"], 3 * sum(1 - pcka(s, t, 4).intra for s, t in maps))
    assert input_size(student, batch.images) == tuple(x.shape[2:])


def test_class_logits_are_those_of_the_head(drawn):
    batch = next(drawn.batches(4, size=64, max_size=96).epoch(0))
    for name in ("retinanet", "fcos"):
        detector = small(name).eval()
        with torch.no_grad(), Taps(detector, [detector_paths(detector).head], logits=lambda x: x) as taps:
            expected = taps(batch.images).features[0]
            maps = Trunk(detector)(batch.images)
            assert torch.equal(class_logits(detector, maps), expected)


def test_images_keep_their_size(drawn):
    "No resizing inside: a detector sees the pixels of the batch, in train and in eval mode."
    batch = next(drawn.batches(4, size=50, max_size=96).epoch(0))
    detector = small("fcos")
    for mode in (True, False):
        images, targets = detector.train(mode).transform(batch.images, batch.targets)
        assert images.image_sizes == [tuple(x.shape[1:]) for x in batch.images]
        assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(targets, batch.targets))


@pytest.mark.slow
def test_crosskd_trains_a_detector_and_leaves_its_teacher(drawn, tmp_path):
    torch.manual_seed(0)
    student, teacher = small("retinanet"), small("retinanet")
    before = copy.deepcopy(teacher.state_dict())
    task = DetectionDistiller(student, create_method("crosskd+pkd"), teacher)
    batches = drawn.batches(3, size=50, max_size=80), drawn.batches(8, train=False, size=50, max_size=80)
    rows = Trainer(task, *batches, TrainConfig(epochs=3, lr=5e-3), tmp_path).fit(progress=False)
    assert all(np.isfinite(row["loss"]) and np.isfinite(row["AP"]) for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    with pytest.raises(ValueError, match="crosskd runs one detector's head.*got FasterRCNN and FasterRCNN"):
        two_stage = DetectionDistiller(small("faster_rcnn"), create_method("crosskd"), small("faster_rcnn"))
        Trainer(two_stage, *batches, TrainConfig(epochs=1), tmp_path / "two")


@pytest.mark.slow
def test_resume_to_the_same_weights(drawn, tmp_path):
    def trainer(folder):
        torch.manual_seed(0)
        student, teacher = small("faster_rcnn"), small("faster_rcnn")  # the kind that draws anchors at random
        task = DetectionDistiller(student, create_method("pcka", {"patch_size": 4}), teacher)
        return Trainer(
            task,
            drawn.batches(3, size=(40, 50), max_size=80),
            drawn.batches(8, train=False, size=50, max_size=80),
            TrainConfig(epochs=2, lr=1e-3, warmup_steps=4),
            tmp_path / folder,
            checkpoint_seconds=0,
        )

    whole = trainer("whole")
    whole.fit(progress=False)
    broken = trainer("broken")
    epoch, broken.train.epoch = broken.train.epoch, lambda e, start=0: fails(epoch(e, start), e)
    with pytest.raises(RuntimeError, match="failed after"):
        broken.fit(progress=False)
    again = trainer("broken")
    again.fit(progress=False)
    for (name, a), b in zip(whole.task.student.state_dict().items(), again.task.student.state_dict().values()):
        assert torch.equal(a, b), name
    assert again.history == whole.history


def fails(batches, e):
    "Batches that end in the middle of the second epoch."
    for k, batch in enumerate(batches):
        if e == 1 and k == 1:
            raise OSError("the disk went away")
        yield batch


@pytest.mark.slow
def test_mixed_precision(drawn, tmp_path):
    "One epoch in bf16 gives the losses of one in fp32, but for rounding."
    rows = {}
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        student, teacher = small("fcos"), small("fcos")
        task = DetectionDistiller(student, create_method("pcka+mimic", {"pcka.patch_size": 4}), teacher, watch=4)
        (rows[precision],) = Trainer(
            task,
            drawn.batches(4, size=64, max_size=96),
            drawn.batches(8, train=False, size=64, max_size=96),
            TrainConfig(epochs=1, lr=1e-3, precision=precision),
            tmp_path / precision,
        ).fit(progress=False)
    assert rows["bf16"]["loss"] == pytest.approx(rows["fp32"]["loss"], rel=0.05)
    assert 0 < rows["bf16"]["level0"] <= 100


# ---- experiments


def tiny(folder, **changes):
    return DetectionExperiment(
        str(folder),
        "mobilenet_v3_small",
        "mobilenet_v3_small",
        "pcka",
        {"patch_size": 4},
        detector="fcos",
        schedule="onecycle",
        **(
            dict(
                epochs=1,
                batch_size=4,
                lr=0.01,
                warmup_steps=0,
                size=48,
                max_size=72,
                flip=False,
                norm="group",
                channels=64,
                head_convs=1,
            )
            | changes
        ),
    )


@pytest.mark.slow
def test_experiment(tmp_path):
    draw_rectangles(tmp_path, 6)
    draw_rectangles(tmp_path, 4, "val2017", seed=1)
    e = tiny(tmp_path)
    assert DetectionExperiment.from_dict(json.loads(json.dumps(e.to_dict()))) == e
    result = run(e, tmp_path / "runs", progress=False, workers=0)
    assert set(METRICS) < set(result.last) and "pcka_intra" in result.train and set(result.teacher) == set(METRICS)
    assert Result.load(tmp_path / "runs" / e.key / "result.json") == result
    given = replace(e, teacher_weights=str(tmp_path / "runs" / e.teacher_experiment.key / "last.safetensors"))
    assert run(given, tmp_path / "runs", progress=False, workers=0).last == result.last


@pytest.mark.slow
def test_a_detector_fits_what_it_sees(drawn):
    "Sixty steps on eight rectangles: it finds them."
    torch.manual_seed(0)
    task, recipe = (
        DetectionDistiller(small("fcos", backbone="resnet18").train()),
        TrainConfig(epochs=30, lr=0.02, schedule="onecycle"),
    )
    optimizer = torch.optim.SGD(task.student.parameters(), lr=recipe.lr, momentum=0.9, weight_decay=1e-4)
    train, test = (
        drawn.batches(4, size=48, max_size=72, flip=False),
        drawn.batches(8, train=False, size=48, max_size=72),
    )
    for e in range(recipe.epochs):
        for k, batch in enumerate(train.epoch(e)):
            optimizer.param_groups[0]["lr"] = recipe.lr_at(e, k, len(train))
            optimizer.zero_grad()
            sum(task(batch).terms.values()).backward()
            optimizer.step()
    assert coco_metrics(drawn, detect(task.student, test))["AP50"] > 60


# ---- several processes


@pytest.mark.parametrize("world", [2, 5])
def test_each_process_decodes_its_part(drawn, monkeypatch, world):
    "Blocks of training batches, turns of evaluation; five processes share batches of four, too."
    make = lambda train: drawn.batches(4, train, size=(48, 64), max_size=96, seed=3, workers=1)
    whole, tested = list(make(True).epoch(1)), list(make(False).epoch(0))
    equal = lambda a, b: len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))
    for r in range(world):
        monkeypatch.setattr("rcka.distributed.rank", lambda: r)
        monkeypatch.setattr("rcka.distributed.world_size", lambda: world)
        for b, mine in zip(whole, make(True).epoch(1), strict=True):
            each = len(b.targets) // world
            assert len(mine.targets) == len(b.targets) and len(mine.images.rows) == each
            if not each:
                assert shard(mine) is None
                continue
            own, rows = shard(mine), slice(r * each, (r + 1) * each)
            assert (
                equal(own.images, b.images[rows])
                and torch.equal(own.index, b.index[rows])
                and equal([t["boxes"] for t in own.targets], [t["boxes"] for t in b.targets[rows]])
            )
        for b, mine in zip(tested, make(False).epoch(0), strict=True):
            assert equal(mine.images[r::world], b.images[r::world])


def test_a_first_batch_that_is_too_small_for_all_is_passed_over(tmp_path, monkeypatch):
    "Eleven images in batches of eight, four processes: where the three come first, the method sees the eight."
    data = load_coco(*draw_rectangles(tmp_path, 11)[:2])
    task = lambda: DetectionDistiller(small("fcos"), create_method("pcka", {"patch_size": 4}), small("fcos"))
    train = next(
        b
        for seed in range(20)
        if len(next((b := data.batches(8, size=48, max_size=72, seed=seed)).epoch(0)).targets) == 3
    )
    monkeypatch.setattr("rcka.distributed.rank", lambda: 1)
    monkeypatch.setattr("rcka.distributed.world_size", lambda: 4)
    task().prepare(train)
    monkeypatch.setattr("rcka.distributed.rank", lambda: 1)
    monkeypatch.setattr("rcka.distributed.world_size", lambda: 9)
    with pytest.raises(ValueError, match="no training batch has a row for each of the 9 processes"):
        task().prepare(train)


def in_processes(folder):
    "What one of several processes does: train, and evaluate together."
    init_distributed("cpu")
    data = load_coco(folder / "train2017", folder / "annotations" / "instances_train2017.json")
    torch.manual_seed(0)
    task = DetectionDistiller(small("fcos"), create_method("pcka", {"patch_size": 4}), small("fcos"))
    test = data.batches(3, train=False, size=48, max_size=72)  # the last batch has two images
    trainer = Trainer(task, data.batches(4, size=48, max_size=72), test, TrainConfig(epochs=1, lr=0.01), folder / "run")
    history = trainer.fit(progress=False)
    torch.save(
        {"weights": task.student.state_dict(), "scores": {k: history[-1][k] for k in METRICS}},
        folder / f"rank{rank()}.pt",
    )
    with pytest.raises(ValueError, match="relations='global' cannot be used for detectors"):
        task(next(test.epoch(0)), relations="global")


@pytest.mark.slow
def test_two_processes(tmp_path):
    "One student comes out, and the numbers of all images, whoever looked at them."
    images, path, _ = draw_rectangles(tmp_path)
    launch(__file__, tmp_path)
    one, other = (torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1))
    assert one["scores"] == other["scores"] and all(
        torch.equal(a, b) for a, b in zip(one["weights"].values(), other["weights"].values())
    )
    student = small("fcos")
    student.load_state_dict(one["weights"])
    assert DetectionDistiller(student).evaluate(
        load_coco(images, path).batches(3, train=False, size=48, max_size=72)
    ) == pytest.approx(one["scores"])


if __name__ == "__main__":
    in_processes(Path(sys.argv[1]))


@pytest.mark.parametrize("name", DETECTORS)
def test_boxes_are_float32_in_mixed_precision(name):
    "In bfloat16 pixels above 256 are even numbers at best."
    torch.manual_seed(0)
    detector = create_detector(
        name,
        "mobilenet_v3_small",
        3,
        norm="group",
        channels=64,
        **{"box_score_thresh" if name == "faster_rcnn" else "score_thresh": 0.0},
    ).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        (found,) = detector([torch.rand(3, 96, 96)])
    assert found["boxes"].dtype == torch.float32 and len(found["boxes"])
