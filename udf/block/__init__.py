"""Block devices: the NBD wire, its server and client, partitions, and the block shim."""
