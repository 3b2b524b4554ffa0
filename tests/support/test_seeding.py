"""Random streams: the same for the same seed and purpose, independent otherwise."""

from __future__ import annotations

import torch

from dstill.support import seeding


def draws(seed: int, *purpose: str | int) -> torch.Tensor:
    return torch.rand(1000, generator=seeding.generator(seed, *purpose), dtype=torch.float64)


def test_the_same_seed_and_purpose_draw_the_same_numbers() -> None:
    assert torch.equal(draws(3, "expert", 7), draws(3, "expert", 7))


def test_seed_name_and_number_each_start_a_stream_of_their_own() -> None:
    keys = [(seed, name, i) for seed in range(-1, 10) for name in ("expert", "step", "evaluate") for i in range(40)]
    assert len({seeding.generator(*key).initial_seed() for key in keys}) == len(keys)


def test_a_longer_purpose_is_another_stream() -> None:
    assert not torch.equal(draws(0, "expert"), draws(0, "expert", 0))
    assert not torch.equal(draws(1, 2), draws(12))


def test_neighbouring_streams_are_uncorrelated() -> None:
    streams = torch.stack([draws(0, "expert", i) for i in range(10)])
    correlation = torch.corrcoef(streams) - torch.eye(10)
    assert correlation.abs().max() < 0.15  # 4.7 standard deviations of 1 / sqrt(1000)


def test_streams_of_this_version_are_those_of_every_version() -> None:
    """A fixed value: if it changes, every published number changes."""
    generator = seeding.generator(0, "expert", 3)
    assert generator.initial_seed() % 2**64 == 1283319325260861234  # the first eight bytes of SHA-256 of "0/expert/3"
    assert torch.randint(1000, (4,), generator=generator).tolist() == [528, 301, 228, 848]


def test_torchs_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = draws(0, "expert")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert torch.equal(draws(0, "expert"), first)
