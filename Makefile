# Every target makes the environment it needs in .venv. PYTHON chooses the interpreter (3.11 or later).
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo real demo-recall test test-slow lint clean

demo: .venv/ready
	$(BIN)/python recipes/tiny/demo.py

real: .venv/ready
	$(BIN)/python recipes/real/real.py $(if $(MINUTES),minutes=$(MINUTES)) $(if $(DATA),data=$(DATA))

demo-recall: .venv/ready
	test -d runs/demo || $(BIN)/python recipes/tiny/demo.py
	$(BIN)/python recipes/tiny/recall.py

test: .venv/ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

test-slow: .venv/ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "slow and not gpu"

lint: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch comes first and pinned: left to the others it may resolve to a build with gigabytes of CUDA packages.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "llamba needs Python 3.11 or later; set PYTHON=")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/ready-dev: .venv/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache
