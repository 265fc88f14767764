"""Start of a shim process: `python -m udf.shim FD`, FD being its control socket.

Takes the `mount` message and the link, makes the two INITs, mounts, says `mounted` and serves. Every failure before
that is one `failed` message, and nothing is left mounted. When the supervisor is gone the mount is detached and the
shim ends.
"""

from __future__ import annotations

import errno
import gc
import os
import select
import signal
import sys
import time

from udf.fuse.device import open_device, read_ahead
from udf.fuse.mount import MountError, MountOptions, clean_stale, mount_by_fusermount, mount_direct, unmount
from udf.fuse.structs import OUT_HEADER
from udf.shim.config import Config
from udf.shim.contract import (
    INIT_UNIQUE,
    MAX_WRITE,
    ContractRefused,
    DriverTerms,
    driver_init,
    kernel_reply,
    parse_driver_init,
    parse_kernel_init,
)
from udf.shim.control import Control, SupervisorGone
from udf.shim.link import Link, LinkClosed
from udf.shim.listings import ListingCache
from udf.shim.loop import REQUEST_BUFFER, Loop
from udf.shim.notifier import Notifier
from udf.shim.service import Service
from udf.shim.spin import Spin
from udf.window import MAX_READ


class StartFailed(Exception):
    """The mount cannot be made; one sentence and an errno."""

    def __init__(self, sentence: str, number: int) -> None:
        super().__init__(sentence)
        self.errno = number


def agree_with_driver(link: Link, config: Config) -> DriverTerms:
    """Send INIT over the link and wait for the answer, not longer than the start may take. Raises StartFailed."""
    link.send(driver_init(locks=config.locks))
    end = time.monotonic() + config.start_timeout
    while True:
        left = end - time.monotonic()
        if left <= 0:
            raise StartFailed(
                f"the driver {config.driver} did not answer INIT within {config.start_timeout:g} s", errno.ETIMEDOUT
            )
        ready, _, _ = select.select([link.fd], [], [], left)
        if not ready:
            continue
        try:
            size = link.receive(())
        except LinkClosed:
            raise StartFailed(
                f"the driver {config.driver} closed its link before it answered INIT", errno.EIO
            ) from None
        if not size:
            continue
        length, error, unique = OUT_HEADER.unpack_from(link.buffer) if size >= OUT_HEADER.size else (0, 0, 0)
        if unique != INIT_UNIQUE:
            continue  # a notification before INIT means nothing
        if error or length != size:
            raise StartFailed(f"the driver {config.driver} refused INIT (error {-error})", errno.EPROTO)
        try:
            return parse_driver_init(link.view[OUT_HEADER.size : size], locks=config.locks)
        except ContractRefused as refused:
            raise StartFailed(f"{config.driver}: {refused}", errno.EPROTO) from None


def make_mount(config: Config) -> int:
    """Mount and return the device. Raises StartFailed."""
    options = MountOptions(
        fsname=config.fsname,
        read_only=config.read_only,
        nosuid=config.nosuid,
        nodev=config.nodev,
        noexec=config.noexec,
        noatime=config.noatime,
        allow_other=config.allow_other,
        max_read=config.max_read,
        uid=config.uid,
        gid=config.gid,
    )
    try:
        if os.geteuid() != 0:
            device = mount_by_fusermount(config.mountpoint, options)
            os.set_blocking(device, False)
            return device
        device = open_device(nonblocking=True)
        try:
            mount_direct(device, config.mountpoint, options)
        except BaseException:
            os.close(device)
            raise
        return device
    except MountError as error:
        raise StartFailed(
            str(error).removeprefix(f"cannot mount on {config.mountpoint}: "), error.errno or errno.EIO
        ) from None
    except OSError as error:
        raise StartFailed(error.strerror or str(error), error.errno or errno.EIO) from None


