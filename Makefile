# Entrepot. `make serve` and `make test` do all their set-up themselves; a second run starts at once.

.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

# Each process that a test starts would compile the program anew where bytecode files are switched off.
unexport PYTHONDONTWRITEBYTECODE

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
ARGS ?=

# System tests wait half of their time, so two processes more than there are processors keep most of them busy. Unit
# tests wait less: one more suffices. Each process takes whole groups of tests (tests/conftest.py), of which there are
# not enough for more than eight.
SEED := $(or $(SEED),$(shell echo $$((RANDOM * 32768 + RANDOM))))
PROCESSES ?= $(shell n=$$(($$(nproc) + 2)); echo $$((n < 8 ? n : 8)))
CHECK_PROCESSES ?= $(shell n=$$(($$(nproc) + 1)); echo $$((n < 8 ? n : 8)))
SIDE_BY_SIDE := --dist=loadscope --no-loadscope-reorder --randomly-seed=$(SEED)
CHECKED := tests/architecture tests/unit tests/contract

# The tests run real clients and look at the server with these. A name is a Debian package; after the colon, the
# program that shows it is there. docker.io's dockerd is what counts: some machines have only a docker client. Debian 12
# has no docker-cli: there, docker is in docker.io. What apt does not know is left out.
PACKAGES := docker.io:dockerd docker-cli:docker containerd:ctr runc:runc podman:podman buildah:buildah skopeo:skopeo crun:crun \
	busybox-static:busybox strace:strace docker-registry:docker-registry nginx:nginx openssl:openssl \
	chromium-headless-shell:chromium-headless-shell
# `make test-deploy` needs these as well.
DEPLOY_PACKAGES := caddy:caddy debootstrap:debootstrap docker-compose:docker-compose prometheus:promtool \
	systemd:systemd-analyze
# Of these, Debian runs as services what would take ports from others, such as 5000. The tests start their own.
UNWANTED := caddy docker-registry nginx prometheus

.PHONY: help serve check test test-deploy image bench bench-mirror bench-growth bench-gc lint format docs book manifests screenshots \
	translations lock release compatibility record-data clean packages deploy-packages

help: ## Show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

serve: $(VENV)/.runtime ## Set up what is missing and run the registry on 127.0.0.1:5000; ARGS="--listen …" for more
	@exec $(BIN)/entrepot serve $(ARGS)

check: lint ## Check style, types and layers, and run the unit and contract tests: the daily loop, a minute or so
	@echo "SEED=$(SEED) repeats this order"
	@exec $(BIN)/python -m pytest -q --numprocesses=$(CHECK_PROCESSES) $(SIDE_BY_SIDE) -m "not slow" $(CHECKED)

test: $(VENV)/.dev packages ## Set up what is missing and run every test; ARGS="tests/system/cli -k config" for some
ifeq ($(strip $(ARGS)),)
	@echo "SEED=$(SEED) repeats this order"
	@exec $(BIN)/python -m pytest --numprocesses=$(PROCESSES) $(SIDE_BY_SIDE) --durations=20 --durations-min=1
else
	@exec $(BIN)/python -m pytest $(ARGS)
endif

# A module sets up what costs most, such as an image, for itself: each runs in one process.
test-deploy: $(VENV)/.deploy deploy-packages ## Set up what is missing and try what people deploy: image, compose, systemd
ifeq ($(strip $(ARGS)),)
	@exec $(BIN)/python -m pytest --numprocesses=2 $(SIDE_BY_SIDE) --durations=10 --durations-min=1 tests/deploy
else
	@exec $(BIN)/python -m pytest $(ARGS)
endif

image: ## Build the container image entrepot:latest; ARGS="--build-arg PIP_INDEX_URL=…" for a mirror of PyPI
	@exec docker build --file deploy/Dockerfile --tag entrepot:latest $(ARGS) \
		--build-arg VERSION="$$(sed -n 's/^__version__ = "\(.*\)"$$/\1/p' registry/__init__.py)" \
		--build-arg REVISION="$$(git rev-parse HEAD 2>/dev/null || echo unknown)" .

bench: $(VENV)/.runtime ## Measure beside Debian's docker-registry; ARGS="--quick", "--only v2,tag-put" for less
	@exec $(BIN)/python -m bench registries $(ARGS)

bench-mirror: $(VENV)/.runtime ## Measure the mirror beside docker-registry in proxy mode; ARGS="--quick" for less
	@exec $(BIN)/python -m bench mirror $(ARGS)

bench-growth: $(VENV)/.runtime ## Measure stores of 100 to 1,000,000 manifests; ARGS="--quick" for less
	@exec $(BIN)/python -m bench growth $(ARGS)

bench-gc: $(VENV)/.runtime ## Measure collection and eviction in stores of 10,000 and 1,000,000 blobs; ARGS="--quick" for less
	@exec $(BIN)/python -m bench upkeep $(ARGS)

lint: $(VENV)/.dev ## Check style, types and layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev ## Put the code into its form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.runtime ## Write docs/*/settings.md from the settings' model, and new texts into book/locale
	$(BIN)/python -m book.settings_catalogue

book: $(VENV)/.docs ## Build the site of docs/en and docs/zh in build/book; a broken link or a warning fails
	@exec $(BIN)/python -m book build/book

manifests: $(VENV)/.deploy ## Write deploy/kubernetes from the Helm chart
	$(BIN)/python -m tests.deploy.rendered_chart

screenshots: $(VENV)/.dev packages ## Make the pictures of the pages in docs/pages, with a real browser
	$(BIN)/python -m tests.fakes.page_screenshots docs/pages

