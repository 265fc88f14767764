# /// udf
# kind = "fs"
# interface = 1
# class = "Passthrough"
# description = "mirrors a directory"
# source = "directory"
# capabilities = [
#     "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_MKNOD",
#     "CAP_SETFCAP", "CAP_SETGID", "CAP_SETUID",
# ]
# acl = true
# open = "known"
# durability = "source"
# inodes = "generation"
#
# [option.timeout]
# type = "float"
# default = 1.0
# help = "seconds for which names and attributes are believed; changes behind the mount show within them"
# ///
"""Mirrors a directory, POSIX-complete, by descriptors and single names instead of paths.

Owns the meaning of each request; nodes.py owns which file is meant, replies.py what the answers look like. Called by
pyfuse3, one request at a time: between two awaits nothing else runs. The kernel checks permissions
(default_permissions is always on), we act with the driver's authority.

What a user should know: mount points inside the source are not entered and not listed (EXDEV); `trusted.*` attributes
need CAP_SYS_ADMIN, which no driver has; without CAP_SETUID and CAP_SETGID new files belong to the driver's user.

Reads and writes run in the loop: for data in the page cache the call takes a few microseconds, a trip through a
worker thread fifty. What may wait long (fsync, freeing a large file, close on a network filesystem) takes a thread.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, ReaddirToken, RequestContext, SetattrFields, StatvfsData

from . import calls, large
from .nodes import Node, Nodes
from .replies import Listing, attributes, entry_of, filesystem, refusal

# What an open for I/O keeps of the caller's flags. O_APPEND: the kernel gives offsets. O_DIRECT: our buffers are not
# aligned. O_CREAT, O_EXCL: the file exists. O_NOFOLLOW: would refuse the descriptor's link in /proc.
_OPEN_FLAGS = os.O_ACCMODE | os.O_TRUNC | os.O_SYNC | os.O_DSYNC | os.O_NOATIME
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_ACLS = (b"system.posix_acl_access", b"system.posix_acl_default")
_DOTS = (b".", b"..")
_T = TypeVar("_T")


class Passthrough(pyfuse3.Operations):
    """A directory of the source filesystem under another mount point."""

    supports_dot_lookup = False  # a LOOKUP of ".." would be a way out of the source
    enable_acl = True

    def __init__(self, source: str, timeout: float = 1.0) -> None:
        if not (math.isfinite(timeout) and timeout >= 0):
            raise ValueError(f"timeout must be a number of seconds, not {timeout}")
        self._timeout = timeout
        self._nodes = Nodes(source)
        self._identity = calls.Identity()
        self._remote = calls.is_remote(self._nodes.root_fd)
        self._umask = -1  # of the process; unknown, because the host sets it after this
        self._files: dict[int, Node] = {}
        self._listings: dict[int, Listing] = {}

    # -- attributes

    def _enter(self, parent: int, name: bytes) -> EntryAttributes:
        """The reply of whatever binds a name to a node: counts one lookup."""
        node, st = self._nodes.enter(parent, name)
        node.lookups += 1
        return entry_of(node, st, self._timeout)

    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        try:
            if name in _DOTS or b"/" in name:
                raise OSError(errno.EINVAL, "not a name")
            return self._enter(parent_inode, name)
        except OSError as e:
            raise refusal(e) from None

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for fd in self._nodes.forget(inode_list):
            await large.close(fd)

    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        try:
            return attributes(inode, os.fstat(self._nodes.fd(inode)), self._timeout)
        except OSError as e:
            raise refusal(e) from None

    async def setattr(
        self, inode: int, attr: EntryAttributes, fields: SetattrFields, fh: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        # Owner before mode: chown(2) clears set-id bits, and the kernel asks for those that are to remain.
        # Times last, because everything else changes them.
        try:
            times = fields.update_atime or fields.update_mtime
            if fields.update_size:
                await self._truncate(inode, fh, attr.st_size)
            fd = self._nodes.fd(inode)
            link = b"%d" % fd
            if fields.update_uid or fields.update_gid or not (times or fields.update_mode or fields.update_size):
                # All of them absent is chown(path, -1, -1), which changes ctime.
                uid = attr.st_uid if fields.update_uid else -1
                os.chown(link, uid, attr.st_gid if fields.update_gid else -1, dir_fd=self._nodes.proc)
            if fields.update_mode:
                os.chmod(link, attr.st_mode & 0o7777, dir_fd=self._nodes.proc)
            if times:
                calls.set_times(
                    fd,
                    attr.st_atime_ns if fields.update_atime else None,
                    attr.st_mtime_ns if fields.update_mtime else None,
                )
            return attributes(inode, os.fstat(fd), self._timeout)
        except OSError as e:
            raise refusal(e) from None

    async def _truncate(self, inode: int, fh: int | None, size: int) -> None:
        if fh is not None:
            try:
                await large.truncate(fh, size)
                return
            except OSError as e:
                if e.errno not in (errno.EINVAL, errno.EBADF):  # not open for writing
                    raise
        fd = self._nodes.open_again(inode, os.O_WRONLY | os.O_NONBLOCK)
        try:
            await large.truncate(fd, size)
        finally:
            os.close(fd)

    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        try:
            return os.readlink(b"", dir_fd=self._nodes.fd(inode))
        except OSError as e:
            raise refusal(e) from None

    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        try:
            return filesystem(self._nodes.root_fd)
        except OSError as e:
            raise refusal(e) from None

    # -- extended attributes: through the descriptor's link in /proc, because O_PATH descriptors have none of their own

    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        try:
            return os.getxattr(b"/proc/self/fd/%d" % self._nodes.fd(inode), name)
        except OSError as e:
            if e.errno == errno.EOPNOTSUPP and name in _ACLS:
                # The kernel asks for ACLs with each check of permissions, and takes this error for a refusal.
                raise FUSEError(errno.ENODATA) from None
            raise refusal(e) from None

    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        try:
            os.setxattr(b"/proc/self/fd/%d" % self._nodes.fd(inode), name, value)
        except OSError as e:
            raise refusal(e) from None

    async def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        try:
            return [os.fsencode(name) for name in os.listxattr(b"/proc/self/fd/%d" % self._nodes.fd(inode))]
        except OSError as e:
            raise refusal(e) from None

    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        try:
            os.removexattr(b"/proc/self/fd/%d" % self._nodes.fd(inode), name)
        except OSError as e:
            raise refusal(e) from None

    # -- names

    def _as_caller(self, ctx: RequestContext, call: Callable[[], _T]) -> _T:
        """Create something as the caller. The umask goes to the source's own filesystem, because it alone knows
        whether the directory has a default ACL, which replaces the umask."""
        if ctx.umask != self._umask:
            os.umask(ctx.umask)
            self._umask = ctx.umask
        identity = self._identity
        if (ctx.uid == identity.uid and ctx.gid == identity.gid) or not identity.can_change:
            return call()
        identity.assume(ctx.uid, ctx.gid)
        try:
            return call()
        finally:
            identity.restore()

    def _make(self, parent: int, name: bytes, ctx: RequestContext, call: Callable[[int], None]) -> EntryAttributes:
        """Make an entry by call(descriptor of the directory) and reply with what is there."""
        try:
            directory = self._nodes.fd(parent)
            self._as_caller(ctx, lambda: call(directory))
            return self._enter(parent, name)
        except OSError as e:
            raise refusal(e) from None

    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        # Always O_EXCL: only a file of our own making is sure to be neither a link out of the source, nor a fifo
        # that blocks, nor somebody's file that the caller may not open. If one has come behind the mount, ESTALE
        # makes the kernel look again and then OPEN what is there, with all its checks.
        how = flags & _OPEN_FLAGS | os.O_CREAT | os.O_EXCL
        try:
            directory = self._nodes.fd(parent_inode)
            fh = self._as_caller(ctx, lambda: self._nodes.open(name, how, directory, mode & 0o7777))
            try:
                node, st = self._nodes.created(parent_inode, name, fh)
            except OSError:
                os.close(fh)
                raise
        except OSError as e:
            if e.errno == errno.EEXIST and not flags & os.O_EXCL:
                raise FUSEError(errno.ESTALE) from None
            raise refusal(e) from None
        node.lookups += 1
        self._files[fh] = node
        return FileInfo(fh=fh, keep_cache=True), entry_of(node, st, self._timeout)

    async def mknod(self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext) -> EntryAttributes:
        return self._make(parent_inode, name, ctx, lambda directory: os.mknod(name, mode, rdev, dir_fd=directory))

    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        return self._make(parent_inode, name, ctx, lambda directory: os.mkdir(name, mode & 0o7777, dir_fd=directory))

    async def symlink(self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext) -> EntryAttributes:
        return self._make(parent_inode, name, ctx, lambda directory: os.symlink(target, name, dir_fd=directory))

    async def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext) -> EntryAttributes:
        try:
            fd, directory = self._nodes.fds(inode, new_parent_inode)
            os.link(b"%d" % fd, new_name, src_dir_fd=self._nodes.proc, dst_dir_fd=directory)
            return self._enter(new_parent_inode, new_name)
        except OSError as e:
            raise refusal(e) from None

    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        try:
            self._nodes.pin(parent_inode, name)
            directory = self._nodes.fd(parent_inode)
            held = large.hold(name, directory)
            try:
                os.unlink(name, dir_fd=directory)
            finally:
                await large.close(held)
        except OSError as e:
            raise refusal(e) from None

    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        try:
            self._nodes.pin(parent_inode, name)
            os.rmdir(name, dir_fd=self._nodes.fd(parent_inode))
        except OSError as e:
            raise refusal(e) from None

    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        nodes = self._nodes
        try:
            if not flags & pyfuse3.RENAME_EXCHANGE:
                nodes.pin(parent_inode_new, name_new)
            old, new = nodes.fds(parent_inode_old, parent_inode_new)
            held = -1
            try:
                if flags:
                    calls.rename(old, name_old, new, name_new, flags)
                else:
                    held = large.hold(name_new, new)
                    os.rename(name_old, name_new, src_dir_fd=old, dst_dir_fd=new)
                nodes.moved(parent_inode_new, name_new)
                if flags & pyfuse3.RENAME_EXCHANGE:
                    nodes.moved(parent_inode_old, name_old)
            finally:
                await large.close(held)
        except OSError as e:
            raise refusal(e) from None

    # -- files: the file handle is the descriptor

    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        # keep_cache: the kernel compares size and time of modification whenever it refreshes attributes, and drops
        # the pages of a file that changed behind the mount.
        try:
            fh = self._nodes.open_again(inode, flags & _OPEN_FLAGS | os.O_NONBLOCK)
        except OSError as e:
            raise refusal(e) from None
        self._files[fh] = self._nodes.opened(inode)
        return FileInfo(fh=fh, keep_cache=True)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        try:
            return os.pread(fh, size, off)
        except OSError as e:
            raise refusal(e) from None

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        try:
            return os.pwrite(fh, buf, off)
        except OSError as e:
            raise refusal(e) from None

    async def fsync(self, fh: int, datasync: bool) -> None:
        try:
            await trio.to_thread.run_sync(os.fdatasync if datasync else os.fsync, fh)
        except OSError as e:
            raise refusal(e) from None

    async def flush(self, fh: int) -> None:
        # Local filesystems do nothing at close(2); ENOSYS spares a round trip for each close from now on.
        if not self._remote:
            raise FUSEError(errno.ENOSYS)
        try:
            await trio.to_thread.run_sync(os.close, os.dup(fh))
        except OSError as e:
            raise refusal(e) from None

    async def release(self, fh: int) -> None:
        self._nodes.released(self._files.pop(fh), fh)
        try:
            await large.close(fh)
        except OSError as e:
            raise refusal(e) from None

    # -- directories

    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        try:
            fd = self._nodes.open_again(inode, _DIRECTORY)
        except OSError as e:
            raise refusal(e) from None
        self._listings[fd] = Listing(fd, self._nodes.opened(inode), self._nodes, self._timeout)
        return fd

    async def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        try:
            self._listings[fh].deliver(start_id, token)
        except OSError as e:
            raise refusal(e) from None

    async def releasedir(self, fh: int) -> None:
        self._nodes.released(self._listings.pop(fh).node, fh)
        os.close(fh)

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        await self.fsync(fh, datasync)
