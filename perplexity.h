// perplexity.h - how well a policy predicts a text, beside full depth on the same tokens.
//
// The text is cut into pieces of N prompt and M answer tokens, because a policy does something only where there is a
// prompt. Every answer token is scored, given all before it in its piece. As in `generate`, the last prompt token is
// decode-phase: it predicts the first answer token. Over the scored tokens t, with p full depth's distribution of the
// next token and q the policy's:
//
//   perplexity   exp(mean of -ln q(t)); its standard error by the delta method, tokens taken as independent
//   KL           sum over the vocabulary of p ln(p / q), in nats: mean, and 99th percentile (nearest rank)
//   same top-1   share of tokens at which p and q have the same likeliest token
#pragma once

#include "generate.h"

namespace speed {

// Token ids of which the first `split` are prompt, the rest decode-phase; the last `answer` of them are scored.
struct Piece {
  std::vector<int> ids;
  size_t split = 0, answer = 0;
};

// Cuts a text's ids into pieces of n prompt tokens, BoS in front of each and counted (where bos >= 0), and m answer
// tokens. The last piece may have fewer answer tokens, but one at least; what is left then is in no piece.
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

// Of one distribution over the next token, against full depth's and the token that came.
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
  const double most = own.logits[own.best], full_most = full.logits[full.best];
  double sum = 0, full_sum = 0, lead = 0;
  for (size_t i = 0; i < vocab; ++i) sum += std::exp(own.logits[i] - most);
  const double norm = most + std::log(sum);
  TokenScore s{norm - own.logits[token], 0, full.best == own.best};
  if (full.logits == own.logits) return s;
  for (size_t i = 0; i < vocab; ++i) {
    const double e = std::exp(full.logits[i] - full_most);
    full_sum += e;
    lead += e * (double(full.logits[i]) - own.logits[i]);
  }
  s.kl = std::max(lead / full_sum - (full_most + std::log(full_sum)) + norm, 0.0);  // below 0 only by rounding
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
  const std::span<const int> fed(piece.ids.data(), piece.ids.size() - 1);  // nobody asks what follows the last one
  const size_t vocab = size_t(model.config.shape.vocab), first = fed.size() - piece.answer - piece.split;
  AnswerLogits all{vocab, {}, {}};
  all.logits.reserve(piece.answer * vocab);
  Engine<B> engine = make_engine(model, p, fed.size(), fed.size() - piece.split, o, backend);
  engine.on_layer = [&](int l, size_t at, size_t rows, const auto*) {
    progress((double(at) + double(rows) * (l + 1) / model.config.shape.n_layers) / double(fed.size()));
    if (interrupted) throw Interrupted{};
  };
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

// What the policy does for the prompts of all pieces, up to the first answer token, and what its caches then hold at
// the end of each, answer included.
struct Work {
  uint64_t prefill_flops = 0, kv_bytes = 0;
};

inline Work work_of(const Shape& shape, const Policy& p, const std::vector<Piece>& pieces, uint64_t bytes_per_value) {
  const Cost cost{shape, p};
  Work w;
  for (const Piece& piece : pieces) {
    const uint64_t prompt = piece.ids.size() - piece.answer;
    w.prefill_flops += cost.prefill_flops(prompt, prompt - piece.split);
    w.kv_bytes += cost.kv_bytes(piece.split, piece.ids.size() - 1 - piece.split, bytes_per_value);
  }
  return w;
}

inline Table quality_table(const std::vector<Policy>& policies, const std::vector<std::vector<TokenScore>>& scores,
                           const std::vector<Work>& work) {
  Table table({{"policy", ""},
               {"k", ""},
               {"bos", ""},
               {"name", "policy"},
               {"tokens", "tokens"},
               {"ppl", "perplexity"},
               {"ppl_stderr", "+-"},
               {"kl_mean", "KL"},
               {"kl_p99", "KL 99 %"},
               {"same_top1", "same top-1"},
               {"prefill_flops", "prompt work"},
               {"kv_bytes", "KV cache"}});
  for (size_t j = 0; j < policies.size(); ++j) {
    const Policy& p = policies[j];
    const Quality q = summarize(scores[j]);
    const bool one = scores[j].size() == 1;
    table.row({name(p.method),
               p.k,
               p.method == Method::speed ? json(p.bos) : json(),
               describe(p),
               scores[j].size(),
               {q.ppl, fixed(q.ppl, 3)},
               {one ? json() : json(q.ppl_stderr), one ? "-" : fixed(q.ppl_stderr, 3)},
               {q.kl_mean, fixed(q.kl_mean, 4)},
               {q.kl_p99, fixed(q.kl_p99, 4)},
               {q.same_top1, fixed(100 * q.same_top1, 1) + " %"},
               {work[j].prefill_flops, flops_text(double(work[j].prefill_flops))},
               {work[j].kv_bytes, bytes_text(double(work[j].kv_bytes))}});
  }
  return table;
}

// Pieces from the flags: one given as ids, or a text cut up.
inline std::vector<Piece> make_pieces(const Options& o, const Model& model) {
  const Config& c = model.config;
  const bool ids = !o.tokens.empty() || !o.tokens_file.empty(), text = o.has_prompt || !o.file.empty() || o.from_stdin;
  if (ids == text || (!o.tokens.empty() && !o.tokens_file.empty()))
    throw Error(2, "text", ids ? "given in more than one way" : "none given",
                "use one of -p, -f, --tokens, --tokens-file");
  if (!ids) {
    if (o.split) throw Error(2, "--split", "a text is cut by --prompt-tokens", "use that, or give ids with --tokens");
    const size_t n = size_t(o.prompt_tokens.value_or(256)), m = size_t(o.answer_tokens.value_or(256));
    const std::vector<int> all = model.tokenizer->encode(read_text(o), false);
    const std::vector<Piece> pieces = cut(all, c.bos, n, m);
    const size_t prompt = n - (c.bos >= 0), left = all.size() % (prompt + m);
    if (pieces.empty())
      throw Error(2, "text",
                  std::to_string(all.size()) + " tokens are too few for a prompt of " + std::to_string(prompt) +
                      " and one to score",
                  "use a smaller --prompt-tokens, or a longer text");
    if (left > 0 && left <= prompt)
      note("the last " + std::to_string(left) + " tokens are too few for a piece and left out");
    return pieces;
  }
  if (o.prompt_tokens)
    throw Error(2, "--prompt-tokens", "ids are one piece, not cut", "use --split, or give a text with -p or -f");
  Piece p{o.tokens.empty() ? read_ids(read_file(o.tokens_file), "--tokens-file") : read_ids(o.tokens, "--tokens"), 0,
          0};
  const size_t n = p.ids.size();
  if (n < 3)
    throw Error(2, "tokens", std::to_string(n) + " given",
                "give 3 or more: a prompt, one decode-phase token, and what follows it");
  if (o.answer_tokens && size_t(*o.answer_tokens) > n - 2)
    throw Error(2, "--answer-tokens " + std::to_string(*o.answer_tokens), "there are " + std::to_string(n) + " tokens",
                "use 1 to " + std::to_string(n - 2));
  const size_t most = o.answer_tokens ? n - 1 - size_t(*o.answer_tokens) : n - 2;
  p.split = o.split ? size_t(*o.split) : most;
  if (p.split < 1 || p.split > most)
    throw Error(2, "--split " + std::to_string(p.split), "the token before the first scored one is decode-phase",
                "use 1 to " + std::to_string(most));
  p.answer = o.answer_tokens ? size_t(*o.answer_tokens) : n - 1 - p.split;
  return {p};
}

template <class B>
int run_perplexity(const Options& o, json& record, const Model& model, B& backend) {
  const Config& c = model.config;
  std::vector<Policy> policies = compared_policies(o, c);
  if (policies.size() > 1 && policies[1].method == Method::full) policies.pop_back();
  const std::vector<Piece> pieces = make_pieces(o, model);
  for (const Piece& p : pieces)
    for (int id : p.ids)  // the last one of a piece is never fed to the engine, which checks the others
      if (id >= c.shape.vocab)
        throw Error(2, "token " + std::to_string(id), "outside a vocabulary of " + std::to_string(c.shape.vocab),
                    "use ids of this model");
  const size_t longest = pieces[0].ids.size(), scored = pieces[0].answer;
  if (longest - 1 > size_t(c.context))
    note("pieces of " + std::to_string(longest - 1) + " tokens are longer than the " + std::to_string(c.context) +
         " the model was made for");
  const uint64_t need = 2 * scored * uint64_t(c.shape.vocab) * sizeof(float);
  if (need > available_memory())
    throw Error(2, "memory",
                "the logits of a piece take " + std::to_string(need >> 20) + " MiB, " +
                    std::to_string(available_memory() >> 20) + " MiB are available",
                "use a smaller --answer-tokens");
  note_if_not_adapted(policies, c);
  const auto scores = score_pieces(model, policies, pieces, o, backend);
  std::vector<Work> work;
  for (const Policy& p : policies) work.push_back(work_of(c.shape, p, pieces, sizeof(typename B::CacheValue)));
  const Table table = quality_table(policies, scores, work);
  if (o.format == "text")
    std::cout << c.shape.name << ": " << scores[0].size() << " tokens scored, in " << pieces.size()
              << (pieces.size() == 1 ? " piece of " : " pieces of ") << longest - scored << " prompt and " << scored
              << " answer tokens; KL from full depth, in nats a token\n\n";
  table.print(std::cout, o.format);
  record["results"] = table.rows_as_json();
  record["pieces"] = pieces.size();
  return 0;
}

}  // namespace speed
