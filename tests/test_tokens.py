"Tokens and channels-last maps as maps: by name, and chosen from what a module returns."

import pytest
import torch
import torchvision.models as zoo
from torch import nn

from rcka.features import FORMS, Taps, as_map, feature_paths, parse_path
from rcka.methods import FOR_CLASSIFIERS  # not list_methods(): other tests register more
from rcka.methods.base import create_method
from rcka.pair import Pair

ON_MAPS = [  # a transformer cannot be run on from its tokens as a map: tests/test_run_on.py
    n for n in sorted(FOR_CLASSIFIERS) if any((m := create_method(n)).wants_maps(2)) and not m.runs_networks
]
SMALL = {"dpk": {"width": 8}}


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize(
    ("grid", "size"), [((4, 4), (32, 32)), ((14, 14), (224, 224)), ((4, 7), (64, 112)), ((8, 4), (128, 64))]
)
def test_tokens_are_read_row_by_row(prefix, grid, size):
    "A map cut into tokens, with class and register tokens before it, comes back as it was."
    h, w = grid
    want = torch.randn(2, 3, h, w)
    tokens = torch.cat([torch.full((2, prefix, 3), 9.0), want.flatten(2).mT], 1)
    assert torch.equal(as_map(tokens, size), want)
    assert torch.equal(as_map(tokens, size, prefix), want)


def test_a_known_number_of_first_tokens_decides():
    "Nine tokens are a grid of 3 x 3, or of 2 x 2 with a class and four register tokens."
    tokens = torch.randn(2, 9, 3)
    assert as_map(tokens, (32, 32)).shape == (2, 3, 3, 3) and as_map(tokens, (32, 32), 5).shape == (2, 3, 2, 2)
    assert as_map(tokens[:, :4], (32, 32), 5).shape == (2, 3, 2, 2)  # an embedding before they are added


def test_tokens_of_no_grid_are_refused():
    with pytest.raises(ValueError, match="46 tokens are no grid of patches of images of 64 x 64.*':cls' or ':mean'"):
        as_map(torch.randn(2, 46, 3), (64, 64))


def test_paths_name_forms():
    assert parse_path("vit.layers.3[0]:map") == ("vit.layers.3", False, (0,), "map")
    assert parse_path("fc:input:mean") == ("fc", True, (), "mean")
    assert [parse_path(f"a:{form}").form for form in FORMS] == list(FORMS)
    with pytest.raises(ValueError, match="one of map, cls, mean"):
        parse_path("blocks.3:tokens")


class Blocks(nn.Module):
    "Embeds patches, adds a class token, and returns what the test asks of it."

    def __init__(self, form):
        super().__init__()
        self.embed, self.block, self.form = nn.Conv2d(3, 8, 4, stride=4), nn.Identity(), form

    def forward(self, x):
        maps = self.embed(x)
        tokens = torch.cat([maps.mean((2, 3))[:, None], maps.flatten(2).mT], 1)
        out = {"tokens": tokens, "last": maps.movedim(1, -1), "tuple": (tokens, (4, 4)), "two": (tokens, maps)}
        self.block(out[self.form])
        return maps.mean((2, 3))


def run(form, *paths, size=(16, 16)):
    torch.manual_seed(0)
    taps = Taps(Blocks(form), ["embed", *paths])
    _, (maps, *found) = taps(torch.randn(2, 3, *size))
    return taps, maps, found


@pytest.mark.parametrize("size", [(16, 16), (16, 24)])
@pytest.mark.parametrize("form", ["tokens", "last", "tuple"])
def test_maps_by_name(form, size):
    _, maps, (found,) = run(form, "block:map", size=size)
    assert torch.equal(found, maps)


def test_class_token_and_mean():
    _, maps, (cls, mean) = run("tokens", "block:cls", "block:mean")
    torch.testing.assert_close(cls, maps.mean((2, 3)))
    torch.testing.assert_close(mean, maps.mean((2, 3)))
    _, maps, (mean, plain) = run("last", "block:mean", "embed:mean")
    torch.testing.assert_close(mean, plain)
    with pytest.raises(ValueError, match="'embed:cls' asks for the class token, the first of tokens"):
        run("tokens", "embed:cls")
    with pytest.raises(TypeError, match="a tuple of 2, which is no tensor"):
        run("two", "block")


def test_forms_are_chosen():
    for form in ("tokens", "last", "tuple"):
        taps, maps, (found,) = run(form, "block")
        assert taps.map_path("block", found, True) == "block:map"
        assert taps.map_path("block", found, False) == ("block:map" if form == "last" else "block")
        assert taps.map_path("embed", maps, True) == "embed"
    taps, _, (found,) = run("tokens", "block:cls")
    assert taps.map_path("block:cls", found, True) == "block:cls"  # said by name


def test_a_square_with_as_many_channels_is_taken_as_channels_first():
    "As it stands in a plain convolutional network: 8 channels of 8 x 8."
    taps = Taps(nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1)), ["0"])
    _, (found,) = taps(torch.randn(2, 3, 16, 16))
    assert found.shape == (2, 8, 8, 8) and taps.map_path("0", found, True) == "0"


def transformer(name):
    torch.manual_seed(0)
    if name == "vit":
        return zoo.VisionTransformer(32, 4, 4, 2, 16, 32, num_classes=5)
    if name == "swin":
        return zoo.SwinTransformer([2, 2], 8, [1, 1, 1, 1], [1, 1, 2, 2], [2, 2], num_classes=5)
    return zoo.ConvNeXt([zoo.convnext.CNBlockConfig(8, 16, 1), zoo.convnext.CNBlockConfig(16, None, 1)], num_classes=5)


def teacher():
    torch.manual_seed(1)
    return zoo.ResNet(zoo.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)


@pytest.mark.parametrize("name", ON_MAPS)
@pytest.mark.parametrize("network", ["vit", "swin"])
def test_methods_on_maps_train_transformers(network, name):
    "A ResNet teaches a transformer of torchvision, and the other way round."
    if name == "ofd":
        pytest.skip("compares pre-activations, which transformers have not")
    x, y = torch.randn(4, 3, 64 if network == "swin" else 32, 64 if network == "swin" else 32), torch.arange(4)
    for swap in (False, True):
        nets = [transformer(network), teacher()]
        student, other = nets[::-1] if swap else nets
        with Pair(student, other, create_method(name, SMALL.get(name)), x) as pair:
            terms = pair(x, y)
            sum(terms.values()).backward()
            assert all(term.isfinite() for term in terms.values()), terms
            trained = [p.grad for p in student.parameters() if p.grad is not None]
            assert trained and all(g.isfinite().all() for g in trained)
            own, others = (pair.teacher_taps, pair.student_taps) if swap else (pair.student_taps, pair.teacher_taps)
            assert any(path.endswith(":map") for path in own.paths)
            assert not any(path.endswith(":map") for path in others.paths)


def test_torchvision_s_paths_give_maps():
    "All stages: the same numbers of channels as the features themselves, and the shape of the images."
    for name, network in [
        ("vit_b_16", None),
        ("swin_t", None),
        ("convnext", transformer("convnext")),
        ("resnet", teacher()),
    ]:
        model = (network or getattr(zoo, name)(weights=None)).eval()
        stages = feature_paths(model).stages if name != "convnext" else ["features.0", "features.1", "features.3"]
        taps = Taps(model, stages)
        with torch.no_grad():
            _, features = taps(torch.randn(1, 3, 224, 224))
            paths = [taps.map_path(path, value, True) for path, value in zip(stages, features)]
            maps = Taps(model, paths)(torch.randn(1, 3, 224, 224)).features
        for path, value, found in zip(stages, features, maps):
            channels = value.shape[1 if value.dim() == 4 and not taps._channels_last(value) else -1]
            assert found.shape[1] == channels and found.shape[2] == found.shape[3] > 1, path


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "deit_tiny_distilled_patch16_224",
        "swin_tiny_patch4_window7_224",
        "pvt_v2_b0",
        "levit_128s",
    ],
)
def test_timm_s_networks_give_maps(name):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=5).eval()
    x = torch.randn(2, 3, 224, 224)
    with Pair(teacher(), model, "cka_places", x) as pair:
        assert pair(x)["cka_places"].isfinite()
        features = pair.teach(x).features
        assert all(f.dim() == 4 and f.shape[2] == f.shape[3] and f.shape[1] > f.shape[2] for f in features)


def test_transformers_networks_give_maps():
    transformers = pytest.importorskip("transformers")
    sizes = dict(num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8)
    vit = transformers.ViTConfig(hidden_size=16, num_labels=5, **sizes)
    dino = transformers.Dinov2WithRegistersConfig(hidden_size=16, num_labels=5, **sizes)
    swin = transformers.SwinConfig(
        image_size=32, patch_size=2, embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=2, num_labels=5
    )
    x = torch.randn(4, 3, 32, 32)
    for model in (
        transformers.ViTForImageClassification(vit),
        transformers.Dinov2WithRegistersForImageClassification(dino),
        transformers.SwinForImageClassification(swin),
    ):
        layers = feature_paths(model)
        assert layers.head == "classifier" and len(layers.stages) == 5
        with Pair(model, teacher(), "at+kd", x) as pair:
            terms = pair(x, torch.arange(4))
            assert all(term.isfinite() for term in terms.values())
            assert all(path.endswith(":map") for path in pair.student_taps.paths)
