// trace.h - what a run of one prompt did inside: where each token looked, what each layer would say next, what it cost.
//
//   record()   feeds a policy given tokens, and keeps attention weights and the words each layer's state stands for
//   say()      lets a policy answer by itself, and keeps what the engine counted
//
// Nothing here changes a run: the engine calls back after a layer's attention and after the layer.
#pragma once

#include <array>
#include <cmath>
#include <span>
#include <vector>

#include "perplexity.h"

namespace speed {

// Where one token looks in one layer.
struct Glance {
  std::vector<float> weight;    // [slots it sees]  the largest attention weight that a head gives this slot
  std::vector<uint8_t> head;    // [slots it sees]  that head
  std::array<double, 3> share;  // of all heads' attention, to the anchor, other prompt tokens, decode-phase tokens
};

// What a layer's state would say next, were it the last one: final norm and output head applied to it ("logit lens").
struct Lens {
  std::array<int, 3> word;  // the likeliest tokens, likeliest first; -1 where the vocabulary has fewer
  std::array<float, 3> p;   // and their probabilities
  float p_next;             // that of the token which really follows
};

struct RecordedLayer {
  size_t first = 0;          // position of rows[0]
  std::vector<Glance> rows;  // the rows that ran this layer's attention
  std::vector<Lens> lens;    // [decode-phase rows]
};

struct Recording {
  Policy policy;
  size_t split = 0;
  std::vector<RecordedLayer> layers;          // [L]
  std::vector<int> top;                       // [decode-phase rows]  the likeliest next token
  std::vector<float> logits;                  // [answer rows, V]     of the last `answer` rows
  std::vector<double> turn;                   // [L] mean over prompt tokens (but the first) of 1 - cosine of the states
                                              //     after this layer and the one below; NaN: no such row
  std::vector<std::vector<std::byte>> cache;  // [L] keys and values of the cache this layer reads, bit for bit
  double attention_error = 0;  // weights times values against the engine's output: the worst head's relative error
  double lens_error = 0;       // the last layer's lens against the engine's logits: the worst row's relative error
};

// The position of the token in a slot of the cache that layer l reads, for a prompt of `split` tokens.
inline size_t position_of(const Policy& p, int l, size_t split, size_t slot) {
  if (p.caches_prompt(l)) return slot;
  const size_t anchor = p.bos && split > 0;
  return slot < anchor ? 0 : split + slot - anchor;
}

template <class B, class T>
std::vector<float> floats(B& b, const T* p, size_t n) {
  std::vector<T> raw(n);
  b.download(raw.data(), p, n);
  if constexpr (std::is_same_v<T, float>) return raw;
  else {
    std::vector<float> wide(n);
    std::transform(raw.begin(), raw.end(), wide.begin(), [](T x) { return to_float(x); });
    return wide;
  }
}

inline double relative_distance(const float* x, const float* ref, size_t n) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < n; ++i)
    difference += (double(x[i]) - ref[i]) * (double(x[i]) - ref[i]), norm += double(ref[i]) * ref[i];
  return std::sqrt(difference / std::max(norm, 1e-30));
}

// Rows [begin, rows) of one call of a layer's attention, recomputed by its definition from queries and cache; see
// Engine::on_attention. `seen`: slots that row 0 saw. Returns the worst head's distance from the engine's own output o.
inline double look(RecordedLayer& layer, const Policy& p, int l, size_t split, size_t begin, size_t rows, size_t seen,
                   const float* q, const LayerCache<float>& cache, const float* o, const Shape& s) {
  const size_t h = s.n_heads, e = s.head_dim, before = layer.rows.size();
  layer.rows.resize(before + rows - begin);
  double worst = 0;
#pragma omp parallel for schedule(dynamic) reduction(max : worst)
  for (size_t r = begin; r < rows; ++r) {
    Glance& g = layer.rows[before + r - begin];
    const size_t slots = seen + r;
    g.weight.assign(slots, 0), g.head.assign(slots, 0), g.share = {};
    std::vector<double> w(slots);
    std::vector<float> value(e);
    for (size_t head = 0; head < h; ++head) {
      const size_t first = head / (h / s.n_kv_heads) * cache.capacity * e, at = (r * h + head) * e;
      reference::attention_weights(w.data(), q + at, cache.k + first, slots, e);
      for (size_t i = 0; i < e; ++i) {
        double sum = 0;
        for (size_t j = 0; j < slots; ++j) sum += w[j] * cache.v[first + j * e + i];
        value[i] = float(sum);
      }
      worst = std::max(worst, relative_distance(value.data(), o + at, e));
      for (size_t j = 0; j < slots; ++j) {
        if (float(w[j]) > g.weight[j]) g.weight[j] = float(w[j]), g.head[j] = uint8_t(head);
        const size_t position = position_of(p, l, split, j);
        g.share[position >= split ? 2 : position > 0 ? 1 : 0] += w[j] / double(h);
      }
    }
  }
  return worst;
}

