# Every target makes .venv on first use, and again after setup.py or constraints.txt changed. `make help` lists them.
#   make PYTHON=python3.12 quickstart      another Python, when .venv is made
#   make test ARGS="tests/models -k mag"   some of the tests

PYTHON ?= python3
VENV = .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
TYPES = $(VENV)/types
ROOMS = kernels models train eval configs
ARGS =
# What the tests need of the extra lm-eval; all of it would bring scipy, scikit-learn and thirty others.
LM_EVAL = lm_eval sacrebleu colorama lxml portalocker tabulate requests certifi charset-normalizer urllib3

# Byte code is kept, for every process that finds none compiles torch for ten seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help quickstart test check lint types format gpu clean

help:
	@echo "make quickstart   train a small Titans model on the Python standard library, evaluate it, and have it write"
	@echo "make test         the whole test suite, on two processes"
	@echo "make check        lint, formatting and types"
	@echo "make format       rewrite the files as 'make check' wants them"
	@echo "make gpu          on a GPU: is everything right there, and how fast is it; writes docs/results/<gpu>.json and .md"
	@echo "make clean        remove caches and built packages (not .venv, not runs/)"
	@echo "Each makes its own .venv when there is none, with $(PYTHON); PYTHON=python3.12 chooses another."

quickstart: $(READY)
	$(BIN)/python -m palimpsest.eval.quickstart $(ARGS)

# One thread per process: many small matrices, and two processes already fill two cores.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal --durations=15 $(ARGS)

check: lint types

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy reads the folders through links that bear their installed names, so that relative imports between them resolve.
types: $(READY)
	@mkdir -p $(TYPES)/palimpsest
	@for room in $(ROOMS); do rm -f $(TYPES)/palimpsest/$$room && ln -s ../../../$$room $(TYPES)/palimpsest/$$room; done
	cd $(TYPES) && ../bin/mypy --config-file ../../pyproject.toml -p palimpsest

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Installs nothing: the Python that has torch sees the folders through links that bear their installed names.
gpu:
	@mkdir -p build/links/palimpsest
	@for room in $(ROOMS); do rm -f build/links/palimpsest/$$room && ln -s ../../../$$room build/links/palimpsest/$$room; done
	@python=$(BIN)/python; test -x $$python || python=$(PYTHON); \
	PYTHONPATH=$(CURDIR)/build/links $$python -m palimpsest.kernels.profile gpu $(ARGS)

clean:
	rm -rf build dist palimpsest.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis $(TYPES)
	find $(ROOMS) tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): setup.py constraints.txt
	@python=$(BIN)/python; test -x $$python || python=$(PYTHON); \
	command -v $$python >/dev/null || { echo "$$python not found; name a Python 3.10 to 3.13 with PYTHON=..."; exit 1; }; \
	$$python -c 'import sys; v = sys.version_info; \
	print("Python %d.%d.%d (%s)" % (v[0], v[1], v[2], sys.executable)); \
	sys.exit(None if (3, 10) <= v[:2] < (3, 14) else "Palimpsest needs Python 3.10 to 3.13; name one with PYTHON=...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "venv failed; on Debian: apt install python3-venv"; exit 1; }
	@# Without byte code, which Python writes of what is imported: that of all of it takes longer than to install it.
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt --no-compile -e '.[dev]'
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt --no-deps --no-compile $(LM_EVAL)
	@touch $(READY)
