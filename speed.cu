// speed.cu - a language model that does less work on its prompt. This file is the method, from first line to last.
//
// Only the last token of a request predicts a word of the answer. Of the tokens before it, the model needs only keys and
// values. So which layers must a prompt token visit, and whose keys and values must later tokens see? SPEED (arXiv
// 2605.06105): prompt tokens visit layers 0..K-1 only, the lower layers. In the upper layers, K..L-1, decode-phase tokens
// see each other and one constant, the BoS anchor. With L = 5 layers and K = 3:
//
//   layer 4     A  .  .  .  .  .     T  T  G  G      P  a prompt token runs the whole layer
//   layer 3     A  .  .  .  .  .     T  T  G  G      k  it only makes its keys and values: nothing above reads its output
//          K -----------------------                 .  it does nothing and has no slot in the KV cache
//   layer 2     k  k  k  k  k  k     T  T  G  G      A  the anchor: keys and values of BoS, computed once per model
//   layer 1     P  P  P  P  P  P     T  T  G  G      T  the tail: tokens known before generation that run all layers,
//   layer 0     P  P  P  P  P  P     T  T  G  G         such as a chat's "the assistant says:"
//              BoS                                   G  generated tokens
//               prompt [0, split)    tail [split, N)
//               `---- the request, N tokens ----'      T and G are decode-phase tokens
//
// This saves prompt work (dots and k's), KV cache (upper layers have columns A, T, G only) and the time to read it.
//
// There is no attention mask in this file. What a layer's KV cache holds is the mask: a token attends to all slots up to
// and including its own. A prompt token without a slot in an upper layer cannot be seen there. (A slot is an index in
// one layer's cache, a position the token's index in the conversation: see LayerCache in model.h.)
//
// Full depth, POP, SwiftKV and R-CLA are other answers to the same question, so they are settings of the same switch, a
// `Policy`. The parts: policies; what they cost; the engine (state, one layer, prefill, decode, the anchor; then memory
// and checks); sampling; generation. The last lines include the rest of the program: flags, modes and reports.
#ifndef SPEED_CU
#define SPEED_CU

#include <chrono>
#include <functional>
#include <random>

#include "cpu/cpu.h"  // Cpu: the model's operations on a CPU; cpu/reference.h defines each
#include "model.h"    // Shape, the table of policies, Config, Weights, LayerCache, the loader
#ifdef __CUDACC__
#include "gpu/gpu.cuh"  // Gpu: the same operations as CUDA kernels
#endif

namespace speed {

// ---- policies -----------------------------------------------------------------------------------------------------
// Which layers a prompt token visits (it visits a layer that makes at least its keys and values), and whose keys and
// values later tokens see: functions without state.
//
//   full     the published model: every token visits every layer
//   speed    SPEED, arXiv 2605.06105: upper layers cache the anchor and decode-phase tokens only
//   pop      POP, arXiv 2602.03295: a prompt token's upper keys and values are projected from the residual entering K,
//            by each layer's own norm and weights; no training
//   swiftkv  SwiftKV, arXiv 2410.03960: upper keys and values of every token are projected from that residual, by one
//            norm and projections trained for it; a group of layers may share a cache
//   share    R-CLA, arXiv 2604.22782: a layer that keeps no cache reads that of the nearest kept layer below
//
// To add a policy, see CONTRIBUTING.md. A switch here names every method: the compiler reports one that was forgotten.

struct Policy {
  Method method = Method::full;
  int n_layers = 1;        // L
  int k = 1;               // K, 1 <= K <= L; L under full and share; its default is in cli/policies.cpp
  bool bos = true;         // speed: upper layers see the BoS anchor
  int group = 1;           // swiftkv: layers per cache above K
  std::vector<bool> kept;  // share: [L], which layers keep a cache; kept[0] is true

  // Prompt truncation: the layers that a prompt token runs whole. Under full, speed and share it then makes keys and
  // values in one more layer, and stops: no layer above needs its output. So SPEED runs K-1 layers whole, and layer K-1
  // still makes keys and values. Under pop and swiftkv all upper keys and values come from the residual that enters K,
  // so K layers run whole.
  int full_prompt_layers() const {
    switch (method) {
      case Method::full: return n_layers - 1;
      case Method::speed: return k - 1;
      case Method::pop:
      case Method::swiftkv: return std::min(k, n_layers - 1);
      case Method::share: {
        int last_kept = n_layers - 1;
        while (!kept[last_kept]) --last_kept;
        return last_kept;
      }
    }
    __builtin_unreachable();
  }

