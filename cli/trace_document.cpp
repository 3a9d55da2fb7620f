// trace_document.cpp - see trace_document.h.
#include "trace_document.h"

#include <limits>

#include "policies.h"

namespace speed {

namespace {

// Slots a row may have and still be stored whole; of more slots the strongest are kept. Full depth's rows are what the
// page is mostly about.
constexpr size_t dense_full = 128, dense_run = 48, strongest = 16;

// [0, 1] as a byte; of the square root, because small weights matter more than the third digit of large ones.
uint8_t byte_of(double x) { return uint8_t(std::lround(255 * std::clamp(x, 0.0, 1.0))); }
uint8_t root_byte(double x) { return byte_of(std::sqrt(std::max(x, 0.0))); }

double rounded(double x, int digits) {
  char s[32];
  std::snprintf(s, sizeof s, "%.*g", digits, x);
  return std::strtod(s, nullptr);
}

void put16(std::vector<uint8_t>& out, size_t x) { out.push_back(uint8_t(x)), out.push_back(uint8_t(x >> 8)); }

void put_glance(std::vector<uint8_t>& out, const Glance& g, bool dense) {
  const size_t slots = g.weight.size();
  if (dense) {
    for (size_t j = 0; j < slots; ++j) out.push_back(root_byte(g.weight[j])), out.push_back(g.head[j]);
    return;
  }
  std::vector<size_t> order(slots);
  for (size_t j = 0; j < slots; ++j) order[j] = j;
  const size_t n = std::min(strongest, slots);
  std::partial_sort(order.begin(), order.begin() + long(n), order.end(),
                    [&](size_t a, size_t b) { return g.weight[a] != g.weight[b] ? g.weight[a] > g.weight[b] : a < b; });
  for (size_t j = 0; j < n; ++j) {
    put16(out, order[j]);
    out.push_back(root_byte(g.weight[order[j]])), out.push_back(g.head[order[j]]);
  }
}

json counts_json(uint64_t prefill, uint64_t kv, uint64_t step, uint64_t read) {
  return {{"prefill_flops", prefill}, {"kv_bytes", kv}, {"step_flops", step}, {"step_read_bytes", read}};
}

}  // namespace

std::string base64(std::span<const uint8_t> bytes) {
  constexpr const char* digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string text;
  for (size_t i = 0; i < bytes.size(); i += 3) {
    const size_t n = std::min<size_t>(3, bytes.size() - i);
    uint32_t x = 0;
    for (size_t j = 0; j < 3; ++j) x = x << 8 | (j < n ? bytes[i + j] : 0);
    for (size_t j = 0; j < 4; ++j) text += j <= n ? digits[x >> (18 - 6 * j) & 63] : '=';
  }
  return text;
}

std::string readable(std::string_view bytes) {
  std::string text;
  while (!bytes.empty()) {
    const int n = utf8_character(bytes);
    if (n > 0) {
      text += bytes.substr(0, size_t(n));
      bytes.remove_prefix(size_t(n));
    } else {
      char s[8];
      std::snprintf(s, sizeof s, "\\x%02X", unsigned(uint8_t(bytes[0])));
      text += s;
      bytes.remove_prefix(1);
    }
  }
  return text;
}

std::vector<std::string> readable_tokens(const std::vector<std::string_view>& tokens) {
  std::vector<std::string> texts;
  std::string bytes;  // of a character that is not complete
  for (const std::string_view token : tokens) {
    bytes += token;
    size_t whole = 0;
    while (whole < bytes.size()) {
      const int n = utf8_character(std::string_view(bytes).substr(whole));
      if (n == 0) break;
      whole += size_t(std::abs(n));
    }
    texts.push_back(readable(std::string_view(bytes).substr(0, whole)));
    bytes.erase(0, whole);
  }
  if (!bytes.empty()) texts.back() += readable(bytes);
  return texts;
}

int first_difference(const Policy& p) {
  int l = 0;
  if (!info(p.method).takes_kept) return p.k;
  while (l < p.n_layers && p.kept[l]) ++l;
  return l;
}

TraceDocument::TraceDocument(const Model& model, const Options& o, const Request& r, const Said& full,
                             size_t value_bytes)
    : model_(model), o_(o), r_(r), full_said_(full), value_bytes_(value_bytes), fed_(r.ids) {
  fed_.insert(fed_.end(), full.ids.begin(), full.ids.end() - 1);
}

uint16_t TraceDocument::word(int id) {
  if (id < 0) return std::numeric_limits<uint16_t>::max();
  const auto [at, added] = word_index_.try_emplace(id, uint16_t(words_.size()));
  if (!added) return at->second;
  if (words_.size() == std::numeric_limits<uint16_t>::max())
    throw Error(2, "trace", "more than 65,535 different words", "use --ks with fewer K, or a smaller -n");
  words_.push_back(readable(model_.tokenizer->decode(id)));
  return at->second;
}

json TraceDocument::run(const Recording& rec, const Said& said, int from) {
  const Policy& p = rec.policy;
  const Cost cost{model_.config.shape, p};
  const size_t N = r_.ids.size(), T = N - rec.split, V = model_.config.shape.vocab;
  size_t most = 0;
  for (size_t l = from; l < rec.layers.size(); ++l)
    for (const Glance& g : rec.layers[l].rows) most = std::max(most, g.weight.size());
  const bool dense = most <= (from == 0 ? dense_full : dense_run);

  std::vector<uint8_t> attention, shares, lens, same;
  for (size_t l = from; l < rec.layers.size(); ++l) {
    for (const Glance& g : rec.layers[l].rows) {
      put_glance(attention, g, dense);
      for (double share : g.share) shares.push_back(byte_of(share));
    }
    for (const Lens& x : rec.layers[l].lens) {
      for (size_t j = 0; j < 3; ++j) put16(lens, word(x.word[j])), lens.push_back(root_byte(x.p[j]));
      lens.push_back(root_byte(x.p_next));
    }
  }
  json top = json::array(), kl = json::array(), answer = json::array();
  const size_t full_rows = full_.top.size(), rows = rec.top.size();
  for (size_t i = 0; i < rows; ++i) {
    top.push_back(word(rec.top[i]));
    const size_t last = rows - i;  // counted from the last row, because splits differ
    same.push_back(last <= full_rows && full_.top[full_rows - last] == rec.top[i]);
  }
  double kl_sum = 0;
  for (size_t i = 0; i < this->answer(); ++i) {
    const Row own{rec.logits.data() + i * V, rec.top[rows - this->answer() + i]},
        full{full_.logits.data() + i * V, full_.top[full_rows - this->answer() + i]};
    const double x = score(full, own, V, full_said_.ids[i]).kl;
    kl_sum += x;
    kl.push_back(rounded(x, 4));
  }
  std::string text;
  for (size_t i = 0; i < said.ids.size(); ++i) {
    answer.push_back(word(said.ids[i]));
    if (!said.stopped || i + 1 < said.ids.size()) text += model_.tokenizer->decode(said.ids[i]);
  }
  json caches = json::array();
  for (int l = 0; l < p.n_layers; ++l) caches.push_back(p.cache_of(l));

  // Law 2: the caches below are full depth's, bit for bit; so what is seen in them differs by the rounding of the
  // queries alone, which layer K-1 makes in a product of another shape.
  bool equal = true;
  double difference = 0;
  for (int l = 0; l < from; ++l) {
    equal = equal && rec.cache[l] == full_.cache[l];
    const RecordedLayer &own = rec.layers[l], &full = full_.layers[l];
    for (size_t i = 0; i < own.rows.size() && from > 0; ++i) {
      const Glance &a = own.rows[i], &b = full.rows[own.first + i - full.first];
      for (size_t j = 0; j < a.weight.size(); ++j)
        difference = std::max(difference, std::abs(double(a.weight[j]) - b.weight[j]));
    }
  }
  return {{"policy", name(p.method)},
          {"k", p.k},
          {"bos", bos_of(p)},
          {"split", rec.split},
          {"from", from},
          {"dense", dense},
          {"lower_equal", equal},
          {"lower_difference", rounded(difference, 2)},
          {"adapted", adapted(p, model_.config)},
          {"answer", answer},
          {"text", readable(text)},
          {"stopped", said.stopped},
          {"prompt_layers", p.full_prompt_layers()},
          {"caches", caches},
          {"top", top},
          {"kl", kl},
          {"kl_mean", rounded(kl_sum / double(this->answer()), 4)},
          {"counts", counts_json(said.prefill_flops, said.kv_bytes, said.step_flops, said.step_read_bytes)},
          {"predicted", counts_json(cost.prefill_flops(N, T), cost.kv_bytes(N - T, T, value_bytes_),
                                    cost.decode_flops(N, T), cost.decode_read_bytes(N, T, value_bytes_, sizeof(bf16)))},
          {"weight_bytes", cost.weight_bytes(sizeof(bf16))},
          {"attention_error", rounded(rec.attention_error, 2)},
          {"lens_error", rounded(rec.lens_error, 2)},
          {"attention", base64(attention)},
          {"shares", base64(shares)},
          {"lens", base64(lens)},
          {"same", base64(same)}};
}

void TraceDocument::add_full(Recording recording) {
  full_ = std::move(recording);
  json run = this->run(full_, full_said_, 0);
  json looks = json::array(), turn = json::array();
  const size_t answer = this->answer();
  for (const RecordedLayer& l : full_.layers) {  // mean over the rows that predict the answer
    std::array<double, 3> mean{};
    for (size_t i = l.rows.size() - answer; i < l.rows.size(); ++i)
      for (size_t j = 0; j < 3; ++j) mean[j] += l.rows[i].share[j] / double(answer);
    looks.push_back({rounded(mean[0], 4), rounded(mean[1], 4), rounded(mean[2], 4)});
  }
  for (double x : full_.turn) turn.push_back(std::isnan(x) ? json() : json(rounded(x, 4)));
  run["looks"] = looks, run["turn"] = turn;
  document_["full"] = run;
}

void TraceDocument::add(const Recording& recording, const Said& said) {
  runs_.push_back(run(recording, said, first_difference(recording.policy)));
}

json TraceDocument::finish(const json& rows) {
  const Shape& s = model_.config.shape;
  std::vector<std::string_view> tokens;
  json special = json::array();
  for (size_t i = 0; i < fed_.size(); ++i) {
    tokens.push_back(model_.tokenizer->decode(fed_[i]));
    if (model_.tokenizer->is_special(fed_[i])) special.push_back(i);
  }
  document_["schema"] = trace_schema;
  document_["program"] = version;
  document_["model"] = {{"name", s.name},
                        {"parameters", model_.parameters},
                        {"shape",
                         {{"n_layers", s.n_layers},
                          {"hidden", s.hidden},
                          {"n_heads", s.n_heads},
                          {"n_kv_heads", s.n_kv_heads},
                          {"head_dim", s.head_dim},
                          {"mlp", s.mlp},
                          {"vocab", s.vocab},
                          {"tied", s.tied}}}};
  document_["value_bytes"] = value_bytes_;
  document_["prompt"] = r_.text;
  document_["request"] = {{"chat", o_.chat}, {"tokens", r_.ids.size()}, {"new_tokens", o_.n}};
  document_["split"] = full_.split;
  document_["ids"] = fed_, document_["tokens"] = readable_tokens(tokens), document_["special"] = special;
  document_["answer"] = document_["full"]["answer"];
  document_["runs"] = runs_, document_["words"] = words_;
  document_["rows"] = rows;
  return std::move(document_);
}

}  // namespace speed