inline Lens read_lens(const float* logits, size_t vocab, int next) {
  Lens lens{{-1, -1, -1}, {}, 0};
  const double most = logits[arg_max(logits, vocab)];  // throws where one is NaN
  double sum = 0;
  for (size_t i = 0; i < vocab; ++i) {
    sum += std::exp(logits[i] - most);
    for (size_t j = 0; j < 3; ++j)
      if (lens.word[j] < 0 || logits[i] > logits[lens.word[j]]) {
        for (size_t m = 2; m > j; --m) lens.word[m] = lens.word[m - 1];
        lens.word[j] = int(i);
        break;
      }
  }
  auto p = [&](int id) { return float(std::exp(logits[id] - most) / sum); };
  for (size_t j = 0; j < 3; ++j)
    if (lens.word[j] >= 0) lens.p[j] = p(lens.word[j]);
  lens.p_next = p(next);
  return lens;
}

// Feeds `ids`, of which the first `split` are prompt, and records the run: attention in every layer, lenses in layers
// from `from` on. Prompt rows are recorded only where `from` is 0; under another policy than full depth they are full
// depth's, as far as they go (law 2). `after` is the token that follows the last one; the last `answer` rows keep their
// logits.
template <class B>
Recording record(const Model& model, const Policy& policy, std::span<const int> ids, size_t split, int after,
                 size_t answer, int from, const Options& o, B& b) {
  using Activation = typename B::Activation;
  using CacheValue = typename B::CacheValue;
  const Shape& s = model.config.shape;
  const size_t N = ids.size(), d = s.hidden, V = s.vocab, L = s.n_layers;
  constexpr size_t head_rows = 32;
  Recording r{policy, split, std::vector<RecordedLayer>(L), {}, {}, std::vector<double>(L, NAN), {}, 0, 0};
  r.logits.reserve(answer * V);
  Engine<B> engine = make_engine(model, policy, N, N - split, o, b);
  const Weights& w = b.load(model);
  typename B::template Buffer<Activation> normed(head_rows * d);
  typename B::template Buffer<float> lens_logits(head_rows * V);
  std::vector<float> last_lens;  // [decode-phase rows of this chunk, V] of the last layer, for the check
  size_t last_lens_from = 0;     // the decode-phase row that these begin with
  const bool prompt_rows = from == 0;

  engine.on_attention = [&](int l, size_t first, size_t rows, const Activation* q, const LayerCache<CacheValue>& cache,
                            const Activation* out) {
    const size_t begin = prompt_rows || first >= split ? 0 : std::min(rows, split - first);
    if (begin == rows) return;
    const size_t width = rows * s.q_width(), all = cache.capacity * s.kv_width();
    const std::vector<float> query = floats(b, q, width), output = floats(b, out, width),
                             keys = floats(b, cache.k, all), values = floats(b, cache.v, all);
    LayerCache<float> host;
    host.k = const_cast<float*>(keys.data()), host.v = const_cast<float*>(values.data());
    host.capacity = cache.capacity;
    RecordedLayer& layer = r.layers[l];
    if (layer.rows.empty()) layer.first = first + begin;
    r.attention_error = std::max(r.attention_error, look(layer, policy, l, split, begin, rows, cache.used - rows + 1,
                                                         query.data(), host, output.data(), s));
  };

  std::vector<float> below;  // states after the layer below, of this chunk
  std::vector<size_t> turned(L);
  engine.on_layer = [&](int l, size_t first, size_t rows, const float* x) {
    if (interrupted) throw Interrupted{};
    if (prompt_rows && first < split && l < policy.full_prompt_layers()) {
      const float* now = b.on_host(x, rows * d);
      for (size_t i = first ? 0 : 1; l > 0 && i < std::min(rows, split - first); ++i) {
        double dot = 0, a = 0, c = 0;
        for (size_t j = i * d; j < (i + 1) * d; ++j)
          dot += double(now[j]) * below[j], a += double(now[j]) * now[j], c += double(below[j]) * below[j];
        if (turned[l]++ == 0) r.turn[l] = 0;
        r.turn[l] += 1 - dot / std::sqrt(std::max(a * c, 1e-300));
      }
      below.assign(now, now + rows * d);
    }
    if (l < from) return;
    const size_t decode = first < split ? std::min(rows, split - first) : 0;
    if (l + 1 == int(L)) last_lens.clear(), last_lens_from = first + decode - split;
    for (size_t i = decode; i < rows; i += head_rows) {
      const size_t m = std::min(head_rows, rows - i);
      b.rmsnorm(normed.get(), x + i * d, w.final_norm, m, d, model.config.rms_norm_eps);
      b.matmul(lens_logits.get(), normed.get(), w.head, m, d, V);
      const float* logits = b.on_host(lens_logits.get(), m * V);
      for (size_t j = 0; j < m; ++j) {
        const size_t position = first + i + j;
        r.layers[l].lens.push_back(read_lens(logits + j * V, V, position + 1 < N ? ids[position + 1] : after));
      }
      if (l + 1 == int(L)) last_lens.insert(last_lens.end(), logits, logits + m * V);
    }
  };

  engine.prefill(
      ids, split,
      [&](size_t i, const float* logits) {
        r.top.push_back(arg_max(logits, V));
        r.lens_error =
            std::max(r.lens_error, relative_distance(last_lens.data() + (i - last_lens_from) * V, logits, V));
        if (i + answer >= N - split) r.logits.insert(r.logits.end(), logits, logits + V);
      },
      true);
  for (size_t l = 0; l < L; ++l) {
    if (turned[l]) r.turn[l] /= double(turned[l]);
    const auto& cache = engine.cache(int(l));
    std::vector<std::byte>& bytes = r.cache.emplace_back();
    const std::array<const CacheValue*, 2> both = {cache.k, cache.v};
    for (const CacheValue* from : both) {
      std::vector<CacheValue> all(cache.capacity * s.kv_width());
      b.download(all.data(), from, all.size());
      for (int g = 0; g < s.n_kv_heads; ++g) {
        const std::span<const CacheValue> slots(all.data() + g * cache.capacity * s.head_dim, cache.used * s.head_dim);
        const auto part = std::as_bytes(slots);
        bytes.insert(bytes.end(), part.begin(), part.end());
      }
    }
  }
  return r;
}

