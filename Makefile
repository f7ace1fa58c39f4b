# make quickstart   train the small search agent and show what it learned
# make test         ruff, mypy and the tests (in two processes; WORKERS=0 for one)
# make parity       compares our models with those of PyTorch, which it installs
# Each installs into .venv first if that is not done yet or requirements.lock has changed.

PYTHON := .venv/bin/python
STAMP := .venv/installed.stamp
PARITY_STAMP := .venv/parity.stamp
COVERED := jaxrl_llm/ops jaxrl_llm/sampling jaxrl_llm/train
WORKERS := 2

.PHONY: install quickstart test parity lint clean

install: $(STAMP)

# Takes the first interpreter that is new enough and can make a virtual environment: on Debian and Ubuntu, `python3` comes
# without ensurepip unless python3-venv is installed.
$(STAMP): requirements.lock setup.py
	@if ! $(PYTHON) -m pip --version >/dev/null 2>&1; then \
	    found=; new_enough=; \
	    for python in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	        if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	            new_enough=$$python; \
	            if $$python -c 'import ensurepip, venv' >/dev/null 2>&1; then found=$$python; break; fi; \
	        fi; \
	    done; \
	    if [ -z "$$new_enough" ]; then \
	        echo "make install: no Python 3.11 or later on the PATH. Install one and run this again." >&2; exit 1; \
	    elif [ -z "$$found" ]; then \
	        echo "make install: $$new_enough cannot make virtual environments (its ensurepip module is missing)." >&2; \
	        echo "On Debian or Ubuntu: apt-get install $$new_enough-venv; then run this again." >&2; exit 1; \
	    fi; \
	    echo "Making .venv with $$($$found --version)"; \
	    $$found -m venv --clear .venv; \
	fi
	@echo "Installing requirements.lock into .venv (about a minute, 1.5 GB)"
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@$(PYTHON) -m pip check --disable-pip-version-check
	@touch $@

quickstart: $(STAMP)
	$(PYTHON) -m experiments.quickstart

# Neighbors stay together, as they share fixtures and compiled functions; who is done takes over half of what is left.
test: lint
	$(PYTHON) -m pytest -n $(WORKERS) --dist worksteal --ignore=tests/parity \
	    $(COVERED:%=--cov=%) --cov-report=term --cov-fail-under=85

parity: $(PARITY_STAMP)
	$(PYTHON) -m pytest tests/parity

$(PARITY_STAMP): requirements-parity.lock $(STAMP)
	@echo "Installing requirements-parity.lock into .venv (PyTorch for CPUs, 200 MB and more)"
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-parity.lock
	@touch $@

lint: $(STAMP)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

clean:
	rm -rf .venv build dist *.egg-info .coverage .mypy_cache .pytest_cache .ruff_cache .hypothesis .jax_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
