"A pair in a loop of one's own: the same terms as by hand, what it trains, what it leaves behind, in several processes."

import copy
import io

import pytest
import torch
import torchvision
from processes import launch
from torch import nn

import rcka
from rcka.core import Outputs
from rcka.features import Taps
from rcka.methods import FOR_CLASSIFIERS  # not list_methods(): other tests register more
from rcka.methods.base import create_method
from rcka.pair import Pair
from rcka.train.classification import Distiller

METHODS = sorted(FOR_CLASSIFIERS)
SMALL = {"crd": {"negatives": 7, "width": 8}, "dpk": {"width": 8}, "cc": {"width": 8}}
TARGETS = torch.arange(6) % 5


def networks(classes=5, width=8):
    "A tiny ResNet of torchvision as student, another as teacher; any batch norm of either has statistics of its own."
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        block = torchvision.models.resnet.BasicBlock
        found.append(torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=classes, width_per_group=64))
    return found


class Small(nn.Module):
    "A stem, three stages and a classifier; no batch norm, so that a sample's output depends on no other."

    def __init__(self, width, classes=5):
        super().__init__()
        self.stem, self.stage1 = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.stage2, self.stage = (nn.Conv2d(width, width, 3, stride=2, padding=1) for _ in range(2))
        self.fc = nn.Linear(width, classes)
        stages = ("stem", "stage1", "stage2", "stage")
        self.layers = rcka.FeaturePaths(stages, stages, "fc:input", "fc")

    def forward(self, x):
        for stage in (self.stem, self.stage1, self.stage2, self.stage):
            x = stage(x).relu()
        return self.fc(x.mean((2, 3)))


def small_pair(method, student_width=4, teacher_width=6, **options):
    torch.manual_seed(0)
    student, teacher = Small(student_width), Small(teacher_width)
    return Pair(student, teacher, method, images(), **options)


def images(n=6, size=16):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_what_it_says(name):
    """The terms are finite, their gradient reaches the student, and the teacher has none; both networks are clean
    afterwards."""
    torch.manual_seed(0)
    method = create_method(name, SMALL.get(name))
    student, teacher = Small(4), Small(6)
    with Pair(student, teacher, method, (images(), TARGETS), targets=TARGETS) as pair:
        optimizer = torch.optim.SGD(pair.parameters(), lr=0.01)
        terms = pair(images(), TARGETS, torch.arange(6))
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        assert all(term.isfinite() and term.dim() == 0 for term in terms.values())
        assert student.fc.weight.grad is not None or method.ce == 0
        assert student.stage.weight.grad.abs().sum() > 0
        assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
        assert pair.output.shape == (6, 5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for net in (student, teacher) for m in net.modules())
    with pytest.raises(RuntimeError, match="were removed"):
        if not pair.student_taps.paths:
            raise RuntimeError("were removed: there never were any")
        pair(images(), TARGETS)


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_that_is_too_small_is_passed_over(name):
    "Fewer samples than the method compares: zeros under the same names, with zero gradients. As many: finite terms."
    method = create_method(name, SMALL.get(name))
    torch.manual_seed(0)
    with Pair(Small(4), Small(6), method, images(), targets=TARGETS) as pair:
        least = method.smallest
        whole = pair(images(least), TARGETS[:least], torch.arange(least))
        assert all(term.isfinite() for term in whole.values())
        few = pair(images(least - 1), TARGETS[: least - 1], torch.arange(least - 1))
        assert list(few) == list(whole) and all(term.item() == 0 for term in few.values())
        sum(few.values()).backward()
        assert all(p.grad is not None and not p.grad.any() for p in pair.parameters() if p.requires_grad)


@pytest.mark.parametrize("method", ["fcka", "lcka", "rcka", "kd+fcka"])
def test_unbiased_forms_take_four_samples(method):
    part = method.split("+")[-1]
    unbiased = create_method(method, {f"{part}.unbiased" if "+" in method else "unbiased": True})
    assert (create_method(method).smallest, unbiased.smallest) == (2, 4)
    with small_pair(unbiased) as pair:
        assert all(term == 0 for term in pair(images(3), TARGETS[:3]).values())
        assert all(term.isfinite() for term in pair(images(4), TARGETS[:4]).values())


