"The report: whose weights a row has, which published numbers stand beside it, and what its caption and notes say."

import csv
import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rcka.experiments.experiment import Experiment
from rcka.experiments.report import (
    HEADER,
    PublishedCell,
    as_rows,
    cells,
    disagreements,
    evaluated_on,
    latex,
    markdown,
    plot_scores,
    published_cell,
    report,
    show,
    tables,
    whose_weights,
)
from rcka.experiments.result import Result, published


def made_up(method, seed=0, teacher="resnet110", student="resnet20", top1=72.0, **changes):
    e = Experiment("cifar100", student, None if method == "none" else teacher, method, seed=seed, **changes)
    scores = [{"epoch": n, "top1": top1 + 0.1 * seed + d, "top5": 95.0} for n, d in ((240, 0.0), (200, 0.3))]
    given = {"top1": 74.0, "top5": 93.0} if e.teacher else None
    return Result(
        e.to_dict(), *scores, {}, given, 1, 9.0, 1000.0, "made up", {"torch": "2"}, None, "2026-01-01T00:00:00+00:00"
    )


def table_of(*results):
    (table,) = tables(list(results))
    return table


def row_of(table, method):
    (row,) = [r for r in table.rows if r.method == method]
    return row


def test_both_of_ours_stand_beside_the_published_number():
    table = table_of(*(made_up(m, s) for m in ("none", "kd", "rcka", "rcka_released") for s in (0, 1)))
    ours, released = row_of(table, "rcka"), row_of(table, "rcka_released")
    assert ours.published.paper == released.published.paper == 72.26
    assert (ours.weights, released.weights) == ("ours", "released")
    assert (row_of(table, "kd").weights, row_of(table, "none").weights) == ("published", "–")


def test_caption_does_not_pass_our_weights_off_as_the_papers():
    "Only the training protocol is the paper's; a table without RCKA says nothing of weights."
    caption = table_of(made_up("rcka"), made_up("rcka_released")).caption
    assert caption.startswith("Training protocol: the one of the paper.")
    assert "not public" in caption and "ours" in caption and "released" in caption
    assert "not public" not in table_of(made_up("kd")).caption
    assert "epochs 3" in table_of(made_up("kd", epochs=3)).caption


@pytest.mark.parametrize(
    "method, args, said",
    [
        ("rcka", None, "ours"),
        ("fcka", None, "ours"),
        ("lcka", None, "ours"),
        ("rcka_released", None, "released"),
        ("kd", None, "published"),
        ("kd+fcka", None, "published + ours"),
        ("rcka", {"alpha": 3.0}, "given"),
        ("kd", {"temperature": 2.0}, "given"),
        ("none", None, "–"),
    ],
)
def test_whose_weights(method, args, said):
    e = Experiment("cifar100", "resnet20", None if method == "none" else "resnet110", method, args)
    assert whose_weights(e) == said


@pytest.mark.parametrize(
    "method, teacher, student, said",
    [
        ("reviewkd", "vgg13", "vgg8", "ours"),  # whose script has no line for VGG
        ("reviewkd", "vgg13", "mobilenet_v2_half", "ours"),
        ("dkd", "vgg13", "vgg8", "published"),
        ("reviewkd", "resnet32x4", "shufflenet_v2", "published"),
        ("kd+dkd", "resnet110", "resnet20", "published + ours"),
        ("dkd", "resnet110", "resnet32", "published"),
    ],
)
def test_settings_that_nobody_published_are_ours(method, teacher, student, said):
    assert whose_weights(Experiment("cifar100", student, teacher, method)) == said


def test_unpublished_settings_are_those_that_are_used():
    from rcka.methods.features import UNPUBLISHED, paper_args

    assert {m for m, *_ in UNPUBLISHED} == {"dkd", "reviewkd", "ikl_kd"}
    assert all(paper_args(*one) for one in UNPUBLISHED)
    assert "ours" in paper_args.__doc__