  // The layer whose KV cache layer l reads (R-CLA's mu(l)): itself, the first layer of its group, or the nearest kept
  // layer below.
  int cache_of(int l) const {
    switch (method) {
      case Method::full:
      case Method::speed:
      case Method::pop: return l;
      case Method::swiftkv: return l < k ? l : l - (l - k) % group;
      case Method::share: {
        while (!kept[l]) --l;
        return l;
      }
    }
    __builtin_unreachable();
  }
  bool has_cache(int l) const { return cache_of(l) == l; }

  // True if prompt tokens have slots in the KV cache that layer l reads. If false, it holds the anchor and decode-phase
  // tokens only.
  bool caches_prompt(int l) const {
    switch (method) {
      case Method::speed: return l < k;
      case Method::full:
      case Method::pop:
      case Method::swiftkv:
      case Method::share: return true;
    }
    __builtin_unreachable();
  }

  // True if the cache that layer l reads leaves out prompt tokens, and so BoS, and gets the anchor instead.
  bool needs_anchor_slot(int l) const { return bos && !caches_prompt(l); }

  // True if SwiftKV's projections make layer l's keys and values, for prompt and decode-phase tokens alike.
  bool uses_swiftkv(int l) const { return method == Method::swiftkv && l >= k; }

  // The number of prompt tokens in a request of n tokens, unless --split says otherwise. POP's boundary step: all but
  // the last token are prompt, and that one is the first full-depth step. The others take the request's own split: in a
  // chat the assistant header is decode-phase.
  size_t split(size_t request_split, size_t n) const {
    switch (method) {
      case Method::pop: return n - 1;
      case Method::full:
      case Method::speed:
      case Method::swiftkv:
      case Method::share: return request_split;
    }
    __builtin_unreachable();
  }

  // Slots filled in the cache that layer l reads, after n_prompt prompt and n_decode decode-phase tokens. The anchor is
  // a prompt token: a request that is BoS alone has no prompt, and BoS then is a decode-phase token.
  uint64_t slots(int l, uint64_t n_prompt, uint64_t n_decode) const {
    if (caches_prompt(l)) return n_prompt + n_decode;
    return (bos && n_prompt > 0 ? 1 : 0) + n_decode;
  }

  bool is_full() const {
    return info(method).takes_kept ? std::count(kept.begin(), kept.end(), false) == 0 : k == n_layers;
  }
};

inline Policy full_depth(int n_layers) {
  Policy p;
  p.n_layers = p.k = n_layers;
  return p;
}

// ---- what a policy costs ------------------------------------------------------------------------------------------
// Predicted by formula; the engine counts the same numbers while it runs, and tests hold both equal. FLOPs: matrix
// products and attention, 2 a multiply-add; norms, RoPE, softmax and sampling are not counted.

// What earlier turns of a conversation left in the caches, in tokens. Most are prompt tokens now. Those that upper layers
// still hold, with --keep-answers, still count as decode-phase.
struct Earlier {
  uint64_t tokens = 0;  // in all
  uint64_t kept = 0;    // of them, decode-phase
};

struct Cost {
  const Shape& s;
  const Policy& p;

  // FLOPs of one row.
  uint64_t q_flops() const { return 2 * s.hidden * s.q_width(); }
  uint64_t kv_flops() const { return 2 * s.hidden * 2 * s.kv_width(); }
  uint64_t o_flops() const { return 2 * s.q_width() * s.hidden; }
  uint64_t mlp_flops() const { return uint64_t(6) * s.hidden * s.mlp; }
  uint64_t head_flops() const { return uint64_t(2) * s.hidden * s.vocab; }
  uint64_t attention_flops(uint64_t slots_seen) const { return 4 * slots_seen * s.q_width(); }

  // n prompt tokens, after `seen` earlier tokens, in layer l. Token i attends to seen + i + 1 slots.
  uint64_t prompt_flops(int l, uint64_t n, uint64_t seen = 0) const {
    uint64_t flops = 0;
    if (p.has_cache(l) && p.caches_prompt(l)) flops += n * kv_flops();
    if (l < p.full_prompt_layers())
      flops += n * (q_flops() + o_flops() + mlp_flops()) + attention_flops(n * seen + n * (n + 1) / 2);
    return flops;
  }

  // One decode-phase token in layer l, after n_prompt prompt and n_decode decode-phase tokens. It sees itself too.
  uint64_t decode_row_flops(int l, uint64_t n_prompt, uint64_t n_decode) const {
    return q_flops() + (p.has_cache(l) ? kv_flops() : 0) + o_flops() + mlp_flops() +
           attention_flops(p.slots(l, n_prompt, n_decode) + 1);
  }

