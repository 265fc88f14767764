"""A process that speaks the shim's or the host's side of the control channel by a script, and does nothing else.

A fake, for what the real ones do not do on demand: hang, lie, die at a chosen moment. Started as
`python scripted_peer.py FD shim|host STEP…`; each step is one word, done in order.
"""

from __future__ import annotations

import array
import json
import os
import select
import signal
import socket
import sys
import time


def send(sock: socket.socket, message: dict[str, object], fds: list[int] | None = None) -> None:
    control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([json.dumps(message).encode()], control)


def receive(sock: socket.socket) -> dict[str, object]:
    data, fds, _, _ = socket.recv_fds(sock, 65536, 4)
    for fd in fds:
        os.close(fd)
    return json.loads(data) if data else {"t": "end"}  # type: ignore[no-any-return]


def serve(sock: socket.socket, role: str) -> None:
    """Heartbeats until `stop` or `unmount` or the end."""
    while True:
        readable, _, _ = select.select([sock], [], [], 0.02)
        if not readable:
            send(sock, {"t": "heartbeat", **({"loop_age": 0.0} if role == "host" else {})})
            continue
        message = receive(sock)
        if message["t"] == "unmount":
            send(sock, {"t": "unmounted", "external": False})
            return
        if message["t"] == "counters":
            send(sock, {"t": "counters", "id": message["id"], "counters": {"requests": 7, "ratio": 0.5}})
        if message["t"] in ("stop", "end"):
            return


def main() -> None:
    sock, role = socket.socket(fileno=int(sys.argv[1])), sys.argv[2]
    null = os.open(os.devnull, os.O_RDONLY)
    for step in sys.argv[3:]:
        word, _, value = step.partition("=")
        match word:
            case "receive":
                receive(sock)
            case "started":
                send(sock, {"t": "started", "pid": int(value or os.getpid())})
            case "ready":
                send(sock, {"t": "ready"})
            case "mounted":
                send(sock, {"t": "mounted"}, [null])
            case "failed" | "busy" | "detached" | "link_lost" | "unmounted":
                message: dict[str, object] = {"t": word}
                if word == "failed":
                    message["error"] = value
                if word == "unmounted":
                    message["external"] = value == "external"
                send(sock, message)
            case "fault":
                send(sock, {"t": "fault", "op": "READ", "error": value})
            case "raw":
                sock.send(value.encode())
            case "flood":
                while True:
                    sock.send(b'{"t":"heartbeat","loop_age":0}')
            case "print":
                print(value, file=sys.stderr, flush=True)
            case "print-for-ever":
                while True:
                    sys.stdout.write("x" * 200 + "\n")
            case "deaf":
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            case "hang":
                while True:
                    time.sleep(1000)
            case "stubborn":
                sock.close()
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                while True:
                    time.sleep(1000)
            case "sleep":
                time.sleep(float(value))
            case "serve":
                serve(sock, role)
            case "exit":
                os._exit(int(value))
            case "kill":
                os.kill(os.getpid(), int(value))
            case _:
                raise SystemExit(f"no such step: {step}")


main()