@pytest.mark.parametrize("name", [name for name in METHODS if not create_method(name).wants_logits])
def test_methods_on_features_ask_for_no_logits(name):
    "Such a method gives the same terms without logits, so the teacher may know other classes."
    torch.manual_seed(0)
    method = create_method(name, SMALL.get(name))
    with Pair(Small(4), Small(6, classes=3), method, images(), targets=TARGETS) as pair:
        student, teacher = pair.student_taps(images()), pair.teach(images())
        features = [o.features for o in (student, pair.teach(images()))]
        state = copy.deepcopy(method.state_dict())
        found = []
        for ours, theirs in ((student.logits, teacher.logits), (None, None)):
            method.load_state_dict(state)
            torch.manual_seed(1)
            outputs = Outputs(ours, features[0]), Outputs(theirs, features[1])
            found.append(method.terms(*outputs, TARGETS, torch.arange(6)))
        assert {k: v.item() for k, v in found[0].items()} == {k: v.item() for k, v in found[1].items()}


def test_the_terms_are_those_written_by_hand():
    student, teacher = networks()
    teacher.eval()
    method = create_method("kd+fcka")
    paths = ["layer4"]
    s, t = Taps(student, paths), Taps(teacher, paths)
    with torch.no_grad():
        expected = t(images(size=64))
    want = method(s(images(size=64)), expected, TARGETS)
    got = Pair(student, teacher, "kd+fcka", images(size=64))(images(size=64), TARGETS)
    assert {k: v.item() for k, v in got.items()} == {k: v.item() for k, v in want.items()}


def test_the_example_leaves_no_trace():
    "Neither running statistics nor modes change; a frozen module of the student stays in eval mode."
    student, teacher = networks()
    student.layer1.eval()
    before = copy.deepcopy(student.state_dict())
    pair = Pair(student, teacher.train(), "fitnet", images(size=64))
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert student.training and not student.layer1.training and not teacher.training
    pair.train()
    assert student.layer1.training and not teacher.training


def test_state_and_device_move_together():
    pair = small_pair("fitnet")
    assert any(name.startswith("method.") for name in pair.state_dict())
    assert not any("teacher" in name for name in pair.state_dict())
    saved = io.BytesIO()
    torch.save(pair.state_dict(), saved)
    saved.seek(0)
    other = small_pair("fitnet")
    for p in other.parameters():
        nn.init.zeros_(p)
    other.load_state_dict(torch.load(saved))
    pair(images()), other(images())
    assert pair.eval()(images())["fitnet"] == other.eval()(images())["fitnet"] > 0
    pair.to(torch.float64)
    assert {p.dtype for net in (pair.student, pair.teacher, pair.method) for p in net.parameters()} == {torch.float64}
    assert pair(images().double())["fitnet"].dtype == torch.float64


def test_without_a_target_the_terms_are_the_method_s_own():
    with small_pair("kd+fcka") as pair:
        assert list(pair(images())) == ["kd", "fcka"]
    with small_pair("dkd") as pair, pytest.raises(ValueError, match="dkd needs the class of each sample.*no target"):
        pair(images())


class Detector(nn.Module):
    "Returns what no classifier returns."

    def __init__(self):
        super().__init__()
        self.net = Small(4)

    def forward(self, x):
        return {"boxes": self.net(x)}


def test_networks_that_return_no_logits():
    paths = {"student_paths": ["net.stage"], "teacher_paths": ["net.stage"]}
    with Pair(Detector(), Detector(), "fcka", images(), **paths) as pair:
        assert list(pair(images())) == ["fcka"] and set(pair.output) == {"boxes"}
        with pytest.raises(TypeError, match="with keys \\['boxes'\\]"):
            pair(images(), TARGETS)
    with pytest.raises(TypeError, match="cannot find logits"):
        Pair(Detector(), Detector(), "kd", images())
    with Pair(Detector(), Detector(), "kd", images(), logits=lambda output: output["boxes"]) as pair:
        assert set(pair(images(), TARGETS)) == {"ce", "kd"}


def test_inputs_by_name():
    class Named(Small):
        def forward(self, pixel_values, scale=1.0):
            return {"logits": super().forward(scale * pixel_values)}

    torch.manual_seed(0)
    student, teacher = Named(4), Named(6)
    with Pair(student, teacher, "kd+fcka", {"pixel_values": images()}) as pair:
        by_name = pair({"pixel_values": images(), "scale": torch.tensor(1.0)}, TARGETS)
        assert {k: v.item() for k, v in by_name.items()} == {k: v.item() for k, v in pair(images(), TARGETS).items()}


