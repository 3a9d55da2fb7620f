// cpu.h - every operation of the model, defined in plain C++ and then made fast for a CPU.
//
// First the definitions (namespace definition): loops that say what is computed and nothing else. They are the oracle
// of the tests. Then `Cpu`, the same operations as forward.h calls them: products of many rows through OpenBLAS, of few
// by loops that read each weight once, attention by attention.h. Activations and cache are fp32, weights bf16 and read
// where they lie in the file. No result depends on the number of threads: work is cut by sizes fixed for the machine,
// and every sum is made by one thread.
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

#include "attention.h"
#include "model.h"

namespace speed {

// ---- definitions --------------------------------------------------------------------------------------------------

namespace definition {

// y[r] = x[r] / sqrt(mean(x[r]^2) + eps) * w          x, y [n, d]; w [d]          Zhang & Sennrich, arXiv 1910.07467
inline void rmsnorm(float* y, const float* x, const bf16* w, size_t n, size_t d, float eps) {
  for (size_t r = 0; r < n; ++r) {
    double sum = 0;
    for (size_t i = 0; i < d; ++i) sum += double(x[r * d + i]) * x[r * d + i];
    const float scale = float(1 / std::sqrt(sum / double(d) + eps));
    for (size_t i = 0; i < d; ++i) y[r * d + i] = x[r * d + i] * scale * to_float(w[i]);
  }
}

// y = x w^T, or y += x w^T          x [n, in]; w [out, in]; y [n, out]
inline void matmul(float* y, const float* x, const bf16* w, size_t n, size_t in, size_t out, bool add) {
  for (size_t r = 0; r < n; ++r)
    for (size_t o = 0; o < out; ++o) {
      double sum = 0;
      for (size_t i = 0; i < in; ++i) sum += double(x[r * in + i]) * to_float(w[o * in + i]);
      y[r * out + o] = float(sum) + (add ? y[r * out + o] : 0);
    }
}

// Rotates the pairs (i, i + head_dim/2) of every head by the angle of its row.          Su et al., arXiv 2104.09864
// x [n, heads, head_dim], in place; cos, sin [n, head_dim/2]
inline void rope(float* x, const float* cos, const float* sin, size_t n, size_t heads, size_t head_dim) {
  const size_t half = head_dim / 2;
  for (size_t r = 0; r < n; ++r)
    for (size_t h = 0; h < heads; ++h) {
      float* p = x + (r * heads + h) * head_dim;
      for (size_t i = 0; i < half; ++i) {
        const float a = p[i], b = p[i + half], c = cos[r * half + i], s = sin[r * half + i];
        p[i] = a * c - b * s;
        p[i + half] = b * c + a * s;
      }
    }
}

// Grouped-query attention: row r sees the first seen + r slots of the cache.          Ainslie et al., arXiv 2305.13245
// o, q [n, n_heads, head_dim]; query head h reads key head h / (n_heads / n_kv_heads)
inline void attention(float* o, const float* q, const LayerCache<float>& cache, size_t n, size_t seen, size_t n_heads,
                      size_t n_kv_heads, size_t head_dim) {
  const double scale = 1 / std::sqrt(double(head_dim));
  for (size_t r = 0; r < n; ++r)
    for (size_t h = 0; h < n_heads; ++h) {
      const size_t first = h / (n_heads / n_kv_heads) * cache.capacity * head_dim;
      const float* query = q + (r * n_heads + h) * head_dim;
      std::vector<double> p(seen + r);
      double most = -INFINITY, sum = 0;
      for (size_t s = 0; s < p.size(); ++s) {
        p[s] = 0;
        for (size_t i = 0; i < head_dim; ++i) p[s] += double(query[i]) * cache.k[first + s * head_dim + i];
        most = std::max(most, p[s] *= scale);
      }
      for (double& x : p) sum += x = std::exp(x - most);
      for (size_t i = 0; i < head_dim; ++i) {
        double value = 0;
        for (size_t s = 0; s < p.size(); ++s) value += p[s] * cache.v[first + s * head_dim + i];
        o[(r * n_heads + h) * head_dim + i] = float(value / sum);
      }
    }
}

// gate = silu(gate) * up, silu(x) = x / (1 + e^-x)          gate, up [n]          Shazeer, arXiv 2002.05202
inline void swiglu(float* gate, const float* up, size_t n) {
  for (size_t i = 0; i < n; ++i) gate[i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
}

}  // namespace definition

// ---- RoPE's angles ------------------------------------------------------------------------------------------------

// Inverse frequencies, [head_dim/2], in fp32 as Hugging Face forms them, with Llama-3's scaling where the model has it:
// wavelengths beyond original_context / low_freq_factor are stretched by `factor`, those below original_context /
// high_freq_factor kept, those between interpolated.
inline std::vector<float> rope_frequencies(const Config& config, const float* divisors) {
  const int half = config.shape.head_dim / 2;
  std::vector<float> f(half);
  for (int i = 0; i < half; ++i) {
    f[i] = 1.0f / std::pow(float(config.rope_theta), float(2 * i) / float(config.shape.head_dim));
    if (divisors) f[i] /= divisors[i];
    if (!config.rope_scaling) continue;
    const RopeScaling& s = *config.rope_scaling;
    const float wavelength = float(2 * M_PI) / f[i];
    const float low = float(s.original_context) / s.low_freq_factor,
                high = float(s.original_context) / s.high_freq_factor;
    if (wavelength > low) {
      f[i] /= s.factor;
    } else if (wavelength >= high) {
      const float smooth =
          (float(s.original_context) / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor);
      f[i] = (1 - smooth) * (f[i] / s.factor) + smooth * f[i];
    }
  }
  return f;
}

// ---- the backend --------------------------------------------------------------------------------------------------

struct Counters {
  uint64_t flops = 0;         // matrix products and attention, 2 a multiply-add
  uint64_t weight_bytes = 0;  // parameters read, once a product
  uint64_t kv_bytes = 0;      // cache read: the slots that were there before the call's own rows, once a call
  // n rows times a matrix [out, in]
  void product(size_t n, size_t in, size_t out) {
    flops += 2 * n * in * out;
    weight_bytes += n ? in * out * sizeof(bf16) : 0;
  }
  // n rows, of which row r sees seen + r slots of a cache whose values have value_bytes each
  void attention(size_t n, size_t seen, size_t n_heads, size_t n_kv_heads, size_t head_dim, size_t value_bytes) {
    flops += 4 * n_heads * head_dim * (n * seen + n * (n - 1) / 2);
    kv_bytes += (seen - 1) * 2 * n_kv_heads * head_dim * value_bytes;
  }
  Counters operator-(const Counters& o) const {
    return {flops - o.flops, weight_bytes - o.weight_bytes, kv_bytes - o.kv_bytes};
  }
  Counters& operator+=(const Counters& o) {
    flops += o.flops, weight_bytes += o.weight_bytes, kv_bytes += o.kv_bytes;
    return *this;
  }
};

inline Error not_a_number() {
  return Error(1, "logits", "not a number", "the weights are damaged: export the checkpoint again");
}

// The id of the largest logit, the first of equals. A NaN anywhere is an error, never an answer.
inline int arg_max(const float* logits, size_t vocab) {
  size_t best = 0;
  bool nan = false;
  for (size_t i = 0; i < vocab; ++i) {
    nan |= std::isnan(logits[i]);
    if (logits[i] > logits[best]) best = i;
  }
  if (nan) throw not_a_number();
  return int(best);
}

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
      // In large pages, where it is large: memory in 4 KiB pages is read a third slower.
      const size_t page = n * sizeof(T) < large_page ? 64 : large_page;
      const size_t bytes = std::max<size_t>((n * sizeof(T) + page - 1) / page, 1) * page;
      data.reset(static_cast<T*>(std::aligned_alloc(page, bytes)));
      if (data && page == large_page) ::madvise(data.get(), bytes, MADV_HUGEPAGE);
      if (!data) throw Error(1, "memory", std::to_string(bytes) + " bytes refused", "use a smaller -c, -n or --chunk");
    }
    T* get() const { return data.get(); }
  };

  static constexpr size_t large_page = size_t(2) << 20;  // bytes

  // Multiply-adds below which one thread is done before a second has woken up.
  static constexpr size_t worth_threads = 1 << 17;
  // Rows for which weights are read once, at the speed of memory; for more they are widened for OpenBLAS.
  static constexpr size_t few = 8;

  Counters counters;

  explicit Cpu(int threads = 0) {
    openblas_set_num_threads(1);  // OpenMP makes the threads, each calls a product of its own
    if (threads > 0) omp_set_num_threads(threads);
  }

  // ---- memory: all of it is the host's, and weights are used where they lie ----

  void check(const Shape&) const {}  // any shape will do
  uint64_t bytes_to_load(const Model&) const { return 0; }
  const Weights& load(const Model& model) { return model.weights; }
  // Where address space is limited, the threads' share of it is not for caches: stacks and glibc's arenas, without
  // which OpenMP ends the program with words of its own, and 128 MiB each at OpenBLAS's first product, which it tries
  // to get for ever (its memory.c, 0.3.21).
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
  // Where the host can read n values until the next call.
  const float* on_host(const float* p, size_t) { return p; }
  void wait() {}  // until all that was asked for is done

  // The work of one generated token, the same each time but for what upload() brought.
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

  // Few rows: read each weight once, at the speed of memory. Many rows: a thread widens a panel of weight rows to fp32,
  // small enough for its cache, and hands it to OpenBLAS; there is never a second copy of a whole matrix.
  void matmul(float* y, const float* x, const bf16* w, size_t n, size_t in, size_t out, bool add = false) {
    if (n == 0) return;
    counters.product(n, in, out);
    if (n <= few)
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

  // Queries: q = rope(a wq^T)          a [n, d]; wq [n_heads head_dim, d]; cos, sin [n, head_dim/2]
  void queries(float* q, const float* a, const bf16* wq, const float* cos, const float* sin, size_t n, size_t d,
               size_t n_heads, size_t head_dim) {
    matmul(q, a, wq, n, d, n_heads * head_dim);
    rope(q, cos, sin, n, n_heads, head_dim);
  }

  // Keys rope(a wk^T) and values a wv^T, appended to a cache; k, v [n, n_kv_heads, head_dim] are room for them.
  void keys_values(LayerCache<float>& cache, float* k, float* v, const float* a, const bf16* wk, const bf16* wv,
                   const float* cos, const float* sin, size_t n, size_t d, size_t n_kv_heads, size_t head_dim) {
    const size_t width = n_kv_heads * head_dim;
    if (n <= few) {  // in one loop, for each has little to do
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
  void gated(float* gate, float*, const float* a, const bf16* wg, const bf16* wu, size_t n, size_t d, size_t f) {
    if (n <= few) {
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

  // *best = the id of the largest of logits [vocab], the first of equals; an error where one is NaN
  void arg_max(int* best, const float* logits, size_t vocab) { *best = speed::arg_max(logits, vocab); }

  // cos, sin [n, half] of position * frequency          frequencies [half]; positions [n]
  // The angle is formed in fp32, as Hugging Face does: float64 would be truer, and differ by 3e-6 at 600 tokens.
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
             [&](size_t r) { definition::rope(x + r * width, cos + r * half, sin + r * half, 1, heads, head_dim); });
  }

  // Appends n slots to a layer's cache.          k, v [n, n_kv_heads, head_dim]; precondition: they fit
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
      fast::attend_row(o, q, cache, seen, n_heads, n_kv_heads, size, parts_,
                       seen * n_heads * head_dim > worth_threads / 2);
    };
    if (head_dim == 64) row(std::integral_constant<size_t, 64>());
    else if (head_dim == 128) row(std::integral_constant<size_t, 128>());
    else row(head_dim);
  }

  static float silu(float x) { return x / (1 + fast::exp(-x)); }

 private:
  std::vector<Buffer<float>> room_;  // [threads], a panel of weights in fp32, and a pair's results
  std::vector<float> parts_;         // of one row's attention

  // work(o) for all o < rows, each of `terms` multiply-adds. Threads take runs of rows, shorter and shorter: long ones
  // are read fastest, and two processors rarely get an equal share of the memory's bandwidth.
  template <class Work>
  static void each_row(size_t rows, size_t terms, Work work) {
    if (rows * terms <= worth_threads) {
      for (size_t o = 0; o < rows; ++o) work(o);
      return;
    }
#pragma omp parallel for schedule(guided, 8)
    for (size_t o = 0; o < rows; ++o) work(o);
  }

  // Rows of a panel: few enough that every processor gets one and it fits its cache, many enough for a fast product;
  // and an even number of panels, so that two end together. OpenBLAS's results depend on it in their last bits, so it
  // is the same for any number of threads.
  static size_t panel_rows(size_t out) {
    static const long processors = std::max(1L, ::sysconf(_SC_NPROCESSORS_ONLN));
    const size_t most = std::clamp<size_t>(out / size_t(processors), 96, 288);
    const size_t panels = 2 * ((out + 2 * most - 1) / (2 * most));
    return (out + panels - 1) / panels;
  }

  // work(first row, rows, room) for all panels of a matrix, each by one thread, with room for `floats`.
  template <class Work>
  void each_panel(size_t out, size_t panel, size_t floats, Work work) {
    room_.resize(omp_get_max_threads());
    for (auto& buffer : room_)
      if (buffer.size < floats) buffer = Buffer<float>(floats);
#pragma omp parallel for schedule(dynamic)
    for (size_t o = 0; o < out; o += panel) work(o, std::min(panel, out - o), room_[omp_get_thread_num()].get());
  }

  // use(row, o, first, second, columns) of x w1^T and x w2^T, for every row and piece [o, o + columns) of it. The same
  // rows of both matrices make one product, whose results are used before they leave the cache.
  template <class Use>
  void matmul_pair(const float* x, const bf16* w1, const bf16* w2, size_t n, size_t in, size_t out, Use use) {
    if (n == 0) return;
    counters.product(n, in, 2 * out);
    constexpr size_t most_rows = 512;
    const size_t panel = panel_rows(out);
    each_panel(out, panel, 2 * panel * (in + std::min(n, most_rows)), [&](size_t o, size_t columns, float* wide) {
      float* y = wide + 2 * panel * in;  // [rows, 2 columns]
      widen(wide, w1 + o * in, columns * in);
      widen(wide + columns * in, w2 + o * in, columns * in);
      for (size_t r0 = 0; r0 < n; r0 += most_rows) {
        const size_t rows = std::min(most_rows, n - r0);
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, int(rows), int(2 * columns), int(in), 1, x + r0 * in,
                    int(in), wide, int(in), 0, y, int(2 * columns));
        for (size_t r = 0; r < rows; ++r) use(r0 + r, o, y + 2 * r * columns, y + (2 * r + 1) * columns, columns);
      }
    });
  }

  static void widen(float* y, const bf16* x, size_t n) {
#pragma omp simd
    for (size_t i = 0; i < n; ++i) y[i] = std::bit_cast<float>(uint32_t(x[i].bits) << 16);
  }
};

}  // namespace speed
