// perplexity.cpp - the mode `perplexity`: see perplexity.h.
#include "perplexity.h"

#include <iostream>

#include "modes.h"

namespace speed {

Table quality_table(const std::vector<Policy>& policies, const std::vector<std::vector<TokenScore>>& scores,
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
               bos_of(p),
               describe(p),
               scores[j].size(),
               {q.ppl, fixed(q.ppl, 3)},
               {one ? json() : json(q.ppl_stderr), one ? "-" : fixed(q.ppl_stderr, 3)},
               {q.kl_mean, fixed(q.kl_mean, 4)},
               {q.kl_p99, fixed(q.kl_p99, 4)},
               {q.same_top1, percent(q.same_top1)},
               {work[j].prefill_flops, flops_text(double(work[j].prefill_flops))},
               {work[j].kv_bytes, bytes_text(double(work[j].kv_bytes))}});
  }
  return table;
}

static std::vector<Piece> read_pieces(const Options& o, const Model& model) {
  const Config& c = model.config;
  if (int(!o.tokens.empty()) + int(!o.tokens_file.empty()) + int(has_text(o)) > 1)
    throw Error(2, "text", "given in more than one way", "use one of -p, -f, --tokens, --tokens-file");
  const bool ids = !o.tokens.empty() || !o.tokens_file.empty();
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
    if (left > 0 && left <= prompt) note(counted(left, "token") + " at the end are left out: too few for a piece");
    return pieces;
  }
  if (o.prompt_tokens)
    throw Error(2, "--prompt-tokens", "ids are one piece, not cut", "use --split, or give a text with -p or -f");
  Piece p{given_ids(o), 0, 0};
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

std::vector<Piece> make_pieces(const Options& o, const Model& model) {
  const Config& c = model.config;
  std::vector<Piece> pieces = read_pieces(o, model);
  for (const Piece& p : pieces)
    for (int id : p.ids)  // the last one of a piece is never fed to the engine, which checks the others
      if (id >= c.shape.vocab)
        throw Error(2, "token " + std::to_string(id), "outside a vocabulary of " + std::to_string(c.shape.vocab),
                    "use ids of this model");
  const size_t longest = pieces[0].ids.size();
  if (longest - 1 > size_t(c.context))
    note("pieces of " + std::to_string(longest - 1) + " tokens are longer than the " + std::to_string(c.context) +
         " the model was made for");
  const uint64_t need = 2 * pieces[0].answer * uint64_t(c.shape.vocab) * sizeof(float);
  if (need > available_memory())
    throw Error(2, "memory",
                "the logits of a piece take " + std::to_string(need >> 20) + " MiB, " +
                    std::to_string(available_memory() >> 20) + " MiB are available",
                "use a smaller --answer-tokens");
  return pieces;
}

template <class B>
int perplexity(const Options& o, json& record, const Model& model, B& backend) {
  const Config& c = model.config;
  std::vector<Policy> policies = compared_policies(o, model);
  if (policies.size() > 1 && policies[1].method == Method::full) policies.pop_back();
  const std::vector<Piece> pieces = make_pieces(o, model);
  const size_t longest = pieces[0].ids.size(), scored = pieces[0].answer;
  note_if_not_adapted(policies, c);
  const auto scores = score_pieces(model, policies, pieces, o, backend);
  std::vector<Work> work;
  for (const Policy& p : policies) work.push_back(work_of(c.shape, p, pieces, sizeof(typename B::CacheValue)));
  const Table table = quality_table(policies, scores, work);
  if (o.format == "text")
    std::cout << c.shape.name << ": " << counted(scores[0].size(), "token") << " scored, in "
              << counted(pieces.size(), "piece") << " of " << longest - scored << " prompt and " << scored
              << " answer tokens\nKL from full depth, in nats a token; prompt work of all pieces, KV cache of one\n\n";
  table.print(std::cout, o.format);
  record["results"] = table.rows_as_json();
  record["pieces"] = pieces.size();
  return 0;
}

int run_perplexity(const Options& o, json& record) {
  return on_device(o, record, [&](Model& m, auto& backend) { return perplexity(o, record, m, backend); });
}

}  // namespace speed
