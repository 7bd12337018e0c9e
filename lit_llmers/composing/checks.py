"""Checks of one fit stage before anything runs: its names, its arguments, and what goes with what. Across stages:
`lit_llmers.composing.compatibility`."""

import inspect
from typing import Any

from lit_llmers.backbones import Backbone, CollaborativeBackbone, CountingBackbone
from lit_llmers.building import INJECTED, KINDS, RECORDS, find, own
from lit_llmers.conf.schema import SHARDED, TrainerConfig
from lit_llmers.conf.stages import FitStage
from lit_llmers.conf.typed import checked
from lit_llmers.errors import UserError, nearest
from lit_llmers.teachers.base import BaseConfig

PAIRWISE = ("bpr", "bce", "sampled_softmax")  # losses of a collaborative student
POSITIVE = ("dim", "heads", "hidden", "ffn", "horizontal", "vertical", "init_std")  # of 0 nothing is there, or nothing learns
NOT_NEGATIVE = ("reg",)
STUDENTS = {
    Backbone: "a student that reads histories, such as student=sasrec",
    CollaborativeBackbone: "one that learns users and items from pairs, such as student=lightgcn",
}


def check(stage: FitStage, where: str) -> None:
    """Check the names and arguments of a fit stage before anything runs.

    Raises:
        UserError: an unknown backbone, callback or argument, or a missing one.
    """
    backbone = find("backbones", stage.fit)
    _check_arguments(backbone, stage.model, f"{where}.model", set())
    if "base" in stage.model:
        base = BaseConfig.of(stage.model["base"])
        if base.path and base.prompt and stage.sequences.examples == "sequence":
            raise UserError(
                f"'{where}': the base '{base.name}' has a prompt, whose response tokens come after the last item, so only "
                "one position of a row can be read. Use sequences.examples=prefixes or last, or teacher.prompt=false."
            )
    if _shows_labels(stage.model) and stage.sequences.examples == "sequence":
        raise UserError(
            f"'{where}.model' has official_no_causal_mask, which shows each position what it is to predict. Use "
            f"{where}.sequences.examples=prefixes, or accept_visible_labels=true beside it to train so all the same."
        )
    if "item_table" in inspect.signature(backbone).parameters and not stage.items:
        raise UserError(
            f"'{where}.items' is missing: {stage.fit} reads the item table of another stage. Name that stage there, take a "
            "recipe that has one, such as recipe=slmrec, or choose another student."
        )
    _check_fit(stage, backbone, where)
    if issubclass(backbone, CountingBackbone) and (stage.initial or stage.fusion or stage.objective or stage.callbacks):
        raise UserError(
            f"'{where}': {stage.fit} is counted and not trained, so nothing can be added to it. Choose another student."
        )
    for key in ("fusion", "objective", "callbacks"):
        for position, entry in enumerate(getattr(stage, key)):
            if len(entry) != 1:
                raise UserError(f"'{where}.{key}[{position}]' must be one name and its arguments, as {{name: {{key: value}}}}.")
            for name, arguments in entry.items():
                checked(arguments, dict | None, f"{where}.{key}.{name}")
                if key == "fusion":
                    _check_fusion(name, arguments or {}, backbone, stage, f"{where}.{key}.{name}")
                else:
                    _check_callback(name, arguments or {}, backbone, f"{where}.{key}.{name}")
                    _check_of_users(name, arguments or {}, backbone, f"{where}.{key}.{position}.{name}")
    _check_processes(stage, where)
    _check_sparse(stage, where)
    for kind, named in (("fusion", stage.fusions), ("callback", stage.terms)):
        given = [name for name, _ in named]
        for name in given:
            if given.count(name) > 1:
                raise UserError(
                    f"'{where}' has the {kind} {name} twice. Give it once; a second would take the place of the first."
                )


def check_base_of(trainer: TrainerConfig, base: Any, where: str) -> None:
    """A sharded strategy cuts up a base.

    Args:
        base: settings of the stage's base, None if it has none.

    Raises:
        UserError: there is none, or its weights have a precision that DeepSpeed does not mix with the rest's.
    """
    if trainer.strategy not in SHARDED:
        return
    if base is None:
        raise UserError(
            f"'{where}' has no language model that trainer.strategy={trainer.strategy} could cut up. Use ddp or auto."
        )
    if trainer.compile:
        raise UserError(f"'{where}': trainer.compile does not go with trainer.strategy={trainer.strategy}. Leave it out.")
    if trainer.strategy.startswith("zero"):
        dtype, precision = BaseConfig.of(base).dtype, trainer.precision
        fitting = {"float32": ("32-true", "bf16-mixed", "16-mixed"), "bfloat16": ("bf16-mixed", "bf16-true")}
        known = fitting.get(dtype, ("16-mixed",))
        if precision not in known:
            raise UserError(
                f"'{where}': trainer.strategy={trainer.strategy} has one precision for all weights, but the base's are {dtype} "
                f"and trainer.precision is {precision}. Use trainer.precision={known[0]}, or another dtype of the base."
            )


