"""Tests of the settings: which source has precedence, which origin `entrepot config` shows, and the errors."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ByteSize, TypeAdapter

from book.settings_page import render_settings_page
from registry.config import Settings, format_byte_size, format_duration, parse_duration
from registry.config.settings_sources import ConfigError, check_ports, load_settings, setting_fields, variable_name
from tests.fakes.commands import entrepot, error_line


def effective_settings(folder: Path, *args: str, **variables: str) -> dict[str, Any]:
    """Returns the settings that `entrepot config` shows, each with its value and its origin."""
    result = entrepot("config", "--format", "json", *args, folder=folder, **variables)
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_precedence(tmp_path: Path) -> None:
    """A flag has precedence over an environment variable, a variable over the file, and the file over the default. The
    output names the origin of each value."""
    file = tmp_path / "entrepot.toml"
    file.write_text('workers = 4\nlisten = "127.0.0.1:4"\ndata = "from-file"\n')
    settings = effective_settings(
        tmp_path, "--config", str(file), "--workers", "2",
        ENTREPOT_WORKERS="3", ENTREPOT_LISTEN="127.0.0.1:3",
    )  # fmt: skip
    assert settings["workers"] == {"value": 2, "origin": "--workers"}
    assert settings["listen"] == {"value": "127.0.0.1:3", "origin": "ENTREPOT_LISTEN"}
    assert settings["data"] == {"value": "from-file", "origin": str(file)}
    assert settings["delete"] == {"value": True, "origin": "default"}


def test_variable_and_file_set_one_table(tmp_path: Path) -> None:
    """An environment variable can set one setting of a table. The other settings of the table still come from the
    file."""
    (tmp_path / "a.toml").write_text('[gc]\ngrace = "1h"\ninterval = "5m"\n')
    settings = effective_settings(tmp_path, "--config", "a.toml", ENTREPOT_GC__GRACE="90m")
    assert settings["gc.grace"] == {"value": "1h30m", "origin": "ENTREPOT_GC__GRACE"}
    assert settings["gc.interval"] == {"value": "5m", "origin": "a.toml"}


def test_file_named_by_variable(tmp_path: Path) -> None:
    """The variable ENTREPOT_CONFIG names the file with the settings. The flag `-c` has precedence over it."""
    (tmp_path / "a.toml").write_text("workers = 5\n")
    (tmp_path / "b.toml").write_text("workers = 6\n")
    assert effective_settings(tmp_path, ENTREPOT_CONFIG="a.toml")["workers"] == {"value": 5, "origin": "a.toml"}
    assert effective_settings(tmp_path, "-c", "b.toml", ENTREPOT_CONFIG="a.toml")["workers"]["origin"] == "b.toml"


def test_no_file_is_read_unless_named(tmp_path: Path) -> None:
    """A file `entrepot.toml` in the current folder is not read unless a flag or a variable names it."""
    (tmp_path / "entrepot.toml").write_text("workers = 5\n")
    assert effective_settings(tmp_path)["workers"]["origin"] == "default"


def test_empty_variable_counts_as_not_set(tmp_path: Path) -> None:
    """An empty variable counts as not set, because compose files leave variables empty."""
    assert effective_settings(tmp_path, ENTREPOT_PUBLIC_URL="")["public_url"] == {"value": None, "origin": "default"}


def test_settings_read_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Settings(...)` uses only its arguments, and no environment variables."""
    monkeypatch.setenv("ENTREPOT_WORKERS", "63")
    assert Settings(workers=1).workers == 1
    assert Settings().workers != 63


