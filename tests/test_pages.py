"Committed pages show what they say: no empty table, no number beside another one in the output, no dot behind another."

import csv
import itertools
import json
import re
from collections import defaultdict
from pathlib import Path
from statistics import mean

import numpy as np
import pytest

root = Path(__file__).parent.parent
PAGES = sorted(p for p in (root / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def cells(path):
    return json.loads((root / "nbs" / path).read_text(encoding="utf-8"))["cells"]


def prose(path):
    return "\n".join("".join(c["source"]) for c in cells(path) if c["cell_type"] == "markdown")


def outputs(path, mime):
    "What the cells of a page printed, for text/plain with what went to stdout."
    found = []
    for cell in cells(path):
        for out in cell.get("outputs", []):
            text = out.get("data", {}).get(mime) or (out.get("text", []) if mime == "text/plain" else [])
            found += ["".join(text)] if text else []
    return found


def tables(path):
    "The tables of a page: the texts of each row, without those of rows of the header."
    rows = [re.findall(r"<tr.*?</tr>", html, re.S) for html in outputs(path, "text/html") if "<tbody>" in html]
    texts = [[re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S) for row in table] for table in rows]
    return [[row for row, html in zip(found, table) if "<td" in html] for found, table in zip(texts, rows)]


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_no_table_is_empty(path):
    "As the published numbers were on the page of a pair that has no row among them."
    assert all(tables(path)) and not any("Empty DataFrame" in text for text in outputs(path, "text/plain"))


@pytest.mark.parametrize("path", [p for p in PAGES if p.parent.name == "benchmarks"], ids=lambda p: p.stem)
def test_every_benchmark_is_committed_executed(path):
    assert outputs(path, "text/plain"), (
        f"run {path.name} on small data and commit its outputs, as cifar10.ipynb has them"
    )
    assert "committed without outputs" not in prose(path)


@pytest.mark.parametrize(
    ("page", "shown", "said"),
    [
        (
            "study",
            r"{}\s+([\d.]+) ",
            {"kd": "KD has {} %", "none": "against {} %", "fcka-c": "{} % centred", "fcka-u": "{} % in the released"},
        ),
        ("imagenet", r"{}\s+([\d.]+) ", {"teacher": "the teacher has {} %", "student, last epoch": "the student {} %"}),
        (
            "cityscapes",
            r"{}\s+([\d.]+) ",
            {"teacher": "its teacher {:.1f} %", "student, last epoch": "its mIoU is {:.1f} %"},
        ),
        (
            "analysis",
            r"{}\s+0\s+([\d.]+) ",
            {"rcka": "{:.1f} % against", "kd": "against {:.1f} % with KD", "none": "and {:.1f} % without"},
        ),
    ],
)
def test_small_runs_say_their_own_numbers(page, shown, said):
    printed, text = "\n".join(outputs(f"benchmarks/{page}.ipynb", "text/plain")), prose(f"benchmarks/{page}.ipynb")
    for row, sentence in said.items():
        found = re.search(rf"^(?:\d+\s+)?{shown.format(row)}", printed, re.M)
        assert found, f"no row {row}"
        assert sentence.format(float(found[1])) in text


def test_a_pair_of_which_nothing_is_published_says_so():
    assert any(re.search("Table 2 has no row", text) for text in outputs("benchmarks/imagenet.ipynb", "text/plain"))


def test_coco_says_which_detector_is_behind():
    table = next(t for t in tables("benchmarks/coco.ipynb") if any("student alone" in row for row in t))
    ap = {name: score for name, images, score, *_ in (row for row in table if "trained on" in " ".join(row))}
    alone, distilled = ap["student alone"], ap["student, pcka"]
    text = prose("benchmarks/coco.ipynb")
    assert f"{distilled} against {alone}" in text
    assert ("behind the student alone" in text) == (float(distilled) < float(alone))


def test_segmentation_says_that_the_teacher_is_below_its_student():
    (scores,) = (t for t in tables("benchmarks/cityscapes_boxes.ipynb") if any("teacher" in row for row in t))
    miou = {row[0]: float(row[1]) for row in scores}
    text = prose("benchmarks/cityscapes_boxes.ipynb")
    pairs = [("teacher", "student, last epoch"), ("teacher, training images", "student, training images")]
    for teacher, student in pairs:
        assert f"{miou[teacher]:.1f} against {miou[student]:.1f}" in text
        assert ("The teacher is below its student" in text) == (miou[teacher] < miou[student])


def test_chance_is_that_of_the_cell():
    "How often a rank correlation comes by chance: the text has the numbers that were counted, one-sided and two-sided."
    printed = next(t for t in outputs("method/09b_story.ipynb", "text/plain") if "as large by chance, 0.70" in t)
    one, two = re.search(
        r"0.70 over nine methods: one-sided once in (\d+) times, two-sided once in (\d+)", printed
    ).groups()
    text = prose("method/09b_story.ipynb")
    assert f"once in {one} times, one-sided" in text and f"with either sign, once in {two} times" in text
    orders = np.array(list(itertools.permutations(range(9))))
    rho = 1 - 6 * ((orders - np.arange(9)) ** 2).sum(1) / (9 * 80)
    assert int(one) == round(1 / (rho > 0.7 - 1e-9).mean()) and int(two) == round(1 / (abs(rho) > 0.7 - 1e-9).mean())


def scores_of_digits(name):
    "The scores of a table of the digits page by method, in the order of the seeds."
    with (root / "figures" / f"{name}.csv").open() as f:
        rows = list(csv.DictReader(f))
    return {m: [float(row[m]) for row in rows] for m in rows[0] if m != "seed"}


def test_the_demo_teaches_what_its_page_says():
    "A teacher that knows more, by several points, five seeds, and intervals that are above zero or are said not to be."
    stats = pytest.importorskip("scipy.stats")
    text, scores = prose("benchmarks/digits.ipynb"), scores_of_digits("digits")
    alone = np.array(scores.pop("none"))
    (teacher,) = (
        float(t)
        for t in re.findall(
            r"teacher \w+, all training images: ([\d.]+) %", "\n".join(outputs("benchmarks/digits.ipynb", "text/plain"))
        )
    )
    gap = teacher - alone.mean()
    assert len(alone) >= 5 and gap > 5 and f"The student alone is {gap:.0f} points below" in text

    def interval(difference):
        half = stats.t.ppf(0.975, len(difference) - 1) * difference.std(ddof=1) / len(difference) ** 0.5
        return difference.mean() - half, difference.mean() + half

    lowest = min(interval(np.array(by_seed) - alone)[0] for by_seed in scores.values())
    assert len(scores) == 4 and ("all four intervals lie above zero" in text) == (lowest > 0)
    best, second, *_ = sorted(scores.values(), key=mean, reverse=True)
    low, high = interval(np.array(best) - np.array(second))
    assert ("the interval of their difference (below the table) contains zero" in text) == (low < 0 < high)


def test_captions_of_the_front_figures_have_the_numbers_of_their_tables():
    "The alternative text of the figures on the index and in the README, against the tables drawn there."
    for name, page in (("digits", "index.ipynb"), ("digits-resnet56", "benchmarks/digits.ipynb")):
        want = sorted(round(mean(by_seed), 1) for by_seed in scores_of_digits(name).values())
        caption = re.search(rf"!\[([^\]]*)\]\([^)]*figures/{name}\.png\)", prose(page))[1]
        found = sorted(map(float, re.findall(r"\d+\.\d", caption)))
        assert found[: len(want)] == want and all(teacher > max(want) for teacher in found[len(want) :])

    by_label = defaultdict(list)
    for row in csv.DictReader((root / "figures" / "study" / "cifar100-resnet20-resnet8.csv").open()):
        by_label[row["label"]].append(float(row["last"]))
    readme = (root / "README.md").read_text(encoding="utf-8")
    caption = re.search(r"!\[([^\]]*)\]\(figures/study/cifar100\.png\)", readme)[1]
    found = sorted(map(float, re.findall(r"\d+\.\d", caption)))
    assert found == pytest.approx(sorted(map(mean, by_label.values())), abs=0.0501)  # 57.05 is rounded either way


def test_no_dot_of_the_digits_hides_another():
    "The cell that draws the figure, with seeds that all have the same score."
    plt = pytest.importorskip("matplotlib.pyplot")
    pd = pytest.importorskip("pandas")
    from matplotlib.collections import PathCollection
    from matplotlib.ticker import MultipleLocator

    from rcka import style

    (draw,) = ["".join(c["source"]) for c in cells("benchmarks/digits.ipynb") if "left.scatter" in "".join(c["source"])]
    methods, seeds = ["kd", "fcka"], [0, 1, 2, 3, 4]
    scores = pd.DataFrame({m: 90.0 + i for i, m in enumerate(["none", *methods])}, index=seeds)
    names = dict(plt=plt, style=style, MultipleLocator=MultipleLocator, scores=scores, methods=methods, seeds=seeds)
    names |= dict(teacher_top1=98.0, LABELS={}, paired=lambda method: (1.0, 0.5))
    exec(draw, names)
    fig = names["fig"]
    fig.canvas.draw()
    for ax in fig.axes:
        for dots in (c for c in ax.collections if isinstance(c, PathCollection)):
            points = ax.transData.transform(dots.get_offsets())
            assert len(points) == len(seeds)
            width = dots.get_sizes()[0] ** 0.5 * fig.dpi / 72
            apart = np.linalg.norm(points[:, None] - points[None], axis=-1) + 1e9 * np.eye(len(points))
            assert apart.min() >= width
    plt.close(fig)
