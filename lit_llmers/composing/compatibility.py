"""Checks across stages: what one asks of another must be what that one has. Of one stage: `lit_llmers.composing.checks`."""

import inspect
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from lit_llmers.backbones import Backbone, CollaborativeBackbone, CountingBackbone
from lit_llmers.building import RECORDS, Reference, build_backbone, build_callbacks, build_fusions, find, references
from lit_llmers.callbacks.distillation import Distillation
from lit_llmers.conf.encoding import EncodeStage
from lit_llmers.conf.instruction import TuneStage
from lit_llmers.conf.stages import FitStage, RecordStage
from lit_llmers.data import DataConfig
from lit_llmers.data.sources import about_texts
from lit_llmers.data.texts import check_leaks
from lit_llmers.errors import UserError, unknown
from lit_llmers.students.collaborative import CollaborativeRecommender
from lit_llmers.students.counting import CountingRecommender
from lit_llmers.students.recommender import Recommender
from lit_llmers.students.sequential import SequentialRecommender
from lit_llmers.teachers.base import BaseConfig, load_base, without_weights

log = logging.getLogger(__name__)


def check_texts(stages: dict[str, Any]) -> None:
    """Check that texts of items and of users are read as such, and none that may betray held-out items unless it is allowed.

    Args:
        stages: typed settings of all stages, by name.

    Raises:
        UserError: one is not.
    """
    about = {
        name: entry for data in stages.values() if isinstance(data, DataConfig) for name, entry in about_texts(data).items()
    }
    of_users = [name for name, entry in about.items() if entry["of"] == "users"]
    for name, stage in stages.items():
        if not isinstance(stage, EncodeStage | TuneStage):
            continue
        if isinstance(stage, EncodeStage) and stage.profile is not None and stage.profile not in of_users:
            raise unknown("text of users (profile), to be named in data.texts too", stage.profile, of_users)
        for text in stage.fields:
            if text in of_users:
                raise UserError(
                    f"'{text}' (stages.{name}.fields) is a text of users. Encode it with users: profile and profile: {text}."
                )
        check_leaks(name, stage.read if isinstance(stage, EncodeStage) else stage.fields, stage.allow_leaking, about)


def check_blocks(stages: dict[str, Any]) -> None:
    """Check that every depth can be cut into the blocks that callbacks and records ask for.

    Args:
        stages: typed settings of all stages, by name.

    Raises:
        UserError: one cannot.
    """
    for name, stage in stages.items():
        asked: list[tuple[str, int]] = []
        if isinstance(stage, RecordStage) and stage.record == "block_states":
            asked = [(stage.of, stage.blocks)]
        elif isinstance(stage, FitStage):
            for callback, given in stage.terms:
                if "signals" in find("callbacks", callback).sources:
                    asked.append((name, stages[given["from"]].blocks))
                if "blocks" in (parameters := inspect.signature(find("callbacks", callback)).parameters):
                    asked.append((name, given.get("blocks", parameters["blocks"].default)))
        for model, blocks in asked:
            layers = _layers(stages[model])
            if blocks < 1 or layers % blocks:
                fit, depth = stages[model].fit, f"{layers} layer{'s' if layers != 1 else ''}"
                cure = f"Choose stages.{model}.model.layers divisible by them, or other blocks."
                if blocks > 0 and "layers" not in inspect.signature(find("backbones", fit)).parameters:
                    cure = f"{fit} always has as many, so it does not fit: choose one that has model.layers, as student=sasrec."
                raise UserError(
                    f"The {depth} of stage '{model}' cannot be cut into the {blocks} equal blocks that stage "
                    f"'{name}' asks for. {cure}"
                )


def check_parts(stages: dict[str, Any]) -> None:
    """Check the settings of all students, fusions and callbacks, as each does when it is made, which may be days later.

    They are made for one item, of what stands for the work of other stages: vectors of ones, and records without content; and
    language models and loss terms without their weights. What cannot be made of that, and models of the hub, have their
    settings checked when they are made in earnest.

    Args:
        stages: typed settings of all stages, by name.

    Raises:
        UserError: a setting that is refused, more items of a teacher's list than it has, or vectors of other widths.
    """
    for name, stage in stages.items():
        if isinstance(stage, TuneStage) and _at_hand(stage.base):
            _rehearse(name, lambda: load_base(replace(BaseConfig.of(stage.base), prompt=False), layers=1))  # noqa: B023
        if not isinstance(stage, FitStage):
            continue
        _check_initial(name, stage, stages)
        callbacks = _rehearse(
            name,
            lambda: build_callbacks(stage, _sources(stage, stages), _offered(stage, stages)),  # noqa: B023
        )
        for reference in references(stage):
            if reference.argument.startswith("callbacks."):
                _check_read(name, stage, reference, stages[reference.stage])
        if _at_hand(stage.model.get("base")):
            student = _rehearse(name, lambda: _recommender(stage, stages))  # noqa: B023
            if student is not None and callbacks:
                _check_terms(name, stage, stages, callbacks, student)


