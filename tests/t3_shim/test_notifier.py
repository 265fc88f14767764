"""The notifier's queue: in order, bounded, and no invalidation is ever lost."""

from __future__ import annotations

import contextlib
import os
import struct
import time
import types
from collections.abc import Iterator

import pytest

from tests.t3_shim.test_node_table import DIRECTORY, enter, make_table
from udf.fuse import structs
from udf.fuse.opcodes import Notify
from udf.shim.away import Away
from udf.shim.graph import ROOT
from udf.shim.notifier import Notifier

PAGE = 4096


class Queue:
    """A notifier whose thread is held back, with a pipe for a device."""

    def __init__(self) -> None:
        self.table, self._memory = make_table()
        self.reader, self._writer = os.pipe()
        os.set_blocking(self.reader, False)
        self.notifier = Notifier(self._writer)
        self.faults: list[str] = []
        self.service = types.SimpleNamespace(
            nodes=self.table,
            counters=types.SimpleNamespace(notifications=0),
            fault=lambda op, kind, sentence: self.faults.append(sentence),
        )
        self.notifier._condition.acquire()

    def put(self, code: int, body: bytes) -> None:
        self.notifier.from_driver(self.service, code, memoryview(body))  # type: ignore[arg-type]

    def store(self, node: int, offset: int, data: bytes) -> None:
        self.put(Notify.STORE, structs.NOTIFY_STORE_OUT.pack(node, offset, len(data)) + data)

    def invalidate(self, node: int) -> None:
        self.put(Notify.INVAL_INODE, structs.NOTIFY_INVAL_INODE_OUT.pack(node, 0, 0))

    def waiting(self) -> list[tuple[int, bytes]]:
        """What would be sent, in order: code and body."""
        messages = list(self.notifier._waiting.values())
        return [(struct.unpack_from("=i", message, 4)[0], message[16:]) for message in messages]

    def size(self) -> int:
        return sum(map(len, self.notifier._waiting.values()))

    def close(self) -> None:
        self.notifier._waiting.clear()
        self.notifier._condition.release()
        self.notifier.close()
        self.notifier._thread.join(5)
        for fd in (self.reader, self._writer, self._memory):
            os.close(fd)
        self.__dict__.clear()


@contextlib.contextmanager
def some_queue() -> Iterator[Queue]:
    queue = Queue()
    try:
        yield queue
    finally:
        queue.close()


def test_stores_are_applied_in_the_order_in_which_they_came():
    """One that replaced a waiting one of the same place was applied before those that came in between."""
    with some_queue() as queue:
        enter(queue.table, ROOT, b"f", 5)
        for offset, data in ((0, b"a" * PAGE), (100, b"b" * 100), (0, b"c" * PAGE)):
            queue.store(5, offset, data)
        page = bytearray(PAGE)
        for code, body in queue.waiting():
            assert code == Notify.STORE
            _, offset, size = structs.NOTIFY_STORE_OUT.unpack_from(body)
            page[offset : offset + size] = body[structs.NOTIFY_STORE_OUT.size :]
        assert page == b"c" * PAGE


def test_a_store_after_an_invalidation_stays_after_it():
    with some_queue() as queue:
        enter(queue.table, ROOT, b"f", 5)
        queue.store(5, 0, b"old" * PAGE)
        queue.invalidate(5)
        queue.store(5, 0, b"new" * PAGE)
        assert [code for code, _ in queue.waiting()] == [Notify.INVAL_INODE, Notify.STORE]


def test_stores_of_one_place_again_and_again_are_no_flood():
    """Their sizes were added up although each replaced the one before: what was stored was thrown away."""
    with some_queue() as queue:
        enter(queue.table, ROOT, b"f", 5)
        for _ in range(1000):
            queue.store(5, 0, bytes(64 * 1024))
        assert [code for code, _ in queue.waiting()] == [Notify.STORE]


def test_too_many_stores_become_invalidations():
    with some_queue() as queue:
        for node in range(5, 15):
            enter(queue.table, ROOT, b"f%d" % node, node)
        for at in range(400):
            queue.store(5 + at % 10, at * 65536, bytes(65536))
            assert queue.size() < 5 << 20
        codes = [code for code, _ in queue.waiting()]
        assert codes.count(Notify.INVAL_INODE) == 10


def test_too_many_names_become_one_that_expires_all():
    with some_queue() as queue:
        enter(queue.table, ROOT, b"f", 5)
        queue.invalidate(5)
        for number in range(20_000):
            name = b"%d" % number
            body = structs.NOTIFY_INVAL_ENTRY_OUT.pack(1, len(name), 0) + name + b"\0"
            queue.put(Notify.INVAL_ENTRY, body)
        waiting = queue.waiting()
        assert len(waiting) < 5000
        assert Notify.INC_EPOCH in [code for code, _ in waiting]
        assert Notify.INVAL_INODE in [code for code, _ in waiting]
        assert not queue.faults


def test_ids_are_the_kernels():
    with some_queue() as queue:
        top = enter(queue.table, ROOT, b"d", 77, DIRECTORY)
        child = enter(queue.table, top, b"f", 88)
        queue.put(Notify.DELETE, structs.NOTIFY_DELETE_OUT.pack(77, 88, 1) + b"f\0")
        ((code, body),) = queue.waiting()
        assert code == Notify.DELETE
        assert structs.NOTIFY_DELETE_OUT.unpack_from(body)[:2] == (queue.table.node_id(top), queue.table.node_id(child))


