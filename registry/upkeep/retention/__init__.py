"""Retention: deletes the tags and untagged manifests of hosted repositories that no rule in the settings keeps."""