def _rehearse(name: str, make: Callable[[], Any]) -> Any:
    """Make parts of a stage, and pass on what they refuse; None where they cannot be made yet."""
    try:
        with torch.random.fork_rng(devices=[]), without_weights():
            return make()
    except UserError as error:
        raise UserError(f"Stage '{name}': {error}") from error
    except Exception as error:
        log.debug("Parts of '%s' cannot be made before their sources are there: %r", name, error)
        return None


def _at_hand(base: Any) -> bool:
    """Whether a model's language model, if it has one, can be made without the network."""
    path = None if base is None else BaseConfig.of(base).path
    return path is None or Path(path).is_dir()


def _check_read(name: str, stage: FitStage, reference: Reference, source: Any) -> None:
    """What a callback asks of a teacher's lists and vectors must be in them."""
    term = reference.where.split(".")[1]
    settings = dict(stage.terms)[term]
    if reference.kind == "ranking" and settings.get("k") is not None and settings["k"] > source.k:
        raise UserError(
            f"'stages.{name}.callbacks.{term}.k' is {settings['k']}, but the lists of stage '{reference.stage}' have "
            f"{source.k} items. Lower it, or set stages.{reference.stage}.k={settings['k']}."
        )
    if reference.kind != "items" or not find("callbacks", term).compares_as_they_are(settings):
        return
    own, theirs = _dim(stage), _dim(source)
    if own is not None and theirs is not None and own != theirs:
        raise UserError(
            f"'stages.{name}.callbacks.{term}' compares vectors as they are, but those of '{name}' have {own} "
            f"numbers and those of '{reference.stage}' {theirs}. Let it map them, or give both the same dim."
        )


def _check_terms(
    name: str, stage: FitStage, stages: dict[str, Any], callbacks: list[Distillation], student: Recommender
) -> None:
    """Student and callbacks must fit together, as far as the vectors that are compared have a width that is known."""
    for callback, (term, settings) in zip(callbacks, stage.terms, strict=True):
        compares = callback.compares_as_they_are(settings)
        read = [each for each in references(stage) if each.kind in ("items", "users")]
        read = [each for each in read if each.argument.startswith(f"callbacks.{term}.") or (compares and each.where == "items")]
        if all(_dim(stages[each.stage]) is not None for each in read):
            with torch.device("meta"):
                _rehearse(name, lambda: callback.build(student))  # noqa: B023


def _check_initial(name: str, stage: FitStage, stages: dict[str, Any]) -> None:
    """What an item table starts from must be as wide, or wider to be cut; the table stands inside all fusions."""
    if stage.initial is None:
        return
    own, theirs = _inner_dim(stage), _dim(stages[stage.initial.items])
    if own is None or theirs is None or own == theirs or (stage.initial.reduce and own < theirs):
        return
    if stage.initial.reduce is None:
        raise UserError(
            f"'stages.{name}.initial' copies vectors as they are, but those of '{stage.initial.items}' have {theirs} numbers "
            f"and the item table of '{name}' {own}. Set stages.{name}.initial.reduce=pca, or give both the same dim."
        )
    raise UserError(
        f"'stages.{name}.initial' cuts vectors to the {own} columns of the item table of '{name}', but those of "
        f"'{stage.initial.items}' have {theirs}. Set stages.{name}.model.dim={theirs} or less, or make the vectors wider "
        f"(stages.{stage.initial.items})."
    )


def _dim(stage: Any) -> int | None:
    """Width of the item vectors that a stage leaves, where its settings say so."""
    if isinstance(stage, EncodeStage):
        if isinstance(stage.reduce, str):
            return None
        return stage.reduce if stage.encode == "transformer" else stage.dim
    inner = _inner_dim(stage)
    return None if inner is None else inner * math.prod(find("fusion", fusion).widens for fusion, _ in stage.fusions)


def _inner_dim(stage: FitStage) -> int | None:
    """Width of a backbone's own item vectors, where its settings say so."""
    argument = inspect.signature(find("backbones", stage.fit)).parameters.get("dim")
    if argument is None or not isinstance(argument.default, int):
        return None
    return int(stage.model.get("dim", argument.default))


def _recommender(stage: FitStage, stages: dict[str, Any]) -> Recommender:
    """The stage's model as callbacks find it, for one item."""
    backbone = _student(stage, stages)
    if isinstance(backbone, CountingBackbone):
        return CountingRecommender(backbone)
    if isinstance(backbone, CollaborativeBackbone):
        return CollaborativeRecommender(backbone, stage.optimizer, stage.loss)
    return SequentialRecommender(backbone, stage.optimizer, stage.loss)


