"Checks of the methods that need more lines than the pages that explain them have room for."

import torch
import torch.nn.functional as F
from fastcore.test import test_close as close
from fastcore.test import test_eq as eq
from fastcore.test import test_fail as fails

from rcka.core import FeaturePaths, Outputs
from rcka.methods.base import create_method
from rcka.methods.cka import fcka, lcka, pcka
from rcka.methods.dense import dense_kd_loss, pkd_loss
from rcka.methods.features import crd_loss, paper_args
from rcka.similarity.measures import cka


def test_row_normalised_lcka_is_the_released_formula():
    torch.manual_seed(0)
    S, T = torch.randn(12, 30, dtype=torch.float64), torch.randn(12, 30, dtype=torch.float64)

    def released(x, y):
        k, l = x @ x.T, y @ y.T
        k, l = k / k.diag().sqrt()[:, None], l / l.diag().sqrt()[:, None]
        return (k * l).sum() / (k.norm() * l.norm())

    close(lcka(S, T, center=False, normalize_rows=True), (released(S, T), released(S.T, T.T)), eps=1e-12)
    close(lcka(S.T, T.T, center=False, normalize_rows=True), (released(S.T, T.T), released(S, T)), eps=1e-12)
    close(lcka(S, T, temperature=4)[0], cka((S / 4).softmax(1), (T / 4).softmax(1)), eps=1e-12)
    fails(lambda: lcka(S, T, normalize_rows=True), contains="center=False")
    fails(lambda: lcka(S, T[:, :9]), contains="the same shape")


def test_constant_logits_have_no_direction():
    torch.manual_seed(0)
    options = [
        {},
        {"unbiased": True},
        {"center": False},
        {"temperature": 2.0},
        {"center": False, "normalize_rows": True},
    ]
    for given in options:
        for fill in [0.0, 3.3]:
            flat = torch.full((8, 10), fill, requires_grad=True)
            intra, inter = lcka(flat, torch.randn(8, 10), **given)
            (intra + inter).backward()
            assert intra.isfinite() and inter.isfinite() and flat.grad.isfinite().all()
            if given.get("center", True):
                eq((intra.item(), inter.item()), (0, 0))


def test_pcka_of_degenerate_maps():
    torch.manual_seed(0)
    S, T = torch.randn(2, 3, 9, 13, dtype=torch.float64), torch.randn(2, 3, 18, 27, dtype=torch.float64)
    close(pcka(T, 3 * T), (1, 1), eps=1e-12)
    assert pcka(S, T, inter=False).inter is None
    one = torch.randn(2, 3, 5, 7, dtype=torch.float64)  # a single patch
    close(pcka(S, one).intra, 1, eps=1e-12)
    eq(pcka(S, one, center=True).intra.item(), 0)
    flat = torch.full((2, 3, 9, 13), 3.3, dtype=torch.float64, requires_grad=True)  # constant channels
    both = pcka(flat, T, center=True)
    sum(both).backward()
    eq([x.item() for x in both], [0, 0])
    eq(flat.grad.abs().max().item(), 0)
    eq([x.item() for x in pcka(0 * S, T)], [0, 0])
    fails(lambda: pcka(S[:, :2], T), contains="with a connector")
    fails(lambda: pcka(S[:1], T), contains="batches differ")
    fails(lambda: pcka(S[0], T[0]), contains="(3, 9, 13) of the student")
    fails(lambda: pcka(S, T, patch_size=0), contains="at least 1")


def example():
    torch.manual_seed(0)
    student = Outputs(torch.randn(8, 10), (torch.randn(8, 64, 4, 4),))
    return student, Outputs(torch.randn(8, 10), (torch.randn(8, 256, 4, 4),)), torch.arange(8)


def test_terms_and_errors_of_the_cka_methods():
    student, teacher, target = example()
    terms = create_method("rcka")(student, teacher, target)
    eq(list(terms), ["ce", "fcka", "lcka_intra", "lcka_inter"])
    close(terms["fcka"], 16 * (1 - fcka(student.features[0], teacher.features[0])))
    layers = FeaturePaths(stages=("relu", "layer1", "layer2", "layer3"))
    both = create_method("fcka+lcka", {"fcka.weight": 2, "lcka.inter": 0})
    eq(both.wants(layers), ["layer3"])
    eq(set(both(student, teacher, target)), {"ce", "fcka", "lcka_intra"})
    eq(set(create_method("none")(student, None, target)), {"ce"})
    assert all(v.isfinite() for v in create_method("rcka_released")(student, teacher, target).values())
    fails(lambda: create_method("rkca"), contains="did you mean rcka")
    fails(lambda: create_method("fcka", {"wieght": 1}), contains="did you mean weight")
    fails(lambda: create_method("fcka+lcka", {"weight": 1}), contains="must begin with one of fcka., lcka.")
    fails(lambda: create_method("fcka", {"stages": (4,)}).wants(layers), contains="stages=(4,), but the network has 4")


def test_terms_vanish_for_the_same_maps():
    torch.manual_seed(0)
    teacher = Outputs(torch.empty(2, 0), tuple(torch.randn(2, 12, *size) for size in [(24, 32), (12, 16), (6, 8)]))
    same = Outputs(torch.empty(2, 0), tuple(t.clone() for t in teacher.features))
    for args, zeros in [(dict(inter=10, mimic=1), [0, 0, 0]), (dict(), [0])]:
        method = create_method("pcka", args | dict(patch_size=4))
        method.build(same, teacher)
        terms = method.terms(same, teacher)
        close(list(terms.values()), zeros, eps=1e-5)
    eq(list(terms), ["pcka_intra"])


