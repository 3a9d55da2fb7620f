// speed.cu - the program: what each mode does, and main. The forward pass is in forward.h.
#include <csignal>

#include "bench.h"
#include "conversation.h"
#include "generate.h"
#include "perplexity.h"
#include "trace.h"

namespace speed {

// ---- signals ------------------------------------------------------------------------------------------------------
// The first Ctrl-C asks the run to stop at the next layer, so that it can still say what it did; a second one kills.
// Whatever signal kills, no half-written file is left; a model file cut short while it was mapped (SIGBUS) is named.

inline void die(int signal) {
  if (unfinished[0]) ::unlink(unfinished);
  if (signal == SIGBUS) {
    constexpr std::string_view line =
        "speed: model file: it was cut short or became unreadable while in use; start again with a whole file\n";
    [[maybe_unused]] const ssize_t written = ::write(2, line.data(), line.size());
    ::_exit(1);
  }
  ::signal(signal, SIG_DFL);
  ::raise(signal);
}

inline void watch_signals() {
  for (int signal : {SIGBUS, SIGHUP, SIGPIPE, SIGTERM})
    if (struct sigaction now{}; sigaction(signal, nullptr, &now) == 0 && now.sa_handler == SIG_DFL)
      ::signal(signal, die);
  ::signal(SIGXFSZ, SIG_IGN);  // a file-size limit is then an error of write, as a full disk is
  struct sigaction action {};  // without SA_RESTART: a read that waits for input ends
  action.sa_handler = [](int) { interrupted = true, ::signal(SIGINT, die); };
  sigaction(SIGINT, &action, nullptr);
}

// ---- modes --------------------------------------------------------------------------------------------------------

template <class B>
int run_logits(const Options& o, json& record, const Model& model, B& backend) {
  if (o.out.empty()) throw Error(2, "--out", "where do the logits go?", "add --out x.npy");
  const int sources =
      int(!o.tokens.empty()) + int(!o.tokens_file.empty()) + int(o.has_prompt || !o.file.empty() || o.from_stdin);
  if (sources != 1)
    throw Error(2, "tokens", sources ? "given in more than one way" : "none given",
                "use one of --tokens, --tokens-file, -p, -f");
  const Config& c = model.config;
  std::vector<int> ids;
  if (!o.tokens.empty()) {
    ids = read_ids(o.tokens, "--tokens");
  } else if (!o.tokens_file.empty()) {
    ids = read_ids(read_file(o.tokens_file), "--tokens-file");
  } else {
    ids = make_request(o, model).ids;
  }
  const size_t N = ids.size();
  if (N < 2)
    throw Error(2, "tokens", std::to_string(N) + " given", "logits takes 2 or more: a prompt and what follows it");
  const size_t S = o.split ? size_t(*o.split) : N - 1;
  if (S < 1 || S > N - 1)
    throw Error(2, "--split " + std::to_string(S), "there are " + std::to_string(N) + " tokens",
                "use 1 to " + std::to_string(N - 1));
  if (N > size_t(c.context))
    note(std::to_string(N) + " tokens are more than the " + std::to_string(c.context) + " the model was made for");
  const Policy policy = make_policy(o, c);
  note_if_not_adapted({policy}, c);
  Engine<B> engine = make_engine(model, policy, N, N - S, o, backend);
  Progress progress("logits");
  engine.on_layer = [&](int l, size_t first, size_t rows, const float*) {
    progress.update((double(first) + double(rows) * (l + 1) / c.shape.n_layers) / double(N));
    if (interrupted) throw Interrupted{};
  };
  NpyWriter out(o.out, N - S, size_t(c.shape.vocab));
  engine.prefill(
      ids, S, [&](size_t, const float* l) { out.row(l); }, true);
  out.finish();
  record["result"] = {{"policy", describe(policy)}, {"tokens", N}, {"split", S}, {"flops", engine.counted().flops}};
  return 0;
}

inline int run_tokenize(const Options& o, json&) {
  Model model = load(o);
  const Tokenizer& t = *model.tokenizer;
  const std::string text = read_text(o);
  if (o.decode) {
    for (int id : read_ids(text, "--decode")) {
      if (id >= model.config.shape.vocab)
        throw Error(2, "token " + std::to_string(id),
                    "outside a vocabulary of " + std::to_string(model.config.shape.vocab), "use ids of this model");
      std::cout << t.decode(id);
    }
    return 0;
  }
  const char* space = "";
  for (int id : t.encode(text, o.special)) {
    std::cout << space << id;
    space = " ";
  }
  std::cout << "\n";
  return 0;
}

inline int run_info(const Options& o, json&) {
  Model model = load(o);
  const Config& c = model.config;
  const Shape& s = c.shape;
  Table table({{"what", "what"}, {"value", "value"}});
  auto line = [&](const std::string& what, const json& value, const std::string& text = "") {
    table.row({what, text.empty() ? Table::Cell(value) : Table::Cell(value, text)});
  };
  line("name", s.name);
  line("file", model.path());
  line("file bytes", model.file_bytes(), bytes_text(double(model.file_bytes())));
  line("vocabulary", s.vocab);
  line("BoS id", c.bos >= 0 ? json(c.bos) : json(), c.bos >= 0 ? std::to_string(c.bos) : "none");
  line("stop ids", c.eos);
  line("chat template", model.chat ? json(model.chat->name()) : json(),
       model.chat ? model.chat->name() : "none that is known");
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
    std::string trained;
    for (auto& a : c.adapted)
      trained += (trained.empty() ? "" : ", ") + std::string(name(a.method)) +
                 (a.k ? " K=" + std::to_string(a.k) : " at any K") + (a.bos ? "" : " no BoS");
    line("trained for", trained.empty() ? "full" : trained);
    if (c.swiftkv_k)
      line("SwiftKV", c.swiftkv_k,
           "from layer " + std::to_string(c.swiftkv_k) + ", " + std::to_string(c.swiftkv_group) + " layers a cache" +
               (c.original_projections ? "" : ", ordinary projections left out"));
    const Policy full = full_depth(s.n_layers);
    line("KV cache a token", Cost{s, full}.kv_bytes(1, 0, sizeof(Cpu::CacheValue)),
         bytes_text(double(Cost{s, full}.kv_bytes(1, 0, sizeof(Cpu::CacheValue)))));
  }
  table.print(std::cout, o.format);
  return 0;
}

