"""Freeing large files elsewhere than in the loop: giving back gigabytes of pages and extents takes up to seconds.

Owns the choice of what is large. Called by the handlers around whatever may drop the last reference to a file, and
for truncating one.
"""

from __future__ import annotations

import os

import trio

_LARGE = 256 << 20  # on a common disk freeing this much takes some 20 ms


def hold(name: bytes, directory: int) -> int:
    """A descriptor (O_PATH) of a large file whose last name is about to go, to be given to close(); -1: none."""
    try:
        st = os.stat(name, dir_fd=directory, follow_symlinks=False)
        if st.st_size >= _LARGE and st.st_nlink == 1:
            return os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    except OSError:
        pass  # the removal itself will say why; or no descriptor is left: then it is freed on the spot
    return -1


async def close(fd: int) -> None:
    """Close the descriptor, in a thread if that frees a large file. -1 is none."""
    if fd < 0:
        return
    st = os.fstat(fd)
    if st.st_nlink or st.st_size < _LARGE:
        os.close(fd)
    else:
        await trio.to_thread.run_sync(os.close, fd)


async def truncate(fd: int, size: int) -> None:
    """ftruncate(2), in a thread if that frees much."""
    if os.fstat(fd).st_size - size < _LARGE:
        os.ftruncate(fd, size)
    else:
        await trio.to_thread.run_sync(os.ftruncate, fd, size)
