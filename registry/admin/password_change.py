"""`change_password`: changes the password of a person, for the management API and for the pages."""

from __future__ import annotations

import base64

from registry.admin.caller import Caller
from registry.auth.rights.management_rights import management_rights_of
from storage.access import AccountName
from storage.errors import Denied, Unauthorized


async def change_password(caller: Caller, name: AccountName, old: str, new: str | None) -> str | None:
    """Sets the password of the account `name` to `new`, and returns None. If `new` is None, generates a password and
    returns it. Ends the person's browser sessions. If callers change their own password, `old` must be their current
    password; otherwise `old` is ignored. An admin may set the password of any person.

    - Raises AccountUnknown.
    - Raises Denied if the caller may not set the password, or if `old` is wrong.
    - Raises TooManyRequests after too many wrong passwords.
    - Raises AccountInvalid if the new password is not acceptable.
    - Raises Unauthorized if the caller has no account.
    - Raises Unauthorized if the caller's own account was changed after this request was authenticated."""
    caller.rights.check_may_change_credentials(name)
    if name == caller.principal.name:
        await _check_old_password(caller, name, old)
    return await caller.administration.set_password(
        name, new, expected_version=caller.version_of(name), by=caller.actor
    )


async def _check_old_password(caller: Caller, account: AccountName, old: str) -> None:
    """Checks the old password by a login, so that a wrong password counts as a failed login. Raises Denied if the
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
