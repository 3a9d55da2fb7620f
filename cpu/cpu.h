// cpu.h - `Cpu`, the backend for a CPU: the operations of reference.h made fast, under the names that speed.cu calls.
//
// Products of many rows go through OpenBLAS, products of few rows through loops that read each weight once, attention
// through attention.h. Activations and KV cache are fp32. Weights are bf16 and read where they are in the mapped file.
// No result depends on the number of threads: work is split by sizes that do not, and one thread makes a whole sum.
#pragma once

#include <cblas.h>
#include <omp.h>
#include <sys/mman.h>
#include <unistd.h>

#include <bit>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <vector>

#include "../model.h"
#include "attention.h"
#include "reference.h"

namespace speed {

// ---- the backend --------------------------------------------------------------------------------------------------

struct Cpu {
  using Residual = float;
  using Activation = float;
  using CacheValue = float;
  static constexpr const char* name = "cpu";
  static constexpr size_t default_chunk = 512;  // rows of a prompt that go through a layer together

  template <class T>
  struct Buffer {
    std::unique_ptr<T, void (*)(void*)> data{nullptr, std::free};
    size_t size = 0;
    Buffer() = default;
    explicit Buffer(size_t n) : size(n) {
      // Buffers of 2 MiB and more use huge pages: in pages of 4 KiB reads are a third slower.
      const size_t page = n * sizeof(T) < large_page ? 64 : large_page;
      const size_t bytes = std::max<size_t>((n * sizeof(T) + page - 1) / page, 1) * page;
      data.reset(static_cast<T*>(std::aligned_alloc(page, bytes)));
      if (data && page == large_page) ::madvise(data.get(), bytes, MADV_HUGEPAGE);
      if (!data) throw Error(1, "memory", std::to_string(bytes) + " bytes refused", "use a smaller -c, -n or --chunk");
    }
    T* get() const { return data.get(); }
  };

  static constexpr size_t large_page = size_t(2) << 20;  // bytes

  // Multiply-adds below which one thread has finished before a second has woken up.
  static constexpr size_t min_parallel_work = 1 << 17;
  // Up to so many rows a product reads each weight once and is as fast as memory; for more, OpenBLAS is faster.
  static constexpr size_t gemv_rows = 8;

  Counters counters;

  explicit Cpu(int threads = 0) {
    openblas_set_num_threads(1);  // OpenMP makes the threads, each calls a product of its own
    if (threads > 0) omp_set_num_threads(threads);
  }

  // ---- memory: all of it is the host's, and weights stay in the mapped file ----

  void check(const Shape&) const {}  // every shape is supported
  uint64_t bytes_to_load(const Model&) const { return 0; }
  const Weights& load(const Model& model) { return model.weights; }
  // Where address space is limited (ulimit -v), 320 MiB a thread stay free: for stacks and glibc's arenas, without which
  // OpenMP aborts, and for OpenBLAS's buffer of 128 MiB, which it tries to get for ever (its memory.c, 0.3.21).
  uint64_t available_memory() const {
    const uint64_t threads = uint64_t(omp_get_max_threads()) * (320 << 20), left = address_space_left();
    return std::min(speed::available_memory(), left > threads ? left - threads : 0);
  }
  template <class T>
  void upload(T* to, const T* from, size_t n) {
    std::copy_n(from, n, to);
  }
  template <class T>
  void download(T* to, const T* from, size_t n) {
    std::copy_n(from, n, to);
  }
  // A pointer at which the host can read n values, until the next call.
  const float* on_host(const float* p, size_t) { return p; }
  void wait() {}  // for operations still running: there are none

  // One decode step. A GPU captures it as a graph and replays that; here it simply runs.
  struct Step {};
  template <class Work>
  void replay(Step&, Work work) {
    work();
  }

  // ---- operations ----

  // x[r] = table[ids[r]]          table [V, d]; ids [n]; x [n, d]
  void embed(float* x, const bf16* table, const int* ids, size_t n, size_t d) {
    for (size_t r = 0; r < n; ++r) widen(x + r * d, table + size_t(ids[r]) * d, d);
  }

  void rmsnorm(float* y, const float* x, const bf16* w, size_t n, size_t d, float eps) {
    counters.weight_bytes += d * sizeof(bf16);
    each_row(n, d, [&](size_t r) {
      const float* a = x + r * d;
      float* b = y + r * d;
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (size_t i = 0; i < d; ++i) sum += a[i] * a[i];
      const float scale = 1 / std::sqrt(sum / float(d) + eps);
      for (size_t i = 0; i < d; ++i) b[i] = a[i] * scale * to_float(w[i]);
    });
  }

