// forward.h - the story: how tokens go through the layers under a policy.
//
// Written once, as a template over the backend that does the arithmetic (cpu.h, gpu.cuh). Tokens come in as rows; at
// every layer the policy says which rows leave keys and values there and which go on. Rows are ordered, prompt before
// tail, so each of the two sets is a suffix of the rows, and "which" is only "from where".
#pragma once

#include <chrono>
#include <functional>

#include "cpu.h"

namespace speed {

// What happened in one layer since the engine was made.
struct LayerStats {
  uint64_t prompt_rows = 0;  // prompt rows that went through the whole layer
  uint64_t kv_rows = 0;      // rows that left keys and values
  uint64_t tail_rows = 0;    // decode-phase rows
  Counters counted;
  double seconds = 0;
};

// Room for a run. A conversation of `context` tokens, of which at most `decode` are decode-phase at any time.
struct Limits {
  size_t context = 0;
  size_t decode = 0;
  size_t chunk = 0;  // rows that go through a layer together; 0: the backend's choice
};

template <class B>
class Engine {
 public:
  using Residual = typename B::Residual;
  using Activation = typename B::Activation;

  // Called after every layer of every chunk, with the residual stream of its rows [rows, hidden] as the layer left it,
  // in the backend's memory (on_host brings it); `first` is the position of row 0. It may throw to stop the run. Of a
  // generated token a device may run all layers later, in one go: then x holds nothing yet.
  std::function<void(int layer, size_t first, size_t rows, const Residual* x)> on_layer;
  bool time_layers = false;  // wait for each layer, so that its seconds are its own
  // Receives the logits [vocab] that follow decode-phase token i of the request.
  using Logits = std::function<void(size_t i, const float* logits)>;

  // `announce` is called when it is known that the run fits into memory, before any is taken.
  Engine(const Model& model, const Policy& policy, Limits limits, B& backend,
         const std::function<void(const Engine&)>& announce = nullptr)
      : model_(model), c_(model.config), s_(c_.shape), policy_(policy), limits_(limits), b_(backend) {
    model.need_weights();
    b_.check(s_);
    if (!limits_.chunk) limits_.chunk = B::default_chunk;
    limits_.chunk = std::max<size_t>(std::min(limits_.chunk, limits_.context), 1);
    const uint64_t load = b_.bytes_to_load(model), need = bytes_needed(), have = b_.available_memory();
    if (load + need > have)
      throw Error(2, "memory",
                  "this run needs " + std::to_string((need >> 20) + 1) + " MiB beside the weights" +
                      (load ? " of " + std::to_string(load >> 20) + " MiB" : "") + ", " + std::to_string(have >> 20) +
                      " MiB are available",
                  "use a smaller -c, -n, --chunk or -t");
    if (announce) announce(*this);
    w_ = &b_.load(model);
    allocate();
    if (anchored()) make_anchor();
  }

  // Takes a request in: tokens[0, split) are prompt, tokens[split, N) decode-phase, N > split >= 0; they follow
  // whatever the caches already hold. Calls `logits` once for the last token, or, with `all`, for every decode-phase
  // token.
  void prefill(std::span<const int> tokens, size_t split, const Logits& logits, bool all = false) {
    check_ids(tokens, split);
    const size_t N = tokens.size();
    for (size_t a = 0; a < N;) {
      size_t b = std::min(a + limits_.chunk, N);
      if (N - b <= ride_along) b = N;  // a few rows more cost less than reading all weights once more
      const size_t prompt = split > a ? std::min(split, b) - a : 0;
      const size_t rows = run(tokens.subspan(a, b - a), prompt);
      const size_t wanted = all ? rows : b == N ? 1 : 0;
      head(wanted, [&](size_t i, const float* l) { logits(b - wanted + i - split, l); });
      a = b;
    }
  }

  // One generated token, fed back; its logits are valid until the next call.
  const float* decode(int token) {
    step(token, false);
    return b_.on_host(logits_.get(), s_.vocab);
  }

  // The same, for the likeliest next token: its logits stay where they were made.
  int decode_greedy(int token) {
    step(token, true);
    int best = 0;
    b_.download(&best, best_.get(), 1);
    if (best < 0) throw not_a_number();
    return best;
  }

