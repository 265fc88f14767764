"""What authors subclass (`fs`), and what turns their paths into FUSE's inodes (`tree`, `paths`)."""
