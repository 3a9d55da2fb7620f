// cuda.cuh - a wrapper for every PTX instruction the kernels use, and a thin host layer over CUDA and cuBLAS. Nothing
// here knows about language models.
//
// Each wrapper has two bodies. This file has the one for a GPU. g++ -DSPEED_EMULATOR takes the other from
// tests/emulator.h, which runs a block's threads as fibers on a CPU. So the same source of the kernels runs in both.
//
// Conventions. A warp is 32 lanes; blocks have whole warps. "Whole warp" means: all 32 lanes must call it together.
// Host calls that take a Stream are asynchronous: they may run as late as synchronize(), so until then memory they read
// must not change, and memory they write must not be used.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <string>
#include <utility>

#include "../base/bf16.h"
#include "../base/error.h"

namespace speed {

using Where = std::source_location;  // of the call that a message should name

// A Stream, with the place in the program that names it.
struct LaunchStream {
  const class Stream& stream;
  Where where;
  LaunchStream(const Stream& s, Where w = Where::current()) : stream(s), where(w) {}
};

}  // namespace speed

#ifdef SPEED_EMULATOR
#include "../tests/emulator.h"
#else

#include <cublas_v2.h>
#include <cuda.h>
#include <cuda_runtime.h>

#define DEVICE __device__ __forceinline__

namespace speed {

// ---- threads and shared memory ------------------------------------------------------------------------------------

// The block's dynamic shared memory: as many bytes as launch() was given, aligned to 128, uninitialized.
template <class T>
DEVICE T* shared_memory() {
  extern __shared__ __align__(128) unsigned char shared[];
  return reinterpret_cast<T*>(shared);
}

// Waits for all threads of the block; what they wrote to shared and global memory before is seen after.
DEVICE void sync_threads() { __syncthreads(); }

// The same for the lanes of a warp. Whole warp.
DEVICE void sync_warp() { __syncwarp(); }

// The v of lane `lane`, or of lane (this one ^ mask). T is float, int or uint32_t. Whole warp.
template <class T>
DEVICE T shuffle(T v, int lane) {
  return __shfl_sync(0xFFFFFFFF, v, lane);
}
template <class T>
DEVICE T shuffle_xor(T v, int mask) {
  return __shfl_xor_sync(0xFFFFFFFF, v, mask);
}

// Orders this thread's writes to global memory: whoever sees a write after the fence sees those before it.
DEVICE void memory_fence() { __threadfence(); }

// Adds to a word of global memory atomically; returns its value before.
DEVICE uint32_t atomic_add(uint32_t* p, uint32_t v) { return atomicAdd(p, v); }

// ---- memory, 16 bytes at a time; addresses are multiples of 16 ----------------------------------------------------

DEVICE uint4 load_16(const void* p) { return *static_cast<const uint4*>(p); }
DEVICE void store_16(void* p, uint4 v) { *static_cast<uint4*>(p) = v; }

// 4 bytes; the address is a multiple of 4. One instruction also where the pointer's type promises less alignment: the
// compiler makes of memcpy() to a bf16* a store for every byte.
DEVICE void store_4(void* p, uint32_t v) { *static_cast<uint32_t*>(p) = v; }

// For weights, read once a kernel and written by none that could overlap it: global memory, past the L1 cache.
DEVICE uint4 load_16_once(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Starts a copy of 16 bytes from global to shared memory; where not valid, `global` is not read and zeros are written.
// The copies since the last commit are one group. After wait<N>() this thread sees all its groups but the latest N, and
// others see them after a barrier. Until then the destination is undefined.
DEVICE void copy_async_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- Hopper: compute capability 9.0 alone ------------------------------------------------------------------------
// Kernels that call these have a body only where SPEED_HOPPER is defined; elsewhere they are compiled empty.

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define SPEED_HOPPER
#endif

// A barrier in shared memory (PTX ISA, "mbarrier"). A phase of it ends when `arrivals` threads have arrived and all
// bytes that were expected have been copied; then the next begins, with the same number of arrivals.
struct alignas(8) Barrier {
  uint64_t word;
};
DEVICE void barrier_init(Barrier* b, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals) : "memory");
}
// Called by the thread that initialized them, before the sync_threads() after which others use them.
DEVICE void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Arrives, and makes the phase wait for so many bytes more.
DEVICE void barrier_expect(Barrier* b, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes)
               : "memory");
}
DEVICE void barrier_arrive(Barrier* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}
// Waits for the end of the phase of this parity: phases are 0, 1, 0, ... A new barrier counts as after a phase 1.
DEVICE void barrier_wait(Barrier* b, int parity) {
  uint32_t ended;
  do {
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(ended)
                 : "r"(shared_address(b)), "r"(parity)
                 : "memory");
  } while (!ended);
}

