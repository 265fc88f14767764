"""The shim, between a real kernel and a driver that says whatever a test wants."""
