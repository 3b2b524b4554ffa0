"""Independent random streams from one seed: what one part of a run draws does not change what another part draws."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator for one purpose, for example `generator(0, "expert", 3)`.

    Generators for different purposes are independent: training one more expert, or validating more often, changes no other
    number. The generator's seed is the first eight bytes of the SHA-256 of seed and purpose.

    Args:
        seed: the master seed.
        purpose: words and numbers that name the purpose.

    Example:
        >>> a, b = generator(0, "expert", 3), generator(0, "expert", 3)
        >>> torch.equal(torch.rand(2, generator=a), torch.rand(2, generator=b))
        True
    """
    text = "/".join(str(part) for part in (seed, *purpose))
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
