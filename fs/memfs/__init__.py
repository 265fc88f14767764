# /// udf
# kind = "fs"
# interface = 1
# class = "Memfs"
# description = "A POSIX-complete filesystem in memory"
# source = "none"
# exclusive = true
# acl = true
# open = "lazy"
# durability = "store"
# nodes = "stable"
#
# [option.size]
# type = "size"
# default = "1G"
# help = "how many bytes of contents, xattrs and symlinks it holds (exactly; then ENOSPC)"
#
# [option.inodes]
# type = "int"
# default = 1048576
# help = "how many inodes and further names it holds"
#
# [option.mode]
# type = "str"
# default = "755"
# help = "permission bits of the root directory, octal"
#
# [option.uid]
# type = "int"
# default = -1
# help = "owner of the root directory; -1: who runs the driver"
#
# [option.gid]
# type = "int"
# default = -1
# help = "group of the root directory; -1: that of who runs the driver"
# ///
"""memfs: a POSIX-complete filesystem in memory.

The files, from the kernel inwards: operations (every FUSE request), change (of attributes), tree (names, link counts,
limits), nodes (what an inode is), xattrs and acl, contents (the extents of one file), arena (pages of memory), space
(what is left). Metadata (nodes) and contents (arena) meet only in `File.contents`.

What outlives this process is in its state store (kept): the tree in a journal (records: its formats, snapshot: the
whole tree for compaction, load: the way back), the pages of files in the arena. A request is answered when it is there.
"""

from __future__ import annotations

from .operations import Memfs

__all__ = ["Memfs"]
