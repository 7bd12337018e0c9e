"""Overrides, `key=value` in Hydra's grammar: read one by one, written, and applied below `stages`."""

import re
from collections.abc import Sequence
from dataclasses import MISSING
from typing import Any, get_type_hints

from lit_llmers.conf.schema import SECTIONS
from lit_llmers.conf.typed import checked
from lit_llmers.errors import UserError, unknown

_BEGINS = ("[", "{", "'", '"')  # a value that begins so is meant to be of Hydra's grammar
OF_STAGE = re.compile(r"[+~]*stages\.\w+")


def key_of(override: str) -> str:
    """The key that an override is about."""
    return override.partition("=")[0].lstrip("+~")


def readable(override: str) -> str:
    """The override as Hydra reads it.

    A text that the grammar has no place for, such as `~/data` or `/data (old)`, is put into quotes, and so is a number where a
    section takes a text, as in `run.name=5`. A `+` is left out: what no YAML writes can be set without it, where a dataclass
    knows it, and is a slip elsewhere.

    Raises:
        UserError: it is no override, its value cannot be read, or it stands for several runs.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    key, equals, value = override.lstrip("+").partition("=")
    if not re.fullmatch(r"~?[\w@/.-]+", key) or not (equals or key.startswith("~")):
        raise UserError(f"'{override}' is not an override. Write key=value, for example trainer.max_epochs=2.")
    in_quotes = f"{key}={quoted(value)}"
    forms = [f"{key}{equals}{value}", *([] if value.startswith(_BEGINS) else [in_quotes])]
    for form in forms:
        try:
            parsed = OverridesParser.create().parse_override(form)
        except HydraException as error:
            reason = str(error).splitlines()[0]
            continue
        if parsed.is_sweep_override():
            raise UserError(
                f"'{override}' stands for several runs, and this is one. Write a list as {key}=[A,B], and a text with quotes "
                f'inside those of the shell: "{in_quotes}". benchmarks/tuning.py of a checkout tries one value after the other.'
            )
        number = isinstance(parsed.value(), int | float) and _is_text(key)
        return in_quotes if number else form
    raise UserError(
        f"'{override}' does not read as a value: {reason}. Close its brackets and quotes, and put a text that has other signs "
        f'than letters, digits and ./-_ into quotes inside those of the shell, as "{key}=[{quoted("it is 5 #")}]".'
    )


def _is_text(key: str) -> bool:
    """Whether a section takes a text there, and nothing else."""
    section, _, name = key.partition(".")
    return section in SECTIONS and get_type_hints(SECTIONS[section]).get(name) is str


def quoted(text: str) -> str:
    """A text in Hydra's grammar, in quotes where it needs them."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Quote, QuotedString
    from hydra.errors import HydraException

    try:
        plain = OverridesParser.create().parse_override(f"key={text}")
    except HydraException:
        plain = None
    same = plain is not None and not plain.is_sweep_override() and plain.value() == text
    return text if same else QuotedString(text, Quote.single).with_quotes()


def written(value: Any) -> str:
    """A YAML value in the grammar of overrides."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if hasattr(value, "items"):
        return "{" + ",".join(f"{key}:{written(item)}" for key, item in value.items()) + "}"
    if hasattr(value, "__iter__") and not isinstance(value, str):
        return "[" + ",".join(written(item) for item in value) + "]"
    return str(value)


def with_stage_overrides(config: Any, overrides: Sequence[str]) -> Any:
    """Set `stages.NAME.KEY=VALUE` after all else is resolved, so that a key below `model: ${student.model}` can be set.

    Keys need not be there: a stage's dataclass refuses what it does not know.

    Raises:
        UserError: a stage, a place in a list, or a key that is to be deleted is not there.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    checked(config.get("stages") if overrides else {}, dict, "stages")
    tree = OmegaConf.create(config)
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key = override.get_key_element().lstrip("+~")
        if (name := key.split(".")[1]) not in tree.stages and (key.count(".") > 1 or override.is_delete()):
            raise unknown("stage", name, tree.stages)
        _check_places(tree, key)
        if override.is_delete():
            if OmegaConf.select(tree, key, default=MISSING) is MISSING:
                raise UserError(f"There is no '{key}' to delete. Leave '{override.input_line}' out.")
            parent, _, last = key.rpartition(".")
            node = OmegaConf.select(tree, parent)
            node.pop(int(last) if OmegaConf.is_list(node) else last)
        else:
            OmegaConf.update(tree, key, override.value(), merge=False, force_add=True)
    return OmegaConf.to_container(tree, resolve=True)


def _check_places(tree: Any, key: str) -> None:
    """What follows a list in a key, as in `stages.student.callbacks.0.ranking_distillation.weight`, is a place in it."""
    from omegaconf import OmegaConf

    parts = key.split(".")
    for number, place in enumerate(parts[1:], start=1):
        before = ".".join(parts[:number])
        node = OmegaConf.select(tree, before)
        if OmegaConf.is_list(node) and not (place.isdigit() and int(place) < len(node)):
            raise UserError(f"'{key}': {before} is a list of {len(node)}, counted from 0; '{place}' is no place in it.")
