"""The boot sector: where everything is on the volume, in bytes, and whether it was left clean.

Owns: the layout of boot sector and FSInfo, the checks that make a `Geometry` trustworthy, both kinds of dirty bit.
Must never: do I/O, or let a number through that was not compared with the device's size.
Called by: volume.py.

The kind is decided as Linux does: FAT32 when the 16-bit length of the FAT is 0, else by the number of clusters.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from udf import UserError

_MAX_SECTOR = 4096
_MAX_CLUSTERS = {12: 4084, 16: 65524, 32: 0x0FFFFFF6 - 1}
_FAT12_BELOW = 4085
_HEAD = struct.Struct("<HBHBHHBHHHII")  # from byte 11
_WIDE = struct.Struct("<IHHIHH")  # from byte 36 of a FAT32
_FOREIGN = {
    b"EXFAT   ": "an exFAT volume",
    b"NTFS    ": "an NTFS volume",
    b"-FVE-FS-": "a BitLocker volume",
    b"HPFS    ": "an HPFS volume",
    b"ReFS\0\0\0\0": "a ReFS volume",
}

_INFO = struct.Struct("<4s480s4sII12s4s")
_INFO_SIGNATURES = (b"RRaA", b"rrAa", b"\0\0\x55\xaa")
INFO_BYTES = 512
COUNTS_OFFSET = 488  # of FSInfo's two numbers in it
_UNKNOWN = 0xFFFFFFFF

_DIRTY = 1  # Linux's bit (and Windows NT's) in the boot sector
_CLEAN = {16: 0x8000, 32: 0x0800_0000}  # the bit of FAT[1] that a clean shutdown sets
_UNHURT = {16: 0x4000, 32: 0x0400_0000}  # the bit that a disk error clears


@dataclass(frozen=True)
class Geometry:
    """A volume that makes sense. All offsets and lengths are in bytes from its beginning; 0 where there is none."""

    kind: int  # 12, 16 or 32
    sector: int
    cluster: int
    fats: int  # copies
    fat_offset: int  # of the first copy
    fat_bytes: int  # of one copy
    active_fat: int  # the copy that is read
    mirrored: bool  # every copy is written; else the active one only
    root_offset: int  # of the fixed root (FAT12/16)
    root_entries: int
    root_cluster: int  # of the root that grows (FAT32)
    data_offset: int
    clusters: int  # numbered from 2 to clusters + 1
    fsinfo_offset: int
    backup_offset: int
    volume_id: int
    label_bytes: bytes  # 11, as in the boot sector; the label that is shown is the root directory's
    media: int
    size: int  # of the volume, which may be smaller than the device
    is_dirty: bool  # by the boot sector's bit; FAT[1] has another
    is_cut: bool  # the device ends before the last cluster does: not to be written to

    @property
    def wide(self) -> bool:
        """Whether cluster numbers have more than 16 bits."""
        return self.kind == 32

    @property
    def last_cluster(self) -> int:
        return self.clusters + 1

    @property
    def dirty_offset(self) -> int:
        """Of the byte with the boot sector's dirty bit."""
        return 0x41 if self.wide else 0x25

    def has_cluster(self, number: int) -> bool:
        """Whether a cluster of this number is there."""
        return 2 <= number <= self.clusters + 1

    def cluster_offset(self, number: int) -> int:
        """Where a cluster's contents are; its number was checked."""
        return self.data_offset + (number - 2) * self.cluster

    def fat_copies(self) -> list[int]:
        """Offsets of the copies that are written, the one that is read last: it decides."""
        if not self.mirrored:
            return [self.fat_offset + self.active_fat * self.fat_bytes]
        others = [n for n in range(self.fats) if n != self.active_fat]
        return [self.fat_offset + n * self.fat_bytes for n in (*others, self.active_fat)]


