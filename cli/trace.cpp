// trace.cpp - the mode `trace`: one prompt, layer by layer: rows, slots, and the work, counted and predicted.
#include "trace.h"

#include "modes.h"
#include "run.h"
#include "trace_document.h"

namespace speed {

// The residual stream after each layer. A row that the policy stopped keeps its last state.
static void write_hidden_states(const std::string& path, const std::vector<std::vector<float>>& states, size_t rows,
                                size_t d) {
  json header;
  uint64_t at = 0;
  for (size_t l = 0; l < states.size(); ++l) {
    const uint64_t bytes = rows * d * sizeof(float);
    header["layer." + std::to_string(l)] = {{"dtype", "F32"}, {"shape", {rows, d}}, {"data_offsets", {at, at + bytes}}};
    at += bytes;
  }
  OutputFile out(path);
  out.write(safetensors_begin(header));
  for (auto& s : states) out.write(s.data(), s.size() * sizeof(float));
  out.finish();
}

// ---- one policy, layer by layer -----------------------------------------------------------------------------------

// One layer of a prefill.
struct TracedLayer {
  LayerStats stats;
  int cache = 0;                                 // whose KV cache it reads
  uint64_t slots = 0;                            // in that cache
  uint64_t kv_bytes = 0;                         // of its own
  uint64_t predicted = 0;                        // FLOPs
  uint64_t full = 0;                             // FLOPs at full depth
  bool operator==(const TracedLayer& o) const {  // but for its time, and where its cache is
    return stats.prompt_rows == o.stats.prompt_rows && stats.kv_rows == o.stats.kv_rows && slots == o.slots &&
           stats.counted.flops == o.stats.counted.flops && predicted == o.predicted && kv_bytes == o.kv_bytes &&
           full == o.full;
  }
};

struct Traced {
  Policy policy;
  size_t split = 0;
  std::vector<TracedLayer> layers;  // [L]
  TracedLayer head, all;
  uint64_t full_kv_bytes = 0;              // at full depth
  std::vector<std::vector<float>> states;  // for --dump
};

template <class B>
Traced trace_policy(const Options& o, const Model& model, const Policy& policy, const Request& r, B& backend) {
  const Shape& s = model.config.shape;
  const size_t N = r.ids.size(), split = split_under(policy, o, r), T = N - split;
  Engine<B> engine = make_engine(model, policy, N, T, o, backend);
  Traced t{policy, split, {}, {}, {}, 0, std::vector<std::vector<float>>(o.dump.empty() ? 0 : s.n_layers)};
  engine.time_layers = true;
  engine.on_layer = [&](int l, size_t, size_t rows, const float* x) {
    if (!o.dump.empty()) {
      const float* h = backend.on_host(x, rows * s.hidden);
      t.states[l].insert(t.states[l].end(), h, h + rows * s.hidden);
    }
    if (interrupted) throw Interrupted{};
  };
  engine.prefill(r.ids, split, [](size_t, const float*) {});
  const Policy full = full_depth(s.n_layers);
  const size_t full_tail = N - split_under(full, o, r);
  const Cost cost{s, policy}, full_cost{s, full};
  constexpr uint64_t value_bytes = sizeof(typename B::CacheValue);
  for (int l = 0; l < s.n_layers; ++l) {
    const uint64_t slots = engine.cache(l).used;
    t.layers.push_back({engine.layers()[l], policy.cache_of(l), slots,
                        policy.has_cache(l) ? slots * cost.slot_bytes(value_bytes) : 0,
                        cost.prefill_layer_flops(l, N, T), full_cost.prefill_layer_flops(l, N, full_tail)});
    t.all.stats.counted += engine.layers()[l].counted;
    t.all.stats.seconds += engine.layers()[l].seconds;
  }
  t.head = {engine.head_stats(), 0, 0, 0, cost.head_flops(), cost.head_flops()};
  t.all.stats.counted += t.head.stats.counted;
  t.all.stats.seconds += t.head.stats.seconds;
  t.all.predicted = cost.prefill_flops(N, T);
  t.all.full = full_cost.prefill_flops(N, full_tail);
  t.all.kv_bytes = engine.kv_bytes_used();
  t.full_kv_bytes = full_cost.kv_bytes(N - full_tail, full_tail, value_bytes);
  return t;
}

static Table table_of(const std::vector<Traced>& traced, bool with_times) {
  std::vector<Table::Column> columns = {{"policy", ""},       {"k", ""},
                                        {"bos", ""},          {"name", traced.size() > 1 ? "policy" : ""},
                                        {"layer", "layer"},   {"prompt_rows", "prompt"},
                                        {"kv_rows", "K,V"},   {"tail_rows", "tail"},
                                        {"cache", "reads"},   {"slots", "slots"},
                                        {"flops", "counted"}, {"predicted_flops", "predicted"},
                                        {"kv_bytes", "cache"}};
  if (with_times) columns.push_back({"seconds", "time"});
  Table table(columns);
  for (const Traced& t : traced) {
    auto add = [&](const json& layer, const TracedLayer& l) {
      const bool counts_rows = layer.is_number();
      auto of_layer = [&](uint64_t n) { return counts_rows ? Table::Cell(n) : Table::Cell(nullptr); };
      const uint64_t flops = l.stats.counted.flops;
      std::vector<Table::Cell> cells = {name(t.policy.method),
                                        t.policy.k,
                                        bos_of(t.policy),
                                        describe(t.policy),
                                        layer,
                                        of_layer(l.stats.prompt_rows),
                                        of_layer(l.stats.kv_rows),
                                        of_layer(l.stats.decode_rows),
                                        of_layer(uint64_t(l.cache)),
                                        of_layer(l.slots),
                                        {flops, flops_text(double(flops))},
                                        {l.predicted, flops == l.predicted ? "=" : flops_text(double(l.predicted))},
                                        {l.kv_bytes, bytes_text(double(l.kv_bytes))}};
      if (with_times) cells.push_back({l.stats.seconds, seconds_text(l.stats.seconds)});
      table.row(cells);
    };
    for (size_t l = 0; l < t.layers.size(); ++l) add(l, t.layers[l]);
    add("head", t.head);
    add("all", t.all);
  }
  return table;
}

// ---- as text ------------------------------------------------------------------------------------------------------
// Within 80 columns. The last layer comes first, as in the picture in speed.cu.

static std::string percent(uint64_t part, uint64_t whole) {
  return whole ? percent(double(part) / double(whole)) : "-";
}

// "5-7", the layers [first, last].
static std::string layers_text(size_t first, size_t last) {
  return first == last ? std::to_string(first) : std::to_string(first) + "-" + std::to_string(last);
}

// Runs of equal layers as [first, last], the highest first; equal in every one of `traced`.
static std::vector<std::array<size_t, 2>> folded(const std::vector<Traced>& traced) {
  std::vector<std::array<size_t, 2>> groups;
  for (size_t l = traced[0].layers.size(); l-- > 0;) {
    const bool same = !groups.empty() && std::all_of(traced.begin(), traced.end(),
                                                     [&](const Traced& t) { return t.layers[l] == t.layers[l + 1]; });
    if (same) groups.back()[0] = l;
    else groups.push_back({l, l});
  }
  return groups;
}

// Whose slots a decode-phase token sees there at the end of the prefill.
static std::string sees(const Traced& t, size_t l) {
  const TracedLayer& layer = t.layers[l];
  if (t.policy.needs_anchor_slot(int(l)) && t.split > 0) return "BoS + " + std::to_string(layer.slots - 1);
  return std::to_string(layer.slots) + (size_t(layer.cache) == l ? "" : " of " + std::to_string(layer.cache));
}

// A token as a person reads it: in quotes, one line, no control characters.
static std::string quoted(const Model& model, int id) {
  std::string out = "\"";
  for (char c : readable(model.tokenizer->decode(id)))
    if (c == '\n') out += "\\n";
    else if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F) out += '?';
    else out += c;
  return out + "\"";
}

