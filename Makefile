# make            builds ./speed
# make cuda       builds ./speed-cuda for NVIDIA GPUs, on any machine with a CUDA toolkit
# make test       builds and runs the tests; needs no Python and no network
# make test-hf    compares with Hugging Face; makes a virtual environment outside this folder (2 minutes, 6 GB)
# make bench      times SmolLM2 beside this machine's ceilings; run ./run.sh first, it fetches the model
# make gpu-check  what only a GPU can show: kernels, laws, Hugging Face, memory checks; under eight minutes
# make gpu-bench  times Llama-3.1-8B shapes on a GPU; results and run records go to docs/gpu
# make fuzz       hostile model files, texts and templates, made up by libFuzzer
# make sanitize   the tests again under AddressSanitizer and UBSan
# make sanitize-threads   the operations and a whole model under ThreadSanitizer

CXX ?= g++
CXXFLAGS ?= -O3 -march=native
# -fno-trapping-math changes no result; without it GCC leaves loops with e^x in them one number at a time.
LANGUAGE = -std=c++20 -Wall -Wextra -fopenmp -fno-trapping-math -DSPEED_COMMIT='"$(shell git describe --always --dirty 2>/dev/null || echo unknown)"'
LIBRARIES = -lopenblas -lpcre2-8
HEADERS = $(wildcard *.h *.cuh)
BUILD ?= build
TESTS = $(patsubst tests/%.cpp,$(BUILD)/%.o,$(wildcard tests/test_*.cpp tests/main.cpp))
CACHE ?= $(or $(SPEED_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/speed)

# With a GPU here and a CUDA toolkit of 12.8 or later, nvcc builds the program for this GPU and the CPU; otherwise g++
# builds it for the CPU alone.
NVCC ?= $(or $(shell command -v nvcc 2>/dev/null),$(wildcard /usr/local/cuda/bin/nvcc))
CARD := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1 | tr -d .)
TOOLKIT := $(if $(NVCC),$(shell $(NVCC) --version | sed -n 's/.*release \([0-9]*\)\.\([0-9]*\),.*/\1\2/p'))
HAS_TOOLKIT := $(shell [ "$(TOOLKIT)" -ge 128 ] 2>/dev/null && echo yes)
NVCCFLAGS = $(filter -std=% -D%,$(LANGUAGE)) -O3 -DSPEED_CUDA -ccbin $(CXX) \
  -Xcompiler -fopenmp,-fno-trapping-math,-Wall,-Wextra -Xptxas -v

speed: speed.cu $(HEADERS)
ifeq ($(and $(CARD),$(HAS_TOOLKIT)),yes)
	$(NVCC) $(NVCCFLAGS) -Xcompiler -march=native -arch=sm_$(CARD:90=90a) speed.cu -o $@.new $(LIBRARIES) -lcublas && mv $@.new $@
else
	$(CXX) $(LANGUAGE) $(CXXFLAGS) -x c++ speed.cu -x none -o $@.new $(LIBRARIES) && mv $@.new $@
endif

# For Ampere, Hopper and Blackwell, and as PTX for what else there is; needs no GPU. Kernels that spill registers or use
# local memory are an error, and so is a warning.
cuda: speed-cuda
speed-cuda: speed.cu $(HEADERS)
	@mkdir -p $(BUILD)
	$(NVCC) $(NVCCFLAGS) -Xcompiler -march=x86-64-v3 -gencode arch=compute_80,code=sm_80 \
	  -gencode arch=compute_90a,code=sm_90a -gencode arch=compute_100,code=sm_100 \
	  -gencode arch=compute_80,code=compute_80 speed.cu -o $@.new $(LIBRARIES) -lcublas 2> $(BUILD)/nvcc.log \
	  || { cat $(BUILD)/nvcc.log >&2; false; }
	@! grep -B2 -E '\b[1-9][0-9]* bytes (stack|spill)|warning' $(BUILD)/nvcc.log
	mv $@.new $@

