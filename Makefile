# Every target runs in .venv, which the first one creates: Python >= 3.11, make and a package index are enough.
# Versions come from constraints.txt. PYTHON=python3.12 make … chooses another interpreter.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test check style bench clean

# The main job on the embedded default model: no network, no GPU, no account. 10 windows of 128 tokens instead of 16 of
# 256, and 32 evaluation windows instead of all 321, so that it ends within two minutes on two cores; without these three
# options it takes about six.
demo: $(READY)
	$(BIN)/qbench run --model tiny-llama \
	    --method rtn --method smoothquant --method omniquant --method affinequant \
	    --scheme W4A4 --scheme W3A16 --nsamples 10 --seqlen 128 --limit 32

test: $(READY)
	$(BIN)/python -m pytest

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

style: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python -m pytest benchmarks --benchmark-only

# Keeps results/: runs are expensive.
clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .benchmarks build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone: it is the one large download, and a failure later does not repeat it.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "qbench needs Python >= 3.11; run: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
