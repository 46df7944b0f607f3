# make help lists what there is. Everything runs in .venv, which the first target that needs it makes.
SHELL := /bin/sh
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
stamp := $(VENV)/installed
in_venv := . $(BIN)/activate &&
export OMP_NUM_THREADS ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)

.PHONY: help install demo test lab docs readme notebooks weights constraints clean
.DEFAULT_GOAL := help

help:  ## This list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-12s %s\n", $$1, $$2}' Makefile

install: $(stamp)  ## Make .venv with the tested set of packages

$(stamp): settings.ini constraints.txt setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "Python 3.10 or newer is needed; found $$($(PYTHON) --version 2>/dev/null || echo no $(PYTHON))." \
	       "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	@test -x $(BIN)/pip || { echo "Making $(VENV)"; $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 2; }; }
	@echo "Installing (some GB the first time; a few minutes)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check uv
	@$(in_venv) uv pip install -q --compile-bytecode -c constraints.txt -e '.[dev]'
	@$(in_venv) uv pip install -q --no-deps image-reward==1.5  # its pins exclude open_clip 3; only ImageReward(backend='package') uses it
	@touch $@

demo: $(stamp)  ## The main job: sharpen a text-to-image model here (options: make demo ARGS='--steps 100')
	@$(BIN)/sharpen demo $(ARGS)

test: $(stamp)  ## Run every notebook, then pytest
	$(in_venv) OMP_NUM_THREADS=1 nbdev_test --n_workers 2 --do_print --timing
	$(in_venv) OMP_NUM_THREADS=1 python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests

lab: $(stamp)  ## Open the notebooks in JupyterLab
	@$(in_venv) find nbs -name '*.ipynb' -print0 | xargs -0 jupyter trust >/dev/null
	$(in_venv) jupyter lab $$(test "$$(id -u)" != 0 || echo --allow-root) nbs

docs: $(stamp)  ## Build the documentation site in _docs/
	$(in_venv) python nbs/_dev/build_docs.py

readme: $(stamp)  ## README.md from nbs/index.ipynb
	$(in_venv) python nbs/_dev/make_readme.py

notebooks: $(stamp)  ## Execute the notebooks and save their outputs (NB=nbs/02_maths for some, FLAGS=slow for slow cells)
	$(in_venv) python nbs/_dev/run_notebooks.py --flags '$(FLAGS)' $(NB)

weights: $(stamp)  ## Train the weights in data/ anew (some six hours on a CPU; after a stop it goes on where it was)
	$(in_venv) python -c "from diffusion_sharpening.worlds.shapes.recipe import remake; remake('runs/weights', 'data')"
	$(in_venv) python -c "from diffusion_sharpening.worlds.layouts.recipe import remake; remake('runs/weights-layouts', 'data')"
	$(in_venv) python -c "from diffusion_sharpening.worlds.molecules.recipe import remake; remake('runs/weights-molecules', 'data')"

constraints: $(stamp)  ## Bring constraints.txt to the newest versions that settings.ini allows
	$(in_venv) uv pip compile -q --upgrade --universal --python-version 3.10 --extra dev --no-annotate \
	  --custom-compile-command 'make constraints' -o constraints.txt setup.py

clean:  ## Remove what was built; notebooks, data and results stay
	rm -rf $(VENV) _docs _proc build dist *.egg-info .pytest_cache
