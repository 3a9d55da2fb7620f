// info.cpp - the mode `info`: what is in a model file.
#include <iostream>

#include "modes.h"
#include "policies.h"
#include "report.h"
#include "request.h"

namespace speed {

int run_info(const Options& o, json&) {
  Model model = load(o);
  const Config& c = model.config;
  const Shape& s = c.shape;
  Table table({{"what", "what"}, {"value", "value"}});
  json all;  // for programs: one object
  auto line = [&](const std::string& what, const json& value, const std::string& text = "") {
    table.row({what, text.empty() ? Table::Cell(value) : Table::Cell(value, text)});
    std::string key;
    for (char c : what) key += std::isalnum(static_cast<unsigned char>(c)) ? char(std::tolower(c)) : '_';
    all[key] = value;
  };
  line("name", s.name);
  line("file", model.path());
  line("SHA256", model.sha256.empty() ? json() : json(model.sha256),
       model.sha256.empty() ? "not in the file" : model.sha256);
  line("file bytes", model.file_bytes(), bytes_text(double(model.file_bytes())));
  line("vocabulary", s.vocab);
  line("BoS id", c.bos >= 0 ? json(c.bos) : json(), c.bos >= 0 ? std::to_string(c.bos) : "none");
  line("stop ids", c.eos);
  line("chat template", model.chat ? json(model.chat->name()) : json(),
       model.chat                   ? model.chat->name()
       : model.chat_refused.empty() ? "none"
                                    : "none: " + model.chat_refused);
  if (!c.tokenizer_only) {
    line("parameters", model.parameters, fixed(double(model.parameters) / 1e6, 2) + " M");
    line("layers", s.n_layers);
    line("hidden", s.hidden);
    line("query heads", s.n_heads);
    line("key/value heads", s.n_kv_heads);
    line("head size", s.head_dim);
    line("MLP", s.mlp);
    line("tied head", s.tied, s.tied ? "yes" : "no");
    line("context", c.context, std::to_string(c.context) + " tokens");
    line("RoPE theta", c.rope_theta, fixed(c.rope_theta, 0));
    line("RoPE scaling", c.rope_scaling ? json(c.rope_scaling->factor) : json(),
         c.rope_scaling ? "llama3, factor " + fixed(c.rope_scaling->factor, 0) + " past " +
                              std::to_string(c.rope_scaling->original_context) + " tokens"
         : model.weights.rope_divisors ? "divisors in the file"
                                       : "none");
    auto in_words = [](const Adaptation& a) {
      return std::string(name(a.method)) + (a.k ? " K=" + std::to_string(a.k) : " at any K") + (a.bos ? "" : " no BoS");
    };
    std::string trained;
    for (auto& a : c.adapted) trained += (trained.empty() ? "" : ", ") + in_words(a);
    line("trained for", trained.empty() ? "full" : trained);
    if (c.tuned) line("tuned", c.tuned->k, in_words(*c.tuned));
    if (c.swiftkv_k)
      line("SwiftKV", c.swiftkv_k,
           "from layer " + std::to_string(c.swiftkv_k) + ", " + std::to_string(c.swiftkv_group) + " layers a cache" +
               (c.original_projections ? "" : ", ordinary projections left out"));
    const Policy full = full_depth(s.n_layers);
    const uint64_t kv_bytes = Cost{s, full}.kv_bytes(1, 0, sizeof(Cpu::CacheValue));
    line("KV cache a token", kv_bytes, bytes_text(double(kv_bytes)));
  }
  if (o.format == "json") std::cout << indented(all) << "\n";
  else table.print(std::cout, o.format);
  return 0;
}

}  // namespace speed
