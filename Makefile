# make reproduce: environment, then every table and figure of the paper on the embedded default, and the report: report/index.html
# make test:      environment, then all tests, two at a time with one torch thread each
# make docs:      environment, then the notebooks as a site to read, in _site/ (no Quarto, no network)
# make figures:   environment, then the chapters draw figures/ again, each file only where it looks different (2 minutes;
#                 make figures FLAGS=slow also draws 6, 7, 10, 11 and 12, on 200 scenes)
# make zoo:       environment, then `explain` on some five hundred small models against a reference of its own (6 minutes)
# make crash:     environment, then every command dies at each of its file operations, and is fuzzed (25 minutes)
# Python 3.11, 3.12 or 3.13; another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1
export MPLBACKEND ?= agg
READY := .venv/ready

.PHONY: reproduce test docs figures zoo crash environment readme clean

reproduce: environment
	$(BIN)/ultra-nb reproduce all

test: environment
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadgroup --durations=8

docs: environment
	$(BIN)/python -W ignore docs/build.py _site

figures: environment
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --path nbs --file_re '^(index|0[1245]_)' --flags '$(FLAGS)'

zoo: environment
	OMP_NUM_THREADS=1 $(BIN)/python tests/zoo.py --out nbs/studies/records/zoo.json

crash: environment
	OMP_NUM_THREADS=1 $(BIN)/python tests/crash.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py

environment: $(READY)

$(READY): requirements.lock settings.ini setup.py
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "the locked environment needs Python 3.11, 3.12 or 3.13, $(PYTHON) is $$($(PYTHON) --version 2>&1); try make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# README.md is rendered from nbs/index.ipynb without its hidden cells; its links are turned to start from the top
# of the repository
README := README.md
readme:
	$(BIN)/jupyter nbconvert --log-level=ERROR --to markdown --stdout --RegexRemovePreprocessor.patterns='^#\| hide' \
	  nbs/index.ipynb | \
	  sed -E 's@\]\(([^:)]*\.ipynb(#[^)]*)?)\)@](nbs/\1)@g; s#\]\(\.\./#](#g' > $(README)

clean:
	rm -rf .venv build dist _site _proc *.egg-info
