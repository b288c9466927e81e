"""Which module may import which: the arrows of the map in CONTRIBUTING.md point one way."""

from __future__ import annotations

import ast
from pathlib import Path

import networkx as nx
import pytest

import mfx

PACKAGE = Path(mfx.__file__).parent


def imports(path: Path) -> set[str]:
    """The modules that a file imports, wherever it does so; of mfx the submodule."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


GRAPH = nx.DiGraph(
    (path.stem, name.split(".")[1])
    for path in PACKAGE.glob("*.py")
    if path.stem != "__init__"
    for name in imports(path)
    if name.startswith("mfx.") and (PACKAGE / f"{name.split('.')[1]}.py").exists()
)


def behind(module: str) -> set[str]:
    """All that a module imports, directly or not."""
    return nx.descendants(GRAPH, module)


def test_no_modules_import_each_other():
    assert nx.is_directed_acyclic_graph(GRAPH)


@pytest.mark.parametrize("module", ["errors"])
def test_the_lowest_modules_import_nothing_of_the_package(module):
    assert module not in GRAPH or not behind(module)


@pytest.mark.parametrize(
    ("module", "others"),
    [
        ("operations", {"capture", "tracer", "dataflow", "find", "plan", "rewrite", "model"}),
        ("capture", {"find", "plan", "momentum", "rewrite", "model"}),
        ("find", {"capture", "plan", "momentum", "rewrite", "model"}),
        ("plan", {"capture", "momentum", "rewrite", "model"}),
        ("momentum", {"operations", "tracer", "capture", "dataflow", "find", "plan", "rewrite", "model"}),
        ("recompute", {"capture", "find", "plan", "momentum", "rewrite", "model"}),
        ("rewrite", {"model", "report", "verify", "cli"}),
        ("dynamo", {"model", "report", "verify", "cli"}),
        ("model", {"report", "verify", "cli"}),
        ("report", {"verify", "cli"}),
    ],
)
def test_arrows_point_one_way(module, others):
    if module not in GRAPH:
        pytest.skip(f"there is no module {module} that imports others")
    assert not behind(module) & others


@pytest.mark.parametrize("module", ["momentum", "tape", "reversible", "recompute", "precision"])
def test_what_runs_the_recurrence_knows_no_fx(module):
    path = PACKAGE / f"{module}.py"
    names = imports(path) | {name for inner in behind(module) for name in imports(PACKAGE / f"{inner}.py")}
    assert not {name for name in names if name.startswith("torch.fx")}


def test_only_rewriting_and_capturing_build_graphs():
    building = {
        path.stem
        for path in PACKAGE.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in ("node_copy", "call_function", "call_method", "get_attr")
    }
    assert building <= {"rewrite", "region", "tracer", "dynamo"}


def test_the_package_names_what_it_exports():
    assert sorted(mfx.__all__) == list(mfx.__all__)
    assert all(hasattr(mfx, name) for name in mfx.__all__)
