"""The block shim: the process that programs see as an NBD server, whatever becomes of the driver behind it."""
