# Commands of this repository; `make help` lists them. Only make and Debian's own tools are needed beforehand.
SHELL := /bin/bash
.DEFAULT_GOAL := help

# Everything that runs before a virtual environment exists uses the standard library of the system's Python alone.
PYTHON3 := $(shell command -v python3)
LOCALCLUSTER = PYTHONPATH=tests python3 -m localcluster

.PHONY: help
help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# -- the demo --------------------------------------------------------------------------------------------------------
# CLUSTER=current uses the cluster of the current kubectl context; it says which images it needs there.
CLUSTER ?= local
DEMO = PYTHONPATH=tests python3 -m e2e.demo

.PHONY: demo demo-down
demo: python3 ## serve a small model on a 3-bit cache in Kubernetes, from nothing (CLUSTER=current: on your cluster)
	@$(DEMO) up --cluster $(CLUSTER)

demo-down: python3 ## remove what the demo made
	@$(DEMO) down --cluster $(CLUSTER)

# -- the local cluster -----------------------------------------------------------------------------------------------
.PHONY: cluster cluster-down cluster-status
cluster: python3 ## start a one-node Kubernetes cluster on this machine
	@$(LOCALCLUSTER) up

cluster-down: python3 ## stop it and remove all it made
	@$(LOCALCLUSTER) down

cluster-status: python3 ## show its nodes and pods, and how to reach it
	@$(LOCALCLUSTER) status

# -- tests -------------------------------------------------------------------------------------------------------------
PYTEST = PYTHONPATH=.:operator:tests .venv/bin/python -m pytest
UNIT = not compile and not vllm and not cluster and not e2e

.PHONY: environment
environment: python3 ## make the tests' virtual environment, .venv
	PYTHONPATH=tests python3 tests/environment.py

.PHONY: test
test: lint ## set up, lint, and run every test: units, the real engine, a real control plane, the whole path
	@$(LOCALCLUSTER) build
	$(PYTEST)

.PHONY: test-unit
test-unit: environment ## only what needs neither engine nor cluster (under two minutes)
	$(PYTEST) -m "$(UNIT)"

.PHONY: test-gpu
test-gpu: python3 ## the CUDA kernels' tests, where there is an NVIDIA GPU and a python3 with CUDA's PyTorch and pytest
	PYTHONPATH=. python3 -m manthanquant build --dtype bfloat16 --dtype float16 \
		$(addprefix --format ,k3v3 k42v3 k42v42 k4v4)
	PYTHONPATH=.:tests python3 -m pytest tests/gpu

.PHONY: sanitize-gpu
sanitize-gpu: python3 ## a reduced set of them under compute-sanitizer, once for memory and once for races
	for tool in memcheck racecheck; do \
		PYTHONPATH=.:tests compute-sanitizer --tool $$tool --kernel-regex kns=mq --error-exitcode 1 \
			python3 -m pytest -m sanitized --override-ini timeout=0 tests/gpu || exit 1; \
	done

.PHONY: lint
lint: environment ## style, types, import layers
	.venv/bin/ruff check .
	.venv/bin/ruff format --check --quiet .
	MYPYPATH=operator:tests .venv/bin/mypy --package manthanquant --package manthanquant_operator --package localcluster
	PYTHONPATH=.:operator .venv/bin/lint-imports

.PHONY: lock
lock: environment ## write the lock files of the images and the tests anew
	PATH=$(CURDIR)/.venv/bin:$$PATH image/lock.sh

.PHONY: crds
crds: environment ## write the CustomResourceDefinition and the chart's copy of it anew from the operator's models
	PYTHONPATH=.:operator .venv/bin/python -m manthanquant_operator crd > crds/quantizedmodels.manthanquant.io.yaml
	PYTHONPATH=.:operator .venv/bin/python -m manthanquant_operator crd --chart > charts/manthanquant/templates/crd-quantizedmodels.yaml

.PHONY: python3
python3:
ifeq ($(PYTHON3),)
	@apt-get -qq update && DEBCONF_NOWARNINGS=yes apt-get -qq install --yes --no-install-recommends python3 >/dev/null
endif
