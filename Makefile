# Every target works in a fresh clone: the environment is made on first use, and made anew for
# another PYTHON.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
INSTALLED = $(VENV)/.installed-$(VERSION)
PY = $(VENV)/bin/python
TEST = $(PY) -m pytest -n 2 --dist loadfile

.PHONY: env demo test test-slow lint clean

env: $(INSTALLED)

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv --clear $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet --editable '.[test]'
	touch $@

demo: env
	$(PY) -m examples.demo --workdir=runs/demo

test: env
	$(TEST) -m 'not slow'

test-slow: env
	$(TEST) -m slow

lint: env
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean:
	rm -rf $(VENV) .cache runs