// Starts a copy of rows [row, row + 128) of one head of a tensor that the host described (tensor_map, below) to a tile
// in shared memory, aligned to 1024; zeros for rows that the map does not have. Its bytes count for the barrier. The
// tile is E / 64 halves [128][64]; byte address bits 4 to 6 are exclusive-ored with bits 7 to 9. One thread calls it.
using TensorMap = CUtensorMap;
DEVICE void copy_tile(void* shared, const TensorMap& map, Barrier* b, int row, int head) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(b)), "r"(0), "r"(row), "r"(0), "r"(head)
      : "memory");
}

// Products of a warpgroup (PTX ISA, "wgmma"): 128 threads, all of which reach these together. A batch of products is a
// scope: { Products batch; warpgroup_product(...); ... }. They run in the background, in order: until
// products_wait<N>() has returned, which waits for all batches but the latest N, no result may be touched and no
// operand changed. settled() then keeps the compiler from reading a result before the wait.
struct Products {
  DEVICE Products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
  DEVICE ~Products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
};
template <int N>
DEVICE void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
template <int N>
DEVICE void settled(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// D [64, N] = A B, or += where `add`; N is 64 or 128, the inner size 16. In a warp of 16 rows D's layout is that of
// mma_m16n8k16 for each 8 columns: d[4 j + i] of thread g, t is element i of columns 8 j to 8 j + 7.
// The first takes A [64, 16] and B^T [N, 16] from shared memory, rows of 128 bytes. The second takes A from registers,
// as mma_m16n8k16 does, and B [16, N] from shared memory. `a` and `b` are matrix descriptors.
#define SPEED_REGISTERS_32                                                                                         \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define SPEED_REGISTERS_64                                                                                           \
  SPEED_REGISTERS_32                                                                                                 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, " \
  "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SPEED_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SPEED_D16(i) SPEED_D4(i), SPEED_D4(i + 4), SPEED_D4(i + 8), SPEED_D4(i + 12)
#define SPEED_D32(i) SPEED_D16(i), SPEED_D16(i + 16)

template <int N>
DEVICE void warpgroup_product(float (&d)[N / 2], uint64_t a, uint64_t b, bool add) {
  static_assert(N == 128);
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" SPEED_REGISTERS_64 "}, %64, %65, p, 1, 1, 0, 0;\n}"
      : SPEED_D32(0), SPEED_D32(32)
      : "l"(a), "l"(b), "r"(int(add)));
}
template <int N>
DEVICE void warpgroup_product(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b) {
  static_assert(N == 64 || N == 128);
  if constexpr (N == 128)
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" SPEED_REGISTERS_64
                 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
                 : SPEED_D32(0), SPEED_D32(32)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  else
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" SPEED_REGISTERS_32
                 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
                 : SPEED_D32(0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// Changes how many registers a thread of the warpgroup has: a multiple of 8, 24 to 256. Whole warpgroup.
template <int R>
DEVICE void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(R));
}
template <int R>
DEVICE void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(R));
}

