"""The emulator as a process: `python -P -m udf.testing.devices --socket PATH [--listen HOST:PORT] [--control FD]`.

It serves USB/IP on a unix socket (and on TCP), takes commands (see emulator.py) and ends with SIGTERM, SIGINT or the
end of the control connection. When it serves it says so: one line of JSON, `{"t":"ready",…}`, as the first line on
the control connection, or on standard output if there is none. Called by: the supervisor, people.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence

from udf.errors import UserError
from udf.testing.devices.emulator import Emulator
from udf.testing.devices.models import MODELS, make


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until told to end."""
    parser = argparse.ArgumentParser(prog="python -m udf.testing.devices", description="Emulated USB devices.")
    parser.add_argument("--socket", required=True, metavar="PATH", help="the unix socket to serve on")
    parser.add_argument("--listen", type=_address, metavar="HOST:PORT", help="serve USB/IP on TCP too")
    parser.add_argument("--control", type=int, metavar="FD", help="a connected socket that commands; end with it")
    parser.add_argument(
        "--plug", action="append", default=[], metavar="MODEL[,OPTION=VALUE…]",
        help="plug a device in at once; models: " + ", ".join(f"{k} ({v.help})" for k, v in MODELS.items()),
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    logging.basicConfig(format="udf devices: %(message)s", level=logging.INFO)
    ending = (signal.SIGTERM, signal.SIGINT)
    signal.pthread_sigmask(signal.SIG_BLOCK, ending)  # before the thread begins, which inherits it
    emulator = Emulator(arguments.socket, listen=arguments.listen)
    try:
        emulator.start()
    except OSError as error:
        print(f"udf devices: cannot serve on {arguments.socket}: {error.strerror}.", file=sys.stderr)
        return 1
    try:
        for text in arguments.plug:
            model, *options = text.split(",")
            emulator.plug(make(model, dict(each.partition("=")[::2] for each in options)))
        if arguments.control is not None:
            emulator.adopt(socket.socket(fileno=arguments.control))
        else:
            listen = list(emulator.address) if emulator.address else None
            print(json.dumps({"t": "ready", "socket": emulator.path, "listen": listen}), flush=True)
        emulator.when_ended(lambda: os.kill(os.getpid(), signal.SIGTERM))
        signal.sigwait(ending)
    except OSError as error:
        print(f"udf devices: --control {arguments.control}: {error.strerror}.", file=sys.stderr)
        return 1
    except UserError as error:
        print(f"udf devices: {error}", file=sys.stderr)
        return 1
    finally:
        emulator.stop()
    return 0


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return host.strip("[]") or "127.0.0.1", int(port)


if __name__ == "__main__":
    sys.exit(main())
