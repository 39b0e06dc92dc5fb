"""The translation of the settings of a CNCF Distribution registry (the image registry:2) into settings of this
registry. A key without a counterpart becomes a comment that states the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from registry.cli.server_preparation import OpenToEveryoneError, check_open_to_everyone
from registry.config import Settings
from registry.config.field_types import MAX_DURATION_SECONDS
from registry.config.settings_sources import load_settings
from registry.migration.config_translation import translate
from storage.imports import ImportInvalid

DEBIAN_SETTINGS = """
version: 0.1
log:
  fields:
    service: registry
storage:
  cache:
    blobdescriptor: inmemory
  filesystem:
    rootdirectory: /var/lib/docker-registry
  delete:
    enabled: true
http:
  addr: :5000
  headers:
    X-Content-Type-Options: [nosniff]
auth:
  htpasswd:
    realm: basic-realm
    path: /etc/docker/registry
health:
  storagedriver:
    enabled: true
    interval: 10s
    threshold: 3
"""

SURROGATES = ('auth: {htpasswd: {path: "\\ud800"}}', 'http: {tls: {key: "/x\\udfff/y"}}', '"\\ud800": debug')
"""Settings with half of a surrogate pair, which TOML does not allow."""

FULL_SETTINGS = """
version: 0.1
log: {level: warn, formatter: json, accesslog: {disabled: true}, hooks: [{type: mail, levels: [panic]}]}
storage:
  s3: {region: us-east-1, bucket: images, accesskey: AKIASECRET, secretkey: VERYSECRET}
  redirect: {disable: true}
  maintenance:
    uploadpurging: {enabled: true, age: 72h, interval: 24h, dryrun: false}
    readonly: {enabled: true}
http:
  addr: 127.0.0.1:443
  host: https://registry.example.com
  secret: HTTPSECRET
  draintimeout: 90s
  tls:
    certificate: /etc/tls/cert.pem
    key: /etc/tls/key.pem
    clientcas: [/etc/tls/ca.pem, /etc/tls/more.pem]
    clientauth: verify-client-cert-if-given
    minimumtls: tls1.3
  debug: {addr: ':5001', prometheus: {enabled: true}}
auth: {token: {realm: 'https://auth/token', service: registry, issuer: auth, rootcertbundle: /etc/certs/bundle}}
notifications: {endpoints: [{name: hook, url: 'https://hook', headers: {Authorization: [Bearer HOOKSECRET]}}]}
redis: {addr: 'redis:6379', password: REDISSECRET}
proxy: {remoteurl: 'https://registry-1.docker.io', username: ann, password: HUBSECRET, ttl: 168h}
validation: {manifests: {urls: {allow: ['^https://']}}}
nonsense: {key: 1}
"""


def load(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Writes a translated file, loads it, and returns the settings."""
    monkeypatch.delenv("ENTREPOT_CONFIG", raising=False)
    file = tmp_path / "entrepot.toml"
    file.write_text(text)
    return load_settings({}, file).settings


def check_open(settings: Settings) -> None:
    """Raises OpenToEveryoneError if a registry without accounts that listens on a loopback address does not start with
    these settings."""
    check_open_to_everyone(settings, bound_to_loopback=True, requires_login=False)


def comments(text: str) -> dict[str, str]:
    """Returns the comments at the end of a translated file, by key."""
    lines = text.partition("# Without a counterpart:\n")[2].splitlines()
    return {key: reason for key, _, reason in (line.removeprefix("# ").partition(": ") for line in lines)}


def test_the_settings_of_debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings that Debian ships are translated. Keys without a counterpart are listed as comments."""
    text = translate(DEBIAN_SETTINGS, {})
    settings = load(tmp_path, text, monkeypatch)
    assert (settings.listen, settings.delete, settings.insecure_open) == ("0.0.0.0:5000", True, False)
    assert settings.auth.htpasswd == Path("/etc/docker/registry")
    assert "entrepot import-registry /var/lib/docker-registry" in text
    assert "entrepot grant add '**' pull,push,delete authenticated" in text
    assert set(comments(text)) == {
        "log.fields.service",
        "storage.cache.blobdescriptor",
        "http.headers.X-Content-Type-Options.0",
        "auth.htpasswd.realm",
        "health.storagedriver.enabled",
        "health.storagedriver.interval",
        "health.storagedriver.threshold",
    }


def test_all_kinds_of_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of logs, storage, HTTP, TLS, logins, notifications and mirrors are translated, or a comment states what
    to do instead."""
    text = translate(FULL_SETTINGS, {})
    settings = load(tmp_path, text, monkeypatch)
    assert settings.log_level == "warning"
    assert (settings.delete, settings.read_only, settings.uploads.expire) == (False, True, 72 * 3600)
    assert (settings.listen, settings.public_url) == ("127.0.0.1:443", "https://registry.example.com")
    assert settings.shutdown_grace == 90
    tls = settings.tls
    assert (tls.certificate, tls.key) == (Path("/etc/tls/cert.pem"), Path("/etc/tls/key.pem"))
    assert (tls.client_ca, tls.client_auth) == (Path("/etc/tls/ca.pem"), "optional")
    [upstream] = settings.upstream
    assert (upstream.name, upstream.default, upstream.username) == ("docker.io", True, "ann")
    assert upstream.endpoints == ["https://registry-1.docker.io"]
    comment_texts = comments(text)
    assert "entrepot import http://OLD:5000" in comment_texts["storage.s3.bucket"]
    assert "[[issuer]]" in comment_texts["auth.token.realm"]
    assert "write a [[webhook]]" in comment_texts["notifications.endpoints.0.url"]
    assert comment_texts["nonsense.key"] == "not a known key of a CNCF Distribution registry"
    assert "append the other files" in comment_texts["http.tls.clientcas"]


