"""Stages: what a recipe is made of. Each reads the artefacts of those it needs and leaves one folder.

The folder's name bears a fingerprint of all that could change its content, so nothing is ever guessed: the same command
finds the same folders, skips those that are done and goes on in the one that is not; a changed setting gives new names to
exactly the stages that it affects.
"""

import importlib
import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lit_llmers.conf.schema import SECTIONS, SHARDED, TrainerConfig, build, fingerprinted
from lit_llmers.conf.stages import EncodeStage, EvaluateStage, ExportStage, FitStage, RecordStage, TuneStage
from lit_llmers.errors import UserError, nearest, unknown
from lit_llmers.files import digest, previous, read_json, remove, sha256, write_json
from lit_llmers.locks import LOCK, Busy, alone
from lit_llmers.preemption import stop_if_asked
from lit_llmers.processes import Processes, launch

FORMAT = 2  # raised when an artefact's format changes, so that no old one is taken for new
MODULES = {
    "prepare": "lit_llmers.prepare",
    "encode": "lit_llmers.encode",
    "fit": "lit_llmers.training",
    "tune": "lit_llmers.tuning",
    "record": "lit_llmers.record",
    "evaluate": "lit_llmers.evaluate",
    "export": "lit_llmers.export",
}
TRAINING = ("sequences", "optimizer", "trainer")
SHARED = {"fit": TRAINING, "tune": TRAINING, "record": ("signals",), "evaluate": ("evaluation",)}
GATHERING = ("evaluate", "export")  # run once, over all seeds
PLACE = {"accelerator", "strategy", "devices", "num_nodes", "compile"}
NOT_IN_FINGERPRINT = {  # where and how often, not what: for each verb, settings that cannot change the artefact
    "prepare": {"root", "path"},  # the checksums of the files are in `content`
    "encode": PLACE | {"model", "adapter", "checkpoint_every", "log_every"},  # checksums of the first two are too
    "fit": PLACE | {"checkpoint_every", "log_every"},
    "tune": PLACE | {"checkpoint_every", "log_every", "generation"},  # the last is in `content` of those that ask
}

LAST = "last.ckpt"
LEFT = (LAST, previous(Path(LAST)).name, LOCK)  # by a process that was killed after its stage was done

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """One run of one recipe: `folder` holds its stages and its report; `logger` says where metrics go besides."""

    folder: Path
    recipe: str
    name: str
    logger: dict[str, Any]

    def loggers(self, folder: Path, label: str, settings: dict[str, Any], identity: str = "") -> list[Any]:
        """The loggers of one stage of this run, `label`; W&B shows the run's stages as one group."""
        from lit_llmers.loggers import make_loggers

        run_id = "-".join(part for part in (self.recipe, self.name, label, identity) if part)
        group = f"{self.recipe}/{self.name}"
        folder.mkdir(parents=True, exist_ok=True)
        return make_loggers({"logger": self.logger}, folder, group=group, name=label, run_id=run_id, settings=settings)


@dataclass
class Stage:
    """One stage for one seed.

    Attributes:
        name: as in the recipe.
        verb: what it does, a key of `MODULES`.
        config: its typed settings.
        seed: of everything random in it.
        needs: the stages whose artefacts it reads.
        content: identity of what it reads from outside the run, such as the checksums of data files.
        repeated: whether it is run once for each seed.
        run: the run that it belongs to.
    """

    name: str
    verb: str
    config: Any
    seed: int
    needs: list["Stage"]
    run: Run
    content: dict[str, Any] = field(default_factory=dict)
    repeated: bool = False

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits over format, settings, seed, outside content and the stages it needs."""
        settings = _without(NOT_IN_FINGERPRINT.get(self.verb, set()), fingerprinted(self.config))
        needs = [need.fingerprint for need in self.needs]
        return digest([FORMAT, self.verb, settings, self.seed, self.content, needs])

    @property
    def label(self) -> str:
        return f"{self.name}-seed{self.seed}" if self.repeated else self.name

    @property
    def folder(self) -> Path:
        return self.run.folder / f"{self.label}-{self.fingerprint}"

    def loggers(self) -> list[Any]:
        """Where this stage's metrics go."""
        return self.run.loggers(self.folder, self.label, asdict(self.config), self.fingerprint)

    @property
    def done(self) -> bool:
        return (self.folder / "DONE").is_file()

    @property
    def summary(self) -> dict[str, Any]:
        """What the stage reported when it was done."""
        return read_json(self.folder / "DONE")["summary"]

    @property
    def processes(self) -> int:
        """How many processes run it together; a teacher is recorded by as many as have trained it."""
        return 1 if self.trainer is None else self.trainer.processes

    @property
    def trainer(self) -> TrainerConfig | None:
        """Where and how it trains; of a record, where and how its teacher did; None for what does neither."""
        config = self.need(self.config.of).config if self.verb == "record" else self.config
        return getattr(config, "trainer", None)

    def need(self, name: str) -> "Stage":
        """The stage of that name that this one needs."""
        return next(stage for stage in self.needs if stage.name == name)


