"""A job that Slurm started again must go on with what it had begun."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_llmers.errors import UserError
from lit_llmers.files import digest, read_json

if TYPE_CHECKING:
    from lit_llmers.stages import Stage

SHOWN = 5  # settings that differ


def refuse_changed_settings(stages: "Sequence[Stage]", environment: Mapping[str, str] = os.environ) -> None:
    """Refuse to begin anew, in a requeued job, a stage that was interrupted with other settings.

    Raises:
        UserError: it names the settings that differ and the cure.
    """
    if int(environment.get("SLURM_RESTART_COUNT") or 0) < 1:
        return
    for stage in stages:
        if stage.folder.exists():
            continue
        for folder in sorted(stage.run.folder.glob(f"{stage.label}-{'[0-9a-f]' * len(digest(None))}")):
            if (folder / "last.ckpt").exists() and (folder / "config.json").is_file():
                raise UserError(
                    f"This job was started again by Slurm, but stage '{stage.label}' has other settings now than when it was "
                    f"interrupted: {_difference(stage, folder)}. Its checkpoint is in {folder}. Give the settings that it "
                    "began with, and it goes on from there. To train with the new ones, remove that folder or submit a new job."
                )


def _difference(stage: "Stage", folder: Path) -> str:
    before = dict(_flat(read_json(folder / "config.json")["settings"]))
    now = dict(_flat(asdict(stage.config)))
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if not keys:
        needs = ", ".join(need.label for need in stage.needs)
        return f"a stage that it needs has changed ({needs}), or the data have"
    named = [f"stages.{stage.name}.{key} was {before.get(key)} and is {now.get(key)}" for key in keys[:SHOWN]]
    return "; ".join(named) + (f"; and {len(keys) - SHOWN} more" if len(keys) > SHOWN else "")


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value
