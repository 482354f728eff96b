"Networks of other libraries by name, their input, and a student that is saved and loaded again."

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rcka
from rcka.models.sources import SMALL, InputConfig, adapt_input, adapted, input_config, qualify
from rcka.models.student import classifier, load_student, make_network, save_student


def test_a_bare_name_is_the_network_for_the_size_of_the_images():
    own = rcka.list_models()
    assert qualify("resnet18", own, small=True) == "resnet18"
    assert qualify("resnet18", own, small=False) == "torchvision/resnet18"
    assert qualify("rcka/resnet18", own, small=False) == "resnet18" and SMALL == 64
    assert qualify("resnet8", own, small=False) == "resnet8"
    for name in ("torchvision/vit_b_16", "timm/any", "package.module:function"):
        assert qualify(name, own, small=False) == name
    with pytest.raises(ValueError, match="did you mean mobilenet_v3_small"):
        qualify("mobilenet_v3_smal", own, small=False)


def test_a_function_is_a_network(tmp_path, monkeypatch):
    (tmp_path / "own_networks.py").write_text("""
from torch import nn
def small(num_classes, width=8):
    body = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, width)
    return nn.Sequential(*body, nn.Linear(width, num_classes))
def number(): return 3
""")
    monkeypatch.syspath_prepend(tmp_path)
    model = rcka.create_model("own_networks:small", 5, width=16)
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 5) and model[2].out_features == 16
    with pytest.raises(ValueError, match="did you mean small"):
        rcka.create_model("own_networks:smal")
    with pytest.raises(TypeError, match="nn.Module, got int"):
        rcka.create_model("own_networks:number")
    with pytest.raises(ImportError, match="PYTHONPATH"):
        rcka.create_model("own_network:small")


