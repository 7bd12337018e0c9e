"""The `fit` stage: train one recommender, from the last checkpoint if there is one, and keep its best epoch."""

if __name__ == "__main__":
    from lit_llmers.stages import no_command

    no_command("training", "student")  # before anything that takes time is imported


from typing import Any

import lightning as L
import numpy as np

from lit_llmers.building import RECORDS, build_callbacks, references
from lit_llmers.callbacks.float32 import TrainInFloat32
from lit_llmers.callbacks.preemption import StopWhenAsked, leave_signals_alone
from lit_llmers.callbacks.progress import Progress
from lit_llmers.callbacks.resume import BestCheckpoint, LastCheckpoint, SeedEachStep
from lit_llmers.callbacks.throughput import Throughput
from lit_llmers.conf.stages import FitStage
from lit_llmers.data.dataset import Dataset
from lit_llmers.files import atomic_write
from lit_llmers.loggers import finish_loggers
from lit_llmers.models import (
    build_model,
    count_parameters,
    data_module,
    load_dataset,
    load_model,
    load_sources,
    offers,
)
from lit_llmers.processes.strategies import construction, make_strategy
from lit_llmers.record import open_signals
from lit_llmers.stages import TABLE, Stage

MONITOR = "val/NDCG@10"


def run(stage: Stage) -> dict[str, Any]:
    """Train the model of a fit stage and leave `best.ckpt`, `item_table.npy` and `metrics.jsonl` in its folder.

    Returns:
        what the stage's `DONE` says; of several processes the first one alone has something to say.
    """
    config: FitStage = stage.config
    dataset = load_dataset(stage)
    L.seed_everything(stage.seed, verbose=False)
    data = data_module(stage, dataset)
    with construction(config.trainer):
        model: Any = build_model(stage, dataset)
    terms = build_callbacks(config, _sources(stage, dataset, data), offers(stage, dataset))
    plateau = config.optimizer.schedule == "plateau"
    best = BestCheckpoint(stage.folder / "best.ckpt", stage.label, MONITOR, config.trainer.patience, plateau)
    last = LastCheckpoint(stage.folder / "last.ckpt", stage.fingerprint, config.trainer)
    throughput = Throughput()
    trainer = make_trainer(stage, [SeedEachStep(stage.seed), throughput, Progress(stage.label), *terms, best, last])
    L.seed_everything(stage.seed, verbose=False)  # what callbacks add starts the same, whatever the signals' source drew
    if config.trainer.compile:
        model.backbone.compile(dynamic=True)  # batches differ in length
    if any(parameter.requires_grad for parameter in model.parameters()):
        trainer.fit(model, datamodule=data, ckpt_path=last.found(), weights_only=True)
    else:  # it was counted when it was built
        trainer.validate(model, datamodule=data, verbose=False)
    if not trainer.is_global_zero:
        return {}
    model = load_model(stage, dataset)
    if (table := model.item_table()) is not None:
        with atomic_write(stage.folder / TABLE) as temporary, open(temporary, "wb") as file:
            np.save(file, table.detach().float().cpu().numpy(), allow_pickle=False)
    summary = {
        "parameters": count_parameters(model),
        "layers": model.backbone.layers,
        "width": model.backbone.width,
        "epochs": throughput.epochs,
        "train_seconds": throughput.seconds,
        **throughput.speed,
        "best": best.summary,
    }
    finish_loggers(trainer.loggers, summary)
    return summary


def _sources(stage: Stage, dataset: Dataset, data: Any) -> dict[str, Any]:
    """What other stages left for the stage's callbacks, by reference."""
    recorded = {
        reference.argument: open_signals(stage.need(reference.stage), data.rows)
        for reference in references(stage.config)
        if reference.kind in RECORDS
    }
    return recorded | load_sources(stage, dataset, "callbacks")


def make_trainer(stage: Stage, callbacks: list[L.Callback]) -> L.Trainer:
    """Lightning's Trainer with the stage's settings."""
    settings = stage.config.trainer
    weights = [TrainInFloat32()] if settings.trains_in_float32 else []
    stopping = [StopWhenAsked(each) for each in callbacks if isinstance(each, LastCheckpoint)]
    trainer = L.Trainer(
        accelerator=settings.accelerator,
        strategy=make_strategy(settings),
        devices=settings.devices,
        num_nodes=settings.num_nodes,
        precision=settings.precision,
        max_epochs=settings.max_epochs,
        check_val_every_n_epoch=settings.validate_every,
        accumulate_grad_batches=settings.accumulate_grad_batches,
        gradient_clip_val=settings.gradient_clip_val,
        limit_train_batches=settings.limit_train_batches,
        log_every_n_steps=settings.log_every,
        num_sanity_val_steps=0,
        logger=stage.loggers(),
        callbacks=[*callbacks, *weights, *stopping],
        enable_checkpointing=False,  # LastCheckpoint and BestCheckpoint
        enable_progress_bar=False,  # Progress
        enable_model_summary=False,
        use_distributed_sampler=False,  # the loader shards itself
        default_root_dir=stage.folder,
    )
    leave_signals_alone(trainer)
    return trainer
