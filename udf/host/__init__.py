"""What runs inside a driver's process: the sandbox, loading, READY, serving. `python -m udf.host FD` starts it."""
