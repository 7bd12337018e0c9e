"""Run by torchrun: each process trains the stages of `CASES` under their strategies, below the folder that it is given.

What the stages need was done there before, in the run `auto`, whose own stages they are compared with by
`test_strategies.py`. Two things differ from a user's run: tensors of the base are cut up however small they are, and some
cases are stopped in their first validation, killed inside their second epoch, and begun again each time.
"""

import json
import signal
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lightning as L
import torch
from tiny import by_name, small

from lit_llmers import preemption
from lit_llmers.fit import quiet
from lit_llmers.processes import Processes, strategies
from lit_llmers.stages import MODULES, Stage

LORA = "{rank: 4, alpha: 8, dropout: 0.0, targets: [q_proj, v_proj, down_proj]}"
TWENTY = ["trainer.max_epochs=2", "trainer.batch_size=16", "trainer.patience=0", "trainer.checkpoint_every=4"]
TEACHER = [*TWENTY, "stages.teacher.model.dropout=0"]
CASES: dict[str, dict[str, Any]] = {
    # twenty steps of all weights, the item table among them
    "full": {"stage": "teacher", "settings": [*TEACHER, "stages.teacher.model.train_items=true"]},
    # adapters and prompt of a base that is read from a folder; the last step of an epoch has two micro-batches of four
    "lora": {
        "stage": "teacher",
        "settings": [
            *TEACHER,
            "teacher=local",
            "teacher.path={base}",
            "teacher.dtype=float32",
            "stages.teacher.model.layers=2",
            "stages.student.model.layers=2",
            "sequences.examples=last",
            f"teacher.lora={LORA}",
            "trainer.accumulate_grad_batches=4",
            "teacher.gradient_checkpointing=true",
            "optimizer.schedule=cosine",
            "optimizer.warmup_steps=2",
        ],
    },
    # loss terms with weights of their own, which read a record
    "terms": {
        "stage": "student",
        "settings": [
            *TEACHER,
            "stages.student.model.dropout=0",
            "stages.student.callbacks=[{feature_distillation:{from:signals}},{deep_supervision:{blocks:2}}]",
        ],
    },
    "said": {
        "stage": "teacher",
        "recipe": "bigrec",
        "settings": [*TWENTY, "stages.teacher.samples=70", "stages.teacher.trainer={batch_size: 16, max_epochs: 2}"],
    },
    "said-lora": {
        "stage": "teacher",
        "recipe": "bigrec",
        "settings": [
            *TWENTY,
            "stages.teacher.samples=70",
            "stages.teacher.trainer={batch_size: 16, max_epochs: 2}",
            f"teacher.lora={LORA}",
        ],
    },
    "sasrec": {"stage": "student", "recipe": "student", "settings": [*TWENTY, "stages.student.model.dropout=0"]},
    "lightgcn": {"stage": "student", "recipe": "student", "settings": [*TWENTY, "student=lightgcn"]},
}
EVERY = ("ddp", "zero2", "zero3", "fsdp2")
RUNS = [  # case, strategy, whether it is stopped and killed and begun again
    *(("full", strategy, False) for strategy in (*EVERY, "zero3-offload")),
    *(("lora", strategy, True) for strategy in EVERY),
    ("terms", "zero3", False),
    ("said", "zero3", False),
    *(("said-lora", strategy, False) for strategy in ("zero3", "fsdp2")),
    ("sasrec", "ddp", False),
    ("lightgcn", "ddp", False),
]


class Killed(Exception):
    """Stands for kill -9: nothing of ours runs after it."""


class KillInSecondEpoch(L.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if (trainer.current_epoch, batch_idx) == (1, 7):
            raise Killed


class AskInFirstValidation(L.Callback):
    """Asks the last process alone to stop, as a signal does."""

    def on_validation_start(self, trainer, pl_module) -> None:
        if trainer.current_epoch == 0 and trainer.global_rank == trainer.world_size - 1:
            preemption._asked = signal.SIGUSR1


class Look(L.Callback):
    """Notes what the weights are before the first step, and what share of the base each process holds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_start(self, trainer, pl_module) -> None:
        state = strategies.whole_state(trainer)
        if trainer.is_global_zero and not trainer.global_step:
            torch.save(state, self.folder / "initial.pt")
        if hasattr(pl_module, "ranker") or hasattr(pl_module.backbone, "base"):
            own = total = 0
            for each in strategies.base_of(pl_module).parameters():
                shard = each.ds_tensor if hasattr(each, "ds_tensor") else each.to_local() if hasattr(each, "to_local") else each
                own, total = own + shard.numel(), total + getattr(each, "ds_numel", each.numel())
            (self.folder / f"share-{trainer.global_rank}.json").write_text(json.dumps(own / total))


def stages(root: Path, case: str, strategy: str = "auto", again: bool = False) -> dict[str, Stage]:
    """The stages of a case's recipe in its run, which bears the strategy's name."""
    settings = [each.replace("{base}", str(root / "base")) for each in CASES[case]["settings"]]
    place = [f"run.name={case}-{strategy}{'-again' * again}"]
    if strategy != "auto":
        place += [f"trainer.strategy={strategy}", "trainer.devices=2"]
    return by_name(small(root, *settings, *place, recipe=CASES[case].get("recipe", "slmrec")))


def stage_of(root: Path, case: str, strategy: str = "auto", again: bool = False) -> Stage:
    """The stage that a case is about."""
    return stages(root, case, strategy, again)[CASES[case]["stage"]]


def train(stage: Stage, *also: L.Callback) -> dict[str, Any]:
    module = import_module(MODULES[stage.verb])
    make = module.make_trainer
    module.make_trainer = lambda stage, callbacks: make(stage, [*callbacks, Look(stage.folder), *also])
    try:
        return module.run(stage)
    finally:
        module.make_trainer = make


def main(root: Path, wanted: list[str]) -> None:
    quiet()
    torch.set_num_threads(1)
    strategies.PERSISTENT = 0
    here = Processes.here()
    for case, strategy, again in RUNS:
        started = time.monotonic()
        if wanted and f"{case}-{strategy}" not in wanted:
            continue
        stage = stage_of(root, case, strategy, again)
        if again:
            for how, by in ((preemption.Stopped, AskInFirstValidation()), (Killed, KillInSecondEpoch())):
                try:
                    train(stage, by)
                except how:
                    assert (stage.folder / "last.ckpt").exists()
                    assert (stage.folder / "best.ckpt").exists() == (how is Killed), "one validation was ended"
                else:
                    raise AssertionError(f"it was to be {how.__name__}")
                preemption._asked = None
        summary = train(stage)
        if here.first:
            (stage.folder / "summary.json").write_text(json.dumps(summary))
            print(f"{case}-{strategy}{'-again' * again}: {time.monotonic() - started:.1f} s", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
