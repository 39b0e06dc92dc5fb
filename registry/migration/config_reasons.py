"""Texts that say why a key in the settings of a CNCF Distribution registry has no counterpart in this registry, or what
to do instead. In the texts, "here" means: in this registry. After "set", the texts name settings of this registry, such
as `delete` and `read_only`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

UNKNOWN_KEY: Final = "not a known key of a CNCF Distribution registry"
"""The text for a key for which `reason_for` returns None."""

_OTHER_STORAGE: Final = (
    "content is stored in a local directory here; to copy it, start the old registry and run: "
    "entrepot import http://OLD:5000"
)
_DEBUG_PORT: Final = "there is no debug port here"
_LETS_ENCRYPT: Final = "certificates are not requested here; request them with a program such as certbot, and set [tls]"
_BUILT_IN: Final = "not needed: built in, without a setting"

_REASONS: Final[Mapping[str, str]] = {
    "log.accesslog": "each request is logged here, except at log_level error",
    "log.formatter": "set log_format: text or json",
    "log.fields": "no fields can be added to the log here",
    "log.hooks": "the log sends no mails here; watch its output instead",
    "log.reportcaller": "log lines here do not name the code that wrote them",
    "storage.cache": f"{_BUILT_IN}: descriptors are in the database",
    "storage.delete": "set delete",
    "storage.redirect": "blobs are always sent by this registry itself",
    "storage.tag": _BUILT_IN,
    "storage.maintenance.uploadpurging": "each garbage collection deletes expired uploads; set [gc] interval",
    "storage.maintenance": "set read_only, or [uploads] expire",
    "storage.filesystem": _BUILT_IN,
    "storage.inmemory": "content is always stored in a directory here; set data",
    "storage": _OTHER_STORAGE,
    "auth.htpasswd.realm": "the realm of Basic logins is fixed here",
    "auth.silly": "this kind of login checks nothing; create accounts with: entrepot user add",
    "auth.token": (
        "this registry issues tokens itself, at /token. To accept the tokens of another service as well, add a robot "
        "account for its clients, and an [[issuer]] with these settings: account (the robot account), issuer and "
        "audience (as in the tokens), and jwks_url or jwks_file"
    ),
    "auth": "this kind of login does not exist here; create accounts with: entrepot user add",
    "middleware": "there are no middlewares here; a content delivery network can stand in front of this registry",
    "reporting": "errors are only logged here",
    "http.net": "this registry listens on TCP only; set listen",
    "http.prefix": "the API is always at /v2/",
    "http.secret": "not needed: uploads are not signed with a shared secret",
    "http.relativeurls": "not needed: behind a proxy, Location headers are correct if trusted_proxies is set",
    "http.headers": "no headers can be added to responses here; add them in a proxy",
    "http.http2": "this registry speaks HTTP/1.1; a proxy in front can speak HTTP/2",
    "http.h2c": "this registry speaks HTTP/1.1; a proxy in front can speak HTTP/2",
    "http.debug": _DEBUG_PORT,
    "http.tls.letsencrypt": _LETS_ENCRYPT,
    "http.tls.minimumtls": "TLS 1.2 is always the oldest version here",
    "http.tls.ciphersuites": "the cipher suites are those of the system's OpenSSL",
    "http.tls": "set [tls]",
    "notifications": 'write a [[webhook]] with this url and format = "distribution"; a token goes into its token_file',
    "redis": "not needed: the workers share what they know through the database",
    "health": "GET /readyz checks the storage; there is nothing to set",
    "proxy.ttl": "cached images are not deleted by age",
    "proxy.exec": "no program is started for a login here; set username and password_file",
    "proxy": "set [[upstream]]",
    "compatibility.schema1": "schema 1 manifests are not accepted here",
    "compatibility": _BUILT_IN,
    "validation": "everything that a manifest refers to has to exist here, except foreign layers; there is no setting",
    "catalog": "pages of the catalog are bounded here; there is nothing to set",
    "policy": "there are no classes of repositories here; use grants",
    "experimental": "there is no such setting here",
}
"""Maps the path of a key in the old settings to the text for the key. For a key without an entry, the entry of its
nearest parent counts."""


def reason_for(path: str) -> str | None:
    """Returns the text for the key `path`, such as `http.tls.letsencrypt`, or for its nearest parent that has a text.
    Returns None if neither the key nor a parent has a text."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        if reason := _REASONS.get(".".join(parts[:length])):
            return reason
    return None
