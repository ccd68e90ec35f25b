# The two commands a fresh machine needs: `make demo` and `make test`. Both may be run again and again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/demo

.PHONY: setup demo test parity cluster fuzz lint types docs tables site clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

# Trains on the built-in scenes, evaluates, labels a folder, and fails unless something was learnt.
demo: setup
	rm -rf $(RUN)
	$(BIN)/ssaseg train demo --out $(RUN) --device cpu
	$(BIN)/ssaseg eval $(RUN)/best.safetensors --json $(RUN)/eval.json --device cpu
	$(BIN)/ssaseg data export $(RUN)/scenes --split val --count 12
	$(BIN)/ssaseg predict $(RUN)/best.safetensors $(RUN)/scenes/images --out $(RUN)/labels --save index,overlay,coarse --device cpu
	$(BIN)/python benchmarks/check_demo.py $(RUN)

# A process a core, and each file's tests in one of them, which share what is built for them.
test: setup
	$(BIN)/pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder

# All networks against figures of the official code, exports and training of each family, and other slow tests; the
# tests have the light ones. Takes 5 GB and half an hour.
parity: setup
	SSASEG_PARITY=1 $(BIN)/pytest -q -s --durations=0 tests/models/test_general.py \
		tests/models/test_networks.py::test_counts_are_the_papers
	SSASEG_PARITY=1 $(BIN)/pytest -q -s --durations=0 -k any_size tests/weights/test_export.py
	SSASEG_PARITY=1 $(BIN)/pytest -q -s --durations=0 -k learnt tests/training/test_families.py
	SSASEG_PARITY=1 $(BIN)/pytest -q --durations=0 -m slow

# `predict --engine ray` on two local actors. Installs the extra `ray`, 500 MB, which the other tests do without.
cluster: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[ray]"
	$(BIN)/pytest -q --durations=0 tests/prediction/test_ray.py

# Random files and command lines against what reads them, SECONDS of each kind. The tests have a short run of it.
SECONDS ?= 60
fuzz: setup
	$(BIN)/python tests/helpers/fuzzing.py --seconds $(SECONDS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy wants the import names as folders: a tree of links to the real ones.
types: setup
	rm -rf build/typing && mkdir -p build/typing/ssaseg
	ln -s $(addprefix ../../../,$(wildcard ssaseg/*.py)) build/typing/ssaseg/
	ln -s ../../../ssaseg_cli build/typing/ssaseg/cli
	ln -s ../../../files ../../../models ../../../datasets ../../../recipes build/typing/ssaseg/
	cd build/typing && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p ssaseg

# What help pages list, and the page of a recipe's keys; tests hold that they are current.
docs: setup
	$(BIN)/python -c "from ssaseg.cli.recipe_keys import write; write()"
	$(BIN)/ssaseg recipes keys > docs/recipe.md

# The generated tables of README.md and docs/; a test holds that they are current.
tables: setup
	$(BIN)/python benchmarks/tables.py

# The website, build/site, with all its links checked. Its pages are links to the real ones.
site: $(VENV)/.site
	rm -rf build/pages && mkdir -p build/pages
	ln -s $(addprefix ../../,README.md CONTRIBUTING.md SECURITY.md CHANGELOG.md docs) build/pages/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/.site: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[docs]"
	touch $@

clean:
	rm -rf build dist runs *.egg-info .pytest_cache .ruff_cache .mypy_cache