// Named barriers, 1 to 15: one side waits until `threads` threads in all have come, the other comes and goes on.
DEVICE void named_barrier_wait(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
DEVICE void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- bf16, tensor cores -------------------------------------------------------------------------------------------
// Two bf16 to a word, the one of lower index in the lower half. PTX ISA, "Matrix fragments for mma.m16n8k16":
// with g = lane / 4 and t = lane % 4,
//   a  A [16, 16]: a[0] row g, columns 2t, 2t + 1;  a[1] row g + 8;  a[2], a[3] the same rows, columns 2t + 8, 2t + 9
//   b  B [16, 8]:  b[0] rows 2t, 2t + 1 of column g;  b[1] rows 2t + 8, 2t + 9
//   d  D [16, 8]:  d[0], d[1] row g, columns 2t, 2t + 1;  d[2], d[3] row g + 8

// Four 8x8 matrices of bf16 out of shared memory. Lane 8i + j names row j of matrix i: 16 bytes, aligned to 16.
// r[i] are elements 2t, 2t + 1 of row g of matrix i; transposed: of column g. Whole warp.
DEVICE void load_matrix_x4(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}
DEVICE void load_matrix_x4_transposed(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

// D += A B, fp32 sums of bf16 products. Whole warp.
DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Rounds to nearest, ties to even.
DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
DEVICE bf16 round_bf16(float x) { return {uint16_t(pack_bf16(x, 0.0f))}; }
DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
DEVICE uint32_t as_bits(float x) { return __float_as_uint(x); }
DEVICE float widen(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
DEVICE float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
DEVICE float high_bf16(uint32_t pair) { return __uint_as_float(pair & 0xFFFF0000); }

// The bytes of a (0 to 3) and b (4 to 7) that the four hexadecimal digits of `selector` name, lowest first.
DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }

// 2^x to 2 ulp; results below 2^-126 are 0.
DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- the host's side ----------------------------------------------------------------------------------------------

[[noreturn]] inline void fail(const std::string& call, const std::string& why, const std::string& hint, Where where) {
  const std::string file = where.file_name();
  throw Error(1, call + " (" + file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line()) + ")", why, hint);
}

inline void check(cudaError_t e, const char* call, Where where) {
  if (e == cudaSuccess) return;
  const char* hint = "a call after a fault names it late: run again with CUDA_LAUNCH_BLOCKING=1";
  if (e == cudaErrorMemoryAllocation) hint = "use a smaller -c, -n or --chunk, or a GPU that is free";
  if (e == cudaErrorNoDevice || e == cudaErrorInsufficientDriver) hint = "use --device cpu, or install a newer driver";
  if (e == cudaErrorNoKernelImageForDevice || e == cudaErrorUnsupportedPtxVersion)
    hint = "the program was built for other GPUs: build it here with make, or use --device cpu";
  if (e == cudaErrorInvalidConfiguration || e == cudaErrorInvalidValue)
    hint = "this is a fault of the program: report it";
  fail(call, std::string(cudaGetErrorName(e)) + ", " + cudaGetErrorString(e), hint, where);
}

inline void check(cublasStatus_t s, const char* call, Where where) {
  if (s == CUBLAS_STATUS_SUCCESS) return;
  fail(call, cublasGetStatusString(s), "run again with CUBLAS_LOGINFO_DBG=1 to see the call's arguments", where);
}

#define SPEED_CHECK(call, where) ::speed::check(call, #call, where)

struct Device {
  std::string name;
  int major = 0, minor = 0;  // compute capability
  int multiprocessors = 0;
  size_t free_bytes = 0, total_bytes = 0, l2_bytes = 0;
  int driver = 0, runtime = 0;  // versions as CUDA writes them: 13000 is 13.0
};

// The first visible GPU, made the current one. Error where there is none, or none that can run this program.
inline Device open_device(Where where = Where::current()) {
  int n = 0;
  const cudaError_t e = cudaGetDeviceCount(&n);
  if (e != cudaSuccess || n == 0)
    throw Error(1, "GPU", e == cudaSuccess ? "none visible" : cudaGetErrorString(e),
                "use --device cpu, or look at nvidia-smi and CUDA_VISIBLE_DEVICES");
  Device d;
  cudaDeviceProp p;
  SPEED_CHECK(cudaGetDeviceProperties(&p, 0), where);
  d.name = p.name, d.major = p.major, d.minor = p.minor;
  d.multiprocessors = p.multiProcessorCount, d.l2_bytes = size_t(p.l2CacheSize);
  if (d.major < 8)
    throw Error(1, "GPU",
                d.name + " has compute capability " + std::to_string(d.major) + "." + std::to_string(d.minor) +
                    ", 8.0 is needed",
                "use --device cpu");
  SPEED_CHECK(cudaSetDevice(0), where);
  SPEED_CHECK(cudaMemGetInfo(&d.free_bytes, &d.total_bytes), where);
  SPEED_CHECK(cudaDriverGetVersion(&d.driver), where);
  SPEED_CHECK(cudaRuntimeGetVersion(&d.runtime), where);
  return d;
}

// Device memory, aligned to 256, uninitialized. Error if there is not enough.
inline void* device_allocate(size_t bytes, Where where = Where::current()) {
  void* p = nullptr;
  const cudaError_t e = cudaMalloc(&p, bytes);
  if (e == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    size_t free = 0, total = 0;
    cudaMemGetInfo(&free, &total);
    fail("GPU memory", std::to_string(bytes >> 20) + " MiB needed, " + std::to_string(free >> 20) + " MiB free",
         "use a smaller -c, -n or --chunk, or a GPU that is free", where);
  }
  SPEED_CHECK(e, where);
  return p;
}
// Waits for all work on the device first. Null is allowed.
inline void device_free(void* p) noexcept { cudaFree(p); }

// Pinned memory of the host: the GPU copies from and to it by itself. Other memory goes through the driver's own, in
// pieces, while the caller waits.
inline void* host_allocate(size_t bytes, Where where = Where::current()) {
  void* p = nullptr;
  SPEED_CHECK(cudaMallocHost(&p, bytes), where);
  return p;
}
inline void host_free(void* p) noexcept { cudaFreeHost(p); }

// A queue of work for the GPU, which runs in order. The destructor waits for it.
class Stream {
 public:
  explicit Stream(Where where = Where::current()) {
    SPEED_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), where);
  }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() {
    cudaStreamSynchronize(stream_);
    cudaStreamDestroy(stream_);
  }
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

