"Every method trains: a small pair on real images, for a few epochs; and a vision transformer as student of a residual network."

import math
import re
from pathlib import Path

import pytest
import torch
from torchvision.models import VisionTransformer

import rcka
from rcka.losses import DenseMethod, create_method, list_methods
from rcka.models import create_model
from rcka.taps import layers_of
from rcka.trainer import Distiller, Recipe, Trainer, evaluate

REPO = Path(__file__).parent.parent
METHODS = [
    name for name in list_methods() if not (name.startswith("dense_") or isinstance(create_method(name), DenseMethod))
]  # those for classification
# warm-ups of 20 epochs are cut to one, for a term that is switched on step by step cannot be seen to fall; CRD has 200 images to contrast, not 50,000
EPOCHS = {
    "crd": 6,
    "pkt": 6,
    "vid": 6,
    "kernel_cka": 8,
    "mlkd": 8,
    "rld": 8,
}  # these rise before they fall (CRD contrasts with a memory that begins as noise), or fall slowly
SHORT = {
    "dkd": {"warmup": 1},
    "ikl_kd": {"warmup": 1},
    "rld": {"warmup": 1},
    "reviewkd": {"warmup": 1},
    "crd": {"negatives": 256},
    "cka_places": {"stages": (-1,)},
    "cka_angle": {"stages": (-1,)},
    "procrustes": {"stages": (-1,)},
}


@pytest.fixture(scope="session")
def teacher(images, tmp_path_factory):
    "A resnet14 that knows a good part of the training images."
    torch.manual_seed(0)
    network = create_model("resnet14", images.num_classes, images.channels)
    fit(Distiller(network), images, tmp_path_factory.mktemp("teacher"), epochs=8)
    return network


def fit(distiller, images, folder, epochs, lr=0.05):
    torch.manual_seed(1)
    recipe = Recipe(epochs=epochs, lr=lr, schedule="onecycle")
    return Trainer(distiller, images.batches(32, seed=1), images.batches(train=False), recipe, folder).fit(
        progress=False
    )


def finite(*modules):
    return all(t.isfinite().all() for m in modules for t in m.state_dict().values())


def test_the_teacher_has_learnt(images, teacher):
    assert evaluate(teacher, images.batches(train=False)).top1 > 20


@pytest.mark.parametrize("name", METHODS)
def test_trains(name, images, teacher, tmp_path):
    "Three epochs: nothing is NaN or infinite, and what the method adds to the cross-entropy falls."
    torch.manual_seed(2)
    student = create_model("resnet8", images.num_classes, images.channels)
    distiller = Distiller(student, create_method(name, SHORT.get(name)), teacher)
    first, *_, last = rows = fit(distiller, images, tmp_path, epochs=EPOCHS.get(name, 3))
    assert all(math.isfinite(value) for row in rows for value in row.values()) and finite(student, distiller.method)
    own = [k for k in first if k not in ("epoch", "lr", "loss", "ce", "train_top1", "top1", "top5")]
    total = lambda row: sum(row[k] for k in own) if own else row["ce"]
    assert total(last) < total(first), [{k: round(row[k], 4) for k in ("loss", "ce", *own) if k in row} for row in rows]
    assert last["loss"] < first["loss"]


# a network that is not of the zoo, by module paths

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
        )
    },
    "srrl": {MAP: "layer3", POOLED: "fc:input"},
    "reviewkd": {MAP: "layer3", MAP + "[...]": "layer3.1.relu2:input", POOLED: "fc:input"},
}
MAPS = [name for name, paths in FEATURES.items() if MAP in paths]


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
    return model


def by_paths(name, images, teacher, pairs):
    ours, theirs = [p.removesuffix("[...]") for p in pairs], list(pairs.values())
    return Distiller(
        vit(images), create_method(name, SHORT.get(name)), teacher, student_paths=ours, teacher_paths=theirs
    )


def test_every_method_has_a_pair_of_paths():
    assert set(FEATURES) == set(METHODS)


@pytest.mark.parametrize("name", FEATURES)
def test_vit_is_student_of_a_resnet(name, images, teacher, tmp_path):
    "Tokens, vectors or maps by module path: a few epochs, after which the loss is lower."
    distiller = by_paths(name, images, teacher, FEATURES[name])
    rows = fit(distiller, images, tmp_path, epochs=EPOCHS.get(name, 2), lr=0.01)
    assert all(math.isfinite(value) for row in rows for value in row.values()) and finite(
        distiller.student, distiller.method
    )
    assert rows[-1]["loss"] < rows[0]["loss"], [row["loss"] for row in rows]


@pytest.mark.parametrize("name", MAPS)
def test_tokens_where_a_map_is_needed(name, images, teacher):
    "The error says what was got and what would do."
    pairs = FEATURES[name]
    distiller = by_paths(name, images, teacher, {TOKENS if p == MAP else p: q for p, q in pairs.items()})
    batch = next(iter(images.batches(8).epoch(0)))
    with pytest.raises(ValueError, match=r"map.*\((n, channels, height, width|B, C, H, W)\).*got \(8, 17, 32\)"):
        distiller.build(batch.images, images.train_targets)
        distiller(batch)


def test_the_stages_of_a_vit_are_known(images, teacher):
    "So a method that asks for the last stage, or the pooled vector, needs no paths."
    assert layers_of(vit(images)).stages[-1] == TOKENS
    batch = next(iter(images.batches(8).epoch(0)))
    for name in ("rcka", "rkd"):
        given, found = (
            by_paths(name, images, teacher, FEATURES[name]),
            Distiller(vit(images), create_method(name), teacher),
        )
        assert found.student_taps.paths == given.student_taps.paths
    with pytest.raises(ValueError, match="in pairs, but the student gives 2 .* and the teacher 3"):
        Distiller(vit(images), create_method("at"), teacher)


@pytest.mark.parametrize("name", ["lcka", "dist"])
def test_scale_free_methods_on_zero_logits(name):
    """torchvision's transformers begin with a head of zeros. Where a method does not look at the scale of the logits, its gradient is zero
    there and grows as 1 / scale just beside it: draw the head anew before such a run."""
    method, z, t = create_method(name), torch.randn(32, 10), torch.randn(32, 10)

    def gradient(scale):
        logits = (scale * z).requires_grad_()
        own = sum(method.terms(rcka.Outputs(logits), rcka.Outputs(t)).values())
        return torch.autograd.grad(own, logits)[0].norm().item()

    assert gradient(0) == 0
    assert gradient(1e-3) == pytest.approx(10 * gradient(1e-2), rel=0.05) and gradient(1e-2) > 50 * gradient(1)


def test_readme(images, teacher, tmp_path, monkeypatch):
    "The README's transformer, as it stands there but for sizes."
    if images.shape != (3, 32, 32):
        pytest.skip("the README's network is for images of 3 x 32 x 32")
    (code,) = [
        c
        for c in re.findall(r"```python\n(.*?)```", (REPO / "README.md").read_text(), re.S)
        if "VisionTransformer" in c
    ]
    for there, here in {
        'load_dataset("cifar10")': "images",
        "resnet56": "resnet14",
        "epochs=60": "epochs=1",
        "hidden_dim=192": "hidden_dim=24",
        ".fit()": ".fit(progress=False)",
    }.items():
        assert there in code
        code = code.replace(there, here)
    monkeypatch.chdir(tmp_path)
    torch.save(teacher.state_dict(), "resnet14.pth")
    exec(code, {"images": images})
    assert (tmp_path / "runs/vit/last.safetensors").is_file()