def test_names_that_cannot_be_are_faults():
    with some_queue() as queue:
        wrong = ((b"a/b\0", 3), (b"a\0b\0", 3), (b"\0", 0), (b"abc\0", 2), (b"abc", 3), (b"abc\0", 2**32 - 1))
        for name, length in wrong:
            queue.put(Notify.INVAL_ENTRY, structs.NOTIFY_INVAL_ENTRY_OUT.pack(1, length, 0) + name)
            queue.put(Notify.DELETE, structs.NOTIFY_DELETE_OUT.pack(1, 1, length) + name)
        assert len(queue.faults) == 12
        assert not queue.waiting()


def test_attributes_and_pollers_are_not_forgotten_in_a_flood():
    with some_queue() as queue:
        enter(queue.table, ROOT, b"f", 5)
        queue.put(Notify.INVAL_INODE, structs.NOTIFY_INVAL_INODE_OUT.pack(5, -1, 0))
        queue.put(Notify.POLL, structs.NOTIFY_POLL_WAKEUP_OUT.pack(4711))
        for number in range(10_000):
            name = b"%d" % number
            queue.put(Notify.INVAL_ENTRY, structs.NOTIFY_INVAL_ENTRY_OUT.pack(1, len(name), 0) + name + b"\0")
        codes = [code for code, _ in queue.waiting()]
        assert Notify.INVAL_INODE in codes
        assert Notify.POLL in codes


def test_pollers_that_nobody_has_are_bounded():
    with some_queue() as queue:
        for number in range(50_000):
            queue.put(Notify.POLL, structs.NOTIFY_POLL_WAKEUP_OUT.pack(number))
        assert len(queue.waiting()) < 5000


def test_invalidations_of_many_nodes_do_not_take_longer_and_longer():
    """With more nodes than the queue's limit each new one merged all others again."""
    with some_queue() as queue:
        for node in range(4000):
            enter(queue.table, ROOT, b"%d" % node, 10 + node)
        for _ in range(3):
            began = time.thread_time()
            for node in range(4000):
                queue.invalidate(10 + node)
                queue.put(Notify.INVAL_INODE, structs.NOTIFY_INVAL_INODE_OUT.pack(10 + node, -1, 0))
            assert time.thread_time() - began < 5
        assert len({body[:8] for code, body in queue.waiting() if code == Notify.INVAL_INODE}) == 4000


def away_of(queue: Queue, kernel_minor: int) -> Away:
    service = types.SimpleNamespace(
        nodes=queue.table,
        notifier=queue.notifier,
        counters=types.SimpleNamespace(detaches=0, invalidated=0),
        recovery=types.SimpleNamespace(parked={}),
        kernel_minor=kernel_minor,
    )
    return Away(service)  # type: ignore[arg-type]


@pytest.mark.parametrize("kernel_minor", [43, 44])
def test_when_a_device_stays_away_a_kernel_that_cannot_expire_all_names_is_told_of_each(kernel_minor):
    with some_queue() as queue:
        top = enter(queue.table, ROOT, b"d", 77, DIRECTORY)
        child = enter(queue.table, top, b"f", 88)
        queue.table.lookups[top] = queue.table.lookups[child] = 1
        queue.notifier._condition.release()  # it sends, to a pipe
        away = away_of(queue, kernel_minor)
        told: list[bool] = []
        away.knows_nothing = told.append
        away.begin(0.0)
        assert told == [True]
        while away.sweeping:
            away.sweep()
        while len(queue.notifier):
            time.sleep(0.001)
        queue.notifier._condition.acquire()
        said = os.read(queue.reader, 1 << 16)
        codes, names = [], []
        while said:
            size, code = struct.unpack_from("=Ii", said)
            codes.append(code)
            if code == Notify.INVAL_ENTRY:
                assert struct.unpack_from("=QII", said, 16)[2] == 1, "its files and what is mounted there stay"
                names.append(said[32 : size - 1])
            said = said[size:]
        assert codes.count(Notify.INVAL_INODE) == 3
        assert codes[0] == Notify.INC_EPOCH
        assert sorted(names) == ([b"d", b"f"] if kernel_minor < 44 else [])


def test_invalidations_come_as_fast_as_the_kernel_takes_them():
    with some_queue() as queue:
        for number in range(5000):
            queue.table.lookups[enter(queue.table, ROOT, b"%d" % number, 10 + number)] = 1
        away = away_of(queue, 45)

        class Stuck:
            """A notifier whose kernel takes nothing."""

            def __init__(self) -> None:
                self.sent: list[int] = []
                self.waiting = 0

            def __len__(self) -> int:
                return self.waiting

            def expire_names(self) -> None:
                self.waiting += 1

            def invalidate(self, node_id: int) -> None:
                self.sent.append(node_id)
                self.waiting += 1

        away._s.notifier = stuck = Stuck()  # type: ignore[assignment]
        away.begin(0.0)
        for _ in range(100):
            away.sweep()
        assert stuck.waiting == 512
        while away.sweeping:
            stuck.waiting = 0
            away.sweep()
        assert len(stuck.sent) == len(set(stuck.sent)) == 5001
