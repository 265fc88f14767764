"""fat: FAT12, FAT16 and FAT32 volumes on a block service."""
