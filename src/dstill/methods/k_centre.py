"""k-centre: real images such that no image of a class is far from a chosen one (Sener and Savarese 2018).

Features are the inputs of the last layer of the recipe's network, trained on all real images.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from dstill.methods.selection import FeatureSelection


def greedy_centres(features: Tensor, count: int) -> Tensor:
    """Rows of `count` distinct images of one class, by k-centre greedy (Sener and Savarese 2018, Algorithm 1).

    The first is the image nearest to the mean of the class. Each further one is the image farthest from the nearest of those
    chosen so far. The largest distance of any image to its nearest chosen one is then at most twice the smallest possible
    (Gonzalez 1985), whichever image is the first.

    Args:
        features: `[n, F]`, n >= count, not normalised.
        count: number of images to choose.

    Example:
        >>> greedy_centres(torch.tensor([[0.0], [4.0], [5.0], [10.0]]), 3).tolist()
        [2, 0, 3]
    """
    features = features.cpu().double()
    chosen = [int((features - features.mean(0)).square().sum(1).argmin())]
    nearest = torch.full((len(features),), torch.inf, dtype=torch.float64)
    while len(chosen) < count:
        nearest = torch.minimum(nearest, (features - features[chosen[-1]]).square().sum(1))
        nearest[chosen[-1]] = -torch.inf  # not 0: a copy of a chosen image is at distance 0 too
        chosen.append(int(nearest.argmax()))
    return torch.tensor(chosen)


@final
class KCentre(FeatureSelection):
    """k-centre greedy in each class, on the features of a trained network."""

    def pick(self, features: Tensor, generator: torch.Generator) -> Tensor:
        return greedy_centres(features, self.problem.recipe.ipc)
