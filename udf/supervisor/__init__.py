"""The supervisor: starts, watches and stops shims and driver hosts, and answers the control socket.

Owns: processes, their states, the control socket. Must never: touch a path below a FUSE mount in its own process,
block its loop, or run a driver's code. Called by: udf.cli, through `daemon`, `private` and `client`.
Nothing is imported here, because `udf status` (client.py) must not pay for trio.
"""
