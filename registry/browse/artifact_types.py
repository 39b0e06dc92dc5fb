"""Determines the purpose of a referrer from its artifact type: whether it is a signature, an SBOM (a list of the
packages in an image) or an attestation. A *referrer* is an artifact that refers to a manifest, such as the manifest of
an image. This module verifies no signatures.

An *attestation* is a claim about an image, such as how it was built; its *predicate type* names the kind of claim. A
*Sigstore bundle* is a file that contains a signature or a signed attestation. The manifest of a bundle can state the
predicate type in an annotation (`storage.tag_listing.PREDICATE_ANNOTATION`). The *marks* of a manifest say whether it
has a signature, an SBOM and an attestation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from registry.browse.models import MarksView
from storage.tag_listing import BUNDLE_TYPE_PREFIX, ManifestFacts


class Purpose(StrEnum):
    """What a referrer is for."""

    SIGNATURE = "signature"
    SBOM = "sbom"
    ATTESTATION = "attestation"
    OTHER = "other"


_BY_TYPE: Final[Mapping[str, Purpose]] = MappingProxyType(
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
"""The purpose of a referrer by its artifact type. All other types are `OTHER`, except those of Sigstore bundles."""
_BY_TAG: Final[Mapping[str, Purpose]] = MappingProxyType(
    {".sig": Purpose.SIGNATURE, ".sbom": Purpose.SBOM, ".att": Purpose.ATTESTATION}
)
"""The purpose of a referrer tag by its suffix. A *referrer tag* is the digest of an image and a suffix. Older versions
of cosign write these tags."""
_SBOM_PREDICATE_PREFIXES: Final = ("https://spdx.dev/", "https://cyclonedx.org/")
"""The predicate type of an attestation that contains an SBOM begins with one of these texts."""
_SIGNATURE_PREDICATE_PREFIX: Final = "https://sigstore.dev/cosign/sign/"
"""The predicate type of a Sigstore bundle that is a signature by cosign begins with this text."""


def purpose_of_type(artifact_type: str | None) -> Purpose:
    """Returns the purpose of a referrer of this artifact type. For a Sigstore bundle whose manifest states a predicate
    type, call `purpose_of_predicate` instead."""
    if artifact_type is None:
        return Purpose.OTHER
    if artifact_type.startswith(BUNDLE_TYPE_PREFIX):
        return Purpose.SIGNATURE
    return _BY_TYPE.get(artifact_type, Purpose.OTHER)


def purpose_of_tag(suffix: str) -> Purpose:
    """Returns the purpose of a referrer tag that has `suffix` after the digest."""
    return _BY_TAG.get(suffix, Purpose.OTHER)


def purpose_of_predicate(predicate: str) -> Purpose:
    """Returns the purpose of a referrer with this predicate type. If `predicate` is empty, the referrer is a Sigstore
    bundle whose manifest states no predicate type. The result is then `SIGNATURE`, because cosign has written bundles
    of this kind only for signatures."""
    if not predicate or predicate.startswith(_SIGNATURE_PREDICATE_PREFIX):
        return Purpose.SIGNATURE
    return Purpose.SBOM if predicate.startswith(_SBOM_PREDICATE_PREFIXES) else Purpose.ATTESTATION


def marks_of(facts: ManifestFacts, predicates: Iterable[str], is_attested: bool) -> MarksView:
    """Returns the marks of a manifest: whether it is signed, has an SBOM and is attested.

    - `facts`: has the referrers and referrer tags of the manifest.
    - `predicates`: the known predicate types of the attestations that the manifest itself lists, as an index from
      BuildKit does.
    - `is_attested`: whether the manifest itself lists attestations."""
    types = (name for name in facts.referrer_types if not name.startswith(BUNDLE_TYPE_PREFIX))
    purposes = {
        *map(purpose_of_type, types),
        *map(purpose_of_tag, facts.referrer_suffixes),
        *map(purpose_of_predicate, (*facts.bundle_predicates, *predicates)),
    }
    return MarksView(
        signed=Purpose.SIGNATURE in purposes,
        sbom=Purpose.SBOM in purposes,
        attested=is_attested or Purpose.ATTESTATION in purposes,
    )
