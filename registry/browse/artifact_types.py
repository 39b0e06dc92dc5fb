"""Determines the purpose of a referrer from its artifact type: whether it is a signature, an SBOM (a list of the
packages in an image) or an attestation. The *marks* of a manifest say whether it has a signature, an SBOM and an
attestation. This module verifies nothing.

A *referrer* is an artifact that refers to a manifest, such as an image. An *attestation* is a claim about an image,
such as how it was built; its *predicate type* names the kind of claim. A *Sigstore bundle* is a file that contains a
signature or a signed attestation. The manifest of a bundle can state the predicate type in an annotation
(`storage.tag_listing.BUNDLE_PREDICATE`)."""

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
"""The purpose of a referrer tag by its suffix. Older versions of cosign write such tags: the digest of the image, and
this suffix."""
_SBOM_PREDICATES: Final = ("https://spdx.dev/", "https://cyclonedx.org/")
"""Predicate types of attestations that contain an SBOM begin with one of these."""
SIGNATURE_PREDICATE: Final = "https://sigstore.dev/cosign/sign/"
"""The predicate type of the statement in a Sigstore bundle if the bundle is a signature by cosign."""


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
    bundle whose manifest does not state the type. The result is then `SIGNATURE`, because cosign has written such
    bundles only for signatures."""
    if not predicate or predicate.startswith(SIGNATURE_PREDICATE):
        return Purpose.SIGNATURE
    return Purpose.SBOM if predicate.startswith(_SBOM_PREDICATES) else Purpose.ATTESTATION


def marks_of(facts: ManifestFacts, predicates: Iterable[str], is_attested: bool) -> MarksView:
    """Returns the marks of a manifest: whether it is signed, has an SBOM and is attested.

    - `facts`: has the referrers and referrer tags of the manifest.
    - `predicates`: the known predicate types of the attestations that the manifest itself lists, as an index from
      BuildKit does.
    - `is_attested`: whether the manifest itself lists attestations."""
    types = (kind for kind in facts.referrer_types if not kind.startswith(BUNDLE_TYPE_PREFIX))
    purposes = {
        *map(purpose_of_type, types),
        *map(purpose_of_tag, facts.referrer_tags),  # `referrer_tags` has only the suffixes, such as `.sig`
        *map(purpose_of_predicate, (*facts.bundle_predicates, *predicates)),
    }
    return MarksView(
        signed=Purpose.SIGNATURE in purposes,
        sbom=Purpose.SBOM in purposes,
        attested=is_attested or Purpose.ATTESTATION in purposes,
    )