  // FLOPs of the prefill of n tokens, of which the last `tail` are decode-phase: in one layer; in all layers, with the
  // output head for the last token.
  uint64_t prefill_layer_flops(int l, uint64_t n, uint64_t tail, Earlier turns = {}) const {
    uint64_t flops = prompt_flops(l, n - tail, turns.tokens);
    for (uint64_t i = 0; i < tail; ++i)
      flops += decode_row_flops(l, turns.tokens - turns.kept + n - tail, turns.kept + i);
    return flops;
  }
  uint64_t prefill_flops(uint64_t n, uint64_t tail, Earlier turns = {}) const {
    uint64_t flops = head_flops();
    for (int l = 0; l < s.n_layers; ++l) flops += prefill_layer_flops(l, n, tail, turns);
    return flops;
  }

  // FLOPs of the decode step right after that request. In a conversation, here and below, n and `tail` count earlier
  // turns too: n + tokens, tail + kept.
  uint64_t decode_flops(uint64_t n, uint64_t tail) const {
    uint64_t flops = head_flops();
    for (int l = 0; l < s.n_layers; ++l) flops += decode_row_flops(l, n - tail, tail);
    return flops;
  }

  // KV cache, in bytes, after n_prompt prompt and n_decode decode-phase tokens. For a run that ends there the engine
  // allocates just this.
  uint64_t slot_bytes(uint64_t bytes_per_value) const { return 2 * s.kv_width() * bytes_per_value; }
  uint64_t kv_bytes(uint64_t n_prompt, uint64_t n_decode, uint64_t bytes_per_value) const {
    uint64_t slots = 0;
    for (int l = 0; l < s.n_layers; ++l)
      if (p.has_cache(l)) slots += p.slots(l, n_prompt, n_decode);
    return slots * slot_bytes(bytes_per_value);
  }

  // Weights that a decode step reads: all but the embedding table, which counts only where it is also the head.
  uint64_t layer_weights(int l) const {
    uint64_t d = s.hidden;
    return 2 * d + 2 * d * s.q_width() + (p.has_cache(l) ? 2 * d * s.kv_width() : 0) + 3 * d * s.mlp;
  }
  uint64_t weight_bytes(uint64_t bytes_per_weight) const {
    uint64_t d = s.hidden, count = d + d * s.vocab;
    for (int l = 0; l < s.n_layers; ++l) count += layer_weights(l);
    if (p.k < s.n_layers && p.uses_swiftkv(p.k)) count += d;  // norm_swiftkv
    return count * bytes_per_weight;
  }

  // Bytes that the decode step right after a request reads: weights, and in every layer the slots filled before it.
  uint64_t decode_read_bytes(uint64_t n, uint64_t tail, uint64_t bytes_per_value, uint64_t bytes_per_weight) const {
    uint64_t slots = 0;
    for (int l = 0; l < s.n_layers; ++l) slots += p.slots(l, n - tail, tail);
    return weight_bytes(bytes_per_weight) + slots * slot_bytes(bytes_per_value);
  }
};

// ---- the engine ---------------------------------------------------------------------------------------------------
// One forward pass for all policies and both backends: B is Cpu or Gpu. Tokens are processed in chunks of rows, prompt
// rows before decode-phase rows. The class begins with its state; its constructor is under "allocation".

// What happened in one layer since the engine was made.
struct LayerStats {
  uint64_t prompt_rows = 0;  // prompt rows that ran the whole layer
  uint64_t kv_rows = 0;      // rows whose keys and values it made
  uint64_t decode_rows = 0;  // decode-phase rows: they always run the whole layer
  Counters counted;
  double seconds = 0;
};

// Sizes of a run, in tokens: at most `context` in all, of which at most `decode` are decode-phase at any time.
struct Limits {
  size_t context = 0;
  size_t decode = 0;
  size_t chunk = 0;  // rows that run a layer together; 0: the backend's default
};

// Thrown by a callback to stop a run; generate() then returns what it has.
struct Interrupted {};

template <class B>
class Engine {
 public:
  using Residual = typename B::Residual;
  using Activation = typename B::Activation;
  using CacheValue = typename B::CacheValue;
  template <class T>
  using Buffer = typename B::template Buffer<T>;

 private:
  // ---- state ----

  const Model& model_;
  const Config& c_;  // the model's
  const Shape& s_;
  const Policy policy_;
  Limits limits_;
  B& b_;                        // the backend
  const Weights* w_ = nullptr;  // in the backend's memory

