"""The checks of the server's certificate in `entrepot doctor`: its key, its chain, its names and its age."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from registry.cli.diagnosis.finding import Finding, ok, problem, warning
from registry.cli.server_preparation import certificate_files
from registry.clients.registry_address import listens_everywhere
from registry.config import Settings
from registry.server.gate.certificates import CertificateError, make_context
from registry.small_files import read_small_file

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

CHECK: Final = "certificate"
EXPIRY_WARNING_FRACTION: Final = 1 / 10
"""`entrepot doctor` warns that the server's certificate expires soon if both conditions hold: less than this fraction
of the certificate's lifetime is left, and fewer than `EXPIRY_WARNING_DAYS` days are left."""
EXPIRY_WARNING_DAYS: Final = 21.0
_RENEW_STEP: Final = (
    "renew it, and find out why it was not renewed automatically; the server reads new files without a restart"
)


def certificate_findings(settings: Settings, url: str, now: float) -> list[Finding]:
    """Returns the findings about the server's certificate. Reads the files of the certificate and the key. Call this
    function before `become_owner`, which switches the process from root to the server's user: this user may have no
    permission to read the key. `url`: the address at which clients reach the registry. `now`: the time in seconds since
    1970."""
    try:
        files = certificate_files(settings.tls)
        if files is None:
            is_behind_proxy = urlsplit(url).scheme == "https"
            what = f"the server has no certificate of its own: a proxy answers for {url}"
            return [ok(CHECK, what)] if is_behind_proxy else []
        make_context(files, now)
    except CertificateError as error:
        expired = "expired" in error.message
        why = "the server does not start with it" + (", and clients refuse it" if expired else "")
        step = _RENEW_STEP if expired else "correct the settings and files of [tls]"
        return [problem(CHECK, error.message, why, step)]
    chain = _read_chain(files.certificate)
    is_host_guessed = not settings.public_url and listens_everywhere(settings)
    findings = [*_check_age(chain, now), *_check_names(chain[0], url, is_host_guessed), *_check_chain(chain)]
    if findings:
        return findings
    until = chain[0].not_valid_after_utc
    return [ok(CHECK, f"the certificate in {files.certificate} is valid until {until:%Y-%m-%d}")]


def _read_chain(file: Path) -> Sequence[Certificate]:
    from cryptography import x509

    return x509.load_pem_x509_certificates(read_small_file(file))


def _check_age(chain: Sequence[Certificate], now: float) -> Iterator[Finding]:
    """Yields a finding for each certificate in the chain that has expired or is not valid yet. Yields a warning if the
    server's own certificate, the first one, expires soon."""
    now_utc = datetime.fromtimestamp(now, UTC)
    for number, certificate in enumerate(chain):
        begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        name = "the certificate" if number == 0 else f"the certificate of the authority {_subject_name(certificate)}"
        if now_utc < begins:
            what = f"{name} is not valid before {begins:%Y-%m-%d %H:%M} UTC"
            yield problem(CHECK, what, "clients refuse it until then", "look at the clock of this machine, or wait")
        elif now_utc > ends:
            yield problem(CHECK, f"{name} expired on {ends:%Y-%m-%d %H:%M} UTC", "clients refuse it", _RENEW_STEP)
        else:
            days_left = (ends - now_utc).total_seconds() / 86400
            lifetime_days = (ends - begins).total_seconds() / 86400
            if number == 0 and days_left < min(EXPIRY_WARNING_DAYS, lifetime_days * EXPIRY_WARNING_FRACTION):
                what = f"{name} expires in {days_left:.0f} days, on {ends:%Y-%m-%d %H:%M} UTC"
                yield warning(CHECK, what, "clients refuse it from then on", _RENEW_STEP)