  // Ends a turn: what was decode-phase is prompt from now on. Where a cache holds no prompt tokens, answers leave it
  // too.
  void end_turn(bool keep_answers) {
    for (int l = 0; l < s_.n_layers; ++l)
      if (!policy_.holds_prompt(l) && !keep_answers) caches_[l].used = std::min<size_t>(caches_[l].used, policy_.bos);
  }

  size_t position() const { return position_; }
  const std::vector<LayerStats>& layers() const { return stats_; }
  const LayerStats& head_stats() const { return head_stats_; }
  Counters counted() const {
    Counters all = head_stats_.counted;
    for (const LayerStats& l : stats_) all += l.counted;
    return all;
  }
  const LayerCache<typename B::CacheValue>& cache(int l) const { return caches_[policy_.cache_of(l)]; }
  uint64_t kv_bytes_allocated() const { return kv_bytes_; }
  uint64_t kv_bytes_needed() const { return kv_capacity_bytes(); }
  const Policy& policy() const { return policy_; }

  // Memory beside the weights, in bytes: caches, activations, logits.
  uint64_t bytes_needed() const {
    const uint64_t rows = limits_.chunk + ride_along;
    const uint64_t activations = s_.hidden + 2 * s_.q_width() + 2 * s_.kv_width() + 2 * uint64_t(s_.mlp);
    return kv_capacity_bytes() + head_rows * s_.vocab * sizeof(float) +
           rows * (s_.hidden * sizeof(Residual) + activations * sizeof(Activation) + s_.head_dim * sizeof(float));
  }

  // For the test of what a prompt leaves behind: overwrites all that no later token may read.
  void poison(float value) {
    auto put = [&](auto* p, size_t n) {
      using T = std::remove_pointer_t<decltype(p)>;
      T v;
      if constexpr (std::is_same_v<T, bf16>) v.bits = uint16_t(std::bit_cast<uint32_t>(value) >> 16);
      else v = value;
      b_.upload(p, std::vector<T>(n, v).data(), n);
    };
    auto fill = [&](auto& buffer) { put(buffer.get(), buffer.size); };
    fill(x_), fill(a_), fill(q_), fill(o_), fill(k_), fill(v_), fill(gate_), fill(up_);
    for (auto& c : caches_)
      for (size_t h = 0; h < size_t(c.k ? s_.n_kv_heads : 0); ++h) {
        const size_t from = (h * c.capacity + c.used) * s_.head_dim, n = (c.capacity - c.used) * s_.head_dim;
        put(c.k + from, n);
        put(c.v + from, n);
      }
  }

 private:
  static constexpr size_t ride_along = 16, head_rows = 32;

  // ---- the forward pass ----

  // A chunk: rows [0, prompt) are prompt tokens, the others decode-phase; returns how many of these there are, and
  // leaves their final residuals at the end of x_.
  size_t run(std::span<const int> tokens, size_t prompt) {
    if (position_ == 0 && prompt > 0) place_anchor();
    place(tokens);
    pass(tokens.size(), prompt);
    return tokens.size() - prompt;
  }

  // Tells the backend what differs from call to call: tokens, their positions, and the slots each cache has in use.
  void place(std::span<const int> tokens) {
    const size_t n = tokens.size(), L = s_.n_layers;
    host_place_.resize(L + 2 * n);
    for (size_t l = 0; l < L; ++l) host_place_[l] = int(caches_[l].begin = caches_[l].used);
    for (size_t i = 0; i < n; ++i) host_place_[L + i] = tokens[i], host_place_[L + n + i] = int(position_ + i);
    b_.upload(place_.get(), host_place_.data(), host_place_.size());
  }

  void pass(size_t n, size_t prompt) {
    const int *tokens = place_.get() + s_.n_layers, *positions = tokens + n;
    b_.embed(x_.get(), w_->embedding, tokens, n, s_.hidden);
    b_.rope_angles(cos_.get(), sin_.get(), frequencies_.get(), positions, n, s_.head_dim / 2);
    for (int l = 0; l < s_.n_layers; ++l) {
      if (l == policy_.k && policy_.from_shared_state(l)) leave_shared_state(n);
      count_into(stats_[l], [&] { layer(l, n, prompt); });
      if (on_layer) on_layer(l, position_, n, x_.get());
    }
    position_ += n;
    rows_ = n;
  }