inline void synchronize(const Stream& s, Where where = Where::current()) {
  SPEED_CHECK(cudaStreamSynchronize(s.get()), where);
}
inline void copy_to_device(void* to, const void* from, size_t bytes, const Stream& s, Where where = Where::current()) {
  SPEED_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, s.get()), where);
}
inline void copy_to_host(void* to, const void* from, size_t bytes, const Stream& s, Where where = Where::current()) {
  SPEED_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, s.get()), where);
}
inline void copy_on_device(void* to, const void* from, size_t bytes, const Stream& s, Where where = Where::current()) {
  SPEED_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, s.get()), where);
}
inline void fill_bytes(void* to, int byte, size_t bytes, const Stream& s, Where where = Where::current()) {
  SPEED_CHECK(cudaMemsetAsync(to, byte, bytes, s.get()), where);
}

// The tensor [heads, rows, e] of bf16 at `base` for copy_tile(); pitches are the distances of two rows and of two
// heads, in values, multiples of 8. rows >= 1.
inline TensorMap tensor_map(const bf16* base, size_t rows, size_t heads, size_t row_pitch, size_t head_pitch, int e,
                            Where where = Where::current()) {
  static const auto encode = [where] {  // a function of the driver, which the program does not link with
    void* f = nullptr;
    cudaDriverEntryPointQueryResult found;
    SPEED_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &found),
                where);
    if (found != cudaDriverEntryPointSuccess) fail("cuTensorMapEncodeTiled", "not in the driver", "update it", where);
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(f);
  }();
  TensorMap map;
  const cuuint64_t sizes[] = {64, rows, cuuint64_t(e / 64), heads};
  const cuuint64_t pitches[] = {row_pitch * sizeof(bf16), 64 * sizeof(bf16), head_pitch * sizeof(bf16)};
  const cuuint32_t box[] = {64, 128, cuuint32_t(e / 64), 1}, every[] = {1, 1, 1, 1};
  const CUresult r = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, const_cast<bf16*>(base), sizes, pitches, box,
                            every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                            CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (r != CUDA_SUCCESS)
    fail("cuTensorMapEncodeTiled", "error " + std::to_string(int(r)), "this is a fault of the program: report it",
         where);
  return map;
}

// Queues kernel(args...) with grid.x * grid.y * grid.z blocks of block.x threads, a multiple of 32, and `shared_bytes`
// of shared memory a block. An empty grid queues nothing.
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, LaunchStream s, A&&... args) {
  if (size_t(grid.x) * grid.y * grid.z == 0) return;
  if (shared_bytes > 48 * 1024)
    SPEED_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)), s.where);
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = s.stream.get();
  SPEED_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<P>(std::forward<A>(args))...), s.where);
}

// A CUDA graph, captured from record(), which queues work without waiting, allocating or freeing; run() queues all of
// it again, with the same arguments.
class Graph {
 public:
  Graph() = default;
  template <class F>
  Graph(const Stream& s, F&& record, Where where = Where::current()) {
    cudaGraph_t graph = nullptr;
    SPEED_CHECK(cudaStreamBeginCapture(s.get(), cudaStreamCaptureModeThreadLocal), where);
    try {
      record();
    } catch (...) {
      if (cudaStreamEndCapture(s.get(), &graph) == cudaSuccess && graph) cudaGraphDestroy(graph);
      throw;
    }
    SPEED_CHECK(cudaStreamEndCapture(s.get(), &graph), where);
    const cudaError_t made = cudaGraphInstantiate(&run_, graph, 0);
    cudaGraphDestroy(graph);
    SPEED_CHECK(made, where);
  }
  Graph(Graph&& o) noexcept : run_(std::exchange(o.run_, nullptr)) {}
  Graph& operator=(Graph&& o) noexcept {
    std::swap(run_, o.run_);
    return *this;
  }
  ~Graph() {
    if (run_) cudaGraphExecDestroy(run_);
  }
  explicit operator bool() const { return run_ != nullptr; }
  void run(const Stream& s, Where where = Where::current()) const {
    SPEED_CHECK(cudaGraphLaunch(run_, s.get()), where);
  }

