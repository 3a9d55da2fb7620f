// emulator.h - the other body of gpu/cuda.cuh: CUDA kernels on a CPU, for tests. Contracts are in gpu/cuda.cuh.
//
// A block's threads are fibers (Boost.Context) on one thread of the host. They switch only inside the wrappers: a
// thread that reaches a barrier, a shuffle or a tensor-core product waits for the others; the last to arrive computes
// for all. Undefined behaviour is an error with the kernel, the block, the threads and the line: a barrier that some
// never reach, lanes of a warp at different lines, addresses outside the block's shared memory or outside device
// memory, 16-byte accesses that are not aligned, words written just outside an allocation.
//
// A GPU may do things late and in any order. The adversarial mode does, as late and as oddly as it is allowed:
//   - copy_async_16 fills its destination with NaN and copies only in the copy_async_wait that must cover it;
//   - copy_tile fills its destination with NaN and copies at some later moment, when threads change places;
//   - warpgroup products fill their results with NaN and read their operands only in the products_wait that must cover
//     them;
//   - shared memory holds NaN when a block starts, and so does device memory that was just allocated;
//   - blocks run in random order, lanes in either direction, and after every barrier one warp may be held back until
//     the others can go no further;
//   - work queued on a stream runs only when somebody waits for it, and copies to the host leave NaN there until then.
#pragma once

#include <algorithm>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <source_location>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "../base/bf16.h"
#include "../base/error.h"

// ---- CUDA's own names ---------------------------------------------------------------------------------------------

#define __global__ inline
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define DEVICE inline
#define SPEED_HOPPER

struct uint2 {
  unsigned x, y;
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }

// Of the thread that runs now; the emulator sets them whenever threads change places.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace speed {

using std::max;
using std::min;

// ---- the emulator's own interface ---------------------------------------------------------------------------------

namespace emulator {

struct Options {
  uint64_t seed = 1;
  bool adversarial = true;
  int major = 8;  // compute capability; 9: a Hopper GPU
  int multiprocessors = 4;
  size_t memory = size_t(2) << 30;  // bytes on the device
  // Bytes of shared memory a block may have: 99 KiB is the least of all GPUs from sm_80 on, 227 KiB is Hopper's.
  size_t shared_limit() const { return size_t(major == 9 ? 227 : 99) << 10; }
};
inline Options options;

// An operation that all lanes of a warp execute together: `all` gets every lane's argument and writes the results
// there.
void warp_operation(const char* what, Where where, void* mine, void (*all)(void* const* of_lane));
enum class Memory { shared, global, either };
void check(const char* what, Memory memory, const void* p, size_t bytes, size_t alignment, Where where);
void wait_for_groups(int but_latest);
void copy_later(void* shared, const void* global, bool valid);
void end_group();
void* shared_memory();
uint32_t shared_address(const void* p);
void add_product(float* d, int n, const uint32_t* a_registers, uint64_t a, uint64_t b, bool add, Where where);
void wait_for_products(int but_latest, Where where);
void set_registers(int count, bool up, Where where);
void run_grid(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, Where where,
              const std::function<void()>& body);

// Work queued on a stream: `issue` happens at once, `run` when somebody waits.
struct Operation {
  std::function<void()> issue, run;
};
struct Queue {
  std::vector<Operation> work;
  std::vector<Operation>* recording = nullptr;  // a graph's, while it is made
  Queue();
  ~Queue();
  void enqueue(Operation o);
  void drain();  // runs all that is queued
};

}  // namespace emulator

// ---- threads and shared memory ------------------------------------------------------------------------------------

template <class T>
T* shared_memory() {
  return static_cast<T*>(emulator::shared_memory());
}

void sync_threads(Where where = Where::current());

inline void sync_warp(Where where = Where::current()) {
  emulator::warp_operation("sync_warp", where, nullptr, [](void* const*) {});
}

template <class T>
T shuffle(T v, int lane, Where where = Where::current()) {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, int> || std::is_same_v<T, uint32_t>);
  struct Mine {
    T v, result;
    int lane;
  } mine{v, v, lane & 31};
  emulator::warp_operation("shuffle", where, &mine, [](void* const* of_lane) {
    for (int i = 0; i < 32; ++i) {
      Mine& m = *static_cast<Mine*>(of_lane[i]);
      m.result = static_cast<Mine*>(of_lane[m.lane])->v;
    }
  });
  return mine.result;
}
template <class T>
T shuffle_xor(T v, int mask, Where where = Where::current()) {
  return speed::shuffle(v, int(threadIdx.x % 32) ^ mask, where);
}

