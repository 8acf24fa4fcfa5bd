"""A level whose ranks are processes of one machine: bytes stay in memory they share."""

import mmap
import os
import shutil
import socket
import struct
import sys
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from danon_lightning.strategies.communication.levels import Box, Level, split_rows
from danon_lightning.strategies.communication.stats import CommunicationStats

# A slot is used again only if at least so many others are free: by then its last readers are done, and nobody waits.
_SPARE_SLOTS = 3
# Only those that are used take memory.
_MAX_SLOTS = 64
_FILLED, _READ = 0, 1
_TOKEN = struct.Struct("<BBxxI")  # what has happened, in which pool, number of the box
_GREETING = struct.Struct("<I")
_PATH_BYTES = 108  # of the address of a Unix socket
_PAGE = 4096


class SharedMemoryLevel(Level):
    """Ranks of one machine, handing bytes over in an anonymous mapping that all of them have open.

    The mapping has no name in any file system (so it needs no room in ``/dev/shm``, and nothing is left behind however
    the ranks end); its descriptor is handed over a Unix socket. Each pair of ranks keeps such a socket: a token on it
    says that a box is filled, or that it has been read. So a rank that waits sleeps, and notices at once when the other
    one dies.

    Args:
        ranks: Global ranks of the group, in order, all on this machine.
        index: Place of this rank among them.
        sockets: A connected socket to each of the others; None at ``index``.
        memory: The mapping, ``mapping_bytes(len(ranks), row_bytes)`` long.
        row_bytes: Largest row of a box.
        stats: Where to count the bytes.
    """

    def __init__(
        self,
        ranks: list[int],
        index: int,
        sockets: list[socket.socket | None],
        memory: Tensor,
        row_bytes: int,
        stats: CommunicationStats,
    ) -> None:
        """See the class."""
        self.ranks, self.index, self._sockets, self.stats = ranks, index, sockets, stats
        slot_bytes = _slot_bytes(len(ranks), row_bytes)
        end_of_first = len(ranks) * _MAX_SLOTS * slot_bytes[0]
        self._pools = [
            _Pool(0, slot_bytes[0], memory[:end_of_first]),
            _Pool(1, slot_bytes[1], memory[end_of_first:]),
        ]
        self._arrived: list[set[tuple[int, int, int]]] = [set() for _ in ranks]
        self._unread = [b"" for _ in ranks]

    @override
    def all_to_all(self, sizes: Sequence[int]) -> Box:
        """See :class:`Level`. Not larger than ``row_bytes`` a row."""
        pool, own = self._pools[0], self.index
        slot, seq = self._take(pool)
        # A rank's own row never leaves it, so it lies outside the mapping; peers leave out theirs in the same way.
        areas = [split_rows(pool.area(peer, slot), _without(sizes, peer)) for peer in range(self.size)]
        outgoing = areas[own]
        outgoing[own] = torch.empty(sizes[own], dtype=torch.uint8)
        incoming = [areas[peer][own] if peer != own else outgoing[own] for peer in range(self.size)]
        self.stats.count(sum(sizes) - sizes[own], remote=False)
        return _SharedBox(self, pool, slot, seq, outgoing, incoming)

    @override
    def all_gather(self, sizes: Sequence[int]) -> Box:
        """See :class:`Level`. Not larger than ``row_bytes`` a row."""
        pool = self._pools[1]
        slot, seq = self._take(pool)
        rows = [pool.area(peer, slot)[: sizes[peer]] for peer in range(self.size)]
        self.stats.count(sizes[self.index] * (self.size - 1), remote=False)
        return _SharedBox(self, pool, slot, seq, rows, rows)

    @override
    def close(self) -> None:
        """See :class:`Level`."""
        for connection in self._sockets:
            if connection is not None:
                connection.close()

    def _take(self, pool: "_Pool") -> tuple[int, int]:
        """A slot, once all ranks have read what it held before, and the number of the next box."""
        slot = pool.take()
        last, seq = pool.last_box[slot], pool.opened
        pool.last_box[slot] = seq
        pool.opened += 1
        for peer in range(self.size) if last is not None else ():
            if peer != self.index:
                assert last is not None
                self.await_token(peer, _READ, pool, last)
        return slot, seq

    def tell(self, what: int, pool: "_Pool", seq: int) -> None:
        """Send a token to all others."""
        for peer, connection in enumerate(self._sockets):
            if connection is not None:
                with _blaming(self.ranks[peer]):
                    connection.sendall(_TOKEN.pack(what, pool.number, seq & 0xFFFFFFFF))

    def await_token(self, peer: int, what: int, pool: "_Pool", seq: int) -> None:
        """Wait for a token of a peer.

        Raises:
            ConnectionError: If the peer has ended.
            TimeoutError: If it does not come to that point in time.
        """
        token = what, pool.number, seq & 0xFFFFFFFF
        arrived, connection = self._arrived[peer], self._sockets[peer]
        assert connection is not None
        while token not in arrived:
            with _blaming(self.ranks[peer]):
                data = connection.recv(1 << 16)
            if not data:
                raise ConnectionError(f"rank {self.ranks[peer]}, on this node, has closed its connection")
            data = self._unread[peer] + data
            whole = len(data) // _TOKEN.size * _TOKEN.size
            arrived.update(_TOKEN.iter_unpack(data[:whole]))
            self._unread[peer] = data[whole:]
        arrived.remove(token)


