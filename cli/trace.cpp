// trace.cpp - the mode `trace`: one prompt, layer by layer: rows, slots, and the work, counted and predicted.
#include "modes.h"
#include "run.h"

namespace speed {

// The residual stream after each layer. A row that the policy stopped keeps its last state.
void write_hidden_states(const std::string& path, const std::vector<std::vector<float>>& states, size_t rows,
                         size_t d) {
  json header;
  uint64_t at = 0;
  for (size_t l = 0; l < states.size(); ++l) {
    const uint64_t bytes = rows * d * sizeof(float);
    header["layer." + std::to_string(l)] = {{"dtype", "F32"}, {"shape", {rows, d}}, {"data_offsets", {at, at + bytes}}};
    at += bytes;
  }
  std::string text = header.dump();
  text.resize((8 + text.size() + 63) / 64 * 64 - 8, ' ');
  OutputFile out(path);
  const uint64_t length = text.size();
  out.write(&length, 8);
  out.write(text);
  for (auto& s : states) out.write(s.data(), s.size() * sizeof(float));
  out.finish();
}

template <class B>
int trace(const Options& o, json& record, const Model& model, B& backend) {
  const Config& c = model.config;
  const Shape& s = c.shape;
  const Policy policy = make_policy(o, model);
  const Request r = make_request(o, model);
  const size_t N = r.ids.size(), split = split_under(policy, o, r), T = N - split;
  note_if_not_adapted({policy}, c);
  Engine<B> engine = make_engine(model, policy, N, T, o, backend);
  std::vector<std::vector<float>> states(o.dump.empty() ? 0 : s.n_layers);
  engine.time_layers = true;
  engine.on_layer = [&](int l, size_t, size_t rows, const float* x) {
    if (!o.dump.empty()) {
      const float* h = backend.on_host(x, rows * s.hidden);
      states[l].insert(states[l].end(), h, h + rows * s.hidden);
    }
    if (interrupted) throw Interrupted{};
  };
  engine.prefill(r.ids, split, [](size_t, const float*) {});
  const Cost cost{s, policy};
  Table table({{"layer", "layer"},
               {"prompt_rows", "prompt"},
               {"kv_rows", "K,V"},
               {"tail_rows", "tail"},
               {"cache", "reads"},
               {"slots", "slots"},
               {"flops", "counted"},
               {"predicted_flops", "predicted"},
               {"kv_bytes", "cache"},
               {"seconds", "time"}});
  auto add = [&](const json& layer, const LayerStats& l, const json& cache, const json& slots, uint64_t predicted,
                 uint64_t kv) {
    auto rows = [&](uint64_t n) { return layer.is_string() ? Table::Cell(nullptr) : Table::Cell(n); };
    table.row({layer,
               rows(l.prompt_rows),
               rows(l.kv_rows),
               rows(l.decode_rows),
               cache,
               slots,
               {l.counted.flops, flops_text(double(l.counted.flops))},
               {predicted, l.counted.flops == predicted ? "=" : flops_text(double(predicted))},
               {kv, bytes_text(double(kv))},
               {l.seconds, seconds_text(l.seconds)}});
  };
  LayerStats all;
  for (int l = 0; l < s.n_layers; ++l) {
    const LayerStats& layer = engine.layers()[l];
    const uint64_t kv =
        policy.has_cache(l) ? engine.cache(l).used * cost.slot_bytes(sizeof(typename B::CacheValue)) : 0;
    add(l, layer, policy.cache_of(l), engine.cache(l).used, cost.prefill_layer_flops(l, N, T), kv);
    all.counted += layer.counted;
    all.seconds += layer.seconds;
  }
  add("head", engine.head_stats(), nullptr, nullptr, cost.head_flops(), 0);
  all.counted += engine.head_stats().counted;
  all.seconds += engine.head_stats().seconds;
  add("all", all, nullptr, nullptr, cost.prefill_flops(N, T), engine.kv_bytes_used());
  if (o.format == "text")
    std::cout << describe(policy) << ": " << N << " tokens, " << split << " prompt and " << T << " decode-phase\n"
              << "prompt: rows that pass the layer; K,V: rows that leave keys and values there\n"
              << "reads: whose cache, of so many slots; predicted: = where the count agrees\n\n";
  table.print(std::cout, o.format);
  if (!o.dump.empty()) write_hidden_states(o.dump, states, N, size_t(s.hidden));
  record["result"] = table.rows_as_json();
  return 0;
}

int run_trace(const Options& o, json& record) {
  return on_device(o, record, [&](Model& m, auto& backend) { return trace(o, record, m, backend); });
}

}  // namespace speed
