"""Independent random streams from one seed: the same seed gives the same result whatever runs beside it."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator for one purpose, for example `generator(0, "expert", 3)`.

    Streams of different purposes are independent: training a fourth expert, or validating more often, changes no
    other number. The seed is the first eight bytes of the SHA-256 of the seed and the purpose.
    """
    text = "/".join(str(part) for part in (seed, *purpose))
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
