"""`LiveConfiguration`: the settings of a running server. Each reload reads the settings again, from the same sources as
the start of the server: flags, environment variables and the settings file."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from registry.cli.takeover import STOP_AND_START, metrics_address
from registry.config import Settings
from registry.config.setting_changes import EffectiveAt, changed_settings
from registry.config.settings_sources import ConfigError, load_settings
from registry.server.process.live_change import ChangeRefused, Proposal


class LiveConfiguration:
    """Implements `registry.server.process.live_change.ConfigurationSource`. `settings`: the settings that are in effect
    now."""

    def __init__(
        self,
        settings: Settings,
        flags: Mapping[str, Any],
        file: Path | None,
        addresses: Sequence[str],
        *,
        bound_to_loopback: bool,
    ) -> None:
        """`flags` and `file`: the arguments of `load_settings` at the start. `addresses`: the addresses of all sockets
        on which the server listens. `bound_to_loopback`: whether only this machine can connect to the server's
        port."""
        self.settings = settings
        self._flags = flags
        self._file = file
        self._addresses = addresses
        self._bound_to_loopback = bound_to_loopback
        self._proposed: tuple[Proposal, Settings] | None = None

    def propose(self) -> Proposal:
        """Reads the settings and checks them. Also checks the files that the settings name for logins, such as the
        htpasswd file. Returns the settings as a proposal, which takes effect when `accept` is called. Raises
        ChangeRefused in these cases:

        - The settings or a file for logins cannot be used.
        - A changed setting cannot take effect in a reload.
        - Other machines could use the server without a login, and the setting `insecure_open` does not allow this.
        - The store cannot be read."""
        try:
            settings = load_settings(self._flags, self._file).settings
        except ConfigError as error:
            raise ChangeRefused(str(error)) from None
        changes = list(self._changes(settings))
        # A "start" change takes effect when the server is stopped and started. A "restart" change also takes effect
        # at `entrepot restart`, which replaces the program of the running server.
        for effect, when in (
            ("start", f"if you {STOP_AND_START}"),
            ("restart", "at a restart: run `entrepot restart`"),
        ):
            if names := [name for name, effective_at in changes if effective_at == effect]:
                verb = "takes" if len(names) == 1 else "take"
                raise ChangeRefused(f"{', '.join(names)} {verb} effect only {when}")
        self._check_logins(settings)
        proposal = Proposal(pickle.dumps(settings), ", ".join(name for name, _ in changes))
        self._proposed = proposal, settings
        return proposal

    def accept(self, proposal: Proposal) -> None:
        """Makes the settings of the last proposal take effect, in this process and in workers that it forks later.
        Raises ValueError if `proposal` is not the last one."""
        from registry.backend import preload_optional_modules
        from registry.log_output import set_log_level

        if self._proposed is None or self._proposed[0] is not proposal:
            raise ValueError("only the last proposal can be accepted")
        settings = self._proposed[1]
        self._proposed = None
        preload_optional_modules(settings)
        set_log_level(settings.log_level)
        self.settings = settings

    def _changes(self, settings: Settings) -> Iterator[tuple[str, EffectiveAt]]:
        """Yields the name of each changed setting, and when its change takes effect.

        A changed address that overlaps with the address of an open socket takes effect only when the server is stopped
        and started: a restart opens the new socket while the old sockets are still open."""
        from registry.server.gate.listener import overlaps

        new_addresses = {"listen": settings.listen, "metrics.listen": metrics_address(settings)}
        for name, effect in changed_settings(self.settings, settings):
            address = new_addresses.get(name)
            is_overlapping = address is not None and any(overlaps(address, bound) for bound in self._addresses)
            yield name, "start" if is_overlapping else effect

    def _check_logins(self, settings: Settings) -> None:
        """Makes two checks that the start of the server also makes. Raises ChangeRefused if a check fails:

        - The files and settings for logins can be used.
        - Other machines cannot use the server without a login, unless the setting `insecure_open` allows this."""
        from registry.auth.assembly import check_auth_files
        from registry.auth.external.openid_settings import ProviderInvalid
        from registry.auth.password.htpasswd import HtpasswdError
        from registry.cli.server_preparation import OpenToEveryoneError, check_open_to_everyone, clients_must_log_in
        from storage.errors import RegistryError

        try:
            check_auth_files(settings)
            requires_login = clients_must_log_in(settings)
            check_open_to_everyone(settings, bound_to_loopback=self._bound_to_loopback, requires_login=requires_login)
        except (HtpasswdError, ProviderInvalid, OpenToEveryoneError) as error:
            raise ChangeRefused(str(error)) from None
        except RegistryError as error:  # the store cannot say whether it has accounts
            raise ChangeRefused(error.message) from None
