// plan.cpp - the mode `plan`: what a policy costs, by formula, for any shape and length.
#include <iostream>

#include "modes.h"
#include "policies.h"
#include "report.h"
#include "request.h"

namespace speed {

int run_plan(const Options& o, json& record) {
  if (o.model.empty() == o.shape.empty())
    throw Error(2, "-m, --shape", o.model.empty() ? "neither given" : "both given", "use one of them");
  const Model model = load(o);
  model.need_weights();
  if (o.tail > o.ctx || (o.tail == o.ctx && o.ctx > 1))
    throw Error(2, "--tail " + std::to_string(o.tail), "the prompt has " + std::to_string(o.ctx) + " tokens",
                "use a smaller --tail");
  const Shape& s = model.config.shape;
  const Policy asked = make_policy(o, model);
  std::vector<Policy> policies = {full_depth(s.n_layers)};
  if (asked.method != Method::full) policies.push_back(asked);
  Table table({{"policy", ""},
               {"k", ""},
               {"bos", ""},
               {"name", "policy"},
               {"prompt", ""},
               {"tail", ""},
               {"new", ""},
               {"prefill_flops", "prefill"},
               {"decode_flops", "one step"},
               {"kv_bytes", "KV cache"},
               {"decode_read_bytes", "read a step"},
               {"weight_bytes", "of it weights"}});
  const uint64_t N = o.ctx, T = o.tail, G = o.new_tokens;
  for (const Policy& p : policies) {
    const Cost cost{s, p};
    const uint64_t prefill = cost.prefill_flops(N, T), step = cost.decode_flops(N, T),
                   kv = cost.kv_bytes(N - T, T + G, o.kv_bytes),
                   read = cost.decode_read_bytes(N, T, o.kv_bytes, o.weight_bytes),
                   weights = cost.weight_bytes(o.weight_bytes);
    table.row({name(p.method),
               p.k,
               bos_of(p),
               describe(p),
               N,
               T,
               G,
               {prefill, flops_text(double(prefill))},
               {step, flops_text(double(step))},
               {kv, bytes_text(double(kv))},
               {read, bytes_text(double(read))},
               {weights, bytes_text(double(weights))}});
  }
  if (o.format == "text")
    std::cout << s.name << ": " << N << " prompt tokens, the last " << T << " decode-phase, and " << G
              << " new; weights of " << o.weight_bytes << " bytes, cache of " << o.kv_bytes << "\n\n";
  table.print(std::cout, o.format);
  if (o.format == "text" && policies.size() > 1) {
    const Cost full{s, policies[0]}, cost{s, policies[1]};
    auto less = [](uint64_t a, uint64_t b) { return fixed(100 * (1 - double(b) / double(a)), 1) + " %"; };
    std::cout << "\nsaved: " << less(full.prefill_flops(N, T), cost.prefill_flops(N, T)) << " of the prefill, "
              << less(full.kv_bytes(N - T, T + G, 2), cost.kv_bytes(N - T, T + G, 2)) << " of the cache, "
              << less(full.decode_read_bytes(N, T, o.kv_bytes, o.weight_bytes),
                      cost.decode_read_bytes(N, T, o.kv_bytes, o.weight_bytes))
              << " of what a step reads\n";
  }
  record["results"] = table.rows_as_json();
  return 0;
}

}  // namespace speed
