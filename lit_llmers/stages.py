"""Stages: what a recipe is made of. Each reads the artefacts of those it needs and leaves one folder.

The folder's name bears a fingerprint of all that could change its content, so nothing is ever guessed: the same command
finds the same folders, skips those that are done and goes on in the one that is not; a changed setting gives new names to
exactly the stages that it affects.
"""

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from lit_llmers.conf.schema import TrainerConfig
from lit_llmers.conf.typed import fingerprinted
from lit_llmers.errors import UserError
from lit_llmers.files import digest, read_json

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
PLACE = {f"trainer.{key}" for key in ("accelerator", "strategy", "devices", "num_nodes", "compile")}
OFTEN = {f"trainer.{key}" for key in ("checkpoint_every", "log_every")}
NOT_IN_FINGERPRINT = {  # where and how often, not what: for each verb, settings that cannot change the artefact
    "prepare": {"root", "path", "made_from"},  # the checksums of the files are in `content`, and whether a text leaks
    # those of the model and the adapter are too
    "encode": PLACE | OFTEN | {"model", "adapter", "contrast.gradient_checkpointing"},
    "fit": PLACE | OFTEN | {"model.base.gradient_checkpointing"},
    "tune": PLACE | OFTEN | {"base.gradient_checkpointing", "generation"},  # the last is in `content` of those that ask
    "record": {"batch_size", "signals.shard_rows"},
    "evaluate": {"evaluation.batch_size"},
}
# of a verb, as "tune", a part of a fit stage, as "callbacks.hint" or "callbacks.hint.map=mlp", or parts that a stage has all
# of: raised, from 1, when a mended bug in it or in its losses changes results, so that what was made before is not taken for
# done
REVISIONS: dict[str, int] = {
    "export": 2,  # model.onnx misread histories longer than max_length
    "callbacks.sequence_contrast": 1,  # a row's contrast weighed as much as all of its targets
    # training items of a pair's user were drawn to stand under the list, and counted in the student's ranks
    **{f"callbacks.ranking_distillation backbones.{name}": 1 for name in ("alpharec", "bpr_mf", "lightgcn", "mixgcf")},
    "callbacks.ranking_distillation.loss=listwise": 1,  # items of the list behind its first k were drawn to stand under it
    # scores were scaled over what was cut or drawn from a list
    "callbacks.response_distillation.scaled=True": 1,
    **{f"callbacks.ranking_distillation.sampler={name}": 1 for name in ("rank", "discrepancy")},
}
TABLE = "item_table.npy"  # the item vectors that a fit or encode stage leaves to others, [n+1, d] float32
USER_TABLE = "user_table.npy"  # the user vectors that an encode stage may leave, [U, d] float32
CHECKSUMS = {  # of a key of `content` -> the paths that it makes up for, where it is there
    "base": {"model.base.path", "base.path"},
    "candidates": {"evaluation.candidates"},
}


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
        """Twelve hexadecimal digits over format, settings, seed, outside content, the stages it needs and revised code."""
        left_out = NOT_IN_FINGERPRINT.get(self.verb, set())
        if self.verb == "encode" and not self.config.trains:
            left_out = left_out | {"optimizer", "trainer"}
        left_out = left_out.union(*(paths for key, paths in CHECKSUMS.items() if key in self.content))
        settings = _without(left_out, fingerprinted(self.config))
        needs = [need.fingerprint for need in self.needs]
        parts = {self.verb, *getattr(self.config, "parts", [])}
        revised = {named: number for named, number in REVISIONS.items() if parts.issuperset(named.split())}
        return digest([FORMAT, self.verb, settings, self.seed, self.content, needs, *([revised] if revised else [])])

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

    def check_own(self) -> None:
        """Check that what is in the folder was made by this very stage.

        Raises:
            UserError: it was copied or renamed from another one's.
        """
        left = read_json(self.folder / "DONE").get("fingerprint", self.fingerprint)  # an older version did not say
        if left != self.fingerprint:
            raise UserError(
                f"What lies in {self.folder.resolve()} was made by another stage or with other settings: its DONE has the "
                f"fingerprint {left}, stage '{self.label}' has {self.fingerprint}. Remove the folder and give the same command "
                "again."
            )

    @property
    def checksums(self) -> dict[str, str]:
        """SHA-256 of the tables that it left, by file; none of what an older version left."""
        return read_json(self.folder / "DONE").get("sha256", {}) if self.done else {}

    @property
    def processes(self) -> int:
        """How many processes run it together; a teacher is recorded by as many as have trained it."""
        return 1 if self.trainer is None else self.trainer.processes

    @property
    def trainer(self) -> TrainerConfig | None:
        """Where and how it trains; of a record, where and how its teacher did; None for what does neither.

        Nor does a record whose teacher answers its student's own batches.
        """
        if self.verb == "record" and self.config.online:
            return None
        config = self.need(self.config.of).config if self.verb == "record" else self.config
        return getattr(config, "trainer", None)

    def need(self, name: str) -> "Stage":
        """The stage of that name that this one needs."""
        return next(stage for stage in self.needs if stage.name == name)


def _without(keys: set[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without some keys; one that stands below others is written `trainer.devices`."""
    kept = {}
    for key, value in settings.items():
        below = {each.partition(".")[2] for each in keys if each.startswith(f"{key}.")}
        if key not in keys:
            kept[key] = _without(below, value) if below and isinstance(value, Mapping) else value
    return kept


def no_command(file: str, stage: str | None = None) -> NoReturn:
    """What `python -m` says of the file of a verb: how its stages are run, one of which is called `stage`, or as the file."""
    stage = stage or file
    print(
        f"lit_llmers.{file} is a kind of stage and no command. 'python -m lit_llmers.fit recipe=NAME stage={stage}' runs a "
        f"recipe up to its stage of that name, and only={stage} that one alone.",
        file=sys.stderr,
    )
    sys.exit(2)


def describe(stages: list[Stage]) -> list[dict[str, Any]]:
    """What the report needs to know of each stage, JSON-able."""
    return [
        {"name": s.name, "seed": s.seed, "verb": s.verb, "folder": s.folder.name, "fingerprint": s.fingerprint} for s in stages
    ]