def _check_arguments(cls: type, arguments: dict[str, Any], where: str, given: set[str]) -> None:
    """Names, types and ranges; a whole number becomes the float that it is meant for, in place."""
    parameters = inspect.signature(cls).parameters
    own = [name for name in parameters if name not in given | INJECTED]
    for key in arguments:
        if key not in own:
            known = f"It has: {', '.join(own)}." if own else "It has no settings."
            raise UserError(f"Unknown configuration key '{where}.{key}'.{nearest(key, own)} {known}")
        arguments[key] = checked(arguments[key], parameters[key].annotation, f"{where}.{key}")
        _check_range(key, arguments[key], f"{where}.{key}")
    for name in own:
        if parameters[name].default is inspect.Parameter.empty and name not in arguments:
            raise UserError(f"'{where}.{name}' is missing: {cls.__name__} needs it.")


def _check_range(key: str, value: Any, where: str) -> None:
    """What means the same in every model: see the names above; and dropout is a share."""
    if not isinstance(value, int | float):
        return
    if key in POSITIVE and not value > 0:
        raise UserError(f"'{where}' is {value}. It must be {'at least 1' if isinstance(value, int) else 'positive'}.")
    if key in NOT_NEGATIVE and value < 0:
        raise UserError(f"'{where}' is {value}. It must be 0 (no effect) or more.")
    if key.endswith("dropout") and not 0 <= value <= 1:
        raise UserError(f"'{where}' is {value}. It is a share, from 0 to 1.")


def _check_processes(stage: FitStage, where: str) -> None:
    """What is trained must be possible with the stage's strategy and its number of processes."""
    check_base_of(stage.trainer, stage.model.get("base"), where)
    if stage.trainer.processes == 1:
        return
    if stage.model.get("sparse"):
        raise UserError(f"'{where}': model.sparse=true trains in one process. Use model.sparse=false, or trainer.devices=1.")
    for name, arguments in stage.terms:
        if find("callbacks", name).compares_rows(arguments):
            raise UserError(
                f"'{where}': {name} puts all rows of a batch beside each other, but each of {stage.trainer.processes} "
                f"processes has its own. Train this stage in one: {where}.trainer={{strategy: auto, devices: 1, num_nodes: 1}}."
            )


def _check_sparse(stage: FitStage, where: str) -> None:
    """With gradients of a batch's rows alone, nothing may touch all rows."""
    if not stage.model.get("sparse"):
        return
    touching = {
        "loss.kind=cross_entropy (but sampled_softmax, bce, gbce and bpr do)": stage.loss.kind == "cross_entropy",
        "optimizer.weight_decay": stage.optimizer.weight_decay,
        "trainer.gradient_clip_val": stage.trainer.gradient_clip_val,
        "fusion": stage.fusion,
        "objective": stage.objective,
        "callbacks": stage.callbacks,
    }
    named = [name for name, given in touching.items() if given]
    if named:
        raise UserError(
            f"'{where}': with model.sparse=true a step touches the rows of its batch alone, which does not go with "
            f"{', '.join(named)}. Take {'it' if len(named) == 1 else 'them'} out, or use model.sparse=false."
        )


def _check_fit(stage: FitStage, backbone: Any, where: str) -> None:
    """Model, examples and loss must go together."""
    kind, examples = stage.loss.kind, stage.sequences.examples
    if issubclass(backbone, CollaborativeBackbone) and kind not in PAIRWISE:
        raise UserError(f"'{where}.loss.kind' is {kind}, but {stage.fit} learns from pairs. Choose {' or '.join(PAIRWISE)}.")
    if stage.initial and getattr(backbone, "initialise", None) is CollaborativeBackbone.initialise:
        raise UserError(f"'{where}.initial': {stage.fit} has no table that could start from another. Leave it out.")
    if issubclass(backbone, Backbone) and not backbone.every_position and examples == "sequence":
        raise UserError(
            f"'{where}': {stage.fit} reads one position of a row, so sequences.examples=sequence does not fit. Use "
            f"stages.{where.rpartition('.')[2]}.sequences.examples=prefixes, or last."
        )
    if issubclass(backbone, Backbone) and not backbone.causal and stage.sequences.context:
        raise UserError(
            f"'{where}': {stage.fit} learns items that are hidden anywhere in a row, so no part of it can be context alone. "
            f"Leave sequences.context={stage.sequences.context} out."
        )


