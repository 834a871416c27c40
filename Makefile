# Every target builds what it needs: `make example` or `make test` in a fresh clone is enough.
PYTHON ?= python3
BIN := .venv/bin
OLDEST := .venv-oldest
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadgroup
# Not those that look at files, messages, pages and packages, nor those whose numbers are what others compute.
NOT_COMPUTING := bad_inputs|benchmarks|cuda|distributed|docs|example_(ablate|bootstrap|cli|data|garbage|killed|layouts|$\
	own_format|plots|processes|report|retrieval|search)|integrations|printed_commands|public_api|release|safe_pickle|supply_chain|triton
COMPUTING = $(shell ls tests/*/test_*.py | grep -v -E "/test_($(NOT_COMPUTING))")
OLDEST_TORCH := $(shell sed -n 's/.*"torch>=\([0-9.]*\)".*/\1.0/p' pyproject.toml)

.PHONY: example tour results test test-long test-cpus test-oldest stress mutants check bandit audit docs dist bench format setup clean

example: setup  ## train MTMD on the synthetic set, about a minute on two CPU cores
	OMP_NUM_THREADS=1 $(BIN)/python examples/mtmd_mosi.py --out runs/example --no-resume

tour: setup  ## run examples/tour.ipynb, half a minute, and store in it what its cells show
	OMP_NUM_THREADS=1 $(BIN)/python -W error tests/run_notebook.py examples/tour.ipynb

results:  ## the commands that give the figures of docs/results.md and docs/when.md again
	@sed -n '/^```sh/,/^```$$/{/^```/!p}' docs/results.md docs/when.md \
		| awk '{one = one $$0 "\n"} !/\\$$/ {if (!seen[one]++) printf "%s", one; one = ""}'  # whole commands

test: setup  ## the suite, with the examples in docstrings, README and docs: about five minutes on two cores
	$(PYTEST) -m "not long"

test-long: setup  ## what `test` leaves out: whole grids, kills, CPUs that are not like this one
	$(MAKE) $(filter-out test-cpu-$(THIS_CPU),test-cpu-avx2 test-cpu-default)
	MOMENTUM_DISTILL_TIER=long $(PYTEST) -m "long or repeated"

# Without AVX-512, and without AVX2, a CPU has other kernels, other last digits, and no bfloat16 in an LSTM. What this one
# has `make test` has run with.
CPU_avx2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2
CPU_default := ATEN_CPU_CAPABILITY=default
THIS_CPU = $(shell $(BIN)/python -c "import torch; print(torch.backends.cpu.get_cpu_capability().lower())")
test-cpus: test-cpu-avx2 test-cpu-default test-cpu-native  ## the tests that compute, with the instructions of other CPUs and of this one
test-cpu-%: setup
	$(CPU_$*) $(PYTEST) -m "not long" $(COMPUTING)

# The pins of torch are those of the newest; NumPy 2.4 refuses what Triton's interpreter of that time does.
test-oldest: $(OLDEST)/.installed  ## the suite on the oldest torch that pyproject.toml allows
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest --numprocesses auto --dist loadgroup -m "not long" \
		--deselect tests/project/test_supply_chain.py::test_everything_that_make_installs_is_pinned

$(OLDEST)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLDEST)
	grep -v -i -E '^(torch|triton|sympy|numpy|cuda-.*|nvidia-.*)==' constraints.txt > $(OLDEST)/constraints.txt
	printf 'torch==%s\nnumpy==2.2.6\n' $(OLDEST_TORCH) >> $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --constraint $(OLDEST)/constraints.txt "pip>=25.3"
	$(OLDEST)/bin/python -m pip install --quiet --resume-retries 20 --constraint $(OLDEST)/constraints.txt \
		--editable ".[examples]" --group test
	$(OLDEST)/bin/python -m pip install --quiet --constraint $(OLDEST)/constraints.txt --no-deps --group peers
	touch $@

stress: setup  ## the tests of chance with many more repetitions, hours
	MOMENTUM_DISTILL_TIER=stress $(BIN)/python -m pytest -m repeated

mutants: setup  ## mutation testing of src/, hours; it goes on where it was interrupted
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group mutants
	$(BIN)/python tests/mutation/mutants.py

check: setup bandit  ## style, types, security lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict src

# Tests may unpickle (B301, B614) what they have pickled themselves.
bandit: setup  ## security lint
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive src examples benchmarks
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive tests --skip B301,B614

audit: bandit  ## the same, and known vulnerabilities of what constraints.txt pins, which asks an advisory service
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group audit
	$(BIN)/pip-audit --strict --disable-pip --no-deps --requirement constraints.txt

docs: setup  ## the site, into site/
	$(BIN)/python docs/build.py

dist: setup  ## the wheel and the sdist, into dist/; the same bytes whenever and wherever they are built
	rm -rf dist
	$(BIN)/python -m build --no-isolation

bench: setup  ## every benchmark at small sizes, about ten minutes
	$(BIN)/python benchmarks/run_all.py

format: setup  ## what `check` wants, applied
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "pip>=25.3"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --build-constraint constraints.txt \
		--editable ".[examples]" --group dev
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps --group peers
	touch $@

clean:
	rm -rf .venv $(OLDEST) dist mutants runs site .hypothesis .mypy_cache .pytest_cache .ruff_cache