def test_lcka_of_maps_of_logits_has_a_gradient():
    torch.manual_seed(0)
    method = create_method("lcka", dict(intra=10, inter=10, center=False, normalize_rows=True))
    logits = torch.randn(2, 5, 8, 16, requires_grad=True)
    terms = method.terms(Outputs(logits), Outputs(torch.randn(2, 5, 8, 16)))
    sum(terms.values()).backward()
    assert logits.grad.isfinite().all() and list(terms) == ["lcka_intra", "lcka_inter"]


def test_crd_is_its_formula_and_remembers():
    torch.manual_seed(0)
    labels = torch.tensor([2, 0, 1, 1, 0, 2, 2, 1])
    crd = create_method("crd", {"negatives": 5, "width": 4})
    student, teacher = (
        Outputs(torch.randn(3, 3), (torch.randn(3, 6),)),
        Outputs(torch.randn(3, 3), (torch.randn(3, 7),)),
    )
    fails(lambda: crd.build(student, teacher), contains="targets")
    crd.build(student, teacher, targets=labels)
    fails(lambda: crd(student, teacher, labels[:3]), contains="index")
    index = torch.tensor([5, 0, 2])
    before = crd.teacher_memory
    torch.manual_seed(1)
    crd(student, teacher, labels[index], index)
    torch.manual_seed(1)
    rows = torch.cat([index[:, None], crd.others(labels[index], 5)], 1)
    s, t = (F.normalize(e) for e in crd.connectors[0](student.features[0], teacher.features[0]))
    P = torch.stack([torch.stack([(s[i] @ before[j] / 0.07).exp() for j in rows[i]]) for i in range(3)])
    P, c = P / (P.mean() * 8), 5 / 8
    naive = -((P[:, 0] / (P[:, 0] + c)).log().sum() + (c / (P[:, 1:] + c)).log().sum()) / 3
    one, z = crd_loss(s, before, rows, torch.zeros(()))
    close(one, naive, eps=1e-4)
    close(z / crd.z[0], 1)
    close(crd.teacher_memory[5], F.normalize(before[5] / 2 + t[0] / 2, dim=0))
    eq(crd.teacher_memory[1], before[1])
    eq([k for k in crd.state_dict() if "connector" not in k], ["student_memory", "teacher_memory", "z"])


def test_published_arguments():
    eq(paper_args("dkd", "vgg13", "mobilenet_v2_half"), {"beta": 6.0})
    eq(paper_args("dkd", "resnet32x4", "resnet8x4"), {})
    eq(paper_args("cat_kd", "vgg13", "vgg8"), {"weight": 4.5})
    eq(paper_args("kd+reviewkd", "resnet110", "resnet32"), {"reviewkd.weight": 1.0})
    eq(paper_args("dkd", "resnet50", "mobilenet_v1", "imagenet"), dict(beta=2.0, temperature=1.0, warmup=1))
    eq(paper_args("kd+ickd_c", "resnet32x4", "resnet8x4"), {"kd.weight": 1.0, "kd.ce": 1.0})


def test_fgd_terms_and_errors():
    torch.manual_seed(0)
    sizes = [(12, 16), (6, 8), (3, 4)]
    student = Outputs(None, tuple(torch.randn(2, 8, *size, requires_grad=True) for size in sizes))
    teacher = Outputs(None, tuple(torch.randn(2, 8, *size) for size in sizes))
    boxes = torch.tensor([[8.0, 8, 60, 50], [16, 16, 30, 26], [80, 40, 120, 62]])
    method = create_method("fgd")
    fails(lambda: method.terms(student, teacher, None), contains="call method.build")
    method.build(student, teacher)
    target = [{"boxes": boxes, "input_size": (48, 64)}, {"boxes": boxes[:0], "input_size": (48, 64)}]
    terms = method.terms(student, teacher, target)
    close(
        terms["fgd_global"],
        5e-6 * sum((s - t).square().sum() / 2 for s, t in zip(student.features, teacher.features)),
        eps=1e-7,
    )  # W_2 is zero yet
    sum(terms.values()).backward()
    assert all(s.grad.abs().sum() > 0 for s in student.features)
    fails(lambda: method.terms(student, teacher, torch.zeros(2)), contains="a list of dicts")
    eq(create_method("fgd").wants(FeaturePaths(tuple("abcde"))), list("abcde"))


def test_dense_kd_of_maps_and_of_extreme_logits():
    torch.manual_seed(0)
    S, T = 3 * torch.randn(50, 7, dtype=torch.float64), 3 * torch.randn(50, 7, dtype=torch.float64) - 2
    close(dense_kd_loss(S.T.reshape(1, 7, 5, 10), T.T.reshape(1, 7, 5, 10)), dense_kd_loss(S, T), eps=1e-12)  # maps
    assert dense_kd_loss(torch.full((9, 3), -200.0), torch.full((9, 3), 200.0), "sigmoid").isfinite()
    fails(lambda: dense_kd_loss(S, T, "relu"), contains="use softmax")
    fails(lambda: create_method("dense_kd").terms(Outputs(None), Outputs(None)), contains="(rows, classes)")


def test_pkd_of_a_constant_map_is_one():
    assert pkd_loss(torch.full((2, 5, 7, 9), 0.1), torch.randn(2, 5, 7, 9)) == 1
