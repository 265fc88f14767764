"""Programs on our own drivers, through the kernel, shim, link and host: what users rely on."""
