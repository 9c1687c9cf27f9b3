# make demo | make test are all a newcomer needs; each does its own set-up and is quick the second time.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test test-long lint bench build clean

help: ## show what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

demo: ## run the whole loop on real data; ONCE=1 exits at the end instead of leaving the dashboard open
	@$(PYTHON) .ci/setup.py sim
	@$(BIN)/atoll demo $(if $(ONCE),--once)

test: ## lint, types, import rule, tests (about ten minutes)
	@$(PYTHON) .ci/setup.py all test
	@sh .ci/system-programs
	@$(MAKE) --no-print-directory lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not long'

test-long: ## the tests that take minutes each
	@$(PYTHON) .ci/setup.py all test
	$(BIN)/python -m pytest -m long

lint: ## style, types, import rule
	@$(PYTHON) .ci/setup.py all test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: ## measure what is claimed about speed and size, beside its peers; NAME=noise: that one alone
	@$(PYTHON) .ci/setup.py all test
	@for name in $(or $(NAME),noise secure_sum private_round simulation engine aggregation fleet_round); do COLUMNS=200 $(BIN)/python -m benchmarks.$$name || exit 1; done

build: ## wheel and sdist into dist/
	@$(PYTHON) .ci/setup.py all test
	$(BIN)/python -m build

clean: ## remove the environment and everything made
	rm -rf .venv .demo build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