def parse(sectors: bytes, size: int) -> Geometry:
    """From the volume's first 512 bytes or more, and the device's size. UserError says why it cannot be served."""
    if len(sectors) < 512 or size < 512:
        raise UserError(f"there is no FAT volume in {size} bytes")
    if (what := _FOREIGN.get(sectors[3:11])) is not None:
        raise UserError(f"this is {what}, which another driver has to serve: this one knows FAT12, FAT16 and FAT32")
    if not any(sectors[:512]):
        raise UserError("there is no filesystem: the first sector is empty")
    jumps = sectors[0] == 0xE9 or (sectors[0] == 0xEB and sectors[2] == 0x90)
    if sectors[510:512] != b"\x55\xaa" and not jumps:
        raise UserError("this is no FAT volume: the first sector is not a boot sector")

    sector, per_cluster, reserved, fats, entries, small, media, short, _, _, _, large = _HEAD.unpack_from(sectors, 11)
    long, flags, version, root_cluster, info, backup = _WIDE.unpack_from(sectors, 36)
    if sector not in (512, 1024, 2048, 4096):
        raise _wrong(f"its sectors have {sector} bytes, and only 512 to {_MAX_SECTOR} are possible")
    if per_cluster == 0 or per_cluster & (per_cluster - 1):
        raise _wrong(f"its clusters have {per_cluster} sectors, and only powers of two up to 128 are possible")
    if reserved == 0:
        raise _wrong("no sector is reserved for the boot sector itself")
    if not 1 <= fats <= 4:
        raise _wrong(f"it has {fats} file allocation tables, and only 1 to 4 are possible")
    if media != 0xF0 and media < 0xF8:
        raise _wrong(f"its medium is of type 0x{media:02x}, which does not exist")
    wide = short == 0
    if wide and long == 0:
        raise _wrong("its file allocation table has no length")
    if wide and version != 0:
        raise _wrong(f"it is a FAT32 of version {version >> 8}.{version & 255}, and only 0.0 is known")
    if not wide and entries == 0:
        raise _wrong("its root directory has no room for an entry")

    fat_bytes = (short or long) * sector
    fat_offset = reserved * sector
    root_offset = fat_offset + fats * fat_bytes
    data_offset = root_offset + -(-entries * 32 // sector) * sector
    total = (small or large) * sector
    cluster = per_cluster * sector
    if data_offset + cluster > total:
        raise _wrong(f"its tables need {data_offset} bytes, which leaves no room for contents in a volume of {total}")
    if data_offset + cluster > size:
        raise UserError(f"the device has {size} bytes, which is not even enough for the volume's tables: it is cut off")

    clusters = (total - data_offset) // cluster
    kind = 32 if wide else 12 if clusters < _FAT12_BELOW else 16
    if clusters > _MAX_CLUSTERS[kind]:
        raise _wrong(f"it has {clusters} clusters, which are too many for FAT{kind}")
    # A table that is too short (some formatters round down) leaves the clusters without an entry unused.
    clusters = min(clusters, fat_bytes * 8 // kind - 2)
    if clusters < 1:
        raise _wrong("its file allocation table has no room for a cluster")

    active, mirrored = 0, True
    if wide:
        if not 2 <= root_cluster <= clusters + 1:
            raise _wrong(f"its root directory is in cluster {root_cluster}, which does not exist")
        if flags & 0x80:
            active, mirrored = flags & 0x0F, False
            if active >= fats:
                raise _wrong(f"its active file allocation table is number {active} of {fats}")
    at = 64 if wide else 36  # of the part that both kinds have, elsewhere
    extended = sectors[at + 2] in (0x28, 0x29)
    return Geometry(
        kind=kind,
        sector=sector,
        cluster=cluster,
        fats=fats,
        fat_offset=fat_offset,
        fat_bytes=fat_bytes,
        active_fat=active,
        mirrored=mirrored,
        root_offset=0 if wide else root_offset,
        root_entries=0 if wide else entries,
        root_cluster=root_cluster if wide else 0,
        data_offset=data_offset,
        clusters=clusters,
        fsinfo_offset=info * sector if wide and info < reserved and info != backup else 0,
        backup_offset=backup * sector if wide and backup < reserved else 0,
        volume_id=int.from_bytes(sectors[at + 3 : at + 7], "little") if extended else 0,
        label_bytes=sectors[at + 7 : at + 18] if sectors[at + 2] == 0x29 else b"NO NAME    ",
        media=media,
        size=total,
        is_dirty=bool(sectors[at + 1] & _DIRTY),
        is_cut=data_offset + clusters * cluster > size,
    )


def _wrong(what: str) -> UserError:
    return UserError(f"the boot sector makes no sense: {what}")


def with_dirty(byte: int, dirty: bool) -> int:
    """The byte at `Geometry.dirty_offset` with its bit set or cleared; its others are not ours."""
    return byte | _DIRTY if dirty else byte & ~_DIRTY & 0xFF


def says_clean(kind: int, second: int) -> bool:
    """Whether FAT[1] says that the volume was left in order. FAT12 has no such bit."""
    return kind == 12 or bool(second & _CLEAN[kind])


def says_unhurt(kind: int, second: int) -> bool:
    """Whether FAT[1] says that there was no disk error."""
    return kind == 12 or bool(second & _UNHURT[kind])


def with_clean(kind: int, second: int, clean: bool) -> int:
    """FAT[1] with the bit of a clean shutdown set or cleared."""
    if kind == 12:
        return second
    return second | _CLEAN[kind] if clean else second & ~_CLEAN[kind]


@dataclass(frozen=True)
class FsInfo:
    """FAT32's hints. Nothing depends on them; None where there is none that could be true."""

    free: int | None  # clusters
    next: int | None  # where to look for a free one first


def parse_fsinfo(sector: bytes, geometry: Geometry) -> FsInfo | None:
    """None: these 512 bytes are no FSInfo, and must not be written to as one."""
    if len(sector) < INFO_BYTES:
        return None
    lead, _, structure, free, first, _, trail = _INFO.unpack_from(sector)
    if (lead, structure, trail) != _INFO_SIGNATURES:
        return None
    return FsInfo(
        free if free <= geometry.clusters else None,
        first if geometry.has_cluster(first) else None,
    )


def pack_counts(free: int | None, first: int | None) -> bytes:
    """The 8 bytes at COUNTS_OFFSET of FSInfo."""
    return struct.pack("<II", _UNKNOWN if free is None else free, _UNKNOWN if first is None else first)