def test_no_secret_is_written() -> None:
    """Passwords and other secrets in the old settings are not in the translated file."""
    assert "SECRET" in FULL_SETTINGS
    assert "SECRET" not in translate(FULL_SETTINGS, {})
    assert "SECRET" not in translate("http: {host: 'https://ann:SECRET@registry.example.com'}", {})


def test_variables_override_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Environment variables override the file, as in the old registry. Their values are YAML, and
    `REGISTRY_AUTH=htpasswd` chooses the kind of login."""
    variables = {
        "REGISTRY_HTTP_ADDR": "[::]:443",
        "REGISTRY_STORAGE_DELETE_ENABLED": "false",
        "REGISTRY_AUTH": "htpasswd",
        "REGISTRY_AUTH_HTPASSWD_PATH": "/auth/htpasswd",
        "REGISTRY_AUTH_HTPASSWD_REALM": "x",
        "REGISTRY_LOG_LEVEL": "debug",
        "REGISTRY_PORT_5000_TCP_ADDR": "10.0.0.1",  # set by Kubernetes, not by the operator
        "REGISTRY_SERVICE_HOST": "10.0.0.1",
        "PATH": "/bin",
    }
    text = translate(DEBIAN_SETTINGS, variables)
    settings = load(tmp_path, text, monkeypatch)
    assert (settings.listen, settings.delete, settings.log_level) == ("[::]:443", False, "debug")
    assert settings.auth.htpasswd == Path("/auth/htpasswd")
    assert "10.0.0.1" not in text

    settings = load(tmp_path, translate("", variables), monkeypatch)
    assert (settings.listen, settings.auth.htpasswd) == ("[::]:443", Path("/auth/htpasswd"))


def test_an_open_registry_stays_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the old registry has no logins, everybody may push to it. The translated settings have `insecure_open`, which
    allows the same. A registry that listens only on localhost does not need this setting."""
    text = translate("version: 0.1\nhttp: {addr: ':5000'}", {})
    assert load(tmp_path, text, monkeypatch).insecure_open
    text = translate("version: 0.1\nhttp: {addr: 'localhost:5000'}", {})
    assert not load(tmp_path, text, monkeypatch).insecure_open


@pytest.mark.parametrize("address", ["addr: '127.0.0.1:5000', ", ""])
def test_open_registry_behind_a_proxy_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    """The old registry has no logins, and a proxy on its machine passes requests on to it. The server does not start
    with the translated settings. A comment below `public_url` says what to do, and the line that it names helps."""
    text = translate(f"version: 0.1\nhttp: {{{address}host: 'https://registry.example.com'}}", {})
    with pytest.raises(OpenToEveryoneError):
        check_open(load(tmp_path, text, monkeypatch))
    lines = text.splitlines()
    start = lines.index('public_url = "https://registry.example.com"')
    assert "`entrepot user add NAME --admin`" in " ".join(lines[start + 1 : start + 4])
    check_open(load(tmp_path, text.replace("# insecure_open = true", "insecure_open = true"), monkeypatch))


@pytest.mark.parametrize(
    "text",
    [
        "http: {host: 'https://registry.example.com'}\nauth: {htpasswd: {realm: x, path: /auth}}",
        "http: {addr: ':5000', host: 'https://registry.example.com'}",
        "http: {host: 'http://localhost'}",
    ],
)
def test_comment_on_missing_accounts_is_only_written_if_needed(text: str) -> None:
    """A registry with logins, one that is open already, and one with a name that only its own machine can use can start
    with the translated settings. So they have no comment that says how to add an account."""
    assert "does not start" not in translate(text, {})


