# `make train` and `make test` need nothing but Python 3.11 to 3.13: they create .venv first.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
READY := .venv/.ready
NOTEBOOKS := .venv/.notebooks

.PHONY: train test lint experiments-smoke notebooks clean
train: $(READY)
	$(BIN)/mor train demo

# A worker keeps its half of the tests in their order, so that few fixtures and programs are made by both.
test: $(READY)
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	$(BIN)/pyright

$(READY): pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 to 3.13 is needed (or name one: make PYTHON=...)" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]' \
		--constraint constraints/$$($(BIN)/python -c 'import sys; print("python%d.%d" % sys.version_info[:2])').txt
	touch $@

# Every sweep of experiments/ at size `debug`, one seed, one per core at a time: that they run, not what they find.
SMOKE := JAX_PLATFORMS=cpu XLA_FLAGS=--xla_backend_optimization_level=0 $(BIN)/mor sweep
experiments-smoke: $(READY)
	printf '%s\n' experiments/*/sweep.py | xargs -P $$(getconf _NPROCESSORS_ONLN) -I FILE env $(SMOKE) FILE --scale debug --one-seed
	env $(SMOKE) experiments/test_time_scaling/sweep.py --scale debug --depth-curve --out runs/test_time_scaling-curve

# Runs notebooks/*.ipynb on a CPU and writes their pages; at these sizes optimising programs costs more than it gains.
notebooks: $(NOTEBOOKS)
	JAX_PLATFORMS=cpu XLA_FLAGS=--xla_backend_optimization_level=0 $(BIN)/python notebooks/render.py

$(NOTEBOOKS): $(READY)
	$(BIN)/python -m pip install --quiet --editable '.[notebooks]'
	touch $@

clean:
	rm -rf .venv .jax_cache build dist
