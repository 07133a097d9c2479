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
	# mypy follows links: this folder is the package internlm3, without the cycle of a link to the root.
	mkdir -p $(VENV)/checkout/internlm3
	ln -sfn $(addprefix $(CURDIR)/,__init__.py __main__.py py.typed kernels runtime tests) $(VENV)/checkout/internlm3
	touch $@

demo: $(VENV)/.ready
	$(BIN)/internlm3 demo $(ARGS)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=$(VENV)/checkout $(BIN)/mypy -p internlm3 -p bench

# All of it; with ARGS the tests that they choose, and nothing else: make test ARGS="-k rope"
# With TRITON the kernels' part on that version, which lies in .triton/, in front of the environment's own:
# make test TRITON=3.6.0
ifdef TRITON
export PYTHONPATH := $(CURDIR)/.triton/$(TRITON)$(addprefix :,$(PYTHONPATH))
test: .triton/$(TRITON)
	$(BIN)/pytest -n 2 --dist worksteal tests/kernels $(ARGS)
	$(if $(ARGS),,$(BIN)/python -m bench.audit)

.triton/$(TRITON): | $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ triton==$(TRITON)
else ifdef ARGS
test: $(VENV)/.ready
	$(BIN)/pytest $(ARGS)
else
test: lint
	$(BIN)/pytest -n 2 --dist worksteal
	$(BIN)/python -m bench.audit $(addprefix --target ,sm_80 sm_86 sm_90 sm_100)
endif

# New random cases: make fuzz ARGS="--op linear --dtype bfloat16 --minutes 5"
fuzz: $(VENV)/.ready
	$(BIN)/python -m tests.fuzz $(ARGS)

# Compiles every kernel for six GPUs and audits the machine code; needs none of them. `make test` audits four.
audit: $(VENV)/.ready
	$(BIN)/python -m bench.audit $(ARGS)

# The demo model next to transformers, and every op next to its peers; the records go to .benchmarks/.
# With ARGS only the ops: make bench ARGS="--quick --op linear"
ifdef ARGS
bench: $(VENV)/.ready
	$(BIN)/python -m bench.ops $(ARGS)
else
bench: $(VENV)/.ready
	mkdir -p .benchmarks
	$(BIN)/python -m bench.demo_model --json .benchmarks/demo_model.json
	$(BIN)/python -m bench.ops --json .benchmarks/ops.json
endif

clean:
	rm -rf $(VENV) .triton build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks .audit_cache
