"""One mount's server: owns /dev/fuse, answers from its caches, forwards the rest to the driver."""