# Files with a mistake, and the beginning of the error.
WRONG_FILES = [
    ("data = [", "a.toml: not TOML: "),
    ("lissen = 'x'", "a.toml: lissen: unknown setting; did you mean listen?"),
    ("[gc]\ngrase = '1h'", "a.toml: gc.grase: unknown setting; did you mean gc.grace?"),
    ("[gc]\ngrace = 'soon'", "a.toml: gc.grace: 'soon' is not a duration; write it like 90s, 5m, 1h30m or 7d"),
    ("[gc]\ngrace = -1", "a.toml: gc.grace: -1 should be greater than or equal to 0"),
    ("gc = 3", "a.toml: gc: 3 should be a table"),
    ("workers = 'two'", "a.toml: workers: 'two' should be a valid integer"),
    ("workers = 0", "a.toml: workers: 0 should be greater than or equal to 1"),
    ("data = ''", "a.toml: data: '' is not a directory's path"),
    ("log_level = 'loud'", "a.toml: log_level: 'loud' should be 'debug', 'info', 'warning' or 'error'"),
    ("[limits]\nmanifest = '1MiB'", "a.toml: limits.manifest: '1MiB' should be at least 4MiB"),
    ("public_url = 'https://x/y'", "a.toml: public_url: 'https://x/y' must end after the host and port"),
    ("public_url = 'ftp://x'", "a.toml: public_url: 'ftp://x' is not an address like https://registry.example.com"),
    ("trusted_proxies = ['proxy']", "a.toml: trusted_proxies[1]: 'proxy' is not a network like 10.0.0.0/8, nor an "),
    ("trusted_proxies = ['::1', '10.0.0.1/8']", "a.toml: trusted_proxies[2]: '10.0.0.1/8' has bits set after its pref"),
    ("trusted_proxies = ['0.0.0.0/0']", "a.toml: trusted_proxies[1]: '0.0.0.0/0' covers every address; list only "),
    ("[limits]\nburst = -1", "a.toml: limits.burst: -1 should be greater than or equal to 0"),
    ("[limits]\nrequests_per_second = 'many'", "a.toml: limits.requests_per_second: 'many' should be a valid number"),
    ("[tls]\nclient_auth = 'maybe'", "a.toml: tls.client_auth: 'maybe' should be 'off', 'optional' or 'required'"),
    ("a = 1\nb = 2\nc = 3", "a.toml: a: unknown setting (and 2 more)"),
]


HUB = "[[upstream]]\nname = 'docker.io'\n"
GHCR = "[[upstream]]\nname = 'ghcr.io'\n"
WRONG_UPSTREAMS = [
    (HUB + HUB, "a.toml: there are two upstreams named docker.io"),
    (HUB + "default = true\n" + GHCR + "default = true", "a.toml: docker.io and ghcr.io are both the default; "),
    (HUB + "hosts = ['a']\n" + GHCR + "hosts = ['A']", "a.toml: two upstreams have the host a"),
    (HUB + "tagttl = '5m'", "a.toml: upstream[docker.io].tagttl: unknown setting; did you mean upstream.tag_ttl?"),
    (HUB + "connections = 0", "a.toml: upstream[docker.io].connections: 0 should be greater than or equal to 1"),
    (HUB + "prefetch = 'all'", "a.toml: upstream[docker.io].prefetch: 'all' should be 'off', 'config' or 'layers'"),
    (HUB + "tag_ttls = { 'v*' = 'x' }", "a.toml: upstream[docker.io].tag_ttls.v*: 'x' is not a duration"),
    (HUB + "tag_ttls = { '' = '1h' }", "a.toml: upstream[docker.io].tag_ttls..[key]: '' is not a pattern of tags"),
    (HUB + "hosts = ['a b']", "a.toml: upstream[docker.io].hosts[1]: 'a b' is not a host's name like hub.example.com"),
    (HUB + "aliases = ['http://a']", "a.toml: upstream[docker.io].aliases[1]: 'http://a' is not a host's name like "),
    (
        HUB + "aliases = ['a:1']\n" + GHCR + "aliases = ['A:1']",
        "a.toml: two upstreams are called a:1, by name or alias",
    ),
    (HUB + "aliases = ['ghcr.io']\n" + GHCR, "a.toml: two upstreams are called ghcr.io, by name or alias"),
    (HUB + "aliases = ['a']\n" + GHCR + "hosts = ['a']", "a.toml: a is in aliases and in hosts; aliases lists "),
    (GHCR + "endpoints = ['ghcr.io']", "a.toml: upstream[ghcr.io].endpoints[1]: 'ghcr.io' is not an address like "),
    (GHCR + "endpoints = ['https://x/v2']", "a.toml: upstream[ghcr.io].endpoints[1]: 'https://x/v2' must end after "),
    (GHCR + "realms = ['x']", "a.toml: upstream[ghcr.io].realms[1]: 'x' is not an address like "),
    (HUB + "username = 'me'", "a.toml: upstream[docker.io]: username 'me' has no password; set password_file or "),
    (HUB + "password_file = 'p'", "a.toml: upstream[docker.io]: password_file is set without a username"),
    (
        HUB + "username = 'me'\npassword_file = 'p'\npassword_env = 'P'",
        "a.toml: upstream[docker.io]: password_file and password_env are both set; a login has only one source",
    ),
    (
        HUB + "username = 'me'\ndocker_config = 'c'",
        "a.toml: upstream[docker.io]: username and docker_config are both set; docker_config brings its own user",
    ),
    ("[[upstream]]\nendpoints = ['https://x']", "a.toml: upstream[1].name: is missing"),
    ("[[upstream]]\nname = 'GHCR'", "a.toml: upstream[GHCR].name: 'GHCR' is not a name like docker.io or ghcr.io"),
    ("[[upstream]]\nname = 'library'", "a.toml: upstream[library].name: 'library' cannot be an upstream's name"),
    ("mirror = ['index.docker.io']", "a.toml: mirror[1]: 'index.docker.io' is a host of Docker Hub; write 'docker.io'"),
    ("[upstream]\nname = 'docker.io'", "a.toml: upstream: a table is not a list; write [[upstream]]"),
    ("[hosted]\nprefixes = ['team/']", "a.toml: hosted.prefixes[1]: 'team/' is not a pattern of names, such as "),
    ("[hosted]\nprefixes = ['ghcr.io/**']\n" + GHCR, "a.toml: hosted.prefixes: 'ghcr.io/**' covers mirrored names"),
    (
        "mirror = ['docker.io']\n[hosted]\nprefixes = ['library/*']",
        "a.toml: hosted.prefixes: 'library/*' covers mirrored names",
    ),
]