// The tokens [begin, end) by name, as many of the first and last as fit into `width`.
static std::string tokens_text(const Model& model, const Request& r, size_t begin, size_t end, size_t width) {
  std::string head, tail;
  size_t i = begin, j = end;
  for (bool front = true; i < j; front = !front) {
    const std::string word = quoted(model, r.ids[front ? i : j - 1]);
    if (columns(head + tail + word) + 5 > width) break;
    if (front) head += (head.empty() ? "" : " ") + word, ++i;
    else tail = word + (tail.empty() ? "" : " ") + tail, --j;
  }
  return head + (i < j ? " .. " : head.empty() || tail.empty() ? "" : " ") + tail;
}

static std::string span_text(size_t begin, size_t end) {  // "87-90"
  return std::to_string(begin) + (end - begin > 1 ? "-" + std::to_string(end - 1) : "");
}

static void print_tokens(const Model& model, const Request& r, const Traced& t) {
  const size_t N = r.ids.size();
  std::cout << describe(t.policy) << ", " << t.policy.n_layers << " layers: " << N << " tokens, " << t.split
            << " prompt and " << N - t.split << " decode-phase\n";
  auto line = [&](const char* what, size_t begin, size_t end) {
    if (begin == end) return;
    std::string s = std::string("  ") + what + "  " + span_text(begin, end) + "  ";
    std::cout << s << tokens_text(model, r, begin, end, 80 - columns(s)) << "\n";
  };
  line("prompt      ", 0, t.split);
  line("decode-phase", t.split, N);
  std::cout << "\n";
}

