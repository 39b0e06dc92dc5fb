"""Finds the settings that differ between two configurations, and says when each change takes effect.

A change takes effect at a reload, unless the `json_schema_extra` of the setting's field is `AT_RESTART` or `AT_START`.
If the field of a group, such as `[gc]`, has one of these values, the value applies to all settings of the group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel

from registry.config.field_types import AT_RESTART, AT_START

EffectiveAt = Literal["reload", "restart", "start"]
"""When a changed setting takes effect: at `entrepot reload`, at `entrepot restart`, or only when the server is stopped
and then started again."""


def effective_at(model: type[BaseModel], path: tuple[str, ...]) -> EffectiveAt:
    """Returns when a change of the setting at `path` takes effect. `path`: the names of the fields that lead to the
    setting from `model`, such as `("gc", "grace")`."""
    field = model.model_fields[path[0]]
    if field.json_schema_extra == AT_START:
        return "start"
    if field.json_schema_extra == AT_RESTART:
        return "restart"
    group_model = field.annotation
    if len(path) > 1 and isinstance(group_model, type) and issubclass(group_model, BaseModel):
        return effective_at(group_model, path[1:])
    return "reload"


def changed_settings(old: BaseModel, new: BaseModel) -> Iterator[tuple[str, EffectiveAt]]:
    """Yields the name of each setting whose values differ, such as `gc.grace` or `upstream[docker.io].tag_ttl`, and
    when the change takes effect. Never yields the values, because they may be secret. `old` and `new` must have the
    same class."""
    for path, name in _changed_paths(old, new):
        yield name, effective_at(type(old), path)


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
            for suffix in _changed_table_suffixes(_tables_by_name(before), _tables_by_name(after)):
                yield (name,), f"{name}{suffix}"
        else:
            yield (name,), name


def _has_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], BaseModel)


def _tables_by_name(tables: list[BaseModel]) -> dict[str, BaseModel]:
    """Returns the tables by name. The name of a table is the value of `name`, `issuer` or `prefix`: the first of these
    fields that has a value. If none has a value, the name is the table's position in the list, counted from 1."""
    keys = ("name", "issuer", "prefix")
    return {
        str(next((getattr(table, key) for key in keys if getattr(table, key, None)), position)): table
        for position, table in enumerate(tables, 1)
    }


def _changed_table_suffixes(old: Mapping[str, BaseModel], new: Mapping[str, BaseModel]) -> Iterator[str]:
    """Yields, for each change in a list of tables, the text to append to the name of the list:

    - `[docker.io].tag_ttl` for a changed setting of a table.
    - `[docker.io]` for an added or a removed table.
    - An empty text if only the order of the tables has changed."""
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