@pytest.mark.parametrize(("text", "message"), WRONG_FILES + WRONG_UPSTREAMS)
def test_wrong_file_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str) -> None:
    """The error for a wrong file is one line with the file, the setting, and the values that are allowed."""
    monkeypatch.chdir(tmp_path)
    Path("a.toml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load_settings({}, Path("a.toml"))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("listen", "metrics"),
    [("10.0.0.5:5000", "127.0.0.1:5000"), ("127.0.0.1:5000", "[::1]:05000"), (":5000", ":5000")],
)
def test_metrics_on_the_port_of_the_registry(tmp_path: Path, listen: str, metrics: str) -> None:
    """The settings are refused if the metrics have the registry's port, also on another address. The server would
    answer requests to the registry with 404, and show the metrics there without a login."""
    (tmp_path / "a.toml").write_text(f"listen = '{listen}'\n[metrics]\nlisten = '{metrics}'\n")
    with pytest.raises(ConfigError, match=r"a\.toml: metrics\.listen: port 5000 is also the port of listen = "):
        check_ports(load_settings({}, tmp_path / "a.toml"))


@pytest.mark.parametrize(
    ("listen", "metrics"),
    [("127.0.0.1:0", "127.0.0.1:0"), (":5001", "127.0.0.1:5000"), ("nonsense", "nonsense")],
)
def test_listen_and_the_metrics_from_different_sources(tmp_path: Path, listen: str, metrics: str) -> None:
    """The ports of `listen` and `metrics.listen` are compared after all sources were read. Port 0 may be given twice.
    A value that is no address passes here: the server reports it when it starts."""
    (tmp_path / "a.toml").write_text(f"[metrics]\nlisten = '{metrics}'\n")
    check_ports(load_settings({"listen": listen}, tmp_path / "a.toml"))
    (tmp_path / "b.toml").write_text("[metrics]\nenabled = false\nlisten = '127.0.0.1:5000'\n")
    check_ports(load_settings({"listen": "127.0.0.1:5000"}, tmp_path / "b.toml"))


@pytest.mark.parametrize("listen", ["", "listen = '127.0.0.1:5000'\n"], ids=["default", "set"])
def test_commands_do_not_compare_the_ports_of_the_server(tmp_path: Path, listen: str) -> None:
    """The server may have been started with `--listen`, which `entrepot reload` does not have. The command accepts the
    metrics on the port that `listen` has without this flag, and looks for the server."""
    (tmp_path / "a.toml").write_text(f"{listen}[metrics]\nlisten = '127.0.0.1:5000'\n")
    result = entrepot("reload", "--config", "a.toml", "--data", "missing", folder=tmp_path)
    assert error_line(result, 1).startswith("no server uses the data directory")


