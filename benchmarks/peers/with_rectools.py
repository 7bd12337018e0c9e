"""A subject: RecTools' SASRec or BERT4Rec, on Lightning."""

import logging
import math
import warnings

import numpy as np
import pandas as pd
import pytorch_lightning as L
import subject
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import BERT4RecModel, SASRecModel

MODELS = {"sasrec": SASRecModel, "bert4rec": BERT4RecModel}
NARROW = {"transformer_layers_kwargs": {"ff_factors_multiplier": 1}}  # SASRec's feed-forward layers are so by themselves


def dataset(histories: list[np.ndarray]) -> Dataset:
    """RecTools' form of them."""
    length = [len(history) for history in histories]
    table = {
        Columns.User: np.repeat(np.arange(len(histories)), length),
        Columns.Item: np.concatenate(histories),
        Columns.Weight: 1.0,
        Columns.Datetime: pd.to_datetime(np.concatenate([np.arange(n) for n in length]), unit="s"),
    }
    return Dataset.construct(pd.DataFrame(table))


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    subject.announce_first_step()
    task = subject.settings()
    histories = subject.histories(task["data"])
    batches = math.ceil(len(histories) / task["batch"])
    share = (task["batches"] or batches) / batches

    def trainer() -> L.Trainer:
        return L.Trainer(
            max_epochs=-1,
            limit_train_batches=task["batches"],
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[subject.epoch_callback(L.Callback, share)],
        )

    L.seed_everything(0)
    model = MODELS[task["model"]](
        n_blocks=2,
        n_heads=2,
        n_factors=64,
        session_max_len=task["length"],
        dropout_rate=0.2,
        lr=1e-3,
        batch_size=task["batch"],
        loss="softmax",
        get_trainer_func=trainer,
        recommend_batch_size=1024,
        **(NARROW if task["model"] == "bert4rec" else {}),
    )
    model.fit(dataset([history[:-2] for history in histories]))
    read = dataset([history[:-1] for history in histories])

    def evaluate() -> float:
        """RecTools hands out the best items of each user."""
        top = model.recommend(users=np.arange(len(histories)), dataset=read, k=10, filter_viewed=False)
        wanted = top[Columns.User].map({user: history[-1] for user, history in enumerate(histories)})
        return float((top[Columns.Item] == wanted).sum()) / len(histories)

    subject.evaluations(evaluate)


if __name__ == "__main__":
    main()