def test_a_method_of_ones_own_is_not_called_published():
    from rcka.methods.base import METHODS, Method, register

    @register("test_own")
    class Own(Method):
        def terms(self, student, teacher, target=None, index=None):
            return {}

    try:
        assert whose_weights(Experiment("cifar100", "resnet20", "resnet110", "test_own")) == "own method"
    finally:
        del METHODS["test_own"]


def test_given_arguments_are_in_brackets_and_have_no_published_number():
    "A published number is that of the usual arguments; a list from a file is the tuple that it was."
    table = table_of(made_up("kd"), made_up("kd", method_args={"temperature": 2.0}))
    assert row_of(table, "kd").published.paper == 70.67
    assert row_of(table, "kd (temperature=2.0)").published == PublishedCell()


@pytest.mark.parametrize(
    "teacher, student, method, shown",
    [
        ("resnet110", "resnet32", "reviewkd", ("71.89", "–", "73.89")),
        ("resnet32x4", "resnet8x4", "dist", ("75.79", "76.31", "76.31")),
        ("resnet110", "resnet32", "crd", ("73.48", "73.48", "–")),
        ("resnet110", "resnet20", "dkd", ("–", "–", "71.06")),
        ("resnet20", "resnet8", "kd", ("–", "–", "–")),
    ],
)
def test_three_published_numbers_beside_ours(teacher, student, method, shown):
    row = row_of(table_of(made_up(method, teacher=teacher, student=student, top1=74.0)), method)
    said = dict(zip(HEADER, cells(row), strict=True))
    assert tuple(said[name] for name in ("RCKA paper", "own source", "other source")) == shown
    assert (said["ours, last epoch"], said["ours, best epoch"]) == ("74.00", "74.30")
    assert (row.difference is None) == (shown[0] == "–")


def test_notes_say_which_number_is_which():
    table = table_of(
        made_up("dist", teacher="resnet32x4", student="resnet8x4"),
        made_up("kd", teacher="resnet32x4", student="resnet8x4"),
    )
    differ, best = table.notes
    assert "75.79 in the RCKA paper, 76.31 in DIST_KD README" in differ
    assert "RCKA 76.11" in best and "SKD 78.33 (own recipe; StreamLined README)" in best
    for note in table.notes:
        assert f"- {note}" in markdown(table)
    assert "75.79 in the RCKA paper" in latex(table)
    assert table_of(made_up("kd", student="resnet8", teacher="resnet20")).notes == ()


def test_notes_of_a_dash():
    table = table_of(made_up("dkd"))
    assert "a dash in the RCKA paper, 71.06 in logit-standardization-KD README" in table.notes[0]


def test_disagreements_are_those_of_the_table():
    "Each has two different numbers, or a dash and one; nothing else of the table differs."
    found = disagreements("cifar100")
    keys = {(r["teacher"], r["student"], r["method"]) for r in found}
    for r in published("cifar100"):
        others = [v for v in (r["own_top1"], r["other_top1"]) if v is not None]
        assert ((r["teacher"], r["student"], r["method"]) in keys) == any(v != r["top1"] for v in others)
    assert len(keys) == len(found) >= 12
    assert {r["method"] for r in disagreements("imagenet")} == {"KD"}


def test_published_cell_knows_our_names():
    for method in ("kd+ickd_c", "ickd_c+kd"):
        assert published_cell("cifar100", "vgg13", "mobilenet_v2_half", method).paper == 67.55
    for method in (
        "ickd_c",
        "ickd_c+fcka",
        "kd+ickd_c+fcka",
    ):  # what is printed as ICKD-C has KD beside it, and no more
        assert published_cell("cifar100", "vgg13", "mobilenet_v2_half", method) == PublishedCell()
    assert published_cell("cifar100", "resnet110", "resnet20", "none").paper == 69.06
    assert published_cell("cifar100", "resnet110", "resnet20", "teacher").paper == 74.31
    assert published_cell("imagenet", "torchvision/resnet34", "resnet18", "rcka_released").paper == 72.34
    assert published_cell("digits", "resnet110", "resnet20", "rcka") == PublishedCell()