@contextmanager
def _blaming(rank: int) -> Iterator[None]:
    """Name the rank in errors of its connection."""
    try:
        yield
    except TimeoutError as error:
        raise TimeoutError(f"rank {rank}, on this node, did not come to this point in time") from error
    except OSError as error:
        raise ConnectionError(f"rank {rank}, on this node, has gone: {error}") from error


class _Pool:
    """Slots for boxes of one kind. All ranks open and release boxes in the same order, so all choose the same slots."""

    def __init__(self, number: int, slot_bytes: int, memory: Tensor) -> None:
        self.number, self._slot_bytes, self._memory = number, slot_bytes, memory
        self._free: deque[int] = deque()
        self.last_box: list[int | None] = []  # of each slot used so far
        self.opened = 0

    def take(self) -> int:
        if len(self._free) > _SPARE_SLOTS:
            return self._free.popleft()
        if len(self.last_box) == _MAX_SLOTS:
            raise RuntimeError(f"more than {_MAX_SLOTS} messages are under way")
        self.last_box.append(None)
        return len(self.last_box) - 1

    def give_back(self, slot: int) -> None:
        self._free.append(slot)

    def area(self, rank: int, slot: int) -> Tensor:
        """What ``rank`` writes in the slot."""
        start = (rank * _MAX_SLOTS + slot) * self._slot_bytes
        return self._memory[start : start + self._slot_bytes]


class _SharedBox(Box):
    def __init__(
        self,
        level: SharedMemoryLevel,
        pool: _Pool,
        slot: int,
        seq: int,
        outgoing: list[Tensor],
        incoming: list[Tensor],
    ) -> None:
        self.outgoing, self.incoming = outgoing, incoming
        self._level, self._pool, self._slot, self._seq = level, pool, slot, seq

    @override
    def post(self) -> None:
        self._level.tell(_FILLED, self._pool, self._seq)

    @override
    def wait(self) -> None:
        for peer in range(self._level.size):
            if peer != self._level.index:
                self._level.await_token(peer, _FILLED, self._pool, self._seq)

    @override
    def release(self) -> None:
        # A peer that has ended after its last step does not need to know. If it has ended too early, what it was to
        # send will be missed.
        with suppress(ConnectionError):
            self._level.tell(_READ, self._pool, self._seq)
        self._pool.give_back(self._slot)