  // A generated token's pass, up to its logits, and to the likeliest of them.
  void step(int token, bool greedy) {
    const std::span<const int> tokens(&token, 1);
    check_ids(tokens, 0);
    place(tokens);
    b_.replay(steps_[greedy], [&] {
      pass(1, 0);
      head(0, 1);
      if (greedy) b_.arg_max(best_.get(), logits_.get(), s_.vocab);
    });
  }

  // One layer. Rows [leave, n) leave keys and values in its cache; rows [go, n) go through it.
  void layer(int l, size_t n, size_t prompt) {
    const LayerWeights& w = w_->layers[l];
    const size_t d = s_.hidden, q = s_.q_width(), f = s_.mlp, e = s_.head_dim;
    const bool shared = policy_.from_shared_state(l);
    const size_t leave = !policy_.has_cache(l) || shared ? n : policy_.holds_prompt(l) ? 0 : prompt;
    const size_t go = l < policy_.whole_layers() ? 0 : prompt;
    const size_t first = std::min(leave, go), m = n - go;
    stats_[l].prompt_rows += go == 0 ? prompt : 0;
    stats_[l].tail_rows += n - prompt;

    if (first == n) return;  // nobody will read these rows from here on

    Residual* x = x_.get() + go * d;
    Activation* a = a_.get();
    b_.rmsnorm(a + first * d, x_.get() + first * d, w.attention_norm, n - first, d, c_.rms_norm_eps);
    if (leave < n) leave_kv(l, a + leave * d, leave, n, w.wk, w.wv);
    if (m == 0) return;

    auto& cache = caches_[policy_.cache_of(l)];
    b_.queries(q_.get(), a + go * d, shared ? w.swiftkv_wq : w.wq, cos_.get() + go * e / 2, sin_.get() + go * e / 2, m,
               d, s_.n_heads, e);
    b_.attention(o_.get(), q_.get(), cache, m, cache.used - m + 1, s_.n_heads, s_.n_kv_heads, e);
    b_.matmul(x, o_.get(), w.wo, m, q, d, true);

    b_.rmsnorm(a, x, w.mlp_norm, m, d, c_.rms_norm_eps);
    b_.gated(gate_.get(), up_.get(), a, w.gate, w.up, m, d, f);
    b_.matmul(x, gate_.get(), w.down, m, f, d, true);
  }

  // Keys and values of rows [from, n), made from their normed states a, into layer l's cache. A product of their own,
  // whether or not queries follow: a library picks its kernel by shape, and equal caches must be equal bit for bit.
  void leave_kv(int l, const Activation* a, size_t from, size_t n, const bf16* wk, const bf16* wv) {
    const size_t rows = n - from, angles = from * s_.head_dim / 2;
    b_.keys_values(caches_[l], k_.get(), v_.get(), a, wk, wv, cos_.get() + angles, sin_.get() + angles, rows, s_.hidden,
                   s_.n_kv_heads, s_.head_dim);
    stats_[l].kv_rows += rows;
  }

  // SwiftKV: the state that enters layer K, normed once, leaves the keys and values of every group above.
  void leave_shared_state(size_t n) {
    count_into(stats_[policy_.k],
               [&] { b_.rmsnorm(a_.get(), x_.get(), w_->swiftkv_norm, n, s_.hidden, c_.rms_norm_eps); });
    for (int l = policy_.k; l < s_.n_layers; ++l) {
      const LayerWeights& w = w_->layers[l];
      if (policy_.has_cache(l)) count_into(stats_[l], [&] { leave_kv(l, a_.get(), 0, n, w.swiftkv_wk, w.swiftkv_wv); });
    }
  }

