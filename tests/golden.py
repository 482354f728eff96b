"""The numbers of the package on fixed inputs: the losses of all methods, the 23 networks, and a short training run.

`golden.json` holds those of the tree before it was rebuilt, commit b739d5e. It was written there by this file, which
runs on both:

    git worktree add ../before b739d5e
    PYTHONPATH=../before python tests/golden.py --write tests/golden.json"""

import argparse
import inspect
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from rcka import Outputs, Taps, create_method, create_model, load_dataset

try:
    from rcka import Distiller, TrainConfig, Trainer
    from rcka.pair import head_of
except ImportError:  # the tree before
    from rcka.trainer import Distiller, Trainer, head_of
    from rcka.trainer import Recipe as TrainConfig

FILE = Path(__file__).with_suffix(".json")
CLASSIFIERS = (
    "kd dkd dist ikl_kd nkd sp rkd pkt fitnet at nst vid cc crd ofd reviewkd ickd_c mgd srrl dpk cka_places wkd_f "
    "itrd srd ofa standardized lskd ttm wttm normkd rld mlkd skd wkd_l cka_angle procrustes label_cka kernel_cka none "
    "fcka lcka rcka rcka_released kd+fcka"
).split()
DENSE = "mimic pkd fgd dense_kd dense_dist pcka".split()
NETWORKS = (
    "resnet8 resnet14 resnet20 resnet32 resnet44 resnet56 resnet110 resnet8x4 resnet32x4 resnet18 resnet50 wrn_16_1 "
    "wrn_16_2 wrn_40_1 wrn_40_2 vgg8 vgg11 vgg13 vgg16 vgg19 mobilenet_v2_half shufflenet_v1 shufflenet_v2"
).split()


def numbers(seed: int, *shape: int) -> Tensor:
    "Normal numbers that are the same with every version of NumPy, which keeps the stream of RandomState."
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def fill(module: nn.Module, seed: int) -> nn.Module:
    "Set all parameters, and the running statistics, to fixed numbers of the usual size."
    for i, (name, value) in enumerate(sorted({**dict(module.named_parameters()), **statistics(module)}.items())):
        x = numbers(1000 * seed + i, *value.shape)
        if value.dim() > 1:
            x *= (2 / value[0].numel()) ** 0.5
        else:
            x = 0.1 * x + (not name.endswith(("bias", "running_mean")))
        value.data.copy_(x)
    return module


def statistics(module: nn.Module) -> dict[str, Tensor]:
    return {name: b for name, b in module.named_buffers() if name.endswith(("running_mean", "running_var"))}


def network(name: str, seed: int) -> nn.Module:
    return fill(create_model(name, 10, 3), seed)


def arguments(name: str) -> dict:
    "All constructor arguments of a method, as they are by default."
    method = create_method(name)
    if "+" in name:
        return {}
    found = {k: p.default for k, p in inspect.signature(type(method)).parameters.items()}
    return {k: v for k, v in found.items() if isinstance(v, (bool, int, float, str, tuple, list, type(None)))}


def classifier_terms(name: str, args: dict) -> dict[str, float]:
    "The terms of a method on a batch of fixed numbers, and the norm of the gradient of the student's first layer."
    torch.manual_seed(0)
    student, teacher, method = network("resnet8", 1), network("resnet14", 2).eval(), create_method(name, args)
    images, target = numbers(3, 12, 3, 32, 32), torch.arange(12) % 10
    paths = [method.wants(net.layers) for net in (student, teacher)]
    ours, theirs = Taps(student, paths[0]), Taps(teacher, paths[1])
    heads = {"head": head_of(teacher), "student_head": head_of(student)}
    known = inspect.signature(type(method).build).parameters
    heads = {k: v for k, v in heads.items() if k in known or "kw" in known or "known" in known}
    if Outputs.__module__ == "rcka.losses":  # whose methods do not know the student's classifier
        heads.pop("student_head", None)
    with torch.no_grad():
        student.eval()
        method.build(ours(images), theirs(images), **heads, targets=torch.arange(40) % 10)
        student.train()
        fill(method, 4)
        expected = theirs(images)
    method.set_epoch(2)
    terms = method(ours(images), expected, target, torch.arange(12))
    sum(terms.values()).backward()
    gradient = next(p for p in student.parameters()).grad.norm()
    return {**{k: v.item() for k, v in terms.items()}, "gradient": gradient.item()}


