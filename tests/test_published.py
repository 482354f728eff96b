"The published tables: every row has its source, and other sources stand beside the paper without changing its numbers."

import re

import pytest

from rcka.experiments.result import TABLES, published

TABLE = {"cifar100": 1, "imagenet": 2, "coco": 3, "cityscapes": 11}
SCORE = {"cifar100": "top1", "imagenet": "top1", "coco": "AP", "cityscapes": "miou", "best": "top1"}


def cell(dataset, teacher, student, method):
    (row,) = [
        r
        for r in published(dataset)
        if (r["teacher"], r["student"], r["method"].lower()) == (teacher, student, method.lower())
    ]
    return row


@pytest.mark.parametrize("dataset", SCORE)
def test_every_row_has_a_source(dataset):
    rows = published(dataset)
    keys = [(r["teacher"], r["student"], r["method"]) for r in rows]
    assert len(set(keys)) == len(keys)
    assert all(r["source"] and (r[SCORE[dataset]] is None or 0 < r[SCORE[dataset]] < 100) for r in rows)
    if dataset in TABLE:
        assert {r["source"] for r in rows} == {f"Zhou et al. 2024, Table {TABLE[dataset]}"}


def test_files_are_these():
    assert {p.stem for p in TABLES.glob("*.csv")} == set(SCORE)


@pytest.mark.parametrize("dataset", ["cifar100", "imagenet"])
def test_other_numbers_have_sources(dataset):
    "A number without a source, or a source without a number, is a slip of the table."
    rows = published(dataset)
    for which in ("own", "other"):
        assert all((r[f"{which}_top1"] is None) == (r[f"{which}_source"] is None) for r in rows)
        assert any(r[f"{which}_top1"] for r in rows)
    assert not any(r["own_top1"] for r in rows if r["method"] in ("RCKA", "FCKA", "LCKA"))  # the paper is their own


@pytest.mark.parametrize(
    "teacher, student, method, paper, which, elsewhere",
    [
        ("resnet110", "resnet32", "AT", 70.55, "other", 72.31),
        ("resnet32x4", "shufflenet_v1", "AT", 72.73, "other", 71.73),
        ("resnet110", "resnet32", "VID", 70.38, "other", 72.61),
        ("resnet110", "resnet32", "ReviewKD", 71.89, "other", 73.89),
        ("resnet32x4", "shufflenet_v1", "ReviewKD", 76.93, "other", 77.45),
        ("resnet32x4", "resnet8x4", "DIST", 75.79, "own", 76.31),
        ("resnet32x4", "shufflenet_v1", "DIST", 75.23, "own", 76.34),
        ("wrn_40_2", "shufflenet_v1", "DIST", 75.23, "other", 76.40),
        ("resnet110", "resnet20", "DIST", 69.94, "other", 71.65),
        ("wrn_40_2", "wrn_16_2", "NKD", 76.37, "other", 75.43),
        ("resnet32x4", "shufflenet_v1", "NKD", 76.90, "other", 76.31),
        ("resnet110", "resnet20", "DKD", None, "other", 71.06),
    ],
)
def test_cells_that_contradict_their_sources(teacher, student, method, paper, which, elsewhere):
    "The paper's number is kept as printed; the other one stands beside it."
    row = cell("cifar100", teacher, student, method)
    assert (row["top1"], row[f"{which}_top1"]) == (paper, elsewhere)


def test_the_papers_slips_are_other_cells():
    "Where a remark says that the number is that of another pair, the same source has another one for this pair."
    rows = [r for r in published("cifar100") if r["remark"] and "is that source's for" in r["remark"]]
    assert {(r["method"], r["student"]) for r in rows} == {
        ("AT", "resnet32"),
        ("AT", "shufflenet_v1"),
        ("VID", "resnet32"),
        ("ReviewKD", "resnet32"),
    }
    assert all(r["other_top1"] != r["top1"] for r in rows)


def test_best_repeats_the_paper():
    "RCKA's rows in the table of the best are those of the paper's own tables, and no source is a path."
    rows = published("best")
    for r in (r for r in rows if r["method"] == "RCKA"):
        assert r["top1"] == cell(r["dataset"], r["teacher"], r["student"], "RCKA")["top1"]
    pairs = {(r["dataset"], r["teacher"], r["student"]) for r in rows}
    for dataset in ("cifar100", "imagenet"):
        assert {(dataset, r["teacher"], r["student"]) for r in published(dataset)} <= pairs
    assert all(r["protocol"] and not re.search(r"[/\\]", r["source"]) for r in rows)
