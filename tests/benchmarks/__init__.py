"""UDF beside its peers, in one run: `make bench`, or `python -m tests.benchmarks [NAME…] [--quick] [--json FILE]`."""