def _check_callback(name: str, arguments: dict[str, Any], backbone: Any, where: str) -> None:
    cls = find("callbacks", name)
    if not issubclass(backbone, cls.fits):
        kinds = cls.fits if isinstance(cls.fits, tuple) else (cls.fits,)
        wanted = " or ".join(STUDENTS.get(kind, f"{kind.__name__} or what is built on it") for kind in kinds)
        raise UserError(f"'{where}' does not fit {backbone.__name__}. It needs {wanted}.")
    _check_sources(cls, arguments, where)
    if set(RECORDS) & set(cls.sources) and issubclass(backbone, Backbone) and not backbone.causal:
        raise UserError(
            f"'{where}': the teacher spoke about what comes next, after a target's history or (per: user) after all of a "
            f"user's, but {backbone.__name__} does not train on next items: it fills places between items that it sees on both "
            "sides, and a user's list leaves out every item that stood there. Choose a causal sequential student, such as "
            "student=sasrec."
        )
    _check_rows(cls, backbone, where)


def _check_of_users(name: str, arguments: dict[str, Any], backbone: Any, where: str) -> None:
    """What is of a table of users is given to a student that has one."""
    if issubclass(backbone, CollaborativeBackbone):
        return
    for key in find("callbacks", name).of_user_table:
        if arguments.get(key) is not None:
            raise UserError(
                f"'{where}.{key}' has no effect: {backbone.__name__} has no table of users. Leave it out, as "
                f"{where}.{key}=null, or choose a collaborative student, such as student=lightgcn."
            )


def _check_rows(cls: Any, backbone: Any, where: str) -> None:
    """What reads whole rows does not go with a backbone that trains on rows in which items are hidden."""
    if cls.whole_rows and not backbone.causal:
        raise UserError(
            f"'{where}' reads whole histories, but {backbone.__name__} trains on rows in which items are hidden. Choose a "
            "causal sequential student, such as student=sasrec."
        )


def _check_fusion(name: str, arguments: dict[str, Any], backbone: Any, stage: FitStage, where: str) -> None:
    cls = find("fusion", name)
    if not issubclass(backbone, Backbone):
        raise UserError(
            f"'{where}' stands between the items of a history and its reading; {stage.fit} reads no history. Choose a "
            "sequential student, such as student=sasrec."
        )
    if (cls.reads_ahead or _shows_labels(arguments)) and stage.sequences.examples == "sequence":
        raise UserError(
            f"'{where}' mixes all positions of a row, so that one sees what comes after it. Use "
            f"stages.{where.split('.')[1]}.sequences.examples=prefixes, or last"
            f"{', or accept_visible_labels=true to train so all the same' if _shows_labels(arguments) else ''}."
        )
    _check_rows(cls, backbone, where)
    _check_sources(cls, arguments, where)


def _shows_labels(arguments: dict[str, Any]) -> bool:
    """Whether a switch of an official code lets a position see what comes after it, and that was not accepted."""
    return bool(arguments.get("official_no_causal_mask")) and not arguments.get("accept_visible_labels")


def _check_sources(cls: Any, arguments: dict[str, Any], where: str) -> None:
    """What a callback or fusion is made with: stages that it names, and arguments of its own."""
    parameters = inspect.signature(cls).parameters
    for parameter, (key, kind) in cls.sources.items():
        given, verbs = arguments.get(key), " or ".join(KINDS[kind])
        what = f"a {verbs} stage (record: {RECORDS[kind]})" if kind in RECORDS else f"a {verbs} stage"
        if given is None and parameters[parameter].default is inspect.Parameter.empty:
            raise UserError(f"'{where}.{key}' is missing: name {what} of the recipe.")
        if given is not None and not isinstance(given, str):
            raise UserError(f"'{where}.{key}' is {given!r}. It takes the name of one stage: {what} of the recipe.")
    mine = own(cls, arguments)
    _check_arguments(cls, mine, where, {"backbone", *cls.sources})
    arguments |= mine