inline void memory_fence() {}
inline uint32_t atomic_add(uint32_t* p, uint32_t v, Where where = Where::current()) {
  emulator::check("atomic_add", emulator::Memory::global, p, sizeof *p, sizeof *p, where);
  return std::exchange(*p, *p + v);
}

// ---- memory -------------------------------------------------------------------------------------------------------

inline uint4 load_16(const void* p, Where where = Where::current()) {
  emulator::check("load_16", emulator::Memory::either, p, 16, 16, where);
  return *static_cast<const uint4*>(p);
}
inline void store_16(void* p, uint4 v, Where where = Where::current()) {
  emulator::check("store_16", emulator::Memory::either, p, 16, 16, where);
  *static_cast<uint4*>(p) = v;
}
inline void store_4(void* p, uint32_t v, Where where = Where::current()) {
  emulator::check("store_4", emulator::Memory::either, p, 4, 4, where);
  std::memcpy(p, &v, 4);
}
inline uint4 load_16_once(const void* p, Where where = Where::current()) {
  emulator::check("load_16_once", emulator::Memory::global, p, 16, 16, where);
  return *static_cast<const uint4*>(p);
}

inline void copy_async_16(void* shared, const void* global, bool valid, Where where = Where::current()) {
  emulator::check("copy_async_16", emulator::Memory::shared, shared, 16, 16, where);
  if (valid) emulator::check("copy_async_16", emulator::Memory::global, global, 16, 16, where);
  emulator::copy_later(shared, global, valid);
}
inline void copy_async_commit() { emulator::end_group(); }
template <int N>
void copy_async_wait() {
  emulator::wait_for_groups(N);
}

// ---- Hopper --------------------------------------------------------------------------------------------------------

inline uint32_t shared_address(const void* p) { return emulator::shared_address(p); }

struct alignas(8) Barrier {
  uint64_t word;
};
void barrier_init(Barrier* b, int arrivals, Where where = Where::current());
void barriers_ready();
void barrier_expect(Barrier* b, int bytes, Where where = Where::current());
void barrier_arrive(Barrier* b, Where where = Where::current());
void barrier_wait(Barrier* b, int parity, Where where = Where::current());

struct TensorMap {
  const bf16* base;
  size_t rows, heads, row_pitch, head_pitch;  // pitches in values
  int e;
};
TensorMap tensor_map(const bf16* base, size_t rows, size_t heads, size_t row_pitch, size_t head_pitch, int e,
                     Where where = Where::current());
void copy_tile(void* shared, const TensorMap& map, Barrier* b, int row, int head, Where where = Where::current());

struct Products {
  Where where;
  Products(Where where = Where::current());
  ~Products() noexcept(false);
};
template <int N>
void products_wait(Where where = Where::current()) {
  emulator::wait_for_products(N, where);
}
template <int N>
void settled(float (&)[N]) {}
template <int N>
void warpgroup_product(float (&d)[N / 2], uint64_t a, uint64_t b, bool add, Where where = Where::current()) {
  emulator::add_product(d, N, nullptr, a, b, add, where);
}
template <int N>
void warpgroup_product(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, Where where = Where::current()) {
  emulator::add_product(d, N, a, 0, b, true, where);
}

template <int R>
void registers_up(Where where = Where::current()) {
  static_assert(R % 8 == 0 && R >= 24 && R <= 256);
  emulator::set_registers(R, true, where);
}
template <int R>
void registers_down(Where where = Where::current()) {
  static_assert(R % 8 == 0 && R >= 24 && R <= 256);
  emulator::set_registers(R, false, where);
}

void named_barrier_wait(int id, int threads, Where where = Where::current());
void named_barrier_arrive(int id, int threads, Where where = Where::current());

// ---- bf16, tensor cores -------------------------------------------------------------------------------------------

void load_matrix_x4(uint32_t (&r)[4], const void* shared_row, Where where = Where::current());
void load_matrix_x4_transposed(uint32_t (&r)[4], const void* shared_row, Where where = Where::current());
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where where = Where::current());