  Buffer<Residual> x_;                          // [rows, d]            the residual stream
  Buffer<Activation> a_;                        // [rows, d]            hidden states after a norm
  Buffer<Activation> q_, o_;                    // [rows, q]            queries; attention's output
  Buffer<Activation> kv_;                       // [2, rows, kv]        keys of this chunk, then values
  Buffer<Activation> gate_up_;                  // [2, rows, f]         the MLP's hidden layer, then scratch memory
  Buffer<float> cos_, sin_;                     // [rows, head_dim / 2] RoPE's angles, by position
  Buffer<float> frequencies_;                   // [head_dim / 2]
  Buffer<float> logits_;                        // [head_rows, V]
  Buffer<int> best_;                            // [1]                  the likeliest token
  std::vector<LayerCache<CacheValue>> caches_;  // [L]                  empty where a layer reads another's
  std::vector<LayerCache<CacheValue>> anchor_;  // [L]                  one slot each
  std::vector<Buffer<CacheValue>> cache_memory_, anchor_memory_;
  Buffer<int> step_inputs_;            // [L + 2 rows]         slots filled in each layer; tokens; positions
  std::vector<int> host_step_inputs_;  //                      the same in the host's memory

  size_t position_ = 0;            // of the next token: tokens processed so far
  std::vector<LayerStats> stats_;  // [L]
  LayerStats head_stats_;
  typename B::Step steps_[2];  // recorded decode steps: [0] ends with the logits, [1] with the likeliest token
  uint64_t kv_bytes_ = 0;      // allocated for KV caches

  static constexpr size_t max_extra_rows = 16;  // the last chunk may be longer by this
  static constexpr size_t head_rows = 32;       // rows that the output head computes together

  // ---- one layer ----
  // n rows of a chunk, the first n_prompt of them prompt tokens. These may stop early, decode-phase rows never do. So
  // the rows that a layer still processes are always the last ones, and each of the two sets is one start index.

  void layer(int l, size_t n, size_t n_prompt) {
    const LayerWeights& w = w_->layers[l];
    const size_t d = s_.hidden, q = s_.q_width(), f = s_.mlp, e = s_.head_dim;
    const bool swiftkv = policy_.uses_swiftkv(l);

    // Rows [kv_from, n) get keys and values in this layer's cache: in an upper layer of SPEED decode-phase rows only; no
    // row if the layer reads another's cache, or if project_swiftkv() has filled it.
    size_t kv_from = policy_.caches_prompt(l) ? 0 : n_prompt;
    if (!policy_.has_cache(l) || swiftkv) kv_from = n;

    // Prompt truncation. Rows [full_from, n) run the whole layer. A prompt row needs this only while a layer above makes
    // keys and values from its output. Above layer K-1 none does, but layer K-1 still makes its own keys and values:
    // decode-phase tokens read them here.
    const size_t full_from = l < policy_.full_prompt_layers() ? 0 : n_prompt;

    const size_t from = std::min(kv_from, full_from), m = n - full_from;
    stats_[l].prompt_rows += full_from == 0 ? n_prompt : 0;
    stats_[l].decode_rows += n - n_prompt;
    if (from == n) return;  // nothing to do here for a chunk of prompt rows

    // Keys and values from the normed residual. (POP above K: the residual of a prompt row no longer changes, so this
    // is the residual that entered layer K, under this layer's own norm and weights.)
    b_.rmsnorm(a_.get() + from * d, x_.get() + from * d, w.attention_norm, n - from, d, c_.rms_norm_eps);
    if (kv_from < n) project_kv(l, a_.get() + kv_from * d, kv_from, n, w.wk, w.wv);
    if (m == 0) return;

    // Attention: x += attention(q) Wo. Row i of the m rows sees the slots filled before it and its own.
    Residual* x = x_.get() + full_from * d;
    const auto& cache = caches_[policy_.cache_of(l)];
    b_.project_q(q_.get(), a_.get() + full_from * d, swiftkv ? w.swiftkv_wq : w.wq, cos_.get() + full_from * e / 2,
                 sin_.get() + full_from * e / 2, m, d, s_.n_heads, e);
    b_.attention(o_.get(), q_.get(), cache, m, cache.used - m + 1, s_.n_heads, s_.n_kv_heads, e);
    if (on_attention) on_attention(l, position_ + full_from, m, q_.get(), cache, o_.get());
    b_.matmul(x, o_.get(), w.wo, m, q, d, true);

    // MLP: gate = silu(a Wgate) * (a Wup), then x += gate Wdown.
    b_.rmsnorm(a_.get(), x, w.mlp_norm, m, d, c_.rms_norm_eps);
    b_.mlp_gate_up(gate_up_.get(), gate_up_.get() + m * f, a_.get(), w.gate, w.up, m, d, f);
    b_.matmul(x, gate_up_.get(), w.down, m, f, d, true);
  }

