# Every target sets the project up first; nothing is installed again while the pins stay as they are.
# In an environment of your own (conda on a GPU node, say), skip that:  make reproduce PROFILE=gpu PY=python READY=

PYTHON  ?= python3
PROFILE ?= cpu
# What `reproduce` runs: the main results of the three papers, those that need no training first. NB=all: every notebook.
NB      ?= 18 19 23 21 22 11 25 31
COMPUTE ?= cold
ROUNDS  ?= 2
FAULTS_TO ?= artifacts/faults.json
# Address of PyTorch's CPU wheel index (see PyTorch's install page). Without it torch is the build that your package
# index holds, on Linux usually the CUDA one: larger, and it works as well.
TORCH_INDEX ?=
# Options for JupyterLab, for `make lab`.
LAB     ?=

# The repository's address on GitHub, such as https://github.com/OWNER/NAME. This is the one place where it is set: the
# book's buttons for Binder and Colab, and what its pages call OWNER/NAME, come from here.
REPOSITORY ?=

PY    = .venv/bin/python
READY = .venv/.ready
BOOK  = .venv-book/.ready
# DeepSpeed looks for ninja on PATH, and children look for python: both must be the environment's.
RUN   = PATH="$$PWD/.venv/bin:$$PATH" $(PY)

help:  ## print this list
	@echo "usage: make <target> [PROFILE=smoke|cpu|night|gpu|paper] [NB=11] [PYTHON=python3.12] [TORCH_INDEX=<address>]"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1|\2/p' Makefile | awk -F'|' '{ printf "  %-10s %s\n", $$1, $$2 }'

# What the compiling of DeepSpeed needs: installed before it, and left alone while it runs.
FIRST = ^(torch|setuptools|wheel|scikit_build_core|ninja|py-cpuinfo|uv)==

setup: $(READY)  ## create .venv from requirements/cpu.txt (2 to 4 minutes, once)

# Torch comes by pip, which finds a build that the machine holds; the rest by uv, several times faster than pip, and by
# pip where uv cannot reach the package index that pip is set up with. DeepSpeed is compiled meanwhile: it would compile
# its collectives at its first start, where one killed run leaves a lock that hangs all later ones. Pip's cache does not
# know with which ops a wheel was built, so it is not asked.
# The stamp goes first and comes back last: an interrupted set-up is taken up again, never mistaken for a finished one.
.venv/.ready: requirements/cpu.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, and $(PYTHON) is older. Try: make setup PYTHON=python3.12" >&2; exit 1; }
	@rm -rf .venv/.ready .venv/wheels
	@echo "set-up 1/3: virtual environment, torch, build tools (about a minute)"
	@$(PYTHON) -m venv .venv
	@index="$(TORCH_INDEX)"; $(PY) -m pip install -qq $${index:+--extra-index-url "$$index"} \
	  $$(grep -E '$(FIRST)' requirements/cpu.txt)
	@echo "set-up 2/3: everything else, as locked in requirements/cpu.txt; DeepSpeed is compiled meanwhile (1 to 2 minutes)"
	@DS_BUILD_OPS=0 DS_BUILD_SHM_COMM=1 $(RUN) -m pip wheel -qq --no-cache-dir --no-deps --no-build-isolation \
	    -w .venv/wheels $$(grep '^deepspeed==' requirements/cpu.txt) & build=$$!; \
	  trap 'kill $$build 2>/dev/null' EXIT; \
	  grep -vE '$(FIRST)|^deepspeed==' requirements/cpu.txt > .venv/others.txt; \
	  $(PY) -m uv pip install -q --python $(PY) --no-deps --no-build-isolation -r .venv/others.txt || { \
	    echo "uv could not install them; pip does (about 2 minutes more, no output)"; \
	    $(PY) -m pip install -qq --no-deps --no-build-isolation -r .venv/others.txt || exit 1; }; \
	  trap - EXIT; wait $$build
	@echo "set-up 3/3: DeepSpeed, beyond_dpo itself"
	@$(PY) -m pip install -qq --no-deps .venv/wheels/deepspeed-*.whl
	@$(PY) -m pip install -qq --no-deps --no-build-isolation -e .
	@touch .venv/.ready