// What a policy says by itself, greedily, and what that cost.
struct Said {
  std::vector<int> ids;            // a stop token at the end included
  bool stopped = false;            // there is one
  std::vector<LayerStats> layers;  // [L] counted in the prefill
  LayerStats head;
  uint64_t prefill_flops = 0, kv_bytes = 0;      // counted in the prefill; in the KV cache after it
  uint64_t step_flops = 0, step_read_bytes = 0;  // counted in the decode step right after it
};

template <class B>
Said say(const Model& model, const Policy& policy, std::span<const int> ids, size_t split, size_t n, const Options& o,
         B& b) {
  const size_t N = ids.size();
  Engine<B> engine = make_engine(model, policy, N + n, N - split + n, o, b);
  engine.on_layer = [](int, size_t, size_t, const float*) {
    if (interrupted) throw Interrupted{};
  };
  Said said;
  int token = 0;
  engine.prefill(ids, split, [&](size_t, const float* logits) { token = arg_max(logits, engine.shape().vocab); });
  said.layers = engine.layers(), said.head = engine.head_stats();
  said.prefill_flops = engine.counted().flops, said.kv_bytes = engine.kv_bytes_used();
  const std::vector<int> stops = stop_ids(model, o.chat);
  for (;;) {
    said.ids.push_back(token);
    said.stopped = std::find(stops.begin(), stops.end(), token) != stops.end();
    const bool last = said.stopped || said.ids.size() == n;
    if (last && said.ids.size() > 1) return said;
    const Counters before = engine.counted();  // one step is run even where the answer is a single token: to count it
    token = engine.decode_greedy(token);
    if (said.ids.size() == 1) {
      const Counters now = engine.counted();
      said.step_flops = (now - before).flops;
      said.step_read_bytes = (now - before).weight_bytes + (now - before).kv_bytes;
    }
    if (last) return said;
  }
}

}  // namespace speed