static void print_layers(const Traced& t) {
  auto table = [&](bool exact) {
    Table table({{"layer", "layer"},
                 {"prompt", "prompt"},
                 {"kv", "K,V"},
                 {"sees", "sees"},
                 {"flops", exact ? "FLOP" : "work"},
                 {"full", "of full"},
                 {"cache", exact ? "cache, B" : "cache"},
                 {"time", "time"}});
    auto add = [&](const std::string& layer, const TracedLayer& l, const std::string& seen, double seconds) {
      const bool is_layer = !seen.empty();
      const uint64_t flops = l.stats.counted.flops;
      table.row({layer,
                 {0, is_layer ? std::to_string(l.stats.prompt_rows) : ""},
                 {0, is_layer ? std::to_string(l.stats.kv_rows) : ""},
                 seen,
                 {0, exact ? grouped(flops) : flops_text(double(flops))},
                 {0, percent(flops, l.full)},
                 {0, exact ? grouped(l.kv_bytes) : bytes_text(double(l.kv_bytes))},
                 {0, seconds_text(seconds)}});
    };
    for (auto [first, last] : folded({t})) {
      double seconds = 0;
      for (size_t l = first; l <= last; ++l) seconds += t.layers[l].stats.seconds / double(last - first + 1);
      add(layers_text(first, last), t.layers[first], sees(t, first), seconds);
    }
    add("head", t.head, "", t.head.stats.seconds);
    add("all", t.all, "", t.all.stats.seconds);
    std::ostringstream out;
    table.print(out, "text");
    return out.str();
  };
  auto fits = [](const std::string& text) {
    std::istringstream in(text);
    for (std::string line; std::getline(in, line);)
      if (columns(line) > 80) return false;
    return true;
  };
  const std::string exact = table(true);
  std::cout << (fits(exact) ? exact : table(false));
  std::cout << "prompt: its rows that run the whole layer; K,V: rows that leave keys and values\n"
               "sees: slots the last token looks at; of full: full depth's work in that layer\n";
}

// What there is to say about the layer where the prompt stops, about slots, and about the prediction.
static void print_notes(const Model& model, const Request& r, const Traced& t) {
  const Policy& p = t.policy;
  const size_t N = r.ids.size(), L = size_t(p.n_layers), whole = size_t(p.full_prompt_layers());
  std::cout << "\n";
  if (t.split > 0 && whole < L && t.layers[whole].stats.kv_rows >= N && !p.uses_swiftkv(int(whole))) {
    if (whole + 1 == size_t(p.k) || p.method == Method::full)
      std::cout << "Layer " << whole << (p.method == Method::full ? ", the last," : ", K-1,")
                << " makes only keys and values of a prompt token:\nnothing reads more of it.\n";
  }
  for (size_t l = 0; l < L; ++l) {
    if (p.caches_prompt(int(l))) continue;
    const size_t last = N - 1, slot = t.layers[l].slots - 1;
    const bool anchor = p.needs_anchor_slot(int(l)) && t.split > 0;
    const std::string word = quoted(model, r.ids[last]);
    std::cout << "From layer " << l << " up the prompt has no slot" << (anchor ? "; slot 0 is the anchor" : "")
              << ".\nThe last token" << (columns(word) < 24 ? ", " + word + "," : "") << " has position " << last
              << " and slot " << slot << " there; below, slot " << last << ".\n";
    break;
  }
  bool equal = t.all.stats.counted.flops == t.all.predicted;
  for (size_t l = 0; l < L; ++l)
    if (t.layers[l].stats.counted.flops != t.layers[l].predicted) {
      equal = false;
      std::cout << "Layer " << l << ": predicted " << grouped(t.layers[l].predicted) << " FLOP.\n";
    }
  if (equal) std::cout << "Every count is what the formula predicts.\n";
}

