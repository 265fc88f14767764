"""What a foreign program finds in place of fusermount: a program of its own, copied from here.

Owns: fusermount's command line, and its answer over _FUSE_COMMFD: the link instead of /dev/fuse.
Must never: mount or unmount anything. Called by: libfuse, inside a driver host's private mount namespace.
"""

from __future__ import annotations

import json
import os
import socket
import sys

VERSION = "3.14.0"


def parse_options(text: str) -> dict[str, str | bool]:
    """The words of -o as a table; a backslash keeps the next character from being a separator."""
    words, word, escaped = [], "", False
    for character in text:
        if escaped:
            word, escaped = word + character, False
        elif character == "\\":
            escaped = True
        elif character == ",":
            words.append(word)
            word = ""
        else:
            word += character
    options: dict[str, str | bool] = {}
    for item in [*words, word]:
        key, equals, value = item.partition("=")
        if key:
            options[key] = value if equals else True
    return options


def parse_arguments(arguments: list[str]) -> tuple[bool, dict[str, str | bool]]:
    """Whether to unmount, and the mount options."""
    unmount, rest = False, list(arguments)
    options: dict[str, str | bool] = {}
    while rest:
        argument = rest.pop(0)
        if argument == "--":
            break
        if argument == "-o" and rest:
            options.update(parse_options(rest.pop(0)))
        elif argument.startswith("-o"):
            options.update(parse_options(argument[2:]))
        elif argument in ("-V", "--version"):
            print("fusermount3 version:", VERSION)
            sys.exit(0)
        elif argument == "--unmount" or (argument.startswith("-") and "u" in argument[1:3]):
            unmount = True
    return unmount, options


def main(link_socket: str) -> int:
    """Hand the link over; foreign.py writes the call of this below the text."""
    unmount, options = parse_arguments(sys.argv[1:])
    if unmount:
        return 0  # the mount is not the program's; the supervisor sees to it
    number = os.environ.get("_FUSE_COMMFD", "")
    if not number.isdigit():
        print("fusermount: old style mounting is not supported", file=sys.stderr)
        return 1
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as init:
        init.connect(link_socket)
        init.send(json.dumps(options).encode())
        answer, links, _, _ = socket.recv_fds(init, 16, 1)
        if answer != b"link" or len(links) != 1:
            print("fusermount: this program has mounted already", file=sys.stderr)
            return 1
        with socket.socket(fileno=int(number)) as program:
            socket.send_fds(program, [b"\0"], links)
        init.send(b"done")
    return 0
