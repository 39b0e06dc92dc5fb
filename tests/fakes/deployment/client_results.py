"""The results of the compatibility tests: which steps work with which container client. tests/deploy/compatibility
records them; the page `compatibility` of the book shows them.

The results of each Debian release are in a file in tests/data/compatibility. `make compatibility` records them again.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.fakes.deployment.debian_root import RELEASES
from tests.fakes.server_process import ROOT

RESULTS = ROOT / "tests" / "data" / "compatibility"
STEPS = ("push", "pull", "mirror")
PODMAN_SETTINGS = "`--tls-verify=false` for plain HTTP; `registries.conf` for the mirror (`entrepot client podman`)"
CTR_SETTINGS = "`--plain-http` of `ctr`; the mirror by `entrepot client containerd`"


@dataclass(frozen=True)
class ClientToTry:
    """A client of the table: the steps that it can do, and the settings that it needs besides the registry's
    address."""

    steps: tuple[str, ...]
    settings: str
    without: str = ""
    """The Debian release that does not have the client; empty: both have it."""


CLIENTS = {
    "docker": ClientToTry(STEPS, "the mirror by `entrepot client docker`"),
    "BuildKit": ClientToTry(STEPS, "as docker"),
    "podman": ClientToTry(STEPS, PODMAN_SETTINGS),
    "buildah": ClientToTry(STEPS, "as podman"),
    "skopeo": ClientToTry(STEPS, "as podman"),
    "containerd": ClientToTry(STEPS, CTR_SETTINGS),
    "Helm": ClientToTry(("push", "pull"), "`--plain-http` for plain HTTP"),
    "oras": ClientToTry(("push", "pull"), "`--plain-http` for plain HTTP", without="bookworm"),
    "oras in Python": ClientToTry(("push", "pull"), "`insecure` for plain HTTP"),
    "cosign": ClientToTry(("push", "pull"), "none: it signs and verifies images here", without="bookworm"),
}


@dataclass(frozen=True)
class TableWords:
    """The words of the table in one language."""

    yes: str
    no: str
    bundled: str
    """The version of a program that comes with another one, such as `in docker 26.1.5`."""
    names: Mapping[str, str]
    """The names of clients that differ from those in `CLIENTS`."""
    settings: Mapping[str, str]
    """The texts in `ClientToTry.settings` that differ from those in `CLIENTS`."""


LANGUAGES = {
    "en": TableWords("yes", "no", "in {}", {}, {}),
    "zh": TableWords(
        "是",
        "否",
        "{} 自带",
        {"oras in Python": "Python 版 oras"},
        {
            "the mirror by `entrepot client docker`": "镜像加速：`entrepot client docker`",  # noqa: RUF001
            "as docker": "同 docker",
            PODMAN_SETTINGS: "明文 HTTP：`--tls-verify=false`；镜像加速：`registries.conf`（`entrepot client podman`）",  # noqa: RUF001
            "as podman": "同 podman",
            CTR_SETTINGS: "`ctr` 的 `--plain-http`；镜像加速：`entrepot client containerd`",  # noqa: RUF001
            "`--plain-http` for plain HTTP": "明文 HTTP：`--plain-http`",  # noqa: RUF001
            "`insecure` for plain HTTP": "明文 HTTP：`insecure`",  # noqa: RUF001
            "none: it signs and verifies images here": "无；用它对这里的镜像签名和验证",  # noqa: RUF001
        },
    ),
}
"""The words of each language in which the page exists."""
_TABLE = re.compile(r"(?:\A|\n)(\|[^\n]*\n\|---[^\n]*\n)((?:\|[^\n]*\n)*)")
"""A Markdown table: its heading, and its rows."""


def debian_release() -> str:
    """Returns the code name of the Debian release on this machine."""
    return platform.freedesktop_os_release().get("VERSION_CODENAME", "")


def clients_of(release: str) -> list[str]:
    """Returns the clients that can be tried on a Debian release."""
    return [name for name, about in CLIENTS.items() if about.without != release]


@dataclass
class ClientResult:
    """The results of one client on one Debian release: `works` or `fails` for each of its steps."""

    client: str
    version: str
    steps: dict[str, str]


def save(results: Iterable[ClientResult], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [asdict(result) for result in sorted(results, key=lambda result: result.client.lower())]
    for row in rows:
        row["steps"] = dict(sorted(row["steps"].items()))
    file.write_text(json.dumps(rows, indent=2) + "\n")


def load(file: Path) -> list[ClientResult]:
    return [ClientResult(**row) for row in json.loads(file.read_text())]


def page_file(language: str) -> Path:
    """Returns the page about compatibility."""
    return ROOT / "docs" / language / "compatibility.md"


def with_results(page: str, language: str) -> str:
    """Returns the text of the page with the recorded results as the rows of its first table."""
    found = _TABLE.search(page)
    assert found, "the page has no table"
    return page[: found.start(2)] + _rows(LANGUAGES[language]) + page[found.end(2) :]


def _rows(words: TableWords) -> str:
    results = [(result, release) for release in RELEASES for result in load(RESULTS / f"{release}.json")]
    results.sort(key=lambda row: list(CLIENTS).index(row[0].client))
    return "".join(_row(result, release, words) for result, release in results)


def _row(result: ClientResult, release: str, words: TableWords) -> str:
    cell_texts = {"works": words.yes, "fails": words.no, None: ""}
    version, settings = result.version, CLIENTS[result.client].settings
    if version.startswith("in "):
        version = words.bundled.format(version.removeprefix("in "))
    cells = [words.names.get(result.client, result.client), version, f"Debian {RELEASES[release]}"]
    cells += [cell_texts[result.steps.get(step)] for step in STEPS]
    return f"| {' | '.join([*cells, words.settings.get(settings, settings)])} |\n"


if __name__ == "__main__":
    for each in LANGUAGES:
        page_file(each).write_text(with_results(page_file(each).read_text(), each))
