"The package is built in layers: a module imports what stands below it, never a circle, and never a private name of another."

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "rcka"
LAYERS = [  # from the bottom up; what stands on one line may import within its own package only
    ("extras",),
    ("core", "style"),
    ("files", "distributed", "similarity", "features"),
    ("methods", "models", "data"),
    ("pair",),
    ("train",),
    ("engine",),
    ("experiments",),
    ("analysis",),
    ("shipping",),
    ("distillation", "loggers"),
    ("cli",),
]
LEVEL = {name: i for i, names in enumerate(LAYERS) for name in names}
ENTRY_POINTS = {"rcka", "rcka.__main__", "rcka.train.__main__"}  # they name what users ask for, so they look up


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path):
    "Every (module, name) that a file imports from this package, at any depth of the code."
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    for_types = {id(n) for block in typing for n in ast.walk(block)}  # never imported when the package runs
    for node in (n for n in ast.walk(tree) if id(n) not in for_types):
        if isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            if module.split(".")[0] == "rcka":
                yield from ((module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.split(".")[0] == "rcka")


FILES = [p for p in sorted(ROOT.rglob("*.py")) if p.name != "_modidx.py"]
GRAPH = {module_name(p): set(imports(p)) for p in FILES}


def room(module: str) -> str:
    return (module.split(".") + [""])[1]


def target(module: str, name: str) -> str:
    "The module that an import reaches: `from rcka.models import vgg` reaches rcka.models.vgg."
    return f"{module}.{name}" if f"{module}.{name}" in GRAPH else module


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
