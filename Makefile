# Everything runs in one virtual environment, made on first use. ARGS passes overrides: make slmrec ARGS="data=ml-1m"
VENV   ?= .venv
PYTHON ?= python3
ARGS   ?=
WORKERS ?= 2
READY  := $(VENV)/.ready
RUN    := $(VENV)/bin/python

.PHONY: slmrec test test-cluster lint bench bench-slmrec bench-methods

slmrec: $(READY)
	$(RUN) -m lit_llmers.fit recipe=slmrec $(ARGS)

test: $(READY)
	$(RUN) -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

test-cluster: $(READY)
	$(RUN) -m pytest tests/cluster $(ARGS)

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

bench: $(READY)
	$(RUN) benchmarks/students.py --peers --record docs/benchmarks.md $(ARGS)

bench-slmrec: $(READY)
	$(RUN) benchmarks/slmrec_costs.py $(ARGS)

bench-methods: $(READY)
	$(RUN) benchmarks/method_costs.py $(ARGS)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