  // y = x w^T, or y += x w^T          x [n, in]; w [out, in]; y [n, out]
  // Few rows: each weight is read once, at the speed of memory. Many rows: a thread widens a panel of weight rows to
  // fp32, small enough for its L2 cache, and calls OpenBLAS on it. A whole matrix is never copied.
  void matmul(float* y, const float* x, const bf16* w, size_t n, size_t in, size_t out, bool add = false) {
    if (n == 0) return;
    counters.product(n, in, out);
    if (n <= gemv_rows)
      return each_row(out, n * in, [&](size_t o) {
        fast::dots(w + o * in, x, n, in,
                   [&](size_t r, float sum) { y[r * out + o] = sum + (add ? y[r * out + o] : 0); });
      });
    const size_t panel = panel_rows(out);
    each_panel(out, panel, panel * in, [&](size_t o, size_t rows, float* wide) {
      widen(wide, w + o * in, rows * in);
      cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, int(n), int(rows), int(in), 1, x, int(in), wide, int(in),
                  add ? 1 : 0, y + o, int(out));
    });
  }

  // Queries, rotated: q = rope(a wq^T)          a [n, d]; wq [n_heads head_dim, d]; cos, sin [n, head_dim/2]
  void project_q(float* q, const float* a, const bf16* wq, const float* cos, const float* sin, size_t n, size_t d,
                 size_t n_heads, size_t head_dim) {
    matmul(q, a, wq, n, d, n_heads * head_dim);
    rope(q, cos, sin, n, n_heads, head_dim);
  }

  // Keys rope(a wk^T) and values a wv^T, appended to a KV cache; k, v [n, n_kv_heads, head_dim] are scratch memory.
  void project_kv(LayerCache<float>& cache, float* k, float* v, const float* a, const bf16* wk, const bf16* wv,
                  const float* cos, const float* sin, size_t n, size_t d, size_t n_kv_heads, size_t head_dim) {
    const size_t width = n_kv_heads * head_dim;
    if (n <= gemv_rows) {  // both in one loop: each alone is too little work for several threads
      counters.product(n, d, 2 * width);
      each_row(2 * width, n * d, [&](size_t o) {
        const size_t i = o % width;
        fast::dots((o < width ? wk : wv) + i * d, a, n, d,
                   [&](size_t r, float sum) { (o < width ? k : v)[r * width + i] = sum; });
      });
    } else {
      matmul_pair(a, wk, wv, n, d, width, [&](size_t r, size_t o, const float* key, const float* value, size_t m) {
        std::copy_n(key, m, k + r * width + o);
        std::copy_n(value, m, v + r * width + o);
      });
    }
    rope(k, cos, sin, n, n_kv_heads, head_dim);
    append(cache, k, v, n, n_kv_heads, head_dim);
  }

  // gate = silu(a wg^T) * (a wu^T)          a [n, d]; wg, wu [f, d]; gate [n, f]
  void mlp_gate_up(float* gate, float*, const float* a, const bf16* wg, const bf16* wu, size_t n, size_t d, size_t f) {
    if (n <= gemv_rows) {
      counters.product(n, d, 2 * f);
      return each_row(f, 2 * n * d, [&](size_t o) {
        fast::dots(wg + o * d, a, n, d, [&](size_t r, float sum) { gate[r * f + o] = silu(sum); });
        fast::dots(wu + o * d, a, n, d, [&](size_t r, float sum) { gate[r * f + o] *= sum; });
      });
    }
    matmul_pair(a, wg, wu, n, d, f, [&](size_t r, size_t o, const float* g, const float* u, size_t m) {
      float* to = gate + r * f + o;
#pragma omp simd
      for (size_t i = 0; i < m; ++i) to[i] = silu(g[i]) * u[i];
    });
  }

  // *best = the id of the largest of logits [vocab], on ties the smallest; throws if any is NaN
  void arg_max(int* best, const float* logits, size_t vocab) { *best = speed::arg_max(logits, vocab); }

  // cos, sin [n, half] of position * frequency          frequencies [half]; positions [n]
  // The angle is formed in fp32, as Hugging Face does: float64 would be more exact, and differ by 3e-6 at position 600.
  void rope_angles(float* cos, float* sin, const float* frequencies, const int* positions, size_t n, size_t half) {
#pragma omp parallel for if (n > 1)
    for (size_t r = 0; r < n; ++r)
      for (size_t i = 0; i < half; ++i) {
        const float angle = float(positions[r]) * frequencies[i];
        cos[r * half + i] = std::cos(angle);
        sin[r * half + i] = std::sin(angle);
      }
  }

  void rope(float* x, const float* cos, const float* sin, size_t n, size_t heads, size_t head_dim) {
    const size_t width = heads * head_dim, half = head_dim / 2;
    each_row(n, width,
             [&](size_t r) { reference::rope(x + r * width, cos + r * half, sin + r * half, 1, heads, head_dim); });
  }

