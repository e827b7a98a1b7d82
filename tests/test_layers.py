"""The house rules: who may import whom, what importing costs, and what stands at the top level."""

import ast
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "transformers", "trl", "peft", "accelerate", "datasets", "bm25s", "pyserini", "jnius", "matplotlib"}


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path, top_level_only: bool) -> set[str]:
    found = set()

    def walk(nodes) -> None:
        for node in nodes:
            if isinstance(node, ast.Import):
                found.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.split(".")[0])
            elif not top_level_only and not isinstance(node, ast.expr):  # An expression holds no statement.
                walk(ast.iter_child_nodes(node))

    walk(parsed(path).body)
    return found


@pytest.mark.parametrize("package", ["retrievers", "rewards"])
def test_siblings_know_neither_each_other_nor_training(package):
    # The dense backend's encoder and matrix products are torch's, loaded by the function that needs them.
    neural = {"torch", "transformers"} if package == "rewards" else set()
    forbidden = {"rec_r1", "trl", "peft", "accelerate", *neural, *({"retrievers", "rewards"} - {package})}
    files = sorted((ROOT / package).rglob("*.py"))
    assert len(files) >= 4
    for path in files:
        allowed = {"peft"} if path.parent.name == "tuning" else set()  # An encoder may be tuned by LoRA.
        assert not imports(path, top_level_only=False) & (forbidden - allowed), path
        assert not imports(path, top_level_only=True) & HEAVY, path


@pytest.mark.parametrize("name", ["rewards", "retrievers"])
def test_a_shadowing_package_is_refused_by_name(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.path.append({str(ROOT)!r}); import rec_r1"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError") and repr(name) in last and str(tmp_path / name) in last


def test_the_top_level_is_the_one_agreed():
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    top = {line.split("/")[0] for line in done.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} == {
        *("pyproject.toml", "rec_r1", "rewards", "retrievers", "recipes", "tests", "README.md", "LICENSE")
    }


def test_no_recipe_holds_python_and_no_file_is_too_long():
    assert not list((ROOT / "recipes").glob("*.py"))
    for package in ("rec_r1", "rewards", "retrievers"):
        for path in (ROOT / package).rglob("*.py"):
            assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path
    assert len((ROOT / "rec_r1" / "train.py").read_text().splitlines()) < 150


def import_time(body: list[ast.stmt]) -> set[str]:
    """Modules that importing a file loads: inside try, if, with and class too, but not inside functions."""
    found = set()
    for node in body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            found |= import_time(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for part in ("body", "orelse", "finalbody"):
                found |= import_time(getattr(node, part, []))
            for handler in getattr(node, "handlers", []):
                found |= import_time(handler.body)
    return found


def test_import_time_sees_through_blocks_and_not_into_functions():
    source = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import torch
try:
    import bm25s
except ImportError:
    import jnius
def late():
    import trl
"""
    assert import_time(ast.parse(source).body) == {"typing", "bm25s", "jnius"}


@pytest.mark.parametrize("package", ["retrievers", "rewards"])
def test_no_block_at_module_level_imports_something_heavy(package):
    for path in sorted((ROOT / package).rglob("*.py")):
        assert not import_time(parsed(path).body) & HEAVY, path


def test_only_the_trainer_and_its_callbacks_load_something_heavy_when_imported():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for package in ("rec_r1", "rewards", "retrievers")
        for path in sorted((ROOT / package).rglob("*.py"))
        if path.stem not in ("trainer", "callbacks", "prompt_record")
    ]
    assert len(modules) >= 20 and {"rec_r1", "rec_r1.config", "rewards", "retrievers"} <= set(modules)
    code = f"import sys, {', '.join(modules)}; print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("given", "policy", "spins"),
    [
        ({}, "PASSIVE", "3000"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE", None),
        ({"GOMP_SPINCOUNT": "7"}, "PASSIVE", "7"),
    ],
)
def test_threads_that_wait_soon_sleep_unless_the_user_says_otherwise(given, policy, spins):
    """The settings are read when torch is loaded, so they are set before."""
    code = (
        "import sys, os\nfrom rec_r1 import cli, console, train\nconsole.setup()\nassert 'torch' not in sys.modules\n"
        "print(os.environ.get('OMP_WAIT_POLICY'), os.environ.get('GOMP_SPINCOUNT'))"
    )
    env = {key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")} | given
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [policy, str(spins)]


# A room may import the rooms that stand before it, itself, and nothing that stands after it. Rooms in one tuple do not
# know each other.
REC_R1 = [
    ("rec_r1.config",), ("rec_r1.console",), ("rec_r1.prompts", "rec_r1.models"), ("rec_r1.runs",), ("rec_r1.tasks",),
    ("rec_r1.scoring",), ("rec_r1.environment", "rec_r1.generation"), ("rec_r1.trl_options",), ("rec_r1.evaluation",),
    ("rec_r1.pages", "rec_r1.baselines"), ("rec_r1.policy",), ("rec_r1.similarity_gap",), ("rec_r1.training",),
    ("rec_r1.checks",), ("rec_r1.train",), ("rec_r1.cli",),
]  # fmt: skip
RETRIEVERS = [
    ("retrievers.types",), ("retrievers.interactions", "retrievers.core"), ("retrievers.catalog",),
    ("retrievers.encoders",), ("retrievers.text", "retrievers.recommenders"), ("retrievers.registry",),
    ("retrievers.combine",), ("retrievers.serving",),
]  # fmt: skip


def modules(package: str) -> dict[str, Path]:
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        found[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


@functools.cache
def imported(path: Path, known: frozenset[str]) -> set[str]:
    """The modules of ``known`` that a file imports anywhere in it, functions included, but not for type checks only."""
    found = set()

    def walk(nodes) -> None:
        for node in nodes:
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                continue
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    found.add(inner if inner in known else node.module)
            elif not isinstance(node, ast.expr):  # An expression holds no statement.
                walk(ast.iter_child_nodes(node))

    walk(parsed(path).body)
    return found & known


@pytest.mark.parametrize("package, order", [("rec_r1", REC_R1), ("retrievers", RETRIEVERS)])
def test_rooms_import_only_what_stands_before_them(package, order):
    known, place = modules(package), {room: i for i, rooms in enumerate(order) for room in rooms}
    rooms = {".".join(name.split(".")[:2]) for name in known} - {package}
    assert rooms == set(place), "a new room needs its place in the order above"
    for name, path in known.items():
        own = ".".join(name.split(".")[:2])
        if own == package:
            continue  # the package itself offers what its rooms have
        for other in imported(path, frozenset(known)):
            room = ".".join(other.split(".")[:2])
            assert room in (own, package) or place[room] < place[own], f"{name} imports {other}"


@pytest.mark.parametrize("package", ["rec_r1", "retrievers", "rewards"])
def test_no_modules_import_each_other_in_a_circle(package):
    known = modules(package)
    # `import retrievers` inside retrievers would be a circle: only what lies outside may use the front door.
    ahead = {name: imported(path, frozenset(known)) for name, path in known.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(ahead[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in known:
        visit(name, ())


def test_packages_can_be_overlooked():
    for package in ("rec_r1", "retrievers"):
        entries = [path for path in (ROOT / package).iterdir() if path.name != "__pycache__"]
        assert len(entries) <= 22, package
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 250