def _check_names(certificate: Certificate, url: str, is_host_guessed: bool) -> Iterator[Finding]:
    """Yields a finding if the certificate is not valid for the host in `url`, the registry's address.
    `is_host_guessed`: whether the host is a guess, because the settings do not name the host that clients use."""
    from cryptography import x509

    host = urlsplit(url).hostname or ""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        why = "clients do not look at the common name any more"
        step = f"make a certificate with subjectAltName = {_wanted_name(certificate, host, is_host_guessed)}"
        yield problem(CHECK, "the certificate names no host (subjectAltName)", why, step)
        return
    dns_names = names.get_values_for_type(x509.DNSName)
    addresses = names.get_values_for_type(x509.IPAddress)
    if not _is_valid_for(host, dns_names, [str(address) for address in addresses]):
        names_text = ", ".join([*dns_names, *map(str, addresses)])
        if is_host_guessed:
            what = f"the certificate is for {names_text}, and the settings do not say which name clients use"
            step = f"set public_url to the address that clients use; its host must be one of: {names_text}"
            yield warning(CHECK, what, "clients refuse the certificate if it does not contain the name they use", step)
            return
        what = f"the certificate is for {names_text}, and not for {host}"
        step = f"make a certificate that names {host}, or set public_url to an address with a name from the certificate"
        yield problem(CHECK, what, f"clients that connect to {host} refuse it", step)


def _wanted_name(certificate: Certificate, host: str, is_host_guessed: bool) -> str:
    """Returns the subjectAltName that the certificate should have, in the notation of openssl, such as
    `DNS:registry.example.com` or `IP:192.0.2.1`. If `is_host_guessed` is False, this is the name `host`. If
    `is_host_guessed` is True, this is the common name of `certificate`, or the name of this machine if `certificate`
    has no usable common name."""
    from cryptography.x509.oid import NameOID

    if is_host_guessed:
        names = [str(name.value) for name in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
        host = next((name for name in names if name and " " not in name), socket.gethostname())
    try:
        return f"IP:{ipaddress.ip_address(host)}"
    except ValueError:
        return f"DNS:{host}"


def _is_valid_for(host: str, dns_names: Sequence[str], addresses: Sequence[str]) -> bool:
    """Returns whether a certificate with these DNS names and IP addresses is valid for the host."""
    try:
        return str(ipaddress.ip_address(host)) in addresses
    except ValueError:  # the host is a name
        pass
    parent_domain = host.partition(".")[2]
    return any(
        name.lower() == host or (name.startswith("*.") and name[2:].lower() == parent_domain) for name in dns_names
    )


def _check_chain(chain: Sequence[Certificate]) -> Iterator[Finding]:
    """Yields a finding in these cases:

    - A certificate in the file is not signed by the next one.
    - The file has only the server's certificate, the certificate is not self-signed, and this machine does not trust
      the authority that signed it."""
    for certificate, issuer in pairwise(chain):
        try:
            certificate.verify_directly_issued_by(issuer)
        except Exception:  # the class of the error depends on the kind of the key
            what = f"in the file, {_subject_name(issuer)} follows {_subject_name(certificate)}, but did not sign it"
            step = "put the certificates in order: the server's, then the one that signed it, and so on"
            yield problem(CHECK, what, "many clients cannot verify the certificate", step)
            return
    if len(chain) == 1 and chain[0].issuer != chain[0].subject and not _has_trusted_issuer(chain[0]):
        authority = chain[0].issuer.rfc4514_string()
        what = f"the file has only the server's certificate, and this machine does not trust the authority {authority}"
        why = "clients that do not know this authority cannot verify the certificate"
        step = (
            "append the certificates of the intermediate authorities (fullchain.pem), or make clients trust the "
            "authority that signed this certificate"
        )
        yield warning(CHECK, what, why, step)


def _has_trusted_issuer(certificate: Certificate) -> bool:
    """Returns whether this machine trusts an authority that has the name of the certificate's issuer. Does not verify
    the signature."""
    import ssl

    issuer_values = sorted(str(attribute.value) for attribute in certificate.issuer)
    for authority in ssl.create_default_context().get_ca_certs():
        subject: Any = authority["subject"]  # a tuple of tuples of pairs, such as ("commonName", "Example CA")
        if sorted(value for pairs in subject for _, value in pairs) == issuer_values:
            return True
    return False


def _subject_name(certificate: Certificate) -> str:
    return certificate.subject.rfc4514_string() or "a certificate without a name"