# A text that is new stays without a translation, which a test reports; one that is not used any more is removed.
translations: $(VENV)/.dev ## Write new texts of the pages into the catalogues in registry/ui/locale, and remove old ones
	@texts=$$(mktemp); trap 'rm -f "$$texts"' EXIT; \
	$(BIN)/pybabel -q extract -F pyproject.toml -k hint -k translatable --no-location --sort-output -o "$$texts" registry/ui registry/clients; \
	for catalogue in registry/ui/locale/*.po; do \
		$(BIN)/pybabel -q update -i "$$texts" -o "$$catalogue" -l "$$(basename "$$catalogue" .po)" \
			--no-fuzzy-matching --ignore-obsolete --no-wrap; \
		sed -i -E '/^"(Project-Id|Report-Msgid|POT-Creation|PO-Revision|Last-Translator|Language-Team|Generated-By)/d; $${/^$$/d}; 1{/^$$/d}' \
			"$$catalogue"; done

# The files name no package index: pip asks the one it is set up for, and the hashes say what it may take.
LOCK := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-annotate --custom-compile-command "make lock" --no-emit-index-url --no-emit-find-links

lock: $(VENV)/.dev ## Pin the dependencies anew, with hashes; UPGRADE=--upgrade for newer versions
	$(LOCK) $(UPGRADE) pyproject.toml --output-file requirements/runtime.txt
	$(LOCK) $(UPGRADE) --group pyproject.toml:build --output-file requirements/build.txt
	$(LOCK) $(UPGRADE) --constraint requirements/runtime.txt --constraint requirements/build.txt \
		pyproject.toml --group dev --output-file requirements/dev.txt
	for group in deploy docs release clients; do $(LOCK) $(UPGRADE) --constraint requirements/dev.txt \
		--group pyproject.toml:$$group --output-file requirements/$$group.txt; done

release: $(VENV)/.release ## Make wheel, sdist, chart, SBOM, checksums and, with a docker daemon, the image; into dist/
	@exec $(BIN)/python -m release $(ARGS)

# Debian 12 and 13 are made by debootstrap (a Debian package), so this runs as root on a Debian.
compatibility: $(VENV)/.dev deploy-packages ## Run the clients of Debian 12 and 13, and write the tables of docs/*/compatibility.md
	ENTREPOT_RECORD_COMPATIBILITY=1 $(BIN)/python -m pytest -q tests/deploy/chroot -k test_clients
	$(BIN)/python -m tests.fakes.deployment.client_results

record-data: $(VENV)/.dev ## Record the data directory of this version for the tests of later ones, before its release
	$(BIN)/python -m tests.fakes.released_directory

clean: ## Remove what the other targets made; the data directory stays
	rm -rf $(VENV) build dist bench/results .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find registry storage bench release tests -name __pycache__ -prune -exec rm -rf {} +

# The stamps are made last, so that a set-up that was cut off is done again.
$(VENV)/.venv:
	@if [ -z "$(PYTHON)" ]; then echo "Entrepot needs Python 3.11 or newer; on Debian: apt-get install python3 python3-venv" >&2; exit 1; fi
	@if ! $(PYTHON) -c 'import ensurepip' 2>/dev/null; then \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			echo "Installing python3-venv"; \
			apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3-venv >/dev/null; \
		else echo "$(PYTHON) cannot make virtual environments; run: sudo apt-get install python3-venv" >&2; exit 1; fi; fi
	@echo "Making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.runtime: $(VENV)/.venv requirements/runtime.txt requirements/build.txt pyproject.toml
	@echo "Installing the pinned dependencies (once)"
	@$(PIP) install --require-hashes -r requirements/runtime.txt -r requirements/build.txt
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev $(VENV)/.docs: $(VENV)/.runtime
$(VENV)/.deploy $(VENV)/.release $(VENV)/.clients: $(VENV)/.dev
$(VENV)/.%: requirements/%.txt
	@echo "Installing the pinned packages of $< (once)"
	@$(PIP) install --require-hashes -r $<
	@touch $@

deploy-packages: PACKAGES += $(DEPLOY_PACKAGES)
packages deploy-packages:
	@missing=(); for pair in $(PACKAGES); do \
		PATH="$$PATH:/usr/sbin:/sbin" command -v "$${pair#*:}" >/dev/null || missing+=("$${pair%%:*}"); done; \
	if [ $${#missing[@]} = 0 ]; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ]; then apt-get update -qq; fi; \
	known=(); for name in "$${missing[@]}"; do if apt-cache show "$$name" >/dev/null 2>&1; then known+=("$$name"); fi; done; \
	missing=("$${known[@]:-$${missing[@]}}"); \
	if [ "$$(id -u)" != 0 ]; then \
		echo "The tests run real clients, and these Debian packages are missing: $${missing[*]}" >&2; \
		echo "Run: sudo apt-get update && sudo apt-get install -y --no-install-recommends $${missing[*]}" >&2; \
		echo "Debian may start some of them: sudo systemctl disable --now $(UNWANTED)" >&2; exit 1; fi; \
	echo "Installing $${missing[*]}"; \
	policy=/usr/sbin/policy-rc.d; \
	if [ ! -e $$policy ]; then trap "rm -f $$policy" EXIT; printf '#!/bin/sh\nexit 101\n' >$$policy; chmod 755 $$policy; fi; \
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$${missing[@]}" >/dev/null; \
	if [ -d /run/systemd/system ]; then for unit in $(UNWANTED); do \
		case " $${missing[*]} " in *" $$unit "*) systemctl --quiet disable $$unit;; esac; done; fi
