"""MixGCF: Huang et al., "MixGCF: An Improved Training Method for Graph Neural Network-based Recommender Systems", KDD 2021."""

import torch
from torch import Tensor

from lit_llmers.backbones import Batch
from lit_llmers.backbones.lightgcn import LightGCN
from lit_llmers.backbones.rows import pair_dots


class MixGCF(LightGCN):
    """LightGCN trained against a negative that is put together from the layers of the batch's candidates.

    For each layer l every candidate is mixed with the target, `a target + (1 - a) candidate` with a uniform in (0, 1) (positive
    mixing, section 3.1), and the one that the user scores highest is taken (hop mixing, section 3.2, with the user's final
    embedding as the query); the negative is the mean of those taken. As in the official code one `a` serves all candidates of
    a row and layer: the highest mixture is then that of the highest candidate, so none but the one taken is ever mixed, and
    since scores are dot products they are mixed in place of embeddings.

    We differ from the official code in the L2 term: it is on all candidates (their mean), there on the one of layer 0.
    """

    keep_states = True

    def pair_scores(self, batch: Batch, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """Scores `[B]` of the targets and `[B, 1]` of the mixed negatives; `negatives` `[B, M]` are the candidates.

        Raises:
            RuntimeError: `users` and `items` are of no forward pass in training, of which alone the layers are kept.
        """
        if not self.states:
            raise RuntimeError("MixGCF mixes the layers of a forward pass in training mode: call train() before it.")
        user, target, candidates = batch["user"], batch["target"][:, None], batch["negatives"]
        layers = [layer[self.n_users :] for layer in self.states[0 if self.with_input else 1 :]]
        scores = []
        for layer in layers:
            with torch.no_grad():
                hardest = candidates.gather(1, pair_dots(users, layer, user, candidates).argmax(1, keepdim=True))
            of_target, of_hardest = pair_dots(users, layer, user, torch.cat([target, hardest], 1)).unbind(1)
            scores.append(torch.stack([of_target, torch.lerp(of_hardest, of_target, torch.rand_like(of_target))]))
        positive, negative = torch.stack(scores).mean(0)
        return positive, negative[:, None]