def _student(stage: FitStage, stages: dict[str, Any]) -> Any:
    """The stage's backbone and what wraps it, for one item."""
    backbone = build_backbone(stage, 0, offered := _offered(stage, stages))
    sources = _sources(stage, stages)
    return build_fusions(stage, backbone, sources, offered) if isinstance(backbone, Backbone) else backbone


def _sources(stage: FitStage, stages: dict[str, Any]) -> dict[str, Any]:
    """What its parts can be made of in place of what other stages will leave."""
    return {each.argument: _stand_in(each.kind, stages[each.stage], stages) for each in references(stage)}


def _stand_in(kind: str, source: Any, stages: dict[str, Any]) -> Any:
    if kind == "ranking":
        return SimpleNamespace(k=source.k)
    if kind == "signals":
        return SimpleNamespace(shape=(source.blocks, 1))
    return _student(source, stages) if kind == "model" else _vectors(source)


def _vectors(source: Any) -> torch.Tensor:
    """Item vectors of one item, as wide as a stage's where its settings say so, or else as an encoder's often are."""
    return torch.ones(2, _dim(source) or 768)


def _offered(stage: FitStage, stages: dict[str, Any]) -> dict[str, Any]:
    """The same in place of what the data will offer: `lit_llmers.building.INJECTED`."""
    return {
        "n_items": 1,
        "n_users": 2,
        "max_length": stage.sequences.max_length,
        "item_table": _vectors(stages[stage.items[0]]) if stage.items else None,
        "training_pairs": torch.zeros(0, 2, dtype=torch.int64).numpy(),
        "popularity": torch.zeros(2, dtype=torch.int64),
        "histories": None,
    }


def check_targets(stages: dict[str, Any]) -> None:
    """Check that who is asked for an answer to each training target, and who reads it, know the same targets.

    Args:
        stages: typed settings of all stages, by name.

    Raises:
        UserError: a model does not read histories in order, a student takes other targets of a user than its teacher, or a
            teacher is to stand beside a student that asks for lists.
    """
    for name, stage in stages.items():
        if isinstance(stage, RecordStage) and stage.signals.online and not any(_online(each) for each in stages.values()):
            raise UserError(
                f"signals.online=true has no effect: stage '{name}' records lists, which are made before a student trains, and "
                "no stage records hidden states, for which the teacher can stand beside it. Leave signals.online out."
            )
        if isinstance(stage, RecordStage) and stage.of_targets and not _in_order(stages[stage.of]):
            cure = f"Set stages.{name}.per=user." if stage.record == "ranking" else "Record another one."
            raise UserError(
                f"Stage '{stage.of}' cannot answer '{name}' after each training target, for it does not read a history up to "
                f"there. {cure}"
            )
        for reference in references(stage) if isinstance(stage, FitStage) else []:
            record = stages[reference.stage]
            if reference.kind in RECORDS and record.of_targets and not record.online:
                _check_same_targets(name, stage, reference, record, stages[record.of].sequences.most_targets)


def _online(stage: Any) -> bool:
    return isinstance(stage, RecordStage) and stage.online


def _in_order(stage: FitStage | TuneStage) -> bool:
    """Whether the model of a stage reads a user's history up to any point of it."""
    if isinstance(stage, TuneStage):
        return True
    backbone = find("backbones", stage.fit)
    return issubclass(backbone, Backbone) and backbone.causal


def _check_same_targets(name: str, stage: FitStage, reference: Reference, record: RecordStage, most: int) -> None:
    own = stage.sequences.most_targets if _in_order(stage) else None
    if own == most:
        return
    where = f"stages.{name}.sequences"
    cures = [f"{where}.targets_per_user={most}"]
    if stage.sequences.examples == "last":
        cures.insert(0, f"{where}.examples=prefixes")
    cure = [" ".join(cures)] if own is not None else []
    cure += [f"stages.{reference.stage}.per=user"] if record.record == "ranking" else []
    taken = "users, and none of their targets" if own is None else f"{_targets(own)} of a user"
    raise UserError(
        f"'stages.{name}.{reference.where}': stage '{reference.stage}' has an answer for {_targets(most)} of a user, as "
        f"'{record.of}' trains on, but '{name}' trains on {taken}. Set {', or '.join(cure)}."
    )


def _targets(most: int) -> str:
    """What `SequenceConfig.most_targets` means, in words."""
    return f"the latest {most} targets" if most > 1 else "the latest target" if most else "all targets"


def _layers(stage: FitStage) -> int:
    backbone = find("backbones", stage.fit)
    argument = inspect.signature(backbone).parameters.get("layers")
    return int(stage.model.get("layers", backbone.layers if argument is None else argument.default))
