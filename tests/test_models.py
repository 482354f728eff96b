"Networks by name, the layers of other people's networks, and checkpoints."

import copy
import hashlib
import json
import os
import pickle
import shutil
from argparse import Namespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from rcka.data.datasets import load_dataset
from rcka.features import Taps, feature_paths, find_module
from rcka.files import data_root
from rcka.methods.base import create_method
from rcka.methods.cka import fcka
from rcka.models import registry
from rcka.models.registry import (
    create_model,
    export_weights,
    list_models,
    list_weights,
    load_checkpoint,
    load_weights,
    save_weights,
)

PUBLISHED = {  # the field's networks: parameters with 100 classes
    "resnet8": 83892,
    "resnet14": 181108,
    "resnet20": 278324,
    "resnet32": 472756,
    "resnet44": 667188,
    "resnet56": 861620,
    "resnet110": 1736564,
    "resnet8x4": 1233540,
    "resnet32x4": 7433860,
    "wrn_16_1": 180916,
    "wrn_16_2": 703284,
    "wrn_40_1": 569780,
    "wrn_40_2": 2255156,
    "vgg8": 3965028,
    "vgg11": 9277284,
    "vgg13": 9462180,
    "vgg16": 14774436,
    "vgg19": 20086692,
    "resnet18": 11220132,
    "resnet50": 23705252,
    "mobilenet_v2_half": 812836,
    "shufflenet_v1": 949258,
    "shufflenet_v2": 1355528,
    "mobilenet_v1": 3309476,
}  # 4,231,976 with 1000


def test_every_network_is_there():
    assert set(list_models()) == set(PUBLISHED)
    for name, count in PUBLISHED.items():
        with torch.device("meta"):
            assert sum(p.numel() for p in create_model(name).parameters()) == count, name


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_step_of_training(name):
    torch.manual_seed(0)
    model = create_model(name, num_classes=7, in_channels=1)
    layers = feature_paths(model)
    size = (36, 40) if name == "mobilenet_v1" else (20, 24)
    logits, features = Taps(model, [*layers.stages, *layers.preacts, layers.pooled])(torch.randn(4, 1, *size))
    n = len(layers.stages)
    assert logits.shape == (4, 7) and len(layers.preacts) == n
    sizes = [f.shape[2:].numel() for f in features[:n]]
    assert sizes == sorted(sizes, reverse=True)
    assert all(a.shape == b.shape for a, b in zip(features[:n], features[n:]))
    torch.testing.assert_close(find_module(model, layers.head)(features[-1]), logits)
    logits.logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert any(p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["resnet8", "wrn_16_1", "vgg8", "mobilenet_v1", "mobilenet_v2_half", "shufflenet_v1", "shufflenet_v2"]
)
def test_networks_copy_pickle_compile_and_take_channels_last(name):
    torch.manual_seed(0)
    model, x = create_model(name, 5).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        want = model(x)
        assert torch.equal(copy.deepcopy(model)(x), want) and torch.equal(pickle.loads(pickle.dumps(model))(x), want)
        torch.testing.assert_close(
            copy.deepcopy(model).to(memory_format=torch.channels_last)(x), want, atol=1e-4, rtol=1e-4
        )
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)(x), want)
        assert torch.equal(torch.jit.script(model)(x), want)


def test_unknown_names():
    with pytest.raises(ValueError, match="did you mean resnet"):
        create_model("resnet21")
    with pytest.raises(ValueError, match="torchvision network"):
        create_model("torchvision/resnet21")
    with pytest.raises(ValueError, match="unknown network"):
        create_model("torchvision/")
    with pytest.raises(ValueError, match="in_channels"):
        create_model("resnet8", in_channels=0)


def test_timm_is_optional(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"rcka\[timm\]"):
        create_model("timm/resnet18")


