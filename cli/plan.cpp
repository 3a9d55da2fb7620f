// plan.cpp - the mode `plan`: what a policy costs, by formula, for any shape, length and batch.
#include <iostream>

#include "modes.h"
#include "policies.h"
#include "report.h"
#include "request.h"

namespace speed {

// What a batch of equal requests costs under a policy: N prompt tokens each, the last T of them decode-phase, and G new.
// The requests share the reading of weights, and nothing else.
struct Planned {
  uint64_t prefill, step, cache, weights, read;
  // How many times as fast as `full` the first token and later ones come, where work and bytes alone decide.
  double first(const Planned& full) const { return double(full.prefill) / double(prefill); }
  double later(const Planned& full) const { return double(full.read) / double(read); }
};

static uint64_t times(uint64_t batch, uint64_t one) {
  uint64_t all = 0;
  if (__builtin_mul_overflow(batch, one, &all))
    throw Error(2, "--batch " + std::to_string(batch), "the count does not fit in 64 bits",
                "use fewer requests or shorter ones");
  return all;
}

static Planned plan(const Shape& s, const Policy& p, uint64_t N, uint64_t T, uint64_t G, const Options& o) {
  const Cost cost{s, p};
  const uint64_t batch = uint64_t(o.batch), weights = cost.weight_bytes(o.weight_bytes);
  const uint64_t slots = cost.decode_read_bytes(N, T, o.kv_bytes, o.weight_bytes) - weights;
  return {times(batch, cost.prefill_flops(N, T)), times(batch, cost.decode_flops(N, T)),
          times(batch, cost.kv_bytes(N - T, T + G, o.kv_bytes)), weights, weights + times(batch, slots)};
}

// The last lines: what the policy saves, and how much faster that makes it.
static void print_saved(const Planned& full, const Planned& p, const std::string& name) {
  auto less = [](uint64_t a, uint64_t b) { return percent(1 - double(b) / double(a)); };
  const double first = p.first(full), later = p.later(full);
  std::cout << "\n"
            << name << " saves " << less(full.prefill, p.prefill) << " of the prefill, " << less(full.cache, p.cache)
            << " of the cache, " << less(full.read, p.read) << " of what a step reads.\n"
            << "First token: up to " << fixed(first, 2) << " times as fast, which papers call "
            << fixed(100 * (first - 1), 0) << " % better. Later tokens: " << fixed(later, 2) << " times.\n";
  if (p.read - p.weights >= full.read - full.weights)
    std::cout << "Later tokens gain nothing: they read every slot that full depth reads.\n";
  else if (later < 1.02)
    std::cout << "Later tokens gain nothing here: " << percent(double(full.weights) / double(full.read))
              << " of what a step reads are weights. Longer prompts and larger batches change that.\n";
}

int run_plan(const Options& o, json& record) {
  if (o.model.empty() == o.shape.empty())
    throw Error(2, "-m, --shape", o.model.empty() ? "neither given" : "both given", "use one of them");
  const Model model = load(o);
  model.need_weights();
  const Shape& s = model.config.shape;
  std::vector<Policy> policies = {full_depth(s.n_layers)}, asked = listed_policies(o, model);
  if (!o.policy && asked.empty()) asked.push_back(make_policy(o, model));
  for (const Policy& p : asked)
    if (p.method != Method::full) policies.push_back(p);
  Table table({{"policy", ""},
               {"k", ""},
               {"bos", ""},
               {"name", "policy"},
               {"prompt", "prompt"},
               {"tail", ""},
               {"new", ""},
               {"batch", ""},
               {"prefill_flops", "prefill"},
               {"decode_flops", "one step"},
               {"kv_bytes", "KV cache"},
               {"decode_read_bytes", "read a step"},
               {"weight_bytes", "weights"},
               {"first_token_ratio", "first"},
               {"later_token_ratio", "later"}});
  const std::vector<int> lengths = read_numbers(o.ctx, "--ctx");
  if (lengths.empty()) throw Error(2, "--ctx", "it is empty", "give a length, or several as 2048,8192");
  const uint64_t T = o.tail, G = o.new_tokens;
  std::vector<Planned> planned;  // for the last length, a policy each
  for (int length : lengths) {
    if (length < 1) throw Error(2, "--ctx 0", "a prompt has one token or more", "give lengths from 1");
    if (o.tail > length || (o.tail == length && length > 1))
      throw Error(2, "--tail " + std::to_string(o.tail), "the prompt has " + counted(size_t(length), "token"),
                  "use a smaller --tail");
    const uint64_t N = uint64_t(length);
    planned.clear();
    for (const Policy& p : policies) {
      const Planned& c = planned.emplace_back(plan(s, p, N, T, G, o));
      const double first = c.first(planned[0]), later = c.later(planned[0]);
      table.row({name(p.method),
                 p.k,
                 bos_of(p),
                 describe(p),
                 N,
                 T,
                 G,
                 o.batch,
                 {c.prefill, flops_text(double(c.prefill))},
                 {c.step, flops_text(double(c.step))},
                 {c.cache, bytes_text(double(c.cache))},
                 {c.read, bytes_text(double(c.read))},
                 {c.weights, bytes_text(double(c.weights))},
                 {first, fixed(first, 2)},
                 {later, fixed(later, 2)}});
    }
  }
  if (o.format == "text")
    std::cout << s.name << ": the last " << counted(T, "prompt token") << " decode-phase, " << G << " new; "
              << counted(size_t(o.batch), "request") << " at once\n"
              << "weights of " << o.weight_bytes << " bytes, cache of " << o.kv_bytes
              << "; first and later tokens: times as fast as full depth\n\n";
  table.print(std::cout, o.format);
  if (o.format == "text" && lengths.size() == 1)
    for (size_t i = 0; i < policies.size(); ++i)
      if (!policies[i].is_full()) print_saved(planned[0], planned[i], describe(policies[i]));
  record["results"] = table.rows_as_json();
  return 0;
}

}  // namespace speed
