"""The package is built in layers: a module imports what stands below it, never a circle, and never a private name of
another."""

import pytest
from layers import ENTRY_POINTS, GRAPH, LEVEL, room, target


@pytest.mark.parametrize("module", sorted(set(GRAPH) - ENTRY_POINTS))
def test_imports_point_down(module):
    here = LEVEL[room(module)]
    for imported, name in GRAPH[module]:
        there = target(imported, name)
        if there == "rcka":
            assert name in ("", "__version__"), f"{module} imports {name} from the top of the package"
            continue
        assert room(there) == room(module) or LEVEL[room(there)] < here, (
            f"{module} imports {there}, which is not below it"
        )


def test_no_circles():
    "Modules in an order in which each imports only earlier ones; a package's __init__ counts after its modules."
    edges = {
        m: {target(i, n) for i, n in found if target(i, n) not in (m, "rcka")} & set(GRAPH)
        for m, found in GRAPH.items()
        if m not in ENTRY_POINTS
    }
    while edges:
        free = [m for m, needs in edges.items() if not needs & set(edges)]
        assert free, f"these modules import each other in a circle: {sorted(edges)}"
        for m in free:
            del edges[m]


@pytest.mark.parametrize("module", sorted(GRAPH))
def test_private_names_stay_at_home(module):
    private = [(m, n) for m, n in GRAPH[module] if n.startswith("_") and not n.startswith("__")]
    assert not private, f"{module} imports private names: {private}"
