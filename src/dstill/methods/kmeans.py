"""K-Means: the real images nearest to the centroids of each class's features (Lloyd 1982).

Features are the inputs of the last layer of the recipe's network, trained on all real images.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from dstill.methods.initialisation import nearest_to_centroids
from dstill.methods.selection import FeatureSelection


@final
class KMeans(FeatureSelection):
    """As many clusters in each class as images are chosen; from each cluster the image nearest to its centroid.

    An image is chosen once: if it is nearest to two centroids, the second one takes the next nearest.
    """

    def pick(self, features: Tensor, generator: torch.Generator) -> Tensor:
        ipc, seed = self.problem.recipe.ipc, int(torch.randint(2**31, (), generator=generator))
        return torch.from_numpy(nearest_to_centroids(features.numpy(), ipc, ipc, seed))
