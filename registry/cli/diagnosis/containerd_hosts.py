"""Checks the `hosts.toml` files of containerd. Such a file belongs to one *host*: the first part of image names, such
as `docker.io` (`MirroredHost.prefix`). The file lists the servers from which containerd pulls the images of the host.

For the host `registry.example.com:5000`, containerd looks for the directories `registry.example.com_5000_`,
`registry.example.com:5000` and `_default`, in this order, and uses the first that exists. From a directory without a
`hosts.toml`, containerd uses only the certificates.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from registry.cli.diagnosis.client_files import ClientFiles, FileUnusable, TargetRegistry
from registry.cli.diagnosis.finding import Finding, ok, problem, warning
from registry.clients.client_setup import MirroredHost

CHECK = "containerd"
_CA_FILE = "/etc/containerd/certs.d/ca.crt"
_CAPABILITIES = {"pull", "resolve"}
"""The capabilities that a mirror needs in `hosts.toml`."""


def check_host(files: ClientFiles, directories: list[str], host: MirroredHost, target: TargetRegistry) -> list[Finding]:
    """Checks whether containerd pulls the images of a host through this registry. Returns the findings: what is right
    or wrong, with the next step. `directories`: the directories that containerd's `config_path` names. `target`:
    describes this registry."""
    new_file = f"{directories[0]}/{host.prefix}/hosts.toml"
    content = target.content_for(f"/etc/containerd/certs.d/{host.prefix}/hosts.toml")
    step = f"write this to {new_file}; no restart is needed"
    folder = _folder_of_host(files, directories, host.prefix)
    if folder is None:
        return [
            problem(
                CHECK,
                f"no directory below {' or '.join(directories)} is for {host.prefix}, and there is no _default",
                f"containerd pulls straight from {host.server}",
                step,
                file=new_file,
                lines=content,
            )
        ]
    file = f"{folder}/hosts.toml"
    try:
        document = files.read_toml(file)
    except FileUnusable as error:
        return [error.finding]
    if document is None:
        what = f"there is no {file}"
        why = f"containerd uses the directory only for certificates, and pulls from {host.server}"
        return [problem(CHECK, what, why, f"write this to {file}; no restart is needed", file=file, lines=content)]
    entries = document.get("host")
    sections: dict[str, Any] = entries if isinstance(entries, dict) else {}
    url = next((url for url in sections if target.is_at(url)), None)
    if url is None:
        return [_missing_registry_finding(file, sections, document, host, target, content)]
    findings = list(_check_entry(file, url, sections[url], sections, target))
    if not any(finding.level != "ok" for finding in findings):
        findings.append(ok(CHECK, f"pulls of {host.prefix} come through {target.address.url} ({file})"))
    if folder.endswith("/_default") and str(document.get("server") or ""):
        findings.append(
            warning(
                CHECK,
                f"{file} sets server = {document['server']!r} for every host that has no directory of its own",
                f"if this registry does not answer, containerd requests images of {host.prefix} from that server",
                f"write a file for {host.prefix}, or remove the line with server",
                file=new_file,
                lines=content,
            )
        )
    return findings


def check_own_host(files: ClientFiles, directories: list[str], target: TargetRegistry) -> list[Finding]:
    """Checks whether images whose names begin with the registry's own host can be pulled and pushed. Returns the
    findings."""
    address = target.address
    # `docker_accepts_plain_http` means that the host is `localhost` or in 127.0.0.0/8, so the registry is on this
    # machine.
    if address.is_plain_http and address.docker_accepts_plain_http:
        return [ok(CHECK, f"containerd reaches {address.host} by plain HTTP, because it is on this machine")]
    folder = _folder_of_host(files, directories, address.host)
    try:
        document = files.read_toml(f"{folder}/hosts.toml") if folder else None
    except FileUnusable as error:
        return [error.finding]
    entries = (document or {}).get("host")
    sections: dict[str, Any] = entries if isinstance(entries, dict) else {}
    leads_here = any(target.is_at(url) for url in [*sections, str((document or {}).get("server") or "")])
    file = f"{directories[0]}/{address.host}/hosts.toml"
    capabilities = '  capabilities = ["pull", "resolve", "push"]\n'
    if address.is_plain_http and not leads_here:
        return [
            warning(
                CHECK,
                f"containerd expects TLS of {address.host}, which speaks plain HTTP",
                f"images named {address.host}/NAME cannot be pulled; mirrored images can",
                f"write this to {file}; no restart is needed",
                file=file,
                lines=f'server = "{address.url}"\n\n[host."{address.url}"]\n{capabilities}',
            )
        ]
    try:
        is_trusted = not target.needs_ca or _has_ca(files, folder, document, sections)
    except FileUnusable as error:
        return [error.finding]
    if not is_trusted:
        return [
            problem(
                CHECK,
                f"containerd does not trust the certificate of {address.host}",
                target.probe_result.detail if target.probe_result else "",
                f"copy the authority's certificate to {directories[0]}/{address.host}/ca.crt, and write this to "
                f"{file}; write the line with ca in the hosts.toml of each mirrored host as well",
                file=file,
                lines=f'server = "{address.url}"\n\n[host."{address.url}"]\n{capabilities}  ca = "ca.crt"\n',
            )
        ]
    return [ok(CHECK, f"containerd reaches {address.host}")]


def _has_ca(files: ClientFiles, folder: str | None, document: dict[str, Any] | None, sections: dict[str, Any]) -> bool:
    """Returns whether containerd has the certificate of an authority for a host. `folder`: the directory for the host;
    None if there is none. `document`: the content of the `hosts.toml` in the directory; None if there is none.
    `sections`: the tables `[host."URL"]` of the `hosts.toml`, by URL. Raises FileUnusable."""
    if any(isinstance(entry, dict) and entry.get("ca") for entry in sections.values()):
        return True
    # containerd also trusts a certificate in a directory without a hosts.toml.
    return folder is not None and document is None and files.has_certificate(folder)


def _folder_of_host(files: ClientFiles, directories: list[str], host: str) -> str | None:
    """Returns the directory that containerd uses for a host; None if there is none."""
    name, colon, port = host.rpartition(":")
    folder_names = [f"{name}_{port}_", host, "_default"] if colon else [host, "_default"]
    # containerd tries all names, also `_default`, in one directory before it searches the next directory.
    candidates = [f"{directory}/{folder_name}" for directory in directories for folder_name in folder_names]
    return next((path for path in candidates if files.is_directory(path)), None)


def _missing_registry_finding(
    file: str,
    sections: dict[str, Any],
    document: dict[str, Any],
    host: MirroredHost,
    target: TargetRegistry,
    content: str,
) -> Finding:
    """Returns the finding for a `hosts.toml` that does not name this registry. `document`: the parsed file. `sections`:
    the tables `[host."URL"]` of the file, by URL. `content`: what the file should contain."""
    step = f"write this to {file}; no restart is needed"
    if wrong_url := next((url for url in sections if target.differs_only_in_scheme(url)), None):
        what = f"{file} names {wrong_url}, but the registry is at {target.address.url}"
        why = f"containerd cannot connect to {wrong_url}, and pulls from {host.server}"
    else:
        servers = ", ".join(sections) or str(document.get("server") or host.server)
        what, why = f"{file} does not name this registry", f"containerd pulls images of {host.prefix} from {servers}"
    return problem(CHECK, what, why, step, file=file, lines=content)


def _check_entry(
    file: str, url: str, entry: Any, sections: dict[str, Any], target: TargetRegistry
) -> Iterator[Finding]:
    """Yields a finding for each problem of a section `[host."URL"]` that names this registry. `entry`: the content of
    the section. `sections`: all sections of the file, by URL."""
    settings: dict[str, Any] = entry if isinstance(entry, dict) else {}
    capabilities = settings.get("capabilities")
    if isinstance(capabilities, list) and not set(map(str, capabilities)) >= _CAPABILITIES:
        missing = ", ".join(sorted(_CAPABILITIES - set(map(str, capabilities))))
        what = f"{file} gives {url} only the capabilities {', '.join(map(str, capabilities)) or 'none'}"
        why = f"without {missing}, containerd asks another server for tags or for content"
        lines = f'[host."{url}"]\n  capabilities = ["pull", "resolve"]\n'
        yield problem(CHECK, what, why, "write this in the file; no restart is needed", file=file, lines=lines)
    if settings.get("override_path") is True and not urlsplit(url).path.rstrip("/").endswith("/v2"):
        what = f"{file} sets override_path for {url}, whose path does not end with /v2"
        why = "containerd then asks for /NAME/manifests/… in place of /v2/NAME/manifests/…, and gets 404"
        yield problem(CHECK, what, why, "remove the line with override_path; no restart is needed", file=file)
    if target.needs_ca and not settings.get("ca") and settings.get("skip_verify") is not True:
        what = f"{file} names no authority for {url}, whose certificate this machine does not trust"
        lines = f'[host."{url}"]\n  capabilities = ["pull", "resolve"]\n  ca = "{_CA_FILE}"\n'
        why = target.probe_result.detail if target.probe_result else ""
        step = f"copy the authority's certificate to {_CA_FILE}, and write this in the file; no restart is needed"
        yield problem(CHECK, what, why, step, file=file, lines=lines)
    first_url = next(iter(sections))
    if first_url != url:
        what = f"{file} names {first_url} before this registry"
        why = f"containerd asks this registry only if {first_url} fails"
        yield warning(CHECK, what, why, f'put the section [host."{url}"] first', file=file)
    if settings.get("skip_verify") is True and not target.address.is_plain_http:
        what, why = f"{file} sets skip_verify for {url}", "anybody between the machines can change the images"
        yield warning(CHECK, what, why, "remove the line, and name the authority with ca")