def test_metrics_on_the_default_port_of_the_registry(tmp_path: Path) -> None:
    """If `listen` is not set, the registry's socket may be one that systemd has opened on another port. So the settings
    may give the default port to the metrics."""
    (tmp_path / "a.toml").write_text("[metrics]\nlisten = '127.0.0.1:5000'\n")
    settings = effective_settings(tmp_path, "--config", "a.toml")
    assert settings["listen"] == {"value": "127.0.0.1:5000", "origin": "default"}


def test_wrong_value_in_the_file_is_an_error_even_if_overridden(tmp_path: Path) -> None:
    """A wrong value in the file is an error even if a flag overrides it."""
    (tmp_path / "a.toml").write_text("workers = 0")
    result = entrepot("config", "--config", "a.toml", "--workers", "2", folder=tmp_path)
    assert error_line(result, 2).startswith("a.toml: workers: 0 ")


@pytest.mark.parametrize(
    ("args", "variables", "message"),
    [
        (["--workers", "two"], {}, "--workers: 'two' should be a valid integer"),
        (["--data", ""], {}, "--data: '' is not a directory's path"),
        (["--config", "missing.toml"], {}, "missing.toml: cannot read the settings: no such file or directory"),
        (["--config", "."], {}, ".: cannot read the settings: is a directory"),
        ([], {"ENTREPOT_GC__GRACE": "x"}, "ENTREPOT_GC__GRACE: 'x' is not a duration"),
        (
            ["--listen", ":5009"],
            {"ENTREPOT_METRICS__LISTEN": "127.0.0.1:5009"},
            "ENTREPOT_METRICS__LISTEN: port 5009 is also the port of listen = ':5009'; give the metrics a port of ",
        ),
        ([], {"ENTREPOT_GC": "{"}, "ENTREPOT_GC: not JSON; set ENTREPOT_GC__NAME instead"),
        (["--mirror", "docker.io/x"], {}, "--mirror: 'docker.io/x' is not a name like docker.io or ghcr.io"),
        ([], {"ENTREPOT_UPSTREAM": "["}, "ENTREPOT_UPSTREAM: not JSON; write it like [{"),
        ([], {"ENTREPOT_UPSTREAM": '[{"name": "a", "x": 1}]'}, "ENTREPOT_UPSTREAM: upstream[a].x: unknown setting"),
        (
            ["--mirror", "docker.io"],
            {"ENTREPOT_HOSTED__PREFIXES": "team/**,library/x"},
            "variables, flags together: hosted.prefixes: 'library/x' covers mirrored names",
        ),
    ],
)
@pytest.mark.parametrize("command", ["serve", "config"])
def test_wrong_source_in_one_line(
    tmp_path: Path, command: str, args: list[str], variables: dict[str, str], message: str
) -> None:
    """With a wrong flag, variable or file, the command fails with exit code 2 and one line that names this source."""
    assert error_line(entrepot(command, *args, folder=tmp_path, **variables), 2).startswith(message)


def test_unknown_variable_is_warned_about(tmp_path: Path) -> None:
    """For each misspelt variable, the command prints one warning with the most similar name, and continues."""
    result = entrepot("config", folder=tmp_path, ENTREPOT_GC__GRASE="1h", ENTREPOT_WORKER="3")
    assert result.returncode == 0
    assert result.stderr.splitlines() == [
        "entrepot: warning: ENTREPOT_GC__GRASE is no setting and is ignored; did you mean ENTREPOT_GC__GRACE?",
        "entrepot: warning: ENTREPOT_WORKER is no setting and is ignored; did you mean ENTREPOT_WORKERS?",
    ]


def test_no_warning_for_variables_of_kubernetes(tmp_path: Path) -> None:
    """The variables that Kubernetes sets for a service named `entrepot` cause no warning."""
    result = entrepot(
        "config", folder=tmp_path,
        ENTREPOT_PORT="tcp://10.0.0.1:5000", ENTREPOT_SERVICE_HOST="10.0.0.1", ENTREPOT_PORT_5000_TCP_ADDR="10.0.0.1",
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "")


def test_config_as_toml_can_be_used_as_a_file(tmp_path: Path) -> None:
    """The output of `config --format toml` is a valid settings file with the same values."""
    result = entrepot("config", "--format", "toml", "--data", 'a "b"', folder=tmp_path, ENTREPOT_GC__GRACE="90s")
    (tmp_path / "again.toml").write_text(result.stdout)
    reloaded = effective_settings(tmp_path, "--config", "again.toml")
    assert reloaded["data"] == {"value": 'a "b"', "origin": "again.toml"}
    assert reloaded["gc.grace"] == {"value": "1m30s", "origin": "again.toml"}


