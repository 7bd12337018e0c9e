"""From a composed recipe to typed stages: what each inherits, reads and needs, checked before anything runs."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from lit_llmers.conf.encoding import USER_VECTORS, EncodeStage
from lit_llmers.conf.instruction import TuneStage
from lit_llmers.conf.schema import SECTIONS, SHARDED, RunConfig
from lit_llmers.conf.stages import EvaluateStage, ExportStage, FitStage, RecordStage
from lit_llmers.conf.typed import build, checked
from lit_llmers.errors import UserError, nearest, unknown
from lit_llmers.files import sha256
from lit_llmers.stages import MODULES, Run, Stage

TRAINING = ("sequences", "optimizer", "trainer")
SHARED = {"fit": TRAINING, "tune": TRAINING, "record": ("signals",), "evaluate": ("evaluation",)}
PLAIN = {  # what is said of the whole run outside sections
    "stages": dict,
    "repeat": list[str],
    "pairs": list[list[str]],
    "stage": str | None,
    "only": str | None,
    "seed": Any,  # see `_check_seeds`
    "seeds": Any,
}
GATHERING = ("evaluate", "export")  # run once, over all seeds


def resolve(config: dict[str, Any]) -> list[Stage]:
    """Turn a composed recipe into typed stages in run order, checked before anything runs.

    Raises:
        UserError: an unknown verb, key, stage name or option, or a stage that needs a later one.
    """
    check_sections(config)
    place = build(RunConfig, config["run"], "run")
    run = Run(place.root / config["recipe"] / place.name, config["recipe"], place.name, config["logger"])
    if "teacher" in config:  # which is checked although no stage may read it
        from lit_llmers.teachers.base import BaseConfig

        BaseConfig.of(config["teacher"])
    entries = {name: _inherit(name, config["stages"]) for name in config["stages"]}
    for name in config["repeat"]:
        if name not in entries:
            raise unknown("stage in 'repeat'", name, entries)
    if len(preparing := [name for name, entry in entries.items() if "prepare" in entry]) != 1:
        raise UserError(
            f"A recipe has one stage that prepares the data, and '{config['recipe']}' has {', '.join(preparing) or 'none'}. "
            "Write it as recipes/slmrec.yaml does: {prepare: interactions}."
        )
    planned: dict[str, list[Stage]] = {}
    for name, entry in entries.items():
        verb = _verb(name, entry)
        typed, content = _typed(name, verb, entry, config)
        wanted = _needs(verb, typed, entries)
        for need in wanted:
            if need not in planned:
                where = "comes later in the recipe" if need in entries else "does not exist"
                raise UserError(f"Stage '{name}' needs stage '{need}', which {where}.{nearest(need, planned)}")
        _check_needs(name, typed, planned)
        asked = {need: planned[need][0].config for need in wanted if verb in ("record", "evaluate")}
        content |= {need: asdict(tuned.generation) for need, tuned in asked.items() if isinstance(tuned, TuneStage)}
        repeated = verb not in GATHERING and (
            name in config["repeat"] or any(stage.repeated for need in wanted for stage in planned[need])
        )
        seeds = config["seeds"] if repeated else [config["seed"]]
        planned[name] = [
            Stage(name, verb, typed, seed, _of_seed(planned, wanted, seed, verb), run, content, repeated) for seed in seeds
        ]
    from lit_llmers.composing.compatibility import check_blocks, check_parts, check_targets, check_texts

    settings = {name: stages[0].config for name, stages in planned.items()}
    check_texts(settings)
    check_targets(settings)
    check_blocks(settings)
    check_parts(settings)
    return [stage for stages in planned.values() for stage in stages]


def check_sections(config: dict[str, Any]) -> None:
    """Check what is said of the whole run: the part of `resolve` that imports nothing heavy.

    Raises:
        UserError: a section is missing, or has an unknown key or a value that it does not take.
    """
    for key in (*SECTIONS, *PLAIN):
        if key not in config:
            raise UserError(
                f"The recipe '{config['recipe']}' lacks '{key}'. List in its defaults what recipes/slmrec.yaml does, /base "
                f"first, and let no override delete '{key}'."
            )
    for section, cls in SECTIONS.items():
        build(cls, config[section], section)
    for key, hint in PLAIN.items():
        checked(config[key], hint, key)
    for name, entry in config["stages"].items():
        checked(entry, dict, f"stages.{name}")
    if not config["stages"]:
        raise UserError(f"The recipe '{config['recipe']}' has no stages. Give it some, as recipes/slmrec.yaml does.")
    _check_seeds(config["seed"], config["seeds"])
    _check_pairs(config["pairs"], config["stages"])


def _check_seeds(seed: Any, seeds: Any) -> None:
    if not _is_seed(seed):
        raise UserError(f"seed is {seed}. It must be a whole number from 0, less than 2**32.")
    if not isinstance(seeds, list) or not seeds or not all(map(_is_seed, seeds)):
        raise UserError(f"seeds is {seeds}. It must be a list of whole numbers from 0, less than 2**32, as seeds=[0,1,2].")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"seeds is {seeds}. It must be a list of different whole numbers.")


def _is_seed(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**32  # as NumPy takes them


def _check_pairs(pairs: list[list[str]], stages: dict[str, Any]) -> None:
    for pair in pairs:
        if len(pair) != 2:
            raise UserError(f"pairs has {pair}. Each must be two stages, [METHOD,CONTROL], as pairs=[[student,control]].")
        for name in pair:
            if name not in stages:
                raise unknown("stage in 'pairs'", name, stages)


def _inherit(name: str, stages: dict[str, Any], chain: tuple[str, ...] = ()) -> dict[str, Any]:
    """Follow `like`: the settings of another stage, or those of an option group, with this one's on top.

    Mappings are merged key by key, lists and everything else replaced.
    """
    entry = dict(stages[name])
    other = entry.pop("like", None)
    checked(other, dict | str | None, f"stages.{name}.like")
    if other is None:
        return entry
    if isinstance(other, dict):
        return _merge(other, entry)
    if other not in stages:
        raise unknown(f"stage in 'stages.{name}.like'", other, stages)
    if other in chain:
        raise UserError(f"'like' goes in a circle: {' -> '.join((*chain, name, other))}.")
    return _merge(_inherit(other, stages, (*chain, name)), entry)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _verb(name: str, entry: dict[str, Any]) -> str:
    verbs = [key for key in entry if key in MODULES]
    if len(verbs) != 1:
        raise UserError(
            f"Stage '{name}' must have exactly one of {', '.join(MODULES)}; it has {', '.join(verbs) or 'none'}. "
            "It says what the stage does."
        )
    return verbs[0]


def _typed(name: str, verb: str, entry: dict[str, Any], config: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The stage's settings as a dataclass, and the identity of what it reads from outside."""
    where = f"stages.{name}"
    if verb == "prepare":
        from lit_llmers.data import DataConfig
        from lit_llmers.data.sources import source_of

        if more := ", ".join(f"{where}.{key}" for key in sorted(entry.keys() - {verb})):
            raise UserError(f"A stage that prepares the data has no settings of its own: {more}. Those are data.KEY=VALUE.")
        if entry[verb] != "interactions":
            raise unknown("kind of data to prepare", entry[verb], ["interactions"])
        data = build(DataConfig, config["data"], "data")
        return data, source_of(data).fingerprint()
    ranked = config["evaluation"]
    if verb == "fit":
        entry = {**entry, "mask_history": ranked["mask_history"], "validation_users": ranked["users"]}
        if ranked.get("official_select_on_test"):
            entry["official_select_on_test"] = True
    if verb == "tune":
        entry = {**entry, "mask_history": ranked["mask_history"]}
    trains = verb == "encode" and (entry["encode"] == "said" or entry.get("contrast") is not None)
    for section in ("optimizer", "trainer") if trains else SHARED.get(verb, ()):  # the run's own, with the stage's on top
        said = entry.get(section, {})
        checked(said, dict, f"{where}.{section}")
        settings = {**config[section], **said}
        if section == "trainer" and not _shares(settings["strategy"], verb, entry):
            settings |= {"strategy": "auto", "devices": 1, "num_nodes": 1} | said
        own: Any = build(SECTIONS[section], settings, f"{where}.{section}")
        entry = {**entry, section: own}
    classes = {
        "encode": EncodeStage,
        "fit": FitStage,
        "tune": TuneStage,
        "record": RecordStage,
        "evaluate": EvaluateStage,
        "export": ExportStage,
    }
    typed: Any = build(classes[verb], entry, where)
    if verb == "fit":
        from lit_llmers.composing.checks import check

        check(typed, where)
        return typed, _content_of(typed.model.get("base"))
    if verb == "tune":
        from lit_llmers.composing.checks import check_base_of

        check_base_of(typed.trainer, typed.base, where)
        return typed, _content_of(typed.base)
    if verb == "encode":
        from lit_llmers.text.prompts import check_prompt
        from lit_llmers.text.transformer import identity

        check_prompt(typed.prompt, typed.fields, f"{where}.prompt")
        check_prompt(typed.user_prompt, ["history"], f"{where}.user_prompt")
        return typed, identity(typed, f"{where}.model")
    if verb == "evaluate" and (file := typed.evaluation.candidates):
        if not Path(file).is_file():
            raise UserError(f"There is no file {file}. Set evaluation.candidates to an npy or a parquet file, or to null.")
        return typed, {"candidates": sha256(Path(file))}
    return typed, {}