  // Final norm and output head for the last `count` rows of the chunk.
  void head(size_t count, const Logits& logits) {
    for (size_t i = 0; i < count; i += head_rows) {
      const size_t m = std::min(head_rows, count - i);
      head(rows_ - count + i, m);
      const float* l = b_.on_host(logits_.get(), m * s_.vocab);
      for (size_t r = 0; r < m; ++r) logits(i + r, l + r * s_.vocab);
    }
  }

  // The same for m rows from `row` on, m <= head_rows, into logits_.
  void head(size_t row, size_t m) {
    const size_t d = s_.hidden;
    head_stats_.tail_rows += m;
    count_into(head_stats_, [&] {
      b_.rmsnorm(a_.get(), x_.get() + row * d, w_->final_norm, m, d, c_.rms_norm_eps);
      b_.matmul(logits_.get(), a_.get(), w_->head, m, d, s_.vocab);
    });
  }

  // ---- the anchor ----
  // The BoS token attends only to itself, so its keys and values in every layer depend on its id alone. They are made
  // once, by a full-depth run of that one token, and copied wherever a policy keeps the anchor apart.

  bool anchored() const {
    for (int l = 0; l < s_.n_layers; ++l)
      if (policy_.anchor_apart(l)) return true;
    return false;
  }

  void make_anchor() {
    if (c_.bos < 0) throw Error(2, "--bos", "this model has no BoS token", "use --no-bos");
    Engine alone(model_, full_depth(s_.n_layers), {1, 1, 1}, b_);
    alone.run(std::span<const int>(&c_.bos, 1), 0);
    anchor_ = std::move(alone.caches_);
    anchor_memory_ = std::move(alone.cache_memory_);
    b_.counters = {};
  }

  void place_anchor() {
    const size_t e = s_.head_dim, g = s_.n_kv_heads;
    for (int l = 0; l < s_.n_layers; ++l)
      if (policy_.anchor_apart(l)) b_.append(caches_[l], anchor_[l].k, anchor_[l].v, 1, g, e);
  }

  // ---- memory ----

  // Slots a run can fill. Prompt tokens have none where the policy says so: this is the memory SPEED saves.
  size_t capacity(int l) const {
    return policy_.holds_prompt(l) ? limits_.context
                                   : size_t(policy_.slots(l, 1, std::min(limits_.decode, limits_.context)));
  }

  uint64_t kv_capacity_bytes() const {
    uint64_t slots = 0;
    for (int l = 0; l < s_.n_layers; ++l)
      if (policy_.has_cache(l)) slots += capacity(l);
    return slots * 2 * s_.kv_width() * sizeof(typename B::CacheValue);
  }

  void allocate() {
    const size_t rows = limits_.chunk + ride_along, kv = s_.kv_width();
    auto room = [&](auto& buffer, size_t n) { buffer = typename B::template Buffer<Activation>(n); };
    x_ = typename B::template Buffer<Residual>(rows * s_.hidden);
    room(a_, rows * s_.hidden);
    room(q_, rows * s_.q_width()), room(o_, rows * s_.q_width());
    room(k_, rows * kv), room(v_, rows * kv);
    room(gate_, rows * s_.mlp), room(up_, rows * s_.mlp);
    cos_ = typename B::template Buffer<float>(rows * s_.head_dim / 2);
    sin_ = typename B::template Buffer<float>(rows * s_.head_dim / 2);
    logits_ = typename B::template Buffer<float>(head_rows * s_.vocab);
    best_ = typename B::template Buffer<int>(1);
    place_ = typename B::template Buffer<int>(s_.n_layers + 2 * rows);
    const std::vector<float> frequencies = rope_frequencies(c_, model_.weights.rope_divisors);
    frequencies_ = typename B::template Buffer<float>(frequencies.size());
    b_.upload(frequencies_.get(), frequencies.data(), frequencies.size());
    stats_.resize(s_.n_layers);
    caches_.resize(s_.n_layers);
    for (int l = 0; l < s_.n_layers; ++l) {
      if (!policy_.has_cache(l)) continue;
      const size_t n = capacity(l) * kv;
      cache_memory_.emplace_back(2 * n);
      kv_bytes_ += 2 * n * sizeof(typename B::CacheValue);
      caches_[l] = {cache_memory_.back().get(),
                    cache_memory_.back().get() + n,
                    capacity(l),
                    0,
                    0,
                    reinterpret_cast<const uint32_t*>(place_.get() + l)};
    }
  }

