# What a newcomer, a developer and a machine call. Each target sets up by itself what it lacks.
.PHONY: setup setup-test demo demo-parts test lint bench clean
.NOTPARALLEL:

PYTHON := .venv/bin/python

setup:  ## leaves .venv/bin/udf
	@packaging/setup.sh run

setup-test:
	@packaging/setup.sh test

demo: setup  ## a stick: plugged in, robbed of its drivers, pulled out in the middle of a copy, put back
	@$(PYTHON) packaging/demo.py

demo-parts: setup  ## three filesystems and three devices, each by itself
	@$(PYTHON) packaging/demo_parts.py

lint: setup
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy

test: setup-test lint  ## lint, types, all tests
	@$(PYTHON) -m tests $(PYTEST_ARGS)

bench: setup-test  ## UDF beside its peers, in one run
	@$(PYTHON) -m tests.benchmarks $(BENCH_ARGS)

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
