"""The FUSE wire: numbers, structures, notifications, the device's ioctls, mounting. No policy."""
