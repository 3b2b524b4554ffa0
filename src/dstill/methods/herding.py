"""Herding: real images chosen one by one so that their mean feature stays close to the class mean (Welling 2009).

Features are the inputs of the last layer of the recipe's network, trained on all real images.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from dstill.methods.selection import FeatureSelection


def herd(features: Tensor, count: int) -> Tensor:
    """Rows of `count` distinct images of one class.

    With m the mean feature and s the sum of the k features chosen so far, the next image is the one nearest to
    (k + 1) m - s among the rest: it brings the mean of the chosen images nearest to m.

    Args:
        features: `[n, F]`, n >= count, not normalised.
        count: number of images to choose.
    """
    features = features.cpu().double()
    mean, total = features.mean(0), torch.zeros_like(features[0])
    free = torch.ones(len(features), dtype=torch.bool, device=features.device)
    chosen: list[int] = []
    for k in range(count):
        distance = (features - ((k + 1) * mean - total)).square().sum(1)
        chosen.append(int(torch.where(free, distance, torch.inf).argmin()))
        free[chosen[-1]] = False
        total = total + features[chosen[-1]]
    return torch.tensor(chosen)  # on the CPU, as the real images are


@final
class Herding(FeatureSelection):
    """Herding in each class, on the features of a trained network."""

    def pick(self, features: Tensor, generator: torch.Generator) -> Tensor:
        return herd(features, self.problem.recipe.ipc)
