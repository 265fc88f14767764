"""The two INITs: what a mount's contract is, whatever the kernel offers and the driver accepts."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from udf.fuse.flags import Init, join_init_flags
from udf.fuse.structs import IN_HEADER, INIT_IN, INIT_OUT
from udf.shim import contract
from udf.shim.contract import ContractRefused, DriverTerms, driver_init, kernel_reply, parse_driver_init

EVERYTHING = (1 << 43) - 1


def kernel_init(minor: int = 45, flags: int = EVERYTHING, major: int = 7) -> bytes:
    body = INIT_IN.pack(major, minor, 131072, flags & 0xFFFFFFFF, flags >> 32)
    return IN_HEADER.pack(IN_HEADER.size + len(body), 26, 2, 0, 0, 0, 0, 0) + body


def driver_reply(
    minor: int = 31, flags: int = 0, max_write: int = 131072, granularity: int = 1, major: int = 7
) -> bytes:
    return INIT_OUT.pack(major, minor, 65536, flags & 0xFFFFFFFF, 12, 9, max_write, granularity, 32, 0, 0, 0, 0)


def terms(**values: int) -> DriverTerms:
    return parse_driver_init(driver_reply(**values), locks=False)


def agreed(reply: bytes) -> tuple[dict[str, int], int]:
    values = dict(zip(INIT_OUT.fields, INIT_OUT.unpack_from(reply), strict=True))
    return values, join_init_flags(values["flags"], values["flags2"])


@pytest.mark.parametrize("minor", [31, 36, 38, 45, 46, 60])
def test_the_kernel_is_answered_with_a_version_that_both_speak(minor):
    offer = contract.parse_kernel_init(kernel_init(minor))
    values, _ = agreed(kernel_reply(offer, terms(), exclusive=False, acl=False, locks=False))
    assert (values["major"], values["minor"]) == (7, min(minor, 45))


@pytest.mark.parametrize(("major", "minor"), [(7, 30), (7, 8), (6, 45), (8, 0)])
def test_an_old_or_foreign_kernel_is_refused(major, minor):
    with pytest.raises(ContractRefused):
        contract.parse_kernel_init(kernel_init(minor, major=major))


def test_flags2_counts_only_where_the_kernel_says_so():
    without = EVERYTHING & ~int(Init.INIT_EXT)
    assert contract.parse_kernel_init(kernel_init(flags=without)).flags < 1 << 32
    assert contract.parse_kernel_init(kernel_init()).flags >> 32


@given(st.integers(0, EVERYTHING), st.integers(0, 2**32 - 1), st.booleans(), st.booleans(), st.booleans())
@settings(deadline=None)
def test_nothing_is_agreed_that_the_kernel_did_not_offer(kernel_flags, driver_flags, exclusive, acl, locks):
    offer = contract.parse_kernel_init(kernel_init(flags=kernel_flags))
    accepted = parse_driver_init(driver_reply(flags=driver_flags), locks=locks)
    _, flags = agreed(kernel_reply(offer, accepted, exclusive=exclusive, acl=acl, locks=locks))
    assert not flags & ~kernel_flags
    forbidden = Init.WRITEBACK_CACHE | Init.ATOMIC_O_TRUNC | Init.SPLICE_READ | Init.PASSTHROUGH | Init.EXPORT_SUPPORT
    assert not flags & int(forbidden)
    if not locks:
        assert not flags & int(Init.POSIX_LOCKS | Init.FLOCK_LOCKS)
    if not acl:
        assert not flags & int(Init.POSIX_ACL)


@pytest.mark.parametrize("exclusive", [False, True])
def test_data_is_invalidated_by_the_one_who_knows_of_changes(exclusive):
    offer = contract.parse_kernel_init(kernel_init())
    _, flags = agreed(kernel_reply(offer, terms(), exclusive=exclusive, acl=False, locks=False))
    assert bool(flags & Init.EXPLICIT_INVAL_DATA) is exclusive
    assert bool(flags & Init.AUTO_INVAL_DATA) is not exclusive


def test_the_weakest_driver_gets_the_same_contract():
    offer = contract.parse_kernel_init(kernel_init())
    replies = [
        agreed(kernel_reply(offer, terms(flags=flags), exclusive=True, acl=False, locks=False))[1]
        for flags in (0, 0xFFFFFFFF)
    ]
    assert replies[0] == replies[1]


def test_locks_are_agreed_as_the_driver_has_them():
    offer = contract.parse_kernel_init(kernel_init())
    posix = parse_driver_init(driver_reply(flags=int(Init.POSIX_LOCKS)), locks=True)
    _, flags = agreed(kernel_reply(offer, posix, exclusive=False, acl=False, locks=True))
    assert flags & Init.POSIX_LOCKS
    assert not flags & Init.FLOCK_LOCKS


def test_a_driver_is_offered_neither_splice_nor_write_back():
    flags = INIT_IN.unpack_from(driver_init(locks=False), IN_HEADER.size)[3]
    refused = Init.SPLICE_READ | Init.SPLICE_WRITE | Init.SPLICE_MOVE | Init.WRITEBACK_CACHE | Init.ATOMIC_O_TRUNC
    assert not flags & int(refused | Init.EXPORT_SUPPORT | Init.POSIX_LOCKS | Init.FLOCK_LOCKS)
    assert INIT_IN.unpack_from(driver_init(locks=True), IN_HEADER.size)[3] & int(Init.POSIX_LOCKS)


@pytest.mark.parametrize("minor", [12, 22, 23, 31, 45, 99])
def test_old_drivers_are_served(minor):
    assert terms(minor=minor).minor == minor


@pytest.mark.parametrize(("major", "minor"), [(7, 11), (7, 0), (6, 31), (8, 31), (0, 0)])
def test_too_old_or_foreign_drivers_are_refused(major, minor):
    with pytest.raises(ContractRefused):
        terms(major=major, minor=minor)


@pytest.mark.parametrize("size", [0, 1, 8, 23])
def test_a_reply_without_its_limits_is_refused(size):
    with pytest.raises(ContractRefused):
        parse_driver_init(driver_reply()[:size], locks=False)


def test_the_short_reply_of_before_7_23_is_read():
    accepted = parse_driver_init(struct.pack("=IIIIHHI", 7, 22, 4096, int(Init.DONT_MASK), 0, 0, 65536), locks=False)
    assert (accepted.minor, accepted.max_write, accepted.masks, accepted.time_granularity) == (22, 65536, True, 1)


@pytest.mark.parametrize(("said", "taken"), [(0, 4096), (1, 4096), (65536, 65536), (2**32 - 1, 131072)])
def test_a_writes_size_stays_within_what_a_link_carries(said, taken):
    assert terms(max_write=said).max_write == taken


@pytest.mark.parametrize(("said", "taken"), [(0, 1), (1, 1), (10**9, 10**9), (10**9 + 1, 1), (2**32 - 1, 1)])
def test_an_impossible_granularity_is_one_nanosecond(said, taken):
    assert terms(granularity=said).time_granularity == taken


@pytest.mark.parametrize(
    ("flags", "plus", "plain"),
    [
        (0, False, True),
        (Init.DO_READDIRPLUS, True, False),
        (Init.DO_READDIRPLUS | Init.READDIRPLUS_AUTO, True, True),
        (Init.READDIRPLUS_AUTO, False, True),
    ],
)
def test_which_listings_a_driver_answers(flags, plus, plain):
    accepted = terms(flags=int(flags))
    assert (accepted.readdirplus, accepted.readdir) == (plus, plain)
