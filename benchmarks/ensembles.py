"""What adding up models gains by itself: `python benchmarks/ensembles.py recipe=NAME seeds=[0,1,2] [key=value ...]`.

A method whose student is several models in one has to be compared with several plain ones. This ranks by the sum of the scores
of each number of seeds of one stage (`--stage`, by default the control), on validation and test items. Nothing is trained as
one. The recipe is run up to that stage first, so the same command as for `lit_llmers.fit` finds what is trained already.
"""

import argparse
import sys
from collections.abc import Sequence
from itertools import combinations

import torch

from lit_llmers import fit, recipes
from lit_llmers.composing.resolving import resolve
from lit_llmers.conf.schema import EvaluationConfig
from lit_llmers.data.loader import EvaluationBatches
from lit_llmers.data.sequences import EvaluationRows
from lit_llmers.metrics import per_user_metric
from lit_llmers.models import load_dataset, load_model
from lit_llmers.ranking import Catalogue, target_ranks
from lit_llmers.reporting.tables import markdown, with_spread
from lit_llmers.students.counting import CountingRecommender
from lit_llmers.students.recommender import Recommender


def main() -> int:
    """Train what is missing, rank, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("overrides", nargs="+", metavar="KEY=VALUE", help="as for lit_llmers.fit")
    parser.add_argument("--stage", default="control", metavar="NAME", help="whose seeds are added up (default control)")
    options = parser.parse_args()
    if status := fit.main([*options.overrides, f"stage={options.stage}"]):
        return status
    name, overrides = recipes.split(options.overrides)
    stages = [stage for stage in resolve(recipes.compose(name, overrides)) if stage.name == options.stage]
    dataset = load_dataset(stages[0])
    models = [load_model(stage, dataset) for stage in stages]
    if isinstance(models[0], CountingRecommender):
        print(f"error: stage '{options.stage}' counts and is not trained, so all its seeds are one model.", file=sys.stderr)
        return 2
    config = stages[0].config
    found = {}
    for part in ("valid", "test"):
        rows = EvaluationRows(dataset, part, config.sequences.max_length, None)
        found[part] = {chosen: ndcg(chosen, rows, config.mask_history) for chosen in subsets(models)}
    table = []
    for number in range(1, len(models) + 1):
        cells = [[value for chosen, value in found[part].items() if len(chosen) == number] for part in ("valid", "test")]
        table.append([str(number), str(len(cells[0])), *map(with_spread, cells)])
    print(f"\n{options.stage}: NDCG@10, mean ± standard deviation over the choices of so many seeds\n")
    print(markdown(["added up", "choices", "validation", "test"], table))
    return 0


def subsets(models: Sequence[Recommender]) -> list[tuple[Recommender, ...]]:
    """All choices of one model and more."""
    return [chosen for number in range(1, len(models) + 1) for chosen in combinations(models, number)]


@torch.inference_mode()
def ndcg(models: Sequence[Recommender], rows: EvaluationRows, mask_history: bool) -> float:
    """NDCG@10 by the sum of the models' scores: one dot product of their vectors side by side."""
    tables = [model.tables() for model in models]
    catalogue = None  # of all, the same for every batch
    ranks = []
    for batch in EvaluationBatches(rows, EvaluationConfig().batch_size, mask_history):
        users, items = zip(*(model.vectors(batch, own) for model, own in zip(models, tables, strict=True)), strict=True)
        catalogue = catalogue or Catalogue(torch.cat([own.table for own in items], 1))
        user = torch.cat(users, 1)
        ranks.append(target_ranks(user, catalogue, batch["target"], batch.get("seen_row"), batch.get("seen_item")))
    return float(per_user_metric(torch.cat(ranks), "NDCG@10").mean())


if __name__ == "__main__":
    sys.exit(main())
