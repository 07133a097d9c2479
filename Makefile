# Every target does its own set-up: a fresh clone, Python >= 3.10, make and a package registry are all it takes.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: demo test lint fuzz audit bench clean

# The stamp is newer than setup.py and the pins, or the environment is brought up to date.
# torch comes first and alone: a resolver that sees it installed leaves its accelerator packages alone.
$(VENV)/.ready: setup.py constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 10) else f"internlm3 needs Python 3.10 or newer; this is {v.major}.{v.minor}. Name another: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	# Type checkers follow no import hook of an editable install, but they follow a link.
	ln -sfn "$(CURDIR)" "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/internlm3"
	touch $@

demo: $(VENV)/.ready
	$(BIN)/internlm3 demo $(ARGS)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy kernels runtime

# All of it; with ARGS the tests that they choose, and nothing else: make test ARGS="-k rope"
# With TRITON the kernels' part on that version, which lies in .triton/, in front of the environment's own:
# make test TRITON=3.6.0
ifdef TRITON
export PYTHONPATH := $(CURDIR)/.triton/$(TRITON)$(addprefix :,$(PYTHONPATH))
test: .triton/$(TRITON)
	$(BIN)/pytest -n 2 --dist worksteal tests/kernels $(ARGS)
	$(if $(ARGS),,$(BIN)/python bench/audit.py)

.triton/$(TRITON): | $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ triton==$(TRITON)
else ifdef ARGS
test: $(VENV)/.ready
	$(BIN)/pytest $(ARGS)
else
test: lint
	$(BIN)/pytest -n 2 --dist worksteal
	$(BIN)/python bench/audit.py
endif

# Random cases that nobody has tried: make fuzz ARGS="--op linear --dtype bfloat16 --minutes 5"
fuzz: $(VENV)/.ready
	$(BIN)/python tests/fuzz.py $(ARGS)

# Compiles every kernel for real GPUs and reads the machine code; needs none of them.
audit: $(VENV)/.ready
	$(BIN)/python bench/audit.py $(ARGS)

# The stand-in beside transformers, and every op beside its floor and its peers; the records go to .benchmarks/.
# With ARGS the ops alone: make bench ARGS="--quick --op linear"
ifdef ARGS
bench: $(VENV)/.ready
	$(BIN)/python bench/kernels.py $(ARGS)
else
bench: $(VENV)/.ready
	mkdir -p .benchmarks
	$(BIN)/python bench/standin.py --json .benchmarks/standin.json
	$(BIN)/python bench/kernels.py --json .benchmarks/kernels.json
endif

clean:
	rm -rf $(VENV) .triton build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks .audit_cache
