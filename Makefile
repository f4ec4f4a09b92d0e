# Two commands set up everything on a fresh machine: `make demo` and `make test`.
# Other cards: make demo CARD=cu126 (V100) or CARD=cu130; other indexes: PIP_ARGS="--extra-index-url ...".

PYTHON ?= python3
VENV ?= .venv
CARD ?= cpu
PIP_ARGS ?=
SEEDS ?= 1
EXTRA := $(if $(filter cpu,$(CARD)),cpu,gpu)
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed-$(CARD)

.PHONY: demo test check format test-fast test-slow test-faults test-gpu tiny clean install

install: $(INSTALLED)

$(INSTALLED): pyproject.toml cluster/constraints/common.txt cluster/constraints/$(CARD).txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 13) else "Python 3.11 or 3.12 is needed: make PYTHON=python3.11 ...")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c cluster/constraints/$(CARD).txt torch
	$(PY) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c cluster/constraints/$(CARD).txt -e '.[$(EXTRA),dev]'
	touch $@

demo: $(INSTALLED)  ## the whole method on synthetic data: one table, and where the artifacts are
	@$(PY) jobs/reit.py --seeds $(SEEDS)

check: $(INSTALLED)  ## format, lint, strict types
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

test-fast: $(INSTALLED)  ## what needs neither Ray nor groups of processes: minutes
	$(PY) -m pytest -q -m "not ray and not groups and not slow and not faults and not gpu"

test: $(INSTALLED)  ## everything but the slow, fault and GPU tiers, real Ray included
	$(PY) -m pytest -q -m "not slow and not faults and not gpu"

test-slow: $(INSTALLED)
	$(PY) -m pytest -q -m slow --timeout 3600

test-faults: $(INSTALLED)
	$(PY) -m pytest -q -m faults --timeout 1800

test-gpu: $(INSTALLED)
	$(PY) -m pytest -q -m gpu

format: $(INSTALLED)
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

tiny: $(INSTALLED)  ## rebuild the stand-in LLM that ships in rella/assets/tiny
	$(PY) -m rella.lm.tiny --out rella/assets/tiny

clean:  ## what the tools leave behind; artifacts are removed by `python -m rella clean`
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
