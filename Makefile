# make run: train the embedded default.   make test: the tests.   Both install into .venv first, from PyPI alone.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin

# The oldest torch that pyproject.toml allows, in an environment of its own, on Python 3.12 where it is there.
FLOOR_PYTHON ?= $(shell command -v python3.12 || echo "$(PYTHON)")
FLOOR := .venv-floor
TESTS ?= tests

.PHONY: run test test-floor lint docs bench mutants faults slow audit clean
run: .venv/.runtime
	$(BIN)/python -m lpc_runner

# Files as they are named: by their number of tests, the longest files, which have few, would come last on one core.
test: .venv/.development
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-floor: $(FLOOR)/.development
	$(FLOOR)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(TESTS)

lint: .venv/.development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

docs: .venv/.runtime
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

bench: .venv/.runtime
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]' || \
		echo "without the packages of the extra 'bench': their rows will be missing"
	$(BIN)/python -m benchmarks

mutants: .venv/.development
	$(BIN)/python scripts/mutants.py

faults: .venv/.development
	$(BIN)/python -m pytest -m faults

slow: .venv/.development
	$(BIN)/python -m pytest -m slow

# Known vulnerabilities of the pinned versions; needs a network that reaches pip-audit's database.
audit: .venv/.development
	$(BIN)/python -m pip install --quiet 'pip-audit>=2.9,<3'
	$(BIN)/python -m pip_audit --requirement constraints.txt --no-deps --disable-pip --strict --progress-spinner off

.venv/.created:
	@test -n "$(PYTHON)" || { echo "lpc_runner needs Python 3.11, 3.12 or 3.13 with venv; PYTHON=/path/to/python names one"; exit 1; }
	$(PYTHON) -m venv .venv
	touch $@

.venv/.runtime: .venv/.created pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/.development: .venv/.runtime
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

$(FLOOR)/.development: pyproject.toml constraints.txt
	test -x $(FLOOR)/bin/python || $(FLOOR_PYTHON) -m venv $(FLOOR)
	sed 's/^torch==.*/torch==2.11.0/; s/^torchvision==.*/torchvision==0.26.0/' constraints.txt > $(FLOOR)/constraints.txt
	$(FLOOR)/bin/python -m pip install --quiet --constraint $(FLOOR)/constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf .venv $(FLOOR) build dist site
