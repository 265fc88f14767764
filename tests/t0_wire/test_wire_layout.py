"""Every number and layout in udf.fuse, compared by a C compiler with the system's <linux/fuse.h>.

UDF_FUSE_HEADER=FILE compares with another header, for example a newer kernel's.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from pathlib import Path

import pytest

from udf.fuse import device, flags, opcodes, structs

HEADER = os.environ.get("UDF_FUSE_HEADER") or "/usr/include/linux/fuse.h"
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")

# Our class -> what the kernel's names begin with.
PREFIXES: dict[type[IntEnum | IntFlag], str] = {
    opcodes.Opcode: "FUSE_",
    opcodes.Notify: "FUSE_NOTIFY_",
    flags.Init: "FUSE_",
    flags.CuseInit: "CUSE_",
    flags.Fopen: "FOPEN_",
    flags.Fattr: "FATTR_",
    flags.OpenFlag: "FUSE_OPEN_",
    flags.ReleaseFlag: "FUSE_RELEASE_",
    flags.GetattrFlag: "FUSE_GETATTR_",
    flags.LkFlag: "FUSE_LK_",
    flags.WriteFlag: "FUSE_WRITE_",
    flags.ReadFlag: "FUSE_READ_",
    flags.IoctlFlag: "FUSE_IOCTL_",
    flags.PollFlag: "FUSE_POLL_",
    flags.FsyncFlag: "FUSE_FSYNC_",
    flags.AttrFlag: "FUSE_ATTR_",
    flags.SetxattrFlag: "FUSE_SETXATTR_",
    flags.EntryExpire: "FUSE_",
    flags.MappingFlag: "FUSE_SETUPMAPPING_FLAG_",
    flags.ExtType: "FUSE_",
    flags.UringCommand: "FUSE_IO_URING_CMD_",
}
IRREGULAR = {
    "FUSE_CUSE_INIT": "CUSE_INIT",
    "FUSE_CUSE_INIT_BSWAP_RESERVED": "CUSE_INIT_BSWAP_RESERVED",
    "FUSE_IOCTL_IS_32BIT": "FUSE_IOCTL_32BIT",
    "FUSE_GROUPS": "FUSE_EXT_GROUPS",
}
CONSTANTS = {
    "FUSE_ROOT_ID": flags.ROOT_ID,
    "FUSE_MIN_READ_BUFFER": flags.MIN_READ_BUFFER,
    "FUSE_UNIQUE_RESEND": flags.UNIQUE_RESEND,
    "FUSE_INVALID_UIDGID": flags.INVALID_UIDGID,
    "FUSE_IOCTL_MAX_IOV": flags.IOCTL_MAX_IOV,
    "CUSE_INIT_INFO_MAX": flags.CUSE_INIT_INFO_MAX,
    "FUSE_URING_IN_OUT_HEADER_SZ": flags.URING_IN_OUT_HEADER_SZ,
    "FUSE_URING_OP_IN_OUT_SZ": flags.URING_OP_IN_OUT_SZ,
    "FUSE_COMPAT_INIT_OUT_SIZE": structs.COMPAT_INIT_OUT_SIZE,
    "FUSE_COMPAT_22_INIT_OUT_SIZE": structs.COMPAT_22_INIT_OUT_SIZE,
    "FUSE_COMPAT_ENTRY_OUT_SIZE": structs.COMPAT_ENTRY_OUT_SIZE,
    "FUSE_COMPAT_ATTR_OUT_SIZE": structs.COMPAT_ATTR_OUT_SIZE,
    "FUSE_COMPAT_WRITE_IN_SIZE": structs.COMPAT_WRITE_IN_SIZE,
    "FUSE_COMPAT_MKNOD_IN_SIZE": structs.COMPAT_MKNOD_IN_SIZE,
    "FUSE_COMPAT_STATFS_SIZE": structs.COMPAT_STATFS_SIZE,
    "FUSE_COMPAT_SETXATTR_IN_SIZE": structs.COMPAT_SETXATTR_IN_SIZE,
    "FUSE_DEV_IOC_CLONE": device.IOC_CLONE,
    "FUSE_DEV_IOC_BACKING_OPEN": device.IOC_BACKING_OPEN,
    "FUSE_DEV_IOC_BACKING_CLOSE": device.IOC_BACKING_CLOSE,
    "FUSE_DEV_IOC_SYNC_INIT": device.IOC_SYNC_INIT,
}
# What a header older than this protocol may lack. Anything else that is missing is a wrong name of ours.
SINCE = {
    32: "FUSE_SUBMOUNTS FUSE_ATTR_SUBMOUNT fuse_attr.flags",
    33: "FUSE_HANDLE_KILLPRIV_V2 FUSE_SETXATTR_EXT FUSE_WRITE_KILL_SUIDGID FATTR_KILL_SUIDGID FUSE_OPEN_KILL_SUIDGID"
    " FUSE_SETXATTR_ACL_KILL_SGID FUSE_COMPAT_SETXATTR_IN_SIZE"
    " fuse_setxattr_in.setxattr_flags fuse_setxattr_in.padding fuse_open_in.open_flags fuse_create_in.open_flags",
    34: "FUSE_SYNCFS fuse_syncfs_in",
    35: "FOPEN_NOFLUSH",
    36: "FUSE_INIT_EXT FUSE_INIT_RESERVED FUSE_SECURITY_CTX FUSE_HAS_INODE_DAX FUSE_ATTR_DAX fuse_init_in.flags2"
    " fuse_init_in.unused fuse_init_out.flags2 fuse_secctx fuse_secctx_header",
    37: "FUSE_TMPFILE",
    38: "FUSE_EXPIRE_ONLY FOPEN_PARALLEL_DIRECT_WRITES FUSE_MAX_NR_SECCTX FUSE_EXT_GROUPS FUSE_CREATE_SUPP_GROUP"
    " FUSE_HAS_EXPIRE_ONLY fuse_in_header.total_extlen fuse_ext_header fuse_supp_groups"
    " fuse_notify_inval_entry_out.flags",
    39: "FUSE_DIRECT_IO_ALLOW_MMAP FUSE_DIRECT_IO_RELAX FUSE_STATX"
    " fuse_sx_time fuse_statx fuse_statx_in fuse_statx_out",
    40: "FUSE_PASSTHROUGH FOPEN_PASSTHROUGH FUSE_NO_EXPORT_SUPPORT FUSE_HAS_RESEND FUSE_NOTIFY_RESEND"
    " FUSE_UNIQUE_RESEND FUSE_DEV_IOC_BACKING_OPEN FUSE_DEV_IOC_BACKING_CLOSE fuse_init_out.max_stack_depth"
    " fuse_open_out.backing_id fuse_backing_map",
    41: "FUSE_ALLOW_IDMAP FUSE_INVALID_UIDGID",
    42: "FUSE_OVER_IO_URING FUSE_IO_URING_CMD_INVALID FUSE_IO_URING_CMD_REGISTER FUSE_IO_URING_CMD_COMMIT_AND_FETCH"
    " FUSE_URING_IN_OUT_HEADER_SZ FUSE_URING_OP_IN_OUT_SZ fuse_uring_ent_in_out fuse_uring_req_header"
    " fuse_uring_cmd_req",
    43: "FUSE_REQUEST_TIMEOUT fuse_init_out.request_timeout",
    44: "FUSE_NOTIFY_INC_EPOCH",
    45: "FUSE_COPY_FILE_RANGE_64 FUSE_NOTIFY_PRUNE FUSE_DEV_IOC_SYNC_INIT fuse_copy_file_range_out"
    " fuse_notify_prune_out",
}
NEWER = {name: minor for minor, names in SINCE.items() for name in names.split()}
GREW = {"fuse_setxattr_in": 33, "fuse_init_in": 36}  # others only gave their padding a meaning
# Some headers of 7.38 (6.1.x with backports) lack what 7.38 brought to 6.2 and later; they say 7.38 all the same.
BACKPORTED = {38: "FOPEN_PARALLEL_DIRECT_WRITES FUSE_EXT_GROUPS FUSE_CREATE_SUPP_GROUP fuse_supp_groups"}

# In the header, and not for us: macros that compute, markers.
NOT_VALUES = {
    "FUSE_REC_ALIGN",
    "FUSE_NAME_OFFSET",
    "FUSE_DIRENT_ALIGN",
    "FUSE_DIRENT_SIZE",
    "FUSE_NAME_OFFSET_DIRENTPLUS",
    "FUSE_DIRENTPLUS_SIZE",
    "FUSE_REMOVEMAPPING_MAX_ENTRY",
    "FUSE_NOTIFY_CODE_MAX",
    "FUSE_DEV_IOC_MAGIC",
    "FUSE_KERNEL_VERSION",
    "FUSE_KERNEL_MINOR_VERSION",
}

pytestmark = pytest.mark.skipif(
    COMPILER is None or not Path(HEADER).exists(), reason="needs a C compiler and the kernel's headers"
)


@dataclass(frozen=True)
class Row:
    """One number: what it is called in the header, what C says it is, and what we say."""

    name: str  # a constant, fuse_struct or fuse_struct.field
    expression: str
    expected: int
    reserved: bool = False


def layouts() -> dict[str, structs.Layout]:
    """Every layout by the name of its structure in C, but those of shortened forms, which C has not."""
    found = (value for value in vars(structs).values() if isinstance(value, structs.Layout))
    return {
        layout.name if layout.name.startswith("cuse_") else f"fuse_{layout.name}": layout
        for layout in found
        if not layout.name.endswith("_compat")
    }


def constants() -> dict[str, int]:
    named = dict(CONSTANTS)
    for enumeration, prefix in PREFIXES.items():
        for name, member in enumeration.__members__.items():
            named[IRREGULAR.get(prefix + name, prefix + name)] = int(member)
    return named


def rows() -> list[Row]:
    found = [Row(name, name, value) for name, value in constants().items()]
    for tag, layout in layouts().items():
        found.append(Row(tag, f"sizeof(struct {tag})", layout.size))
        for field, code, offset in layout.members():
            name, member = f"{tag}.{field}", f"((struct {tag} *)0)->{field}"
            reserved = field not in layout.fields
            width = struct.Struct("=" + code).size
            found.append(Row(name, f"offsetof(struct {tag}, {field})", offset, reserved))
            found.append(Row(name, f"sizeof({member})", width, reserved))
            if code in ("H", "I", "i", "Q", "q"):
                found.append(Row(name, f"(__typeof__({member}))-1 < 0", int(code.islower())))
    return found


def preprocess(*options: str) -> str:
    command = [str(COMPILER), "-E", *options, "-include", HEADER, "-x", "c", "/dev/null"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def header_minor() -> int:
    match = re.search(r"define FUSE_KERNEL_MINOR_VERSION (\d+)", preprocess("-dM"))
    assert match
    return int(match[1])


def evaluate(numbers: list[Row], directory: Path) -> tuple[dict[Row, int], list[Row]]:
    """What C says of each row, and the rows that the header does not have."""
    present, missing = numbers, []
    for attempt in range(2):
        # One row a line, so that a complaint's line number names the row.
        lines = [f"(unsigned long long)({row.expression})," for row in present]
        head = f'#include <stddef.h>\n#include <stdio.h>\n#include <sys/ioctl.h>\n#include "{HEADER}"\n'
        source = head + "static const unsigned long long numbers[] = {\n" + "\n".join(lines) + "\n};\n"
        source += 'int main(void) { for (size_t i = 0; i < sizeof numbers / 8; i++) printf("%llu\\n", numbers[i]); }\n'
        (directory / "numbers.c").write_text(source)
        command = [str(COMPILER), "-fmax-errors=0", "-o", "numbers", "numbers.c"]
        result = subprocess.run(command, check=False, cwd=directory, capture_output=True, text=True)
        if result.returncode == 0:
            break
        assert attempt == 0, result.stderr
        first = head.count("\n") + 2
        unknown = {int(line) - first for line in re.findall(r"^numbers\.c:(\d+):\d+: error", result.stderr, re.M)}
        missing = [row for index, row in enumerate(present) if index in unknown]
        present = [row for index, row in enumerate(present) if index not in unknown]
    printed = subprocess.run([directory / "numbers"], check=True, capture_output=True, text=True).stdout.split()
    return dict(zip(present, map(int, printed), strict=True)), missing


def test_every_number_is_the_headers_own(tmp_path: Path) -> None:
    minor = header_minor()
    values, missing = evaluate(rows(), tmp_path)
    # What was still padding in an older header lies elsewhere there, or is longer.
    changed = {name.partition(".")[0] for name, since in NEWER.items() if "." in name and since > minor}
    wrong = []
    for row, value in values.items():
        owner = row.name.partition(".")[0]
        if (row.reserved and owner in changed) or (row.name == owner and GREW.get(owner, 0) > minor):
            continue
        # A C constant of 1 << 31 is negative.
        if value not in (row.expected, row.expected - (1 << 32) + (1 << 64)):
            wrong.append(f"{row.expression}: C {value}, ours {row.expected}")
    assert not wrong, "\n".join(wrong)

    backported = BACKPORTED.get(minor, "").split()
    for row in missing:
        owner = row.name.partition(".")[0]
        since = max(NEWER.get(row.name, 0), NEWER.get(owner, 0))
        assert since > minor or row.name in backported or owner in backported, (
            f"{row.name} is not in a 7.{minor} header"
        )

    sizes = [row for row in values if row.expression.startswith("sizeof(struct")]
    fields = [row for row in values if row.expression.startswith("offsetof")]
    named = [row for row in values if row.expression == row.name]
    print(f"7.{minor}: {len(sizes)} sizes, {len(fields)} fields and {len(named)} constants compared")
    print(f"newer than the header: {sorted({row.name for row in missing})}")
    assert len(sizes) >= 60
    assert len(fields) >= 300
    assert len(named) >= 140


def test_the_header_has_nothing_that_we_have_not() -> None:
    minor = header_minor()
    if minor > flags.KERNEL_MINOR_VERSION:
        pytest.skip(f"the header's 7.{minor} is newer than what udf.fuse describes")
    ours = set(constants()) | NOT_VALUES
    macros = re.findall(r"^#define ((?:FUSE|FOPEN|FATTR|CUSE)_\w+)", preprocess("-dM"), re.M)
    text = preprocess()
    enumerated = re.findall(r"\b((?:FUSE|CUSE)_\w+)\s*=", text)
    structures = re.findall(r"\bstruct ((?:fuse|cuse)_\w+)\s*\{", text)
    assert len(macros) > 90
    assert len(enumerated) > 50
    assert not set(macros + enumerated) - ours
    assert not set(structures) - set(layouts())


def test_reserved_fields_have_no_value_and_are_written_as_zero() -> None:
    buffer = bytearray(b"\xff" * structs.GETXATTR_IN.size)
    structs.GETXATTR_IN.pack_into(buffer, 0, 7)
    assert structs.GETXATTR_IN.fields == ("size",)
    assert bytes(buffer) == (7).to_bytes(4, sys.byteorder) + bytes(4)
    assert structs.GETXATTR_IN.unpack_from(buffer) == (7,)


def test_fields_of_inner_structures_are_found_by_their_path() -> None:
    assert structs.ENTRY_OUT.offset("attr.mode") == 40 + structs.ATTR.offset("mode")
    assert structs.ENTRY_OUT.fields[6:] == tuple(f"attr.{field}" for field in structs.ATTR.fields)
    with pytest.raises(KeyError):
        structs.ENTRY_OUT.offset("mode")


@pytest.mark.parametrize("layout", layouts().values(), ids=lambda layout: layout.name)
def test_values_come_back_as_they_were_packed(layout: structs.Layout) -> None:
    codes = [code for name, code, _ in layout.members() if name in layout.fields]
    values = tuple(b"x" * 128 if code == "128s" else number + 1 for number, code in enumerate(codes))
    packed = layout.pack(*values)
    assert len(packed) == layout.size
    assert layout.unpack_from(b"??" + packed, 2) == values


def test_init_flags_cross_the_wire_in_two_halves() -> None:
    both = flags.Init.HAS_RESEND | flags.Init.MAX_PAGES
    low, high = flags.split_init_flags(both)
    assert (low, high) == (flags.Init.MAX_PAGES | flags.Init.INIT_EXT, 1 << 7)
    assert flags.join_init_flags(low, high) == both | flags.Init.INIT_EXT
    assert flags.join_init_flags(flags.Init.MAX_PAGES, high) == flags.Init.MAX_PAGES
    assert flags.split_init_flags(flags.Init.MAX_PAGES) == (flags.Init.MAX_PAGES, 0)