def test_config_table_has_every_setting(tmp_path: Path) -> None:
    """The table has a row for each setting, and no colour codes outside a terminal."""
    result = entrepot("config", folder=tmp_path)
    rows = [line.split() for line in result.stdout.splitlines()]
    assert {".".join(path) for path, _ in setting_fields()} <= {row[0] for row in rows if row}
    assert "\x1b" not in result.stdout


def test_every_setting_has_help_and_a_variable() -> None:
    """Each setting has a help text, and no two settings share a variable."""
    assert all(field.description for _, field in setting_fields())
    names = [variable_name(path) for path, _ in setting_fields()]
    assert len(set(names)) == len(names)


def test_example_on_the_settings_page_has_the_defaults(tmp_path: Path) -> None:
    """The example on the page docs/en/settings.md is a valid file that sets every setting to its default."""
    example = render_settings_page().partition("```toml\n")[2].partition("```")[0]
    file = tmp_path / "all.toml"
    file.write_text(example)
    assert tomllib.loads(example)
    assert load_settings({}, file).settings == Settings()


def test_upstream_with_a_name_only(tmp_path: Path) -> None:
    """The default endpoint of an upstream is the host in its name. The endpoint and the token service of Docker Hub are
    built in."""
    (tmp_path / "a.toml").write_text(HUB + GHCR + "endpoints = []")
    hub, ghcr = load_settings({}, tmp_path / "a.toml").settings.upstream
    assert (hub.endpoints, hub.realms) == (["https://registry-1.docker.io"], ["https://auth.docker.io/token"])
    assert (ghcr.endpoints, ghcr.realms) == (["https://ghcr.io"], [])


def test_endpoints_replace_the_built_in_ones(tmp_path: Path) -> None:
    """If `endpoints` is set for `docker.io`, it replaces the built-in endpoint and token service."""
    (tmp_path / "a.toml").write_text(HUB + "endpoints = ['http://127.0.0.1:5001/']")
    (hub,) = load_settings({}, tmp_path / "a.toml").settings.upstream
    assert (hub.endpoints, hub.realms) == (["http://127.0.0.1:5001"], [])


MIRRORS = [
    ("", ["docker.io"], {"docker.io": True}),
    ("", ["ghcr.io", "docker.io"], {"ghcr.io": True, "docker.io": False}),
    (HUB, [], {"docker.io": False}),
    (HUB, ["docker.io"], {"docker.io": True}),
    (GHCR + "default = true", ["docker.io"], {"ghcr.io": True, "docker.io": False}),
    ("mirror = ['quay.io']", ["docker.io"], {"docker.io": True}),
]
"""A file, the values of the flag `--mirror`, and the resulting upstreams: for each, whether it is the default."""


@pytest.mark.parametrize(("text", "flags", "upstreams"), MIRRORS)
def test_mirror(tmp_path: Path, text: str, flags: list[str], upstreams: dict[str, bool]) -> None:
    """`--mirror` adds upstreams that the file does not have. If the file has no default upstream, the first added one
    is the default."""
    (tmp_path / "a.toml").write_text(text)
    settings = load_settings({"mirror": flags} if flags else {}, tmp_path / "a.toml").settings
    assert {upstream.name: upstream.default for upstream in settings.upstream} == upstreams
    assert settings.default_upstream == next((name for name, default in upstreams.items() if default), None)


def test_mirror_flag_keeps_configured_upstreams(tmp_path: Path) -> None:
    """`--mirror` does not change an upstream that the file configures."""
    (tmp_path / "a.toml").write_text(HUB + "endpoints = ['https://hub.example.com']\ntag_ttl = '1h'")
    (hub,) = load_settings({"mirror": ["docker.io", "docker.io"]}, tmp_path / "a.toml").settings.upstream
    assert (hub.endpoints, hub.tag_ttl) == (["https://hub.example.com"], 3600)


