"""A test of what commands import. The import of FastAPI takes longer than most commands need for their work."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.fakes.server_process import ROOT

SERVER_STARTS = ("serve_command.py", "takeover.py")
"""The modules of `registry/cli` that start a server, which needs FastAPI."""
WEB_FRAMEWORKS = ("fastapi", "starlette")


def test_commands_import_no_web_framework() -> None:
    """All modules that the commands import, except those that start a server, import neither FastAPI nor Starlette."""
    modules = sorted({module for path in _command_files() for module in _imported_modules(path)})
    program = f"""
import importlib, sys
for module in {modules}:
    importlib.import_module(module)
    for framework in {WEB_FRAMEWORKS}:
        if framework in sys.modules:
            sys.exit(f"{{module}} imports {{framework}}")
"""
    assert len(modules) > 100
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def _command_files() -> list[Path]:
    return [path for path in (ROOT / "registry/cli").rglob("*.py") if path.name not in SERVER_STARTS]


def _imported_modules(path: Path) -> Iterator[str]:
    """Yields the modules of the product that a file imports, also inside functions, but not only for type checks."""
    for statement in _statements(ast.parse(path.read_text()).body):
        if not isinstance(statement, ast.ImportFrom):
            continue
        module = statement.module or ""
        if module.partition(".")[0] in ("registry", "storage"):
            yield module
            for alias in statement.names:  # a module of a package, or a name in a module
                if (ROOT / module.replace(".", "/") / f"{alias.name}.py").exists():
                    yield f"{module}.{alias.name}"


def _statements(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """Yields all statements, except those in `if TYPE_CHECKING:`."""
    for statement in body:
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            continue
        yield statement
        for field in ("body", "orelse", "finalbody", "handlers"):
            yield from _statements(getattr(statement, field, []))
