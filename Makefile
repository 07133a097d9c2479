# Every target creates the environment that it needs. It takes a clone, Python >= 3.10, make, bash and a package registry.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: demo test test-serving lint fuzz soak audit bench clean

# The environment is updated whenever setup.py or constraints.txt is newer than this stamp.
# torch is installed first and alone: pip then has no reason to touch the CUDA packages that it depends on.
# mypy follows links: .venv/checkout/internlm3 is the package, without the cycle of a link to the root.
# Of pip's report the screen shows files of a megabyte and more as they come, and when installation begins.
SHELL := bash -o pipefail
PIP   := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off
SHOWN := awk '/Downloading .*[MG]B\)/ { print; fflush() } /^Installing coll/ { print "  Installing", NF - 3, "packages"; fflush() }'

$(VENV)/.ready: setup.py constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 10) else f"internlm3 needs Python 3.10 or newer; this is {v.major}.{v.minor}. Name another: make PYTHON=python3.12 ...")'
	@echo "Creating $(VENV), once. It takes a few minutes. First PyTorch: 0.2 GB for a CPU, 2 to 4 GB with CUDA."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) -c constraints.txt torch | $(SHOWN)
	@echo "Then the other packages: 0.4 GB."
	@$(PIP) -c constraints.txt -e '.[test]' | $(SHOWN)
	@mkdir -p $(VENV)/checkout/internlm3
	@ln -sfn $(addprefix $(CURDIR)/,__init__.py __main__.py py.typed kernels runtime tests) $(VENV)/checkout/internlm3
	@echo "$(VENV) is ready."
	@touch $@

$(VENV)/.serving: $(VENV)/.ready
	@echo "Then Ray: 0.2 GB."
	@$(PIP) -c constraints.txt -e '.[ray]' | $(SHOWN)
	@touch $@

demo: $(VENV)/.ready
	@$(BIN)/internlm3 demo $(ARGS)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=$(VENV)/checkout $(BIN)/mypy -p internlm3 -p bench

# make test                    lint, all tests, and the audit of machine code
# make test ARGS="-k rope"     only the tests that pytest selects by these arguments
# make test TRITON=3.6.0       only the tests of the kernels and the audit, on another version of Triton, which is
#                              installed in .triton/ and precedes the environment's own on the path
ifdef TRITON
export PYTHONPATH := $(CURDIR)/.triton/$(TRITON)$(addprefix :,$(PYTHONPATH))
test: .triton/$(TRITON)
	$(BIN)/pytest -n 2 --dist worksteal tests/kernels $(ARGS)
	$(if $(ARGS),,$(BIN)/python -m bench.audit)

.triton/$(TRITON): | $(VENV)/.ready
	@$(PIP) --no-deps --target $@ triton==$(TRITON) | $(SHOWN)
else ifdef ARGS
test: $(VENV)/.ready
	$(BIN)/pytest $(ARGS)
else
test: lint
	$(BIN)/pytest -n 2 --dist worksteal
	$(BIN)/python -m bench.audit $(addprefix --target ,sm_80 sm_90 sm_100)
endif

# What takes minutes, or needs more than the environment has: a server under load, replicas on Ray, which is installed
# here, and the chat page in a Chromium of this machine, without which its tests are skipped.
test-serving: $(VENV)/.serving
	$(BIN)/pytest tests/serving $(ARGS)

# New random cases: make fuzz ARGS="--op linear --dtype bfloat16 --minutes 5"
fuzz: $(VENV)/.ready
	$(BIN)/python -m tests.fuzz $(ARGS)

# Eight threads that disturb one another: make soak ARGS="--generations 2000"
soak: $(VENV)/.ready
	$(BIN)/python -m tests.soak $(ARGS)

# Compiles every kernel for six GPUs and checks the machine code. Needs none of them. `make test` checks three.
audit: $(VENV)/.ready
	$(BIN)/python -m bench.audit $(ARGS)

# make bench                               the demo model next to transformers, and all ops next to their peers;
#                                          records go to .benchmarks/
# make bench ARGS="--quick --op linear"    only the ops, with these arguments
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