static void print_compared(const std::vector<Traced>& traced) {
  Table table({{"layer", "layer"},
               {"prompt", "prompt"},
               {"kv", "K,V"},
               {"sees", "sees"},
               {"full", "of full"},
               {"bar", "|"},
               {"prompt2", "prompt"},
               {"kv2", "K,V"},
               {"sees2", "sees"},
               {"full2", "of full"}});
  for (auto [first, last] : folded(traced)) {
    std::vector<Table::Cell> cells = {layers_text(first, last)};
    for (const Traced& t : traced) {
      const TracedLayer& l = t.layers[first];
      if (cells.size() > 1) cells.push_back(std::string("|"));
      cells.push_back({0, std::to_string(l.stats.prompt_rows)});
      cells.push_back({0, std::to_string(l.stats.kv_rows)});
      cells.push_back(sees(t, first));
      cells.push_back({0, percent(l.stats.counted.flops, l.full)});
    }
    table.row(cells);
  }
  std::cout << "left: " << describe(traced[0].policy) << "; right: " << describe(traced[1].policy) << "\n\n";
  table.print(std::cout, "text");
  std::cout << "prompt: its rows that run the whole layer; K,V: rows that leave keys and values\n"
               "sees: slots the last token looks at; of full: full depth's work in that layer\n\n";
  Table sums({{"policy", "policy"},
              {"flops", "FLOP"},
              {"full", "of full"},
              {"cache", "cache, B"},
              {"cache_full", "of full"},
              {"time", "time"}});
  for (const Traced& t : traced)
    sums.row({describe(t.policy),
              {0, grouped(t.all.stats.counted.flops)},
              {0, percent(t.all.stats.counted.flops, t.all.full)},
              {0, grouped(t.all.kv_bytes)},
              {0, percent(t.all.kv_bytes, t.full_kv_bytes)},
              {0, seconds_text(t.all.stats.seconds)}});
  sums.print(std::cout, "text");
  const bool equal = std::all_of(traced.begin(), traced.end(),
                                 [](const Traced& t) { return t.all.stats.counted.flops == t.all.predicted; });
  std::cout << (equal ? "Every count is what the formula predicts.\n"
                      : "Counts differ from the formula: see -o csv.\n");
}

// ---- the page and its data ----------------------------------------------------------------------------------------

// What the page shows beside full depth: SPEED at every K, with the anchor and without; POP at every K; and the policy
// asked for, where it is none of these.
static std::vector<Policy> page_policies(const Options& o, const Model& model, const Request& r, const Policy& asked) {
  const Config& c = model.config;
  const int L = c.shape.n_layers;
  std::vector<int> ks = read_numbers(o.ks, "--ks");
  for (int k : ks)
    if (k < 1 || k > L)
      throw Error(2, "--ks", std::to_string(k) + " is no K of this model", "use 1 to " + std::to_string(L));
  if (ks.empty())
    for (int k = 1; k < L; ++k) ks.push_back(k);
  else if (info(asked.method).takes_k) ks.push_back(asked.k);
  std::sort(ks.begin(), ks.end());
  ks.erase(std::unique(ks.begin(), ks.end()), ks.end());
  std::vector<Policy> all;
  auto add = [&](Method method, bool bos) {
    for (int k : ks) {
      Policy p = full_depth(L);
      p.method = method, p.k = k, p.bos = bos;
      if (k < L) all.push_back(p);
    }
  };
  if (c.bos >= 0 && r.ids[0] == c.bos) add(Method::speed, true);
  add(Method::speed, false);
  add(Method::pop, true);
  if (asked.method == Method::swiftkv || asked.method == Method::share)
    if (!asked.is_full()) all.push_back(asked);
  return all;
}