  // Keys and values of rows [from, n), made from their normed states a and appended to layer l's cache. They are a
  // product of their own, even where queries are made too. A library picks its kernel by shape, so only then are caches
  // below K bit-equal to full depth's.
  void project_kv(int l, const Activation* a, size_t from, size_t n, const bf16* wk, const bf16* wv) {
    const size_t m = n - from, angles = from * s_.head_dim / 2;
    b_.project_kv(caches_[l], kv_.get(), kv_.get() + m * s_.kv_width(), a, wk, wv, cos_.get() + angles,
                  sin_.get() + angles, m, s_.hidden, s_.n_kv_heads, s_.head_dim);
    stats_[l].kv_rows += n - from;
  }

  // SwiftKV, once a chunk, before layer K: one shared norm of the residual that enters K, and from it the keys and
  // values of every group of layers above.
  void project_swiftkv(size_t n) {
    count_into(stats_[policy_.k],
               [&] { b_.rmsnorm(a_.get(), x_.get(), w_->swiftkv_norm, n, s_.hidden, c_.rms_norm_eps); });
    for (int l = policy_.k; l < s_.n_layers; ++l) {
      const LayerWeights& w = w_->layers[l];
      if (policy_.has_cache(l))
        count_into(stats_[l], [&] { project_kv(l, a_.get(), 0, n, w.swiftkv_wk, w.swiftkv_wv); });
    }
  }

  // A chunk through all layers: n rows whose tokens and positions are in step_inputs_.
  void forward(size_t n, size_t n_prompt) {
    const int *tokens = step_inputs_.get() + s_.n_layers, *positions = tokens + n;
    b_.embed(x_.get(), w_->embedding, tokens, n, s_.hidden);
    b_.rope_angles(cos_.get(), sin_.get(), frequencies_.get(), positions, n, s_.head_dim / 2);
    for (int l = 0; l < s_.n_layers; ++l) {
      if (l == policy_.k && policy_.uses_swiftkv(l)) project_swiftkv(n);
      count_into(stats_[l], [&] { layer(l, n, n_prompt); });
      if (on_layer) on_layer(l, position_, n, x_.get());
    }
    position_ += n;
  }

  // Final norm and output head: logits of m <= head_rows rows of the chunk, from `row` on.
  void head(size_t row, size_t m) {
    const size_t d = s_.hidden;
    head_stats_.decode_rows += m;
    count_into(head_stats_, [&] {
      b_.rmsnorm(a_.get(), x_.get() + row * d, w_->final_norm, m, d, c_.rms_norm_eps);
      b_.matmul(logits_.get(), a_.get(), w_->head, m, d, s_.vocab);
    });
  }

 public:
  // ---- prefill ----

  // Receives the logits [V] that follow decode-phase token i of the request.
  using Logits = std::function<void(size_t i, const float* logits)>;

  // Processes a request: tokens[0, split) are prompt, tokens[split, N) decode-phase, 0 <= split < N. They follow what
  // the caches already hold. Calls `logits` for the last token, or, with `all`, for every decode-phase token.
  void prefill(std::span<const int> tokens, size_t split, const Logits& logits, bool all = false) {
    check_request(tokens, split);
    const size_t N = tokens.size();
    for (size_t begin = 0; begin < N;) {
      size_t end = std::min(begin + limits_.chunk, N);
      if (N - end <= max_extra_rows) end = N;  // a few rows more cost less than reading all weights once more
      const size_t n = end - begin, n_prompt = split > begin ? std::min(split, end) - begin : 0;
      if (position_ == 0 && n_prompt > 0) store_anchor();
      set_step_inputs(tokens.subspan(begin, n));
      forward(n, n_prompt);
      const size_t wanted = all ? n - n_prompt : end == N ? 1 : 0;
      for (size_t i = 0; i < wanted; i += head_rows) {
        const size_t m = std::min(head_rows, wanted - i);
        head(n - wanted + i, m);
        const float* l = b_.on_host(logits_.get(), m * s_.vocab);
        for (size_t r = 0; r < m; ++r) logits(end - wanted + i + r - split, l + r * s_.vocab);
      }
      begin = end;
    }
  }

