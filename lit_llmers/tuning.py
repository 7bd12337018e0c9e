"""The `tune` stage: teach a language model to say the next item's title, and keep its best epoch."""

if __name__ == "__main__":
    from lit_llmers.stages import no_command

    no_command("tuning", "teacher")  # before anything that takes time is imported


from typing import Any

import lightning as L

from lit_llmers.callbacks.progress import Progress
from lit_llmers.callbacks.resume import BestCheckpoint, LastCheckpoint, SeedEachStep
from lit_llmers.callbacks.throughput import Throughput
from lit_llmers.conf.instruction import VALIDATING, TuneStage
from lit_llmers.conf.schema import SHARDED
from lit_llmers.data.texts import leaking
from lit_llmers.loggers import finish_loggers
from lit_llmers.models import load_dataset
from lit_llmers.processes.strategies import construction
from lit_llmers.stages import Stage
from lit_llmers.teachers.grounding import GroundedRecommender
from lit_llmers.teachers.instruct import InstructedModel
from lit_llmers.teachers.instructions import InstructionData
from lit_llmers.teachers.language_model import build_language_model, load_tuned, load_wording, save_language_model
from lit_llmers.training import make_trainer

MONITORS = {"loss": "val/log_likelihood", "ranking": "val/NDCG@10"}
MODEL = "model"  # folder of the stage that PEFT and transformers load


def run(stage: Stage) -> dict[str, Any]:
    """Tune the stage's base and leave `best.ckpt`, `metrics.jsonl` and the folder `model` in the stage's folder.

    Returns:
        what the stage's `DONE` says; of several processes the first one alone has something to say.
    """
    config: TuneStage = stage.config
    dataset = load_dataset(stage)
    L.seed_everything(stage.seed, verbose=False)
    wording = load_wording(stage, dataset)
    with construction(config.trainer):
        model = build_language_model(stage, wording)
    data, ranker = InstructionData(stage, dataset, wording), None
    if config.validate == "ranking":
        ranker = GroundedRecommender(model, wording, VALIDATING)
    module = InstructedModel(model, config, ranker)
    plateau = config.optimizer.schedule == "plateau"
    best = BestCheckpoint(stage.folder / "best.ckpt", stage.label, MONITORS[config.validate], config.trainer.patience, plateau)
    last = LastCheckpoint(stage.folder / "last.ckpt", stage.fingerprint, config.trainer)
    throughput = Throughput()
    trainer = make_trainer(stage, [SeedEachStep(stage.seed), throughput, Progress(stage.label), best, last])
    trainer.fit(module, datamodule=data, ckpt_path=last.found(), weights_only=True)
    if not trainer.is_global_zero:
        return {}
    if config.trainer.strategy in SHARDED:  # the one that was trained is in parts
        model = build_language_model(stage, wording)
    load_tuned(model, best.path)
    save_language_model(stage, model, wording, stage.folder / MODEL)
    parameters = list(model.parameters())
    summary = {
        "parameters": {
            "total": sum(parameter.numel() for parameter in parameters),
            "trainable": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        },
        "layers": model.config.num_hidden_layers,
        "width": model.config.hidden_size,
        "examples": len(data.rows),
        "vocabulary": len(wording.tokenizer),
        "epochs": throughput.epochs,
        "train_seconds": throughput.seconds,
        **throughput.speed,
        "best": best.summary,
    }
    finish_loggers(trainer.loggers, summary)
    leaks = leaking(config.fields, dataset.info.get("texts", {}))
    return summary | ({"leaking": leaks} if leaks else {})
