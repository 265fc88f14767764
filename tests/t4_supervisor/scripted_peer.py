"""A process that speaks the shim's or the host's side of the control channel by a script, and does nothing else.

A fake, for what the real ones do not do on demand: hang, lie, die at a chosen moment. Started as
`python scripted_peer.py FD shim|host MARK STEP…`; each step is one word, done in order. MARK is a file that
appears when the mount is there.
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


held: list[int] = []  # the link, and what else came with a message; the end of the process closes it


def receive(sock: socket.socket) -> dict[str, object]:
    data, fds, _, _ = socket.recv_fds(sock, 65536, 8)
    if fds:
        let_go()
        held.extend(fds)
    return json.loads(data) if data else {"t": "end"}  # type: ignore[no-any-return]


def let_go() -> None:
    while held:
        os.close(held.pop())


def serve(sock: socket.socket, role: str, attaches: list[str]) -> None:
    """Heartbeats until `stop` or `unmount` or the end; a shim answers each `attach` by the next of these words."""
    while True:
        watched = [sock, *(held[:1] if role == "shim" else [])]
        readable, _, _ = select.select(watched, [], [], 0.02)
        if not readable:
            send(sock, {"t": "heartbeat", **({"loop_age": 0.0} if role == "host" else {})})
            continue
        if sock not in readable:
            let_go()
            send(sock, {"t": "link_lost", "pending": 3, "recent": ["LOOKUP /a", "READ /a"]})
            continue
        message = receive(sock)
        if message["t"] == "unmount":
            send(sock, {"t": "detached"} if message["lazy"] else {"t": "unmounted", "external": False})
            return
        if message["t"] == "counters":
            send(sock, {"t": "counters", "id": message["id"], "counters": {"requests": 7, "ratio": 0.5}})
        if message["t"] == "requests":
            waiting = {"id": 5, "op": "READ", "path": "/a", "age": 1.5, "pid": os.getppid(), "parked": True}
            send(sock, {"t": "requests", "id": message["id"], "total": 1, "requests": [waiting]})
        if message["t"] in ("fail", "abort"):
            print(f"told to {message['t']}: {message.get('text', message.get('request'))}", file=sys.stderr, flush=True)
        if message["t"] == "attach":
            answer_attach(sock, message, attaches.pop(0) if attaches else "ok")
        if message["t"] in ("stop", "end"):
            return


def answer_attach(sock: socket.socket, message: dict[str, object], how: str) -> None:
    generation = message["generation"]
    if how == "refuse":
        let_go()
        send(sock, {"t": "refused", "generation": generation, "error": "it has no locks"})
    elif how == "wait":  # until the driver's end of the link closes; then the shim gives this generation up
        select.select(held[:1], [], [])
        let_go()
        send(sock, {"t": "refused", "generation": generation, "error": "it closed its link"})
    elif how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "ok":
        print(f"attached {generation} counted {message['counted']}", file=sys.stderr, flush=True)
        send(sock, {"t": "attached", "generation": generation, "replayed": 3, "parked": 1})
    elif how == "poison":
        send(sock, {"t": "attached", "generation": generation, "replayed": 0, "parked": 0})
        send(sock, {"t": "poison", "op": "LOOKUP", "path": "/cursed"})


def main() -> None:
    sock, role = socket.socket(fileno=int(sys.argv[1])), sys.argv[2]
    null = os.open(os.devnull, os.O_RDONLY)
    attaches: list[str] = []
    for step in sys.argv[4:]:
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
            case "attaches":
                attaches = value.split(",")
            case "overdue":
                send(sock, {"t": "overdue", "op": "READ", "age": float(value)})
            case "poison":
                send(sock, {"t": "poison", "op": "LOOKUP", "path": value})
            case "let-go":
                let_go()
            case "count":  # what came beside the link outlives us
                os.write(held[1], b"x")
                print(f"{os.fstat(held[1]).st_size} bytes in the {value}", file=sys.stderr, flush=True)
            case "until-mounted":
                while not os.path.exists(sys.argv[3]):
                    send(sock, {"t": "heartbeat", "loop_age": 0.0})
                    time.sleep(0.01)
            case "beats":
                for _ in range(int(value)):
                    send(sock, {"t": "heartbeat", "loop_age": 0.0})
                    time.sleep(0.02)
            case "serve":
                serve(sock, role, attaches)
            case "exit":
                os._exit(int(value))
            case "kill":
                os.kill(os.getpid(), int(value))
            case _:
                raise SystemExit(f"no such step: {step}")


main()
