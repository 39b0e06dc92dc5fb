"""What may import what, and the rules of the house that a program can check."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.server_process import ROOT

LINES = 400
VOCABULARY = {
    *("storage.interface", "storage.names", "storage.patterns", "storage.content", "storage.errors", "storage.access"),
    *("storage.jobs", "storage.backups", "storage.upstream_tags"),  # their errors
    "storage.versioned_cache",
    *("storage.versioned_cache", "storage.jobs", "storage.imports"),
}
MODULES = sorted(path for part in ("registry", "storage") for path in (ROOT / part).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """The modules a file imports, wherever in it that stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            if node.module in ("storage", "registry"):
                yield from (f"{node.module}.{name.name}" for name in node.names)
            else:
                yield node.module


def test_contracts_of_import_linter_hold() -> None:
    """The layers that pyproject.toml draws are kept."""
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "registry" / "http").rglob("*.py")), ids=lambda path: path.name)
def test_http_imports_the_vocabulary_alone(path: Path) -> None:
    """Of `storage`, `registry/http` imports the interface, names, patterns, content, access and errors alone."""
    assert {name for name in imports(path) if name.partition(".")[0] == "storage"} <= VOCABULARY


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_what_uvicorn_documents_is_imported(path: Path) -> None:
    """Of uvicorn, product code imports `Config` and `Server` from the package itself, and none of its modules."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not any(name.name.startswith("uvicorn.") for name in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "uvicorn":
            assert node.module == "uvicorn"
            assert {name.name for name in node.names} <= {"Config", "Server"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_are_small(path: Path) -> None:
    """No module is longer than 400 lines; above 300, think about its one idea."""
    assert len(path.read_text().splitlines()) <= LINES


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_print_belongs_to_the_command(path: Path) -> None:
    """Only the command writes to stdout; what else has something to say logs it. stderr is for a start that fails."""
    if (ROOT / "registry" / "cli") in path.parents:
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            assert any(key.arg == "file" and ast.unparse(key.value) == "sys.stderr" for key in node.keywords)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_signals_can_end_every_event_loop(path: Path) -> None:
    """A command runs its event loop by `registry.cli.interrupts.run_interruptible`, which a signal ends whatever is
    stuck."""
    called = {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}
    assert "asyncio.run" not in called
    assert "asyncio.Runner" not in called or path == ROOT / "registry" / "cli" / "interrupts.py"


def test_there_is_one_context_variable() -> None:
    """Values reach a function through its arguments, or through the request's context."""
    found = [path for path in MODULES if "ContextVar(" in path.read_text()]
    assert found == [ROOT / "registry" / "request.py"]
    assert found[0].read_text().count("ContextVar(") == 1
