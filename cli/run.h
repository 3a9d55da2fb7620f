// run.h - what the modes that run the engine share: an engine from flags, an answer as text, its summary.
#pragma once

#include <functional>
#include <iostream>

#include "../text/stream.h"
#include "backend.h"
#include "policies.h"

namespace speed {

// An engine for `context` tokens, of which at most `decode` are decode-phase at any time.
// With `banner`, it first prints one line: model, policy, device, and the memory this will take.
template <class B>
Engine<B> make_engine(const Model& model, const Policy& p, size_t context, size_t decode, const Options& o, B& backend,
                      bool banner = false) {
  auto print = [&](const Engine<B>& engine) {
    const Cost cost{model.config.shape, p};
    if (!banner) return;
    const uint64_t load = backend.bytes_to_load(model);
    std::cerr << model.config.shape.name << (uses_bundled_model(o) ? " (bundled; -m names another model): " : ": ")
              << describe(p) << ", " << B::name << ", " << device_name(backend)
              << "; memory: " << bytes_text(double(load ? load : cost.weight_bytes(sizeof(bf16)))) << " of weights, "
              << bytes_text(double(engine.bytes_needed())) << " for this run, of it "
              << bytes_text(double(engine.kv_bytes_needed())) << " KV cache\n";
  };
  return Engine<B>(model, p, {context, decode, size_t(o.chunk)}, backend, print);
}

// Reports how far a prefill of n_tokens is, and stops the run on Ctrl-C. Assign it to Engine::on_layer.
template <class B>
auto prefill_progress(Engine<B>& engine, size_t n_tokens, std::function<void(double)> update) {
  const size_t before = engine.position();
  const int n_layers = engine.shape().n_layers;
  return [=](int l, size_t first, size_t rows, const auto*) {
    update((double(first - before) + double(rows) * (l + 1) / n_layers) / double(n_tokens));
    if (interrupted) throw Interrupted{};
  };
}

using Emit = std::function<void(const std::string&)>;

// Prefills the request, then generates up to n tokens; `emit` receives the text as it comes. Ctrl-C ends it at the next
// layer of the prefill, later at the next token, so that the caches then hold whole tokens.
template <class B>
Answer answer(Engine<B>& engine, const Model& model, const Request& r, size_t split, size_t n, const Options& o,
              const Emit& emit) {
  TextStream text(o.stop);
  Progress progress("prompt");
  bool prefilled = false;
  const auto watch = prefill_progress(engine, r.ids.size(), [&](double share) { progress.update(share); });
  engine.on_layer = [&](int l, size_t first, size_t rows, const auto* x) {
    if (!prefilled) watch(l, first, rows, x);
  };
  const std::vector<int> stops = stop_ids(model, o.chat || o.mode == "chat");
  const Sampler sampler({o.temperature, o.top_k, o.top_p, o.min_p, o.seed});
  const Answer a = generate(engine, r.ids, split, n, sampler, stops, [&](int token) {
    prefilled = true;
    progress.clear();
    release_notes();
    emit(text.push(model.tokenizer->decode(token)));
    if (interrupted) throw Interrupted{};
    return !text.stopped();
  });
  progress.clear();
  emit(text.finish());
  engine.on_layer = nullptr;
  return a;
}

// Why an answer to which -n gave n tokens ended.
inline const char* why_ended(const Answer& a, size_t n) {
  switch (a.ended) {
    case Ended::at_stop_token: return "stop token";
    case Ended::by_caller: return "stop text";
    case Ended::interrupted: return "interrupted";
    case Ended::at_limit: break;
  }
  return a.ids.size() < n ? "context full" : "-n reached";
}

inline json answer_record(const Policy& p, size_t N, size_t split, const Answer& a, size_t n) {
  return {{"policy", name(p.method)},
          {"k", p.k},
          {"bos", bos_of(p)},
          {"prompt_tokens", N},
          {"split", split},
          {"new_tokens", a.ids.size()},
          {"first_token_s", a.first_token},
          {"decode_s", a.decode},
          {"decode_steps", a.decode_steps},
          {"prefill_flops", a.prompt.flops},
          {"decode_flops", a.steps.flops},
          {"kv_bytes", a.kv_bytes},
          {"ended", why_ended(a, n)},
          {"interrupted", a.ended == Ended::interrupted}};
}

inline void print_summary(const Policy& p, const Request& r, size_t split, const Answer& a, size_t n) {
  std::cerr << "\n"
            << describe(p) << ": " << counted(r.ids.size(), "prompt token") << " (" << r.ids.size() - split
            << " at full depth)";
  if (a.ids.empty()) {
    std::cerr << ", stopped before the first new one\n";
    return;
  }
  std::cerr << ", " << flops_text(double(a.prompt.flops)) << ", first token after " << seconds_text(a.first_token)
            << " (" << fixed(double(r.ids.size()) / a.first_token, 0) << " tokens/s)\n"
            << counted(a.ids.size(), "new token");
  if (a.decode_steps) std::cerr << ", " << fixed(double(a.decode_steps) / a.decode, 1) << " tokens/s";
  std::cerr << "; KV cache " << bytes_text(double(a.kv_bytes)) << "; " << why_ended(a, n) << "\n";
}

}  // namespace speed
