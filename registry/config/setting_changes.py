"""Finds the settings that differ between two configurations, and says which of them can change while the server runs.

A reload does not change a setting if its field has the `json_schema_extra` `AT_RESTART` or `AT_START`. If the field of
a group, such as `[gc]`, has one of these two values, a reload changes no setting of the group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel

from registry.config.field_types import AT_RESTART, AT_START

TakesEffect = Literal["reload", "restart", "start"]
"""When a changed setting takes effect: at a reload, at a restart by `entrepot restart`, or only when the server is
stopped and started."""


def takes_effect(model: type[BaseModel], path: tuple[str, ...]) -> TakesEffect:
    """Returns when a change of the setting at `path` takes effect. `path`: the names of the fields that lead to the
    setting from `model`, such as `("gc", "grace")`."""
    field = model.model_fields[path[0]]
    if field.json_schema_extra == AT_START:
        return "start"
    if field.json_schema_extra == AT_RESTART:
        return "restart"
    group_model = field.annotation
    if len(path) > 1 and isinstance(group_model, type) and issubclass(group_model, BaseModel):
        return takes_effect(group_model, path[1:])
    return "reload"


def changed_settings(old: BaseModel, new: BaseModel) -> Iterator[tuple[str, TakesEffect]]:
    """Yields the name of each setting whose values differ, such as `gc.grace` or `upstream[docker.io].tag_ttl`, and
    when the change takes effect. Both models must be of the same class. Never yields a value, which may be secret."""
    for path, name in _changed_paths(old, new):
        yield name, takes_effect(type(old), path)


def _changed_paths(old: BaseModel, new: BaseModel) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yields the path and the name of each setting whose values differ. For a setting in a list of tables, the path
    names only the list."""
    for name in type(old).model_fields:
        before, after = getattr(old, name), getattr(new, name)
        if before == after:
            continue
        if isinstance(before, BaseModel) and isinstance(after, BaseModel):
            for path, changed_name in _changed_paths(before, after):
                yield (name, *path), f"{name}.{changed_name}"
        elif _has_tables(before) or _has_tables(after):
            for changed_name in _changed_tables(_by_name(before), _by_name(after)):
                yield (name,), f"{name}{changed_name}"
        else:
            yield (name,), name


def _has_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], BaseModel)


def _by_name(tables: list[BaseModel]) -> dict[str, BaseModel]:
    """Returns the tables by name. The name is the value of the table's first field in `keys` that has a value. A table
    without such a field gets its position as its name, counted from 1."""
    keys = ("name", "issuer", "prefix")
    return {
        str(next((getattr(table, key) for key in keys if getattr(table, key, None)), position)): table
        for position, table in enumerate(tables, 1)
    }


def _changed_tables(old: Mapping[str, BaseModel], new: Mapping[str, BaseModel]) -> Iterator[str]:
    """Yields the texts to append to the name of a list of tables: `[docker.io].tag_ttl` for a changed setting, or
    `[docker.io]` for a table that was added or removed. Yields an empty text if only the order of the tables has
    changed."""
    only_order_changed = True
    for name in dict.fromkeys([*old, *new]):
        if name not in old or name not in new:
            only_order_changed = False
            yield f"[{name}]"
        elif old[name] != new[name]:
            only_order_changed = False
            for _, changed_name in _changed_paths(old[name], new[name]):
                yield f"[{name}].{changed_name}"
    if only_order_changed:
        yield ""
