"""An experiment from the command to the optimiser's step: what the page of the layers says, and no call that climbs
unseen."""

import json
import sys
from pathlib import Path

import pytest
from layers import LEVEL, ROOT, room

import rcka

pytestmark = pytest.mark.slow
PAGE = ROOT.parent / "nbs" / "method" / "12_layers.ipynb"
TINY = dict(dataset="digits", teacher="resnet8", student="resnet8", method="kd+fcka", epochs=1, batch_size=16)
TINY |= dict(train_limit=32, test_limit=20, device="cpu")
INNER = {
    "<genexpr>",
    "<listcomp>",
    "<setcomp>",
    "<dictcomp>",
}  # of the function they stand in; Python 3.12 has no frames for some


def table(heading: str) -> list[list[str]]:
    "The rows of the table below a heading of the page, code without its ticks."
    cells = json.loads(PAGE.read_text(encoding="utf-8"))["cells"]
    (text,) = [s for c in cells if (s := "".join(c["source"])).startswith(f"## {heading}\n")]
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]


def place(frame) -> tuple[str, str] | None:
    "Module and function of a frame in the package."
    code = frame.f_code
    if not code.co_filename.startswith(str(Path(rcka.__file__).parent)) or code.co_name in INNER:
        return None
    return frame.f_globals["__name__"].removeprefix("rcka."), code.co_name


def places(frame):
    "The places in the package from a frame to where it was called from."
    while frame is not None:
        if found := place(frame):
            yield found
        frame = frame.f_back


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """The calls between functions of the package in a run of `rcka train`, and the places on the way to each step of
    SGD."""
    pytest.importorskip("typer")
    from rcka.cli import main

    calls, trips = set(), set()

    def watch(frame, event, arg):
        if event != "call":
            return
        if (callee := place(frame)) and (caller := next(places(frame.f_back), None)):
            calls.add((caller, callee))
        elif frame.f_code.co_name == "step" and Path(frame.f_code.co_filename).parts[-2:] == ("optim", "sgd.py"):
            trips.add(tuple(places(frame))[::-1])

    values = [text for name, value in TINY.items() for text in (f"--{name}", str(value))]
    root, before = tmp_path_factory.mktemp("runs"), sys.getprofile()
    sys.setprofile(watch)
    try:
        with pytest.raises(SystemExit) as end:
            main(["train", *values, "--root", str(root), "--quiet"])
    finally:
        sys.setprofile(before)
    assert not end.value.code
    return calls, trips


def test_the_longest_trip_is_that_of_the_page(followed):
    "The student's step, and the teacher's, which is trained on the way; what stands in the page is the longer one."
    trips = sorted(followed[1], key=len)
    assert len(trips) == 2 and set(trips[0]) < set(trips[1])
    said = [(module, function.rpartition(".")[2]) for _, module, function, *_ in table("The longest trip")]
    assert said == list(trips[1])
    levels = [LEVEL[room(f"rcka.{module}")] for module, _ in said]
    assert levels == sorted(levels, reverse=True)
    assert [int(level) for level, *_ in table("The longest trip")] == levels


def test_calls_climb_to_what_is_chosen_at_run_time_alone(followed):
    def level(place):
        return LEVEL[room(f"rcka.{place[0]}")]

    def outside(caller, callee):  # another package that is not below
        return room(f"rcka.{caller[0]}") != room(f"rcka.{callee[0]}") and level(callee) >= level(caller)

    entry = {"__main__", "rcka"}  # they look up, see tests/layers.py
    calls = {(a, b) for a, b in followed[0] if "<module>" not in (a[1], b[1]) and not {a[0], b[0]} & entry}
    assert len(calls) > 200
    climbs = {(f"{a[0]}.{a[1]}", f"{b[0]}.{b[1]}") for a, b in calls if outside(a, b)}
    assert climbs == {(caller, callee) for caller, callee, _ in table("What is chosen at run time")}
