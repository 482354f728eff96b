"""Every method trains. On one fixed batch: gradients arrive everywhere, and a step against them lowers the method's own
terms by as much as they say. Through the trainer: a run is finite, a student learns, and a teacher that knows more
helps one with few labels."""

import copy
import math
from pathlib import Path
from statistics import mean

import pytest
import torch
from torchvision.models import VisionTransformer

import rcka
from rcka.data.datasets import load_dataset
from rcka.features import feature_paths
from rcka.methods import FOR_CLASSIFIERS  # not list_methods(): other tests register more
from rcka.methods.base import create_method
from rcka.models.registry import create_model
from rcka.train.classification import Distiller
from rcka.train.config import TrainConfig
from rcka.train.learner import Trainer, fit_many

REPO = Path(__file__).parent.parent
METHODS = sorted(FOR_CLASSIFIERS)
# a weight that warms up is there in full from the second epoch on; CRD has 200 images to contrast, not 50,000; the ViT
# has one map
SHORT = {
    "dkd": {"warmup": 1},
    "ikl_kd": {"warmup": 1},
    "rld": {"warmup": 1},
    "reviewkd": {"warmup": 1},
    "crd": {"negatives": 64},
    "cka_places": {"stages": (-1,)},
    "cka_angle": {"stages": (-1,)},
    "procrustes": {"stages": (-1,)},
    "explained_variance": {"stages": (-1,)},
    "fcfd": {"warmup": 1, "paths": 4},  # all paths in each step
}


def network(name, images, seed):
    torch.manual_seed(seed)
    return create_model(name, images.num_classes, images.channels)


def fixed_batch(images):
    "48 images in float64."
    images, *rest = batch = next(iter(images.batches(48, seed=1).epoch(0)))
    return type(batch)(images.double(), *rest)


def frozen_teacher(images):
    "A resnet14 in float64 that has not learnt, but whose batch statistics are those of the images."
    teacher, batch = network("resnet14", images, 0).double(), fixed_batch(images)
    for m in teacher.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.momentum = None  # statistics are the mean over the batches seen, here one
    with torch.no_grad():
        teacher(batch.images)
    return teacher.eval()


@pytest.fixture(scope="module")
def teacher(images):
    return frozen_teacher(images)


# A network that is not of the zoo, by module paths

TOKENS, POOLED, MAP = (
    "encoder.layers.encoder_layer_1",
    "heads.head:input",
    "conv_proj",
)  # (n, 17, 32), (n, 32), (n, 32, 4, 4)
FEATURES = {  # student's path: teacher's path
    **{name: {} for name in ("none", "kd", "dkd", "dist", "ikl_kd", "nkd", "lcka")},
    **{name: {} for name in ("lskd", "standardized", "ttm", "wttm", "normkd", "rld", "mlkd", "skd", "wkd_l")},
    **{name: {TOKENS: "layer3"} for name in ("fcka", "rcka", "rcka_released", "sp", "ofa", "kernel_cka")},
    **{name: {POOLED: "fc:input"} for name in ("cc", "rkd", "pkt", "crd", "itrd", "srd", "label_cka")},
    **{
        name: {MAP: "layer3"}
        for name in (
            "fitnet",
            "at",
            "nst",
            "vid",
            "ofd",
            "ickd_c",
            "mgd",
            "dpk",
            "wkd_f",
            "cka_places",
            "cka_angle",
            "procrustes",
            "cat_kd",
            "sdd",
            "simkd",
            "fcfd",
        )
    },
    # the embedding is linear in the patches, so whatever its weights are they explain the same: the tokens' map
    "explained_variance": {f"{TOKENS}:map": "layer3"},
    "srrl": {MAP: "layer3", POOLED: "fc:input"},
    "reviewkd": {MAP: "layer3", MAP + "[...]": "layer3.1.relu2:input", POOLED: "fc:input"},
}


