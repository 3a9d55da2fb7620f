// cpu.h - every operation of the model, defined in plain C++ and then made fast for a CPU.
//
// First the definitions (namespace definition): loops that say what is computed and nothing else. They are the oracle
// of the tests. Then `Cpu`, the same operations as forward.h calls them: many rows through OpenBLAS, a single row by a
// loop the compiler vectorises. Activations and cache are fp32, weights bf16 and read where they lie in the file.
// No result depends on the number of threads: work is cut by sizes fixed for the machine, and every sum is made by one
// thread.
#pragma once

#include <cblas.h>
#include <omp.h>
#include <sys/mman.h>
#include <unistd.h>

#include <bit>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

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
#pragma omp parallel for if (n > 1)
    for (size_t r = 0; r < n; ++r) {
      const float* a = x + r * d;
      float* b = y + r * d;
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (size_t i = 0; i < d; ++i) sum += a[i] * a[i];
      const float scale = 1 / std::sqrt(sum / float(d) + eps);
      for (size_t i = 0; i < d; ++i) b[i] = a[i] * scale * to_float(w[i]);
    }
  }

  // One row: read each weight once, at the speed of memory. Many rows: a thread widens a panel of weight rows to fp32,
  // small enough for its cache, and hands it to OpenBLAS; there is never a second copy of a whole matrix.
  void matmul(float* y, const float* x, const bf16* w, size_t n, size_t in, size_t out, bool add = false) {
    if (n == 0) return;
    counters.product(n, in, out);
    if (n == 1) return each_row(out, in, [&](size_t o) { y[o] = dot(w + o * in, x, in) + (add ? y[o] : 0); });
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
    if (n == 1) {  // in one loop, for each has little to do
      counters.product(1, d, 2 * width);
      each_row(2 * width, d, [&](size_t o) {
        if (o < width) k[o] = dot(wk + o * d, a, d);
        else v[o - width] = dot(wv + (o - width) * d, a, d);
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
    if (n == 1) {
      counters.product(1, d, 2 * f);
      return each_row(f, 2 * d, [&](size_t o) { gate[o] = silu(dot(wg + o * d, a, d)) * dot(wu + o * d, a, d); });
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
#pragma omp parallel for if (n > 1)
    for (size_t r = 0; r < n; ++r)
      definition::rope(x + r * heads * head_dim, cos + r * head_dim / 2, sin + r * head_dim / 2, 1, heads, head_dim);
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

  // Scores and sums are made a block of slots at a time, the softmax is kept running (Milakov & Gimelshein, arXiv
  // 1805.02867), so no matrix of rows x slots ever exists.
  void attention(float* o, const float* q, const LayerCache<float>& cache, size_t n, size_t seen, size_t n_heads,
                 size_t n_kv_heads, size_t head_dim) {
    counters.attention(n, seen, n_heads, n_kv_heads, head_dim, sizeof(float));
    if (n == 1) return attend_one(o, q, cache, seen, n_heads, n_kv_heads, head_dim);
    // Many rows: for a block of rows and the query heads that share a key head, scores and values are matrix products.
    constexpr size_t row_block = 64;
    const size_t blocks = (n + row_block - 1) / row_block, group = n_heads / n_kv_heads, width = n_heads * head_dim;
    const float scale = 1 / std::sqrt(float(head_dim));
#pragma omp parallel
    {
      const size_t most_rows = group * row_block;
      std::vector<float> query(most_rows * head_dim), out(most_rows * head_dim), score(most_rows * slot_block),
          most(most_rows), sum(most_rows);
#pragma omp for schedule(dynamic)
      for (size_t item = 0; item < blocks * n_kv_heads; ++item) {  // the last rows see most, so they are begun first
        const size_t r0 = (blocks - 1 - item / n_kv_heads) * row_block, g = item % n_kv_heads,
                     rows = std::min(row_block, n - r0), all = rows * group, first = g * cache.capacity * head_dim;
        // Row r of head g * group + j is row r * group + j here.
        for (size_t r = 0; r < rows; ++r)
          std::copy_n(q + (r0 + r) * width + g * group * head_dim, group * head_dim,
                      query.data() + r * group * head_dim);
        std::fill(out.begin(), out.end(), 0.0f);
        std::fill(most.begin(), most.end(), -INFINITY);
        std::fill(sum.begin(), sum.end(), 0.0f);
        for (size_t s0 = 0; s0 < seen + r0 + rows - 1; s0 += slot_block) {
          const size_t slots = std::min(slot_block, seen + r0 + rows - 1 - s0);
          const float *k = cache.k + first + s0 * head_dim, *v = cache.v + first + s0 * head_dim;
          cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, int(all), int(slots), int(head_dim), scale, query.data(),
                      int(head_dim), k, int(head_dim), 0, score.data(), int(slot_block));
          for (size_t i = 0; i < all; ++i) {
            const size_t sees = seen + r0 + i / group, visible = sees > s0 ? std::min(slots, sees - s0) : 0;
            softmax_step(score.data() + i * slot_block, visible, slots, most[i], sum[i], out.data() + i * head_dim,
                         head_dim);
          }
          cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, int(all), int(head_dim), int(slots), 1, score.data(),
                      int(slot_block), v, int(head_dim), 1, out.data(), int(head_dim));
        }
        for (size_t i = 0; i < all; ++i)
          for (size_t e = 0; e < head_dim; ++e)
            o[(r0 + i / group) * width + (g * group + i % group) * head_dim + e] = out[i * head_dim + e] / sum[i];
      }
    }
  }

  static float silu(float x) { return x / (1 + exp(-x)); }

  // e^x to 2 ulp, in steps the compiler can vectorise (it cannot vectorise std::exp): e^x = 2^n e^r with |r| <= ln2 /
  // 2, e^r by its polynomial (Cephes). Below -87 it stays at e^-87 instead of going to 0; NaN stays NaN.
  static float exp(float x) {
    x = std::min(std::max(x, -87.0f), 88.0f);
    const float shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;  // rounds to a whole number
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    // The last bits of `shifted` are n; a conversion to int would not be defined where x is NaN.
    return (p * r * r + r + 1) * std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) + 127) << 23);
  }

 private:
  std::vector<Buffer<float>> room_;  // [threads], a panel of weights in fp32, and a pair's results
  std::vector<float> parts_;         // of one row's attention

  // work(o) for all o < rows, each of `terms` multiply-adds. Threads take runs of rows, shorter and shorter: long ones
  // are read fastest, and two processors rarely get an equal share of the memory's bandwidth.
  template <class Work>
  static void each_row(size_t rows, size_t terms, Work work) {
#pragma omp parallel for schedule(guided, 8) if (rows * terms > worth_threads)
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

  // Asking for what lies some lines ahead reads up to two thirds faster: the processor's own prefetcher stops at the
  // end of each 4 KiB page. (Asking beyond the end of the file does nothing.) One line at a time: a processor keeps few
  // requests open, and waits where a whole row is asked for at once.
  static float dot(const bf16* w, const float* x, size_t n) {
    constexpr size_t width = 32, near = 256, far = 2048;  // sums at once: a line of weights; weights ahead
    float sum[width] = {}, all = 0;
    size_t i = 0;
    for (; i + width <= n; i += width) {
      __builtin_prefetch(w + i + far, 0, 2);  // to the second-level cache
      __builtin_prefetch(w + i + near);
#pragma omp simd
      for (size_t j = 0; j < width; ++j) sum[j] += std::bit_cast<float>(uint32_t(w[i + j].bits) << 16) * x[i + j];
    }
    for (; i < n; ++i) sum[0] += std::bit_cast<float>(uint32_t(w[i].bits) << 16) * x[i];
#pragma omp simd reduction(+ : all)
    for (size_t j = 0; j < width; ++j) all += sum[j];
    return all;
  }

  static constexpr size_t slot_block = 256;

  // One row: every thread takes blocks of slots for all heads that share them, so that the cache is read once; the
  // parts are joined at the end, always in the same order (flash-decoding: Dao et al., 2023).
  void attend_one(float* o, const float* q, const LayerCache<float>& cache, size_t seen, size_t n_heads,
                  size_t n_kv_heads, size_t head_dim) {
    const size_t blocks = (seen + slot_block - 1) / slot_block, group = n_heads / n_kv_heads, part = head_dim + 2;
    const float scale = 1 / std::sqrt(float(head_dim));
    parts_.resize(n_heads * blocks * part);  // [n_heads, blocks]: sum of weighted values, sum of weights, largest score
#pragma omp parallel for collapse(2) schedule(dynamic) if (seen * n_heads * head_dim > worth_threads / 2)
    for (size_t g = 0; g < n_kv_heads; ++g)
      for (size_t b = 0; b < blocks; ++b) {
        const size_t s0 = b * slot_block, slots = std::min(slot_block, seen - s0),
                     first = (g * cache.capacity + s0) * head_dim;
        for (size_t h = g * group; h < (g + 1) * group; ++h) {
          float score[slot_block], *out = parts_.data() + (h * blocks + b) * part;
          scores(score, q + h * head_dim, cache.k + first, h % group == 0 ? cache.v + first : nullptr, slots, head_dim,
                 scale);
          std::fill_n(out, part, 0.0f);
          out[head_dim + 1] = -INFINITY;
          softmax_step(score, slots, slots, out[head_dim + 1], out[head_dim], out, head_dim);
          add_values(out, score, cache.v + first, slots, head_dim);
        }
      }
    for (size_t h = 0; h < n_heads; ++h) {
      const float* all = parts_.data() + h * blocks * part;
      float most = -INFINITY, sum = 0;
      for (size_t b = 0; b < blocks; ++b) most = std::max(most, all[b * part + head_dim + 1]);
      std::fill_n(o + h * head_dim, head_dim, 0.0f);
      for (size_t b = 0; b < blocks; ++b) {
        const float weight = exp(all[b * part + head_dim + 1] - most);
        sum += weight * all[b * part + head_dim];
        for (size_t i = 0; i < head_dim; ++i) o[h * head_dim + i] += weight * all[b * part + i];
      }
      for (size_t i = 0; i < head_dim; ++i) o[h * head_dim + i] /= sum;
    }
  }

  // score [slots] = scale * k q          k, v [slots, head_dim]; q [head_dim]
  // Where v is given it asks for the values too, and for keys some lines ahead: the first head of those that share them
  // waits for memory once instead of twice.
  static void scores(float* score, const float* q, const float* k, const float* v, size_t slots, size_t head_dim,
                     float scale) {
    constexpr size_t width = 16, ahead = 512;  // sums at once; values
    for (size_t s = 0; s < slots; ++s) {
      const float* key = k + s * head_dim;
      for (size_t i = 0; v && i < head_dim; i += width) {
        __builtin_prefetch(key + ahead + i);
        __builtin_prefetch(v + s * head_dim + i);
      }
      float sum[width] = {}, all = 0;
      size_t i = 0;
      for (; i + width <= head_dim; i += width)
#pragma omp simd
        for (size_t j = 0; j < width; ++j) sum[j] += q[i + j] * key[i + j];
      for (; i < head_dim; ++i) sum[0] += q[i] * key[i];
#pragma omp simd reduction(+ : all)
      for (size_t j = 0; j < width; ++j) all += sum[j];
      score[s] = all * scale;
    }
  }

  // out [head_dim] += weight [slots] v [slots, head_dim], 32 columns at a time, whose sums stay in registers.
  static void add_values(float* out, const float* weight, const float* v, size_t slots, size_t head_dim) {
    constexpr size_t width = 32;
    for (size_t i = 0; i < head_dim; i += width) {
      float sum[width] = {};
      const size_t n = std::min(width, head_dim - i);
      if (n == width) {
        for (size_t s = 0; s < slots; ++s)
#pragma omp simd
          for (size_t j = 0; j < width; ++j) sum[j] += weight[s] * v[s * head_dim + i + j];
      } else {
        for (size_t s = 0; s < slots; ++s)
          for (size_t j = 0; j < n; ++j) sum[j] += weight[s] * v[s * head_dim + i + j];
      }
      for (size_t j = 0; j < n; ++j) out[i + j] += sum[j];
    }
  }

  // Takes one more block of a row's scores into its running softmax: scores become weights e^(score - most), those past
  // `visible` become 0, and what was summed before is scaled to the new maximum.
  static void softmax_step(float* score, size_t visible, size_t slots, float& most, float& sum, float* out,
                           size_t head_dim) {
    float block_most = most;
#pragma omp simd reduction(max : block_most)
    for (size_t s = 0; s < visible; ++s) block_most = score[s] > block_most ? score[s] : block_most;
    const float factor = most == block_most ? 1.0f : exp(most - block_most);
    float block_sum = 0;
#pragma omp simd reduction(+ : block_sum)
    for (size_t s = 0; s < visible; ++s) block_sum += score[s] = exp(score[s] - block_most);
    std::fill(score + visible, score + slots, 0.0f);
    if (factor != 1.0f)
      for (size_t i = 0; i < head_dim; ++i) out[i] *= factor;
    sum = sum * factor + block_sum;
    most = block_most;
  }
};