def connect(
    ranks: list[int],
    index: int,
    group: dist.ProcessGroup,
    *,
    row_bytes: int,
    timeout: timedelta | None,
    stats: CommunicationStats,
) -> SharedMemoryLevel | None:
    """Set up a level between the ranks of a gloo group. Collective over that group.

    Args:
        ranks: Global ranks of the group, in order.
        index: Place of this rank among them.
        group: A group through which they can say where to meet.
        row_bytes: Largest row of a box.
        timeout: How long to wait for a rank, None for ever.
        stats: Where to count the bytes.

    Returns:
        The level; or None, on all of them, where they cannot share memory: the system has no anonymous mappings, or
        the ranks do not see the same file system (several containers, say).
    """
    level = None
    folder = tempfile.mkdtemp(prefix="danon-") if index == 0 else None  # readable by this user alone
    path = torch.zeros(_PATH_BYTES, dtype=torch.uint8)
    if folder is not None:
        encoded = os.fsencode(os.path.join(folder, "x"))
        if len(encoded) < _PATH_BYTES - 4:
            path[: len(encoded)] = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
    dist.broadcast(path, ranks[0], group=group)
    prefix = os.fsdecode(bytes(path.tolist()).rstrip(b"\0"))
    sockets: list[socket.socket | None] = [None] * len(ranks)
    try:
        if prefix and sys.platform == "linux":
            try:
                sockets = _connect_all(prefix, index, len(ranks), group)
                memory = _share_memory(index, sockets, mapping_bytes(len(ranks), row_bytes))
                level = SharedMemoryLevel(ranks, index, sockets, memory, row_bytes, stats)
            except OSError:
                for connection in sockets:  # whoever waits for this rank need not do so until its time is up
                    if connection is not None:
                        connection.close()
        together = torch.tensor([level is not None], dtype=torch.int32)
        dist.all_reduce(together, dist.ReduceOp.MIN, group=group)
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
    for connection in sockets:
        if connection is not None and connection.fileno() >= 0:
            connection.settimeout(timeout.total_seconds() if timeout is not None else None)
            if not together.item():
                connection.close()
    return level if together.item() else None


def mapping_bytes(size: int, row_bytes: int) -> int:
    """Bytes of the mapping for ``size`` ranks. Only what is used of it takes memory."""
    return size * _MAX_SLOTS * sum(_slot_bytes(size, row_bytes))


def _slot_bytes(size: int, row_bytes: int) -> tuple[int, int]:
    """Of an all-to-all, in which a rank writes one row for each other, and of an all-gather."""
    row = -(-row_bytes // _PAGE) * _PAGE
    return max(1, size - 1) * row, row


def _without(sizes: Sequence[int], peer: int) -> list[int]:
    return [0 if index == peer else size for index, size in enumerate(sizes)]


def _connect_all(prefix: str, index: int, size: int, group: dist.ProcessGroup) -> list[socket.socket | None]:
    """A connection to each other rank: the lower one listens."""
    sockets: list[socket.socket | None] = [None] * size
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listening = True
        try:
            listener.settimeout(30)
            listener.bind(f"{prefix}{index}")
            listener.listen(size)
        except OSError:
            listening = False
        # Everybody comes here, whatever happened, and goes on only if all listen.
        ready = torch.tensor([listening], dtype=torch.int32)
        dist.all_reduce(ready, dist.ReduceOp.MIN, group=group)
        if not ready.item():
            raise OSError("a rank cannot listen")
        for peer in range(index):
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.settimeout(30)
            connection.connect(f"{prefix}{peer}")
            connection.sendall(_GREETING.pack(index))
            sockets[peer] = connection
        for _ in range(index + 1, size):
            connection, _address = listener.accept()
            connection.settimeout(30)
            (peer,) = _GREETING.unpack(_receive_exactly(connection, _GREETING.size))
            sockets[peer] = connection
    return sockets


def _receive_exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = connection.recv(size - len(data))
        if not more:
            raise ConnectionError("closed")
        data += more
    return data


def _share_memory(index: int, sockets: list[socket.socket | None], size: int) -> Tensor:
    """Map the same memory in all ranks: the first makes it and hands over its descriptor."""
    if index == 0:
        descriptor = os.memfd_create("danon-lightning")
        os.ftruncate(descriptor, size)
        for connection in sockets[1:]:
            assert connection is not None
            socket.send_fds(connection, [b"m"], [descriptor])
    else:
        first = sockets[0]
        assert first is not None
        _, descriptors, _, _ = socket.recv_fds(first, 1, 1)
        if not descriptors:
            raise ConnectionError("the first rank cannot share memory")
        (descriptor,) = descriptors
    try:
        return torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)
    finally:
        os.close(descriptor)
