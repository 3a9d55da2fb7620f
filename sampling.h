// sampling.h - which token comes next, by the logits.
#pragma once

#include <random>
#include <vector>

#include "cpu.h"

namespace speed {

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
