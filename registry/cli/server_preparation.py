"""The preparations of `entrepot serve` before it forks the workers: checks of the files and the settings, and the
options of the listener.

Clients must log in if the registry has or had accounts, or if the settings name another source of accounts, such as an
htpasswd file. Otherwise the registry is *open*: anyone who can connect can pull, push and delete.
"""

from __future__ import annotations

import logging
from ipaddress import ip_network
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from registry.cli.options import fail
from registry.client_addresses import is_loopback_host
from registry.config import Settings

if TYPE_CHECKING:
    from registry.config.settings import TLSSettings
    from registry.server.gate.certificates import CertificateFiles
    from registry.server.gate.listener import ListenerOptions

log = logging.getLogger("registry")


def prepare_server(settings: Settings, *, bound_to_loopback: bool, may_migrate: bool) -> tuple[ListenerOptions, bool]:
    """Prepares the start of the server: makes the process run as the user who owns the data directory, creates the data
    directory if it is missing, and checks the settings and files for TLS and for logins. Returns the listener's options
    and whether clients must log in. Ends the command with an error message if a check fails.

    Also checks whether this Python can save the state of an unfinished hash. An upload saves this state between its
    requests. If the state cannot be saved, logs a warning: each pushed blob is then hashed twice.

    - `bound_to_loopback`: see `check_open_to_everyone`.
    - `may_migrate`: whether data of an older version may be migrated. If False, data of another version is an error.
      Pass False while a running server uses the data."""
    from registry.auth.assembly import check_auth_files
    from registry.auth.external.openid_settings import ProviderInvalid
    from registry.auth.password.htpasswd import HtpasswdError
    from registry.backend import preload_optional_modules
    from registry.cli.data_owner import become_owner
    from registry.server.gate.certificates import CertificateError
    from storage.composition import check_version, prepare_data_dir
    from storage.running_digest import can_save_digests

    try:
        options = build_listener_options(settings)
        preload_optional_modules(settings)  # before the fork, so that the workers share the modules' memory
        become_owner(settings.data)
        check_auth_files(settings)
        (prepare_data_dir if may_migrate else check_version)(settings.data)
        requires_login = clients_must_log_in(settings)
        check_open_to_everyone(settings, bound_to_loopback=bound_to_loopback, requires_login=requires_login)
    except (CertificateError, HtpasswdError, ProviderInvalid, OpenToEveryoneError) as error:
        fail(str(error))
    if not can_save_digests():
        log.warning("each pushed blob is hashed twice: this Python finds no libcrypto.so.3; entrepot doctor says more")
    return options, requires_login


def clients_must_log_in(settings: Settings) -> bool:
    """Returns whether clients must log in. Call this after the data directory was prepared. Raises StorageFailed."""
    from registry.config.auth_settings import has_external_logins
    from storage.composition import has_had_account

    return has_external_logins(settings.auth, settings.issuer, settings.oidc.issuer) or has_had_account(settings.data)


def build_listener_options(settings: Settings) -> ListenerOptions:
    """Returns the options that the listener applies to a connection before it reads a request: TLS, trusted proxies and
    the limit of connections for each client address. Raises CertificateError if the TLS files or settings cannot be
    used.

    Call this function before `become_owner`, because the owner of the data directory may have no permission to read
    the TLS key."""
    from registry.server.gate.certificates import Certificates
    from registry.server.gate.listener import ListenerOptions
    from registry.server.gate.per_address_limit import PerAddressLimit
    from registry.server.gate.trusted_proxies import TrustedProxies

    max_connections = settings.limits.connections_per_address
    files = certificate_files(settings.tls)
    return ListenerOptions(
        certificates=None if files is None else Certificates(files),
        proxies=TrustedProxies(map(ip_network, settings.trusted_proxies)) if settings.trusted_proxies else None,
        per_address_limit=PerAddressLimit(max_connections, settings.workers) if max_connections else None,
    )


def certificate_files(tls: TLSSettings) -> CertificateFiles | None:
    """Returns the files that the settings `[tls]` name, and whether clients need a certificate; None: the server speaks
    plain HTTP. Does not read the files. Raises CertificateError if the settings contradict each other."""
    from registry.server.gate.certificates import CertificateError, CertificateFiles

    client_auth = tls.effective_client_auth
    if tls.certificate is None and (tls.key, tls.client_ca, tls.client_auth) != (None, None, None):
        raise CertificateError("[tls] has settings, but names no certificate; set tls.certificate")
    if client_auth != "off" and tls.client_ca is None:
        raise CertificateError(
            f"tls.client_auth is {client_auth}, but there is no authority for client certificates: set tls.client_ca "
            "to the file with the authority's certificate"
        )
    if tls.certificate is None:
        return None
    return CertificateFiles(tls.certificate, tls.key, tls.client_ca, client_auth)


class OpenToEveryoneError(Exception):
    """The registry would be open, and other machines could reach it. The text is one line, for the operator."""


def check_open_to_everyone(settings: Settings, *, bound_to_loopback: bool, requires_login: bool) -> None:
    """Raises OpenToEveryoneError if the registry requires no login and other machines can reach it, unless the setting
    `insecure_open` allows this.

    `bound_to_loopback`: whether the socket is bound to a loopback address. Other machines can reach such a socket only
    through a proxy on this machine. This function assumes that there is a proxy if `trusted_proxies` is set, or if the
    host in `public_url` is no loopback host."""
    if requires_login or settings.insecure_open:
        return
    if not bound_to_loopback:
        reason = "this address can be reached from other machines"
    elif settings.trusted_proxies:
        reason = "the proxies in trusted_proxies pass on requests of other machines"
    elif settings.public_url is not None and not is_loopback_host(urlsplit(settings.public_url).hostname or ""):
        reason = f"other machines reach this registry as {settings.public_url}, which public_url names"
    else:
        return
    raise OpenToEveryoneError(
        f"{reason}, and there are no accounts: add one with `entrepot user add NAME --admin`, or let anyone push and "
        "delete with --insecure-open"
    )
