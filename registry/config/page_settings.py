"""The settings `[pages]`, for the web pages of the registry."""

from __future__ import annotations

from pydantic import Field

from registry.config.field_types import SettingsGroup


class PageSettings(SettingsGroup):
    """The pages for people, below `/ui`. They show each visitor what the visitor may pull."""

    enabled: bool = Field(default=True, description="Serve the pages")
