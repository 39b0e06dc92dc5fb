"""The settings of a cooldown, which delays new tags of an upstream: the accepted values, and the errors for others."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import ValidationError

from registry.config import Upstream


def upstream(**values: Any) -> Upstream:
    return Upstream.model_validate({"name": "docker.io", **values})


def test_no_cooldown_by_default() -> None:
    """Without the setting, the cooldown is 0. With a cooldown of 0, the setting `cooldown_new` is accepted."""
    assert upstream().cooldown == 0
    assert upstream(cooldown="0s", cooldown_new="refuse").cooldown == 0


def test_a_cooldown() -> None:
    """Exemptions are patterns of repositories, with or without a pattern of tags."""
    exempt = ["library/**", "team/app:nightly-*", "**:edge", "app:[0-9]*"]
    settings = upstream(cooldown="3d", cooldown_tags=["v*"], cooldown_exempt=exempt, cooldown_new="refuse")
    assert (settings.cooldown, settings.cooldown_tags, settings.cooldown_exempt) == (259200.0, ["v*"], exempt)


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"cooldown": "-1d"}, "not a duration"),
        ({"cooldown": "3d", "cooldown_tags": []}, "at least 1 item"),
        ({"cooldown": "3d", "cooldown_tags": ["v 1"]}, "'v 1' is not a pattern of tags, such as v* or *-nightly"),
        ({"cooldown": "3d", "cooldown_exempt": ["app:"]}, "'app:' has no pattern of tags after the colon"),
        ({"cooldown": "3d", "cooldown_exempt": [":edge"]}, "an exemption is written like library/**, team/app:nightly"),
        ({"cooldown": "3d", "cooldown_exempt": ["App"]}, "'App' is not a pattern of names, such as team/** or *"),
        ({"cooldown": "3d", "cooldown_new": "wait"}, "'serve' or 'refuse'"),
        ({"cooldown_new": "refuse"}, 'cooldown_new has no effect without a cooldown; set one, such as cooldown = "3d"'),
    ],
)
def test_invalid_values_are_refused(values: dict[str, Any], error: str) -> None:
    """Each error says what is wrong, and how to write the value."""
    with pytest.raises(ValidationError, match=re.escape(error)):
        upstream(**values)
