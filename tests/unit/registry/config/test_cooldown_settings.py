"""The settings of a cooldown: which values are accepted, and the errors for others."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import ValidationError

from registry.config import Upstream


def upstream(**values: Any) -> Upstream:
    return Upstream.model_validate({"name": "docker.io", **values})


def test_no_cooldown_by_default() -> None:
    assert upstream().cooldown == 0
    assert upstream(cooldown="0s", cooldown_new="refuse").cooldown == 0


def test_a_cooldown() -> None:
    """Exemptions are patterns of repositories, with or without a pattern of tags."""
    exempt = ["library/**", "team/app:nightly-*", "**:edge", "app:[0-9]*"]
    made = upstream(cooldown="3d", cooldown_tags=["v*"], cooldown_exempt=exempt, cooldown_new="refuse")
    assert (made.cooldown, made.cooldown_tags, made.cooldown_exempt) == (259200.0, ["v*"], exempt)


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"cooldown": "-1d"}, "not a duration"),
        ({"cooldown": "3d", "cooldown_tags": []}, "at least 1 item"),
        ({"cooldown": "3d", "cooldown_tags": ["v 1"]}, "'v 1' is not a pattern of tags like v* or *-nightly"),
        ({"cooldown": "3d", "cooldown_exempt": ["app:"]}, "'app:' has no pattern of tags after the colon"),
        ({"cooldown": "3d", "cooldown_exempt": [":edge"]}, "an exemption is written like library/**, team/app:nightly"),
        ({"cooldown": "3d", "cooldown_exempt": ["App"]}, "'App' is not a pattern of names like team/** or *"),
        ({"cooldown": "3d", "cooldown_new": "wait"}, "'serve' or 'refuse'"),
        ({"cooldown_new": "refuse"}, 'cooldown_new has no effect without a cooldown; set one, such as cooldown = "3d"'),
    ],
)
def test_what_is_refused(values: dict[str, Any], error: str) -> None:
    """Each error says what is wrong, and how to write it."""
    with pytest.raises(ValidationError, match=re.escape(error)):
        upstream(**values)
