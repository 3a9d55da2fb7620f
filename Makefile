# make              builds ./speed, for this machine's GPU where there is one
# make cuda         builds ./speed-cuda for NVIDIA GPUs, on any machine with a CUDA toolkit
# make test         builds and runs the tests; needs no Python and no network
# make test-hf      compares with Hugging Face, live; makes a virtual environment outside this folder (2 minutes, 6 GB)
# make test-package   the tests of the Python package in hf/, all of them (an environment of 7 GB, once)
# make test-page    the page of `trace --html` in headless Chromium; ./run.sh test-page installs it first
# make test-docs    runs every command of docs/walkthrough.md, and checks commands and figures of all pages (one minute)
# make test-exercises   answers to the exercises; each planted fault is caught by the laws that their table names (minutes)
# make pages        two sample pages into build/pages: the bundled model, and SmolLM2 where ./run.sh has fetched it
# make bench        times SmolLM2 beside this machine's ceilings; run ./run.sh first, it fetches the model
# make sass         checks the machine code of the CUDA kernels: loads in flight, no spills, HGMMA; needs no GPU
# make gpu-check    what only a GPU can show: kernels, laws, Hugging Face, memory checks; under eight minutes
# make gpu-kit      packs programs and checks for a first run on a GPU machine that has no compiler
# make gpu-bench    times Llama-3.1-8B shapes on a GPU; the records go to docs/gpu, study/gpu.py draws them
# make fuzz         hostile model files, texts and templates, made up by libFuzzer (ten minutes)
# make sanitize     the tests again under AddressSanitizer and UBSan
# make sanitize-threads   the operations and a whole model under ThreadSanitizer
# make format       formats C++ and Python (clang-format 14, ruff); make check-format only says what it would change
# make install      the program, the small model and bash completion into PREFIX (/usr/local); make uninstall
# make clean        removes what was built
# make help         prints this