  // ---- decode ----

  // One generated token, fed back. Returns the logits [V] of the next one, valid until the next call.
  const float* decode(int token) {
    step(token, false);
    return b_.on_host(logits_.get(), s_.vocab);
  }

  // The same, for the likeliest next token: its logits stay in the backend's memory.
  int decode_greedy(int token) {
    step(token, true);
    int best = 0;
    b_.download(&best, best_.get(), 1);
    if (best < 0) throw not_a_number();
    return best;
  }

 private:
  void step(int token, bool greedy) {
    const std::span<const int> tokens(&token, 1);
    check_request(tokens, 0);
    set_step_inputs(tokens);
    b_.replay(steps_[greedy], [&] {
      forward(1, 0);
      head(0, 1);
      if (greedy) b_.arg_max(best_.get(), logits_.get(), s_.vocab);
    });
  }

  // Gives the backend what differs from call to call: slots filled in each layer, tokens, and their positions. A
  // position counts every token of the conversation, in every layer; RoPE uses it. A slot counts what a cache holds.
  void set_step_inputs(std::span<const int> tokens) {
    const size_t n = tokens.size(), L = s_.n_layers;
    host_step_inputs_.resize(L + 2 * n);
    for (size_t l = 0; l < L; ++l) host_step_inputs_[l] = int(caches_[l].begin = caches_[l].used);
    for (size_t i = 0; i < n; ++i)
      host_step_inputs_[L + i] = tokens[i], host_step_inputs_[L + n + i] = int(position_ + i);
    b_.upload(step_inputs_.get(), host_step_inputs_.data(), host_step_inputs_.size());
  }

  // ---- the anchor ----
  // BoS is at position 0 and attends only to itself, so its keys and values in every layer depend on its id alone: they
  // are constants of the model. An engine computes them once, by a full-depth run of that one token, and copies them
  // into slot 0 of every cache that leaves out prompt tokens. Without the anchor, SmolLM2's answers fall apart soon below full depth.

  bool uses_anchor() const {
    for (int l = 0; l < s_.n_layers; ++l)
      if (policy_.needs_anchor_slot(l)) return true;
    return false;
  }

  void make_anchor() {
    if (c_.bos < 0) throw Error(2, "--bos", "this model has no BoS token", "use --no-bos");
    Engine alone(model_, full_depth(s_.n_layers), {1, 1, 1}, b_);
    alone.set_step_inputs(std::span(&c_.bos, 1));
    alone.forward(1, 0);
    anchor_ = std::move(alone.caches_);
    anchor_memory_ = std::move(alone.cache_memory_);
    b_.counters = {};  // this work is not the request's
  }

  void store_anchor() {
    const size_t e = s_.head_dim, g = s_.n_kv_heads;
    for (int l = 0; l < s_.n_layers; ++l)
      if (policy_.needs_anchor_slot(l)) b_.append(caches_[l], anchor_[l].k, anchor_[l].v, 1, g, e);
  }

 public:
  // Where a conversation stands. go_back() returns there, as if nothing had come after: tokens only ever add slots, so
  // the number of each cache's slots says it all.
  struct Mark {
    size_t position = 0;
    std::vector<size_t> used;  // [L]
  };
  Mark mark() const {
    Mark m{position_, {}};
    for (const auto& cache : caches_) m.used.push_back(cache.used);
    return m;
  }
  void go_back(const Mark& m) {
    position_ = m.position;
    for (size_t l = 0; l < caches_.size(); ++l) caches_[l].used = m.used[l];
  }

  // Ends a turn of a conversation: its decode-phase tokens are prompt tokens of the next. So they lose their slots where
  // prompt tokens have none, and only the anchor stays, unless answers are kept.
  void end_turn(bool keep_answers) {
    for (int l = 0; l < s_.n_layers; ++l)
      if (!policy_.caches_prompt(l) && !keep_answers) caches_[l].used = std::min<size_t>(caches_[l].used, policy_.bos);
  }

  // ---- what a run did ----

  // Called after every layer of every chunk, with the residual stream x [rows, d] in the backend's memory (on_host
  // copies it); `first` is the position of row 0. It may throw Interrupted. In a decode step a GPU may run all layers
  // later, at once: x then has no values yet.
  std::function<void(int layer, size_t first, size_t rows, const Residual* x)> on_layer;
  // Called after every layer's attention, with its queries q and output o [rows, n_heads, head_dim] and the cache it
  // read, all in the backend's memory. Row i has position first + i and saw slots [0, cache.used - rows + 1 + i).
  std::function<void(int layer, size_t first, size_t rows, const Activation* q, const LayerCache<CacheValue>& cache,
                     const Activation* o)>
      on_attention;
  bool time_layers = false;  // wait for each layer, so that its seconds are its own

