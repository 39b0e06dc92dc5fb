"""The commands `entrepot mirror freeze`, `unfreeze` and `frozen`: freeze or unfreeze tags of mirrored registries, and
list the frozen tags. A *frozen* tag stays at one digest, even if the tag moves at the mirrored registry."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from registry.cli.data_owner import operator_actor
from registry.cli.mirror.mirror_command import ReferencesArgument, load_mirror_settings, run_on_mirrors
from registry.cli.options import USAGE_ERROR, ConfigOption, DataOption, JsonOption, MirrorOption, fail, one_line_errors
from registry.cli.output import local_time, print_json, print_line, print_rows
from registry.cli.upkeep.upkeep_run import JsonLinesOption, print_done, print_json_line

if TYPE_CHECKING:
    from registry.router import Router
    from registry.upkeep.frozen_tags import TagReference
    from storage.store.stored_registry import StoredRegistry
    from storage.upstream_tags import FrozenTag

FREEZE_HELP = "Keep a tag at its present digest, or at a given digest, until the tag is unfrozen."
FREEZE_EXAMPLES = """\b
Examples:
  entrepot mirror freeze ubuntu:24.04 --mirror docker.io
  entrepot mirror freeze ghcr.io/org/app:1@sha256:4f53…b9 --config entrepot.toml

The registry does not ask the upstream for a frozen tag. It still fetches uncached manifests and blobs of the frozen
image from the upstream. A running server serves the frozen image at the next pull of the tag."""
UNFREEZE_HELP = "Let a frozen tag follow the upstream registry again."
UNFREEZE_EXAMPLES = "\b\nExamples:\n  entrepot mirror unfreeze ubuntu:24.04 --mirror docker.io"
FROZEN_HELP = "List the frozen tags."
FROZEN_EXAMPLES = "\b\nExamples:\n  entrepot mirror frozen --config entrepot.toml\n  entrepot mirror frozen --json"
_PAGE_SIZE = 1000
"""Largest number of tags that one read from the store returns."""


def freeze(
    references: ReferencesArgument,
    config: ConfigOption = None,
    data: DataOption = None,
    mirror: MirrorOption = None,
    as_json: JsonLinesOption = False,
) -> None:
    """Freezes each tag. Ends the command with exit code 1 if a tag could not be frozen, otherwise with 0."""

    async def freeze_one(router: Router, stored: StoredRegistry, reference: TagReference) -> tuple[FrozenTag, str]:
        from registry.upkeep.frozen_tags import freeze_tag

        frozen, is_new = await freeze_tag(router, stored.upstream_tags, reference, by=operator_actor())
        if is_new:
            return frozen, f"frozen at {frozen.digest}"
        return frozen, f"frozen already at {frozen.digest}, since {local_time(frozen.at)} by {frozen.actor}"

    _run_for_each("frozen", references, freeze_one, config, data, mirror, as_json=as_json, create_data_directory=True)


def unfreeze(
    references: ReferencesArgument,
    config: ConfigOption = None,
    data: DataOption = None,
    mirror: MirrorOption = None,
    as_json: JsonLinesOption = False,
) -> None:
    """Unfreezes each tag. Ends the command with exit code 1 if a tag could not be unfrozen, otherwise with 0."""

    async def unfreeze_one(router: Router, stored: StoredRegistry, reference: TagReference) -> tuple[FrozenTag, str]:
        from registry.upkeep.frozen_tags import unfreeze_tag

        former = await unfreeze_tag(router, stored.upstream_tags, reference, by=operator_actor())
        return former, f"no longer frozen; it was at {former.digest} since {local_time(former.at)}"

    _run_for_each(
        "unfrozen", references, unfreeze_one, config, data, mirror, as_json=as_json, create_data_directory=False
    )


def list_frozen(
    config: ConfigOption = None, data: DataOption = None, mirror: MirrorOption = None, as_json: JsonOption = False
) -> None:
    """Prints all frozen tags, as a table or as JSON."""
    settings = load_mirror_settings(config, data, mirror)

    async def read(_: Router, stored: StoredRegistry) -> list[FrozenTag]:
        frozen_tags: list[FrozenTag] = []
        more = True
        while more:
            page = await stored.upstream_tags.frozen_tags(str(frozen_tags[-1]) if frozen_tags else None, _PAGE_SIZE)
            frozen_tags += page.items
            more = page.more
        return frozen_tags

    with one_line_errors():
        frozen_tags = run_on_mirrors(settings, read, create_data_directory=False)
    if as_json:
        from registry.admin.tag_models import FrozenTagResponse

        print_json([FrozenTagResponse.from_stored(frozen) for frozen in frozen_tags])
    else:
        rows = [(str(frozen), frozen.digest, local_time(frozen.at), frozen.actor) for frozen in frozen_tags]
        print_rows(("tag", "digest", "since", "frozen by"), rows, "no tag is frozen")


def _run_for_each(
    event: str,
    references: list[str],
    action: Callable[[Router, StoredRegistry, TagReference], Awaitable[tuple[FrozenTag, str]]],
    config: Path | None,
    data: str | None,
    mirror: list[str] | None,
    *,
    as_json: bool,
    create_data_directory: bool,
) -> None:
    """Runs `action` for each reference, and prints the text that `action` returns. With `as_json`, prints one line of
    JSON for each tag, and at the end a line with the numbers of tags and of errors. `event`: the value of the key
    `event` in the JSON, `frozen` or `unfrozen`. `create_data_directory`: whether to create the data directory if it
    does not exist.

    If a reference is not valid, does nothing and ends the command with exit code 2. If `action` raises an error, prints
    the error on stderr and continues with the next reference. Ends the command with exit code 1 if `action` has raised
    an error, otherwise with 0."""
    settings = load_mirror_settings(config, data, mirror)
    with one_line_errors():
        from registry.upkeep.frozen_tags import parse_tag_reference
        from storage.errors import RegistryError

        parsed: list[tuple[str, TagReference]] = []
        for text in references:
            try:
                parsed.append((text, parse_tag_reference(text)))
            except RegistryError as error:
                fail(error.message, USAGE_ERROR)

        async def work(router: Router, stored: StoredRegistry) -> int:
            failed = 0
            for text, reference in parsed:
                try:
                    frozen, message = await action(router, stored, reference)
                except RegistryError as error:
                    print_line(f"entrepot: {text}: {error.message}", err=True)
                    failed += 1
                else:
                    _print_result(event, f"{reference.repository}:{reference.tag}", frozen, message, as_json=as_json)
            if as_json:
                print_done({"tags": len(parsed) - failed, "failed": failed})
            return min(failed, 1)

        raise typer.Exit(run_on_mirrors(settings, work, create_data_directory=create_data_directory))


def _print_result(event: str, name: str, frozen: FrozenTag, message: str, *, as_json: bool) -> None:
    """Prints the result for one tag as a line."""
    if as_json:
        from registry.admin.tag_models import FrozenTagResponse

        fields = FrozenTagResponse.from_stored(frozen).model_dump(mode="json")
        print_json_line({"event": event, **fields, "message": message})
    else:
        print_line(f"{name}: {message}")
