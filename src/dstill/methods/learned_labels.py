"""Learned soft labels: non-negative numbers that start one-hot and are normalised to probabilities.

Distilled sets hold soft labels as logits. With labels y >= 0, the logits ln y have the probabilities y / Σy. The derivative by
y is that by the logits, divided by y.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

_SMALLEST = 1e-4  # stands for 0, whose logarithm is not finite


def one_hot_start(labels: Tensor, classes: int) -> Tensor:
    """Labels `[S, K]` that are 1 for the class of each image `[S]` and 0 elsewhere."""
    return F.one_hot(labels, classes).float()


def label_logits(labels: Tensor) -> Tensor:
    """Logits `[S, K]` of labels `[S, K]`; numbers below 1e-4 count as 1e-4.

    Example:
        >>> import torch
        >>> label_logits(torch.tensor([[3.0, 1.0]])).softmax(1)
        tensor([[0.7500, 0.2500]])
    """
    return labels.clamp_min(_SMALLEST).log()


def through_logits(labels: Tensor, by_logits: Tensor) -> Tensor:
    """Pulls a gradient by the logits `[S, K]` back to the labels.

    At 0 the derivative is that at 1e-4, so that a label can leave 0.
    """
    return by_logits / labels.clamp_min(_SMALLEST)
