// policy.h - which layers a prompt token visits, whose keys and values later tokens see, and what that costs.
//
// Pure functions only: no weights, no memory, no device. The engine asks them what to do (forward.h), `speed plan`
// prints what they predict, and the tests hold both equal.
//
//   L       layers, numbered 0..L-1
//   K       a prompt token visits layers 0..K-1 (the lower layers), not K..L-1 (the upper layers)
//   prompt  tokens [0, split) of a request; token 0 is the BoS token, the anchor
//   tail    tokens [split, N) known up front; like every generated token they are decode-phase: they visit all layers
//
//   full     the model as it was published
//   speed    SPEED, arXiv 2605.06105: upper layers hold the anchor and decode-phase tokens only
//   pop      POP, arXiv 2602.03295: a prompt token leaves upper keys and values projected from the residual entering K
//   swiftkv  SwiftKV, arXiv 2410.03960: upper keys and values of every token are projected from that residual
//   share    R-CLA, arXiv 2604.22782: a dropped layer reads the cache of the nearest kept layer below it
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "error.h"

namespace speed {

enum class Method { full, speed, pop, swiftkv, share };

inline const char* name(Method m) {
  switch (m) {
    case Method::full:
      return "full";
    case Method::speed:
      return "speed";
    case Method::pop:
      return "pop";
    case Method::swiftkv:
      return "swiftkv";
    case Method::share:
      return "share";
  }
  return "?";
}

// ---- the policies -------------------------------------------------------------------------------------------------

struct Policy {
  Method method = Method::full;
  int n_layers = 1;        // L
  int k = 1;               // K, 1 <= K <= L; L under full and share
  bool bos = true;         // speed: do upper layers see the anchor?
  int group = 1;           // swiftkv: layers per cache above K
  std::vector<bool> kept;  // share: which layers keep a cache; kept[0] is true

  // Layers a prompt row passes whole. One law decides: a row is computed only as far as somebody will read it, and of a
  // prompt row only its keys and values are read. So it ends where the last of them are made from its residual.
  int whole_layers() const {
    switch (method) {
      case Method::full:
        return n_layers - 1;
      case Method::speed:
        return k - 1;
      case Method::pop:
      case Method::swiftkv:
        return std::min(k, n_layers - 1);
      case Method::share: {
        int last = n_layers - 1;
        while (!kept[last]) --last;
        return last;
      }
    }
    return n_layers - 1;
  }

  // Does layer l make keys and values of its own, or does it read another layer's?
  bool has_cache(int l) const { return cache_of(l) == l; }

  // The layer whose cache layer l reads.
  int cache_of(int l) const {
    if (method == Method::swiftkv && l >= k) return l - (l - k) % group;
    if (method == Method::share)
      while (!kept[l]) --l;
    return l;
  }

  // Does the cache that layer l reads hold prompt tokens, or only the anchor and decode-phase tokens?
  bool holds_prompt(int l) const { return method != Method::speed || l < k; }

  // Are layer l's keys and values, of every token, made from the one state norm_swiftkv(residual entering K)?
  bool from_shared_state(int l) const { return method == Method::swiftkv && l >= k; }

  // Is the last prompt token alone the tail, in a chat too? (POP: it is the first full-depth step.)
  bool tail_is_one_token() const { return method == Method::pop; }

  // Does the anchor need a slot of its own, because the prompt leaves none?
  bool anchor_apart(int l) const { return bos && !holds_prompt(l); }

  // Slots in the cache that layer l reads after n_prompt prompt and n_decode decode-phase tokens. The anchor is a
  // prompt token; where there is no prompt (BoS alone, run as a decode-phase row) it is not counted twice.
  uint64_t slots(int l, uint64_t n_prompt, uint64_t n_decode) const {
    if (holds_prompt(l)) return n_prompt + n_decode;
    return (bos && n_prompt > 0 ? 1 : 0) + n_decode;
  }

  bool is_full() const { return method == Method::full || (method != Method::share && k == n_layers); }
};

inline Policy full_depth(int n_layers) {
  Policy p;
  p.n_layers = p.k = n_layers;
  return p;
}

// ---- shapes -------------------------------------------------------------------------------------------------------

struct Shape {
  std::string name;
  int n_layers = 0;
  int hidden = 0;      // d, width of the residual stream
  int n_heads = 0;     // h query heads
  int n_kv_heads = 0;  // g key/value heads; query head i reads key head i / (h/g)
  int head_dim = 0;    // e
  int mlp = 0;         // f
  int vocab = 0;       // V
  bool tied = false;   // the embedding table is also the output head