  size_t position() const { return position_; }
  const std::vector<LayerStats>& layers() const { return stats_; }
  const LayerStats& head_stats() const { return head_stats_; }
  Counters counted() const {
    Counters all = head_stats_.counted;
    for (const LayerStats& l : stats_) all += l.counted;
    return all;
  }
  const LayerCache<CacheValue>& cache(int l) const { return caches_[policy_.cache_of(l)]; }
  uint64_t kv_bytes_used() const {
    uint64_t slots = 0;
    for (const auto& cache : caches_) slots += cache.used;
    return slots * 2 * s_.kv_width() * sizeof(CacheValue);
  }
  uint64_t kv_bytes_allocated() const { return kv_bytes_; }
  const Shape& shape() const { return s_; }

 private:
  // Runs `work` and adds the FLOPs and bytes that the backend counted to `stats`.
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

  // ---- allocation ----
 public:
  // `announce` is called as soon as it is known that the run fits into memory, before any is allocated.
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
    if (uses_anchor()) make_anchor();
  }

  // Memory beside the weights, in bytes: KV caches, activations, logits.
  uint64_t bytes_needed() const {
    const uint64_t rows = limits_.chunk + max_extra_rows;
    const uint64_t activations = s_.hidden + 2 * s_.q_width() + 2 * s_.kv_width() + 2 * uint64_t(s_.mlp);
    return kv_bytes_needed() + head_rows * s_.vocab * sizeof(float) +
           rows * (s_.hidden * sizeof(Residual) + activations * sizeof(Activation) + s_.head_dim * sizeof(float));
  }
  uint64_t kv_bytes_needed() const {
    uint64_t slots = 0;
    for (int l = 0; l < s_.n_layers; ++l)
      if (policy_.has_cache(l)) slots += capacity(l);
    return slots * 2 * s_.kv_width() * sizeof(CacheValue);
  }

 private:
  // Slots that a run can fill. Where prompt tokens have none, that is the anchor (1: there is a prompt) and decode-phase
  // tokens: this is the memory SPEED saves.
  size_t capacity(int l) const {
    return policy_.caches_prompt(l) ? limits_.context
                                    : size_t(policy_.slots(l, 1, std::min(limits_.decode, limits_.context)));
  }

  void allocate() {
    const size_t rows = limits_.chunk + max_extra_rows, kv = s_.kv_width();
    auto make = [](auto& buffer, size_t n) { buffer = std::remove_reference_t<decltype(buffer)>(n); };
    make(x_, rows * s_.hidden), make(a_, rows * s_.hidden);
    make(q_, rows * s_.q_width()), make(o_, rows * s_.q_width());
    make(kv_, 2 * rows * kv), make(gate_up_, 2 * rows * s_.mlp);
    make(cos_, rows * s_.head_dim / 2), make(sin_, rows * s_.head_dim / 2);
    make(logits_, head_rows * s_.vocab), make(best_, 1);
    make(step_inputs_, s_.n_layers + 2 * rows);
    const std::vector<float> frequencies = rope_frequencies(c_, model_.weights.rope_divisors);
    make(frequencies_, frequencies.size());
    b_.upload(frequencies_.get(), frequencies.data(), frequencies.size());
    stats_.resize(s_.n_layers);
    caches_.resize(s_.n_layers);
    for (int l = 0; l < s_.n_layers; ++l) {
      if (!policy_.has_cache(l)) continue;
      const size_t n = capacity(l) * kv;
      CacheValue* memory = cache_memory_.emplace_back(2 * n).get();
      kv_bytes_ += 2 * n * sizeof(CacheValue);
      LayerCache<CacheValue>& cache = caches_[l];
      cache.k = memory, cache.v = memory + n;
      cache.capacity = capacity(l);
      cache.device_begin = reinterpret_cast<const uint32_t*>(step_inputs_.get() + l);
    }
  }

  // ---- checks ----