def _content_of(base: Any) -> dict[str, Any]:
    """The identity of the language model that a stage trains; none where it has none."""
    if base is None:
        return {}
    from lit_llmers.teachers.base import BaseConfig, content_of

    return content_of(BaseConfig.of(base))


def _shares(strategy: str, verb: str, entry: dict[str, Any]) -> bool:
    """Whether the run's strategy is of use to a stage: nothing small is sharded, and what is counted has no gradients."""
    if strategy in SHARDED:
        return verb == "tune" or (verb == "fit" and "base" in (entry.get("model") or {}))
    return verb != "fit" or not _counts(entry["fit"])


def _counts(backbone: str) -> bool:
    """Whether nothing of it is trained."""
    from lit_llmers.backbones import CountingBackbone
    from lit_llmers.building import find

    return issubclass(find("backbones", backbone), CountingBackbone)


def _needs(verb: str, typed: Any, entries: dict[str, Any]) -> list[str]:
    """Names of the stages whose artefacts a stage reads."""
    if verb == "prepare":
        return []
    preparing = [name for name, entry in entries.items() if "prepare" in entry]
    if verb == "fit":
        from lit_llmers.building import references

        return list(dict.fromkeys([*preparing, *(reference.stage for reference in references(typed))]))
    of = getattr(typed, "of", [])
    return [*preparing, *([of] if isinstance(of, str) else of)]