inline bf16 round_bf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (std::isnan(x)) return {0x7FFF};
  return {uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
inline uint32_t pack_bf16(float low, float high) {
  return uint32_t(round_bf16(high).bits) << 16 | round_bf16(low).bits;
}
inline float as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t as_bits(float x) { return std::bit_cast<uint32_t>(x); }
inline float widen(bf16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }
inline float low_bf16(uint32_t pair) { return std::bit_cast<float>(pair << 16); }
inline float high_bf16(uint32_t pair) { return std::bit_cast<float>(pair & 0xFFFF0000); }

inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t r = 0;
  for (int i = 0; i < 4; ++i) r |= uint32_t((uint64_t(b) << 32 | a) >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
  return r;
}

inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}

// ---- the host's side ----------------------------------------------------------------------------------------------

struct Device {
  std::string name;
  int major = 0, minor = 0;
  int multiprocessors = 0;
  size_t free_bytes = 0, total_bytes = 0, l2_bytes = 0;
  int driver = 0, runtime = 0;
};
Device open_device(Where where = Where::current());

void* device_allocate(size_t bytes, Where where = Where::current());
void device_free(void* p) noexcept;
void* host_allocate(size_t bytes, Where where = Where::current());
void host_free(void* p) noexcept;

class Stream {
 public:
  explicit Stream(Where = Where::current()) {}
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() noexcept(false);
  emulator::Queue& queue() const { return *queue_; }

 private:
  std::unique_ptr<emulator::Queue> queue_ = std::make_unique<emulator::Queue>();
};

void synchronize(const Stream& s, Where where = Where::current());
void copy_to_device(void* to, const void* from, size_t bytes, const Stream& s, Where where = Where::current());
void copy_to_host(void* to, const void* from, size_t bytes, const Stream& s, Where where = Where::current());
void copy_on_device(void* to, const void* from, size_t bytes, const Stream& s, Where where = Where::current());
void fill_bytes(void* to, int byte, size_t bytes, const Stream& s, Where where = Where::current());

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, LaunchStream s, A&&... args) {
  auto run = [=, where = s.where, given = std::tuple<P...>(static_cast<P>(std::forward<A>(args))...)] {
    emulator::run_grid(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, where,
                       [&] { std::apply(kernel, given); });
  };
  s.stream.queue().enqueue({nullptr, run});
}

class Graph {
 public:
  Graph() = default;
  template <class F>
  Graph(const Stream& s, F&& record, Where = Where::current()) {
    struct Recording {
      emulator::Queue& queue;
      Recording(emulator::Queue& q, std::vector<emulator::Operation>* work) : queue(q) { queue.recording = work; }
      ~Recording() { queue.recording = nullptr; }
    } recording(s.queue(), &work_);
    record();
  }
  explicit operator bool() const { return !work_.empty(); }
  void run(const Stream& s, Where = Where::current()) const {
    for (const emulator::Operation& o : work_) s.queue().enqueue(o);
  }

 private:
  std::vector<emulator::Operation> work_;
};

class Event {
 public:
  explicit Event(Where = Where::current()) {}
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  void record(const Stream& s, Where = Where::current()) {
    s.queue().enqueue({nullptr, [t = time_] { *t = std::chrono::steady_clock::now(); }});
  }
  double seconds_since(const Event& start, Where = Where::current()) const {
    return std::chrono::duration<double>(*time_ - *start.time_).count();
  }

 private:
  using Time = std::chrono::steady_clock::time_point;
  std::shared_ptr<Time> time_ = std::make_shared<Time>();
};

// By OpenBLAS, in fp32.
class Blas {
 public:
  explicit Blas(const Stream& s, Where = Where::current()) : stream_(s) {}
  Blas(const Blas&) = delete;
  Blas& operator=(const Blas&) = delete;
  void gemm(float* y, const bf16* x, const bf16* w, size_t n, size_t in, size_t out, float beta,
            Where where = Where::current());
  void gemm(bf16* y, const bf16* x, const bf16* w, size_t n, size_t in, size_t out, float beta,
            Where where = Where::current());
  void gemm_pair(bf16* y0, bf16* y1, const bf16* x, const bf16* w0, const bf16* w1, size_t n, size_t in, size_t out,
                 Where where = Where::current());
  static constexpr size_t workspace_bytes = 0;

 private:
  const Stream& stream_;
};

}  // namespace speed
