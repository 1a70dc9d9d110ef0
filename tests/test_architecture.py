"""Who may import whom, and habits that the whole package keeps. See ARCHITECTURE.md."""

from __future__ import annotations

import ast
import graphlib
import importlib
from pathlib import Path

import pytest

import hfq
from hfq.algorithms import ALGORITHMS, method_names
from hfq.formats import FORMATS
from hfq.kernels import dispatch

ROOT = Path(hfq.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# Package or module of hfq -> those that it may import beside itself.
_BELOW_NN = {"core", "formats", "kernels"}
_BELOW_INTEGRATIONS = {*_BELOW_NN, "algorithms", "nn", "config", "table", "tokens", "plot"}
ALLOWED: dict[str, set[str]] = {
    "_version": set(),
    "core": set(),
    "table": set(),
    "tokens": {"core"},
    "plot": set(),
    "formats": {"core"},
    "algorithms": {"core"},
    "kernels": {"core", "formats"},
    "nn": _BELOW_NN,
    "config": {*_BELOW_NN, "algorithms", "nn"},
    "calibration": {*_BELOW_NN, "algorithms", "nn", "config", "table"},
    "kv": {"core", "kernels"},
    "training": {*_BELOW_NN, "algorithms", "nn", "config"},
    "evaluation": _BELOW_INTEGRATIONS,
    "diagnose": _BELOW_INTEGRATIONS,
    "integrations": {
        *_BELOW_INTEGRATIONS,
        "calibration",
        "kv",
        "training",
        "evaluation",
        "diagnose",
    },
    "inspection": {*_BELOW_INTEGRATIONS, "integrations"},
}
TOP = {"__init__", "__main__", "cli"}  # may import everything

# What only the upper packages know.
LIBRARIES = {"transformers", "peft", "huggingface_hub", "accelerate"}


def unit_of(path: Path) -> str:
    """The package or module directly below hfq that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Full names of all that a file imports, inside functions too."""
    package = ["hfq", *path.relative_to(ROOT).parts[:-1]]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def test_the_arrows_have_no_circle() -> None:
    order = list(graphlib.TopologicalSorter(ALLOWED).static_order())
    assert set(order) == set(ALLOWED)


def test_every_part_of_hfq_has_its_place() -> None:
    unknown = {unit_of(path) for path in FILES} - ALLOWED.keys() - TOP
    assert not unknown, f"add {unknown} to ALLOWED here and to the table in ARCHITECTURE.md"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path: Path) -> None:
    unit = unit_of(path)
    if unit in TOP:
        return
    parts = [name.split(".") for name in imported(path)]
    # `import hfq` alone asks where the package lies.
    ours = {name[1] for name in parts if name[0] == "hfq" and len(name) > 1}
    assert ours <= {unit, "_version", *ALLOWED[unit]}
    if unit in {"core", "formats", "algorithms", "kernels", "nn"}:
        assert not {name[0] for name in parts} & LIBRARIES


def test_imports_are_seen() -> None:
    """The checks above would pass for a parser that finds nothing."""
    assert "hfq.core.bits" in imported(ROOT / "formats" / "int_grouped.py")
    assert "transformers.utils.quantization_config.QuantizationConfigMixin" in imported(
        ROOT / "config.py"
    )
    assert "hfq.kernels.neutral.Neutral" in imported(ROOT / "kernels" / "dispatch.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_habits(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree) or path.name == "_version.py", "a file says what it is about"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print" or unit_of(path) == "cli", f"print in line {node.lineno}"
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            catches_all = caught in {"Exception", "BaseException", "everything"}
            assert not catches_all or raises_again(node), f"{caught} in line {node.lineno}"
    forbidden = {"utils", "helpers", "util", "helper", "misc", "common"}
    assert path.stem not in forbidden


def raises_again(handler: ast.ExceptHandler) -> bool:
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_all_names_exist(path: Path) -> None:
    if path == ROOT / "__init__.py":
        return  # lazy; see test_public.py
    tree = ast.parse(path.read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            public = ast.literal_eval(node.value)
            assert set(public) <= top_level_names(tree)
            assert len(set(public)) == len(public)


def top_level_names(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


# ---- registries


@pytest.mark.parametrize("registry", [FORMATS, ALGORITHMS], ids=lambda registry: registry.kind)
def test_every_registered_name_is_described(registry: object) -> None:
    assert registry is FORMATS or registry is ALGORITHMS
    for name in registry.names():
        item = registry.get(name)
        assert type(item).__doc__, name
        module = importlib.import_module(type(item).__module__)
        assert module.__doc__ is not None and f"``{name}``" in module.__doc__, name


def test_a_method_is_named_like_its_file() -> None:
    files = {path.stem for path in (ROOT / "algorithms").glob("*.py")} - {"__init__"}
    assert files == set(method_names())


def test_every_method_prefers_a_format_that_it_can_write() -> None:
    for name in ALGORITHMS.names():
        algorithm = ALGORITHMS.get(name)
        preferred = dict(algorithm.defaults)
        packed_format = FORMATS.get(str(preferred.pop("format")))
        algorithm.check(packed_format.spec(preferred), algorithm.options)


def test_every_kernel_has_a_name_of_its_own_and_a_description() -> None:
    rows = dispatch.rows()
    assert len({row.name for row in rows}) == len(rows)
    assert all(type(row).__doc__ for row in rows)