  uint64_t q_width() const { return uint64_t(n_heads) * head_dim; }
  uint64_t kv_width() const { return uint64_t(n_kv_heads) * head_dim; }
};

inline std::vector<Shape> known_shapes() {
  return {{"llama-3.2-1b", 16, 2048, 32, 8, 64, 8192, 128256, true},
          {"llama-3.2-3b", 28, 3072, 24, 8, 128, 8192, 128256, true},
          {"llama-3.1-8b", 32, 4096, 32, 8, 128, 14336, 128256, false},
          {"llama-3.1-70b", 80, 8192, 64, 8, 128, 28672, 128256, false}};
}

// ---- the cost model -----------------------------------------------------------------------------------------------
// FLOPs: matrix products and attention, 2 a multiply-add; norms, RoPE, softmax and sampling are not counted.

struct Cost {
  const Shape& s;
  const Policy& p;

  uint64_t q_flops() const { return 2 * s.hidden * s.q_width(); }
  uint64_t kv_flops() const { return 2 * s.hidden * 2 * s.kv_width(); }
  uint64_t o_flops() const { return 2 * s.q_width() * s.hidden; }
  uint64_t mlp_flops() const { return uint64_t(6) * s.hidden * s.mlp; }
  uint64_t head_flops() const { return uint64_t(2) * s.hidden * s.vocab; }
  uint64_t attention_flops(uint64_t slots_seen) const { return 4 * slots_seen * s.q_width(); }

  // n prompt rows, from empty caches, in layer l.
  uint64_t prompt_flops(int l, uint64_t n) const {
    uint64_t flops = 0;
    if (p.has_cache(l) && p.holds_prompt(l)) flops += n * kv_flops();
    if (l < p.whole_layers()) flops += n * (q_flops() + o_flops() + mlp_flops()) + attention_flops(n * (n + 1) / 2);
    return flops;
  }

  // One decode-phase row in layer l, after n_prompt prompt and n_decode decode-phase tokens; it sees itself too.
  uint64_t decode_row_flops(int l, uint64_t n_prompt, uint64_t n_decode) const {
    return q_flops() + (p.has_cache(l) ? kv_flops() : 0) + o_flops() + mlp_flops() +
           attention_flops(p.slots(l, n_prompt, n_decode) + 1);
  }

  // A request of n tokens, the last `tail` of them decode-phase, in layer l.
  uint64_t prefill_layer_flops(int l, uint64_t n, uint64_t tail) const {
    uint64_t flops = prompt_flops(l, n - tail);
    for (uint64_t i = 0; i < tail; ++i) flops += decode_row_flops(l, n - tail, i);
    return flops;
  }

  // The whole request, up to the logits of its last token.
  uint64_t prefill_flops(uint64_t n, uint64_t tail) const {
    uint64_t flops = head_flops();
    for (int l = 0; l < s.n_layers; ++l) flops += prefill_layer_flops(l, n, tail);
    return flops;
  }

  // One step right after that request.
  uint64_t decode_flops(uint64_t n, uint64_t tail) const {
    uint64_t flops = head_flops();
    for (int l = 0; l < s.n_layers; ++l) flops += decode_row_flops(l, n - tail, tail);
    return flops;
  }

  uint64_t slot_bytes(uint64_t bytes_per_value) const { return 2 * s.kv_width() * bytes_per_value; }

  // What all caches hold after n_prompt prompt and n_decode decode-phase tokens. The engine allocates this for the
  // whole run, so it is also what the device reserves.
  uint64_t kv_bytes(uint64_t n_prompt, uint64_t n_decode, uint64_t bytes_per_value) const {
    uint64_t slots = 0;
    for (int l = 0; l < s.n_layers; ++l)
      if (p.has_cache(l)) slots += p.slots(l, n_prompt, n_decode);
    return slots * slot_bytes(bytes_per_value);
  }

  // Parameters of layer l that a decode step uses.
  uint64_t layer_weights(int l) const {
    uint64_t d = s.hidden;
    return 2 * d + 2 * d * s.q_width() + (p.has_cache(l) ? 2 * d * s.kv_width() : 0) + 3 * d * s.mlp;
  }

  // All parameters that a decode step uses: the embedding table only where it is also the head.
  uint64_t weight_bytes(uint64_t bytes_per_weight) const {
    uint64_t d = s.hidden, count = d + d * s.vocab;
    for (int l = 0; l < s.n_layers; ++l) count += layer_weights(l);
    if (p.method == Method::swiftkv && p.k < p.n_layers) count += d;  // norm_swiftkv
    return count * bytes_per_weight;
  }

  // Bytes the step right after a request must read: weights, and in every layer the slots it sees but its own.
  uint64_t decode_read_bytes(uint64_t n, uint64_t tail, uint64_t kv_width_bytes, uint64_t weight_width_bytes) const {
    uint64_t slots = 0;
    for (int l = 0; l < s.n_layers; ++l) slots += p.slots(l, n - tail, tail);
    return weight_bytes(weight_width_bytes) + slots * slot_bytes(kv_width_bytes);
  }
};

}  // namespace speed
