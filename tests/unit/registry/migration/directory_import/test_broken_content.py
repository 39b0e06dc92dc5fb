"""Content of the old directory that is broken, or that the old registry would not serve, is reported and not
imported."""

from __future__ import annotations

import pytest

from storage.errors import BlobUnknown
from storage.names import Digest, RepositoryName
from storage.store.stored_registry import StoredRegistry
from tests.fakes.import_run import ImportRun, assert_complete
from tests.fakes.old_directory import OldDirectory
from tests.fakes.upstream_content import ImageTree, UpstreamBlob, index_of, manifest_of, noise_image
from tests.unit.registry.migration.directory_import.conftest import APP

SCHEMA_1 = b'{"schemaVersion": 1, "name": "team/app", "tag": "old", "fsLayers": [], "history": [], "signatures": []}'


async def test_broken_content_is_reported(
    store: StoredRegistry, old_registry: OldDirectory, run_import: ImportRun
) -> None:
    """Each broken tag, manifest or blob is reported with a reason. All other content is imported, and no imported image
    is incomplete. After the old registry was repaired, a second import adds what was broken."""
    sound_image = old_registry.push(APP, noise_image("sound", 10), "sound")
    incomplete_image = old_registry.push(APP, noise_image("missing", 10), "missing")
    old_registry.data(incomplete_image.layers[0].digest).unlink()
    corrupt_config = old_registry.push(APP, noise_image("rotten", 10), "rotten")
    old_registry.data(corrupt_config.config.digest).write_bytes(b"{}")
    missing_manifest = old_registry.push(APP, noise_image("no manifest", 10), "no-manifest")
    old_registry.data(missing_manifest.digest).unlink()
    corrupt_manifest = old_registry.push(APP, noise_image("bad manifest", 10), "bad-manifest")
    old_registry.data(corrupt_manifest.digest).write_bytes(corrupt_manifest.body[:-1])
    deleted_manifest = old_registry.push(APP, noise_image("deleted", 10), "dangling")
    old_registry.revision(APP, deleted_manifest.digest).unlink()
    incomplete_index = index_of((noise_image("half", 10), "amd64"), (incomplete_image, "arm64"))
    old_registry.push(APP, incomplete_index, "half")
    old_registry.data(incomplete_image.layers[0].digest).unlink()
    old_registry.write_link(old_registry.tag(APP, "nonsense"), "sha256:12")
    old_registry.tag(APP, "empty").parent.mkdir(parents=True)
    schema_1 = ImageTree(SCHEMA_1, "application/vnd.docker.distribution.manifest.v1+json")
    old_registry.push(APP, schema_1, "schema-1")
    unknown_type = ImageTree(b'{"schemaVersion": 2, "mediaType": "application/x-odd"}', "application/x-odd")
    old_registry.push(APP, unknown_type, "odd")
    (old_registry.root / "repositories" / "UPPER" / "_manifests").mkdir(parents=True)
    (old_registry.root / "repositories" / APP / "_uploads" / "0").mkdir(parents=True)

    result = await run_import()

    layer = incomplete_image.layers[0].digest
    assert dict(run_import.reports()) == {
        "UPPER:": "'UPPER' is not a repository name; a name has lower-case letters and digits, and between them "
        "'.', '_', '__', '-' or '/'",
        "team/app:missing": f"the file of the blob {layer} is missing",
        "team/app:rotten": f"the bytes of the blob {corrupt_config.config.digest} have another digest",
        "team/app:no-manifest": "its file is missing",
        "team/app:bad-manifest": "the bytes of its file have another digest",
        "team/app:dangling": f"the tag points at {deleted_manifest.digest}, which was deleted",
        "team/app:half": f"its child {incomplete_image.digest}: the file of the blob {layer} is missing",
        "team/app:nonsense": "its link contains 'sha256:12', which is not a digest",
        "team/app:empty": "its link is missing",
        "team/app:schema-1": "schema 1 manifests are not accepted here; push with Docker 1.10 or newer",
        "team/app:odd": "manifests of type 'application/x-odd' are not accepted here",
    }
    assert result["problems"] == len(run_import.reports())
    assert ("team/app:", "unfinished pushes are left out: 1") in run_import.reports("note")
    assert (await store.tags(APP, None, 20)).items == ["sound"]
    await assert_complete(store, APP, sound_image)

    # The old registry is repaired from a backup.
    for image in (incomplete_image, corrupt_config, missing_manifest, corrupt_manifest):
        old_registry.push(APP, image)
    result = await run_import()
    assert {name.rpartition(":")[2] for name, _ in run_import.reports()} >= {
        "dangling",
        "nonsense",
        "empty",
        "schema-1",
        "odd",
    }
    assert result["tags"] == 5
    await assert_complete(store, APP, incomplete_index)