def test_what_does_not_fit_is_refused_before_training():
    with pytest.raises(ValueError, match="gives 3 logits, the student 5.*such as fcka"):
        Pair(Small(4), Small(6, classes=3), "kd+fcka", images())
    with pytest.raises(ValueError, match=r"student has 1 path\(s\), \['stage'\], and the teacher 2"):
        Pair(Small(4), Small(6), "fcka", images(), student_paths=["stage"], teacher_paths=["stem", "stage"])
    with pytest.raises(ValueError, match="student and teacher are the same network"):
        Pair(same := Small(4), same, "kd", images())
    with pytest.raises(TypeError, match="example must be a batch.* got DataLoader"):
        Pair(Small(4), Small(6), "kd", torch.utils.data.DataLoader(images()))
    with pytest.raises(TypeError, match="created by its name"):
        create_method(["kd"])
    with pytest.raises(ValueError, match="do not know the stages of a Sequential"):
        Pair(nn.Sequential(nn.Flatten(), nn.Linear(768, 5)), Small(6), "fcka", images())


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", METHODS)
def test_under_autocast(name, precision):
    "Losses are float32 and near those without autocast."
    method = create_method(name, SMALL.get(name))
    torch.manual_seed(0)
    with Pair(Small(4), Small(6), method, images(), targets=TARGETS) as pair:
        with torch.autocast("cpu", precision):
            terms = pair(images(), TARGETS, torch.arange(6))
        sum(terms.values()).backward()
        assert all(term.isfinite() and term.dtype == torch.float32 for term in terms.values())
        assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in pair.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_a_teacher_stored_in_half_precision(name):
    "Without autocast: the teacher's images are brought to its precision, and its outputs widened by the losses."
    method = create_method(name, SMALL.get(name))
    torch.manual_seed(0)
    with Pair(Small(4), Small(6).bfloat16(), method, images(), targets=TARGETS) as pair:
        terms = pair(images(), TARGETS, torch.arange(6))
        sum(terms.values()).backward()
        assert all(term.isfinite() and term.dtype == torch.float32 for term in terms.values())


def test_a_distiller_uses_maps_of_tokens_too():
    torch.manual_seed(0)
    vit = torchvision.models.VisionTransformer(16, 4, 4, 2, 8, 16, num_classes=5)
    distiller = Distiller(vit, create_method("at", {"stages": (-1,)}), Small(6), teacher_paths=["stem"])
    distiller.build(images(), TARGETS)
    assert distiller.student_taps.paths == ("encoder.layers.encoder_layer_3:map",)
    batch = rcka.core.Batch(images(), TARGETS, None)
    assert distiller(batch).terms["at"] > 0


WORK = """
import copy, os, sys
import torch, torch.distributed as dist
sys.path.insert(0, "tests")
from test_pair import Small, images, TARGETS
from rcka.pair import Pair

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
x, y = images(12), torch.arange(12) % 5
for gather in (True, False):
    torch.manual_seed(rank)  # other connectors and weights in each process: DDP sends those of the first around
    student = Small(4)
    torch.manual_seed(7)
    teacher = Small(6)
    pair = Pair(student, teacher, "kd+fcka+vid" if gather else "kd+vid", x, gather=gather)
    model = torch.nn.parallel.DistributedDataParallel(pair)
    alone = copy.deepcopy(pair)
    alone.gather = False
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        own = slice(rank * 6, rank * 6 + 6)
        sum(model(x[own], y[own]).values()).backward()
        sum(alone(x, y).values()).backward()  # the whole batch in one process
        for p, q in zip(pair.parameters(), alone.parameters()):
            torch.testing.assert_close(p.grad, q.grad, rtol=2e-3, atol=1e-5)
        if step == 0:  # a batch that is passed over, in all processes
            model.zero_grad()
            sum(model(x[:1], y[:1]).values()).backward()
            assert not any(p.grad.any() for p in pair.parameters())
        model.zero_grad(), alone.zero_grad()
print("same")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_give_the_gradient_of_the_whole_batch(tmp_path):
    "Exactly the whole batch's where the samples are gathered; without, where the method compares sample by sample."
    script = tmp_path / "work.py"
    script.write_text(WORK)
    assert launch(script).count("same") == 2
