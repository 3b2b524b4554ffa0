"""EL2N: real images by how far predicted probabilities are from their labels early in training (Paul et al. 2021)."""

from __future__ import annotations

from typing import final

from torch import Tensor, nn

from dstill.methods.difficulty import Difficulty
from dstill.training.fit import answers, probabilities


def error_norms(logits: Tensor, labels: Tensor) -> Tensor:
    """‖softmax(logits) - one-hot(label)‖₂ of each image (EL2N of Paul et al. 2021, Section 2), `[n]` in [0, √2].

    Args:
        logits: `[n, K]`.
        labels: class ids `[n]`.

    Example:
        >>> import torch
        >>> error_norms(torch.zeros(1, 2), torch.tensor([0])).tolist()  # (1/2, 1/2) - (1, 0)
        [0.7071067690849304]
    """
    return (logits.softmax(1) - probabilities(labels, logits.shape[1])).norm(dim=1)


@final
class El2n(Difficulty):
    """Selects by the L2 norm of the error, averaged over networks."""

    def score(self, net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return error_norms(answers(net, images), labels)
