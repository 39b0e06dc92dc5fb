"""Checks whether podman, buildah, skopeo and CRI-O on a machine pull through this registry. Reads `registries.conf`,
the files in `registries.conf.d`, and the certificates of authorities in `certs.d`.

Sources: containers-registries.conf(5), containers-registries.conf.d(5), containers-certs.d(5).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from registry.cli.diagnosis.client_files import ClientFiles, FileUnusable, TargetRegistry
from registry.cli.diagnosis.finding import Finding, ok, problem, warning
from registry.clients.client_setup import MirroredHost

CHECK = "podman"
_SYSTEM_FILE, _USER_FILE = "/etc/containers/registries.conf", "~/.config/containers/registries.conf"
"""The configuration for all users, and the configuration of one user. If the user's file exists, podman does not read
the file for all users."""
_V1_KEYS = ("search", "insecure", "block")
"""The tables below `registries` in a file of the old format, version 1."""
DROP_IN = "/etc/containers/registries.conf.d/50-entrepot.conf"
_WRITE_STEP = f"write this to {DROP_IN}; the next pull reads it (CRI-O: systemctl reload crio)"


@dataclass(frozen=True, slots=True)
class RegistryEntry:
    """A `[[registry]]` table.

    - `prefix`: the table is for images whose name is this text, or begins with this text and `/`, `:` or `@`. The
      prefix `*.example.com` is for images of all hosts whose names end with `.example.com`.
    - `values`: the settings in the table.
    - `file`: the path of the file that contains the table."""

    prefix: str
    values: dict[str, Any]
    file: str

    @property
    def location(self) -> str:
        """The host, possibly with a path, that replaces the prefix in image names."""
        return str(self.values.get("location") or self.prefix)

    def matches(self, name: str) -> bool:
        """Returns whether the entry is for images with this name."""
        if self.prefix.startswith("*."):
            return name.partition("/")[0].endswith(self.prefix[1:])
        return name == self.prefix or name.startswith((f"{self.prefix}/", f"{self.prefix}:", f"{self.prefix}@"))


def check_podman(files: ClientFiles, target: TargetRegistry) -> list[Finding]:
    """Returns findings: what is right or wrong in the configuration, and what the user should do about it. `files`: the
    files of the machine. `target`: describes this registry."""
    try:
        entries, old_file = _load_entries(files)
    except FileUnusable as error:
        return [error.finding]
    if old_file is not None:
        return [
            problem(
                CHECK,
                f"{old_file} has the old format (version 1), which knows no mirrors",
                "if another file has the new format, podman refuses both (mixing sysregistry v1/v2 is not supported)",
                f"replace [registries.search] in {old_file} by unqualified-search-registries = [...], and write this "
                f"to {DROP_IN}",
                file=DROP_IN,
                lines=target.content_for(DROP_IN),
            )
        ]
    findings: list[Finding] = []
    for host in target.hosts:
        findings += _check_host(entries, host, target)
    return [*findings, *_check_own_host(files, entries, target)]


def _load_entries(files: ClientFiles) -> tuple[list[RegistryEntry], str | None]:
    """Returns two values: the entries of all files, and the path of the first file in the old format (None if there is
    no such file). If several files have an entry with the same prefix, only the entry of the last file counts. Raises
    FileUnusable if a file cannot be read or parsed."""
    main = files.first_existing(_USER_FILE) or _SYSTEM_FILE
    names = [main]
    for folder in ("/etc/containers/registries.conf.d", "~/.config/containers/registries.conf.d"):
        names += files.matching_files(folder, "*.conf")
    entries: dict[str, RegistryEntry] = {}
    old_file = None
    for name in names:
        document = files.read_toml(name) or {}
        if isinstance(tables := document.get("registries"), dict) and any(tables.get(key) for key in _V1_KEYS):
            old_file = old_file or name
        for values in document.get("registry") or []:
            if isinstance(values, dict) and (prefix := str(values.get("prefix") or values.get("location") or "")):
                entries[prefix] = RegistryEntry(prefix, values, name)
    return list(entries.values()), old_file


def _entry_for(entries: list[RegistryEntry], name: str) -> RegistryEntry | None:
    """Returns the entry that podman uses for an image: of the entries that match its name, the one with the longest
    prefix. Returns None if no entry matches."""
    matching_entries = (entry for entry in entries if entry.matches(name))
    return max(matching_entries, key=lambda entry: len(entry.prefix), default=None)


def _check_host(entries: list[RegistryEntry], host: MirroredHost, target: TargetRegistry) -> list[Finding]:
    """Checks whether podman pulls the images of a host through the registry. Returns the findings.

    `host.prefix` is the host in the image names. The prefix of an entry (`RegistryEntry.prefix`) can be longer or
    shorter than this host."""
    lines = target.content_for(DROP_IN)
    entry = _entry_for(entries, f"{host.prefix}/some/app")
    if entry is None:
        what = f"no file of podman has a [[registry]] for {host.prefix}"
        return [problem(CHECK, what, f"podman pulls from {host.server}", _WRITE_STEP, file=DROP_IN, lines=lines)]
    if entry.values.get("blocked") is True:
        step = f"remove blocked = true from {entry.file}"
        return [problem(CHECK, f"{entry.file} blocks {entry.prefix}", "podman refuses these images", step)]
    findings = list(_check_mirrors(entry, host, target, lines))
    if not any(finding.level == "problem" for finding in findings):
        findings.insert(0, ok(CHECK, f"pulls of {host.prefix} come through {target.address.url} ({entry.file})"))
    for narrower_entry in entries:
        if narrower_entry.prefix.startswith(f"{host.prefix}/") and not any(
            _mirror_sources(narrower_entry, host, target)
        ):
            what = f"{narrower_entry.file} has a separate [[registry]] for {narrower_entry.prefix}, without this mirror"
            why = "the longest prefix counts, so these images are pulled without this registry"
            step = "give this [[registry]] the same mirror, or remove the [[registry]]"
            findings.append(warning(CHECK, what, why, step, file=narrower_entry.file))
    return findings


def _check_mirrors(entry: RegistryEntry, host: MirroredHost, target: TargetRegistry, lines: str) -> Iterator[Finding]:
    """Checks the *sources* of an entry: the tables that say from where podman pulls its images, in the order in which
    podman tries them. They are the mirrors of the entry, and last the entry itself. Yields the findings."""
    sources = [source for source in [*(entry.values.get("mirror") or []), entry.values] if isinstance(source, dict)]
    for source in sources:
        if "://" in str(source.get("location") or ""):
            what = f"{entry.file} has location = {source['location']!r}"
            why = "podman refuses a location with a scheme: URI schemes are not supported"
            yield problem(CHECK, what, why, _WRITE_STEP, file=DROP_IN, lines=lines)
            return
    mirror_source = next(_mirror_sources(entry, host, target), None)
    if mirror_source is None:
        yield _wrong_mirror_finding(entry, host, target, sources, lines)
        return
    if target.address.is_plain_http and mirror_source.get("insecure") is not True:
        what = f"the mirror {mirror_source.get('location')} in {entry.file} lacks insecure = true"
        why = f"the registry speaks plain HTTP; podman tries TLS, fails, and pulls from {host.server}"
        yield problem(CHECK, what, why, _WRITE_STEP, file=DROP_IN, lines=lines)
    if mirror_source is not sources[0]:
        what = f"{entry.file} names {sources[0].get('location')} before this registry"
        why = f"podman asks this registry only if {sources[0].get('location')} fails"
        yield warning(CHECK, what, why, "put this registry's mirror first")
    by_digest = entry.values.get("mirror-by-digest-only") is True and mirror_source is not entry.values
    if by_digest or mirror_source.get("pull-from-mirror") == "digest-only":
        what, why = f"{entry.file} uses the mirror only for pulls by digest", f"tags are pulled from {host.server}"
        step = "remove mirror-by-digest-only or pull-from-mirror"
        yield problem(CHECK, what, why, step, file=entry.file)


def _mirror_sources(entry: RegistryEntry, host: MirroredHost, target: TargetRegistry) -> Iterator[dict[str, Any]]:
    """Yields the sources of an entry (see `_check_mirrors`) that lead to this registry's mirror of the host. Such a
    source has one of these locations. HOST is the host of this registry, and /PATH is the prefix of the entry without
    `host.prefix` at its beginning.

    - `HOST/UPSTREAM/PATH`. UPSTREAM is the name of the upstream in the settings of this registry.
    - `HOST/PREFIX/PATH`. PREFIX is `host.prefix`.
    - `HOST`, if /PATH is empty and the upstream is the default upstream.

    Example: the entry is for `registry.corp/team`, `host.prefix` is `registry.corp`, and the upstream is named `corp`.
    The locations are `HOST/corp/team` and `HOST/registry.corp/team`."""
    path_below_host = entry.prefix.removeprefix(host.prefix)
    registry_locations = {
        f"{target.address.host}/{host.upstream}{path_below_host}",
        f"{target.address.host}/{host.prefix}{path_below_host}",
    }
    # If an image name has no host, this registry uses the default upstream.
    if target.default_upstream == host.upstream and not path_below_host:
        registry_locations.add(target.address.host)
    for source in [*(entry.values.get("mirror") or []), entry.values]:
        if isinstance(source, dict) and str(source.get("location") or "").rstrip("/") in registry_locations:
            yield source


def _wrong_mirror_finding(
    entry: RegistryEntry, host: MirroredHost, target: TargetRegistry, sources: list[dict[str, Any]], lines: str
) -> Finding:
    """Returns the finding for an entry without a source that leads to this registry's mirror of the host."""
    registry_source = next((source for source in sources if _location_host(source) == target.address.host), None)
    if registry_source is not None:
        what = f"the mirror {registry_source['location']} in {entry.file} has the wrong path"
        why = f"this registry has the images of {host.prefix} below {target.address.host}/{host.upstream}"
        return problem(CHECK, what, why, _WRITE_STEP, file=DROP_IN, lines=lines)
    # The last source is the entry itself. All sources before it are mirrors.
    mirrors = ", ".join(str(source.get("location")) for source in sources[:-1])
    what = f"{entry.file} has no mirror for {host.prefix}"
    if mirrors:
        what = f"{entry.file} has {mirrors} for {host.prefix}, but not this registry"
    return problem(CHECK, what, "podman pulls without this registry", _WRITE_STEP, file=DROP_IN, lines=lines)


