"""The settings of what stands between the network and the requests: `[tls]` and the proxies that are trusted."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_settings import NoDecode

from registry.config.upstream import Group, listed


def _network(value: str) -> str:
    try:
        network = ip_network(value, strict=False)
    except ValueError:
        raise ValueError(f"{value!r} is not a network like 10.0.0.0/8, nor an address") from None
    if ip_address(value.partition("/")[0]) != network.network_address:
        raise ValueError(f"{value!r} has more bits than its network; {network} is meant, or an address without /")
    if network.prefixlen == 0:
        raise ValueError(f"{value!r} is every address: then everybody could say who they are")
    return str(network)


Networks = Annotated[list[Annotated[str, AfterValidator(_network)]], NoDecode, BeforeValidator(listed)]


class TLS(Group):
    """TLS on the port that is listened on. Renewed files are read again without a restart."""

    certificate: Path | None = Field(
        default=None, description="The server's certificate and those up to its authority, PEM; with it TLS is on"
    )
    key: Path | None = Field(
        default=None, description="The certificate's key, PEM without a password; without it: in the same file"
    )
    client_ca: Path | None = Field(
        default=None, description="Authorities whose certificates clients may or must show, PEM"
    )
    client_auth: Literal["off", "optional", "required"] | None = Field(
        default=None, description="Whether clients show one; with `client_ca` and without this: `required`"
    )
