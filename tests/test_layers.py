"""The package is built in layers: a module imports what stands below it, never a circle, and never a private name of
another."""

import ast
import re

import pytest
from layers import ENTRY_POINTS, GRAPH, LEVEL, ROOT, room, target


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


def defined(module: str) -> set[str]:
    "The names that a module defines at its top level."
    path = ROOT / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
    return found


def test_long_functions_say_why():
    "A function of more than a screen, 60 lines, has a reason in a comment on the line that names it."
    for path in sorted(ROOT.rglob("*.py")):
        lines = path.read_text(encoding="utf-8").splitlines()
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno - node.lineno >= 60:
                assert "# long, since " in lines[node.lineno - 1], (
                    f"{path.relative_to(ROOT)}: {node.name} is longer than a screen: split it, or say why on its line"
                )


def test_new_names_are_where_the_changelog_says():
    "Each name in the table of old and new names, the one behind the arrow where there is one."
    text = (ROOT.parent / "CHANGELOG.md").read_text(encoding="utf-8").partition("### Old and new names")[2]
    rows = re.findall(r"^\| `[\w.]+` \| `([\w.]+)` \| (.+) \|$", text, re.M)
    assert len(rows) > 50
    for module, names in rows:
        new = {re.findall(r"`(\w+)`", name)[-1] for name in names.split(", ")}
        assert new <= defined(module), f"{module}: {sorted(new - defined(module))}"
