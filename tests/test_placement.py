"""Every tensor is made on the device of its input: forward passes on a CUDA device that is not there.

Fake tensors have shapes, types and devices and no values, and an operation on two devices is an error as with real
ones. They need a build of torch with CUDA, and no driver."""

from unittest import mock

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from rcka.core import Batch, Outputs
from rcka.data.memory import Batches
from rcka.methods import BUILT_IN, FOR_CLASSIFIERS  # not list_methods(): other tests register more
from rcka.methods.base import DenseMethod, create_method
from rcka.methods.features import Negatives
from rcka.models.registry import create_model, list_models
from rcka.train.classification import Distiller, evaluate

FOR_DETECTORS = sorted(BUILT_IN - FOR_CLASSIFIERS)
DENSE = [n for n in FOR_DETECTORS if isinstance(create_method(n), DenseMethod)]  # on their maps
LOGITS = [n for n in FOR_DETECTORS if n not in DENSE and not create_method(n).runs_networks]
NETWORKS = sorted(
    {*list_models()}
    & {"resnet18", "wrn_16_1", "vgg8", "mobilenet_v1", "mobilenet_v2_half", "shufflenet_v1", "shufflenet_v2"}
)


def moved(module, *args, **kwargs):
    "`Module.to` for fake tensors, whose data cannot be exchanged in place."
    device = torch._C._nn._parse_to(*args, **kwargs)[0]
    for m in module.modules() if device is not None else ():
        for name, p in m._parameters.items():
            if p is not None:
                m._parameters[name] = nn.Parameter(p.detach().to(device), p.requires_grad)
        for name, b in m._buffers.items():
            if b is not None:
                m._buffers[name] = b.to(device)
    return module


def fakes_work():
    """Whether this torch moves a module to a device that is not there: a build without CUDA does not, and 2.4 asks for
    the driver."""
    try:
        with FakeTensorMode():
            moved(nn.Linear(2, 2), "cuda")(torch.zeros(2, 2, device="cuda"))
    except (RuntimeError, AssertionError):
        return False
    return True


pytestmark = pytest.mark.skipif(not fakes_work(), reason="this torch has no fake CUDA device")


class AnyNegatives(Negatives):
    "Those of CRD are sorted by values, and a fake tensor has none."

    def __init__(self, targets, replacement=False):
        nn.Module.__init__(self)
        self.enough = 0  # draw with replacement
        self.order, self.count, self.start = targets.argsort(), targets.new_zeros(10), targets.new_zeros(10)


def all_fits(run_on, outputs, who):
    "Every network runs on from every feature."


def first_paths(n, most):
    return [*range(0, n, n // 2)][:most]  # the first one of each direction


@pytest.fixture(autouse=True)
def fake():
    with (
        FakeTensorMode(),
        mock.patch.object(nn.Module, "to", moved),
        mock.patch("rcka.methods.features.Negatives", AnyNegatives),
        # these look at values, which a fake tensor has not
        mock.patch.multiple(
            "rcka.methods.features_recent", rectified=lambda x: True, check_runs=all_fits, draw_paths=first_paths
        ),
    ):
        yield


def on_cuda(tensors):
    tensors = list(tensors)
    return bool(tensors) and all(t.device.type == "cuda" for t in tensors)


def zeros(*shape):
    return torch.zeros(shape, dtype=torch.int64, device="cuda")


def images(n=8, size=32):
    return torch.randn(n, 3, size, size, device="cuda")


class Once:
    "One batch, as an epoch."

    num_classes = 10

    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return 1

    def epoch(self, e, start=0):
        return iter([self.batch])


def test_two_devices_are_an_error():
    "So the tests below can fail."
    with pytest.raises(RuntimeError, match="device"):
        images() + torch.arange(32)


@pytest.mark.parametrize("name", sorted(FOR_CLASSIFIERS))
def test_methods(name):
    student, teacher = create_model("resnet8", 10).to("cuda"), create_model("resnet14", 10).to("cuda")
    distiller = Distiller(student, create_method(name), teacher)
    distiller.build(images(), torch.zeros(100, dtype=torch.int64))  # the targets of all images may stay on the CPU
    distiller.method.set_epoch(1)
    step = distiller(Batch(images(), zeros(8), zeros(8)))
    assert on_cuda(step.terms.values()) and on_cuda(t for pair in step.counts.values() for t in pair)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    assert on_cuda([create_model(name, 10).to("cuda")(images())])


@pytest.mark.parametrize("train", [True, False])
def test_batches_and_augmentation(train):
    with mock.patch("rcka.data.memory._check_images"):  # it looks at values
        batches = Batches(
            torch.zeros(20, 3, 8, 8, dtype=torch.uint8),
            torch.zeros(20, dtype=torch.int64),
            8,
            (0.5,) * 3,
            (0.2,) * 3,
            device="cuda",
            train=train,
            channels_last=True,
            dtype=torch.bfloat16,
        )
    assert all(map(on_cuda, batches.epoch(0)))


def test_evaluation():
    with mock.patch.object(FakeTensor, "tolist", lambda counts: [1.0] * len(counts)):  # it has no values
        assert evaluate(create_model("resnet8", 10).to("cuda"), Once(Batch(images(), zeros(8), zeros(8)))).top1 == 100


def target():
    return [{"boxes": torch.rand(3, 4, device="cuda"), "input_size": (64, 64)}] * 2


def dense(name):
    return create_method(name, {"patch_size": 2} if name == "pcka" else None)


@pytest.mark.parametrize("name", DENSE)
def test_dense_methods(name):
    "On the maps of a pyramid, narrower than the teacher's."
    pyramid = lambda width: Outputs(None, tuple(torch.randn(2, width, s, s, device="cuda") for s in (32, 16, 8, 4)))
    student, teacher, method = pyramid(16), pyramid(24), dense(name)
    method.build(student, teacher)
    method.to("cuda")
    assert on_cuda(method.terms(student, teacher, target()).values())


@pytest.mark.slow
@pytest.mark.parametrize("name", [*LOGITS, "lcka", "pcka"])
def test_segmentation(name):
    pytest.importorskip("torchvision")
    from rcka.data.scenes import SceneBatch
    from rcka.models.segmenters import create_segmenter
    from rcka.train.segmentation import SegmentationDistiller

    make = lambda: create_segmenter("lraspp", "mobilenet_v3_large", 5).to("cuda")
    distiller = SegmentationDistiller(make(), dense(name), make())
    batch = SceneBatch(images(2, 64), zeros(2, 64, 64), zeros(2))
    distiller.prepare(Once(batch))
    assert on_cuda(distiller(batch).terms.values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the maps of level")
@pytest.mark.parametrize("name", DENSE)
def test_detection(name):
    "The trunks of two detectors, as far as a method looks: beyond, proposals and suppression depend on values."
    pytest.importorskip("torchvision")
    from rcka.models.detectors import create_detector, trunk_taps
    from rcka.train.detection import DetectionDistiller

    make = lambda: create_detector("retinanet", "mobilenet_v3_small", 3, pretrained=False).to("cuda")
    pair = DetectionDistiller(make(), dense(name), make())
    pictures = [torch.rand(3, 64, 64, device="cuda") for _ in range(2)]
    pair.prepare(Once(mock.Mock(images=pictures)))
    taps = trunk_taps(pair.student, pair.student_taps.paths[: pair.levels])
    terms = pair.method.terms(
        Outputs(None, taps(pictures).features), Outputs(None, pair.teach(pictures).features), target()
    )
    assert on_cuda(terms.values())