def vit(images):
    "torchvision's vision transformer, with 16 patches and two layers."
    torch.manual_seed(3)
    side = images.shape[1]
    model = VisionTransformer(
        image_size=side,
        patch_size=side // 4,
        num_layers=2,
        num_heads=2,
        hidden_dim=32,
        mlp_dim=64,
        num_classes=images.num_classes,
    )
    model.heads.head.reset_parameters()  # see `test_scale_free_methods_on_zero_logits`
    if images.channels != 3:
        model.conv_proj = torch.nn.Conv2d(images.channels, 32, side // 4, side // 4)
    return model.double()


def by_paths(name, images, teacher, pairs):
    ours, theirs = [p.removesuffix("[...]") for p in pairs], list(pairs.values())
    return Distiller(
        vit(images), create_method(name, SHORT.get(name)), teacher, student_paths=ours, teacher_paths=theirs
    )


def test_every_method_has_a_pair_of_paths():
    assert set(FEATURES) == set(METHODS)


# On one fixed batch


def built(name, student, images, teacher):
    "The distiller in float64, its connectors made and its warm-up over."
    if student == "vit":
        distiller = by_paths(name, images, teacher, FEATURES[name])
    else:
        distiller = Distiller(network("resnet8", images, 2).double(), create_method(name, SHORT.get(name)), teacher)
    torch.manual_seed(4)
    distiller.build(fixed_batch(images).images, images.train_targets)
    distiller.method.double().set_epoch(5)
    distiller.student.train()
    return distiller


def evaluated(distiller, batch, gradients=False):
    """The loss, the sum of the method's own terms and, if wanted, both gradients; always with the same random numbers,
    and with buffers (batch statistics, memory banks) left as they were."""
    parameters = [*distiller.student.parameters(), *distiller.method.parameters()]
    states = [(m, copy.deepcopy(m.state_dict())) for m in (distiller.student, distiller.method)]
    torch.manual_seed(5)
    terms = distiller(batch).terms
    values = sum(terms.values()), sum(v for k, v in terms.items() if k != "ce" or len(terms) == 1)
    found = [torch.autograd.grad(v, parameters, retain_graph=True, allow_unused=True) for v in values if gradients]
    for module, state in states:
        module.load_state_dict(state)
    return *(v.detach() for v in values), *found


def check_gradients(distiller, batch):
    _, own, of_loss, of_own = evaluated(distiller, batch, gradients=True)
    named = [*distiller.student.named_parameters(), *distiller.method.named_parameters()]
    for (path, _), g in zip(named, of_loss, strict=True):
        if g is None and not distiller.method.ce:  # without a cross-entropy what stands after the map is not trained
            continue
        assert g is not None and g.isfinite().all() and g.any(), f"no gradient for {path}"
    connectors = len(list(distiller.method.parameters()))
    assert all(g is not None for g in of_own[len(named) - connectors :])
    moving = [(p, g) for (_, p), g in zip(named, of_own, strict=True) if g is not None]
    assert len(moving) > connectors, "the method's own terms do not reach the student"
    steepness = sum(g.square().sum() for _, g in moving)
    step = 1e-3 * own.abs() / steepness  # by the gradient, this lowers the terms by a thousandth
    with torch.no_grad():
        for p, g in moving:
            p -= step * g
    lowered = own - evaluated(distiller, batch)[1]
    assert (lowered / (step * steepness)).item() == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("student", ["resnet8", "vit"])
@pytest.mark.parametrize("name", METHODS)
def test_gradients_arrive_and_a_step_lowers_the_terms(name, student, images, teacher):
    check_gradients(built(name, student, images, teacher), fixed_batch(images))


@pytest.mark.real_data
@pytest.mark.parametrize("name", METHODS)
def test_gradients_on_real_images(name, real_data):
    images = load_dataset("imagefolder:cifar10-jpeg", limit=200, test_limit=100)
    check_gradients(built(name, "resnet8", images, frozen_teacher(images)), fixed_batch(images))


def test_the_stages_of_a_vit_are_known(images, teacher):
    "So a method that asks for the last stage, or the pooled vector, needs no paths."
    assert feature_paths(vit(images)).stages[-1] == TOKENS
    for name in ("rcka", "rkd"):
        given, found = (
            by_paths(name, images, teacher, FEATURES[name]),
            Distiller(vit(images), create_method(name), teacher),
        )
        assert found.student_taps.paths == given.student_taps.paths
    with pytest.raises(ValueError, match="in pairs, but the student has 2 path.* and the teacher 3"):
        Distiller(vit(images), create_method("at"), teacher)


@pytest.mark.parametrize("name", ["lcka", "dist"])
def test_scale_free_methods_on_zero_logits(name):
    """torchvision's transformers begin with a head of zeros. Where a method does not look at the scale of the logits,
    its gradient is zero there and grows as 1 / scale just beside it: draw the head anew before such a run."""
    method, g = create_method(name), torch.Generator().manual_seed(0)
    z, t = torch.randn(32, 10, generator=g), torch.randn(32, 10, generator=g)

    def gradient(scale):
        logits = (scale * z).requires_grad_()
        own = sum(method.terms(rcka.Outputs(logits), rcka.Outputs(t)).values())
        return torch.autograd.grad(own, logits)[0].norm().item()

    assert gradient(0) == 0
    assert gradient(1e-3) == pytest.approx(10 * gradient(1e-2), rel=0.05) and gradient(1e-2) > 50 * gradient(1)


# Through the trainer


@pytest.mark.parametrize("name", METHODS)
def test_a_run_is_finite(name, teacher, tmp_path):
    "Two epochs in float32: whatever is logged or kept is a finite number."
    images = load_dataset("digits", limit=80, test_limit=50)
    student = network("resnet8", images, 2)
    distiller = Distiller(student, create_method(name, SHORT.get(name)), copy.deepcopy(teacher).float())
    recipe = TrainConfig(epochs=2, lr=0.01)
    rows = Trainer(distiller, images.batches(40), images.batches(train=False), recipe, tmp_path).fit(progress=False)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert all(t.isfinite().all() for m in (student, distiller.method) for t in m.state_dict().values())


@pytest.mark.slow
def test_a_teacher_that_knows_more_helps_where_labels_are_few(tmp_path):
    """The teacher has seen all 898 digits, the students 200 of them: alone they learn, with KD and with RCKA they learn
    more."""
    every, few = load_dataset("digits"), load_dataset("digits", limit=200)
    test = every.batches(train=False)
    teacher = network("resnet14", every, 0)
    recipe = TrainConfig(epochs=10, schedule="onecycle")
    rows = Trainer(Distiller(teacher), every.batches(64), test, recipe, tmp_path / "teacher").fit(progress=False)
    assert rows[-1]["top1"] > 90
    methods, top1 = ("none", "kd", "rcka"), []
    for seed in (1, 2, 3):
        train, recipe = few.batches(32, seed=seed), TrainConfig(epochs=30, schedule="onecycle")
        students = [
            Trainer(
                Distiller(network("resnet8", few, seed), create_method(name), teacher),
                train,
                test,
                recipe,
                tmp_path / f"{name}-{seed}",
            )
            for name in methods
        ]
        top1.append([rows[-1]["top1"] for rows in fit_many(students, progress=False)])
    alone, kd, rcka_ = map(mean, zip(*top1))
    assert min(map(min, top1)) > 60 and kd > alone and rcka_ > alone, top1
