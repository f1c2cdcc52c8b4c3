# Every target makes .venv and installs what it needs first. Only python3 (3.11 or newer),
# make and a package index are needed; nothing has to be activated.
#
#   make demo ONCE=1            the demonstration, ending by itself
#   make test ARGS="-k topic"   more arguments for pytest
#   make test JOBS=6            more tests at once, on more than two cores
#   make test PYTHON=python3.13 another Python (after make clean)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
ARGS ?=
# Half of its time a test waits for a process or a server, so three of them keep two cores busy.
JOBS ?= 3
VENV := .venv
LOWEST := .venv-lowest
# Tests of what is most at home in nats-py: they run on its lowest version, too.
CONNECTION := handshake connection nats_py
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --quiet --disable-pip-version-check
QUICK := tests/unit tests/contract $(filter-out %_packaging.py,$(wildcard tests/test_*.py))

.PHONY: help demo test quick lowest lint audit bench torture docs clean

help:  ## show this list
	@sed -En 's/^([a-z]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 16

demo: $(VENV)/.stamp-example  ## run the example shop on a real nats-server until Ctrl-C (ONCE=1: end by itself)
	@$(RUN) -m example_app.demo $(if $(filter-out 0,$(ONCE)),--once)

test: $(VENV)/.stamp-dev  ## run the tests
	@$(RUN) -m pytest -n $(JOBS) --dist worksteal $(ARGS)

quick: $(VENV)/.stamp-dev  ## run the tests that need no server, in about a minute
	@$(RUN) -m pytest -n $(JOBS) --dist worksteal -m "not real_server" $(QUICK) $(ARGS)

lowest: $(LOWEST)/.stamp  ## run the unit, contract and connection tests on the lowest versions that are allowed
	@$(LOWEST)/bin/python -m pytest -n $(JOBS) --dist worksteal tests/unit tests/contract \
	    $(CONNECTION:%=tests/integration/test_%.py) $(ARGS)

lint: $(VENV)/.stamp-dev $(VENV)/.stamp-lint  ## check style and types
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy

audit: $(VENV)/.stamp-base $(VENV)/.stamp-audit  ## check the licences and known weaknesses of the dependencies
	@$(RUN) -m tests.tools.licences
	@$(RUN) -m tests.tools.audit

bench: $(VENV)/.stamp-dev $(VENV)/.stamp-bench  ## measure
	@$(RUN) -m tests.bench $(ARGS)

torture: $(VENV)/.stamp-dev  ## kill processes, servers and connections for an hour or two, and count the losses
	@$(if $(ARGS),:,$(RUN) -m pytest -m long)
	@$(RUN) -m tests.torture --long $(ARGS)

docs: $(VENV)/.stamp-dev $(VENV)/.stamp-docs  ## build the documentation into docs/_build/html
	@$(RUN) -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

clean:  ## remove what the other targets made, .venv too
	@rm -rf $(VENV) $(LOWEST) docs/_build dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- the environment: one stamp a group, made anew when pyproject.toml changes

$(VENV)/.stamp-base: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	           "Choose another with: make PYTHON=python3.13 ..." >&2; exit 1; }
	@$(RUN) -m pip --version > /dev/null 2>&1 || { echo "making $(VENV) ..."; \
	    $(PYTHON) -m venv --clear $(VENV); } || \
	    { echo "python3 cannot make a virtual environment; on Debian and Ubuntu:" \
	           "apt install python3-venv" >&2; exit 1; }
	@$(PIP) install --upgrade 'pip>=25.1'
	@echo "installing flask-natspubsub ..."
	@$(PIP) install -e '.[all]'
	@touch $@

$(VENV)/.stamp-%: pyproject.toml $(VENV)/.stamp-base
	@echo "installing the group $* ..."
	@$(PIP) install --group $*
	@touch $@

$(LOWEST)/.stamp: pyproject.toml tests/tools/lowest.py $(VENV)/.stamp-base
	@echo "making $(LOWEST) ..."
	@$(PYTHON) -m venv --clear $(LOWEST)
	@$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check 'pip>=25.1'
	@$(RUN) -m tests.tools.lowest > $(LOWEST)/constraints.txt
	@$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check \
	    --constraint $(LOWEST)/constraints.txt -e '.[all]' --group lowest
	@touch $@