def test_lists_as_variables(tmp_path: Path) -> None:
    """In an environment variable, the values of a list are separated by commas. The output shows the origin of each
    list."""
    settings = effective_settings(tmp_path, ENTREPOT_MIRROR="docker.io, ghcr.io", ENTREPOT_HOSTED__PREFIXES="team/**,*")
    assert settings["mirror"] == {"value": ["docker.io", "ghcr.io"], "origin": "ENTREPOT_MIRROR"}
    assert settings["hosted.prefixes"] == {"value": ["team/**", "*"], "origin": "ENTREPOT_HOSTED__PREFIXES"}
    assert [each["name"] for each in settings["upstream"]["value"]] == ["docker.io", "ghcr.io"]
    assert settings["upstream"]["origin"] == "ENTREPOT_MIRROR"


UPSTREAMS = """
[[upstream]]
name = "docker.io"
default = true
username = "me"
password_file = "secret"
tag_ttls = { "v*" = "1h", "*-nightly" = "90s" }
hosts = ["hub.example.com"]

[[upstream]]
name = "ghcr.io"
docker_config = "docker/config.json"
"""


def test_config_shows_upstreams_and_no_secret(tmp_path: Path) -> None:
    """The table has a row for each setting of each upstream. It shows the paths of files with passwords, but no
    passwords."""
    (tmp_path / "a.toml").write_text(UPSTREAMS)
    (tmp_path / "secret").write_text("hunter2")
    result = entrepot("config", "-c", "a.toml", folder=tmp_path, HUB_PASSWORD="hunter2")
    rows = {line.split()[0]: line.split()[1] for line in result.stdout.splitlines() if line.split()[1:]}
    assert rows["upstream[docker.io].password_file"] == "secret"
    assert rows["upstream[ghcr.io].endpoints"] == "https://ghcr.io"
    for form in ("table", "toml", "json"):
        assert "hunter2" not in entrepot("config", "-c", "a.toml", "-f", form, folder=tmp_path).stdout


def test_an_address_with_a_password_is_refused_without_showing_it(tmp_path: Path) -> None:
    """An address with a user name and a password is refused. The error does not contain the address."""
    (tmp_path / "a.toml").write_text(GHCR + "endpoints = ['https://me:hunter2@ghcr.io']")
    line = error_line(entrepot("config", "-c", "a.toml", folder=tmp_path), 2)
    assert line.startswith(
        "a.toml: upstream[ghcr.io].endpoints[1]: an address must not contain a user name or password"
    )
    assert "hunter2" not in line


def test_upstreams_as_toml_can_be_used_as_a_file(tmp_path: Path) -> None:
    """If the output of `config --format toml` is used as a file, it has the same upstreams."""
    (tmp_path / "a.toml").write_text(UPSTREAMS)
    result = entrepot("config", "-c", "a.toml", "-f", "toml", "--mirror", "quay.io", folder=tmp_path)
    (tmp_path / "b.toml").write_text(result.stdout)
    original = load_settings({"mirror": ["quay.io"]}, tmp_path / "a.toml").settings
    assert load_settings({}, tmp_path / "b.toml").settings.upstream == original.upstream
    assert [upstream.name for upstream in original.upstream] == ["docker.io", "ghcr.io", "quay.io"]


@given(st.integers(min_value=0, max_value=10**9))
def test_formatted_durations_can_be_parsed(seconds: int) -> None:
    """If a formatted duration is parsed, the result is the same number of seconds."""
    assert parse_duration(format_duration(float(seconds))) == seconds


@given(st.integers(min_value=0, max_value=1 << 62))
def test_formatted_sizes_can_be_parsed(count: int) -> None:
    """If a formatted size is parsed, the result is the same number of bytes."""
    assert TypeAdapter(ByteSize).validate_python(format_byte_size(count)) == count


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("5m", 300), ("1h30m", 5400), ("7d", 604800), ("1w", 604800), ("2.5", 2.5), ("250ms", 0.25)],
)
def test_forms_of_durations(text: str, seconds: float) -> None:
    """All forms of durations in the documentation are accepted."""
    assert parse_duration(text) == seconds


def test_trusted_proxies_in_one_variable(tmp_path: Path) -> None:
    """In the variable for `trusted_proxies`, addresses and networks are separated by commas, and each is normalized."""
    settings = effective_settings(tmp_path, ENTREPOT_TRUSTED_PROXIES="127.0.0.1, 10.0.0.0/8,2001:DB8::/32")
    assert settings["trusted_proxies"]["value"] == ["127.0.0.1/32", "10.0.0.0/8", "2001:db8::/32"]
