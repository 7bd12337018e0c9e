"""From YAML's mappings to dataclasses, and from these to what names an artefact."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from lit_llmers.errors import UserError, nearest

# of a setting that came after runs had been made without it: at its default it stays out of fingerprints, so theirs hold
ADDED = {"added": True}

Config = TypeVar("Config")


def unread(config: Any, choice: str, readers: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[str, Any, str]]:
    """Settings other than their default that a choice does not read: who gives them expects an effect.

    Args:
        choice: what is made with these settings.
        readers: of those that not every choice reads, which do.

    Yields:
        name, value, and in words what takes it back: the default, as YAML has it.
    """
    for entry in fields(config):
        value = getattr(config, entry.name)
        if choice not in readers.get(entry.name, (choice,)) and value != entry.default:
            yield entry.name, value, "null" if entry.default is None else str(entry.default)


def fingerprinted(config: Any) -> dict[str, Any]:
    """The settings that name an artefact: all, less those that are `ADDED` and are at their default."""
    out = {}
    for entry in fields(config):
        value = getattr(config, entry.name)
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        if not (entry.metadata.get("added") and value == default):
            out[entry.name] = fingerprinted(value) if is_dataclass(value) else value
    return out


def build(cls: type[Config], values: Mapping[str, Any], where: str) -> Config:
    """Make the dataclass `cls`, and those inside it, from a mapping.

    Args:
        where: the key under which the mapping stands, for the error message.

    Raises:
        UserError: they are no mapping, or have a key that the dataclass does not, or lack one that it needs, or a value does
            not fit.
    """
    checked(values, Mapping, where)
    types = get_type_hints(cls)
    known = [entry.name for entry in fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise UserError(
                f"Unknown configuration key '{where}.{key}'.{nearest(key, known)} '{where}' has: {', '.join(known)}."
            )
    plain = {key: checked(value, types[key], f"{where}.{key}") for key, value in values.items()}
    inner = {key: next((kind for kind in (types[key], *get_args(types[key])) if is_dataclass(kind)), None) for key in values}
    nested = {
        key: build(inner[key], value, f"{where}.{key}")  # type: ignore[arg-type]
        for key, value in values.items()
        if inner[key] is not None and isinstance(value, Mapping)
    }
    try:
        return cls(**{**plain, **nested})
    except TypeError as error:
        raise UserError(f"Configuration '{where}' is incomplete: {error}.") from error


_NAMES = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    list: "a list",
    tuple: "a list",
    dict: "a mapping, as {key: value}",
    Mapping: "a mapping, as {key: value}",
    NoneType: "null",
}


def checked(value: Any, hint: Any, where: str) -> Any:
    """A value that fits its type hint, as far as YAML has such types; a dataclass is made from a mapping.

    A whole number becomes the float that it is meant for: what means the same is then the same, in fingerprints too. No number
    in it, however deep inside, may be infinite or none: comparisons with a bound let nan pass, and a loss would become it.

    Raises:
        UserError: it names the key, the value and what it must be.
    """
    _check_finite(value, where)
    kinds = get_args(hint) if isinstance(hint, UnionType) or get_origin(hint) is Union else (hint,)
    named = [_NAMES.get(_plain(kind)) for kind in kinds]
    if None in named:
        return value  # a tensor: checked by those who make it
    fitting = next((kind for kind in kinds if _fits(value, kind)), None)
    if fitting is None:
        raise UserError(f"'{where}' is {value!r}. It must be {' or '.join(dict.fromkeys(filter(None, named)))}.")
    if _plain(fitting) in (list, tuple) and (of := get_args(fitting)):
        return type(value)(checked(each, of[0], f"{where}[{place}]") for place, each in enumerate(value))
    return float(value) if fitting is float and type(value) is int else value


def _check_finite(value: Any, where: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"'{where}' is {value}. It must be a finite number.")
    if isinstance(value, Mapping):
        for key, each in value.items():
            _check_finite(each, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for place, each in enumerate(value):
            _check_finite(each, f"{where}[{place}]")


def _plain(kind: Any) -> Any:
    return Mapping if is_dataclass(kind) else get_origin(kind) or kind


def _fits(value: Any, kind: Any) -> bool:
    plain = _plain(kind)
    if isinstance(value, bool):
        return plain is bool
    if plain is float:
        return isinstance(value, int | float)
    if plain is tuple:
        return isinstance(value, list | tuple)
    return isinstance(value, plain) or (is_dataclass(kind) and is_dataclass(value))
