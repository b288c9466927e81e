"""The rule of the house: which folder may import which, and how large things are."""

from __future__ import annotations

import ast
from pathlib import Path

import networkx as nx
import pytest

import mfx

PACKAGE = Path(mfx.__file__).parent
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
ROWS = (
    {"errors", "memory", "torch_versions"},
    {"sharding"},
    {"graph", "rule"},
    {"options"},
    {"capture", "find", "run"},
    {"plan"},
    {"rewrite"},
    {"budget"},
    {"pipeline"},
    {"compile"},
    {"model"},
    {"integrations", "momentumnet", "view"},
    {"cli", "__init__"},
    {"__main__"},
)
"""Whoever stands in a row imports from its own folder and from the rows above it, and from nowhere else."""
ROW = {name: number for number, row in enumerate(ROWS) for name in row}


def tree(file: Path) -> ast.Module:
    return ast.parse((PACKAGE / file).read_text(encoding="utf-8"))


def imports(file: Path) -> set[str]:
    """The modules that a file imports, wherever it does so; of a package also the names taken from it."""
    found: set[str] = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports hide where a name is from"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def home(file: Path) -> str:
    """The folder that a file is in, or its own name at the top."""
    return file.parts[0] if len(file.parts) > 1 else file.stem


def module(file: Path) -> str:
    parts = ("mfx", *file.with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def ours(file: Path) -> set[str]:
    """What a file imports of the package: folder, or file at the top."""
    names = {name.split(".")[1] for name in imports(file) if name.startswith("mfx.")}
    return {name for name in names if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists()}


@pytest.mark.parametrize("file", FILES, ids=str)
def test_a_file_imports_from_its_own_folder_or_a_lower_row(file):
    here = home(file)
    assert here in ROW, f"{file} stands in no row: say where it belongs"
    wrong = {name for name in ours(file) - {here} if ROW.get(name, len(ROWS)) >= ROW[here]}
    assert not wrong, f"{file} imports {sorted(wrong)}"


@pytest.mark.parametrize("file", FILES, ids=str)
def test_the_package_itself_is_imported_by_its_command_line_alone(file):
    assert "mfx" not in imports(file), f"{file}: name the folder that holds what is needed"


def test_every_row_names_what_exists():
    assert {home(file) for file in FILES} == set(ROW)


def test_no_modules_import_each_other():
    known = {module(file): file for file in FILES}
    arrows = nx.DiGraph(
        (name, target) for name, file in known.items() for target in imports(file) if target in known and target != name
    )
    # A folder's __init__ re-exports its files, which therefore may name the folder's other files, but not the folder.
    assert nx.is_directed_acyclic_graph(arrows)


@pytest.mark.parametrize("folder", ["rule", "run"])
def test_what_runs_the_recurrence_knows_no_fx(folder):
    files = [file for file in FILES if home(file) == folder]
    names = {name for file in files for name in imports(file)}
    assert files
    assert not {name for name in names if name.startswith("torch.fx") or name == "torch.fx" or name.endswith(".fx")}


def test_only_rewriting_and_capturing_build_graphs():
    build = ("node_copy", "call_function", "call_method", "get_attr", "graph_copy", "create_node")
    building = {
        file.as_posix()
        for file in FILES
        for node in ast.walk(tree(file))
        if isinstance(node, ast.Attribute) and node.attr in build
    }
    assert building == {
        "capture/lifted.py",
        "capture/tracer.py",
        "compile/pieces.py",
        "find/streams/joining.py",
        "graph/splice.py",
        "rewrite/binding.py",
        "rewrite/compiled.py",
        "rewrite/direct.py",
        "rewrite/rewriter.py",
        "rewrite/specs.py",
        "rewrite/switches.py",
    }


def test_the_package_names_what_it_exports():
    assert sorted(mfx.__all__) == list(mfx.__all__)
    assert all(hasattr(mfx, name) for name in mfx.__all__)


def test_no_module_bears_the_name_of_what_is_exported():
    assert not {file.stem for file in FILES} & set(mfx.__all__)


def test_a_folder_does_not_hide_one_of_its_modules_behind_a_name():
    for folder in {file.parent for file in FILES if len(file.parts) > 1}:
        named = {alias.asname or alias.name for node in ast.walk(tree(folder / "__init__.py"))
                 if isinstance(node, ast.ImportFrom) for alias in node.names}  # fmt: skip
        assert not named & {file.stem for file in FILES if file.parent == folder}


@pytest.mark.parametrize("file", FILES, ids=str)
def test_files_and_functions_are_short(file):
    assert len((PACKAGE / file).read_text(encoding="utf-8").splitlines()) <= 300
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.FunctionDef):
            first = node.body[0]
            told = first.end_lineno - first.lineno + 1 if ast.get_docstring(node) else 0
            assert node.end_lineno - node.lineno + 1 - told <= 40, f"{file}: {node.name}"


def test_folders_are_small():
    for folder in {file.parent for file in FILES}:
        assert sum(file.parent == folder for file in FILES) <= 10, folder


def test_every_file_and_every_public_name_has_a_docstring():
    bare = []
    for file in FILES:
        top = tree(file)
        public = [node for node in top.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        nodes = [top, *(node for node in public if not node.name.startswith("_"))]
        bare += [f"{file}: {getattr(node, 'name', '')}" for node in nodes if not ast.get_docstring(node)]
    assert not bare
