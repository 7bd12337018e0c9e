"""Stages: what a recipe is made of. Each reads the artefacts of those it needs and leaves one folder.

The folder's name bears a fingerprint of all that could change its content, so nothing is ever guessed: the same command
finds the same folders, skips those that are done and goes on in the one that is not; a changed setting gives new names to
exactly the stages that it affects.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lit_llmers.conf.schema import TrainerConfig, fingerprinted
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
PLACE = {"accelerator", "strategy", "devices", "num_nodes", "compile"}
NOT_IN_FINGERPRINT = {  # where and how often, not what: for each verb, settings that cannot change the artefact
    "prepare": {"root", "path"},  # the checksums of the files are in `content`
    "encode": PLACE | {"model", "adapter", "checkpoint_every", "log_every"},  # checksums of the first two are too
    "fit": PLACE | {"checkpoint_every", "log_every"},
    "tune": PLACE | {"checkpoint_every", "log_every", "generation"},  # the last is in `content` of those that ask
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
        """Twelve hexadecimal digits over format, settings, seed, outside content and the stages it needs."""
        left_out = NOT_IN_FINGERPRINT.get(self.verb, set())
        if self.verb == "encode" and not self.config.trains:
            left_out = left_out | {"optimizer", "trainer"}
        settings = _without(left_out, fingerprinted(self.config))
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


def describe(stages: list[Stage]) -> list[dict[str, Any]]:
    """What the report needs to know of each stage, JSON-able."""
    return [
        {"name": s.name, "seed": s.seed, "verb": s.verb, "folder": s.folder.name, "fingerprint": s.fingerprint} for s in stages
    ]
