.PHONY: help setup check format test test-core quickstart real ci
python = $${IPT_VENV:-.venv}/bin/python

help:        ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/:/'
setup:       ## the environment, with all that a CPU can run and the developer's tools
	launch/setup.sh test dev
check:       ## lint, format and types, without changing anything
	$(python) -m ruff check . && $(python) -m ruff format --check . && $(python) -m mypy
format:      ## the format, and what lint can repair
	$(python) -m ruff format . && $(python) -m ruff check --fix .
test:        ## the whole test suite
	launch/test.sh
test-core:   ## the tests that need no torch, vLLM or Ray
	launch/test.sh core
quickstart:  ## the whole pipeline on an invented world, on a laptop
	launch/quickstart.sh
real:        ## the whole pipeline on real prose with real weights under vLLM
	launch/real.sh
ci:          ## everything that a change has to pass
	.ci/run
