.PHONY: help install run test ci-tests gpu lint format schema lock image ci

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

gpu:  ## what only a GPU can tell: its tests, the loss and a step of 8B shapes (an H100 takes them; no Ray, no DeepSpeed needed)
	python -m pytest --noconftest tests/gpu
	for model in llama-3.1-8b qwen2.5-7b; do \
		python -m tests.benchmarks.loss --model $$model --targets 2048 --rows 512 --device cuda || exit 1; \
		python -m tests.benchmarks.cmo_step --model $$model --rounds 5 --device cuda --out cmo_step-$$model.json || exit 1; \
	done

lint:  ## what .ci/run and pre-commit check
	ruff check .
	ruff format --check .
	mypy
	lint-imports --no-logo

format:  ## format and mend what can be mended
	ruff check --fix .
	ruff format .

schema:  ## jobs/recipes/recipe.schema.json and README.md (all keys) anew from dpa_ray/recipe.py
	python -c 'import json; from dpa_ray.recipe import json_schema; print(json.dumps(json_schema(), indent=2))' \
		> jobs/recipes/recipe.schema.json
	python -c 'from dpa_ray.recipe import json_schema; from dpa_ray.recipe_table import table; print(table(json_schema()), end="")' \
		> jobs/recipes/README.md

lock:  ## cluster/requirements.lock anew, for the image: what it has stays unless `make lock UPGRADE=--upgrade` (needs uv)
	uv pip compile pyproject.toml cluster/requirements.in --extra wandb --extra mlflow $(UPGRADE) \
		--python-version 3.11 --python-platform x86_64-manylinux_2_28 --generate-hashes --no-annotate \
		--no-emit-index-url --custom-compile-command 'make lock' --output-file cluster/requirements.lock

IMAGE = registry.example.com/dpa_ray:ray2.60.0-py3.11-cu130
image:  ## the container image of the cluster: make image IMAGE=REGISTRY/dpa_ray:TAG (needs Docker)
	docker build --platform linux/amd64 --file cluster/Dockerfile --tag $(IMAGE) .

ci:  ## everything, in a fresh venv
	bash .ci/run