  // Appends n slots to a layer's KV cache.          k, v [n, n_kv_heads, head_dim]; precondition: they fit
  void append(LayerCache<float>& cache, const float* k, const float* v, size_t n, size_t n_kv_heads, size_t head_dim) {
    for (size_t r = 0; r < n; ++r)
      for (size_t h = 0; h < n_kv_heads; ++h) {
        const size_t from = (r * n_kv_heads + h) * head_dim, to = (h * cache.capacity + cache.used + r) * head_dim;
        std::memcpy(cache.k + to, k + from, head_dim * sizeof(float));
        std::memcpy(cache.v + to, v + from, head_dim * sizeof(float));
      }
    cache.used += n;
  }

  void attention(float* o, const float* q, const LayerCache<float>& cache, size_t n, size_t seen, size_t n_heads,
                 size_t n_kv_heads, size_t head_dim) {
    counters.attention(n, seen, n_heads, n_kv_heads, head_dim, sizeof(float));
    if (n > 1) return fast::attend_rows(o, q, cache, n, seen, n_heads, n_kv_heads, head_dim);
    auto row = [&](auto size) {
      fast::attend_row(o, q, cache, seen, n_heads, n_kv_heads, size, partials_,
                       seen * n_heads * head_dim > min_parallel_work / 2);
    };
    if (head_dim == 64) row(std::integral_constant<size_t, 64>());
    else if (head_dim == 128) row(std::integral_constant<size_t, 128>());
    else row(head_dim);
  }

  static float silu(float x) { return x / (1 + fast::exp(-x)); }

 private:
  std::vector<Buffer<float>> scratch_;  // [threads], a panel of weights in fp32 and results of matmul_pair
  std::vector<float> partials_;         // partial results of one row's attention

  // work(o) for all o < rows, each of `terms` multiply-adds. A thread gets a run of rows, first long ones, then shorter
  // ones: long runs read memory fastest, and short ones at the end let all threads finish together.
  template <class Work>
  static void each_row(size_t rows, size_t terms, Work work) {
    if (rows * terms <= min_parallel_work) {
      for (size_t o = 0; o < rows; ++o) work(o);
      return;
    }
#pragma omp parallel for schedule(guided, 8)
    for (size_t o = 0; o < rows; ++o) work(o);
  }

  // Rows of a panel: few enough that every processor gets one and it fits the L2 cache, many enough for a fast product.
  // The number of panels is even, so that two threads finish together. OpenBLAS's results depend on the panel in their
  // last bits, so it is the same for any number of threads.
  static size_t panel_rows(size_t out) {
    static const long processors = std::max(1L, ::sysconf(_SC_NPROCESSORS_ONLN));
    const size_t max_rows = std::clamp<size_t>(out / size_t(processors), 96, 288);
    const size_t panels = 2 * ((out + 2 * max_rows - 1) / (2 * max_rows));
    return (out + panels - 1) / panels;
  }

  // work(first row, rows, scratch) for all panels of a matrix, each by one thread, with scratch memory of `floats`.
  template <class Work>
  void each_panel(size_t out, size_t panel, size_t floats, Work work) {
    scratch_.resize(omp_get_max_threads());
    for (auto& buffer : scratch_)
      if (buffer.size < floats) buffer = Buffer<float>(floats);
#pragma omp parallel for schedule(dynamic)
    for (size_t o = 0; o < out; o += panel) work(o, std::min(panel, out - o), scratch_[omp_get_thread_num()].get());
  }

  // Calls use(row, o, first, second, columns) with columns [o, o + columns) of x w1^T and x w2^T, for every row and
  // panel. The same rows of both matrices form one product, whose results are used while they are in the L2 cache.
  template <class Use>
  void matmul_pair(const float* x, const bf16* w1, const bf16* w2, size_t n, size_t in, size_t out, Use use) {
    if (n == 0) return;
    counters.product(n, in, 2 * out);
    constexpr size_t max_rows = 512;
    const size_t panel = panel_rows(out);
    each_panel(out, panel, 2 * panel * (in + std::min(n, max_rows)), [&](size_t o, size_t columns, float* wide) {
      float* y = wide + 2 * panel * in;  // [rows, 2 columns]
      widen(wide, w1 + o * in, columns * in);
      widen(wide + columns * in, w2 + o * in, columns * in);
      for (size_t r0 = 0; r0 < n; r0 += max_rows) {
        const size_t rows = std::min(max_rows, n - r0);
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, int(rows), int(2 * columns), int(in), 1, x + r0 * in,
                    int(in), wide, int(in), 0, y, int(2 * columns));
        for (size_t r = 0; r < rows; ++r) use(r0 + r, o, y + 2 * r * columns, y + (2 * r + 1) * columns, columns);
      }
    });
  }

  static void widen(float* y, const bf16* x, size_t n) {
#pragma omp simd
    for (size_t i = 0; i < n; ++i) y[i] = to_float(x[i]);
  }
};

}  // namespace speed
