"""Processes exchange what their draws contribute, whoever has how many, and none waits in vain for one that has ended."""

from __future__ import annotations

import datetime
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from dstill.errors import DstillError
from dstill.support import crew
from dstill.support.crew import ALONE, Group, Parcel, waited_for

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

HOST = "127.0.0.1"


@pytest.fixture
def store() -> Store:
    """Where the members of a group meet; a client of its own for each is `other(store)`."""
    return TCPStore(HOST, 0, None, True, wait_for_workers=False)


def other(store: Any) -> Store:
    return TCPStore(HOST, store.port, None, False)


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """What the calls return, or the errors that they raise, each in its own thread."""
    found: list[Any] = [None] * len(calls)

    def run(number: int) -> None:
        try:
            found[number] = calls[number]()
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a call hangs"
    return found


def members(store: Store, size: int, patience: float = 600.0) -> list[Group]:
    """A group, all of whose members are in this process. Gloo does not know, and talks over real connections."""
    made = at_once(*(lambda number=number: Group(other(store), number, size, patience=patience) for number in range(size)))
    assert all(isinstance(one, Group) for one in made), made
    return made


def exchanged(group: list[Group], *own: dict[int, Parcel]) -> list[dict[int, Parcel]]:
    return at_once(*(lambda one=one, mine=mine: one.gathered(mine) for one, mine in zip(group, own, strict=True)))


def parcel(value: float) -> Parcel:
    return Parcel({"value": value}, {"images": torch.full((2, 3), value)})


TENSORS = {
    "half": torch.tensor([1.5, -2.0], dtype=torch.float16),
    "brain": torch.tensor([[1.5], [-0.0]], dtype=torch.bfloat16),
    "double": torch.tensor([math.pi, math.nan, math.inf, -math.inf], dtype=torch.float64),
    "whole": torch.tensor([2**62, -1]),
    "bytes": torch.arange(7, dtype=torch.uint8),
    "flags": torch.tensor([True, False]),
    "scalar": torch.tensor(3.25),
    "count": torch.tensor(7, dtype=torch.int64),
    "none": torch.empty(0, 3),
    "a name with blanks": torch.ones(1),
    "values": torch.tensor([5.0]),
}


def test_every_tensor_arrives_as_it_was(store: Store) -> None:
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    tensors = {**TENSORS, "base": base, "turned": base.T, "part": base[1], "learned": torch.ones(2, requires_grad=True)}
    sent = Parcel({"loss": math.nan, "last": True, "steps": 3, "name": "ä", "far": math.inf}, tensors)
    for found in exchanged(members(store, 2), {0: sent}, {}):
        values, got = found[0]
        assert math.isnan(values.pop("loss")) and values == {"last": True, "steps": 3, "name": "ä", "far": math.inf}
        assert set(got) == set(tensors)
        for name, tensor in tensors.items():
            assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape and got[name].is_contiguous()
            assert torch.equal(torch.nan_to_num(got[name]), torch.nan_to_num(tensor.detach())), name
            assert not got[name].requires_grad
        assert bool(got["double"][1].isnan())
        assert math.copysign(1, float(got["brain"][1])) == -1, "also the sign of a zero"
        got["part"].zero_()
        assert float(got["base"][1].sum()) == 22, "what shared memory is now apart"
        assert all(tensor.data_ptr() % 64 == 0 for tensor in got.values()), "aligned as torch aligns its own"


@pytest.mark.parametrize(("size", "draws"), [(2, [0, 1, 2, 3, 4]), (3, [0, 1, 4]), (4, [2]), (3, [1, 5])])
def test_the_mean_is_that_of_the_draws_in_their_order_in_every_bit(store: Store, size: int, draws: list[int]) -> None:
    shapes = {"images": [3, 5], "alpha": [], "labels": [2, 2, 1]}
    g = torch.Generator().manual_seed(0)
    all_of = {k: {name: torch.randn(shape, generator=g) * 10**k for name, shape in shapes.items()} for k in range(6)}
    expected = ALONE.mean(draws, all_of, shapes)
    for name in shapes:  # the sum by hand, in order
        total = all_of[draws[0]][name]
        for k in draws[1:]:
            total = total + all_of[k][name]
        assert torch.equal(expected[name], total / len(draws) if len(draws) > 1 else total)
    if len(draws) > 3:
        turned = sum(all_of[k]["images"] for k in reversed(draws)) / len(draws)
        assert not torch.equal(turned, expected["images"]), "the order must matter, or the test proves nothing"

    def one(member: Group) -> dict[str, torch.Tensor]:
        # A process has its own draws only, also those that do not count.
        return member.mean(draws, {k: all_of[k] for k in member.share(6)}, shapes)

    for found in at_once(*(lambda member=member: one(member) for member in members(store, size))):
        assert list(found) == list(shapes)
        for name, tensor in found.items():
            assert torch.equal(tensor, expected[name]) and tensor.shape == tuple(shapes[name])
            assert tensor.data_ptr() % 64 == 0, "aligned as torch aligns its own"


