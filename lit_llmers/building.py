"""From a name and arguments in a recipe to an object: backbones and callbacks, by convention and without a registry.

`fit: llm_decoder` is the class LLMDecoder in `lit_llmers/backbones/llm_decoder.py`; `feature_distillation` is
FeatureDistillation in `lit_llmers/callbacks/feature_distillation.py`. Nothing outside lit_llmers is ever resolved.
"""

import importlib
import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_llmers.backbones import Backbone
from lit_llmers.callbacks.distillation import Distillation, SignalSource
from lit_llmers.conf.schema import FitStage, RecordStage, check_type
from lit_llmers.errors import UserError, nearest, unknown
from lit_llmers.teachers.base import BaseConfig

INJECTED = {"n_items", "max_length", "item_table"}


def find(room: str, name: str) -> type:
    """The class that a file in `lit_llmers/<room>` is named after.

    Raises:
        UserError: there is no such file; the message lists those there are.
    """
    files = [path.stem for path in (Path(__file__).parent / room).glob("*.py") if path.stem != "__init__"]
    if name not in files:
        raise unknown(f"name in lit_llmers/{room}", name, [file for file in files if _class(room, file)])
    found = _class(room, name)
    if found is None:
        raise unknown(f"name in lit_llmers/{room}", name, [file for file in files if _class(room, file)])
    return found


def _class(room: str, name: str) -> type | None:
    module = importlib.import_module(f"lit_llmers.{room}.{name}")
    plain = name.replace("_", "")
    classes = [value for key, value in vars(module).items() if key.lower() == plain and isinstance(value, type)]
    return next((cls for cls in classes if issubclass(cls, Backbone | Distillation) and cls is not Distillation), None)


def _check_arguments(cls: type, arguments: dict[str, Any], where: str, given: set[str]) -> None:
    parameters = inspect.signature(cls).parameters
    own = [name for name in parameters if name not in given]
    for key in arguments:
        if key not in own:
            raise UserError(f"Unknown configuration key '{where}.{key}'.{nearest(key, own)} It has: {', '.join(own)}.")
        check_type(arguments[key], parameters[key].annotation, f"{where}.{key}")
    for name in own:
        if parameters[name].default is inspect.Parameter.empty and name not in arguments:
            raise UserError(f"'{where}.{name}' is missing: {cls.__name__} needs it.")


def check(stage: FitStage, where: str) -> None:
    """Check the names and arguments of a fit stage before anything runs.

    Raises:
        UserError: an unknown backbone, callback or argument, or a missing one.
    """
    backbone = find("backbones", stage.fit)
    _check_arguments(backbone, stage.model, f"{where}.model", INJECTED)
    if "base" in stage.model:
        base = BaseConfig.of(stage.model["base"])
        if base.path and base.prompt and stage.sequences.examples == "sequence":
            raise UserError(
                f"'{where}': the base '{base.name}' has a prompt, whose response tokens come after the last item, so only "
                "one position of a row can be read. Use sequences.examples=prefixes or last, or teacher.prompt=false."
            )
    if "item_table" in inspect.signature(backbone).parameters and not stage.items:
        raise UserError(f"'{where}.items' is missing: {stage.fit} reads the item table of another stage.")
    for position, callback in enumerate(stage.callbacks):
        if not isinstance(callback, dict) or len(callback) != 1:
            raise UserError(f"'{where}.callbacks[{position}]' must be one name and its arguments, as {{name: {{key: value}}}}.")
        for name, arguments in callback.items():
            cls = find("callbacks", name)
            wants_signals = "signals" in inspect.signature(cls).parameters
            if wants_signals and "from" not in (arguments or {}):
                raise UserError(f"'{where}.callbacks.{name}.from' is missing: name the stage that recorded the teacher.")
            own = {key: value for key, value in (arguments or {}).items() if key != "from"}
            _check_arguments(cls, own, f"{where}.callbacks.{name}", {"signals"})


def check_blocks(stages: dict[str, Any]) -> None:
    """Check that every depth can be cut into the blocks that callbacks and records ask for.

    Args:
        stages: typed settings of all stages, by name.

    Raises:
        UserError: one cannot.
    """
    for name, stage in stages.items():
        asked: list[tuple[str, int]] = []
        if isinstance(stage, RecordStage):
            asked = [(stage.of, stage.blocks)]
        elif isinstance(stage, FitStage):
            for callback, given in ((key, own or {}) for entry in stage.callbacks for key, own in entry.items()):
                if "from" in given:
                    asked.append((name, stages[given["from"]].blocks))
                if "blocks" in (parameters := inspect.signature(find("callbacks", callback)).parameters):
                    asked.append((name, given.get("blocks", parameters["blocks"].default)))
        for model, blocks in asked:
            layers = _layers(stages[model])
            if blocks < 1 or layers % blocks:
                raise UserError(
                    f"The {layers} layers of stage '{model}' cannot be cut into the {blocks} equal blocks that stage "
                    f"'{name}' asks for. Choose stages.{model}.model.layers divisible by them, or other blocks."
                )


def _layers(stage: FitStage) -> int:
    default = inspect.signature(find("backbones", stage.fit)).parameters["layers"].default
    return int(stage.model.get("layers", default))


def build_backbone(stage: FitStage, seed: int, n_items: int, item_table: Tensor | None) -> Backbone:
    """Make the stage's backbone.

    Args:
        seed: of the stage; an LLM base that is built from scratch draws its weights from this seed plus its own.
        item_table: `[n_items+1, d]` float32, the tables of the stages in `items` side by side.
    """
    cls = find("backbones", stage.fit)
    offered = {"n_items": n_items, "max_length": stage.sequences.max_length, "item_table": item_table}
    wanted = inspect.signature(cls).parameters
    arguments = dict(stage.model)
    if "base" in arguments:
        base = BaseConfig.of(arguments["base"])
        arguments["base"] = replace(base, seed=base.seed + seed)
    return cls(**{key: value for key, value in offered.items() if key in wanted}, **arguments)


def build_callbacks(stage: FitStage, signals: dict[str, SignalSource]) -> list[Distillation]:
    """Make the stage's callbacks; `signals` holds the source behind each stage that a `from` names."""
    made = []
    for callback in stage.callbacks:
        for name, arguments in callback.items():
            own = {key: value for key, value in (arguments or {}).items() if key != "from"}
            if "from" in (arguments or {}):
                own["signals"] = signals[arguments["from"]]
            made.append(find("callbacks", name)(**own))
    return made
