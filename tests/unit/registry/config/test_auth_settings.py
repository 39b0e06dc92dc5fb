"""The settings of authentication in files and in environment variables: `[auth]`, `[[issuer]]` and `[oidc]`."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from registry.auth.assembly import check_auth_files
from registry.auth.external.openid_settings import ProviderInvalid
from registry.auth.password.htpasswd import HtpasswdError
from registry.config import OIDCSettings, Settings
from registry.config.auth_settings import has_external_logins, token_service_name
from registry.config.settings_sources import ConfigError, load_settings
from tests.fakes.commands import entrepot, error_line

TABLE = """
[auth]
token_ttl = "10m"
htpasswd = "people"

[[issuer]]
issuer = "https://ci.example.com"
audience = "registry"
jwks_url = "https://ci.example.com/keys"
account = "ci"
required = { owner = "team", ref = ["refs/heads/main", "refs/heads/x"] }
"""


def test_settings_in_a_file(tmp_path: Path) -> None:
    """The values in a file are used. `entrepot config --format toml` prints the same values."""
    file = tmp_path / "a.toml"
    file.write_text(TABLE)
    settings = load_settings({}, file).settings
    assert settings.auth.token_ttl == 600.0
    [issuer] = settings.issuer
    assert issuer.required == {"owner": ["team"], "ref": ["refs/heads/main", "refs/heads/x"]}
    assert issuer.algorithms == ["RS256", "ES256"]
    result = entrepot("config", "-c", "a.toml", "--format", "toml", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    printed = tomllib.loads(result.stdout)
    assert Settings(**printed).issuer == settings.issuer
    result = entrepot("config", "-c", "a.toml", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "issuer[1].required" in result.stdout


def test_issuers_in_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """In an environment variable, the issuers are written as JSON. The value null means that a setting is not set."""
    table = {"issuer": "x", "audience": "y", "jwks_file": "keys", "account": "ci", "jwks_url": None}
    monkeypatch.setenv("ENTREPOT_ISSUER", json.dumps([table]))
    monkeypatch.setenv("ENTREPOT_AUTH__SERVICE", "registry.example.com")
    settings = load_settings({}).settings
    assert settings.issuer[0].jwks_file == Path("keys")
    assert settings.auth.service == "registry.example.com"
    monkeypatch.setenv("ENTREPOT_ISSUER", "ci")
    with pytest.raises(ConfigError, match=r"ENTREPOT_ISSUER: not JSON; write it like \[\{\"issuer\""):
        load_settings({})


ISSUER = '[[issuer]]\nissuer = "https://ci"\naudience = "r"\naccount = "ci"\njwks_file = "k"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[auth]\ntoken_ttl = "30s"', "auth.token_ttl: "),
        ('[auth]\ntoken_ttl = "2h"', "auth.token_ttl: "),
        ('[auth]\nservice = "a\\"b"', "auth.service: "),
        ("[auth]\nhtpaswd = 'x'", "auth.htpaswd: unknown setting; did you mean auth.htpasswd?"),
        ('[issuer]\nissuer = "x"', "issuer: a table is not a list; write [[issuer]]"),
        (ISSUER + 'acount = "x"', "issuer[https://ci].acount: unknown setting; did you mean issuer.account?"),
        (ISSUER + 'algorithms = ["HS256"]', "'HS256' is not an accepted signature algorithm"),
        (ISSUER + 'jwks_url = "http://ci.example.com/k"', "must begin with https://"),
        (ISSUER + 'jwks_url = "https://u:hush@ci.example.com/k"', "must not contain a user name or password"),
        (ISSUER + 'jwks_url = "https://ci.example.com/k"', "needs jwks_url or jwks_file, and not both"),
        (ISSUER + 'account_claim = "sub"', "needs account or account_claim, and not both"),
        ('[oidc]\nissuer = "http://sso.example.com"', "oidc.issuer: 'http://sso.example.com' must begin with https://"),
        ('[oidc]\nissuer = "https://u:hush@sso.example.com"', "must not contain a user name or password"),
        ('[oidc]\nissuer = "https://sso.example.com?a=b"', "has a query"),
        ('[oidc]\nscopes = "profile"', "openid has to be among them"),
        (
            '[oidc]\nclient_secret_file = "a"\nclient_secret_env = "B"',
            "client_secret_file or client_secret_env, and not",
        ),
        ('[oidc]\nclient_secret = "hush"', "oidc.client_secret: unknown setting; did you mean oidc.client_secret_"),
        (ISSUER + "required = { owner = 7 }", "issuer[https://ci].required.owner: "),
    ],
)
def test_errors_name_the_setting(tmp_path: Path, text: str, message: str) -> None:
    """Each error is one line that names the setting. It does not repeat a value that may be a password."""
    file = tmp_path / "a.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_settings({}, file)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert "hush" not in str(error.value)


def test_the_service_name() -> None:
    """The service name in tokens is `auth.service`, or else the host of `public_url`, or else "entrepot"."""
    settings = Settings(public_url="https://registry.example.com:8443")
    assert token_service_name(settings.auth, settings.public_url) == "registry.example.com:8443"
    assert token_service_name(Settings().auth, None) == "entrepot"
    assert token_service_name(Settings(auth={"service": "mine"}).auth, settings.public_url) == "mine"  # type: ignore[arg-type]


def test_settings_with_external_logins(tmp_path: Path) -> None:
    """With an htpasswd file, an issuer or an OpenID provider, the registry has external logins, so anonymous clients
    have no rights without a grant."""
    file = tmp_path / "a.toml"
    file.write_text(TABLE)
    settings = load_settings({}, file).settings
    assert has_external_logins(settings.auth, [], None)
    assert has_external_logins(Settings().auth, settings.issuer, None)
    assert not has_external_logins(Settings().auth, [], None)
    assert has_external_logins(Settings().auth, [], "https://sso.example.com")


@pytest.mark.slow
def test_files_are_checked_before_the_start(tmp_path: Path) -> None:
    """The server does not start if the htpasswd file or the client secret's file does not exist, or if the settings of
    the OpenID provider are incomplete."""
    check_auth_files(Settings())
    htpasswd = tmp_path / "htpasswd"
    with pytest.raises(HtpasswdError):
        check_auth_files(Settings(auth={"htpasswd": htpasswd}))  # type: ignore[arg-type]
    provider = OIDCSettings(issuer="https://sso.example.com", client_id="x", client_secret_file=tmp_path / "none")
    with pytest.raises(ProviderInvalid):
        check_auth_files(Settings(oidc=provider))
    result = entrepot("serve", "--listen", "127.0.0.1:0", folder=tmp_path, ENTREPOT_OIDC__CLIENT_ID="x")
    assert "oidc.issuer is not set" in error_line(result, 1)