def dense_terms(name: str, args: dict) -> dict[str, float]:
    "The same for a method on the maps of a pyramid."
    torch.manual_seed(0)
    method, sizes = create_method(name, args), (32, 16, 8, 4)
    student, teacher = (
        Outputs(
            numbers(seed, 24, 5).requires_grad_(of == 6),
            tuple(numbers(seed + i, 2, of, s, s).requires_grad_(of == 6) for i, s in enumerate(sizes)),
        )
        for seed, of in ((10, 6), (20, 8))
    )
    method.build(student, teacher)
    fill(method, 4)
    boxes = torch.tensor([[4.0, 6.0, 60.0, 80.0], [20.0, 30.0, 100.0, 90.0]])
    target = [{"boxes": boxes, "input_size": (128, 128)}, {"boxes": boxes[:1], "input_size": (128, 128)}]
    terms = method.terms(student, teacher, target)
    sum(terms.values()).backward()
    gradients = [x.grad.norm() for x in (student.logits, *student.features) if x.grad is not None]
    return {**{k: v.item() for k, v in terms.items()}, "gradient": torch.stack(gradients).norm().item()}


def logits(name: str) -> list[float]:
    "The logits of a network for two images, in eval mode."
    with torch.no_grad():
        return network(name, 5).eval()(numbers(6, 2, 3, 32, 32)).flatten().tolist()


def training() -> list[dict[str, float]]:
    "The history of a student of digits, one epoch of 12 steps and the next: KD and FCKA."
    data = load_dataset("digits", limit=192, test_limit=100)
    train, test = data.batches(16, train=True, seed=0), data.batches(train=False)
    student, teacher = (fill(create_model(name, 10, 1), seed) for name, seed in (("resnet8", 7), ("resnet14", 8)))
    distiller = Distiller(student, create_method("kd+fcka"), teacher)
    with tempfile.TemporaryDirectory() as folder:
        return Trainer(distiller, train, test, TrainConfig(epochs=2, lr=0.01), folder).fit(progress=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="write the numbers to this file; without it compare bit for bit")
    given = parser.parse_args()
    known = json.loads(FILE.read_text()) if not given.write else {}

    def part(name, names, of):
        "By name: the arguments and the numbers."
        found = {}
        for one in names:
            args = known[name][one]["arguments"] if known else arguments(one)
            found[one] = {"arguments": args, "numbers": of(one, args)}
        return found

    torch.set_num_threads(1)
    numbers_now = {
        "torch": str(torch.__version__),
        "classifiers": part("classifiers", CLASSIFIERS, classifier_terms),
        "dense": part("dense", DENSE, dense_terms),
        "networks": {name: logits(name) for name in NETWORKS},
        "training": training(),
    }
    text = json.dumps(numbers_now, indent=1) + "\n"
    if given.write:
        given.write.write_text(text)
        return
    numbers_now = json.loads(text)
    differ = [
        f"{group}: {name}"
        for group in ("classifiers", "dense", "networks")
        for name in known[group]
        if known[group][name] != numbers_now[group][name]
    ] + ["training"] * (known["training"] != numbers_now["training"])
    total = sum(len(known[group]) for group in ("classifiers", "dense", "networks")) + 1
    print(
        f"{total - len(differ)} of {total} are the same to the last bit"
        + (f"; not {', '.join(differ)}" if differ else "")
    )


if __name__ == "__main__":
    main()