def _without(keys: set[str], settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without some keys, at the top and one level below."""
    kept = {key: value for key, value in settings.items() if key not in keys}
    if "trainer" in kept:
        kept["trainer"] = {key: value for key, value in kept["trainer"].items() if key not in keys}
    return kept


# ---- from a composed recipe to a list of stages ------------------------------------------------------------------------------


def plan(config: dict[str, Any]) -> list[Stage]:
    """Turn a composed recipe into typed stages in run order, checked before anything runs.

    Raises:
        UserError: an unknown verb, key, stage name or option, or a stage that needs a later one.
    """
    for section in ("run", "stages"):
        if section not in config:
            raise UserError(
                f"The recipe '{config['recipe']}' lacks '{section}'. See recipes/slmrec.yaml: it begins with /base."
            )
    for section, cls in SECTIONS.items():
        build(cls, config[section], section)
    _check_seeds(config["seed"], config["seeds"])
    place = config["run"]
    run = Run(Path(place["dir"]) / config["recipe"] / place["name"], config["recipe"], place["name"], config["logger"])
    entries = {name: _inherit(name, config["stages"]) for name in config["stages"]}
    for name in config["repeat"]:
        if name not in entries:
            raise unknown("stage in 'repeat'", name, entries)
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
    from lit_llmers.compatibility import check_blocks, check_targets

    settings = {name: stages[0].config for name, stages in planned.items()}
    check_targets(settings)
    check_blocks(settings)
    return [stage for stages in planned.values() for stage in stages]


def _check_seeds(seed: Any, seeds: Any) -> None:
    if type(seed) is not int or seed < 0:
        raise UserError(f"seed is {seed}. It must be a whole number from 0.")
    if not isinstance(seeds, list) or not seeds or any(type(each) is not int or each < 0 for each in seeds):
        raise UserError(f"seeds is {seeds}. It must be a list of whole numbers from 0, as seeds=[0,1,2].")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"seeds is {seeds}. It must be a list of different whole numbers.")


def _inherit(name: str, stages: dict[str, Any], chain: tuple[str, ...] = ()) -> dict[str, Any]:
    """Follow `like`: the settings of another stage, or those of an option group, with this one's on top.

    Mappings are merged key by key, lists and everything else replaced.
    """
    entry = dict(stages[name] or {})
    other = entry.pop("like", None)
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

        data = build(DataConfig, config["data"], "data")
        return data, source_of(data).fingerprint()
    ranked = config["evaluation"]
    if verb == "fit":
        entry = {**entry, "mask_history": ranked["mask_history"], "validation_users": ranked["users"]}
    if verb == "tune":
        entry = {**entry, "mask_history": ranked["mask_history"]}
    trains = verb == "encode" and (entry["encode"] == "said" or entry.get("contrast") is not None)
    for section in ("optimizer", "trainer") if trains else SHARED.get(verb, ()):  # the run's own, with the stage's on top
        said = entry.get(section, {})
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
        from lit_llmers.building import check

        check(typed, where)
    if verb == "tune":
        from lit_llmers.building import check_base_of
        from lit_llmers.teachers.base import BaseConfig

        BaseConfig.of(typed.base)
        check_base_of(typed.trainer, typed.base, where)
    if verb == "encode":
        from lit_llmers.text.prompts import check_prompt
        from lit_llmers.text.transformer import identity

        check_prompt(typed.prompt, typed.fields, f"{where}.prompt")
        check_prompt(typed.user_prompt, ["history"], f"{where}.user_prompt")
        return typed, identity(typed)
    if verb == "evaluate" and (file := typed.evaluation.candidates):
        if not Path(file).is_file():
            raise UserError(f"There is no file {file}. Set evaluation.candidates to an npy or a parquet file, or to null.")
        return typed, {"candidates": sha256(Path(file))}
    return typed, {}


def _shares(strategy: str, verb: str, entry: dict[str, Any]) -> bool:
    """Whether the run's strategy is of use to a stage: nothing small is sharded, and what is counted has no gradients."""
    if strategy in SHARDED:
        return verb == "tune" or (verb == "fit" and "base" in (entry.get("model") or {}))
    from lit_llmers.backbones import CountingBackbone
    from lit_llmers.building import find

    return verb != "fit" or not issubclass(find("backbones", entry["fit"]), CountingBackbone)


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
        UserError: it leads to a stage of another kind.
    """
    wanted: list[tuple[str, str, tuple[str, ...]]] = []
    if isinstance(typed, FitStage):
        from lit_llmers.building import KINDS, RECORDS, references

        for reference in references(typed):
            wanted.append((f"stages.{name}.{reference.where}", reference.stage, KINDS[reference.kind]))
            record = planned[reference.stage][0].config
            if isinstance(record, RecordStage) and record.record != RECORDS.get(reference.kind, record.record):
                raise UserError(
                    f"'stages.{name}.{reference.where}' needs a record of {RECORDS[reference.kind]}, but stage "
                    f"'{reference.stage}' records {record.record}. Name another stage, or change its 'record'."
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


# ---- running -----------------------------------------------------------------------------------------------------------------


def run(stages: list[Stage], until: str | None, only: str | None = None, arguments: Sequence[str] = ()) -> list[Stage]:
    """Run the stages in order, those that are done excepted.

    Args:
        until: name of the stage to stop after.
        only: name of the stage to run alone, for all its seeds; what it needs must be done.
        arguments: of the command, which processes are started with for a stage that needs several.

    Returns:
        the stages that are done now.

    Raises:
        UserError: there is no such stage, or it is for another number of processes than there are.
        Stopped: the process was asked to stop, and the command goes on from here when it is given again.
    """
    selected = select(stages, until, only)
    here = Processes.here()
    todo = [stage for stage in selected if not stage.done]
    here.check(todo)
    check_machine(todo)
    for stage in selected:
        stop_if_asked()
        if stage.done:
            log.info("%-24s done before, skipped (%s)", stage.label, stage.folder.name)
            if here.first and any((stage.folder / left).exists() for left in LEFT):  # killed between `DONE` and the end
                with suppress(Busy), alone(stage.folder):
                    _tidy(stage)
        elif stage.processes > here.world:
            log.info("%-24s on %d processes", stage.name, stage.processes)
            launch(stage.name, stage.processes, arguments)
        elif stage.processes == 1 and not here.first:
            here.wait_for(stage)
        else:
            with alone(stage.folder) if here.first else nullcontext():
                _run_one(stage, here)
    return selected


def check_machine(stages: list[Stage]) -> None:
    """Every stage's strategy must be one that this machine can run; see `lit_llmers.strategies`."""
    settings = [stage.trainer for stage in stages if stage.trainer is not None and stage.trainer.strategy != "auto"]
    if settings:
        from lit_llmers import strategies

        for trainer in settings:
            strategies.check_machine(trainer)


def select(stages: list[Stage], until: str | None, only: str | None = None) -> list[Stage]:
    """The stages that `run` runs or finds done."""
    names = list(dict.fromkeys(stage.name for stage in stages))
    if until is not None and only is not None:
        raise UserError(f"stage={until} stops after a stage and only={only} runs one alone. Leave one of them out.")
    for name in (until, only):
        if name is not None and name not in names:
            raise unknown("stage", name, names)
    if only is not None:
        return [stage for stage in stages if stage.name == only]
    return stages if until is None else [stage for stage in stages if names.index(stage.name) <= names.index(until)]


def check_needs_done(selected: list[Stage]) -> None:
    """What stages that are run alone read must be there.

    Raises:
        UserError: a stage that one of them needs is not done.
    """
    for stage in selected:
        missing = [need for need in stage.needs if not need.done]
        if missing and not stage.done:
            labels = ", ".join(need.label for need in missing)
            raise UserError(
                f"Stage '{stage.label}' (only={stage.name}) needs {labels}: not done in {stage.run.folder} with these "
                f"settings. Run only={missing[0].name} first, or leave only={stage.name} out."
            )


def _run_one(stage: Stage, here: Processes) -> None:
    """Run a stage by this process, or by each of a group."""
    if stage.done:  # by another command, before this one had the lock
        return
    if here.first:
        begun = (stage.folder / "config.json").is_file()
        log.info("%-24s %s (%s)", stage.label, "goes on" if begun else "starts", stage.folder.name)
        settings = {"stage": stage.name, "verb": stage.verb, "seed": stage.seed, "settings": asdict(stage.config)}
        write_json(stage.folder / "config.json", settings)
    started = time.monotonic()
    module = importlib.import_module(MODULES[stage.verb])
    with here.sign_of_life(stage.folder):
        with here.group() if stage.processes > 1 else nullcontext():
            summary = module.run(stage)
        if not here.first:
            here.wait_for(stage)
            return
    seconds = time.monotonic() - started
    if stage.verb not in ("fit", "tune"):  # which log while they train
        from lit_llmers.loggers import finish_loggers

        finish_loggers(stage.loggers(), {"seconds": seconds, **summary})
    write_json(stage.folder / "DONE", {"seconds": seconds, "summary": summary})
    _tidy(stage)
    log.info("%-24s done in %.1f s", stage.label, seconds)


def _tidy(stage: Stage) -> None:
    """Remove the checkpoint that is of no more use once the stage is done."""
    for path in (last := stage.folder / LAST, previous(last)):
        remove(path)


def describe(stages: list[Stage]) -> list[dict[str, Any]]:
    """What the report needs to know of each stage, JSON-able."""
    return [
        {"name": s.name, "seed": s.seed, "verb": s.verb, "folder": s.folder.name, "fingerprint": s.fingerprint} for s in stages
    ]
