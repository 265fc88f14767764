# /// udf
# kind = "fs"
# interface = 1
# class = "Fat"
# description = "A FAT12, FAT16 or FAT32 volume with long names, as sticks and memory cards have it"
# source = "block"
# filesystems = ["vfat"]
# exclusive = true
# durability = "store"
# inodes = "volatile"
# window = "16M"
#
# [option.uid]
# type = "int"
# default = -1
# help = "owner of everything; -1: who runs the driver"
#
# [option.gid]
# type = "int"
# default = -1
# help = "group of everything; -1: that of who runs the driver"
#
# [option.umask]
# type = "str"
# default = "022"
# help = "permission bits that nothing has, octal"
#
# [option.dmask]
# type = "str"
# default = ""
# help = "the same for directories, if it is another"
#
# [option.fmask]
# type = "str"
# default = ""
# help = "the same for files, if it is another"
#
# [option.utc]
# type = "bool"
# default = false
# help = "the volume's times are in UTC, not in local time"
#
# [option.codepage]
# type = "int"
# default = 437
# help = "code page of short names"
#
# [option.quiet]
# type = "bool"
# default = false
# help = "chown and chmod that FAT cannot do are no errors"
# ///
"""fat: FAT12, FAT16 and FAT32 volumes with long names, on a block service.

The files, from the kernel inwards: operations (names), handles and attributes (the other requests), renames, contents,
reserve and ahead (what is in files), nodes (what a file is while it is used); directory, index, slots, dots, entries,
names, times (directories and the format of what is in them); stream and chain (where on the volume a byte is); table
and free (the file allocation table); change, sectors and intents (how metadata gets to the device, whole or not at
all); volume (all of it, and its state of order); boot and damage; device (the block service), turns (who is next).

A change of metadata is recorded in the state store, then written in an order that may be cut anywhere. So a killed
driver's successor completes it, and of a stick that is pulled out fsck.fat loses nothing that was durable.
"""

from __future__ import annotations

from .operations import Fat

__all__ = ["Fat"]
