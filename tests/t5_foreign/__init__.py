"""FUSE programs that know nothing of UDF, unmodified, through the real command line."""
