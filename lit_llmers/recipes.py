"""Finds recipes, in a checkout's or the wheel's `recipes/` or by path, and composes one into a plain dictionary."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lit_llmers.composing.overrides import OF_STAGE, key_of, readable, with_stage_overrides, written
from lit_llmers.conf.schema import SECTIONS
from lit_llmers.conf.typed import checked
from lit_llmers.errors import UserError, nearest, unknown

PACKAGE = Path(__file__).parent
CONF = PACKAGE / "conf"
GROUPS = ("data", "teacher", "student", "text", "trainer", "logger")
_CHECKED = (*SECTIONS, *GROUPS, "stages")  # by dataclasses, which refuse keys that they do not know


def folder() -> Path:
    """Where the shipped recipes are: beside the package in a checkout, inside it in a wheel."""
    inside = PACKAGE / "_recipes"
    return inside if inside.is_dir() else PACKAGE.parent / "recipes"


def available() -> dict[str, Path]:
    """Recipes by name: the shipped ones and those in `./recipes`, which win."""
    return {path.stem: path for place in (folder(), Path("recipes")) for path in sorted(place.glob("*.yaml"))}


def options(group: str) -> list[str]:
    """Names that `group=NAME` takes."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def title(path: Path) -> str:
    """The first line of a recipe's header."""
    return path.read_text().split("\n", 1)[0].lstrip("# ").strip()