TORCHVISION = {
    "alexnet": 3,
    "googlenet": 5,
    "inception_v3": 5,
    "maxvit_t": 5,
    "mnasnet0_5": 5,
    "resnet18": 5,
    "resnext50_32x4d": 5,
    "wide_resnet50_2": 5,
    "vgg11": 5,
    "vgg13_bn": 5,
    "mobilenet_v2": 5,
    "mobilenet_v3_large": 5,
    "mobilenet_v3_small": 5,
    "shufflenet_v2_x0_5": 4,
    "efficientnet_b0": 5,
    "efficientnet_v2_s": 5,
    "densenet121": 5,
    "regnet_y_400mf": 5,
    "convnext_tiny": 5,
    "vit_b_16": 5,
    "swin_t": 5,
    "swin_v2_t": 5,
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_layers_of_torchvision(name):
    torch.manual_seed(0)
    model = create_model(f"torchvision/{name}", 10, in_channels=1).eval()
    layers = feature_paths(model)
    assert len(layers.stages) == TORCHVISION[name] and len(layers.preacts) in (0, len(layers.stages))
    paths = [*layers.stages, *layers.preacts, layers.pooled]
    with torch.no_grad():
        size = 224 if name.startswith(("vit", "maxvit")) else 96 if name == "inception_v3" else 64
        logits, features = Taps(model, paths)(torch.randn(2, 1, size, size))
    torch.testing.assert_close(find_module(model, layers.head)(features[-1]), logits)
    assert len({f.shape for f in features[: len(layers.stages)]}) >= 2
    for before in features[len(layers.stages) : -1]:
        assert before.min() < 0


@pytest.mark.parametrize("name", ["squeezenet1_0", "squeezenet1_1"])
def test_a_classifier_that_is_a_convolution(name):
    "SqueezeNet: stages and a head, but no pooled vector, and a method that wants one says so."
    torch.manual_seed(0)
    model = create_model(f"torchvision/{name}", 10).eval()
    layers = feature_paths(model)
    with torch.no_grad():
        logits, features = Taps(model, layers.stages)(torch.randn(2, 3, 64, 64))
    expected = find_module(model, layers.head)(features[-1]).relu().mean((2, 3))
    torch.testing.assert_close(expected, logits)
    sizes = [f.shape[-1] for f in features]
    assert len(sizes) == 4 and sizes == sorted(sizes, reverse=True)
    with pytest.raises(ValueError, match="rkd .*pooled"):
        create_method("rkd").wants(layers)


@pytest.mark.slow
def test_every_classifier_of_torchvision_has_known_paths():
    "Named, and there: built without memory."
    import torchvision.models as zoo

    for name in zoo.list_models(module=zoo):
        if name.startswith(
            "regnet"
        ):  # computes its widths with tensors, which needs memory; a small one is tested above
            continue
        with torch.device("meta"):
            model = create_model(f"torchvision/{name}", 10)
        layers = feature_paths(model)
        assert len(layers.stages) >= 3 and layers.head, name
        for path in (*layers.stages, *layers.preacts, layers.head):
            find_module(model, path)


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "resnet26d",
        "vit_tiny_patch16_224",
        "swin_tiny_patch4_window7_224",
        "convnext_atto",
        "efficientnet_b0",
        "mobilenetv3_small_050",
        "regnetx_002",
    ],
)
def test_layers_of_timm(name):
    pytest.importorskip("timm")
    model = create_model(f"timm/{name}", 10).eval()
    layers = feature_paths(model)
    with torch.no_grad():
        logits, features = Taps(model, [*layers.stages, layers.pooled])(torch.randn(2, 3, 224, 224))
    assert len(layers.stages) == 5
    torch.testing.assert_close(find_module(model, layers.head)(features[-1]), logits)