 private:
  cudaGraphExec_t run_ = nullptr;
};

// A point in time in a stream's work.
class Event {
 public:
  explicit Event(Where where = Where::current()) { SPEED_CHECK(cudaEventCreate(&event_), where); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  ~Event() { cudaEventDestroy(event_); }
  void record(const Stream& s, Where where = Where::current()) { SPEED_CHECK(cudaEventRecord(event_, s.get()), where); }
  // Between two events that the device has passed.
  double seconds_since(const Event& start, Where where = Where::current()) const {
    float ms = 0;
    SPEED_CHECK(cudaEventElapsedTime(&ms, start.event_, event_), where);
    return double(ms) * 1e-3;
  }

 private:
  cudaEvent_t event_ = nullptr;
};

// Matrix products by cuBLAS on the stream it is constructed with, which must outlive it.
class Blas {
 public:
  // With a workspace of its own, so that products can be captured in a graph and the same call gives the same bits.
  explicit Blas(const Stream& s, Where where = Where::current()) : workspace_(device_allocate(workspace_bytes, where)) {
    SPEED_CHECK(cublasCreate(&handle_), where);
    SPEED_CHECK(cublasSetStream(handle_, s.get()), where);
    SPEED_CHECK(cublasSetWorkspace(handle_, workspace_, workspace_bytes), where);
    SPEED_CHECK(cublasSetMathMode(handle_, CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION), where);
  }
  Blas(const Blas&) = delete;
  Blas& operator=(const Blas&) = delete;
  ~Blas() {
    cublasDestroy(handle_);
    device_free(workspace_);
  }

  // y = x w^T + beta y          x [n, in]; w [out, in]; y [n, out]; fp32 sums; y is not read where beta is 0
  void gemm(float* y, const bf16* x, const bf16* w, size_t n, size_t in, size_t out, float beta,
            Where where = Where::current()) {
    product(y, CUDA_R_32F, x, w, n, in, out, beta, where);
  }
  void gemm(bf16* y, const bf16* x, const bf16* w, size_t n, size_t in, size_t out, float beta,
            Where where = Where::current()) {
    product(y, CUDA_R_16BF, x, w, n, in, out, beta, where);
  }
  // y0 = x w0^T and y1 = x w1^T in one go: each alone may be too small for a whole GPU. w1 lies after w0, y1 after y0.
  void gemm_pair(bf16* y0, bf16* y1, const bf16* x, const bf16* w0, const bf16* w1, size_t n, size_t in, size_t out,
                 Where where = Where::current()) {
    if (n == 0) return;
    const float alpha = 1, beta = 0;
    SPEED_CHECK(cublasGemmStridedBatchedEx(handle_, CUBLAS_OP_T, CUBLAS_OP_N, int(out), int(n), int(in), &alpha, w0,
                                           CUDA_R_16BF, int(in), w1 - w0, x, CUDA_R_16BF, int(in), 0, &beta, y0,
                                           CUDA_R_16BF, int(out), y1 - y0, 2, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
                where);
  }

  static constexpr size_t workspace_bytes = size_t(32) << 20;  // NVIDIA's advice for Hopper

 private:
  // cuBLAS matrices are column-major: y^T = (w^T)^T x^T is the same memory.
  void product(void* y, cudaDataType type, const bf16* x, const bf16* w, size_t n, size_t in, size_t out, float beta,
               Where where) {
    if (n == 0) return;
    const float alpha = 1;
    SPEED_CHECK(
        cublasGemmEx(handle_, CUBLAS_OP_T, CUBLAS_OP_N, int(out), int(n), int(in), &alpha, w, CUDA_R_16BF, int(in), x,
                     CUDA_R_16BF, int(in), &beta, y, type, int(out), CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
        where);
  }

  void* workspace_ = nullptr;
  cublasHandle_t handle_ = nullptr;
};

}  // namespace speed

#endif