def _check_own_host(files: ClientFiles, entries: list[RegistryEntry], target: TargetRegistry) -> list[Finding]:
    """Checks whether podman can pull and push images whose names begin with this registry's host. Returns the
    findings."""
    address = target.address
    if address.is_plain_http:
        entry = _entry_for(entries, f"{address.host}/app")
        if entry is not None and entry.values.get("insecure") is True:
            return [ok(CHECK, f"podman reaches {address.host} by plain HTTP")]
        what = f"podman expects TLS of {address.host}, which speaks plain HTTP"
        why = f"podman pull {address.host}/NAME says: server gave HTTP response to HTTPS client"
        lines = f'[[registry]]\nlocation = "{address.host}"\ninsecure = true\n'
        return [problem(CHECK, what, why, f"add this to {DROP_IN}", file=DROP_IN, lines=lines)]
    folders = [f"{base}/{address.host}" for base in ("/etc/containers/certs.d", "/etc/docker/certs.d")]
    folders.append(f"~/.config/containers/certs.d/{address.host}")
    try:
        is_trusted = not target.needs_ca or files.has_certificate(*folders)
    except FileUnusable as error:
        return [error.finding]
    if not is_trusted:
        what = f"podman does not trust the certificate of {address.host}"
        step = f"copy the certificate of its authority to {folders[0]}/ca.crt"
        detail = target.probe_result.detail if target.probe_result else ""
        return [problem(CHECK, what, detail, step, file=f"{folders[0]}/ca.crt")]
    findings = [ok(CHECK, f"podman reaches {address.host} by TLS")]
    if target.asks_for_login and not _has_login(files, address.host):
        what = f"this registry asks for a login, and podman has none for {address.host}"
        step = (
            f"run `podman login {address.host}`, or let everybody pull with "
            "`entrepot grant add 'docker.io/**' pull everyone`"
        )
        findings.append(warning(CHECK, what, "without a login, podman pulls from the upstreams", step))
    return findings


def _has_login(files: ClientFiles, host: str) -> bool:
    """Returns whether podman has a login for the host. Ignores a file that cannot be read or parsed."""
    for name in ("~/.config/containers/auth.json", "~/.docker/config.json", "/run/containers/0/auth.json"):
        try:
            logins = (files.read_json(name) or {}).get("auths")
        except FileUnusable:
            continue
        if isinstance(logins, dict) and any(key == host or key.startswith(f"{host}/") for key in logins):
            return True
    return False


def _location_host(source: dict[str, Any]) -> str:
    return str(source.get("location") or "").partition("/")[0]