def test_parcels_are_in_the_order_of_their_draws_whoever_has_how_many(store: Store) -> None:
    own: tuple[dict[int, Parcel], ...] = (
        {4: parcel(4.0), 0: parcel(0.0)},
        {},
        {11: parcel(11.0), 1: parcel(1.0), 3: Parcel({}, {})},
    )
    group = members(store, 3)
    for found in exchanged(group, *own):
        assert list(found) == [0, 1, 3, 4, 11]
        assert [found[k].values.get("value") for k in found] == [0.0, 1.0, None, 4.0, 11.0]
        assert [float(found[k].tensors["images"][1, 2]) for k in (0, 1, 4, 11)] == [0.0, 1.0, 4.0, 11.0]
    assert exchanged(group, {}, {}, {}) == [{}, {}, {}], "and a process without draws takes part again and again"
    first, second, third = exchanged(group, {}, {0: parcel(1.0)}, {})
    assert list(first) == list(second) == list(third) == [0]


@pytest.mark.parametrize(("size", "draws"), [(1, 3), (2, 4), (2, 5), (3, 2)])
def test_every_draw_is_taken_once(size: int, draws: int, store: Store) -> None:
    shares = [one.share(draws) for one in members(store, size)]
    assert sorted(k for share in shares for k in share) == list(range(draws))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_alone_everything_stays_as_it_is() -> None:
    own = {0: parcel(1.0), 1: parcel(2.0)}
    assert ALONE.gathered(own) == own and ALONE.share(3) == range(3)
    ALONE.call()
    assert ALONE.straggler() == ""


def test_the_others_hear_the_leader_call_until_it_ends(store: Store) -> None:
    leader, follower = members(store, 2)
    for _ in range(3):
        leader.call()
        assert follower.called()
        exchanged([leader, follower], {0: parcel(0.0)}, {1: parcel(1.0)})
    keys = store.num_keys()
    leader.call()
    assert follower.called() and store.num_keys() == keys, "calls that were heard are forgotten"
    leader.end()
    assert not follower.called()
    leader.end()


def test_a_call_is_waited_for_as_long_as_it_takes(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "_POLL", datetime.timedelta(milliseconds=20))
    waiting = threading.Event()

    def late() -> None:
        waiting.wait()
        time.sleep(0.1)  # some polls
        other(store).set("call", "on")

    def wait() -> bytes:
        waiting.set()
        return waited_for(other(store), "call")

    assert at_once(wait, late)[0] == b"on"


def test_who_waits_for_a_process_that_has_failed_hears_why(store: Store) -> None:
    leader, second, third = members(store, 3)
    waits, _ = at_once(lambda: second.gathered({}), lambda: third.fail(ValueError("no images")))
    second.fail(waits)  # it leaves for the other's sake
    (also,) = at_once(lambda: leader.gathered({}))
    for error in (waits, also):
        assert isinstance(error, DstillError)
        assert str(error) == (
            "one of the 3 processes of the run has ended, or has not answered for 600 s (process 2: ValueError: no images); "
            "the same command goes on from the last checkpoint"
        )


def test_the_end_of_the_leader_in_the_middle_of_an_iteration_reaches_those_who_wait(store: Store) -> None:
    leader, follower = members(store, 2)
    leader.call()
    assert follower.called()
    waits, _ = at_once(lambda: follower.gathered({1: parcel(1.0)}), leader.end)
    assert isinstance(waits, DstillError)
    assert not follower.called(), "it can hear that the run has ended, and wait for another one"