template <class B>
json trace_document(const Options& o, const Model& model, const Request& r, const Policy& asked, const json& rows,
                    B& backend) {
  constexpr size_t most_tokens = 1000, most_heads = 256;
  const Config& c = model.config;
  const size_t N = r.ids.size(), n = size_t(o.n);
  if (!c.original_projections)
    throw Error(2, "trace",
                "this file has SwiftKV projections only above layer " + std::to_string(c.swiftkv_k) +
                    ", so full depth cannot run beside it",
                "use -o text or csv");
  if (N + n > most_tokens)
    throw Error(2, "trace",
                std::to_string(N) + " tokens and " + std::to_string(n) + " of the answer; the page and its data take " +
                    std::to_string(most_tokens),
                "use a shorter prompt or a smaller -n, or -o csv for the table");
  if (size_t(c.shape.n_heads) > most_heads)
    throw Error(2, "trace", std::to_string(c.shape.n_heads) + " heads; the page takes " + std::to_string(most_heads),
                "use -o csv for the table");
  context_for(o, c, N, n);
  const std::vector<Policy> policies = page_policies(o, model, r, asked);
  Progress progress("runs");
  const Policy full = full_depth(c.shape.n_layers);
  const Said said = say(model, full, r.ids, split_under(full, o, r), n, o, backend);
  TraceDocument document(model, o, r, said, sizeof(typename B::CacheValue));
  auto recorded = [&](const Policy& p, int from) {
    return record(model, p, document.fed(), split_under(p, o, r), document.after(), document.answer(), from, o,
                  backend);
  };
  document.add_full(recorded(full, 0));
  for (size_t i = 0; i < policies.size(); ++i) {
    const Policy& p = policies[i];
    progress.update(double(i + 1) / double(policies.size() + 1));
    document.add(recorded(p, first_difference(p)), say(model, p, r.ids, split_under(p, o, r), n, o, backend));
  }
  return document.finish(rows);
}

// ---- the mode -----------------------------------------------------------------------------------------------------

template <class B>
int trace(const Options& o, json& record, const Model& model, B& backend) {
  const Policy policy = make_policy(o, model);
  const Request r = make_request(o, model);
  std::vector<Policy> policies = {policy};
  if (o.compare) {
    const std::vector<Policy> list =
        o.compare->empty() ? std::vector<Policy>(1, full_depth(policy.n_layers)) : compared_policies(o, model);
    if (list.size() > 2) throw Error(2, "--compare", "trace shows one policy beside the first", "give one");
    policies.push_back(list.back());
  }
  note_if_not_adapted(policies, model.config);
  std::vector<Traced> traced;
  for (const Policy& p : policies) traced.push_back(trace_policy(o, model, p, r, backend));
  if (!o.dump.empty()) write_hidden_states(o.dump, traced[0].states, r.ids.size(), size_t(model.config.shape.hidden));
  record["result"] = table_of(traced, true).rows_as_json();

  json document;
  if (!o.html.empty() || o.format == "json")
    document = trace_document(o, model, r, policy, table_of(traced, false).rows_as_json(), backend);
  if (!o.html.empty()) {
    OutputFile out(o.html);
    out.write(trace_page(document));
    out.finish();
  }
  if (o.format == "json") {
    std::cout << document.dump() << "\n";
  } else if (o.format != "text") {
    table_of(traced, true).print(std::cout, o.format);
  } else if (traced.size() > 1) {
    print_compared(traced);
  } else {
    print_tokens(model, r, traced[0]);
    print_layers(traced[0]);
    print_notes(model, r, traced[0]);
  }
  return 0;
}

int run_trace(const Options& o, json& record) {
  return on_device(o, record, [&](Model& m, auto& backend) { return trace(o, record, m, backend); });
}

}  // namespace speed