def test_upstream_other_than_docker_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upstream other than Docker Hub gets the name of its host."""
    text = translate("proxy: {remoteurl: 'http://mirror.corp:5000/'}", {})
    [upstream] = load(tmp_path, text, monkeypatch).upstream
    assert (upstream.name, upstream.endpoints) == ("mirror.corp", ["http://mirror.corp:5000"])


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("http: {addr: /run/registry.sock, net: unix}", "http.addr"),
        ("http: {host: 'https://x/path'}", "http.host"),
        ("http: {draintimeout: 5 parsecs}", "http.draintimeout"),
        ("storage: {maintenance: {uploadpurging: {age: 0s}}}", "storage.maintenance.uploadpurging.age"),
        ("http: {draintimeout: .inf}", "http.draintimeout"),
        ("http: {draintimeout: 99999999999h}", "http.draintimeout"),
        (f"http: {{draintimeout: {'9' * 99}}}", "http.draintimeout"),
        (
            f"storage: {{maintenance: {{uploadpurging: {{age: {MAX_DURATION_SECONDS + 1}}}}}}}",
            "storage.maintenance.uploadpurging.age",
        ),
        ("http: {tls: {clientauth: request-client-cert}}", "http.tls.clientauth"),
        ("log: {level: loud}", "log.level"),
        ("proxy: {remoteurl: nonsense}", "proxy.remoteurl"),
        ("proxy: {remoteurl: 'http://[x'}", "proxy.remoteurl"),
        ("http: {host: 'http://x:y'}", "http.host"),
        ('"a\\nread_only = true": 1', "a\\nread_only = true"),
        ("auth: {silly: {realm: x}}", "auth.silly.realm"),
        ("storage: {inmemory: }", "storage.inmemory"),
    ],
)
def test_values_without_a_counterpart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, key: str) -> None:
    """A value that this registry does not support becomes a comment, and the translated file can be loaded."""
    text = translate(line, {})
    assert key in comments(text)
    load(tmp_path, text, monkeypatch)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: [", "is not YAML"),
        ("- 1", "contains no settings of a registry"),
        ("", "nothing to translate"),
        ("[" * 900, "nested too deeply"),
        (f"http: {{draintimeout: {'9' * 5000}}}", "is not YAML: .*number with more than 100 characters"),
        (f"http: {{addr: 0x{'f' * 5000}}}", "is not YAML: .*number with more than 100 characters"),
        (f"? {'9' * 5000}\n: debug", "is not YAML: .*number with more than 100 characters"),
        (f"log: {{level: {':'.join(['59'] * 5000)}}}", "is not YAML: .*number with more than 100 characters"),
        *((text, "is not YAML: .*half of a surrogate pair") for text in SURROGATES),
        ("http: {addr: 2020-13-45}", "is not YAML: .*month must be in 1..12"),
        *((f"log: {{level: !!{value}}}", "is not YAML") for value in ("int ''", "int x", "float x", "bool x")),
        *((f"log: {{level: !!{value}}}", "is not YAML") for value in ("timestamp x", "binary é", "set [1]", "omap 1")),
        ("{a: " * 30 + "1" + "}" * 30, "nested too deeply"),
        ("a: &a [1,2,3,4,5,6,7,8,9]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\n"
         "d: &d [*c,*c,*c,*c,*c,*c,*c,*c]\ne: [*d,*d,*d,*d,*d,*d,*d,*d]", "more than 10000 keys"),
    ],
)  # fmt: skip
def test_malformed_files_are_refused(text: str, reason: str) -> None:
    """A file that cannot be translated is refused with an error of one line."""
    with pytest.raises(ImportInvalid, match=reason) as raised:
        translate(text, {})
    assert "\n" not in raised.value.message


@pytest.mark.parametrize(
    "value", ["9" * 5000, "0x" + "f" * 5000, "[" * 900, "2020-13-45", "!!int ''", "a: [", '"\\ud800"']
)
@pytest.mark.slow
def test_variables_that_are_not_yaml_are_text(value: str) -> None:
    """The value of an environment variable that cannot be read as YAML is a text."""
    assert "storage.maintenance.uploadpurging.age" in translate(
        "version: 0.1", {"REGISTRY_STORAGE_MAINTENANCE_UPLOADPURGING_AGE": value}
    )


@pytest.mark.parametrize("value", ["/etc/\udc80", "[a, /etc/\udc80"])
def test_variables_that_are_not_utf_8_are_refused(value: str) -> None:
    """An environment variable whose bytes are no UTF-8, for which Python puts halves of surrogate pairs, is refused."""
    with pytest.raises(ImportInvalid, match=r"REGISTRY_AUTH_HTPASSWD_PATH is not UTF-8$"):
        translate("", {"REGISTRY_AUTH_HTPASSWD_PATH": value})


def test_hostile_values_stay_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value with quotes and newlines cannot add settings to the translated file."""
    text = translate('storage: {filesystem: {rootdirectory: "x\\nread_only = true"}}\n'
                     'http: {tls: {certificate: "a\\"\\nkey = \\"b"}, addr: "h\\nx:5000"}', {})  # fmt: skip
    settings = load(tmp_path, text, monkeypatch)
    assert not settings.read_only
    assert settings.tls.certificate == Path('a"\nkey = "b')
    assert settings.tls.key is None
