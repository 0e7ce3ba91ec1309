# Two commands on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# pip shows what it downloads: on a fresh machine, this takes minutes
INSTALL = @echo "installing into $(VENV): the first time 0.4 GB are fetched, or about 3 GB with CUDA"; \
	$(BIN)/python -m pip install --disable-pip-version-check

.PHONY: demo test test-fast test-slow fuzz faults wheel bench pretrained docs measured screens costs audit lock lint format readme completions clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.tested: pyproject.toml | $(BIN)/python
	$(INSTALL) --editable '.[test]'
	@touch $@ $(VENV)/.installed

demo: $(VENV)/.installed  ## Train a conditional VAE on letters and digits, and draw images of each
	$(BIN)/gz train cvae --data glyphs
	$(BIN)/gz sample cvae --data glyphs -n 72
	@echo; echo "To type gz in this shell:"; echo '  export PATH="$(abspath $(BIN)):$$PATH"'

test: $(VENV)/.tested  ## The whole fast suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadgroup

test-fast: $(VENV)/.tested  ## House rules and the tests of one family of models: FAMILY=gan
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadgroup $(if $(FAMILY),--family $(FAMILY)) \
		tests/contract tests/truth tests/engine/test_trainer.py tests/cli/test_house.py

SHARDED = --durations-path .ci/slow_durations.json $(if $(SHARD),--group $(subst /, --splits ,$(SHARD)))
test-slow: $(VENV)/.tested  ## Long tests, on real data if ../shared/data exists; SHARD=3/4: the third of four shards
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow $(SHARDED)

fuzz: $(VENV)/.tested  ## The generated tests, with 100,000 cases in all
	GZ_FUZZ=50 $(BIN)/python -m pytest tests/faults

faults: $(VENV)/.tested  ## Every fault and its outcome, one per line, including slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --verbose -m "slow or not slow" tests/faults

bench: $(VENV)/.tested  ## Speed, as ratios to a baseline of the same run
	$(BIN)/python tests/tools/speed.py

pretrained: $(VENV)/.tested  ## Train the models in gzcli/pretrained/ again; ONLY="cfm-glyphs …": only these
	$(BIN)/python tests/tools/pretrained.py $(ONLY)

# in an environment of their own: they are no part of what they look at
AUDIT := $(VENV)/audit/bin
$(AUDIT)/pip-audit:
	$(PYTHON) -m venv $(VENV)/audit
	$(AUDIT)/python -m pip install 'pip-audit>=2.7' 'cyclonedx-bom>=4'

audit: $(AUDIT)/pip-audit $(VENV)/.installed  ## build/sbom.json, and known vulnerabilities of installed packages
	$(BIN)/python .ci/audit.py $(BIN)/python $(AUDIT)

wheel: $(BIN)/python  ## The wheel, in dist/
	$(BIN)/python -m pip wheel --disable-pip-version-check --no-deps --wheel-dir dist .

lock: $(BIN)/python  ## .ci/lock.txt, the packages of the Docker image; on Linux x86-64, PIP_OPTIONS="--extra-index-url URL"
	$(BIN)/python .ci/lock.py $(PIP_OPTIONS)

lint: $(VENV)/.tested
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.tested
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

readme: $(VENV)/.installed  ## Update the models and the league in README.md
	$(BIN)/python .ci/readme.py

completions: $(VENV)/.installed  ## completions/gz.bash, _gz and gz.fish
	$(BIN)/python -m gzcli.cli.completion

$(VENV)/.documented: pyproject.toml | $(BIN)/python
	$(INSTALL) --editable '.[docs]'
	@touch $@ $(VENV)/.installed

docs: $(VENV)/.documented  ## The manual as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python .ci/site.py site

measured: $(VENV)/.tested  ## Values on the pages: make measured LEAGUE="FOLDER…", of `gz league`
	$(BIN)/python tests/tools/measure.py league $(LEAGUE)

screens: $(VENV)/.tested  ## Terminal screenshots for the pages; trains two models
	$(BIN)/python tests/tools/screens.py

costs: $(VENV)/.tested  ## Training costs for the pages; needs an idle machine
	$(BIN)/python tests/tools/measure.py costs --timed

clean:
	rm -rf $(VENV) build dist site *.egg-info