def test_weights_that_cannot_be_fetched_are_named_with_their_place(monkeypatch, tmp_path):
    from urllib.error import URLError

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def no_network(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    with pytest.raises(FileNotFoundError, match="IMAGENET1K_V1 of torchvision/resnet18.*checkpoints/resnet18-"):
        rcka.create_model("torchvision/resnet18", None, weights="IMAGENET1K_V1")
    with pytest.raises(ValueError, match="IMAGENET1K_V1"):
        rcka.create_model("torchvision/resnet18", None, weights="IMAGENET1K_V3")


def test_the_classifier_alone_is_fresh_for_other_classes(tmp_path):
    torch.manual_seed(0)
    source = rcka.create_model("torchvision/mobilenet_v3_small", 7).eval()
    rcka.save_weights(source, tmp_path / "seven.safetensors")
    start = str(tmp_path / "seven.safetensors")
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(make_network("torchvision/mobilenet_v3_small", 7, start).eval()(x), source(x))
    other = make_network("torchvision/mobilenet_v3_small", 3, start).eval()
    head = classifier(other)
    assert other(x).shape == (2, 3)
    for (name, a), b in zip(source.state_dict().items(), other.state_dict().values()):
        assert name.startswith(head) or torch.equal(a, b), name
    with pytest.raises(FileNotFoundError):
        make_network("torchvision/mobilenet_v3_small", 3, str(tmp_path / "none.pth"))


@pytest.mark.parametrize(
    "name",
    [
        *("resnet18", "shufflenet_v2_x0_5", "densenet121", "regnet_y_400mf", "convnext_tiny", "swin_t"),
        *("mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0"),
    ],
)
def test_an_encoder_returns_its_pooled_feature(name):
    "Without a classifier the feature paths are still known; there is no head."
    torch.manual_seed(0)
    model, x = make_network(f"torchvision/{name}", 0).eval(), torch.randn(2, 3, 64, 64)
    paths = rcka.feature_paths(model)
    with torch.no_grad():
        output, (pooled,) = rcka.Taps(model, [paths.pooled])(x)
    assert torch.equal(pooled.flatten(1), output) and output.dim() == 2 and not paths.head
    assert paths.stages == rcka.feature_paths(make_network(f"torchvision/{name}", 3)).stages


def test_weights_that_ship_say_what_they_want_to_see():
    config = input_config(rcka.create_model("resnet20", None, weights="pretrained"))
    assert config.size == 32 and len(config.mean) == len(config.std) == 3
    assert input_config(rcka.create_model("resnet8")) == InputConfig()


def test_a_network_of_224_pixels_sees_the_crop_of_96():
    "Renormalising is exact, and the hook gives the network what it would have seen."
    ours = InputConfig((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 96)
    theirs = InputConfig((0.5, 0.4, 0.3), (0.5, 0.25, 0.2), 224, "bicubic")
    pixels = torch.rand(2, 3, 96, 96)
    normalise = lambda x, c: (x - torch.tensor(c.mean).view(-1, 1, 1)) / torch.tensor(c.std).view(-1, 1, 1)
    torch.testing.assert_close(
        adapted(normalise(pixels, ours), ours, theirs._replace(size=96)), normalise(pixels, theirs)
    )
    large = torch.nn.functional.interpolate(pixels, (224, 224), mode="bicubic", antialias=True).clamp(0, 1)
    model, seen = torch.nn.Conv2d(3, 1, 1), []
    handle = adapt_input(model, ours, theirs)
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(normalise(pixels, ours))
    torch.testing.assert_close(seen[0], normalise(large, theirs))
    handle.remove()
    model(pixels)
    assert seen[1] is pixels
    assert adapt_input(model, ours, ours) is None and adapt_input(model, ours, InputConfig()) is None
    with pytest.raises(ValueError, match="mean= and std="):
        adapt_input(model, InputConfig(), theirs)


@pytest.mark.slow
def test_a_student_loads_without_the_trainer(tmp_path):
    "In a process that imports neither the trainer nor its packages; the same outputs, exactly."
    torch.manual_seed(0)
    model, x = rcka.create_model("torchvision/shufflenet_v2_x0_5", 3).eval(), torch.randn(2, 3, 64, 64)
    save_student(
        model, tmp_path, "torchvision/shufflenet_v2_x0_5", classes=("a", "b", "c"), config=InputConfig(size=64)
    )
    torch.save((x, model(x)), tmp_path / "expected.pt")
    code = f"""
import sys
import rcka, torch
x, expected = torch.load({str(tmp_path / "expected.pt")!r})
student = rcka.load_student({str(tmp_path)!r})
assert torch.equal(student(x), expected) and torch.equal(torch.jit.script(student)(x), expected)
assert not {{"rcka.train", "accelerate", "pandas", "matplotlib", "typer"}} & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(rcka.__file__).parent.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_an_image_of_the_size_of_the_network_stays_whole():
    "As in training on a data set in memory; a larger one is resized and cropped."
    model = rcka.create_model("resnet8", 3)
    model.input_config = InputConfig((0.5,) * 3, (0.25,) * 3, 32)
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    transform = rcka.student_transform(model)
    torch.testing.assert_close(transform(image), (image / 255 - 0.5) / 0.25)
    assert transform(image.repeat(1, 2, 3)).shape == (3, 32, 32)


def test_a_student_that_is_damaged_is_refused(tmp_path):
    save_student(rcka.create_model("resnet8", 3), tmp_path, "resnet8", classes=("a", "b", "c"))
    weights, card = tmp_path / "student.safetensors", tmp_path / "student.json"
    whole, about = weights.read_bytes(), json.loads(card.read_text())
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="damaged or exchanged"):
        load_student(tmp_path)
    weights.write_bytes(whole)
    card.write_text(json.dumps(about | {"format": 99}))
    with pytest.raises(ValueError, match="format is 99"):
        load_student(tmp_path)
    del about["classes"]
    card.write_text(json.dumps(about))
    with pytest.raises(ValueError, match="lacks classes"):
        load_student(tmp_path)
    card.write_text("{")
    with pytest.raises(ValueError, match="does not describe"):
        load_student(tmp_path)
    card.unlink()
    with pytest.raises(FileNotFoundError, match="no student.json"):
        load_student(tmp_path)


def test_networks_of_timm(tmp_path):
    pytest.importorskip("timm")
    torch.manual_seed(0)
    encoder = rcka.create_model("timm/vit_tiny_patch16_224", 0, img_size=32, patch_size=8).eval()
    config = input_config(encoder)
    assert config.size == 32 and config.interpolation == "bicubic" and config.mean == (0.5, 0.5, 0.5)
    save_student(encoder, tmp_path, "timm/vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8}, config=config)
    x = torch.randn(2, 3, 32, 32)
    loaded = load_student(tmp_path)
    assert torch.equal(loaded(x), encoder(x)) and loaded(x).shape == (2, 192) and input_config(loaded) == config


@pytest.mark.slow
def test_networks_of_transformers():
    pytest.importorskip("transformers")
    small = dict(
        hidden_size=32, num_hidden_layers=6, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    model = rcka.create_model("transformers/vit", 5, **small).eval()
    layers, x = rcka.feature_paths(model), torch.randn(2, 3, 32, 32)
    logits, features = rcka.Taps(model, [*layers.stages, layers.pooled])(x)
    assert logits.shape == (2, 5) and len(features) == 6 and input_config(model).size == 32