reproduce: $(READY)  ## compute the main results anew, each claim beside the frozen one (NB=11: one notebook, NB=all)
	@COMPUTE=$(COMPUTE) $(RUN) -m beyond_dpo.notebook.run $(NB:all=--all) --profile $(PROFILE)
	@$(RUN) -m beyond_dpo.notebook.claims --compare $(NB:all=)

# Two processes: most of the time goes to children that start up on one core. A file's tests stay together, they share
# models; the longest files begin (tests/conftest.py).
test: $(READY)  ## run the tests
	@$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Every notebook at smoke, the rehearsal of the GPU benchmarks, and whatever else takes half a minute by itself. CI runs
# both.
long: $(READY)  ## run the tests that take longest, which `test` leaves out
	@$(RUN) -m pytest -m long -n 2 --dist loadfile --no-loadscope-reorder

# The short form of this is part of `make test` and `make long`; -m "" takes the tests of both.
faults: $(READY)  ## break every stage, disk and file in all known ways, a quarter of an hour; count what survives
	@FAULT_ROUNDS=$(ROUNDS) FAULTS_TO=$(FAULTS_TO) $(RUN) -m pytest -q -m "" tests/test_faults.py tests/test_hostile.py

smoke: $(READY)  ## run every line of every notebook on a tiny model: minutes, no downloads, numbers without meaning
	@$(RUN) -m beyond_dpo.notebook.run --all --profile smoke

# Trusted notebooks show their figures as SVG, others as PNG.
# JUPYTER_PATH comes first where kernels are looked for: its `python3` is then this environment's, which has the
# package, whatever kernels the user has installed. As root JupyterLab wants to be told that this is meant.
lab: $(READY)  ## open the notebooks in JupyterLab (LAB="--ip 0.0.0.0 --port 8889 --no-browser": its options)
	@echo "trusting the notebooks, so that JupyterLab shows their figures as SVG"
	@$(RUN) -m jupyter trust notebooks/*.ipynb > /dev/null
	@prefix="$$($(PY) -c 'import sys; print(sys.prefix)')"; \
	  echo "kernel: Python 3 (ipykernel) of $$prefix; another Jupyter needs a kernel of that interpreter"; \
	  root=; test "$$(id -u)" != 0 || root=--allow-root; \
	  JUPYTER_PATH="$$prefix/share/jupyter$${JUPYTER_PATH:+:$$JUPYTER_PATH}" \
	  $(RUN) -m jupyterlab $$root $(LAB) notebooks/00_start_here.ipynb

# An environment of its own: Sphinx asks for versions of packages that the notebooks pin.
.venv-book/.ready: docs/book/requirements.txt
	@$(PYTHON) -m venv .venv-book
	@.venv-book/bin/python -m pip install -qq -r docs/book/requirements.txt
	@touch .venv-book/.ready

book: $(BOOK)  ## build the notebooks and pages as a static site in build/book/html (nothing is executed)
	@REPOSITORY=$(REPOSITORY) .venv-book/bin/python docs/book/build.py
	@REPOSITORY=$(REPOSITORY) .venv-book/bin/python docs/book/build.py --check

render: $(READY)  ## execute the committed notebooks in place, then update README and docs, from committed results alone
	@COMPUTE=never $(RUN) -m beyond_dpo.notebook.run --all --in-place
	@$(RUN) -m beyond_dpo.notebook.overview
	@$(RUN) -m beyond_dpo.notebook.claims --readme
	@$(RUN) -m beyond_dpo.notebook.checking

# Cold, as `reproduce`: with COMPUTE=auto it would find the results that are frozen, and keep those.
freeze: $(READY)  ## compute what is missing at profile cpu; copy small results into data/frozen, figures into figures
	@COMPUTE=$(COMPUTE) $(RUN) -m beyond_dpo.notebook.run --all --freeze

lint: $(READY)  ## check the style
	@$(RUN) -m ruff check lib tests notebooks benchmarks docs
	@$(RUN) -m ruff format --check -q lib tests benchmarks docs

clean:  ## delete computed results (artifacts/) and caches; downloads, data/frozen, .venv and .venv-book stay
	@rm -rf artifacts .pytest_cache .ruff_cache build lib/*.egg-info notebooks/.ipynb_checkpoints
	@find lib tests -name __pycache__ -prune -exec rm -rf {} +

.PHONY: help setup reproduce test long faults smoke lab book render freeze lint clean
