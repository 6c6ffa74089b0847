# Sealgate: make demo | demo-environments | test | check | bench [ONLY=name] | format | lock | clean
.DEFAULT_GOAL := help
.PHONY: help demo demo-environments test check bench format lock clean environment native-environment referees
.DELETE_ON_ERROR:
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

VENV := .venv
PY := $(VENV)/bin/python
NATIVE := .venv-native
REFEREES := .venv-referees
NODE_REFEREES := .node-referees
# Of `make test`. More than cores make tests slow that wait for each other's processes.
TEST_PROCESSES ?= 2
SOURCES := envelope runtime key_agent proxy tests bench certs deploy

help:
	@echo "make demo            the main job on real parts, about a minute (KEEP=1 leaves it running)"
	@echo "make demo-environments  a breach that no caller notices, one and a half to two minutes on two cores; draws a picture (KEEP=1 leaves it running)"
	@echo "make test            everything the tests need, then all tests"
	@echo "make check           lint, formatting, types, architecture"
	@echo "make bench [ONLY=x]  comparisons with peers, written to bench/results.json"
	@echo "make format | lock | clean"

# The lock file names every package with its hash; nothing outside it is installed.
$(VENV)/ready: requirements.lock pyproject.toml deploy/find-python
	@python=$$(deploy/find-python); echo "creating $(VENV) with $$python"; \
	"$$python" -m venv --clear $(VENV)
	@$(PY) -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

# A second environment whose cryptography (>= 50) has its own Cobblestone-256: the independent judge of our format.
$(NATIVE)/ready: requirements-native.lock deploy/find-python
	@python=$$(deploy/find-python); "$$python" -m venv --clear $(NATIVE)
	@$(NATIVE)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-native.lock
	@touch $@

# Third-party servers and clients for the tests, each a process of its own, in environments of their own.
$(REFEREES)/ready: requirements-referees.lock deploy/find-python
	@python=$$(deploy/find-python); "$$python" -m venv --clear $(REFEREES)
	@$(REFEREES)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-referees.lock
	@touch $@

$(NODE_REFEREES)/ready: tests/referees/node/package.json tests/referees/node/package-lock.json
	@rm -rf $(NODE_REFEREES); mkdir $(NODE_REFEREES); cp $^ $(NODE_REFEREES)
	@npm ci --prefix $(NODE_REFEREES) --ignore-scripts --no-audit --no-fund --silent
	@touch $@

environment: $(VENV)/ready
native-environment: $(NATIVE)/ready
referees: $(REFEREES)/ready $(NODE_REFEREES)/ready

demo: environment
	@deploy/system-packages demo
	@$(PY) -m deploy.demo $(if $(KEEP),--keep)

demo-environments: environment
	@deploy/system-packages demo-environments
	@$(PY) -m deploy.demo_environments $(if $(KEEP),--keep)

test: environment native-environment
	@deploy/system-packages test
	@$(MAKE) --no-print-directory referees
	@$(PY) -m tests.postgres $(PY) -m pytest -n $(TEST_PROCESSES) --dist loadfile $(ARGS)

check: environment
	@$(VENV)/bin/ruff check $(SOURCES)
	@$(VENV)/bin/ruff format --check $(SOURCES)
	@$(VENV)/bin/mypy
	@$(PY) -m pytest -q tests/architecture

bench: environment referees
	@deploy/system-packages bench
	@$(PY) -m bench $(ONLY)

format: environment
	@$(VENV)/bin/ruff check --fix-only --quiet $(SOURCES)
	@$(VENV)/bin/ruff format $(SOURCES)

# Needs uv (pip install uv). Review the difference: a new version is a decision (docs/adr/0002).
COMPILE := uv pip compile --quiet --universal --python-version 3.12 --generate-hashes --no-header
lock:
	@$(COMPILE) --all-extras --group test --group lint --group build pyproject.toml -o requirements.lock
	@grep -o '^[a-z0-9][^\\]*' requirements.lock > .locked-versions
	@for part in "agent --extra kmip --extra nats" "proxy --extra nats"; do $(COMPILE) --no-annotate --constraint .locked-versions \
	    --extra $$part --extra postgres pyproject.toml -o "requirements-$${part%% *}.lock"; done
	@rm .locked-versions
	@$(COMPILE) requirements-native.in -o requirements-native.lock
	@$(COMPILE) --no-annotate requirements-referees.in -o requirements-referees.lock
	@cd tests/referees/node && npm install --package-lock-only --ignore-scripts --no-audit --no-fund --silent

clean:
	@rm -rf $(VENV) $(NATIVE) $(REFEREES) $(NODE_REFEREES) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage
