"""The processes that torchrun starts, on one machine or many: one leads, the others work for it.

The leader runs the command. The others wait for its calls, in which they train experts and networks or share the draws of a
distillation. What a call needs lies in a folder that all machines share; the store of torchrun carries the rest.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pickle
import shutil
import signal
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from filelock import FileLock, Timeout

from dstill.errors import DstillError
from dstill.support.crew import PATIENCE, Crew, Group, waited_for
from dstill.support.devices import ask_for_determinism
from dstill.support.workers import portable

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_MANY = 10**9
_POLL = 0.05  # seconds between two looks at the store
_SETTLING = 10.0  # seconds after which a file must be visible on every machine


class Rank(NamedTuple):
    """One of the processes of torchrun.

    Attributes:
        number: 0 for the leader.
        size: number of processes.
        card: number of its card on its machine.
    """

    number: int
    size: int
    card: int

    @classmethod
    def of_environment(cls) -> Rank | None:
        """This process's own; None if torchrun has not started it, or has started it alone."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1 or not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
            return None
        return cls(int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_RANK", "0")))


class Team:
    """The processes of torchrun, seen from the leader.

    Args:
        store: the store that all processes reach, for this team alone.
        size: number of processes, with the leader.
    """

    def __init__(self, store: Store, size: int) -> None:
        self.store, self.size, self.calls = store, size, 0
        self.folder: Path | None = None
        self.lock: FileLock | None = None

    def meet_in(self, cache: Path) -> None:
        """Makes sure that every process sees the cache, through which calls are passed.

        Raises:
            DstillError: one does not, or has not answered in time.
        """
        folder = cache.resolve() / "ranks" / uuid.uuid4().hex
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder.parent)
        self.lock = FileLock(f"{folder}.lock")
        self.lock.acquire()
        folder.mkdir(mode=0o700)  # what lies there is trusted
        self.folder = folder
        self._announce("look", str(folder))
        for number in range(1, self.size):
            host, seen = json.loads(self._answer(f"seen {self.calls} {number}", f"process {number}"))
            if not seen:
                raise DstillError(
                    f"process {number} on {host} does not see {cache}: pass --cache with a folder that all machines share"
                )

    def spread(self, function: Callable[..., Any], items: Sequence[Any], tell: Callable[[Any, Any], None]) -> list[Any]:
        """`[function(item, report) for item in items]`; whichever process is free takes the next item.

        Args:
            function: must be picklable, as must the items, the results and whatever is reported.
            items: what to work on.
            tell: called in this process with an item and what was reported for it.

        Raises:
            DstillError: a process has ended. An exception that `function` raises is raised here.
        """
        self._call("spread", (function, list(items)))
        call, told, results = self.calls, 0, dict[int, Any]()

        def news() -> None:
            nonlocal told
            while self.store.check([f"{call} report {told + 1}"]):
                told += 1
                index, content = pickle.loads(self.store.get(f"{call} report {told}"))  # noqa: S301 - from our own processes
                tell(items[index], content)
            if self.store.check([f"{call} failed"]):
                raise pickle.loads(self._file(f"{call} failed"))  # noqa: S301 - likewise

        def report(index: int, content: Any) -> None:
            tell(items[index], content)
            news()

        try:
            for index in _tickets(self.store, call, len(items)):
                results[index] = function(items[index], functools.partial(report, index))
            for index in set(range(len(items))) - set(results):
                self._answer(f"{call} done {index}", "a process", news, float("inf"))  # it may need hours
                results[index] = pickle.loads(self._file(f"{call} done {index}"))  # noqa: S301 - likewise
        except BaseException:
            _take_all(self.store, call)
            raise
        news()
        return [results[index] for index in range(len(items))]

    @contextlib.contextmanager
    def together(self, follow: Callable[[Any, Group], None], content: Any) -> Iterator[Crew]:
        """Lets all other processes run `follow(content, group)`; see `mates.together`."""
        self._call("together", (follow, content))
        group = _group(self.store, self.calls, 0, self.size)
        try:
            yield group
        finally:
            group.end()

    def end(self) -> None:
        """Lets the other processes end."""
        with contextlib.suppress(RuntimeError):
            self._announce("end", "")
        if self.folder is not None and self.lock is not None:
            _remove(self.folder, self.lock)

    def _call(self, kind: str, content: Any) -> None:
        assert self.folder is not None, "the processes have not met in a cache"
        path = self.folder / f"{self.calls + 1}.pkl"
        _write(path, pickle.dumps((torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), content)))
        self._announce(kind, str(path))

    def _announce(self, kind: str, path: str) -> None:
        self.calls += 1
        self.store.set(f"call {self.calls}", json.dumps([kind, path]))

    def _answer(self, key: str, who: str, waiting: Callable[[], None] = lambda: None, patience: float = PATIENCE) -> bytes:
        deadline = time.monotonic() + patience
        while not self.store.check([key]):
            waiting()
            if time.monotonic() > deadline:
                raise DstillError(f"{who} has not answered for {patience:g} s: see its own output")
            time.sleep(_POLL)
        return bytes(self.store.get(key))

    def _file(self, key: str) -> bytes:
        """The content of the file that a key names."""
        path = Path(self.store.get(key).decode())
        _wait_for(path)
        return path.read_bytes()