// ---- sampling -----------------------------------------------------------------------------------------------------

struct Sampling {
  float temperature = 0;  // 0: greedy
  int top_k = 0;          // 0: off
  float top_p = 1;        // 1: off
  float min_p = 0;        // 0: off
  uint64_t seed = 0;
};

// Draws a token: the most likely top_k; of these the fewest whose probabilities reach top_p (Holtzman et al., arXiv
// 1904.09751); of these the ones at least min_p times as likely as the likeliest; from what is left by softmax(logits /
// temperature). The same seed draws the same tokens on every machine.
class Sampler {
 public:
  explicit Sampler(const Sampling& s) : s_(s), random_(s.seed) {}

  int operator()(const float* logits, size_t vocab) {
    const int best = arg_max(logits, vocab);
    if (s_.temperature == 0) return best;
    order_.resize(vocab);
    for (size_t i = 0; i < vocab; ++i) order_[i] = int(i);
    auto likelier = [&](int a, int b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; };
    std::sort(order_.begin(), order_.end(), likelier);
    if (s_.top_k > 0) order_.resize(std::min<size_t>(vocab, s_.top_k));
    auto weight = [&](int id, double t) { return std::exp((double(logits[id]) - logits[best]) / t); };
    if (s_.top_p < 1) {
      double all = 0, sum = 0;
      for (int id : order_) all += weight(id, 1);
      size_t n = 0;
      while (n < order_.size() && sum < s_.top_p * all) sum += weight(order_[n++], 1);
      order_.resize(std::max<size_t>(n, 1));
    }
    size_t n = order_.size();
    while (n > 1 && weight(order_[n - 1], 1) < s_.min_p) --n;
    double all = 0;
    for (size_t i = 0; i < n; ++i) all += weight(order_[i], s_.temperature);
    double left = double(random_() >> 11) * 0x1p-53 * all;
    for (size_t i = 0; i + 1 < n; ++i)
      if ((left -= weight(order_[i], s_.temperature)) < 0) return order_[i];
    return order_[n - 1];
  }

 private:
  Sampling s_;
  std::mt19937_64 random_;
  std::vector<int> order_;
};

}  // namespace speed
