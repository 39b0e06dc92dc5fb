"""Signs and verifies tokens (JWT, RFC 7519), with the library joserfc.

`SignedTokens` signs and verifies the bearer tokens of this registry. For tokens that a trusted issuer or the OpenID
provider has signed, other modules use the functions `parse_token`, `verify_signature` and `check_claims`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from joserfc.errors import ClaimError, ExpiredTokenError, JoseError, MissingClaimError, UnsupportedAlgorithmError
from joserfc.jwk import Key, OctKey
from joserfc.jws import CompactSignature, JWSRegistry, extract_compact, serialize_compact, validate_compact
from joserfc.jwt import ClaimsOption, JWTClaimsRegistry

from registry.auth.token.signing_keys import SigningKeys
from registry.config.auth_settings import ASYMMETRIC_ALGORITHMS
from storage.accounts import Accounts

ALGORITHM: Final = "HS256"
"""The signature algorithm of this registry's tokens. A token that names another algorithm is refused (RFC 8725,
3.1)."""
LEEWAY_SECONDS: Final = 5.0
"""How many seconds the times `iat` and `nbf` of this registry's tokens may be in the future, for example because the
clock of this machine was set back."""
_MAX_PART_CHARACTERS: Final = 128 * 1024
"""joserfc's limit for each part of a token (header, payload and signature). The default of joserfc is too low for a
header with a certificate. Must be larger than each `max_characters`, the limit of `parse_token`."""


class TokenInvalid(Exception):
    """A token is refused. The message is the end of the sentence "the token …", such as "has expired"."""


class _AcceptedAlgorithms(JWSRegistry):
    """Tells joserfc what to accept in the header of a token: the algorithms that `get_alg` returns, and every parameter
    except unknown extensions. joserfc calls such an object a registry.

    Unlike joserfc's own class, this class does not warn about the algorithm name EdDSA. RFC 9864 has new names for it,
    but few issuers use them yet."""

    max_header_length = max_payload_length = max_signature_length = _MAX_PART_CHARACTERS

    def get_alg(self, name: str) -> Any:
        """Returns the algorithm of this name. Raises UnsupportedAlgorithmError if the algorithm is not accepted."""
        if name not in (ALGORITHM, *ASYMMETRIC_ALGORITHMS):
            raise UnsupportedAlgorithmError(name)
        return self.algorithms[name]


_ACCEPTED_ALGORITHMS: Final = _AcceptedAlgorithms(strict_check_header=False)


class SignedTokens:
    """Signs and verifies one kind of token of this registry.

    - `token_type`: the value of `typ` in the header, which is different for each kind of token.
    - `audience`: the value of the claim `aud`: the service that accepts the token.
    - `required`: the names of the claims that a token must have.
    - `max_characters`: a longer token is refused without verification.

    The claim `iss` (the issuer) is the random id of the registry's store. So a token of another store is refused, even
    if both stores have the same signing key.
    """

    def __init__(
        self,
        accounts: Accounts,
        keys: SigningKeys,
        *,
        token_type: str,
        audience: str,
        required: Sequence[str],
        max_characters: int,
    ) -> None:
        self._accounts = accounts
        self._keys = keys
        self._token_type = token_type
        self._audience = audience
        self._max_characters = max_characters
        # A claim may be empty: the subject of an anonymous token is empty.
        self._claims = {name: ClaimsOption(essential=True, allow_blank=True) for name in required}
        self._hmac_keys: dict[str, OctKey] = {}
        """The signing keys that this process has used, as objects of joserfc, by id. To create an object takes 0.1
        ms."""

    async def sign(self, claims: Mapping[str, Any]) -> str:
        """Returns a token with `claims`, and with the claims `iss` and `aud`. If the store has no signing key, creates
        a signing key. Raises StorageFull or StorageFailed if the key cannot be stored."""
        key = await self._keys.current()
        header = {"alg": ALGORITHM, "kid": key.id, "typ": self._token_type}
        payload = {"iss": self._accounts.instance_id(), "aud": self._audience, **claims}
        text = json.dumps(payload, separators=(",", ":"))
        return serialize_compact(header, text, self._hmac_key(key.id, key.secret), registry=_ACCEPTED_ALGORITHMS)

    def verify(self, text: str, now: float) -> tuple[dict[str, Any], str]:
        """Returns the claims of the token `text`, and the id of the signing key that signed it. Raises TokenInvalid if
        this registry did not sign the token, or if the token is not valid at the time `now`, in seconds since 1970."""
        token = parse_token(text, self._max_characters)
        key = self._keys.find(self._key_id(token))
        if key is None:
            raise TokenInvalid("names a signing key that does not exist or is not accepted any more")
        claims = verify_signature(token, self._hmac_key(key.id, key.secret), ALGORITHM)
        # joserfc would also accept an `aud` that is a list with the audience. This registry issues no such tokens.
        if claims.get("aud") != self._audience or claims.get("iss") != self._accounts.instance_id():
            raise TokenInvalid("belongs to another registry or service")
        check_claims(claims, self._claims, now, LEEWAY_SECONDS)
        if claims["exp"] <= now:  # the leeway is only for `iat` and `nbf`
            raise TokenInvalid("has expired")
        return claims, key.id

    def _key_id(self, token: CompactSignature) -> str:
        """Returns the id of the signing key that a token names. Raises TokenInvalid if the token is of another kind."""
        header = token.headers()
        key_id = header.get("kid")
        if header != {"alg": ALGORITHM, "typ": self._token_type, "kid": key_id} or not isinstance(key_id, str):
            raise TokenInvalid("is not one that this registry issued for this use")
        return key_id

    def _hmac_key(self, key_id: str, secret: bytes) -> OctKey:
        """Returns a signing key as an object of joserfc."""
        hmac_key = self._hmac_keys.get(key_id)
        if hmac_key is None:
            hmac_key = self._hmac_keys[key_id] = OctKey.import_key(secret)
        return hmac_key


def parse_token(text: str, max_characters: int) -> CompactSignature:
    """Returns the parts of the token `text`. Does not check the signature. Raises TokenInvalid if the text is longer
    than `max_characters`, or is not a JWT."""
    if len(text) > max_characters:
        raise TokenInvalid("is too long")
    try:
        token = extract_compact(text.encode("ascii"), registry=_ACCEPTED_ALGORITHMS)
    except (JoseError, ValueError, TypeError, RecursionError):
        raise TokenInvalid("is not a JWT") from None
    if not isinstance(token.headers(), dict):
        raise TokenInvalid("is not a JWT")
    return token


def unverified_claims(token: CompactSignature) -> dict[str, Any]:
    """Returns the claims of a token. Does not check the signature. Raises TokenInvalid if the claims are not a JSON
    object."""
    try:
        claims = json.loads(token.payload)
    except (ValueError, RecursionError):
        claims = None
    if not isinstance(claims, dict):
        raise TokenInvalid("has claims that are not a JSON object")
    return claims


def algorithm_and_key_id(token: CompactSignature, algorithms: Sequence[str]) -> tuple[str, str | None]:
    """Returns the signature algorithm and the key id that the header of a token names. The id is None if the header
    names no key. Raises TokenInvalid if the algorithm is not one of `algorithms`, if the key id is not a text, or if
    the header has the parameter `crit`. `crit` names extensions that a verifier must support (RFC 7515, 4.1.11); this
    registry supports no extension."""
    header = token.headers()
    algorithm, key_id = header.get("alg"), header.get("kid")
    if algorithm not in algorithms or "crit" in header or not isinstance(key_id, str | None):
        raise TokenInvalid("has a header that names an algorithm or an extension that is not accepted")
    return str(algorithm), key_id


def verify_signature(token: CompactSignature, key: Key, algorithm: str) -> dict[str, Any]:
    """Returns the claims of a token. Raises TokenInvalid if the token was not signed with `key` and `algorithm`, or if
    the claims are not a JSON object."""
    try:
        has_right_signature = token.headers().get("alg") == algorithm and validate_compact(
            token, key, registry=_ACCEPTED_ALGORITHMS
        )
    except (JoseError, ValueError, TypeError) as error:
        raise TokenInvalid(f"is not valid: {type(error).__name__}") from None
    if not has_right_signature:
        raise TokenInvalid("has a wrong signature")
    return unverified_claims(token)


def check_claims(claims: dict[str, Any], options: Mapping[str, ClaimsOption], now: float, leeway: float) -> None:
    """Checks the claims of a token, but not its signature. Raises TokenInvalid if a claim is wrong.

    - `options`: the claims that the token must have, and their required values.
    - `now`: seconds since 1970. At this time, the token must not have expired (`exp`), must have been issued (`iat`),
      and must be valid already (`nbf`). These three claims must be finite numbers. A token may lack them, unless
      `options` requires them.
    - `leeway`: how many seconds the issuer's clock may differ from the clock of this machine.
    """
    validator = JWTClaimsRegistry(leeway=leeway, now=now, **options)  # type: ignore[arg-type]  # takes floats too
    try:
        validator.validate(claims)
    except JoseError as error:
        raise TokenInvalid(claim_fault(error)) from None


def claim_fault(error: JoseError) -> str:
    """Returns what is wrong with a token's claims, as the end of the sentence "the token …". The returned text contains
    no values of claims."""
    if isinstance(error, ExpiredTokenError):
        return "has expired"
    if isinstance(error, MissingClaimError):
        return f"has no claim {error.claim}"
    if isinstance(error, ClaimError):
        return f"has a claim {error.claim} that is not right"
    return f"is not valid: {type(error).__name__}"
