.PHONY: help install run test ci-tests lint format schema ci

help:  ## list these targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install:  ## the package and what its tests need, editable
	pip install -e '.[test]'

run:  ## the embedded default, all three stages
	python jobs/run_dpa.py

test:  ## the fast tests
	pytest

ci-tests:  ## the marked tests: real weights, a real S3 server, minutes
	pytest -m ci

lint:  ## what .ci/run and pre-commit check
	ruff check .
	ruff format --check .
	mypy
	lint-imports --no-logo

format:  ## format and mend what can be mended
	ruff check --fix .
	ruff format .

schema:  ## jobs/recipes/recipe.schema.json anew from dpa_ray/recipe.py
	python -c 'import json; from dpa_ray.recipe import json_schema; print(json.dumps(json_schema(), indent=2))' \
		> jobs/recipes/recipe.schema.json

ci:  ## everything, in a fresh venv
	bash .ci/run