def agree_with_kernel(device: int, terms: DriverTerms, config: Config, max_read: int) -> int:
    """Answer the kernel's INIT, which it sends right after the mount; its protocol's minor. Raises StartFailed."""
    buffer = bytearray(REQUEST_BUFFER)
    end = time.monotonic() + 10
    while True:
        try:
            size = os.readv(device, [buffer])
            break
        except BlockingIOError:
            if not select.select([device], [], [], max(0.0, end - time.monotonic()))[0]:
                raise StartFailed("the kernel did not send INIT", errno.EIO) from None
    try:
        offer = parse_kernel_init(memoryview(buffer)[:size])
    except ContractRefused as refused:
        raise StartFailed(str(refused), errno.EPROTO) from None
    reply = kernel_reply(
        *(offer, terms), exclusive=config.exclusive, acl=config.acl, locks=config.locks, max_read=max_read
    )
    os.write(device, OUT_HEADER.pack(OUT_HEADER.size + len(reply), 0, offer.unique) + reply)
    return offer.minor


def start(control: Control) -> Loop:
    """Do everything up to `mounted`. Raises StartFailed, SupervisorGone."""
    message, fds = control.receive(timeout=None)
    if message.get("t") != "mount" or not 1 <= len(fds) <= 2:
        raise StartFailed("the first message was not a mount with a link", errno.EPROTO)
    config = Config.from_message(message)
    link = Link(fds.pop(0))
    problem = link.take_window(fds)
    if problem:
        raise StartFailed(problem, errno.EPROTO)
    max_read = MAX_WRITE if link.window is None else MAX_READ
    terms = agree_with_driver(link, config)
    device = make_mount(config)
    try:
        kernel_minor = agree_with_kernel(device, terms, config, max_read)
        if max_read > MAX_WRITE:
            read_ahead(device, max_read)
        service = Service(config, terms, device, link, Notifier(device), ListingCache(), lambda _: None)
        service.kernel_minor = kernel_minor
        loop = Loop(service, control, Spin(config.spin))
        control.send({"t": "mounted"}, (device,))
    except BaseException:
        _detach(config.mountpoint)
        raise
    return loop


def _detach(mountpoint: str) -> None:
    try:
        unmount(mountpoint, lazy=True)
    except MountError as error:
        print(f"udf-shim: {error}", file=sys.stderr)


def _clean_up(mountpoint: str) -> None:
    """An aborted connection stays mounted, for nothing."""
    try:
        clean_stale(mountpoint)
    except MountError as error:
        print(f"udf-shim: {error}", file=sys.stderr)


def main() -> int:
    """Run one shim."""
    control = Control(int(sys.argv[1]))
    # The terminal's signals are the supervisor's business; SIGTERM to a shim alone unmounts its mount.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        loop = start(control)
    except StartFailed as failure:
        control.send({"t": "failed", "error": str(failure), "errno": failure.errno})
        return 1
    except SupervisorGone:
        return 1
    mountpoint = loop.s.config.mountpoint
    signal.signal(signal.SIGTERM, lambda *_: loop.terminate())
    gc.collect()
    gc.freeze()
    try:
        loop.run()
    except SupervisorGone:
        _detach(mountpoint)
        return 1
    if loop.external:
        _clean_up(mountpoint)
    loop.tell({"t": "unmounted", "external": loop.external, "unsaved": loop.unsaved})
    try:
        control.flush(5.0)
    except SupervisorGone:
        return 0
    if loop.s.config.outlive:
        _outlive_driver(control.fd, loop.s.link.fd)
    return 0


def _outlive_driver(control: int, link: int) -> None:
    """Keep the link until the driver has ended, or the supervisor wants no more of us.

    A program on libfuse may hang when its link ends: its threads print that each, and one that is cancelled while it
    does takes the lock of stderr with it. As long as it has the link it can be told to end by a signal.
    """
    ends = select.poll()
    ends.register(control, select.POLLRDHUP)
    ends.register(link, 0)
    ends.poll()


if __name__ == "__main__":
    sys.exit(main())