@pytest.mark.parametrize("tag", ["multi", None], ids=["tagged", "untagged"])
async def test_a_broken_child_is_one_problem(
    store: StoredRegistry, old_registry: OldDirectory, run_import: ImportRun, tag: str | None
) -> None:
    """If an index lists a broken manifest, one problem is reported, for the index. It names the broken manifest and the
    reason, whatever the order in which the manifests are read. If a tag points at the broken manifest, the tag is a
    second problem."""
    problems = {}
    for number in range(6):
        child = noise_image(f"broken {number}", 10)
        index = index_of((noise_image(f"sound {number}", 10), "amd64"), (child, "arm64"))
        outer = index_of((index, "linux"))
        old_registry.push(APP, outer, *([f"{tag}-{number}"] if tag else []))
        old_registry.data(child.layers[0].digest).unlink()
        name = f"{APP}:{tag}-{number}" if tag else f"{APP}:{outer.digest}"
        reason = f"the file of the blob {child.layers[0].digest} is missing"
        problems[name] = f"its child {index.digest}: its child {child.digest}: {reason}"
    tagged = noise_image("broken with a tag", 10)
    old_registry.push(APP, index_of((tagged, "arm64")), "around")
    old_registry.push(APP, tagged, "alone")
    old_registry.data(tagged.layers[0].digest).unlink()
    reason = f"the file of the blob {tagged.layers[0].digest} is missing"
    problems |= {f"{APP}:alone": reason, f"{APP}:around": f"its child {tagged.digest}: {reason}"}

    result = await run_import()

    assert sorted(run_import.reports()) == sorted(problems.items())
    assert result["problems"] == len(problems)


async def test_known_digest_gives_no_content_of_another_repository(
    store: StoredRegistry, old_registry: OldDirectory, run_import: ImportRun
) -> None:
    """Manifests in `evil/app` name a layer and a child manifest that the old registry serves only from `bob/secret`,
    because their links in `evil/app` are missing. The import adds them to `evil/app` neither before nor after it has
    stored them for `bob/secret`."""
    secret = old_registry.push("bob/secret", noise_image("secret", 10), "1")
    config = UpstreamBlob(b"{}", "application/vnd.oci.image.config.v1+json")
    old_registry.push("evil/app", manifest_of(config, secret.layers[0]), "layer")
    old_registry.layer("evil/app", secret.layers[0].digest).unlink()
    old_registry.push("evil/app", index_of((secret, "amd64")), "index")
    old_registry.revision("evil/app", secret.digest).unlink()
    old_registry.layer("evil/app", secret.layers[0].digest).unlink()
    reason = "the old registry does not serve it from this repository: its link is missing"
    expected = {
        "evil/app:layer": f"the blob {secret.layers[0].digest}: {reason}",
        "evil/app:index": f"its child {secret.digest}: {reason}",
    }

    await run_import(include=["evil/**"])
    assert dict(run_import.reports()) == expected
    await run_import()
    assert dict(run_import.reports()) == expected
    await run_import()
    assert dict(run_import.reports()) == expected
    with pytest.raises(BlobUnknown):
        await store.resolve_blob(RepositoryName("evil/app"), Digest(secret.layers[0].digest))
    await assert_complete(store, RepositoryName("bob/secret"), secret)
