"""What artifact types mean to people: whether a referrer is a signature, an SBOM (a list of what an image contains) or
an attestation. Nothing is verified here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from registry.browse.models import MarksView


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
_BUNDLE_PREFIX: Final = "application/vnd.dev.sigstore.bundle"
"""Sigstore's bundles, which cosign 3 writes for signatures and attestations alike."""
_BY_TAG: Final[Mapping[str, Purpose]] = MappingProxyType(
    {".sig": Purpose.SIGNATURE, ".sbom": Purpose.SBOM, ".att": Purpose.ATTESTATION}
)
"""Purposes by the suffix that older versions of cosign write after the digest in a tag."""
_SBOM_PREDICATES: Final = ("https://spdx.dev/", "https://cyclonedx.org/")
SIGNATURE_PREDICATE: Final = "https://sigstore.dev/cosign/sign/"
"""The type of the statement in a Sigstore bundle that is a signature of cosign."""


def purpose_of_type(artifact_type: str | None) -> Purpose:
    """Returns what a referrer of this artifact type is for."""
    if artifact_type is None:
        return Purpose.OTHER
    if artifact_type.startswith(_BUNDLE_PREFIX):
        return Purpose.SIGNATURE
    return _BY_TYPE.get(artifact_type, Purpose.OTHER)


def purpose_of_tag(suffix: str) -> Purpose:
    """Returns what a referrer tag is for that ends with `suffix` after the digest."""
    return _BY_TAG.get(suffix, Purpose.OTHER)


def purpose_of_predicate(predicate: str) -> Purpose:
    """Returns what an attestation is for whose statement has this predicate type."""
    if predicate.startswith(SIGNATURE_PREDICATE):
        return Purpose.SIGNATURE
    return Purpose.SBOM if predicate.startswith(_SBOM_PREDICATES) else Purpose.ATTESTATION


def marks(types: Iterable[str], tag_suffixes: Iterable[str], predicates: Iterable[str], is_attested: bool) -> MarksView:
    """Returns the marks of an image with these referrers. `predicates`: those of BuildKit's attestations in the index;
    `is_attested`: whether it has any."""
    purposes = {
        *map(purpose_of_type, types),
        *map(purpose_of_tag, tag_suffixes),
        *map(purpose_of_predicate, predicates),
    }
    return MarksView(
        signed=Purpose.SIGNATURE in purposes,
        sbom=Purpose.SBOM in purposes,
        attested=is_attested or Purpose.ATTESTATION in purposes,
    )
