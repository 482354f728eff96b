"The layers of the package, and what its modules import, read from their source."

import ast
from collections.abc import Iterator
from pathlib import Path

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


def imports(path: Path) -> Iterator[tuple[str, str]]:
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
    "The package below rcka that a module is in: rcka.train.learner is in train."
    return (module.split(".") + [""])[1]


def target(module: str, name: str) -> str:
    "The module that an import reaches: `from rcka.models import vgg` reaches rcka.models.vgg."
    return f"{module}.{name}" if f"{module}.{name}" in GRAPH else module


def package_edges() -> set[tuple[str, str]]:
    "Which package imports which, without the entry points."
    edges = {(room(m), room(target(*i))) for m, found in GRAPH.items() if m not in ENTRY_POINTS for i in found}
    return {(a, b) for a, b in edges if a != b and b}
