"The examples of the page 03c_frameworks on digits: its own cells, run where the package that each needs is installed."

import json
import tempfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import rcka

PAGE = Path(__file__).parent.parent / "nbs" / "method" / "03c_frameworks.ipynb"
CELLS = ["".join(cell["source"]) for cell in json.loads(PAGE.read_text(encoding="utf-8"))["cells"]]
pytestmark = pytest.mark.slow


@pytest.fixture
def names(images):
    "What the first cell of the page makes, of digits."
    torch.manual_seed(0)
    batches = list(images.batches(64).epoch(0))
    larger = F.interpolate(torch.cat([b.images for b in batches]), size=32)
    dataset = TensorDataset(larger, torch.cat([b.targets for b in batches]))
    return {
        "dataset": dataset,
        "loader": DataLoader(dataset, batch_size=64, shuffle=True),
        "teacher": rcka.create_model("resnet14", images.num_classes, images.channels),
        "classes": images.num_classes,
        "channels": images.channels,
        "torch": torch,
        "rcka": rcka,
        "tempfile": tempfile,
    }


def run(heading, names):
    "Run the cell that begins with a comment."
    (code,) = [cell for cell in CELLS if cell.startswith(f"#| notest\n# {heading}\n")]
    exec(code, names)
    for net in (names["teacher"], names.get("student")):
        if net is not None:
            assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert all(p.grad is None for p in names["teacher"].parameters())


def test_lightning(names, monkeypatch, tmp_path):
    pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)
    run("Lightning", names)
    sums = [sum(row.values()) for row in names["losses"]]
    assert len(sums) == 3 and set(names["losses"][0]) == {"ce", "kd", "fcka"} and sums[-1] < sums[0]


def test_transformers(names):
    pytest.importorskip("transformers", "4.48")
    pytest.importorskip("accelerate")
    run("transformers", names)
    assert len(names["losses"]) == 3 and names["losses"][-1] < names["losses"][0]
    assert 0 <= names["evaluated"]["eval_top1"] <= 100
    for saved, trained in zip(names["again"].parameters(), names["student"].parameters(), strict=True):
        assert torch.equal(saved, trained)
    student = names["student"].eval()
    with torch.no_grad():
        hits = student(names["dataset"].tensors[0]).logits.argmax(1) == names["dataset"].tensors[1]
    assert names["evaluated"]["eval_top1"] == pytest.approx(100 * hits.float().mean().item(), abs=1)


def test_timm(names):
    pytest.importorskip("timm.task")
    run("timm", names)
    assert len(names["losses"]) == 6 and names["losses"][-1] < names["losses"][0]
    task = names["task"]
    assert task.get_eval_model() is names["student"] and list(task.get_trainable_module().parameters())


def test_ultralytics(images, tmp_path, monkeypatch):
    for name, value in (("CONFIG_DIR", str(tmp_path)), ("OFFLINE", "true"), ("AUTOINSTALL", "false")):
        monkeypatch.setenv(f"YOLO_{name}", value)
    pytest.importorskip("ultralytics")
    from torchvision.transforms.functional import resize
    from torchvision.utils import save_image

    monkeypatch.chdir(tmp_path)
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
    batch = next(iter(images.batches(train=False).epoch(0)))
    for i, (image, target) in enumerate(zip(batch.images[:16], batch.targets[:16])):
        save_image(resize(image, [64, 64]), tmp_path / "images" / f"{i}.png", normalize=True)
        (tmp_path / "labels" / f"{i}.txt").write_text(f"{int(target)} 0.5 0.5 0.8 0.8")
    listed = "\n".join(f"  {i}: d{i}" for i in range(10))
    data = tmp_path / "data.yaml"
    data.write_text(f"path: {tmp_path}\ntrain: images\nval: images\nnames:\n{listed}\n")
    names = {"torch": torch, "rcka": rcka}
    (code,) = [cell for cell in CELLS if cell.startswith("#| notest\n# Ultralytics\n")]
    exec(code, names)
    from ultralytics import settings

    settings.update({"sync": False, "mlflow": False, "wandb": False, "tensorboard": False})
    losses = names["train_detector"](str(data), str(tmp_path / "runs"), imgsz=64, epochs=2)
    assert len(losses) == 2 and all(0 < row["fcka"] <= 1.001 and 0 < row["yolo"] < float("inf") for row in losses)