  void check_request(std::span<const int> tokens, size_t split) const {
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
      const size_t anchor = position_ == 0 && split > 0 && policy_.bos;
      if (!policy_.caches_prompt(l) && c.used + anchor + tokens.size() - split > c.capacity)
        throw Error(2, "context",
                    "more decode-phase tokens than the " + std::to_string(limits_.decode) + " there is room for",
                    "use a larger --split, or a smaller -n");
    }
    if (position_ > 0) return;
    if (tokens.size() > 1 && c_.bos >= 0 && tokens[0] == c_.bos && tokens[1] == c_.bos)
      throw Error(2, "prompt", "begins with two BoS tokens", "leave one out: the engine adds its own");
    if (uses_anchor() && tokens[0] != c_.bos)
      throw Error(2, "prompt",
                  "begins with token " + std::to_string(tokens[0]) + ", expected BoS, " + std::to_string(c_.bos),
                  "put it first, or use --no-bos");
  }

  friend struct EngineTest;  // tests overwrite memory that no later token may read
};

// ---- sampling -----------------------------------------------------------------------------------------------------

struct Sampling {
  float temperature = 0;  // 0: greedy
  int top_k = 0;          // 0: off
  float top_p = 1;        // 1: off
  float min_p = 0;        // 0: off
  uint64_t seed = 0;
};

// Draws a token. It keeps the top_k likeliest; of these the fewest with a total probability of top_p (Holtzman et al.,
// arXiv 1904.09751); of these the ones at least min_p times as likely as the likeliest; then it draws by softmax(logits /
// temperature). The same seed and logits give the same tokens on every machine.
class Sampler {
 public:
  explicit Sampler(const Sampling& s) : s_(s), random_(s.seed) {}

  bool greedy() const { return s_.temperature == 0; }

  int operator()(const float* logits, size_t vocab) {
    const int best = arg_max(logits, vocab);
    if (greedy()) return best;
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

// ---- generation: token ids in, token ids out ----------------------------------------------------------------------

enum class Ended { at_stop_token, by_caller, at_limit, interrupted };
struct Answer {
  std::vector<int> ids;     // generated, a stop token at the end included
  size_t decode_steps = 0;  // how many of these were fed back
  double first_token = 0;   // seconds from the start of prefill to the first token
  double decode = 0;        // seconds for all decode steps
  Counters prompt, steps;   // counted in this prefill, and in these decode steps
  uint64_t kv_bytes = 0;    // in the KV caches at the end
  Ended ended = Ended::at_limit;
};

// Prefills ids[0, N), the first `split` of them prompt, then generates up to max_new tokens. It stops after a token of
// stop_ids, or when on_token, called with every other token as soon as it is known, returns false.
template <class B>
Answer generate(Engine<B>& engine, std::span<const int> ids, size_t split, size_t max_new, Sampler sampler,
                std::span<const int> stop_ids, const std::function<bool(int)>& on_token) {
  using clock = std::chrono::steady_clock;
  auto seconds_since = [](clock::time_point t) { return std::chrono::duration<double>(clock::now() - t).count(); };
  const size_t vocab = size_t(engine.shape().vocab);
  Answer a;
  const Counters before = engine.counted();
  const auto start = clock::now();
  try {
    int token = 0;
    engine.prefill(ids, split, [&](size_t, const float* logits) { token = sampler(logits, vocab); });
    a.prompt = engine.counted() - before;
    a.first_token = seconds_since(start);
    const auto decode_start = clock::now();
    for (;;) {
      a.ids.push_back(token);
      if (std::find(stop_ids.begin(), stop_ids.end(), token) != stop_ids.end()) a.ended = Ended::at_stop_token;
      else if (!on_token(token)) a.ended = Ended::by_caller;
      else if (a.ids.size() < max_new) {
        token = sampler.greedy() ? engine.decode_greedy(token) : sampler(engine.decode(token), vocab);
        ++a.decode_steps;
        a.decode = seconds_since(decode_start);
        continue;
      }
      break;
    }
  } catch (const Interrupted&) {
    a.ended = Ended::interrupted;
  }
  if (a.first_token == 0) a.prompt = engine.counted() - before;  // interrupted on the way
  a.steps = engine.counted() - before - a.prompt;
  a.kv_bytes = engine.kv_bytes_used();
  return a;
}

}  // namespace speed

// ---- the rest of the program --------------------------------------------------------------------------------------
// Flags, modes, reports. Left out where a test, or a mode compiled on its own, includes this file for the method.

#ifdef SPEED_METHOD_ONLY
extern template class speed::Engine<speed::Cpu>;  // compiled once, here or in the tests' main.cpp
#else
template class speed::Engine<speed::Cpu>;

#include "cli/program.h"  // from the command line to the calls above

int main(int argc, char** argv) { return speed::program(argc, argv); }
#endif
#endif  // SPEED_CU
