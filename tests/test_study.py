"Studies: which factors a screen tries, what becomes of a run whose loss is not finite, what the committed tables say."

import math
import re
from pathlib import Path

import pytest

from rcka.experiments.result import Result
from rcka.experiments.study import (
    FACTORS,
    PAIR,
    STUDIES,
    Study,
    accuracy_by_factor,
    differences_to,
    factors_to_try,
    read_table,
    run_screen,
    run_study,
    step_costs,
)

TABLES = Path(__file__).parent.parent / "figures" / "study"


@pytest.mark.parametrize("best", FACTORS)
def test_a_screen_finds_the_best_factor(best):
    "Whatever factor is the best of a curve with one peak, it is found, with both neighbours tried where there are any."
    accuracy = {f: -abs(math.log(f / best)) for f in FACTORS}
    tried = {}
    while more := factors_to_try(tried):
        assert not set(more) & set(tried)
        tried |= {f: accuracy[f] for f in more}
    assert max(tried, key=tried.get) == best
    assert {f for f in (best / 4, best * 4) if f in FACTORS} <= set(tried)


def test_a_run_that_diverges_is_the_worst():
    rows = [{"label": f"kd x{f:g}", "last": last} for f, last in ((0.25, 3.0), (1, 2.0), (4, math.nan))]
    tried = accuracy_by_factor(rows + [{"label": "dkd x1", "last": 9.0}, {"label": "none", "last": 1.0}], "kd")
    assert tried == {0.25: 3.0, 1.0: 2.0, 4.0: -math.inf}
    assert factors_to_try(tried) == [0.0625]


def study(factors):
    methods = {f"{m} x{f:g}": ("scaled", {"method": m, "factor": f}) for m in ("kd", "fcka") for f in factors}
    settings = dict(dataset="digits", epochs=1, batch_size=16, train_limit=64, test_limit=50, teacher_epochs=1)
    return Study("toy-screen", "resnet8", "resnet8", {"none": ("none", None)} | methods, (0,), settings)


@pytest.mark.slow
def test_a_screen_is_done_once(tmp_path):
    rows = run_screen(study(FACTORS), tmp_path, root=tmp_path / "runs", progress=False)
    assert rows[0]["label"] == "none"
    for method in ("kd", "fcka"):
        tried = accuracy_by_factor(rows, method)
        assert {0.25, 1.0, 4.0} <= set(tried) and not factors_to_try(tried)
    table = (tmp_path / "toy-screen.csv").read_text()
    assert run_screen(study(FACTORS), tmp_path, root="/nowhere", progress=False) == rows  # nothing is run
    assert (tmp_path / "toy-screen.csv").read_text() == table
    with pytest.raises(ValueError, match="did you mean fcka"):
        run_screen(study(FACTORS), tmp_path, methods=["fckaa"])


@pytest.mark.slow
def test_a_run_that_is_not_finite_does_not_take_others_with_it(tmp_path):
    rows = run_study(study([1.0, 1e38]), tmp_path, tmp_path / "runs", progress=False)
    last = {row["label"]: row["last"] for row in rows}
    assert all(math.isnan(last[label]) == label.endswith("x1e+38") for label in last) and len(last) == 5
    again = read_table(tmp_path / "toy-screen.csv")
    assert (
        str(tmp_path) not in (tmp_path / "toy-screen.csv").read_text()
    )  # a table is for others: no folder of this run
    assert "not finite" in again["kd x1e+38", 0]["failed"] and not again["kd x1", 0]["failed"]
    table = differences_to([{**row, "seed": seed} for row in again.values() for seed in (0, 1)])
    assert table.loc["kd x1e+38", "seeds"] == 0 and table.loc["kd x1", "seeds"] == 2


def test_a_label_has_settings_of_its_own(tmp_path):
    "Runs that cannot share a teacher's forward pass are not put side by side, and each has its own settings."
    settings = dict(dataset="digits", epochs=1, batch_size=16, train_limit=64, test_limit=50, teacher_epochs=1)
    own = {label: {"teacher_cache": 1} for label in ("kd K=1", "fcka K=1")}
    methods = {label: (label.split()[0], None) for label in ("none", "kd", "kd K=1", "fcka K=1")}
    cached = Study("toy", "resnet8", "resnet8", methods, (0,), settings, label_settings=own)
    assert [cached.experiment(label, 0).to_dict().get("teacher_cache") for label in methods] == [None, None, 1, 1]
    rows = run_study(cached, tmp_path, tmp_path / "runs", progress=False)
    assert [row["label"] for row in rows] == list(methods) and not any(row["failed"] for row in rows)


def test_the_pair_runs_at_the_factors_that_the_screen_chose():
    rows = read_table(TABLES / "cifar100-screen.csv").values()
    assert {row["evaluated_on"] for row in rows if not row["failed"]} == {"validation"}
    for label, factor in PAIR.items():
        tried = accuracy_by_factor(rows, label)
        assert max(tried, key=tried.get) == factor and not factors_to_try(tried), label


@pytest.mark.parametrize("path", sorted(TABLES.glob("cifar100-*-*.csv")), ids=lambda p: p.stem)
def test_a_committed_comparison_is_of_the_study(path):
    "Every row is of a method and a seed of the study, at its length, on the test images."
    if path.stem not in STUDIES:
        assert path.stem.removesuffix("-costs") in STUDIES
        return
    study = STUDIES[path.stem]
    for (label, seed), row in read_table(path).items():
        assert label in study.methods and seed in study.seeds
        assert row["failed"] or (row["epochs"] == study.settings["epochs"] and row["evaluated_on"] == "test")


@pytest.mark.parametrize("name", [name for name in STUDIES if (TABLES / name).is_dir()])
def test_committed_results_are_those_of_the_table(name):
    "Each result file is a run of the study, with the accuracies of its row; it names no path."
    study, rows = STUDIES[name], read_table(TABLES / f"{name}.csv")
    runs = {study.experiment(label, seed).key: (label, seed) for label in study.methods for seed in study.seeds}
    for path in (TABLES / name).glob("*/result.json"):
        result, row = Result.load(path), rows[runs[path.parent.name]]
        assert (result.last["top1"], result.best["top1"]) == pytest.approx((row["last"], row["best"]), abs=1e-3)
        assert not re.search(r'"(/|[A-Za-z]:\\\\)', path.read_text())


def test_costs_of_a_step():
    methods = {label: (label, None) for label in ("none", "fcka", "reviewkd")}
    settings = dict(dataset="digits", epochs=1, batch_size=16, train_limit=64, test_limit=50, teacher_epochs=1)
    rows = step_costs(Study("toy", "resnet8", "resnet8", methods, (0,), settings), rounds=1, steps=1)
    assert [row["label"] for row in rows] == list(methods) and rows[0]["ratio"] == 1
    assert all(row["milliseconds"] > 0 and row["peak_mb"] >= 0 for row in rows)
    assert [row["parameters"] > 0 for row in rows] == [False, False, True]