@contextlib.contextmanager
def leading(rank: Rank) -> Iterator[Team]:
    """The team of the process that leads; the others end with the block.

    Raises:
        DstillError: a process has not come within ten minutes.
    """
    store = _store()
    token = uuid.uuid4().hex
    _welcome_all(store, token, rank.size)
    team = Team(_prefixed(token, store), rank.size)
    try:
        yield team
    finally:
        team.end()


def serve(rank: Rank) -> None:
    """Works for the leader until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes, and the leader then ends this one
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if torch.cuda.is_available():
        torch.cuda.set_device(rank.card)
    store = _store()
    token = _welcomed(store, rank.number)
    own, call = _prefixed(token, store), 0
    while True:
        call += 1
        try:
            kind, path = json.loads(waited_for(own, f"call {call}"))
        except RuntimeError as error:
            raise DstillError("the process that leads the others has ended") from error
        match kind:
            case "end":
                return
            case "look":
                own.set(f"seen {call} {rank.number}", json.dumps([socket.gethostname(), _wait_for(Path(path))]))
            case "spread":
                _work(own, call, Path(path))
            case "together":
                _follow(own, call, Path(path), rank)


def _welcome_all(store: Store, token: str, size: int) -> None:
    """Gives every process the token under which this team talks.

    After a restart the store still holds what earlier processes have said. Each process therefore says hello under an
    identity of its own, and only the one that lives hears the answer and confirms it.
    """
    deadline = time.monotonic() + PATIENCE
    while missing := [number for number in range(1, size) if not store.check([f"{token} here {number}"])]:
        for number in missing:
            if store.check([f"hello {number}"]):
                store.set(f"welcome {store.get(f'hello {number}').decode()}", token)
        if time.monotonic() > deadline:
            raise DstillError(f"of {size} processes, numbers {missing} have not come within {PATIENCE:g} s")
        time.sleep(_POLL)


def _welcomed(store: Store, number: int) -> str:
    identity = uuid.uuid4().hex
    store.set(f"hello {number}", identity)
    token = waited_for(store, f"welcome {identity}").decode()
    store.set(f"{token} here {number}", "yes")
    return token


def _work(store: Store, call: int, path: Path) -> None:
    """Takes items of a `spread` until none is left, or one has failed."""
    function, items = _opened(path)

    def report(index: int, content: Any) -> None:
        store.set(f"{call} report {store.add(f'{call} reports', 1)}", pickle.dumps((index, content)))  # type: ignore[arg-type]

    for index in _tickets(store, call, len(items)):
        how, result = "done", path.with_name(f"{call}-{index}.pkl")
        try:
            packed = pickle.dumps(function(items[index], functools.partial(report, index)))
        except Exception as error:  # the leader raises it
            how, packed = "failed", pickle.dumps(portable(error))
            _take_all(store, call)
        _write(result, packed)
        store.set(f"{call} done {index}" if how == "done" else f"{call} failed", str(result))


def _tickets(store: Store, call: int, count: int) -> Iterator[int]:
    """Numbers of items that no other process has taken."""
    while (index := store.add(f"{call} tickets", 1) - 1) < count:
        yield index


def _take_all(store: Store, call: int) -> None:
    """Leaves nothing for the others."""
    with contextlib.suppress(RuntimeError):
        store.add(f"{call} tickets", _MANY)


def _follow(store: Store, call: int, path: Path, rank: Rank) -> None:
    """Shares the draws of a run. If this process alone fails, it ends, and torchrun may start all of them again."""
    follow, content = _opened(path)
    group = _group(store, call, rank.number, rank.size)
    try:
        follow(content, group)
    except DstillError as error:  # the leader has the same one, or has left this run; it decides what comes next
        group.fail(error)
    except Exception as error:
        group.fail(error)
        raise


def _group(store: Store, call: int, number: int, size: int) -> Group:
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return Group(_prefixed(f"group {call}", store), number, size, device)


def _store() -> Store:
    """The store of torchrun."""
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://"))
    found: Store = store
    return found


def _prefixed(prefix: str, store: Store) -> Store:
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    found: Store = PrefixStore(prefix, store)
    return found


def _opened(path: Path) -> Any:
    """What the leader passes with a call. This process then has as many threads as the leader, and is as deterministic."""
    _wait_for(path)
    threads, deterministic, content = pickle.loads(path.read_bytes())  # noqa: S301 - from our own leader
    torch.set_num_threads(threads)
    if deterministic:
        ask_for_determinism()
    return content


def _remove_leftovers(ranks: Path) -> None:
    """Removes folders of teams whose leader was killed: nobody holds their locks any more."""
    for path in ranks.glob("*.lock"):
        lock = FileLock(path, timeout=0)
        with contextlib.suppress(Timeout):
            lock.acquire()
            _remove(path.with_suffix(""), lock)


def _remove(folder: Path, lock: FileLock) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()


def _write(path: Path, content: bytes) -> None:
    """Writes a file that appears as a whole."""
    beginning = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    beginning.write_bytes(content)
    beginning.replace(path)


def _wait_for(path: Path) -> bool:
    """Whether this machine sees a file or folder, after some seconds if its file system is slow to tell."""
    deadline = time.monotonic() + _SETTLING
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(_POLL)
    return path.exists()