  void check_ids(std::span<const int> tokens, size_t split) const {
    if (tokens.empty()) throw Error(2, "prompt", "no tokens", "give a text with -p or -f");
    for (int id : tokens)
      if (id < 0 || id >= s_.vocab)
        throw Error(2, "token " + std::to_string(id), "outside a vocabulary of " + std::to_string(s_.vocab),
                    "use ids of this model");
    if (split >= tokens.size())
      throw Error(
          2, "--split",
          std::to_string(split) + " of " + std::to_string(tokens.size()) + " tokens leaves no decode-phase token",
          "use a smaller --split");
    if (position_ + tokens.size() > limits_.context)
      throw Error(2, "context",
                  std::to_string(position_ + tokens.size()) + " tokens, room for " + std::to_string(limits_.context),
                  "use a larger -c or a shorter prompt");
    for (int l = 0; l < s_.n_layers; ++l) {
      const auto& c = caches_[policy_.cache_of(l)];
      if (!policy_.holds_prompt(l) &&
          c.used + (position_ == 0 && split > 0 && policy_.bos) + tokens.size() - split > c.capacity)
        throw Error(2, "context",
                    "more decode-phase tokens than the " + std::to_string(limits_.decode) + " there is room for",
                    "use a larger --split, or a smaller -n");
    }
    if (position_ > 0) return;
    if (tokens.size() > 1 && c_.bos >= 0 && tokens[0] == c_.bos && tokens[1] == c_.bos)
      throw Error(2, "prompt", "begins with two BoS tokens", "leave one out: the engine adds its own");
    if (anchored() && tokens[0] != c_.bos)
      throw Error(2, "prompt",
                  "begins with token " + std::to_string(tokens[0]) + ", expected BoS, " + std::to_string(c_.bos),
                  "put it first, or use --no-bos");
  }

  template <class Work>
  void count_into(LayerStats& stats, Work work) {
    const Counters before = b_.counters;
    if (time_layers) b_.wait();
    const auto start = std::chrono::steady_clock::now();
    work();
    if (time_layers) b_.wait();
    stats.counted += b_.counters - before;
    stats.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }

  template <class T>
  using Buffer = typename B::template Buffer<T>;

  const Model& model_;
  const Config& c_;
  const Shape& s_;
  const Policy policy_;
  Limits limits_;
  B& b_;
  const Weights* w_ = nullptr;  // where the backend has them

  Buffer<Residual> x_;                                      // [rows, d]    residual stream
  Buffer<Activation> a_;                                    // [rows, d]    normed states
  Buffer<Activation> q_, o_;                                // [rows, q]    queries; attention's output
  Buffer<Activation> k_, v_;                                // [rows, kv]
  Buffer<Activation> gate_, up_;                            // [rows, f]
  Buffer<float> cos_, sin_;                                 // [rows, head_dim / 2]
  Buffer<float> logits_;                                    // [head_rows, V]
  Buffer<int> best_;                                        // [1]          the likeliest token
  Buffer<int> place_;                                       // [L + 2 n]    slots in use, tokens, positions
  std::vector<int> host_place_;                             // the same
  Buffer<float> frequencies_;                               // [head_dim / 2]
  std::vector<LayerCache<typename B::CacheValue>> caches_;  // [L], empty where a layer reads another's
  std::vector<Buffer<typename B::CacheValue>> cache_memory_;
  std::vector<LayerCache<typename B::CacheValue>> anchor_;  // [L], one slot each
  std::vector<Buffer<typename B::CacheValue>> anchor_memory_;
  uint64_t kv_bytes_ = 0;

  size_t position_ = 0;            // tokens taken in so far
  size_t rows_ = 0;                // of the last chunk
  std::vector<LayerStats> stats_;  // [L]
  LayerStats head_stats_;
  typename B::Step steps_[2];  // a generated token's work; with its likeliest successor
};

}  // namespace speed