CXX ?= g++
CXXFLAGS ?= -O3 -march=native
# -fno-trapping-math changes no result; without it GCC does not vectorise loops with e^x.
LANGUAGE = -std=c++20 -Wall -Wextra -Werror=switch -fopenmp -fno-trapping-math
LIBRARIES = -lopenblas -lpcre2-8 -ledit
BUILD ?= build
CACHE ?= $(or $(SPEED_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/speed)
COMMIT := $(shell git describe --always --dirty 2>/dev/null || echo unknown)
NAMED = -DSPEED_COMMIT='"$(COMMIT)"'
SOURCES = speed.cu model.h tokenizer.h $(wildcard base/*.h text/*.h cpu/*.h gpu/*.cuh cli/*.h cli/*.cpp cli/page/*)

# With a GPU here and a CUDA toolkit of 12.8 or later, nvcc builds the program for this GPU and the CPU, all of it from
# speed.cu. Otherwise g++ builds it for the CPU alone.
NVCC ?= $(or $(shell command -v nvcc 2>/dev/null),$(wildcard /usr/local/cuda/bin/nvcc))
CARD := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1 | tr -d .)
TOOLKIT := $(if $(NVCC),$(shell $(NVCC) --version | sed -n 's/.*release \([0-9]*\)\.\([0-9]*\),.*/\1\2/p'))
HAS_TOOLKIT := $(shell [ "$(TOOLKIT)" -ge 128 ] 2>/dev/null && echo yes)
NVCCFLAGS = -std=c++20 -O3 -ccbin $(CXX) -Xcompiler -fopenmp,-fno-trapping-math,-Wall,-Wextra -Xptxas -v

ifeq ($(and $(CARD),$(HAS_TOOLKIT)),yes)
speed: $(SOURCES)
	$(NVCC) $(NVCCFLAGS) $(NAMED) -Xcompiler -march=native -arch=sm_$(CARD:90=90a) speed.cu -o $@.new \
	  $(LIBRARIES) -lcublas && mv $@.new $@
else
speed: $(BUILD)/program/speed
	cp $< $@.new && mv $@.new $@
endif

# ---- the program for a CPU, file by file ----
# Each file of cli/ uses the method, speed.cu without its command line, by way of a precompiled header: so a change of
# a mode or a flag is compiled in seconds. `g++ -x c++ speed.cu` with the flags above builds the same program at once.

UNITS = $(patsubst cli/%.cpp,$(BUILD)/program/%.o,$(wildcard cli/*.cpp))
METHOD = $(BUILD)/program/method.h

$(BUILD)/program/speed: $(BUILD)/program/main.o $(UNITS)
	$(CXX) $(CXXFLAGS) -fopenmp $^ -o $@ $(LIBRARIES)

$(METHOD).gch: speed.cu
	@mkdir -p $(@D)
	@printf '#define SPEED_METHOD_ONLY\n#include "%s/speed.cu"\n' "$(CURDIR)" > $(METHOD)
	$(CXX) $(LANGUAGE) $(CXXFLAGS) -MMD -MT $@ -MF $(METHOD).d -x c++-header $(METHOD) -o $@

$(BUILD)/program/%.o: cli/%.cpp $(METHOD).gch
	$(CXX) $(LANGUAGE) $(CXXFLAGS) $(if $(findstring report,$@),$(NAMED)) -MMD -include $(METHOD) -c $< -o $@

# The page of `trace --html` is put into the program as it is.
$(BUILD)/program/trace_html.o: $(wildcard cli/page/*)

$(BUILD)/program/main.o: speed.cu
	@mkdir -p $(@D)
	$(CXX) $(LANGUAGE) $(CXXFLAGS) -DSPEED_SEPARATE -MMD -x c++ -c $< -o $@

# The commit's name is in the program: when it changes, so does this file.
$(BUILD)/commit: FORCE
	@mkdir -p $(@D)
	@echo $(COMMIT) | cmp -s - $@ || echo $(COMMIT) > $@
$(BUILD)/program/report.o: $(BUILD)/commit

# ---- tests ----
# -O1, because a test compiles more than it runs; the program that test_cli.cpp starts is the one above.

TESTFLAGS ?= -O1 -march=native
TEST_OBJECTS = $(patsubst tests/%.cpp,$(BUILD)/%.o,$(wildcard tests/test_*.cpp tests/main.cpp))

HELPERS = $(BUILD)/helpers.h

$(HELPERS).gch: tests/helpers.h
	@mkdir -p $(@D)
	@echo '#include "$(CURDIR)/tests/helpers.h"' > $(HELPERS)
	$(CXX) $(LANGUAGE) $(TESTFLAGS) -MMD -MT $@ -MF $(HELPERS).d -x c++-header $(HELPERS) -o $@

$(BUILD)/%.o: tests/%.cpp $(HELPERS).gch
	$(CXX) $(LANGUAGE) $(TESTFLAGS) -MMD $(WITH_HELPERS) -c $< -o $@
WITH_HELPERS = -include $(HELPERS)
$(BUILD)/main.o: WITH_HELPERS =  # CATCH_CONFIG_MAIN comes before the header

# CUDA kernels on a CPU: gpu/cuda.cuh takes its wrappers from tests/emulator.h.
EMULATED = $(addprefix $(BUILD)/,emulator.o test_emulator.o test_gpu.o)
$(EMULATED): WITH_HELPERS = -DSPEED_EMULATOR -Wno-unknown-pragmas
$(BUILD)/emulator.o: TESTFLAGS += -O3

# -rdynamic, so that the emulator's messages name a kernel.
$(BUILD)/tests: $(TEST_OBJECTS) $(BUILD)/emulator.o $(addprefix $(BUILD)/program/,policies.o report.o request.o trace_document.o trace_html.o)
	$(CXX) $(TESTFLAGS) -fopenmp -rdynamic $^ -o $@ $(LIBRARIES) -lboost_context

# Laws and threads once more with other OpenBLAS kernels: those pick their method by shape, so equal bits are harder.
test: speed $(BUILD)/tests
	GOMP_SPINCOUNT=1000 $(BUILD)/tests
	GOMP_SPINCOUNT=1000 OPENBLAS_CORETYPE=Haswell $(BUILD)/tests "[laws],[threads]"

# A second program and a second set of tests, so that nothing is built over.
SANITIZE = -O1 -g -march=native -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer \
  -Wno-maybe-uninitialized
sanitize:
	$(MAKE) BUILD=build-sanitize CXXFLAGS="$(SANITIZE)" TESTFLAGS="$(SANITIZE)" \
	  build-sanitize/program/speed build-sanitize/tests
	ASAN_OPTIONS=handle_sigbus=0 GOMP_SPINCOUNT=1000 SPEED=build-sanitize/program/speed build-sanitize/tests

# clang, because ThreadSanitizer must be told where OpenMP's threads wait for each other, which LLVM's libarcher.so does:
# without it correct loops are reported (Debian: clang libclang-rt-dev libomp-dev). ./run.sh sanitize-threads installs it.
sanitize-threads:
	@mkdir -p build-threads
	clang++ $(LANGUAGE) -O1 -g -march=native -fsanitize=thread tests/test_ops.cpp tests/test_threads.cpp \
	  tests/main.cpp tests/plain_blas.cpp -o build-threads/tests -lpcre2-8
	OMP_NUM_THREADS=4 TSAN_OPTIONS=ignore_noninstrumented_modules=1 build-threads/tests "[ops],[threads]"

test-hf: speed
	tests/hf/run.sh "$(CACHE)"

test-package: speed
	hf/run.sh pytest -q hf/tests

test-page: speed
	tests/page/run.sh "$(CACHE)"

test-docs: speed
	python3 tests/docs/check.py
	python3 exercises/check.py --answers

test-exercises: speed
	python3 exercises/check.py --answers
	python3 exercises/check_faults.py

# What the README's pictures show. All K of SmolLM2 take two minutes of one processor.
SMOLLM2 = $(CACHE)/smollm2-135m-instruct.safetensors
DOG = The dog of the choir is a spaniel called Biscuit. What is the name of the dog?
pages: speed
	@mkdir -p $(BUILD)/pages
	./speed trace -m models/small.safetensors --chat -f tests/page/story.txt --html $(BUILD)/pages/small.html > $(BUILD)/pages/small.txt
	@if [ -e "$(SMOLLM2)" ]; then set -x; \
	  ./speed trace -m "$(SMOLLM2)" --chat -p "$(DOG)" --html $(BUILD)/pages/smollm2.html > $(BUILD)/pages/smollm2.txt; fi
	@ls -l $(BUILD)/pages/*.html

# Needs clang and its run-time library (Debian: clang libclang-rt-dev libomp-dev). ./run.sh fuzz installs them first.
FUZZ_SECONDS ?= 600
fuzz:
	tests/fuzz/run.sh $(FUZZ_SECONDS) build/fuzz

bench: speed
	./speed bench -m "$(CACHE)/smollm2-135m-instruct.safetensors" -p 128,512 -n 64 --depth 0,1024,4096 \
	  --policy full,speed,pop --k 24,15

# ---- GPUs ----
# For Ampere, Hopper and Blackwell, and as PTX for what else there is; needs no GPU. Kernels that spill registers or use
# local memory are an error, and so is a warning.

cuda: speed-cuda
speed-cuda: $(SOURCES)
	@mkdir -p $(BUILD)
	$(NVCC) $(NVCCFLAGS) $(NAMED) -Xcompiler -march=x86-64-v3 -gencode arch=compute_80,code=sm_80 \
	  -gencode arch=compute_90a,code=sm_90a -gencode arch=compute_100,code=sm_100 \
	  -gencode arch=compute_80,code=compute_80 speed.cu -o $@.new $(LIBRARIES) -lcublas 2> $(BUILD)/nvcc.log \
	  || { cat $(BUILD)/nvcc.log >&2; false; }
	@! grep -B2 -E '\b[1-9][0-9]* bytes (stack|spill)|warning' $(BUILD)/nvcc.log
	mv $@.new $@

# With cuobjdump of the CUDA toolkit, or of the package triton, which the comparison with Hugging Face pins.
sass: speed-cuda
	@if command -v cuobjdump >/dev/null || [ -x /usr/local/cuda/bin/cuobjdump ]; then python3 tests/gpu/sass.py; \
	else tests/hf/run.sh "$(CACHE)" tests/gpu/sass.py; fi

# The tests of the kernels once more, on the GPU itself.
THIS_GPU = -Xcompiler -march=native -gencode arch=compute_$(CARD:90=90a),code=sm_$(CARD:90=90a)
build-gpu/test_gpu.o: tests/test_gpu.cpp $(SOURCES) $(wildcard tests/*.h)
	@mkdir -p build-gpu
	$(NVCC) $(NVCCFLAGS) $(THIS_GPU) -x cu -c $< -o $@

build-gpu/tests: build-gpu/test_gpu.o $(BUILD)/main.o
	$(NVCC) -ccbin $(CXX) -Xcompiler -fopenmp $^ -o $@ $(LIBRARIES) -lcublas

# With SPEED=program and TESTS=tests in the environment nothing is built.
ifeq ($(CARD)$(SPEED),)
gpu-check:
	@echo "gpu-check: nvidia-smi finds no GPU here; make gpu-kit packs the checks for a machine that has one" >&2; exit 1
else
gpu-check: $(if $(SPEED),,speed) $(if $(TESTS),,build-gpu/tests)
	tests/gpu/run.sh "$(CACHE)"
endif

# Everything a first run on a GPU needs, in one archive: see tests/gpu/pack.sh. KIT_GPU: for which GPU, as nvcc names it.
KIT_GPU ?= 90a
KIT = build-gpu/kit-bin
KIT_FLAGS = $(NVCCFLAGS) $(NAMED) -lineinfo -Xcompiler -march=x86-64-v3 -gencode arch=compute_$(KIT_GPU),code=sm_$(KIT_GPU)
KIT_LINK = $(NVCC) -ccbin $(CXX) -Xcompiler -fopenmp -Xlinker --disable-new-dtags -Xlinker -rpath='$$ORIGIN/../lib'
gpu-kit: $(addprefix $(KIT)/,speed tests times)
	tests/gpu/pack.sh

$(KIT)/%.o: $(SOURCES) $(wildcard tests/*.h tests/*.cpp tests/gpu/*.cu)
	@mkdir -p $(@D)
	$(NVCC) $(KIT_FLAGS) -x cu -c $(firstword $(wildcard $*.cu tests/$*.cpp tests/gpu/$*.cu)) -o $@
$(KIT)/main.o: tests/main.cpp
	@mkdir -p $(@D)
	$(CXX) $(LANGUAGE) -O1 -march=x86-64-v3 -c $< -o $@
$(KIT)/speed: $(KIT)/speed.o
$(KIT)/times: $(KIT)/times.o
$(KIT)/tests: $(KIT)/test_gpu.o $(KIT)/main.o
$(KIT)/speed $(KIT)/times $(KIT)/tests:
	$(KIT_LINK) $^ -o $@ $(LIBRARIES) -lcublas

# Random weights, made on the device. The records that study/gpu.py draws.
GPU_BENCH = ./speed bench --device cuda --shape llama-3.1-8b --policy full,speed -o md
ifeq ($(CARD),)
gpu-bench:
	@echo "gpu-bench: nvidia-smi finds no GPU here; make gpu-kit packs the timings for a machine that has one" >&2; exit 1
else
gpu-bench: speed
	@mkdir -p docs/gpu
	$(GPU_BENCH) -p 2048,8192 -n 32 --depth 0,2048,8192 --k 24,16 -r 3 --record docs/gpu/bench.json
	$(GPU_BENCH) -p 32768 -n 32 --depth 32768 --k 24,16 -r 2 --record docs/gpu/bench32.json
	$(GPU_BENCH) -p 131000 -n 0 --k 24 -r 1 --record docs/gpu/bench128.json
	$(GPU_BENCH) -p '' -n 32 --depth 131000 --k 24 -r 1 --record docs/gpu/tokens128.json
endif

# ---- the rest ----

# The program, the bundled model beside it, and completion for bash.
PREFIX ?= /usr/local
install: speed
	install -D -m 755 speed $(DESTDIR)$(PREFIX)/lib/speed/speed
	install -D -m 644 models/small.safetensors $(DESTDIR)$(PREFIX)/lib/speed/models/small.safetensors
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/share/bash-completion/completions
	ln -sf ../lib/speed/speed $(DESTDIR)$(PREFIX)/bin/speed
	./speed completion >$(DESTDIR)$(PREFIX)/share/bash-completion/completions/speed
uninstall:
	rm -rf $(DESTDIR)$(PREFIX)/lib/speed $(DESTDIR)$(PREFIX)/bin/speed
	rm -f $(DESTDIR)$(PREFIX)/share/bash-completion/completions/speed

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

CLANG_FORMAT ?= clang-format
RUFF ?= ruff
CXX_FILES = git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' ':!text/unicode.h'
format:
	$(CXX_FILES) | xargs $(CLANG_FORMAT) -i
	$(RUFF) check --fix -q && $(RUFF) format -q

check-format:
	$(CXX_FILES) | xargs $(CLANG_FORMAT) --dry-run -Werror
	$(RUFF) check && $(RUFF) format --check

clean:
	rm -rf speed speed-cuda build build-gpu build-sanitize build-threads

FORCE:
-include $(wildcard $(BUILD)/*.d $(BUILD)/program/*.d)

.PHONY: cuda sass gpu-check gpu-kit gpu-bench test test-hf test-package test-page test-docs test-exercises pages sanitize \
  sanitize-threads bench fuzz format check-format help install uninstall clean FORCE
