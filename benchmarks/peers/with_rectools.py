"""A subject: RecTools' SASRec or BERT4Rec, on Lightning."""

import logging
import math
import warnings
from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytorch_lightning as L
import subject
import torch
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

    @torch.inference_mode()
    def scores(read: list[np.ndarray]) -> Iterator[np.ndarray]:
        """RecTools itself hands out nothing but lists."""
        known, network = model.data_preparator, model.torch_model.eval()
        first = known.n_item_extra_tokens  # numbers below it stand for padding and for hidden items
        items = known.get_known_item_ids().astype(np.int64)
        number = np.zeros(task["items"] + 1, np.int64)
        number[items] = np.arange(first, first + len(items))
        inner = [number[history][number[history] > 0] for history in read]
        if task["model"] == "bert4rec":
            inner = [np.append(history, first - 1) for history in inner]  # hidden, to be filled in
        vectors = network.item_model.get_all_embeddings()
        for batch in torch.from_numpy(subject.padded(inner, task["length"])).split(subject.CHUNK):
            table = np.full((len(batch), task["items"] + 1), -np.inf, np.float32)
            table[:, items] = (network.encode_sessions({"x": batch}, vectors)[:, -1] @ vectors[first:].T).numpy()
            yield table

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
            callbacks=[subject.epoch_callback(L.Callback, scores, share)],
        )

    L.seed_everything(task["seed"])
    model = MODELS[task["model"]](
        n_blocks=2,
        n_heads=2,
        n_factors=64,
        session_max_len=task["length"],
        dropout_rate=0.2,
        lr=task.get("lr", 1e-3),
        batch_size=task["batch"],
        loss="softmax",
        get_trainer_func=trainer,
        recommend_batch_size=1024,
        **(NARROW if task["model"] == "bert4rec" else {}),
    )
    model.fit(dataset([history[:-2] for history in histories]))
    read = dataset([history[:-1] for history in histories])

    def evaluate() -> None:
        """RecTools hands out the best items of each user."""
        model.recommend(users=np.arange(len(histories)), dataset=read, k=10, filter_viewed=False)

    subject.evaluations(evaluate)


if __name__ == "__main__":
    main()
