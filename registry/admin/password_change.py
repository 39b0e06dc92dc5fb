"""`change_password`: changes the password of a person, for the management API and for the pages."""

from __future__ import annotations

import base64

from registry.admin.caller import Caller
from registry.auth.rights.management_rights import management_rights_of
from storage.access import AccountName
from storage.errors import Denied, Unauthorized


async def change_password(caller: Caller, name: AccountName, old: str, new: str | None) -> str | None:
    """Sets the password of the account `name` to `new`. If `new` is None, generates a password and returns it. The
    person's browser sessions end. Callers who set their own password have to give the old one. An admin may set the
    password of every other person.

    Raises AccountUnknown. Raises Denied if the caller may not set the password, or if the old password is wrong. Raises
    TooManyRequests after too many wrong passwords. Raises AccountInvalid if the new password is not acceptable. Raises
    Unauthorized in two cases:
    - The caller has no account.
    - After the authentication of this request, another request has changed the caller's own account, for example its
      password."""
    caller.rights.check_may_change_credentials(name)
    if name == caller.principal.name:
        await _check_old_password(caller, name, old)
    return await caller.administration.set_password(
        name, new, expected_version=caller.version_of(name), by=caller.actor
    )


async def _check_old_password(caller: Caller, account: AccountName, old: str) -> None:
    """Checks the old password by logging in with it, so that wrong guesses count as failed logins. Raises Denied if the
    password is wrong, and TooManyRequests after too many failed logins."""
    # A text in JSON may contain unpaired surrogates. No password contains them, so the login fails.
    credentials = base64.b64encode(f"{account}:{old}".encode("utf-8", "surrogatepass"))
    try:
        principal = await caller.authenticator.authenticate([(b"authorization", b"Basic " + credentials)], caller.actor)
    except Unauthorized:
        raise Denied("the old password is not right") from None
    # `authenticate` also accepts an API token in place of the password. A token is no proof of the password.
    if principal.name != account or not management_rights_of(principal).is_logged_in_as_person:
        raise Denied("the old password is not right")
