# Every target builds what it needs: `make example` or `make test` in a fresh clone is enough.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: example test stress check bench format setup clean

example: setup  ## train MTMD on the synthetic set, about a minute on two CPU cores
	$(BIN)/python examples/mtmd_mosi.py --out runs/example

test: setup  ## the whole suite, with the examples in docstrings, README and docs
	$(BIN)/python -m pytest

stress: setup  ## the tests of chance with many more repetitions, hours
	MOMENTUM_DISTILL_STRESS=1 $(BIN)/python -m pytest -m stress

check: setup  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict src

bench: setup  ## every benchmark at small sizes, about ten minutes
	$(BIN)/python benchmarks/run_all.py

format: setup  ## what `check` wants, applied
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[examples]" --group dev
	touch $@

clean:
	rm -rf .venv runs .hypothesis .mypy_cache .pytest_cache .ruff_cache
