PYTHON ?= python

.PHONY: check docs examples fast format lint types test

check: format lint types test

docs:
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

examples:
	$(PYTHON) tests/support/notebooks.py

fast:
	$(PYTHON) -m pytest -n auto --dist worksteal -m "not slow"

format:
	$(PYTHON) -m ruff format --check .

lint:
	$(PYTHON) -m ruff check .

types:
	$(PYTHON) -m pyright --pythonpath "$$($(PYTHON) -c 'import sys; print(sys.executable)')"

test:
	$(PYTHON) -m pytest -n auto --dist worksteal
