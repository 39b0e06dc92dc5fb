"""Checks which modules of the product may import which others, and other rules for the code."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.architecture.product_code import MODULES, dotted_name, nodes_of
from tests.fakes.server_process import ROOT

MAX_MODULE_LINES = 400
SHARED_STORAGE_MODULES = {
    *("storage.interface", "storage.names", "storage.patterns", "storage.content", "storage.errors", "storage.access"),
    *("storage.jobs", "storage.backups", "storage.upstream_tags"),  # for their errors
    *("storage.versioned_cache", "storage.imports", "storage.tag_history"),
}
Nodes = Sequence[ast.AST]
"""The nodes of a module's syntax tree."""


def imports(path: Path) -> Iterator[str]:
    """Yields the modules that a file imports, at its top or in functions."""
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            if node.module in ("storage", "registry"):
                yield from (f"{node.module}.{name.name}" for name in node.names)
            else:
                yield node.module


@pytest.mark.slow  # `make check` runs import-linter itself
def test_contracts_of_import_linter_hold() -> None:
    """import-linter finds no import that breaks the layers defined in pyproject.toml."""
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def offenders(breaks_rule: Callable[[Path, Nodes], bool], paths: Iterable[Path] = MODULES) -> list[str]:
    """Returns the modules that break a rule."""
    return [path.relative_to(ROOT).as_posix() for path in paths if breaks_rule(path, nodes_of(path))]


def test_http_imports_only_shared_modules_of_storage() -> None:
    """`registry/http` imports only SHARED_STORAGE_MODULES of the package `storage`: the interface, types of content,
    errors, and a few others."""

    def imports_more(path: Path, _: Nodes) -> bool:
        return not {name for name in imports(path) if name.partition(".")[0] == "storage"} <= SHARED_STORAGE_MODULES

    assert offenders(imports_more, (ROOT / "registry" / "http").rglob("*.py")) == []


def test_only_what_uvicorn_documents_is_imported() -> None:
    """The product imports only `Config` and `Server` from uvicorn, because these are documented. It imports none of
    uvicorn's modules."""

    def imports_more(_: Path, nodes: Nodes) -> bool:
        for node in nodes:
            if isinstance(node, ast.Import) and any(name.name.startswith("uvicorn.") for name in node.names):
                return True
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "uvicorn":
                names = {name.name for name in node.names}
                if node.module != "uvicorn" or not names <= {"Config", "Server"}:
                    return True
        return False

    assert offenders(imports_more) == []


def test_modules_are_small() -> None:
    """No module is longer than 400 lines. A module above 300 lines should be checked for a second purpose."""
    assert offenders(lambda path, _: len(path.read_text().splitlines()) > MAX_MODULE_LINES) == []


def test_print_belongs_to_the_command() -> None:
    """Only the modules of the command line print to stdout. Other modules log, and may print to stderr if the start of
    the server fails."""

    def prints(path: Path, nodes: Nodes) -> bool:
        return (ROOT / "registry" / "cli") not in path.parents and any(
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "print"
            and not any(key.arg == "file" and dotted_name(key.value) == "sys.stderr" for key in node.keywords)
            for node in nodes
        )

    assert offenders(prints) == []


def test_commands_print_through_one_module() -> None:
    """Commands print only with the functions of `registry.cli.output`, which replace control characters. Names and
    texts of images could otherwise control the terminal of the operator."""
    owners = {ROOT / "registry/cli" / name for name in ("output.py", "printable_console.py")}

    def prints(path: Path, nodes: Nodes) -> bool:
        calls = {dotted_name(node.func) for node in nodes if isinstance(node, ast.Call)}
        return not calls.isdisjoint({"typer.echo", "click.echo", "print", "Console", "sys.stdout.write"})

    modules = [path for path in MODULES if path.is_relative_to(ROOT / "registry/cli") and path not in owners]
    assert len(modules) > 50
    assert not offenders(prints, modules)


def test_signals_can_end_every_event_loop() -> None:
    """Commands run their event loops with `registry.cli.interrupts.run_interruptible`, so that a signal ends a command
    even if a task hangs."""

    def runs_loop(path: Path, nodes: Nodes) -> bool:
        calls = (node.func for node in nodes if isinstance(node, ast.Call))
        called = {dotted_name(called) for called in calls}
        may_make_runner = path == ROOT / "registry" / "cli" / "interrupts.py"
        return "asyncio.run" in called or ("asyncio.Runner" in called and not may_make_runner)

    assert offenders(runs_loop) == []


def test_there_is_one_context_variable() -> None:
    """The only ContextVar of the product is that of the request's context. All other values are passed as arguments."""
    found = [path for path in MODULES if "ContextVar(" in path.read_text()]
    assert found == [ROOT / "registry" / "request.py"]
    assert found[0].read_text().count("ContextVar(") == 1


def test_cookies_are_read_in_linear_time() -> None:
    """No module reads cookies with `http.cookies`, or with Starlette's `Request.cookies`, which uses it. In Python
    3.11, a header of 30 KB with escapes would then block the event loop for seconds. Modules use
    `registry.admin.cookies.cookie_value` instead."""

    def reads_cookies(path: Path, nodes: Nodes) -> bool:
        is_attribute_read = any(
            isinstance(node, ast.Attribute)
            and node.attr in ("cookies", "cookie_parser")
            and ast.unparse(node.value).rpartition(".")[2].lstrip("_") in ("request", "connection", "requests")
            for node in nodes
        )
        parameters = {dotted_name(node.func) for node in nodes if isinstance(node, ast.Call)}
        return is_attribute_read or "http.cookies" in imports(path) or bool(parameters & {"Cookie", "fastapi.Cookie"})

    assert offenders(reads_cookies) == []
    with_cookie_jars = offenders(lambda path, _: "http.cookiejar" in imports(path))
    assert with_cookie_jars == ["registry/response_limits.py"]  # `NoCookies`, which parses nothing
