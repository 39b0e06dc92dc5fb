"""Runs nginx and Caddy with the configuration files in deploy/, in front of a registry on 127.0.0.1:5000.

Changes only the host name and the paths of the certificate in these files. The ports stay the same, so each proxy needs
an `own_network`, where the ports 80, 443 and 5000 are free.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.fakes.certificate_authority import KeyPair
from tests.fakes.clients.programs import ForeignProgram, environment, running_daemon
from tests.fakes.server_process import ROOT

HOST = "localhost"
"""The host name that replaces `registry.example.com` in the configuration files."""
NGINX_CONFIG = """\
user {user} {group};
pid {folder}/nginx.pid;
error_log {log};
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/entrepot.conf;
}}
"""
"""The main configuration of nginx. It has settings of Debian's nginx.conf, but with all files in a folder of the
test."""


@contextlib.contextmanager
def running_nginx(pair: KeyPair, folder: Path) -> Iterator[Path]:
    """Checks the configuration with `nginx -t`, and then runs nginx until the block ends. Yields the path of its error
    log, which has warnings and errors. Raises AssertionError if the check prints a warning."""
    log, config = folder / "nginx.log", folder / "nginx.conf"
    # Debian's nginx would otherwise change from root to www-data, who has no access to the folder.
    user, group = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(os.getegid()).gr_name
    config.write_text(NGINX_CONFIG.format(folder=folder, log=f"{log} warn", user=user, group=group))
    text = _read_with_replacement(ROOT / "deploy" / "nginx" / "entrepot.conf", "registry.example.com", HOST)
    text = text.replace("/etc/nginx/tls/fullchain.pem", str(pair.certificate))
    (folder / "entrepot.conf").write_text(text.replace("/etc/nginx/tls/privkey.pem", str(pair.key)))
    env = environment(folder / "home")
    command = ("nginx", "-e", str(log), "-p", str(folder), "-c", str(config))
    ForeignProgram(command, env)("-t")
    assert "[warn]" not in log.read_text(), log.read_text()
    with running_daemon([*command, "-g", "daemon off;"], env, log, partial(accepts_connections, 443)):
        yield log


@contextlib.contextmanager
def running_caddy(pair: KeyPair, folder: Path) -> Iterator[Path]:
    """Runs Caddy until the block ends. It uses the certificate `pair` instead of requesting one itself. Yields the path
    of its log."""
    log, config = folder / "caddy.log", folder / "Caddyfile"
    text = _read_with_replacement(ROOT / "deploy" / "caddy" / "Caddyfile", "registry.example.com", HOST)
    before, commented, after = text.partition("# For a certificate of your own: tls ")
    assert commented
    # Puts the directive in place of the comment, whose line ends at the next line feed (chr(10)).
    config.write_text(f"{before}tls {pair.certificate} {pair.key}\n{after.partition(chr(10))[2]}")
    env = environment(folder / "home")
    command = ["caddy", "run", "--config", str(config), "--adapter", "caddyfile"]
    with running_daemon(command, env, log, partial(accepts_connections, 443)):
        yield log


def accepts_connections(port: int) -> bool:
    """Returns whether a program listens on the port of the loopback address."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
        return True
    return False


def _read_with_replacement(file: Path, old: str, new: str) -> str:
    text = file.read_text()
    assert old in text
    return text.replace(old, new)
