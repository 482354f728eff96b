"Augmentation of batches: torchvision's operations on the bytes, and the same batches wherever an epoch begins."

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import v2

from rcka.data.augment import Augment, AugmentedBatches
from rcka.data.imagenet import chance
from rcka.data.memory import Batches

N, CLASSES = 24, 5


def plain(**how):
    "Batches of eight images in colour, neither cropped nor mirrored unless `how` says so."
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (N, 3, 12, 12), generator=g, dtype=torch.uint8)
    targets = torch.randint(0, CLASSES, (N,), generator=g)
    return Batches(images, targets, 8, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), **{"pad": 0, "flip": False} | how)


def augmented(batches, classes=CLASSES, seed=0, **how):
    return AugmentedBatches(batches, Augment(**how), classes, seed)


@pytest.mark.parametrize("how", [{"augment": "randaugment"}, {"augment": "trivialaugment"}, {"erasing": 0.5}])
def test_operations_are_torchvision_s_on_each_image(how):
    "By hand, with the random numbers of the same step: on the bytes, and for erasing on the normalised image."
    batches = plain()
    (first, _, third), raw = augmented(batches, **how).epoch(2), list(batches.epoch(2))
    operation = {"randaugment": v2.RandAugment(), "trivialaugment": v2.TrivialAugmentWide()}.get(how.get("augment"))
    for step, got in ((0, first), (2, third)):
        with chance("augment", 0, 2, step):
            if operation:
                rows = raw[step].index
                want = batches.normalize(torch.stack([operation(image) for image in batches.images[rows]]))
            else:
                want = torch.stack([v2.RandomErasing(0.5)(image) for image in raw[step].images])
        assert torch.equal(got.images, want) and torch.equal(got.targets, raw[step].targets)
        assert not torch.equal(got.images, raw[step].images)
    changed = [not torch.equal(a, b) for a, b in zip(first.images, raw[0].images)]
    assert any(changed) and (operation is not None or not all(changed))  # each image by itself


@pytest.mark.parametrize("how", [{"mixup": 1.0}, {"cutmix": 1.0}])
def test_labels_are_mixed_as_the_images_are(how):
    "The share of the neighbour in the pixels is its share in the probabilities."
    batches = plain()
    for got, raw in zip(augmented(batches, **how).epoch(0), batches.epoch(0)):
        one_hot, neighbour = F.one_hot(raw.targets, CLASSES).float(), raw.images.roll(1, 0)
        if "mixup" in how:
            share = ((got.images - neighbour) / (raw.images - neighbour)).nanmedian()  # 0 / 0 where two pixels are one
            torch.testing.assert_close(got.images, share * raw.images + (1 - share) * neighbour, atol=1e-4, rtol=0)
        else:
            own = (got.images == raw.images).all(1)
            assert (own | (got.images == neighbour).all(1)).all()
            share = own.float().mean()
        want = share * one_hot + (1 - share) * one_hot.roll(1, 0)
        torch.testing.assert_close(got.targets, want, atol=1e-4, rtol=0)


def test_smoothed_labels_are_those_of_torch():
    batches, logits = plain(), torch.randn(8, CLASSES, generator=torch.Generator().manual_seed(1))
    got, raw = next(augmented(batches, label_smoothing=0.1).epoch(0)), next(batches.epoch(0))
    want = F.cross_entropy(logits, raw.targets, label_smoothing=0.1)
    torch.testing.assert_close(F.cross_entropy(logits, got.targets), want)
    both = next(augmented(batches, label_smoothing=0.1, mixup=0.5).epoch(0)).targets
    torch.testing.assert_close(both.sum(1), torch.ones(8))
    assert both.min() >= 0.1 / CLASSES - 1e-6


def test_an_epoch_begins_anywhere():
    "The same batches from a later step on; others in another epoch and for another seed. Outside nothing is drawn."
    how = dict(augment="randaugment", erasing=0.5, mixup=0.5, cutmix=0.5, label_smoothing=0.1)
    before = torch.get_rng_state()
    train = augmented(plain(pad=2, flip=True), **how)
    whole = list(train.epoch(1))
    assert len(whole) == len(train) == 3
    for start in (1, 2):
        for a, b in zip(train.epoch(1, start), whole[start:], strict=True):
            assert all(map(torch.equal, a, b))
    assert not torch.equal(next(train.epoch(2)).images, whole[0].images)
    other = augmented(plain(pad=2, flip=True), seed=1, **how)
    assert not torch.equal(next(other.epoch(1)).images, whole[0].images)
    assert torch.equal(torch.get_rng_state(), before)
    assert train.identity() != train.batches.identity() and train.identity()["augmentation: mixup"] == 0.5


def test_images_without_labels_are_mixed_too():
    "The targets, which nobody reads, stay as they are."
    batches = plain()
    got, raw = next(augmented(batches, classes=0, mixup=1.0, label_smoothing=0.1).epoch(0)), next(batches.epoch(0))
    assert torch.equal(got.targets, raw.targets) and not torch.equal(got.images, raw.images)


@pytest.mark.parametrize(
    "how, says",
    [
        ({"augment": "autoaugment"}, "augment must be one of"),
        ({"erasing": 1.5}, "erasing must be a probability"),
        ({"label_smoothing": -0.1}, "label_smoothing must be a probability"),
        ({"cutmix": float("nan")}, "cutmix must be a finite number"),
    ],
)
def test_bad_settings(how, says):
    with pytest.raises(ValueError, match=says):
        Augment(**how)
