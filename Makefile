# Two commands matter: `make demo` runs the main job, `make test` runs the tests. Both set up what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo test check format test-gpu lock clean

setup: $(READY)

# The lock pins every version; the package itself is installed in place, so that changes count at once.
$(READY): requirements-dev.lock pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "epigram needs Python 3.11 or newer: make PYTHON=python3.12"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $(READY)

demo: setup
	$(BIN)/epigram train demo

test: setup
	$(BIN)/python -m pytest -n auto --dist loadgroup

check: setup
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/mypy
	$(BIN)/python -m pytest -n auto --dist loadgroup -m "not slow"

format: setup
	$(BIN)/ruff format src tests benchmarks examples
	$(BIN)/ruff check --fix src tests benchmarks examples

# On a machine with a CUDA device, with the Python that has torch for it (make test-gpu PYTHON=python3.12). TESTS: fewer.
test-gpu:
	PYTHONPATH=src $(PYTHON) -m pytest -p no:xdist -p no:cacheprovider -m gpu $(TESTS)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist src/*.egg-info