def test_who_does_not_answer_is_waited_for_with_patience(store: Store) -> None:
    leader, _hangs = members(store, 2, patience=0.3)
    with pytest.raises(DstillError, match=r"has not answered for 0\.3 s \(Timed out waiting 300ms .*; the same command"):
        leader.gathered({0: parcel(0.0)})


def test_who_does_not_come_is_waited_for_with_patience(store: Store) -> None:
    with pytest.raises(DstillError, match="the 2 processes of the run did not find each other: "):
        Group(store, 0, 2, patience=0.3)


def _dies(port: int) -> None:
    group = Group(TCPStore(HOST, port, None, False), 1, 2)
    group.gathered({1: parcel(1.0)})
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_is_missed_at_once(store: Any) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_dies, args=(store.port,), daemon=True)
    process.start()
    leader = Group(store, 0, 2)
    assert float(leader.gathered({})[1].tensors["images"][0, 0]) == 1.0
    with pytest.raises(DstillError, match=r"has ended, .* \((Connection|Read error)[^()]* by peer[^()]*\); the"):
        leader.gathered({0: parcel(0.0)})
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_a_slow_process_is_named(store: Store) -> None:
    (one,) = members(store, 1)
    for pace, told in (
        ([1.0, 1.0, 1.6], "process 2 takes 1.6 s for a draw, the others 1 s, and all wait for it"),
        ([0.1, 0.04], "process 0 takes 0.1 s for a draw, the others 0.04 s, and all wait for it"),
        ([1.0, 1.4, 1.2], ""),
        ([1.0, 1.2, 0.0, 0.0], ""),  # those without draws are not fast
        ([1.0, 0.0], ""),
    ):
        one.pace = pace
        assert one.straggler() == told


def test_the_pace_is_that_of_a_draw_and_moves_slowly(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"now": 0.0}
    monkeypatch.setattr(crew.time, "perf_counter", lambda: clock["now"])
    leader, idle = members(store, 2)

    def iteration(seconds: float) -> None:
        leader.call()
        clock["now"] += 5.0  # until the others hear it; they count from then
        idle.called()
        leader.since = clock["now"]
        clock["now"] += seconds
        exchanged([leader, idle], {0: parcel(0.0), 2: parcel(2.0)}, {})

    iteration(4.0)
    assert idle.pace == [2.0, 0.0], "two draws in four seconds; who takes none has no pace"
    iteration(8.0)
    assert leader.pace == idle.pace == [pytest.approx(0.9 * 2.0 + 0.1 * 4.0), 0.0]


def listens_on(store: Store, number: int, size: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses that gloo is told to listen on; none if it is to choose by itself."""
    told: list[str] = []
    monkeypatch.setattr(torch.distributed.ProcessGroupGloo, "create_device", lambda hostname: told.append(hostname))
    monkeypatch.setattr(torch.distributed.ProcessGroupGloo, "create_default_device", lambda: None)
    crew._gloo_device(store, number, size, datetime.timedelta(seconds=1))
    return told


def test_gloo_listens_where_this_machine_is_reached(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the address of the machine's name, which is often that of its loopback device."""
    towards = {HOST: HOST, "10.0.0.2": "10.0.0.1"}
    monkeypatch.setattr(crew, "_address_towards", lambda host: towards[host])
    for prefix in ("here", "far"):
        PrefixStore(prefix, store).set("address 1", HOST if prefix == "here" else "10.0.0.2")
    inner = PrefixStore("x", PrefixStore("", store))
    inner.set("address 1", HOST)
    assert listens_on(inner, 0, 2, monkeypatch) == [HOST], "all are on one machine"
    assert listens_on(PrefixStore("far", store), 0, 2, monkeypatch) == ["10.0.0.1"], "the store is here, another one is not"
    towards[HOST] = "10.0.0.3"
    inner.set("address 1", "10.0.0.2")
    assert listens_on(inner, 0, 2, monkeypatch) == ["10.0.0.3"], "the store is elsewhere"
    assert PrefixStore("far", store).get("address 0") == HOST.encode() and inner.get("address 0") == b"10.0.0.3"
    towards[HOST] = ""
    assert listens_on(inner, 0, 1, monkeypatch) == [], "there is no way"
    towards[HOST] = HOST
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    assert listens_on(inner, 0, 1, monkeypatch) == [], "the user knows better"


def test_an_address_is_that_of_the_way() -> None:
    assert crew._address_towards(HOST) == HOST
    assert crew._address_towards("no-such-host.invalid") == ""
