"""The command line: `udf daemon`, and everything that asks one (or a private supervisor, or the machine).

Owns: the arguments, exit codes (0 done, 1 refused or failed, 2 usage, 3 no daemon, 130 interrupted) and the one
sentence on stderr. Must never: import trio or pyfuse3 for a command that only asks (they cost 150 ms).
Called by the `udf` script and `python -m udf`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from udf.errors import UserError

DONE, FAILED, USAGE, NO_DAEMON, INTERRUPTED = 0, 1, 2, 3, 130


class _Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one sentence like every other."""

    def error(self, message: str) -> NoReturn:
        from udf.cli import show

        show.complain(f"{message} (see `{self.prog} --help`)")
        raise SystemExit(USAGE)


def build_parser() -> argparse.ArgumentParser:
    """Every command with its arguments; `run` names the function of udf.cli.commands that does it."""
    from udf import __version__

    common = _Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="answer in JSON, one document per line")
    common.add_argument("--socket", metavar="PATH", help="the daemon's control socket")

    parser = _Parser(prog="udf", description="Device drivers and filesystems as user processes that may die.")
    parser.add_argument("--version", action="version", version=f"udf {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, text: str, more: str = "") -> argparse.ArgumentParser:
        """`more` is shown as it stands, below the arguments."""
        added = commands.add_parser(
            name,
            help=text,
            description=text,
            parents=[common],
            epilog=more,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=name)
        return added

    daemon = command("daemon", "run the supervisor until SIGTERM")
    daemon.add_argument(
        "--usbip",
        metavar="HOST[:PORT]",
        action="append",
        default=[],
        help="serve the devices that this USB/IP server exports (may be given again)",
    )
    daemon.add_argument(
        "--rules", metavar="FILE", help="the rules about devices (default: /etc/udf/rules.toml, and the user's own)"
    )

    daemon.add_argument(
        "--automount",
        metavar="DIR",
        nargs="?",
        const="",
        help="mount every filesystem on a device that is plugged in on DIR/LABEL (default: media beside the socket)",
    )

    mount = command("mount", "mount SOURCE on MOUNTPOINT with a driver")
    mount.add_argument("-t", "--driver", metavar="DRIVER", help="a driver's name (see `udf drivers`) or path")
    mount.add_argument("--exec", dest="program", metavar="'CMD {mountpoint}'", help="serve with any FUSE program")
    mount.add_argument(
        "paths",
        nargs="+",
        metavar="[SOURCE] MOUNTPOINT",
        help="SOURCE (if the driver takes one): a path, a URL, or a device as disk0, disk0/part1, LABEL=X, UUID=X",
    )
    mount.add_argument("-o", dest="options", action="append", default=[], metavar="K=V,…", help="options")
    mount.add_argument("-f", "--foreground", action="store_true", help="stay in the foreground, without a daemon")

    attach = command("attach", "make a block device, with its partitions, of the image file SOURCE")
    attach.add_argument("-t", "--driver", metavar="DRIVER", help="a driver of kind block (default: image)")
    attach.add_argument("--name", help="what to call it (default: disk0, disk1 …)")
    attach.add_argument("-o", dest="options", action="append", default=[], metavar="K=V,…", help="options")
    attach.add_argument("source", metavar="SOURCE")

    umount = command("umount", "unmount MOUNTPOINT or what is mounted of a device, or detach what was attached")
    umount.add_argument("mountpoint", metavar="MOUNTPOINT|DEVICE")
    umount.add_argument("-l", "--lazy", action="store_true", help="detach now, serve what is open until it is closed")

    eject = command("eject", "end a device in order, with all that is mounted of it, so that it may be pulled out")
    eject.add_argument("device", metavar="DEVICE|MOUNTPOINT", help="as `udf devices` shows it, or where it is mounted")

    command("status", "show every mount, its state and its counters")
    restart = command("restart", "end the driver of MOUNT and start a new one; open files go on")
    restart.add_argument("mountpoint", metavar="MOUNT")

    hung = command("hung", "show the requests that wait, and who waits")
    hung.add_argument("mountpoint", metavar="MOUNT", nargs="?")
    hung.add_argument("--abort", metavar="ID", type=int, help="fail this request of MOUNT with an input/output error")

    crashes = command("crashes", "show how drivers died")
    crashes.add_argument("mountpoint", metavar="MOUNT", nargs="?")

    command("drivers", "show every driver that can be found, and why one cannot be used")

    events = command("events", "show what happened")
    events.add_argument("-f", "--follow", action="store_true", help="go on with what happens")

    trace = command("trace", "show every request of a mount until Ctrl-C")
    trace.add_argument("mountpoint", metavar="MOUNT")

    _add_device_commands(command)

    command("doctor", "say what this machine has and lacks for mounting")
    return parser


def _add_device_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    command("devices", "show every device, and which driver serves it or why none does", _DEVICES)

    why = command("why", "show every driver that was looked at for DEVICE, and why it was or was not chosen", _WHY)
    why.add_argument("device", metavar="DEVICE", help="its name, port, VENDOR:PRODUCT, serial, or an instance's name")

    plug = command("plug", "plug an emulated device in: a stick with an image FILE, or another MODEL", _PLUG)
    plug.add_argument("what", metavar="FILE|MODEL", help="an image file, or the name of a device model")
    plug.add_argument("--model", metavar="MODEL", help="what the FILE is the content of (default: storage)")
    plug.add_argument("--name", help="what to call it (default: after the file or the model)")
    plug.add_argument("--serial", help="its serial number")
    plug.add_argument(
        "--faults",
        metavar="RULES",
        action="append",
        default=[],
        help="what goes wrong with it, such as 'stall ep=0x81 at=5' or 'unplug at=12' (may be given again)",
    )
    plug.add_argument("-o", dest="options", action="append", default=[], metavar="K=V,…", help="options of the model")

    unplug = command("unplug", "pull an emulated device out, without asking its driver")
    unplug.add_argument("name", metavar="NAME", help="as `udf devices` shows it, or an instance's name")

    replug = command("replug", "pull an emulated device out and plug it in again")
    replug.add_argument("name", metavar="NAME", help="as `udf devices` shows it, or an instance's name")

    faults = command("faults", "change what goes wrong with an emulated device")
    faults.add_argument("name", metavar="NAME", help="as `udf devices` shows it, or an instance's name")
    faults.add_argument("rules", metavar="RULES", nargs="*", help="as for plug; none: nothing goes wrong any more")


_DEVICES = """\
states:
  bound      a driver serves it, WHERE says where
  starting, ending
  failed     its driver could not be started, or does not hold
  waiting    its driver requires something that is not there yet
  tie        several drivers fit equally well: a [[prefer]] rule decides
  denied     by a [[deny]] rule
  away       it was pulled out while it was used, and goes on when it is plugged in again
  ejected    it may be pulled out; plugged in again it is served again
  no_driver  nothing on the search path is for it
  hub        hubs need no driver
"""
_WHY = """\
examples:
  udf why stick              an emulated device by its name
  udf why disk0              the device behind an instance
  udf why 1-1.4              what is plugged in there
  udf why 0781:5567          by vendor and product, in hexadecimal
"""
_PLUG = """\
It answers when a driver serves the device, or says why none does.

examples:
  udf plug stick.img                                   a stick; `udf unplug stick` pulls it out
  udf plug thermometer -o celsius=36.6 --name bath
  udf plug stick.img --serial A1 --faults 'unplug at=100' --faults 'stall ep=0x81 rate=0.01 seed=7'

faults: stall eio short babble delay corrupt drop unplug
which:  ep=N (0x81: in) request=N at=N every=N rate=P seed=N after=N count=N import=N
how:    bytes=N ms=N back=MS late=yes
"""


def _check_text(words: Sequence[str]) -> None:
    """The control interface is JSON, which has no room for names that are not UTF-8."""
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise UserError(f"{word} is not UTF-8: use a name that is") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    try:
        words = sys.argv[1:] if arguments is None else arguments
        parsed = build_parser().parse_args(words)
        _check_text(words)
        from udf.cli import commands

        status = commands.COMMANDS[parsed.run](parsed)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has gone. Python would complain once more when it flushes stdout at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return FAILED
    except UserError as error:
        from udf.cli import show
        from udf.supervisor.client import NoSupervisorError

        show.complain(str(error))
        return NO_DAEMON if isinstance(error, NoSupervisorError) else FAILED