# -O1, because a test compiles more than it runs; the program it starts is the one above.
$(BUILD)/%.o: tests/%.cpp $(HEADERS) $(wildcard tests/*.h)
	@mkdir -p $(BUILD)
	$(CXX) $(LANGUAGE) $(TESTFLAGS) -I. -c $< -o $@
TESTFLAGS ?= -O1 -march=native

# CUDA kernels on a CPU: device.cuh takes its wrappers from tests/emulator.h. -rdynamic, so that messages name a kernel.
EMULATED = $(addprefix $(BUILD)/,emulator.o test_emulator.o test_gpu.o)
$(EMULATED): LANGUAGE += -DSPEED_EMULATOR -Wno-unknown-pragmas
$(BUILD)/emulator.o: TESTFLAGS += -O3

$(BUILD)/tests: $(TESTS) $(BUILD)/emulator.o
	$(CXX) $(TESTFLAGS) -fopenmp -rdynamic $^ -o $@ $(LIBRARIES) -lboost_context

# Laws and threads once more with other OpenBLAS kernels: those pick their method by shape, so equal bits are harder.
test: speed $(BUILD)/tests
	GOMP_SPINCOUNT=1000 $(BUILD)/tests
	GOMP_SPINCOUNT=1000 OPENBLAS_CORETYPE=Haswell $(BUILD)/tests "[laws],[threads]"

# A second program and a second set of tests, so that nothing is built over.
sanitize:
	@mkdir -p build-sanitize
	$(CXX) $(LANGUAGE) $(SANITIZE) -x c++ speed.cu -x none -o build-sanitize/speed $(LIBRARIES)
	$(MAKE) BUILD=build-sanitize TESTFLAGS="$(SANITIZE)" build-sanitize/tests
	ASAN_OPTIONS=handle_sigbus=0 GOMP_SPINCOUNT=1000 SPEED=build-sanitize/speed build-sanitize/tests
SANITIZE = -O1 -g -march=native -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -Wno-maybe-uninitialized

# clang, because ThreadSanitizer must be told where OpenMP's threads wait for each other, which LLVM's libarcher.so does:
# without it correct loops are reported (Debian: clang libclang-rt-dev libomp-dev). ./run.sh sanitize-threads installs it.
sanitize-threads:
	@mkdir -p build-threads
	clang++ $(LANGUAGE) -O1 -g -march=native -fsanitize=thread -I. -Itests tests/test_ops.cpp tests/test_threads.cpp \
	  tests/main.cpp tests/plain_blas.cpp -o build-threads/tests -lpcre2-8
	OMP_NUM_THREADS=4 TSAN_OPTIONS=ignore_noninstrumented_modules=1 build-threads/tests "[ops],[threads]"

test-hf: speed
	tests/hf/run.sh "$(CACHE)"

# Ten minutes; needs clang and its run-time library (Debian: clang libclang-rt-dev). ./run.sh fuzz installs them first.
fuzz:
	tests/fuzz/run.sh $(FUZZ_SECONDS) build/fuzz
FUZZ_SECONDS ?= 600

bench: speed
	./speed bench -m "$(CACHE)/smollm2-135m-instruct.safetensors" -p 128,512 -n 64 --depth 0,1024,4096 --policy full,speed,pop --k 24,15

# The tests of the kernels once more, on the GPU itself.
build-gpu/test_gpu.o: tests/test_gpu.cpp $(HEADERS) $(wildcard tests/*.h)
	@mkdir -p build-gpu
	$(NVCC) $(NVCCFLAGS) -Xcompiler -march=native -arch=sm_$(CARD:90=90a) -I. -x cu -c $< -o $@

build-gpu/tests: build-gpu/test_gpu.o $(BUILD)/main.o
	$(NVCC) -ccbin $(CXX) -Xcompiler -fopenmp $^ -o $@ $(LIBRARIES) -lcublas

gpu-check: speed build-gpu/tests
	tests/gpu/run.sh "$(CACHE)"

# Random weights, made on the device. At 128K tokens fewer repetitions: a prompt takes seconds there.
gpu-bench: speed
	@mkdir -p docs/gpu
	./speed bench --device cuda --shape llama-3.1-8b -p 2048,8192,32768 -n 64 --depth 0,2048,8192,32768 \
	  --policy full,speed,pop --k 24,16 -o md --record docs/gpu/llama-3.1-8b.json > docs/gpu/llama-3.1-8b.md
	./speed bench --device cuda --shape llama-3.1-8b -p 131072 -n 32 --depth 131000 --policy full,speed --k 24,16 \
	  -r 2 -o md --record docs/gpu/llama-3.1-8b-128k.json > docs/gpu/llama-3.1-8b-128k.md

clean:
	rm -rf speed speed-cuda build build-gpu build-sanitize build-threads

.PHONY: cuda gpu-check gpu-bench test test-hf sanitize sanitize-threads bench fuzz clean