def _check_needs(name: str, typed: Any, planned: dict[str, list[Stage]]) -> None:
    """Each reference must lead to a stage that leaves what is read there.

    Raises:
        UserError: it leads to a stage of another kind, or to one that leaves no such vectors.
    """
    wanted: list[tuple[str, str, tuple[str, ...]]] = []
    if isinstance(typed, FitStage):
        from lit_llmers.building import KINDS, RECORDS, references

        for reference in references(typed):
            wanted.append((f"stages.{name}.{reference.where}", reference.stage, KINDS[reference.kind]))
            source = planned[reference.stage][0].config
            if isinstance(source, RecordStage) and source.record != RECORDS.get(reference.kind, source.record):
                raise UserError(
                    f"'stages.{name}.{reference.where}' needs a record of {RECORDS[reference.kind]}, but stage "
                    f"'{reference.stage}' records {source.record}. Name another stage, or change its 'record'."
                )
            if reference.kind == "users" and isinstance(source, EncodeStage) and source.users is None:
                raise UserError(
                    f"'stages.{name}.{reference.where}' needs vectors of users, but stage '{reference.stage}' leaves none. Set "
                    f"stages.{reference.stage}.users to {', '.join(USER_VECTORS[:-1])} or {USER_VECTORS[-1]}."
                )
            if reference.kind == "items" and isinstance(source, FitStage) and _counts(source.fit):
                raise UserError(
                    f"'stages.{name}.{reference.where}' needs vectors of items, but stage '{reference.stage}' leaves none: "
                    f"{source.fit} is counted and not trained. Name another stage."
                )
    elif hasattr(typed, "of"):
        of = [typed.of] if isinstance(typed.of, str) else typed.of
        ranks = isinstance(typed, EvaluateStage) or getattr(typed, "record", None) == "ranking"  # all that a tuned one does
        wanted = [(f"stages.{name}.of", model, ("fit", "tune") if ranks else ("fit",)) for model in of]
    for where, other, verbs in wanted:
        if planned[other][0].verb not in verbs:
            raise UserError(
                f"'{where}' names stage '{other}', which is a {planned[other][0].verb} stage. Name a stage that has "
                f"'{' or '.join(verbs)}'."
            )


def _of_seed(planned: dict[str, list[Stage]], wanted: list[str], seed: int, verb: str) -> list[Stage]:
    """The needed stages: of the same seed where they are repeated, of every seed for a stage that gathers."""
    if verb == "export":
        return [planned[need][0] for need in wanted]
    return [
        stage for need in wanted for stage in planned[need] if verb == "evaluate" or not stage.repeated or stage.seed == seed
    ]
