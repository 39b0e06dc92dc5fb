"""Determines whether a referrer is a signature, an SBOM (a list of the packages in an image) or an attestation (a claim
about an image, such as how it was built). Verifies no signatures.

- A *referrer* is an artifact whose manifest names another manifest, such as that of an image, as its `subject`.
- A *referrer tag* has the digest of an image and a suffix, such as `.sig`, as its name. Older versions of cosign write
  these tags.
- The *predicate type* of an attestation names the kind of claim.
- A *Sigstore bundle* is a file that contains a signature or a signed attestation. The manifest of a bundle can state
  the predicate type in an annotation (`storage.tag_listing.BUNDLE_PREDICATE_ANNOTATION`).
- The *marks* of a manifest say whether the manifest has a signature, an SBOM and an attestation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from registry.browse.models import MarksView
from storage.tag_listing import BUNDLE_TYPE_PREFIX, ManifestFacts


class Purpose(StrEnum):
    """The purpose of a referrer."""

    SIGNATURE = "signature"
    SBOM = "sbom"
    ATTESTATION = "attestation"
    OTHER = "other"


_PURPOSE_BY_TYPE: Final[Mapping[str, Purpose]] = MappingProxyType(
    {
        "application/vnd.dev.cosign.artifact.sig.v1+json": Purpose.SIGNATURE,
        "application/vnd.cncf.notary.signature": Purpose.SIGNATURE,
        "application/vnd.dev.cosign.artifact.sbom.v1+json": Purpose.SBOM,
        "application/spdx+json": Purpose.SBOM,
        "application/vnd.cyclonedx+json": Purpose.SBOM,
        "application/vnd.cyclonedx+xml": Purpose.SBOM,
        "application/vnd.cyclonedx": Purpose.SBOM,
        "application/vnd.syft+json": Purpose.SBOM,
        "text/spdx": Purpose.SBOM,
        "text/spdx+json": Purpose.SBOM,
        "text/spdx+xml": Purpose.SBOM,
        "application/vnd.in-toto+json": Purpose.ATTESTATION,
        "application/vnd.in-toto.provenance+dsse": Purpose.ATTESTATION,
        "application/vnd.dsse.envelope.v1+json": Purpose.ATTESTATION,
        "application/vnd.dev.cosign.artifact.att.v1+json": Purpose.ATTESTATION,
    }
)
"""The purposes of referrers by their artifact types. The types of Sigstore bundles are not in this table."""
_PURPOSE_BY_TAG_SUFFIX: Final[Mapping[str, Purpose]] = MappingProxyType(
    {".sig": Purpose.SIGNATURE, ".sbom": Purpose.SBOM, ".att": Purpose.ATTESTATION}
)
"""The purposes of referrer tags by their suffixes."""
_SBOM_PREDICATE_PREFIXES: Final = ("https://spdx.dev/", "https://cyclonedx.org/")
"""The predicate type of an attestation that contains an SBOM begins with one of these texts."""
_SIGNATURE_PREDICATE_PREFIX: Final = "https://sigstore.dev/cosign/sign/"
"""The predicate type of a Sigstore bundle that is a signature by cosign begins with this text."""


def purpose_of_type(artifact_type: str | None) -> Purpose:
    """Returns the purpose of a referrer with this artifact type. Returns `OTHER` if the type is None or unknown, and
    `SIGNATURE` for the type of a Sigstore bundle. If the manifest of the bundle states a predicate type, call
    `purpose_of_predicate` instead."""
    if artifact_type is None:
        return Purpose.OTHER
    if artifact_type.startswith(BUNDLE_TYPE_PREFIX):
        return Purpose.SIGNATURE
    return _PURPOSE_BY_TYPE.get(artifact_type, Purpose.OTHER)


def purpose_of_tag(suffix: str) -> Purpose:
    """Returns the purpose of a referrer tag with this suffix."""
    return _PURPOSE_BY_TAG_SUFFIX.get(suffix, Purpose.OTHER)


def purpose_of_predicate(predicate: str) -> Purpose:
    """Returns the purpose of a referrer with this predicate type. `predicate` is empty for a Sigstore bundle whose
    manifest states no predicate type. cosign has written such bundles only for signatures, so the purpose is then
    `SIGNATURE`."""
    if not predicate or predicate.startswith(_SIGNATURE_PREDICATE_PREFIX):
        return Purpose.SIGNATURE
    return Purpose.SBOM if predicate.startswith(_SBOM_PREDICATE_PREFIXES) else Purpose.ATTESTATION


def marks_of(facts: ManifestFacts, predicates: Iterable[str], lists_attestations: bool) -> MarksView:
    """Returns the marks of a manifest. An index can list attestations itself, as the indexes of BuildKit do.

    - `facts`: facts about the manifest, with its referrers and referrer tags.
    - `predicates`: the known predicate types of the attestations that the manifest lists.
    - `lists_attestations`: whether the manifest lists attestations. Their predicate types may be unknown."""
    types = (name for name in facts.referrer_types if not name.startswith(BUNDLE_TYPE_PREFIX))
    purposes = {
        *map(purpose_of_type, types),
        *map(purpose_of_tag, facts.referrer_suffixes),
        *map(purpose_of_predicate, (*facts.bundle_predicates, *predicates)),
    }
    return MarksView(
        signed=Purpose.SIGNATURE in purposes,
        sbom=Purpose.SBOM in purposes,
        attested=lists_attestations or Purpose.ATTESTATION in purposes,
    )
