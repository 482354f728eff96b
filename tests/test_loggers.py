"""Loggers: what they are given, and what TensorBoard, Weights & Biases and MLflow hold of a run, also of one that was
interrupted."""

import re

import pytest
import torch
from torch import nn

from rcka.methods import create_method
from rcka.models import create_model
from rcka.train import Callback, Distiller, Learner, TrainConfig, Trainer
from rcka.train.learner import Stopped

pytest.importorskip("matplotlib")
from rcka.loggers import Logger, MLflow, TensorBoard, WandB, similarity  # noqa: E402

CONFIG = TrainConfig(epochs=2, lr=0.02, schedule="onecycle")
VALUES = {"lr", "loss", "ce", "kd", "fcka", "train_top1", "top1", "top5"}


def task():
    torch.manual_seed(0)
    student, teacher = (create_model(name, 10, 1) for name in ("resnet8", "resnet14"))
    return Distiller(student, create_method("kd+fcka"), teacher)


@pytest.fixture
def batches(images):
    return images.batches(64), images.batches(train=False)


class Record(Logger):
    def __init__(self):
        self.opened, self.rows, self.figures, self.closed = [], {}, {}, []

    def open(self, name, settings, epoch):
        self.identifier = self.identifier or "run-1"
        self.opened.append((name, settings, epoch))

    def log(self, values, epoch):
        self.rows[epoch] = values

    def figure(self, name, figure, epoch):
        self.figures[name, epoch] = figure

    def close(self, finished):
        self.closed.append(finished)


class StopOnce(Callback):
    "Stop the run after its first epoch."

    def after_epoch(self, learner):
        if learner.epoch == 1:
            learner.stop("the test says so")


def test_what_a_logger_is_given(batches):
    record = Record()
    history = Learner(task(), *batches, CONFIG, callbacks=[record], name="mine").fit(progress=False)
    ((name, settings, epoch),) = record.opened
    assert (name, epoch, record.closed) == ("mine", 0, [True])
    assert settings["lr"] == 0.02 and settings["method: class"] == "Sum" and settings["task"] == "Distiller"
    assert record.rows == {row["epoch"]: {k: v for k, v in row.items() if k != "epoch"} for row in history}
    assert VALUES <= set(record.rows[1])
    assert set(record.figures) == {("curves", 2), ("similarity", 2)}
    heatmap = record.figures["similarity", 2].axes[0].images[0].get_array()
    assert heatmap.shape == (4, 4) and 0 < heatmap.max() <= 1


def test_an_interrupted_run_goes_on_in_its_record(batches, tmp_path):
    run = lambda *callbacks: Trainer(task(), *batches, CONFIG, tmp_path, callbacks=callbacks).fit(progress=False)
    first, second = Record(), Record()
    with pytest.raises(Stopped):
        run(first, StopOnce())
    assert first.closed == [False] and not first.figures
    run(second)
    assert (second.identifier, second.opened[0][2], second.closed) == ("run-1", 1, [True])
    assert sorted([*first.rows, *second.rows]) == [1, 2]


def test_without_a_teacher_or_known_stages_there_is_no_heatmap(batches):
    record = Record()
    Learner(Distiller(create_model("resnet8", 10, 1)), *batches, CONFIG, callbacks=[record]).fit(progress=False)
    assert set(record.figures) == {("curves", 2)}
    plain = nn.Sequential(nn.Flatten(), nn.Linear(batches[0].images[0].numel(), 10))
    learner = Learner(Distiller(plain, create_method("kd"), create_model("resnet8", 10, 1)), *batches, CONFIG)
    assert similarity(learner) is None


def test_tensorboard(batches, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "tensorboard"
    run = lambda *callbacks: Trainer(task(), *batches, CONFIG, tmp_path / "run", callbacks=callbacks).fit(
        progress=False
    )
    with pytest.raises(Stopped):
        run(TensorBoard(folder), StopOnce())
    history = run(TensorBoard(folder))
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()
    assert set(found.Tags()["scalars"]) >= VALUES and set(found.Tags()["images"]) == {"curves", "similarity"}
    logged = {e.step: e.value for e in found.Scalars("top1")}
    assert logged == pytest.approx({row["epoch"]: row["top1"] for row in history})
    assert b"| lr | 0.02 |" in found.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


def test_wandb_offline(batches, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandB("test", mode="offline", dir=str(tmp_path))
    history = Learner(task(), *batches, CONFIG, callbacks=[logger]).fit(progress=False)
    assert logger.identifier == logger.run.id and logger.run.config["lr"] == 0.02
    (file,) = tmp_path.rglob("*.wandb")  # what `wandb sync` sends
    written = file.read_bytes()
    assert all(name.encode() in written for name in (*VALUES, "method: class", "similarity"))
    field = re.compile(rb"\x04top1\x82\x01(.)", re.S)  # a protobuf field: the name, the length of the value, its JSON
    stored = {float(written[m.end() : m.end() + m[1][0]]) for m in field.finditer(written)}
    assert stored == {row["top1"] for row in history}
    pictures = [path.name for path in tmp_path.rglob("*.png")]
    assert sorted(name.split("_")[0] for name in pictures) == ["curves", "similarity"]


def test_mlflow_in_a_local_store(batches, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    pytest.importorskip("alembic")
    monkeypatch.chdir(tmp_path)  # where MLflow puts the figures
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    run = lambda *callbacks: Trainer(task(), *batches, CONFIG, tmp_path / "run", callbacks=callbacks).fit(
        progress=False
    )
    with pytest.raises(Stopped):
        run(MLflow("digits", uri), StopOnce())
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("digits").experiment_id
    (stopped,) = client.search_runs([experiment])
    assert stopped.info.status == "KILLED"
    history = run(MLflow("digits", uri))
    (found,) = client.search_runs([experiment])
    assert found.info.run_id == stopped.info.run_id and found.info.status == "FINISHED"
    assert found.data.params["lr"] == "0.02" and found.data.params["method_ class"] == "Sum"
    logged = {m.step: m.value for m in client.get_metric_history(found.info.run_id, "top1")}
    assert logged == pytest.approx({row["epoch"]: row["top1"] for row in history})
    assert {a.path for a in client.list_artifacts(found.info.run_id)} == {"curves.png", "similarity.png"}
