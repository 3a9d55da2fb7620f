// perplexity.h - how well a policy predicts a text, beside full depth on the same tokens.
//
// The text is cut into pieces of N prompt and M answer tokens, because a policy does something only where there is a
// prompt. Every answer token is scored, given all before it in its piece. As in `generate`, the token before
// the answer is decode-phase: it predicts the first answer token. Over the scored tokens t, with p full depth's distribution of the
// next token and q the policy's:
//
//   perplexity   exp(mean of -ln q(t)); its standard error by the delta method, tokens taken as independent
//   KL           sum over the vocabulary of p ln(p / q), in nats: mean, and 99th percentile (nearest rank)
//   same top-1   share of tokens at which p and q have the same likeliest token
#pragma once

#include <cmath>
#include <span>
#include <vector>

#include "run.h"

namespace speed {

// Token ids of which the first `split` are prompt, the rest decode-phase; the last `answer` of them are scored.
struct Piece {
  std::vector<int> ids;
  size_t split = 0, answer = 0;
};

// Cuts a text's ids into pieces of n prompt tokens and m answer tokens. Each piece begins with BoS (where bos >= 0),
// which is one of its n. The last piece may have fewer answer tokens, but at least one; a shorter rest is dropped.
inline std::vector<Piece> cut(std::span<const int> text, int bos, size_t n, size_t m) {
  std::vector<Piece> pieces;
  const size_t prompt = n - (bos >= 0);
  for (size_t a = 0; a + prompt < text.size(); a += prompt + m) {
    Piece p{{}, n - 1, std::min(m, text.size() - a - prompt)};
    if (bos >= 0) p.ids.push_back(bos);
    p.ids.insert(p.ids.end(), text.begin() + long(a), text.begin() + long(a + prompt + p.answer));
    pieces.push_back(std::move(p));
  }
  return pieces;
}

// Pieces from the flags: one given as ids, or a text cut up. Throws Error 2 where they are none.
std::vector<Piece> make_pieces(const Options& o, const Model& model);

// One distribution over the next token, compared with full depth's and with the token that followed.
struct TokenScore {
  double nll = 0;  // -ln of the token's probability
  double kl = 0;   // from full depth, nats
  bool same_top1 = true;
};

// The distribution before one token: logits [vocab], and the likeliest of them.
struct Row {
  const float* logits;
  int best;
};

// In double, because differences of log-probabilities are small.
inline TokenScore score(const Row& full, const Row& own, size_t vocab, int token) {
  const double own_max = own.logits[own.best], full_max = full.logits[full.best];
  double sum = 0, full_sum = 0, lead = 0;
  for (size_t i = 0; i < vocab; ++i) sum += std::exp(own.logits[i] - own_max);
  const double log_sum = own_max + std::log(sum);
  TokenScore s{log_sum - own.logits[token], 0, full.best == own.best};
  if (full.logits == own.logits) return s;
  for (size_t i = 0; i < vocab; ++i) {
    const double e = std::exp(full.logits[i] - full_max);
    full_sum += e;
    lead += e * (double(full.logits[i]) - own.logits[i]);
  }
  s.kl = std::max(lead / full_sum - (full_max + std::log(full_sum)) + log_sum, 0.0);  // below 0 only by rounding
  return s;
}

struct AnswerLogits {
  size_t vocab;
  std::vector<float> logits;  // [answer, vocab], before each answer token
  std::vector<int> best;      // [answer]
  Row row(size_t i) const { return {logits.data() + i * vocab, best[i]}; }
};

template <class B>
AnswerLogits answer_logits(const Model& model, const Policy& p, const Piece& piece, const Options& o, B& backend,
                           const std::function<void(double)>& progress) {
  const std::span<const int> fed(piece.ids.data(), piece.ids.size() - 1);  // what follows the last one is not scored
  const size_t vocab = size_t(model.config.shape.vocab), first = fed.size() - piece.answer - piece.split;
  AnswerLogits all{vocab, {}, {}};
  all.logits.reserve(piece.answer * vocab);
  Engine<B> engine = make_engine(model, p, fed.size(), fed.size() - piece.split, o, backend);
  engine.on_layer = prefill_progress(engine, fed.size(), progress);
  engine.prefill(
      fed, piece.split,
      [&](size_t i, const float* l) {
        if (i < first) return;
        all.best.push_back(arg_max(l, vocab));  // refuses NaN
        all.logits.insert(all.logits.end(), l, l + vocab);
      },
      true);
  return all;
}

// Scores of every answer token under every policy, [policies][tokens]; policies[0] is full depth.
template <class B>
std::vector<std::vector<TokenScore>> score_pieces(const Model& model, const std::vector<Policy>& policies,
                                                  const std::vector<Piece>& pieces, const Options& o, B& backend) {
  const size_t vocab = size_t(model.config.shape.vocab);
  std::vector<std::vector<TokenScore>> scores(policies.size());
  Progress progress("perplexity");
  for (size_t i = 0; i < pieces.size(); ++i) {
    const Piece& piece = pieces[i];
    AnswerLogits full{};
    const int* tokens = piece.ids.data() + piece.ids.size() - piece.answer;
    for (size_t j = 0; j < policies.size(); ++j) {
      AnswerLogits run = answer_logits(model, policies[j], piece, o, backend, [&](double share) {
        progress.update((double(i) + (double(j) + share) / double(policies.size())) / double(pieces.size()));
      });
      if (j == 0) full = std::move(run);
      const AnswerLogits& own = j == 0 ? full : run;
      const size_t before = scores[j].size();
      scores[j].resize(before + piece.answer);
#pragma omp parallel for
      for (size_t t = 0; t < piece.answer; ++t)
        scores[j][before + t] = score(full.row(t), own.row(t), vocab, tokens[t]);
    }
  }
  return scores;
}

struct Quality {
  double ppl = 0, ppl_stderr = 0, kl_mean = 0, kl_p99 = 0, same_top1 = 0;  // ppl_stderr: NaN for a single token
};

inline Quality summarize(const std::vector<TokenScore>& scores) {
  const double n = double(scores.size());
  double nll = 0, squares = 0;
  Quality q;
  std::vector<double> kl;
  for (const TokenScore& s : scores) {
    nll += s.nll, q.kl_mean += s.kl, q.same_top1 += s.same_top1;
    kl.push_back(s.kl);
  }
  nll /= n, q.kl_mean /= n, q.same_top1 /= n;
  for (const TokenScore& s : scores) squares += (s.nll - nll) * (s.nll - nll);
  q.ppl = std::exp(nll);
  q.ppl_stderr = q.ppl * std::sqrt(squares / (n - 1) / n);
  std::sort(kl.begin(), kl.end());
  q.kl_p99 = kl[(99 * kl.size() + 99) / 100 - 1];
  return q;
}

// Prefill work of all pieces; the KV cache at the end of the longest, its answer included: pieces run one after the other.
struct Work {
  uint64_t prefill_flops = 0, kv_bytes = 0;
};

inline Work work_of(const Shape& shape, const Policy& p, const std::vector<Piece>& pieces, uint64_t bytes_per_value) {
  const Cost cost{shape, p};
  Work w;
  for (const Piece& piece : pieces) {
    const uint64_t prompt = piece.ids.size() - piece.answer;
    w.prefill_flops += cost.prefill_flops(prompt, prompt - piece.split);
    w.kv_bytes = std::max(w.kv_bytes, cost.kv_bytes(piece.split, piece.ids.size() - 1 - piece.split, bytes_per_value));
  }
  return w;
}

}  // namespace speed
