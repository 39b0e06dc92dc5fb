"""The command `entrepot inspect`: prints a summary of one image or artifact in the data directory."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from registry.cli.interrupts import run_interruptible
from registry.cli.options import ConfigOption, DataOption, JsonOption, load_or_fail, one_line_errors
from registry.cli.output import print_json_value

if TYPE_CHECKING:
    from registry.config import Settings
    from storage.names import Digest, ImageReference
    from storage.store.stored_registry import StoredRegistry

HELP = "Show an image's digest, size, platforms, layers and tags."
EXAMPLES = """\b
Examples:
  entrepot inspect team/app
  entrepot inspect localhost:5000/team/app:1.2 --json
  entrepot inspect team/app@sha256:0a1b…

Without a tag, the command shows the tag `latest`. It reads the data directory, even while a server uses it."""


def inspect(
    reference: Annotated[str, typer.Argument(metavar="REF", help="NAME, NAME:TAG or NAME@DIGEST.")],
    config: ConfigOption = None,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Prints the summary of the image as text, or as JSON if `as_json` is true."""
    settings = load_or_fail(config, data=data).settings
    with one_line_errors():
        from registry.cli.data_owner import prepare_data_directory
        from registry.cli.image_summary import print_image_summary, summarize_image
        from storage.composition import open_registry

        image_reference = parse_image_reference(reference)
        prepare_data_directory(settings, create_if_missing=False)

        async def summarize() -> dict[str, object]:
            async with open_registry(settings.data) as registry:
                served_digest = await _served_digest(settings, registry, image_reference)
                return await summarize_image(registry, image_reference, served_digest)

        summary = run_interruptible(summarize())
    if as_json:
        print_json_value(summary, indent=2)
    else:
        print_image_summary(summary)


async def _served_digest(settings: Settings, registry: StoredRegistry, image: ImageReference) -> Digest | None:
    """Returns the digest that clients get for a tag of a mirrored repository, if it may differ from the stored digest.
    There are two cases:

    - The tag is *frozen*: clients always get the same digest.
    - The upstream (the mirrored registry) has a *cooldown* in the settings: clients get a new digest only after this
      delay.

    Returns None in all other cases, and while the cooldown allows no digest yet."""
    from storage.names import Tag

    repo, reference = image
    if not isinstance(reference, Tag):
        return None
    if (frozen := await registry.upstream_tags.find_frozen_tag(repo, reference)) is not None:
        return frozen.digest
    upstream = next((entry for entry in settings.upstream if repo.startswith(f"{entry.name}/")), None)
    if upstream is None or not upstream.cooldown:
        return None
    from registry.mirror.served_tags import ServedTags

    choice = await ServedTags(registry.upstream_tags, upstream, time.time).choose(repo, reference)
    # `candidates` lists the digests that may be served, the preferred one first.
    return choice.candidates[0] if choice is not None and choice.candidates else None


def parse_image_reference(text: str) -> ImageReference:
    """Parses an image reference, such as `http://localhost:5000/team/app:1.2`. Removes the scheme and the host. The
    text before the first slash is a host if it is `localhost` or has a port. A reference without a tag or digest means
    the tag `latest`. Raises NameInvalid, TagInvalid, DigestInvalid."""
    from storage.names import parse_reference

    text = text.strip().removeprefix("http://").removeprefix("https://")
    host, slash, text_without_host = text.partition("/")
    if slash and (":" in host or host == "localhost"):
        text = text_without_host
    return parse_reference(text)
