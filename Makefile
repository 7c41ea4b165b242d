# Every target works in a fresh clone: the environment is made on first use, and made anew for
# another PYTHON.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
INSTALLED = $(VENV)/.installed-$(VERSION)
PY = $(VENV)/bin/python
TEST = $(PY) -m pytest -n 2 --dist loadfile --max-worker-restart=0

# A second environment, whose JAX compiles for devices that are not there. With the CUDA wheels in
# it and no GPU, a plain `import jax` fails, so it is kept apart.
AOT = .venv-aot
AOT_PY = $(AOT)/bin/python
AOT_INSTALLED = $(AOT)/.installed-$(VERSION)
AOT_RUN = JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=2 $(AOT_PY)
version_of = $(shell $(PY) -c 'from importlib import metadata; print(metadata.version("$(1)"))')
TARGET ?= h100
CONFIG ?= configs/videonsa_7b_sft.py
TOPOLOGY ?= h100:8
STRATEGY ?= fsdp,fsdp_tp,fsdp_cp
PHASE ?= train

.PHONY: env aot demo test test-slow compile-check sharding-report lint clean

env: $(INSTALLED)

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv --clear $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet --editable '.[test]'
	touch $@

aot: $(AOT_INSTALLED)

# What one target lacks does not stop the others: compile-check says which it cannot compile for.
# The last two bring ptxas; a CUDA toolkit of the machine's own serves as well.
$(AOT_INSTALLED): $(INSTALLED)
	$(PYTHON) -m venv --clear $(AOT)
	@$(AOT_PY) -m pip install --quiet \
	  jax==$(call version_of,jax) jaxlib==$(call version_of,jaxlib) flax==$(call version_of,flax) \
	  matplotlib ml-collections pyelftools \
	|| { echo 'aot: this JAX cannot be installed here' >&2; exit 3; }
	@tpu=0; cuda=0; \
	$(AOT_PY) -m pip install --quiet 'jax[tpu]==$(call version_of,jax)' || tpu=1; \
	$(AOT_PY) -m pip install --quiet --no-deps \
	  jax-cuda13-plugin==$(call version_of,jaxlib) jax-cuda13-pjrt==$(call version_of,jaxlib) \
	|| cuda=1; \
	case $$tpu$$cuda in \
	  11) echo 'aot: neither libtpu nor the CUDA plugins can be installed here' >&2; exit 3;; \
	  10) echo 'aot: libtpu cannot be installed here; only the GPU targets compile' >&2;; \
	  01) echo 'aot: the CUDA plugins cannot be installed here; only the TPUs compile' >&2;; \
	esac
	@$(AOT_PY) -m pip install --quiet --no-deps 'nvidia-cuda-nvcc==13.*' 'nvidia-nvvm==13.*' \
	|| echo 'aot: no ptxas to install; using the CUDA toolkit of this machine' >&2
	touch $@

demo: env
	$(PY) -m examples.demo --workdir=runs/demo

# What is compiled for one small run is compiled quickly; `test-slow` compiles as users do.
QUICKLY = --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true

test: env
	XLA_FLAGS="$$XLA_FLAGS $(QUICKLY)" $(TEST) -m 'not slow'

test-slow: env
	$(MAKE) aot || true  # tests that compile for other devices skip without it
	$(TEST) -m slow

compile-check: OUT ?= runs/compile-check-$(TARGET).json
compile-check: aot
	$(AOT_RUN) -m benchmarks.compile_check --target=$(TARGET) --out=$(OUT)

sharding-report: OUT ?= runs/sharding/$(TOPOLOGY)
sharding-report: aot
	$(AOT_RUN) -m videonsa_jax.aot.report --config=$(CONFIG) --topology=$(TOPOLOGY) \
	  --strategy=$(STRATEGY) --phase=$(PHASE) --out=$(OUT) $(FLAGS)

lint: env
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean:
	rm -rf $(VENV) $(AOT) .cache runs