def test_mobilenet_v1_is_that_of_timm():
    "The same weights give the same logits, but for the bound at 6, which small activations never meet."
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    theirs, ours = timm.create_model("mobilenetv1_100").eval(), create_model("mobilenet_v1", 1000).eval()
    kinds = lambda model, kind: [m for m in model.modules() if isinstance(m, kind)]
    for kind in (nn.Conv2d, nn.BatchNorm2d, nn.Linear):
        for a, b in zip(kinds(ours, kind), kinds(theirs, kind), strict=True):
            a.load_state_dict(b.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_a_transformer_beside_a_residual_network():
    vit, resnet = create_model("torchvision/vit_b_16", 10), create_model("torchvision/resnet18", 10)
    x = torch.randn(4, 3, 224, 224)
    with torch.no_grad():
        a, b = (Taps(m, feature_paths(m).stages[-1:])(x).features[0] for m in (vit, resnet))
    assert a.shape == (4, 197, 768) and b.shape == (4, 512, 7, 7) and 0 < fcka(a, b) <= 1


# checkpoints

KEYS = {  # names that published checkpoints have
    "resnet20": [
        "conv1.weight",
        "bn1.running_mean",
        "layer1.0.conv1.weight",
        "layer2.0.downsample.0.weight",
        "layer3.2.bn2.bias",
        "fc.weight",
    ],
    "resnet8x4": ["layer1.0.downsample.1.weight"],
    "resnet50": ["layer1.0.shortcut.0.weight", "layer4.2.conv3.weight", "linear.weight"],
    "wrn_16_2": [
        "conv1.weight",
        "block1.layer.0.bn1.weight",
        "block2.layer.0.convShortcut.weight",
        "block3.layer.1.conv2.weight",
        "bn1.weight",
        "fc.bias",
    ],
    "vgg13": [
        "block0.0.weight",
        "block0.0.bias",
        "block0.1.weight",
        "block0.3.weight",
        "block4.4.running_var",
        "classifier.weight",
    ],
    "mobilenet_v2_half": [
        "conv1.0.weight",
        "blocks.0.0.conv.0.weight",
        "blocks.6.0.conv.7.weight",
        "conv2.1.bias",
        "classifier.0.weight",
    ],
    "mobilenet_v1": [
        "model.0.0.weight",
        "model.0.1.running_var",
        "model.1.0.weight",
        "model.13.3.weight",
        "model.13.4.bias",
        "fc.weight",
    ],
    "shufflenet_v1": ["conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "layer2.7.bn3.weight", "linear.weight"],
    "shufflenet_v2": [
        "layer1.0.conv5.weight",
        "layer1.0.bn5.weight",
        "layer3.3.bn3.weight",
        "conv2.weight",
        "bn2.weight",
        "linear.bias",
    ],
}


def theirs(name, key):
    "Our name for a key of a published checkpoint."
    return key.replace("shortcut", "downsample").replace("linear", "fc") if name == "resnet50" else key


@pytest.mark.parametrize("name", KEYS)
def test_names_of_published_checkpoints(name, tmp_path):
    torch.manual_seed(0)
    model = create_model(name, 10)
    assert {theirs(name, key) for key in KEYS[name]} <= set(model.state_dict())
    state = {f"module.{k}": v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    if name == "resnet50":
        state = {k.replace("downsample", "shortcut").replace("fc", "linear"): v for k, v in state.items()}
    torch.save(
        {"epoch": 240, "model": state, "best_acc": np.float64(70.1), "lr": np.float32(0.1), "n": np.int64(3)},
        tmp_path / "c.pth",
    )
    other = create_model(name, 10).eval()
    assert load_checkpoint(other, tmp_path / "c.pth") is other
    with torch.no_grad():
        assert torch.equal(other(torch.ones(1, 3, 32, 32)), model.eval()(torch.ones(1, 3, 32, 32)))


class Marks:
    "A pickle that makes a file when it is loaded."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_checkpoint_is_refused(tmp_path, legacy):
    model = create_model("resnet8", 10)
    before, mark = copy.deepcopy(model.state_dict()), tmp_path / "ran"
    for content in (
        Marks(mark),
        {"model": model.state_dict(), "x": Marks(mark)},
        {"model": model.state_dict(), "opt": Namespace(lr=1)},
    ):
        torch.save(content, tmp_path / "c.pth", _use_new_zipfile_serialization=not legacy)
        with pytest.raises(ValueError, match="unpickling it could run code"):
            load_checkpoint(model, tmp_path / "c.pth")
    assert not mark.exists()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 half of a zip", None])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_broken_files(tmp_path, content, suffix):
    model, path = create_model("resnet8", 10), tmp_path / f"c{suffix}"
    if content is None:
        (save_weights(model, path) if suffix == ".safetensors" else torch.save(model.state_dict(), path))
        content = path.read_bytes()[:-1000]
    path.write_bytes(content)
    with pytest.raises(ValueError, match="c\\."):
        load_checkpoint(model, path)
    with pytest.raises(ValueError, match="safetensors"):
        load_weights(model, path)
    assert path.read_bytes() == content
    with pytest.raises(FileNotFoundError):
        load_checkpoint(model, tmp_path / "nothing.pth")
    with pytest.raises(FileNotFoundError):
        load_weights(model, tmp_path / "nothing")


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", "net"])
def test_where_checkpoints_keep_their_weights(tmp_path, key):
    source, other = create_model("resnet8", 10), create_model("resnet8", 10)
    torch.save(
        {"epoch": 3, key: source.state_dict(), "optimizer_state_dict": {"state": {}, "param_groups": []}},
        tmp_path / "c.pth",
    )
    load_checkpoint(other, tmp_path / "c.pth")
    assert all(torch.equal(a, b) for a, b in zip(source.state_dict().values(), other.state_dict().values()))
    torch.save({"epoch": 3, "optimizer": {}}, tmp_path / "c.pth")
    with pytest.raises(ValueError, match=f"no weights but .*: expected .*'{key}'"):
        load_checkpoint(other, tmp_path / "c.pth")


@pytest.mark.parametrize("classes", [10, 100])  # alike, or other classes besides
@pytest.mark.parametrize("name", ["resnet20", "resnet18"])
def test_shortcuts_without_parameters_are_named(tmp_path, name, classes):
    "The ResNets of CIFAR as He et al. first had them (option A), which a large part of the public checkpoints are."
    model = create_model(name, 10)
    before = copy.deepcopy(model.state_dict())
    state = {
        f"module.{k.replace('fc', 'linear')}": v
        for k, v in create_model(name, classes).state_dict().items()
        if "downsample" not in k
    }
    torch.save({"state_dict": state, "best_prec1": 91.7}, tmp_path / "c.th")
    with pytest.raises(ValueError, match="shortcuts have no parameters .option A") as error:
        load_checkpoint(model, tmp_path / "c.th")
    assert "layer2.0.downsample.0.weight" in str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("source", ["vgg8", "wrn_16_1", "resnet32"])
def test_other_networks_are_not_taken_for_option_a(tmp_path, source):
    torch.save(create_model(source, 10).state_dict(), tmp_path / "c.pth")
    with pytest.raises(ValueError) as error:
        load_checkpoint(create_model("resnet20", 10), tmp_path / "c.pth")
    assert "option A" not in str(error.value)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_does_not_fit_is_named_and_changes_nothing(tmp_path, data):
    model, source = create_model("resnet8", 10), create_model("resnet8", 10)
    state, before = dict(source.state_dict()), copy.deepcopy(model.state_dict())
    key = data.draw(st.sampled_from([k for k in state if not k.endswith("num_batches_tracked")]))
    change = data.draw(st.sampled_from(["drop", "rename", "reshape"]))
    if change == "drop":
        del state[key]
    if change == "rename":
        state[f"{key}x"] = state.pop(key)
    if change == "reshape":
        state[key] = torch.zeros(3, 1, 3)
    torch.save({"state_dict": state}, tmp_path / "c.pth")
    with pytest.raises(ValueError) as error:
        load_checkpoint(model, tmp_path / "c.pth")
    assert key in str(error.value) and str(tuple(before[key].shape)) in str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_half_precision_and_other_devices_keep_the_models_dtype(tmp_path):
    model = create_model("resnet8", 10)
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}, tmp_path / "c.pth")
    loaded = load_checkpoint(create_model("resnet8", 10), tmp_path / "c.pth")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def test_weights_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    model, path, x = (
        create_model("shufflenet_v2", 10).eval(),
        tmp_path / "new" / "w.safetensors",
        torch.ones(1, 3, 32, 32),
    )
    save_weights(model.to(memory_format=torch.channels_last), path)
    good = path.read_bytes()
    torch.testing.assert_close(load_weights(create_model("shufflenet_v2", 10), path).eval()(x), model(x))

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        save_weights(create_model("shufflenet_v2", 10), path)
    assert path.read_bytes() == good and [p.name for p in path.parent.iterdir()] == ["w.safetensors"]


def test_weights_of_a_compiled_network(tmp_path):
    model = create_model("resnet8", 10)
    save_weights(torch.compile(model, backend="eager"), tmp_path / "w.safetensors")
    other = create_model("resnet8", 10)
    load_weights(torch.compile(other, backend="eager"), tmp_path / "w.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))


def test_safetensors_is_optional(monkeypatch, tmp_path):
    import sys

    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="rcka\\[train\\]"):
        save_weights(nn.Linear(1, 1), tmp_path / "w.safetensors")


# weights that ship with the package


@pytest.fixture(scope="module")
def run_of_digits(tmp_path_factory):
    "The folder of a short run on digits, and its data."
    pytest.importorskip("accelerate")
    from rcka.experiments.experiment import Experiment, run

    folder = tmp_path_factory.mktemp("runs") / "digits"
    experiment = Experiment("digits", "resnet8", epochs=2, batch_size=32, lr=0.1, train_limit=200, test_limit=100)
    run(experiment, folder.parent, folder, device="cpu", progress=False)
    return folder, experiment.load_data()


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    "A folder in place of the one in the package."
    monkeypatch.setattr(registry, "WEIGHTS", tmp_path / "weights")
    return tmp_path / "weights"


def accuracy(model, data):
    model.eval()
    with torch.no_grad():
        hits = [(model(x).argmax(1) == t).float() for x, t, _ in data.batches(train=False).epoch()]
    return 100 * torch.cat(hits).mean().item()


def test_weights_of_a_run_are_exported_and_created_by_name(run_of_digits, shipped):
    folder, data = run_of_digits
    made = export_weights(folder, "digits", data, source="a test")
    assert sorted(p.name for p in shipped.iterdir()) == ["resnet8-digits.json", "resnet8-digits.safetensors"]
    assert list_weights() == [made] and (made.network, made.weights) == ("resnet8", "digits")
    model = create_model("resnet8", num_classes=10, in_channels=1, weights="digits")
    trained = load_weights(create_model("resnet8", 10, 1), folder / "last.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), trained.state_dict().values()))
    card, result = made.card, json.loads((folder / "result.json").read_text())
    assert set(card) == set(registry.CARD) and card["licence"] == "Apache-2.0" and card["source"] == "a test"
    assert (card["dataset"], card["classes"], card["shape"], card["evaluated_on"]) == ("digits", 10, [1, 8, 8], "test")
    assert card["mean"] == list(data.mean) and card["std"] == list(data.std) and card["seed"] == 0
    assert card["recipe"]["epochs"] == 2 and card["recipe"]["batch_size"] == 32 and card["recipe"]["train_limit"] == 200
    assert card["sha256"] == hashlib.sha256(made.file.read_bytes()).hexdigest()
    assert card["bytes"] == made.file.stat().st_size <= registry.LARGEST
    assert card["top1"]["file"] == pytest.approx(accuracy(model, data), abs=1e-3)
    assert card["top1"]["last"] == pytest.approx(result["last"]["top1"], abs=1e-3)
    assert card["top1"]["best"] == pytest.approx(result["best"]["top1"], abs=1e-3)
    assert [row["epoch"] for row in card["log"]] == [1, 2] and card["versions"] == result["versions"]
    assert str(folder.parent) not in made.file.with_suffix(".json").read_text()


def test_a_trainers_folder_says_less_and_the_rest_is_given(run_of_digits, shipped, tmp_path):
    folder, data = run_of_digits
    bare = shutil.copytree(folder, tmp_path / "bare")
    (bare / "result.json").unlink()
    with pytest.raises(ValueError, match="does not say the network of its run.*network="):
        export_weights(bare, "digits", data, source="a test")
    with pytest.raises(ValueError, match="does not say the seed of its run.*seed="):
        export_weights(bare, "digits", data, source="a test", network="resnet8")
    made = export_weights(bare, "digits", data, source="a test", network="resnet8", seed=7, recipe={"batch_size": 32})
    assert made.card["seed"] == 7 and made.card["recipe"]["batch_size"] == 32
    assert made.card["recipe"]["lr"] == 0.1 and made.card["recipe"]["epochs"] == 2  # from its checkpoint
    create_model("resnet8", 10, 1, weights="digits")
    for path in bare.glob("checkpoint-*.pt"):
        path.unlink()
    with pytest.raises(ValueError, match="does not say the epochs of its run.*recipe="):
        export_weights(bare, "digits", data, source="a test", network="resnet8", seed=7)


def test_runs_that_must_not_be_exported(run_of_digits, shipped, tmp_path):
    folder, data = run_of_digits
    export = lambda folder=folder, data=data, weights="digits": export_weights(folder, weights, data, source="a test")
    with pytest.raises(ValueError, match="of digits, but data is fashion"):
        export(data=_named(data, "fashion"))
    flipped = _named(data, "digits", test_targets=(data.test_targets + 1) % 10)
    with pytest.raises(ValueError, match="is data what the run was evaluated on"):
        export(data=flipped)
    with pytest.raises(ValueError, match="lower-case letters"):
        export(weights="../digits")
    short = shutil.copytree(folder, tmp_path / "short")
    lines = (short / "metrics.csv").read_text().splitlines()
    (short / "metrics.csv").write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(ValueError, match="not finished: 1 of 2 epochs"):
        export(folder=short)
    with pytest.raises(FileNotFoundError, match="no metrics.csv"):
        export(folder=tmp_path)
    assert not shipped.exists()


def _named(data, name, **changes):
    from dataclasses import replace

    return replace(data, name=name, **changes)


def test_weights_that_there_are_not_are_told_with_those_there_are(run_of_digits, shipped):
    with pytest.raises(ValueError, match="no weights 'cifar100' of resnet20.*in this installation: none"):
        create_model("resnet20", weights="cifar100")
    folder, data = run_of_digits
    export_weights(folder, "digits", data, source="a test")
    with pytest.raises(
        ValueError, match="no weights 'cifar100' of resnet8.*in this installation: resnet8 with 'digits'"
    ):
        create_model("resnet8", weights="cifar100")
    with pytest.raises(ValueError, match="unknown network"):
        create_model("resnet21", weights="digits")
    assert create_model("resnet8", weights=None) is not None


def test_weights_that_do_not_fit_are_refused(run_of_digits, shipped):
    folder, data = run_of_digits
    made = export_weights(folder, "digits", data, source="a test")
    with pytest.raises(ValueError, match=r"for the 10 classes of digits, not for 100: create_model.*num_classes=10"):
        create_model("resnet8", in_channels=1, weights="digits")
    with pytest.raises(ValueError, match="images of 1 channels, not 3: give in_channels=1"):
        create_model("resnet8", 10, weights="digits")
    load = lambda: create_model("resnet8", 10, 1, weights="digits")
    whole = made.file.read_bytes()
    made.file.write_bytes(whole[:-4] + b"\0\0\0\1")  # a valid safetensors file with another number
    with pytest.raises(ValueError, match="not the file that its card describes .SHA-256"):
        load()
    made.file.unlink()
    with pytest.raises(FileNotFoundError, match="missing, though its card is there"):
        load()
    made.file.write_bytes(whole)
    load()
    path = made.file.with_suffix(".json")
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match="or incomplete"):
        load()
    path.write_text(json.dumps({k: v for k, v in made.card.items() if k != "licence"}))
    with pytest.raises(ValueError, match="does not have licence"):
        load()


@pytest.mark.slow
def test_large_networks_ship_in_half_precision_or_not_at_all(run_of_digits, shipped, monkeypatch):
    folder, data = run_of_digits
    export = lambda weights="digits": export_weights(folder, weights, data, source="a test")
    whole = export()
    assert whole.card["dtype"] == "float32"
    monkeypatch.setattr(registry, "LARGEST", 250_000)  # resnet8 has 83,000 parameters
    half = export()
    assert half.card["dtype"] == "float16" and half.card["bytes"] < 250_000 < whole.card["bytes"]
    model = create_model("resnet8", 10, 1, weights="digits")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert half.card["top1"]["file"] == pytest.approx(accuracy(model, data), abs=1e-3)
    monkeypatch.setattr(registry, "LARGEST_SUM", 2 * half.card["bytes"] - 1)
    export()  # takes the place of the older one
    with pytest.raises(ValueError, match="with resnet8-more .*others are resnet8-digits"):
        export("more")
    monkeypatch.setattr(registry, "LARGEST", 100_000)
    with pytest.raises(ValueError, match="too large to ship: 0.2 MB"):
        export()


def test_the_weights_in_the_package_are_whole():
    cards = list_weights()
    files = sorted(registry.WEIGHTS.glob("*.safetensors"))
    assert [w.file for w in cards] == files
    assert sum(f.stat().st_size for f in files) <= registry.LARGEST_SUM
    for w in cards:
        assert (
            w.file.stat().st_size == w.card["bytes"] <= registry.LARGEST and w.file.stem == f"{w.network}-{w.weights}"
        )
        assert len(w.card["class_names"]) == w.card["classes"] and w.card["log"]
        create_model(w.network, w.card["classes"], w.card["shape"][0], weights=w.weights)


@pytest.mark.real_data
def test_the_weights_in_the_package_score_what_their_cards_say(real_data):
    if not list_weights():
        pytest.skip("no weights are in the package")
    for w in list_weights():
        fraction = {} if w.card["evaluated_on"] == "test" else {"val_fraction": w.card["recipe"]["val_fraction"]}
        data = load_dataset(w.card["dataset"], data_root(), download=False, **fraction)
        model = create_model(w.network, data.num_classes, data.channels, weights=w.weights)
        assert accuracy(model, data) == pytest.approx(w.card["top1"]["file"], abs=0.1), w.file.stem