def split(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The name in `recipe=NAME`, the last one given, and all other arguments.

    Raises:
        UserError: no recipe is given.
    """
    names = [argument.partition("=")[2] for argument in arguments if argument.startswith("recipe=")]
    if not names:
        raise UserError(f"No recipe given. Add recipe=NAME with one of: {', '.join(sorted(available()))}.")
    return names[-1], [argument for argument in arguments if not argument.startswith("recipe=")]


def find(name: str) -> Path:
    """The file of a recipe, by name or by path.

    Raises:
        UserError: there is none; the message lists those there are. Or it ends in `.yml`, which Hydra does not take.
    """
    path = Path(name)
    if path.suffix == ".yml":
        raise UserError(f"Hydra reads {path} only under the ending .yaml. Rename it to {path.with_suffix('.yaml').name}.")
    if path.suffix == ".yaml":
        if path.is_file():
            return path
        raise UserError(f"There is no recipe file {path}. The shipped recipes are: {', '.join(sorted(available()))}.")
    recipes = available()
    if name not in recipes:
        raise unknown("recipe", name, recipes)
    return recipes[name]


def read(path: Path) -> dict[str, Any]:
    """A recipe's file as it stands, neither composed nor resolved.

    Raises:
        UserError: it is not YAML, or no mapping.
    """
    from omegaconf import OmegaConf
    from yaml import YAMLError

    try:
        plain: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    checked(plain or {}, dict, str(path))
    return plain or {}


def groups(name: str) -> set[str]:
    """The groups that a recipe lists in its defaults, so that `text=minilm` and `text.fields=[title]` mean something to it."""
    defaults = read(find(name)).get("defaults", [])
    if any(entry not in ("_self_", "/base") for entry in defaults if isinstance(entry, str)):
        return set(GROUPS)  # it is built on another file, which may list them
    listed = {str(next(iter(entry))).split()[-1] for entry in defaults if isinstance(entry, dict)}
    return {group for group in GROUPS if f"/{group}" in listed}


def chooses(name: str) -> set[str]:
    """What overrides of a recipe may be about besides its settings: its groups, and its stages as `stages.NAME`."""
    return groups(name) | {f"stages.{stage}" for stage in _stage_names(find(name))}


def _stage_names(path: Path) -> set[str]:
    """The stages of a recipe, with those of the recipes beside it that it is built on."""
    plain = read(path)
    built_on = [path.parent / f"{entry.lstrip('/')}.yaml" for entry in plain.get("defaults", []) if isinstance(entry, str)]
    return set(plain.get("stages") or {}).union(*(_stage_names(each) for each in built_on if each.is_file()))


def chosen_by(override: str) -> str | None:
    """Which of `chooses` an override is about, if it is about one."""
    stage = OF_STAGE.match(override)
    return stage[0].lstrip("+~") if stage else group_of(override)


def own_student(path: Path) -> str | None:
    """The student that a recipe names in its defaults."""
    defaults = [entry for entry in read(path).get("defaults", []) if isinstance(entry, dict)]
    return next((name for entry in defaults for key, name in entry.items() if key == "/student"), None)


def group_of(override: str) -> str | None:
    """The group that an override chooses from or sets a key of, if it is one."""
    group = re.split("[.=]", override.lstrip("+~"), maxsplit=1)[0]
    return group if group in GROUPS else None


def compose(name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Compose a recipe with command-line overrides (Hydra's syntax) and resolve it.

    `scale=NAME` stands for the overrides that the recipe lists under `scales: NAME`; overrides given beside it win. What
    it says of the student is of the recipe's own: another one that is given has what its file says.

    What an override says of the whole run wins over the student's own file and, of `trainer.*` alone, over what a stage of the
    recipe has for itself: how long and in which batches to train is the user's to choose, while a stage has its own learning
    rate or examples because its method needs them. An override of the student or of the stage wins over both.

    Raises:
        UserError: unknown recipe, group option, scale or key, or a malformed override.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    path, listed = find(name), groups(name)
    scale, given = _split_scale(overrides)
    given = [readable(override) for override in given]
    for override in given:
        group, _, option = override.partition("=")
        if group in GROUPS and option not in options(group):
            raise unknown(f"option of {group}", option, options(group))
        if (chosen := group_of(override)) and chosen not in listed:
            raise UserError(f"Recipe '{name}' has no {chosen} to choose. {_own_text(path, chosen)}Leave '{override}' out.")
    layers = [_scale_overrides(path, scale, given), given]
    others = [_open(override) for layer in layers for override in layer if not OF_STAGE.match(override)]
    with initialize_config_dir(str(path.resolve().parent), version_base="1.3"):

        def composed(arguments: list[str]) -> Any:
            return hydra_compose(path.stem, ["hydra.searchpath=[pkg://lit_llmers.conf]", *arguments])

        try:
            config = composed(others)
        except (HydraException, OmegaConfBaseException) as error:
            choices = [override for override in others if override.partition("=")[0] in GROUPS]
            try:
                known = list(_keys(OmegaConf.to_container(composed(choices), resolve=False)))
            except (HydraException, OmegaConfBaseException) as also:
                raise UserError(f"Recipe '{name}' does not compose: {str(also).splitlines()[0]}") from also
            for key in map(key_of, given):
                if key not in known and key.partition(".")[0] not in _CHECKED:
                    raise UserError(
                        f"Unknown configuration key '{key}'.{nearest(key, known)} "
                        f"'python -m lit_llmers.fit recipe={name} --config' prints them all."
                    ) from error
            raise UserError(f"Recipe '{name}' does not compose: {str(error).splitlines()[0]}") from error
    OmegaConf.set_struct(config, False)
    for number, layer in enumerate(layers):
        of_student = {key_of(override) for later in layers[number:] for override in later}
        for section, _, key in (key_of(override).partition(".") for override in layer):
            own = OmegaConf.select(config, f"student.{section}") if section in SECTIONS else None
            if own is not None and key in own and f"student.{section}.{key}" not in of_student:
                own.pop(key)
    try:
        plain: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        for layer in layers:
            _silence_trainers(plain.get("stages"), layer)
            plain = with_stage_overrides(plain, [override for override in layer if OF_STAGE.match(override)])
    except MissingMandatoryValue as error:
        raise UserError(f"Recipe '{name}' needs a value for '{error.full_key}'. Add {error.full_key}=VALUE.") from error
    except (HydraException, OmegaConfBaseException) as error:
        lacking = re.match(r"Interpolation key '((\w+)\.[\w.]+)' not found", str(error))
        if lacking and (group := lacking[2]) in GROUPS:
            raise UserError(
                f"Recipe '{name}' reads '{lacking[1]}', a setting that the {group} given does not have, so the two do not go "
                f"together. Choose another {group}."
            ) from error
        raise UserError(f"Recipe '{name}' does not resolve: {str(error).splitlines()[0]}") from error
    assert isinstance(plain, dict)
    plain.pop("scales", None)
    return {"recipe": path.stem, **{str(key): value for key, value in plain.items()}}


def _own_text(path: Path, group: str) -> str:
    """Sentences that name the keys which choose the text of a recipe's own encode stages."""
    stages = read(path).get("stages") or {}
    own = [stage for stage, entry in stages.items() if isinstance(entry, dict) and "encode" in entry] if group == "text" else []
    return "".join(f"Its stage '{stage}' is set by stages.{stage}.encode and stages.{stage}.model. " for stage in own)


def _silence_trainers(stages: Any, overrides: Sequence[str]) -> None:
    """Take out of the stages' own `trainer` what overrides say of the whole run's."""
    said = [key_of(override).removeprefix("trainer.") for override in overrides if key_of(override).startswith("trainer.")]
    entries = stages.values() if isinstance(stages, dict) else ()
    for own in [entry["trainer"] for entry in entries if isinstance(entry, dict) and isinstance(entry.get("trainer"), dict)]:
        for key in said:
            own.pop(key, None)


def _split_scale(overrides: Sequence[str]) -> tuple[str | None, list[str]]:
    scales = [override.partition("=")[2] for override in overrides if override.startswith("scale=")]
    return (scales[-1] if scales else None), [o for o in overrides if not o.startswith("scale=")]


def scale_settings(path: Path, scale: str) -> dict[str, Any]:
    """`scales: NAME: {key: value}` of a recipe. The file as it stands is the `laptop` scale.

    `like: OTHER` there stands for the settings in `lit_llmers/conf/scale/OTHER.yaml`, which several recipes share; the recipe's
    own win over them.

    Raises:
        UserError: there is no such scale.
    """
    from omegaconf import OmegaConf

    if scale == "laptop":
        return {}
    scales = read(path).get("scales") or {}
    if scale not in scales:
        raise unknown(f"scale of {path.stem}", scale, ["laptop", *scales])
    own = dict(scales[scale])
    if (other := own.pop("like", None)) is None:
        return own
    if other not in options("scale"):
        raise unknown(f"scale in 'scales.{scale}.like'", other, options("scale"))
    shared: Any = OmegaConf.to_container(OmegaConf.load(CONF / "scale" / f"{other}.yaml"), resolve=False)
    return {**shared, **own}


def _scale_overrides(path: Path, scale: str | None, given: Sequence[str]) -> list[str]:
    """The settings of a scale as overrides, without those of the student if `given` chooses another one."""
    settings = scale_settings(path, scale or "laptop")
    students = [override.partition("=")[2] for override in given if key_of(override) == "student"]
    if students and students[-1] != own_student(path):
        settings = {key: value for key, value in settings.items() if not key.startswith("student.")}
    return [f"{key}={written(value)}" for key, value in settings.items()]


def _open(override: str) -> str:
    """Let a setting be given although no YAML writes it; its section's dataclass refuses what it does not know."""
    return f"++{override}" if override.partition(".")[0] in _CHECKED else override


def _keys(config: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(config, dict):
        for key, value in config.items():
            yield f"{prefix}{key}"
            yield from _keys(value, f"{prefix}{key}.")
