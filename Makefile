# Everything a newcomer runs. The environment is made once and reused until the lock file changes.
PYTHON ?= python3.11
VENV ?= .venv
LOCK ?= requirements/cpu.txt
BIN := $(VENV)/bin
DOCS_VENV ?= .venv-docs
DOCS_LOCK := requirements/docs.txt
DOCS_STAMP := $(DOCS_VENV)/.stamp-$(shell cksum < requirements/docs.txt | cut -d' ' -f1)
STAMP := $(VENV)/.stamp-$(shell cksum < $(LOCK) | cut -d' ' -f1)
RUNS ?= $(CURDIR)/runs
UI_PORT ?= 5000
UNIT_PROCESSES ?= $(shell getconf _NPROCESSORS_ONLN)
side_by_side = $(if $(filter-out 1,$(1)),-n $(1) --dist loadfile --no-loadscope-reorder)
QUICK := tests/unit tests/gpu tests/test_architecture.py
SEED ?= 0
ROUNDS ?= 3
FAULTS ?= 4
FILES ?= 200
QUIET := RAY_USAGE_STATS_ENABLED=0 MLFLOW_DISABLE_TELEMETRY=true VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
TESTS = OMP_NUM_THREADS=1 $(QUIET) $(BIN)/python -m pytest -q

.PHONY: help env demo test test-all test-unit chaos chaos-hosts check format ui docs clean

help:
	@echo "make demo    run the quick start on a local Ray cluster and print its summary"
	@echo "make test    run every test but the long ones"
	@echo "make test-all  run the long ones too: kills, sweeps, phases"
	@echo "make chaos   hurt seeded runs: SEED=$(SEED) ROUNDS=$(ROUNDS) FAULTS=$(FAULTS) FILES=$(FILES), about two minutes a round"
	@echo "make chaos-hosts  as root: kill workers, raylets and hosts in network namespaces, cut and slow their links"
	@echo "make check   formatter, linter, types, import contracts"
	@echo "make ui      open MLflow on http://127.0.0.1:$(UI_PORT) over $(RUNS)"
	@echo "make docs    build the documentation as a site in build/site, links checked"
	@echo "make env     make the environment only; make clean removes it"

env: $(STAMP)

$(STAMP): $(LOCK) pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11 or set PYTHON=/path/to/it"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing $(LOCK) into $(VENV) (once, a few minutes)"
	@log=$(VENV)/install.log; total=$$(grep -c '==' $(LOCK)); seconds=0; \
	$(BIN)/python -m pip install --progress-bar off --disable-pip-version-check --no-deps -r $(LOCK) > $$log 2>&1 & pid=$$!; \
	while kill -0 $$pid 2>/dev/null; do \
	  sleep 1; seconds=$$((seconds + 1)); \
	  if [ $$((seconds % 15)) = 0 ]; then \
	    if grep -q '^Installing' $$log; then echo "  $$seconds s: unpacking $$total packages"; \
	    else echo "  $$seconds s: $$(grep -c '^Collecting' $$log) of $$total packages fetched"; fi; \
	  fi; \
	done; \
	wait $$pid || { tail -n 20 $$log; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@$(BIN)/python -c "import torch, ray, transformers, vllm" >/dev/null 2>&1 || { echo "error: the environment is broken; see requirements/README.md on where torch must come from"; exit 1; }
	@rm -f $(VENV)/.stamp-*
	@touch $@

demo: env
	@VENV=$(VENV) RUNS=$(RUNS) bash cluster/local/demo.sh

test: test-unit
	$(TESTS) tests $(addprefix --ignore ,$(QUICK)) $(call side_by_side,$(or $(TEST_PROCESSES),2)) --durations=15 -m "not long and not real_model"

test-all: test-unit
	$(TESTS) tests $(addprefix --ignore ,$(QUICK)) $(call side_by_side,$(or $(TEST_PROCESSES),1)) --durations=25

test-unit: env
	$(TESTS) $(QUICK) $(call side_by_side,$(UNIT_PROCESSES))

chaos-hosts: env
	$(QUIET) $(BIN)/python -m tests.chaos.hosts --seed $(SEED) --rounds $(ROUNDS) $(CHAOS_OPTIONS)

chaos: env
	$(QUIET) $(BIN)/python -m tests.chaos.storm --seed $(SEED) --rounds $(ROUNDS) --faults $(FAULTS) --files $(FILES) $(CHAOS_OPTIONS)

check: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests/test_architecture.py -q

format: env
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

ui: env
	@test -f $(RUNS)/mlflow.db || { echo "error: $(RUNS)/mlflow.db does not exist; run make demo first"; exit 1; }
	@$(BIN)/python cluster/local/ports.py check UI_PORT=$(UI_PORT)
	@$(BIN)/python -m layerplan.tracking.address $(RUNS) $(UI_PORT)
	$(QUIET) $(BIN)/mlflow ui --host 127.0.0.1 --port $(UI_PORT) --workers 1 --backend-store-uri sqlite:///$(RUNS)/mlflow.db

docs: $(DOCS_STAMP)
	$(DOCS_VENV)/bin/python docs/site/stage.py build/docs
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict
	@echo "site      build/site/index.html, or with search: $(DOCS_VENV)/bin/python -m http.server -d build/site"

$(DOCS_STAMP): $(DOCS_LOCK)
	@test -x $(DOCS_VENV)/bin/python || $(PYTHON) -m venv $(DOCS_VENV)
	@$(DOCS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $(DOCS_LOCK)
	@rm -f $(DOCS_VENV)/.stamp-*
	@touch $@

clean:
	rm -rf $(VENV) $(DOCS_VENV) build *.egg-info
