# `make serve MODEL=path-or-name` starts a server, `make test` passes the tests; both install what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL ?=
# The tests of a file stay together: its servers are started once. More than four start more processes than help.
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile
STAMP := $(VENV)/.installed

.PHONY: install serve test long unit check bench clean

install: $(STAMP)

$(STAMP): pyproject.toml native/CMakeLists.txt native/cmake-args.sh $(wildcard native/*.cpp native/*.h)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	CMAKE_ARGS="$$(sh native/cmake-args.sh) $$CMAKE_ARGS" $(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	touch $(STAMP)

serve: install
	$(BIN)/swarmcpp serve $(MODEL)

test: install
	$(PYTEST) -m 'not long'

long: install
	$(PYTEST)

unit: install
	$(PYTEST) -m 'not e2e'

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: install
	$(BIN)/python bench/serve.py
	$(BIN)/python bench/prefix.py
	$(BIN)/python bench/prefix.py --size 1.1b --scenario repeat

clean:
	rm -rf $(VENV) build
