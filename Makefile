# make train [ARGS="--model gru"]   train a language model on this machine's Python sources
# make test [ARGS="-k attention"]   run the tests, and the kernels under the sanitizers
# make bench [ARGS=...]             run the benchmarks
# make gpu-check [ARGS=...]         on a machine with a GPU: all tests, then the benchmarks, and one report;
#                                   with PYTHON=, a Python that has torch, triton and pytest: needs no network
# make cuda-targets [ARGS=sm_80]    compile the CUDA kernels for every GPU they are for, here or not, and print what
#                                   became of them; needs nvcc
# make wheels [TORCHES="2.13.0"]    build a source distribution and wheels, into dist/, with the CUDA kernels where nvcc
#                                   is (for the GPUs of FASTLM_CUDA_ARCHS="80;90": all of them take half an hour), and
#                                   try them with these versions of torch, from TORCH_INDEX, or those of Pythons here
# make docs                         build the documentation, into build/docs; a broken link or reference fails
# make fuzz [ARGS="--minutes 10"]   random calls of every operator, right and wrong ones
# make soak [ARGS="--minutes 60"]   train for so long in one process, whose memory must stay flat
# make sanitize                     the sanitizers alone: address, undefined behaviour, threads
# make lint, make clean
# Each sets up .venv and builds the extension first where that has not been done.
PYTHON ?= python3
ARGS ?=
PY := .venv/bin/python
DEPENDENCIES := .venv/.dependencies
LIBRARY := .venv/.library
DOCS := .venv/.docs
SOURCES := setup.py $(shell find csrc -type f)

.PHONY: setup train test bench gpu-check cuda-targets wheels docs fuzz soak sanitize lint clean

setup: $(LIBRARY)

$(DEPENDENCIES): requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fastlm needs Python 3.10 or later")'
	@test -x $(PY) || $(PYTHON) -m venv .venv || { echo "Debian, Ubuntu: apt install python3-venv"; exit 1; }
	$(PY) -m pip install --quiet --requirement requirements-dev.txt
	$(PY) -m pip install --quiet --no-build-isolation --editable ".[train]"
	@touch $@ $(LIBRARY)

$(LIBRARY): $(DEPENDENCIES) $(SOURCES)
	$(PY) setup.py --quiet build_ext --inplace
	@touch $@

# A thread that waits for another soon sleeps instead of spinning: where other programs share the CPUs,
# training is several times as fast (GNU OpenMP spins 300 times as long by default).
train test: export GOMP_SPINCOUNT ?= 1000

train: setup
	$(PY) -m fastlm train $(ARGS)

test: setup
	$(PY) -m pytest -n 2 --dist worksteal tests $(ARGS)
	$(PY) tests/native/run.py

bench: setup
	$(PY) -m fastlm bench $(ARGS)

# In the Python it is given, where that has what is needed: packages for GPUs are large, and often chosen with care.
# Builds the CUDA kernels where nvcc is found; else takes a fastlm/libfastlm_cuda.so that was built elsewhere.
# Builds for the GPUs that are here alone: all that there are kernels for take half an hour.
HERE = import torch; print(";".join({"%d%d" % torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}))
gpu-check: export FASTLM_CUDA_ARCHS ?= $(shell $(PYTHON) -c '$(HERE)')
gpu-check:
	@$(PYTHON) -c 'import pytest, torch, triton; assert torch.cuda.is_available(), "no GPU that this torch can use"'
	$(PYTHON) setup.py --quiet build_ext --inplace
	$(PYTHON) -m benchmarks.gpu $(ARGS)

cuda-targets: setup
	$(PY) tests/cuda_targets.py $(ARGS)

# The oldest torch that fastlm is for, and the one that it was tested with.
TORCHES ?= 2.10.0 2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
wheels: setup
	$(PY) tests/wheels.py --index $(TORCH_INDEX) $(TORCHES)

# The documentation is read from the sources: nothing of it is imported.
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --strict
	@echo build/docs/index.html

$(DOCS): $(DEPENDENCIES)
	$(PY) -m pip install --quiet --no-build-isolation --editable ".[docs]"
	@touch $@

fuzz: setup
	$(PY) tests/fuzz $(ARGS)

# One thread: memory is what is looked at, and others may use the machine meanwhile.
soak: export OMP_NUM_THREADS ?= 1
soak: setup
	$(PY) tests/soak.py $(ARGS)

sanitize: setup
	$(PY) tests/native/run.py

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean:
	rm -rf .venv build dist *.egg-info fastlm/libfastlm*.so
