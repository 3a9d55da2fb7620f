# make            builds ./speed
# make test       builds and runs the tests; needs no Python and no network
# make test-hf    compares with Hugging Face; makes a virtual environment outside this folder (2 minutes, 6 GB)
# make bench      times SmolLM2 beside this machine's ceilings; run ./run.sh first, it fetches the model
# make fuzz       hostile model files, texts and templates, made up by libFuzzer
# make sanitize   the tests again under AddressSanitizer and UBSan

CXX ?= g++
CXXFLAGS ?= -O3 -march=native
LANGUAGE = -std=c++20 -Wall -Wextra -fopenmp -DSPEED_COMMIT='"$(shell git describe --always --dirty 2>/dev/null || echo unknown)"'
LIBRARIES = -lopenblas -lpcre2-8
HEADERS = $(wildcard *.h *.cuh)
BUILD ?= build
TESTS = $(patsubst tests/%.cpp,$(BUILD)/%.o,$(wildcard tests/test_*.cpp tests/main.cpp))
CACHE ?= $(or $(SPEED_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/speed)

speed: speed.cu $(HEADERS)
	$(CXX) $(LANGUAGE) $(CXXFLAGS) -x c++ speed.cu -x none -o $@.new $(LIBRARIES) && mv $@.new $@

# -O1, because a test compiles more than it runs; the program it starts is the one above.
$(BUILD)/%.o: tests/%.cpp $(HEADERS) $(wildcard tests/*.h)
	@mkdir -p $(BUILD)
	$(CXX) $(LANGUAGE) $(TESTFLAGS) -I. -c $< -o $@
TESTFLAGS ?= -O1 -march=native

# CUDA kernels on a CPU: device.cuh takes its wrappers from tests/emulator.h. -rdynamic, so that messages name a kernel.
EMULATED = $(addprefix $(BUILD)/,emulator.o test_emulator.o test_gpu.o)
$(EMULATED): LANGUAGE += -DSPEED_EMULATOR -Wno-unknown-pragmas

$(BUILD)/tests: $(TESTS) $(BUILD)/emulator.o
	$(CXX) $(TESTFLAGS) -fopenmp -rdynamic $^ -o $@ $(LIBRARIES) -lboost_context

# The laws a second time with other OpenBLAS kernels: those pick their method by shape, so equal bits are harder there.
test: speed $(BUILD)/tests
	GOMP_SPINCOUNT=1000 $(BUILD)/tests
	GOMP_SPINCOUNT=1000 OPENBLAS_CORETYPE=Haswell $(BUILD)/tests "[laws]"

# A second program and a second set of tests, so that nothing is built over.
sanitize:
	@mkdir -p build-sanitize
	$(CXX) $(LANGUAGE) $(SANITIZE) -x c++ speed.cu -x none -o build-sanitize/speed $(LIBRARIES)
	$(MAKE) BUILD=build-sanitize TESTFLAGS="$(SANITIZE)" build-sanitize/tests
	ASAN_OPTIONS=handle_sigbus=0 GOMP_SPINCOUNT=1000 SPEED=build-sanitize/speed build-sanitize/tests
SANITIZE = -O1 -g -march=native -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -Wno-maybe-uninitialized

test-hf: speed
	tests/hf/run.sh "$(CACHE)"

# Ten minutes; needs clang and its run-time library (Debian: clang libclang-rt-14-dev).
fuzz:
	tests/fuzz/run.sh 600 build/fuzz

bench: speed
	./speed bench -m "$(CACHE)/smollm2-135m-instruct.safetensors" -p 128,512 -n 64 --depth 0,1024,4096 --policy full,speed,pop --k 24,15

clean:
	rm -rf speed build build-sanitize

.PHONY: test test-hf sanitize bench fuzz clean
