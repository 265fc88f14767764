"""Where a driver is in the middle of its work: the points at which it changes something, and its death at one of them.

A point is the moment before a system call that changes files, or before a store into memory that is shared and outlives
the process (a state store, a mapped file). The first point is still "nothing done", and what comes after the last one
is the reply: a death there leaves everything done and nothing said. Points are counted by ptrace(2), so the same
request has the same points in each run: no clock decides.

Stores are seen by taking the right to write the shared mappings away (mprotect, made in the driver's name): each store
becomes a SIGSEGV that we get instead of the driver, which is given the page for one instruction.

Owns: one thread that traces one driver process, from `start` to the driver's end. Must never: let a traced driver live
on without it. Called by: bench.py.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from udf.testing import ptrace

_PAGE = os.sysconf("SC_PAGESIZE")
_MPROTECT = 10
_READ, _READ_WRITE = 1, 3  # PROT_
_MOST = 32  # stores into one page that are counted; a copy of many bytes has as many that tell nothing more
_REMOVE = 9  # MADV_REMOVE
_CHANGES_OPEN = os.O_CREAT | os.O_TRUNC | (os.O_TMPFILE & ~os.O_DIRECTORY)

# System calls of x86-64 that change files whatever their arguments are.
_CHANGE = frozenset(
    {
        76, 77,  # truncate ftruncate
        82, 83, 84, 85, 86, 87, 88,  # rename mkdir rmdir creat link unlink symlink
        90, 91, 92, 93, 94,  # chmod fchmod chown fchown lchown
        132, 133, 188, 189, 190, 197, 198, 199,  # utime mknod, (l|f)(set|remove)xattr
        235, 258, 259, 260, 261, 263, 264, 265, 266, 268,  # utimes mkdirat mknodat fchownat futimesat unlinkat renameat
        280, 285, 316, 326, 452, 463, 466,  # utimensat fallocate renameat2 copy_file_range fchmodat2 xattrat
    }
)  # fmt: skip
_WRITES = frozenset({1, 18, 20, 296, 328, 40})  # write pwrite64 writev pwritev pwritev2 sendfile: where it is a file
_SENDS = frozenset({1, 20, 44, 46})  # write writev sendto sendmsg: where it is the link
_GETS = frozenset({0, 19, 45, 47})  # read readv recvfrom recvmsg: there too
_IN_PIECES, _BY_HEADER = (19, 20), (46, 47)
_OPEN, _OPENAT, _MADVISE = 2, 257, 28


class Tracer:
    """Traces one driver. `done` is called in its thread when nothing of the driver runs any more."""

    def __init__(self, pid: int, link: int, done: Callable[[], object]) -> None:
        """`link`: the inode number of the driver's end of the link."""
        self.points: dict[int, int] = {}  # of each request that was answered, by its number
        self.killed = False
        self.error = ""  # why it could not go on
        self._pid = pid
        self._link = link
        self._done = done
        self._counts: dict[int, int] = {}  # of those that are not answered yet
        self._target = 0  # number of the request over which it is to die
        self._stop_at = 0
        self._reads: dict[int, int] = {}  # thread -> where it gets its next request
        self._works_on: dict[int, int] = {}  # thread -> the request that it got last
        self._last = 0  # the request that any of them got last
        self._fresh = False  # pages are to be counted anew
        self._ready = threading.Event()
        self._gadget = 0
        self._areas: list[tuple[int, int]] = []
        self._stores: dict[int, int] = {}  # page -> how many
        self._opened: set[int] = set()  # pages whose stores are not counted for now
        self._files: dict[int, bool] = {}
        self._new: set[int] = set()
        self._thread = threading.Thread(target=self._run, name="udf-tracer", daemon=True)

    def start(self) -> bool:
        """Begin; returns when the driver is traced, and whether it is."""
        self._thread.start()
        self._ready.wait()
        return not self.error

    def begin(self) -> None:
        """A request is about to be passed on: the stores into each page are counted anew."""
        self._fresh = True

    def kill_at(self, point: int, unique: int) -> None:
        """End the driver before that point of this request, which it has not got yet, or else at the reply to it."""
        self._target, self._stop_at = unique, point

    def join(self) -> None:
        """Wait for the end; the driver's comes first."""
        if self._thread.ident is not None:
            self._thread.join()

    # ---- the thread

    def _run(self) -> None:
        try:
            try:
                self._seize()
            finally:
                self._ready.set()
            self._follow()
        except (OSError, ptrace.Gone) as error:
            self.error = str(error) or "it has ended"
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            self._reap()
        finally:
            self._done()

    def _seize(self) -> None:
        seized: set[int] = set()
        while new := {int(name) for name in os.listdir(f"/proc/{self._pid}/task")} - seized:
            for tid in new:
                ptrace.seize(tid)
                ptrace.interrupt(tid)
                os.waitpid(tid, ptrace.WAIT_ALL)
            seized |= new
        self._gadget = next(filter(None, map(ptrace.syscall_instruction, seized)), 0)
        if not self._gadget:
            raise OSError("no thread of the driver waits in a system call")
        self._areas = list(_shared_areas(self._pid))
        for start, end in self._areas:
            self._protect(self._pid, start, end - start, _READ)
        for tid in seized:
            ptrace.go_on(tid)

    def _protect(self, tid: int, start: int, size: int, rights: int) -> None:
        error = ptrace.call(tid, self._gadget, _MPROTECT, start, size, rights)
        if error:
            raise OSError(-error, f"the driver's memory could not be protected: {os.strerror(-error)}")

    def _follow(self) -> None:
        while True:
            try:
                tid, status = os.waitpid(-1, ptrace.WAIT_ALL | ptrace.WAIT_OWN)
            except ChildProcessError:
                return
            if not os.WIFSTOPPED(status):
                continue
            if self.killed:
                continue  # SIGKILL takes it out of its stop
            try:
                self._stopped(tid, status)
            except ptrace.Gone:
                continue

    def _stopped(self, tid: int, status: int) -> None:
        number = os.WSTOPSIG(status)
        passed = 0
        if number == ptrace.SYSCALL_STOP:
            call = ptrace.entered(tid)
            if isinstance(call, int):
                self._returned(tid, call)
            elif call.number in _SENDS and self._is_link(call.args[0]):
                self._answers(self._word(self._message(call) + 8))
            elif call.number in _GETS and self._is_link(call.args[0]):
                self._reads[tid] = self._message(call)
            elif self._changes(call):
                self._point(tid)
        elif status >> 16:
            pass  # a new thread, or the stop that it begins with
        elif number == signal.SIGSEGV and self._is_ours(address := ptrace.fault_address(tid)):
            self._store(tid, address)
        else:
            passed = number
        if not self.killed:
            ptrace.go_on(tid, passed)

    def _returned(self, tid: int, result: int) -> None:
        """A system call has returned: it may have got a request."""
        at = self._reads.pop(tid, 0)
        if at and result > 0:
            # A FORGET has the number 0, and what is done for it is nobody's.
            self._last = self._works_on[tid] = self._word(at + 8)
            self._counts[self._last] = 0
        if self._fresh:
            self._count_anew(tid)

    def _answers(self, unique: int) -> None:
        """A reply is about to be sent."""
        if unique:
            self.points[unique] = self._counts.pop(unique, 0)
            if unique == self._target:
                self._kill()

    def _point(self, tid: int) -> None:
        # Work that is passed on to another thread is the last request's, as far as anybody can tell.
        unique = self._works_on.get(tid, self._last)
        if unique not in self._counts:
            return  # it is answered already: what is done now is done for none
        self._counts[unique] += 1
        if unique == self._target and self._counts[unique] == self._stop_at:
            self._kill()

    def _kill(self) -> None:
        self.killed = True
        os.kill(self._pid, signal.SIGKILL)

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-1, ptrace.WAIT_ALL | ptrace.WAIT_OWN)

    # ---- stores

    def _is_ours(self, address: int) -> bool:
        return any(start <= address < end for start, end in self._areas)

    def _store(self, tid: int, address: int) -> None:
        page = address & -_PAGE
        self._stores[page] = self._stores.get(page, 0) + 1
        self._point(tid)
        if self.killed:
            return
        open_now = [page]
        self._protect(tid, page, _PAGE, _READ_WRITE)
        # One that lies across two pages faults again in the second one.
        while (stopped := ptrace.step(tid)) == signal.SIGSEGV:
            page = ptrace.fault_address(tid) & -_PAGE
            if not self._is_ours(page) or page in open_now:
                raise OSError(f"the driver's thread {tid} does not get past a store")
            open_now.append(page)
            self._protect(tid, page, _PAGE, _READ_WRITE)
        if stopped != signal.SIGTRAP:
            raise OSError(f"the driver's thread {tid} got signal {stopped} at a store")
        for page in open_now:
            if self._stores.get(page, 0) < _MOST:
                self._protect(tid, page, _PAGE, _READ)
            else:
                self._opened.add(page)

    def _count_anew(self, tid: int) -> None:
        self._fresh = False
        for page in self._opened:
            self._protect(tid, page, _PAGE, _READ)
        self._opened.clear()
        self._stores.clear()

    # ---- system calls

    def _is_link(self, fd: int) -> bool:
        return self._stat(fd).st_ino == self._link

    def _message(self, call: ptrace.Call) -> int:
        """Where in the driver's memory the message begins that it sends or gets."""
        number, args = call
        at = args[1]
        if number in _BY_HEADER:
            at = self._word(at + 16)  # msg_iov
        if number in _BY_HEADER or number in _IN_PIECES:
            at = self._word(at)  # of the first piece, in which the header is
        return at

    def _word(self, address: int) -> int:
        with open(f"/proc/{self._pid}/mem", "rb", buffering=0) as memory:
            return int.from_bytes(os.pread(memory.fileno(), 8, address), "little")

    def _stat(self, fd: int) -> os.stat_result:
        return os.stat(f"/proc/{self._pid}/fd/{fd & 0xFFFFFFFF}")

    def _changes(self, call: ptrace.Call) -> bool:
        number, args = call
        if number in _CHANGE:
            return True
        try:
            if number in _WRITES:
                return stat.S_ISREG(self._stat(args[0]).st_mode)
        except OSError:
            return False  # it will fail
        if number == _OPEN:
            return bool(args[1] & _CHANGES_OPEN)
        if number == _OPENAT:
            return bool(args[2] & _CHANGES_OPEN)
        return number == _MADVISE and args[2] == _REMOVE


def _shared_areas(pid: int) -> Iterable[tuple[int, int]]:
    """The mappings through which a store reaches what outlives the process, neighbours joined."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        span, rights, _, _, _, *path = line.split(None, 5)
        if rights.startswith("rw") and rights.endswith("s") and path[0:1] != ["/dev/zero (deleted)"]:
            start, _, end = span.partition("-")
            yield int(start, 16), int(end, 16)