inline int run_plan(const Options& o, json& record) {
  if (o.model.empty() == o.shape.empty())
    throw Error(2, "-m, --shape", o.model.empty() ? "neither given" : "both given", "use one of them");
  Config config;
  if (o.model.empty()) {
    for (auto& s : known_shapes())
      if (s.name == o.shape) config.shape = s;
  } else {
    Model model(o.model);
    model.need_weights();
    config = model.config;
  }
  if (o.tail > o.ctx || (o.tail == o.ctx && o.ctx > 1))
    throw Error(2, "--tail " + std::to_string(o.tail), "the prompt has " + std::to_string(o.ctx) + " tokens",
                "use a smaller --tail");
  const Shape& s = config.shape;
  const Policy asked = make_policy(o, config, !o.model.empty());
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
               p.method == Method::speed ? json(p.bos) : json(),
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

// ---- main ---------------------------------------------------------------------------------------------------------

inline void write_record(const Options& o, int argc, char** argv, json record) {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  json line = json::array();
  for (int i = 0; i < argc; ++i) line.push_back(argv[i]);
  record["program"] = version;
  record["command"] = line;
  record["mode"] = o.mode;
  if (!record.contains("device")) record["device"] = device_record(Cpu(o.threads));
  record["seed"] = o.seed;
  record["peak_bytes"] = uint64_t(usage.ru_maxrss) * 1024;
  OutputFile out(o.record);
  out.write(record.dump(2, ' ', false, json::error_handler_t::replace) + "\n");
  out.finish();
}

// Libraries that read their settings when they are loaded can only be told by starting again, once.
// OpenBLAS: Debian's is older than many processors and may take kernels for a lesser one; one thread, because OpenMP
// makes the threads here. OpenMP: a thread that waits for the next loop spins for some microseconds, then sleeps; the
// default, milliseconds, is a hundred times slower as soon as another program wants the core.
inline void set_up_libraries(char** argv) {
  if (std::getenv("OPENBLAS_NUM_THREADS")) return;
  setenv("OPENBLAS_NUM_THREADS", "1", 1);
  setenv("GOMP_SPINCOUNT", "1000", 0);
  const std::string core = openblas_get_corename();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      (core == "Haswell" || core == "Zen"))
    setenv("OPENBLAS_CORETYPE", "SkylakeX", 0);
  execv("/proc/self/exe", argv);
}

inline int run(int argc, char** argv) {
  const std::optional<Options> options = read_options(argc, argv, version);
  if (!options) return 0;
  const Options& o = *options;
  for (const std::string& path : {o.record, o.out, o.dump})
    if (!path.empty()) require_writable(path);
  json record;
  int code = 0;
  auto on = [&](auto mode) {
    Model model = load(o);
    model.need_weights();
    return with_backend(o, model.config.shape, record, [&](auto& backend) { return mode(model, backend); });
  };
  if (o.mode == "generate") code = on([&](Model& m, auto& b) { return run_generate(o, record, m, b); });
  if (o.mode == "chat") code = on([&](Model& m, auto& b) { return run_chat(o, record, m, b); });
  if (o.mode == "logits") code = on([&](Model& m, auto& b) { return run_logits(o, record, m, b); });
  if (o.mode == "perplexity") code = on([&](Model& m, auto& b) { return run_perplexity(o, record, m, b); });
  if (o.mode == "bench") code = on([&](Model& m, auto& b) { return run_bench(o, record, m, b); });
  if (o.mode == "trace") code = on([&](Model& m, auto& b) { return run_trace(o, record, m, b); });
  if (o.mode == "tokenize") code = run_tokenize(o, record);
  if (o.mode == "info") code = run_info(o, record);
  if (o.mode == "plan") code = run_plan(o, record);
  if (!o.record.empty()) write_record(o, argc, argv, record);
  return code;
}

}  // namespace speed

int main(int argc, char** argv) {
  speed::set_up_libraries(argv);
  speed::watch_signals();
  std::cout.exceptions(std::ios::badbit | std::ios::failbit);
  auto failed = [](const std::string& why, int code) {
    std::cout.exceptions(std::ios::goodbit);  // for std::cerr flushes it
    std::cerr << "speed: " << why << "\n";
    return code;
  };
  try {
    const int code = speed::run(argc, argv);
    std::cout.flush();
    return code;
  } catch (const speed::Error& e) {
    return failed(e.what(), e.code);
  } catch (const speed::Interrupted&) {
    return 130;
  } catch (const std::ios::failure&) {
    return failed(std::string("standard output: cannot be written: ") + std::strerror(errno) + "; check where it goes",
                  1);
  } catch (const std::bad_alloc&) {
    return failed("memory: there is not enough; use a smaller -c, -n or --chunk", 1);
  }
}