@pytest.mark.parametrize(
    "fields, said",
    [
        ({}, "accuracy on the test images; the best is chosen there"),
        ({"val_fraction": None}, "accuracy on the test images"),
        ({"val_fraction": 0.0}, "accuracy on the test images"),
        ({"val_fraction": 0.1}, "accuracy on validation images, 10 % of the training images"),
        ({"evaluate_on": "train"}, "on training images"),
    ],
)
def test_images_that_accuracies_are_of(fields, said):
    assert said in evaluated_on(fields)


def test_evaluation_is_in_the_caption():
    assert "accuracy on the test images" in table_of(made_up("kd")).caption


def test_csv_has_all_sources(tmp_path):
    result = made_up("dist", teacher="resnet32x4", student="resnet8x4")
    folder = tmp_path / "run"
    folder.mkdir()
    result.save(folder / "result.json")
    (_, row) = csv.DictReader(io.StringIO(report(tmp_path, "csv")))
    assert (row["rcka_paper"], row["own_source_top1"], row["own_source"]) == ("75.79", "76.31", "DIST_KD README")
    assert (row["other_source_top1"], row["other_source"], row["weights"]) == ("76.31", "TTM README", "published")
    assert as_rows(tables([result]))[1]["difference"] == pytest.approx(72.0 - 75.79)


def test_terminal_table_fits_eighty_columns():
    from rich.console import Console

    methods = ("none", "kd", "rcka", "rcka_released")
    table = table_of(*(made_up(m, s, "resnet32x4", "shufflenet_v1", 76.0) for m in methods for s in (0, 1)))
    console = Console(width=80, file=io.StringIO())
    console.print(show(table))
    assert "…" not in console.file.getvalue()


def test_figure_marks_each_source_once():
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib import pyplot as plt

    results = [made_up(m, s, "resnet32x4", "resnet8x4") for m in ("dist", "rcka", "rcka_released") for s in (0, 1)]
    fig = plot_scores(table_of(*results))
    marks = {line.get_label(): list(line.get_xdata()) for line in fig.axes[0].get_lines()}
    plt.close(fig)
    assert marks["RCKA paper"] == [75.79, 76.11, 76.11]
    assert marks["own source"] == [76.31] and marks["other source"] == [76.31]


def test_row_is_within_two_deviations_of_the_papers_number():
    row = row_of(table_of(*(made_up("rcka", s, top1=72.2) for s in range(3))), "rcka")
    assert row.within and not replace(row, published=PublishedCell(90.0)).within


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion_mnist", "imagenet"])
def test_pages_do_not_call_our_defaults_the_papers(name):
    "The comment of method_args: the default weights of rcka are ours, whatever the pair."
    page = (Path(__file__).parent.parent / "nbs" / "benchmarks" / f"{name}.ipynb").read_text(encoding="utf-8")
    (line,) = [x for x in page.splitlines() if x.strip().startswith('"method_args = ')]
    assert "the paper's" not in line and "those of rcka are ours" in line


def test_runs_of_a_study_are_read(tmp_path):
    "Their method is another one with all its weights multiplied, which only the module of studies registers."
    import rcka.experiments.study  # noqa: F401

    for seed in (0, 1):
        run = made_up("scaled", seed, method_args={"method": "kd", "factor": 4.0})
        folder = tmp_path / Experiment.from_dict(run.experiment).key
        folder.mkdir()
        run.save(folder / "result.json")
    command = [sys.executable, "-m", "rcka", "report", "--root", tmp_path, "--format", "markdown"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "| resnet110 | resnet20 | kd x4 | 2 |" in done.stdout and "2 results, none missing" in done.stdout, done
