"""From a name and arguments in a recipe to an object: backbones, fusions and callbacks, by convention and without a registry.

`fit: llm_decoder` is the class LLMDecoder in `lit_llmers/backbones/llm_decoder.py`; `feature_distillation` is
FeatureDistillation in `lit_llmers/callbacks/feature_distillation.py`. Nothing outside lit_llmers is ever resolved.
"""

import importlib
import inspect
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from lit_llmers.backbones import Backbone, CollaborativeBackbone, CountingBackbone
from lit_llmers.callbacks.distillation import Distillation
from lit_llmers.conf.stages import FitStage
from lit_llmers.errors import UserError, unknown
from lit_llmers.teachers.base import BaseConfig

INJECTED = {"n_items", "n_users", "max_length", "item_table", "training_pairs", "popularity", "histories"}
RECORDS = {"signals": "block_states", "ranking": "ranking"}  # kinds of sources that record stages leave, and as what
KINDS = {  # of artefacts that a callback or a fusion can read -> the verbs of the stages that leave them
    "signals": ("record",),
    "ranking": ("record",),
    "items": ("fit", "encode"),  # item vectors [n+1, D]
    "users": ("encode",),  # user vectors [U, D]
    "model": ("fit",),  # the trained backbone
}


def find(room: str, name: str) -> Any:
    """The class that a file in `lit_llmers/<room>` is named after.

    Raises:
        UserError: there is no such file, or no such class in it; the message lists those there are.
    """
    files = [path.stem for path in (Path(__file__).parent / room).glob("*.py") if path.stem != "__init__"]
    found = _class(room, name) if name in files else None
    if found is None:
        refused = unknown(f"name in lit_llmers/{room}", name, [file for file in files if _class(room, file)])
        called = str(name).title().replace("_", "")
        own = f" {name}.py is there, but no class {called} in it that a recipe can name." if name in files else ""
        raise UserError(f"{refused}{own}")
    return found


def _class(room: str, name: str) -> Any:
    module = importlib.import_module(f"lit_llmers.{room}.{name}")
    plain = name.replace("_", "")
    classes = [value for key, value in vars(module).items() if key.lower() == plain and isinstance(value, type)]
    kinds = Backbone | CollaborativeBackbone | CountingBackbone | Distillation
    return next((cls for cls in classes if issubclass(cls, kinds) and cls is not Distillation), None)


@dataclass(frozen=True)
class Reference:
    """One stage that another names in its settings.

    Attributes:
        where: the key, for messages.
        stage: the name that stands there.
        kind: of artefact, a key of `KINDS`.
        argument: room, class and constructor argument that it is read for, as `callbacks.alignment.items`; empty for keys of
            the stage itself.
    """

    where: str
    stage: str
    kind: str
    argument: str = ""


def references(stage: FitStage) -> list[Reference]:
    """All stages that a fit stage names, in order."""
    found = [Reference("items", item, "items") for item in stage.items]
    if stage.initial is not None:
        found.append(Reference("initial.items", stage.initial.items, "items"))
    for room, entries in (("fusion", stage.fusions), ("callbacks", stage.terms)):
        for name, arguments in entries:
            for parameter, (key, kind) in find(room, name).sources.items():
                if arguments.get(key) is not None:
                    found.append(Reference(f"{room}.{name}.{key}", arguments[key], kind, f"{room}.{name}.{parameter}"))
    return found


def own(cls: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that name no stage."""
    keys = {key for key, _ in cls.sources.values()}
    return {key: value for key, value in arguments.items() if key not in keys}


def build_backbone(stage: FitStage, seed: int, offered: dict[str, Any]) -> nn.Module:
    """Make the stage's backbone.

    Args:
        seed: of the stage; an LLM base that is built from scratch draws its weights from this seed plus its own.
        offered: the arguments in `INJECTED`, of which the backbone takes those it names; a function makes what is costly.
    """
    cls = find("backbones", stage.fit)
    wanted = inspect.signature(cls).parameters
    arguments = dict(stage.model)
    if "base" in arguments:
        base = BaseConfig.of(arguments["base"])
        arguments["base"] = replace(base, seed=base.seed + seed)
    return cls(**_taken(wanted, offered), **arguments)


def build_fusions(stage: FitStage, backbone: Backbone, sources: dict[str, Any], offered: dict[str, Any]) -> Backbone:
    """Wrap the backbone in the stage's fusions.

    Args:
        sources: what each reference of the fusions reads, by its `argument`; one that is left out is as if it were not given.
        offered: as in `build_backbone`.
    """
    for name, arguments in stage.fusions:
        backbone = _build("fusion", name, arguments, sources, offered, backbone=backbone)
    return backbone


def build_callbacks(stage: FitStage, sources: dict[str, Any], offered: dict[str, Any]) -> list[Distillation]:
    """Make the stage's callbacks; `sources` and `offered` as in `build_fusions`."""
    return [_build("callbacks", name, arguments, sources, offered) for name, arguments in stage.terms]


def _build(
    room: str, name: str, arguments: dict[str, Any], sources: dict[str, Any], offered: dict[str, Any], **also: Any
) -> Any:
    cls = find(room, name)
    read = {
        parameter: sources[f"{room}.{name}.{parameter}"] for parameter in cls.sources if f"{room}.{name}.{parameter}" in sources
    }
    return cls(**also, **read, **_taken(inspect.signature(cls).parameters, offered), **own(cls, arguments))


def _taken(wanted: Any, offered: dict[str, Any]) -> dict[str, Any]:
    """Of what is offered that which is wanted; a function makes what is costly."""
    return {key: value() if callable(value) else value for key, value in offered.items() if key in wanted}
