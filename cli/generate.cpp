// generate.cpp - the mode `generate`: completes a text, or with --compare shows several policies side by side.
#include "modes.h"
#include "run.h"

namespace speed {

// A policy fed with full depth's answer.
struct TeacherForced {
  std::vector<int> likeliest;  // token before each token of the answer
  uint64_t kv_bytes;           // in the KV caches at its end
};

template <class B>
TeacherForced teacher_force(const Model& model, const Policy& p, const Request& r, size_t split,
                            const std::vector<int>& answer, const Options& o, B& b) {
  std::vector<int> ids = r.ids;
  ids.insert(ids.end(), answer.begin(), answer.end() - 1);
  Engine<B> engine = make_engine(model, p, ids.size(), ids.size() - split, o, b);
  const size_t first = r.ids.size() - 1 - split;
  std::vector<int> likeliest;
  engine.prefill(
      ids, split,
      [&](size_t i, const float* l) {
        if (i >= first) likeliest.push_back(arg_max(l, model.config.shape.vocab));
      },
      true);
  return {likeliest, engine.kv_bytes_used()};
}

template <class B>
int compare(const Options& o, json& record, const Model& model, const Request& r, B& backend) {
  const Config& c = model.config;
  const std::vector<Policy> policies = compared_policies(o, model);
  if (o.compare->empty() && policies[1].is_full())
    throw Error(2, "--compare", "the policy is full depth itself", "add --k K, or a list as --compare speed:24,pop:20");
  const size_t N = r.ids.size(), context = context_for(o, c, N, size_t(o.n));
  const size_t n = std::min(size_t(o.n), context - N + 1);
  constexpr int rounds = 3;  // of timing each prompt, policies in turn; the table shows the median
  auto run = [&](const Policy& p, const Emit& emit, size_t tokens) {
    const size_t split = split_under(p, o, r);
    Engine<B> engine = make_engine(model, p, context, std::min(context, N - split + n), o, backend);
    return answer(engine, model, r, split, tokens, o, emit);
  };
  const Emit quiet = [](const std::string&) {};
  run(policies[0], quiet, 1);  // untimed: reads the weights into memory
  std::vector<Answer> answers;
  std::vector<std::vector<double>> first(policies.size());
  const bool show = o.format != "json" && o.format != "csv";
  for (const Policy& p : policies) {
    if (show) std::cout << (answers.empty() ? "" : "\n") << "── " << describe(p) << "\n" << std::flush;
    answers.push_back(run(
        p,
        [&](const std::string& s) {
          if (show) std::cout << s << std::flush;
        },
        n));
    if (show) std::cout << "\n";
    if (answers.back().ended == Ended::interrupted) return 130;
    first[answers.size() - 1].push_back(answers.back().first_token);
  }
  for (int i = 1; i < rounds; ++i)
    for (size_t j = 0; j < policies.size(); ++j) {
      first[j].push_back(run(policies[j], quiet, 1).first_token);
      if (interrupted) return 130;
    }
  Table table({{"policy", ""},
               {"k", ""},
               {"bos", ""},
               {"name", "policy"},
               {"same_top1", "same token"},
               {"texts_part_at", "texts part at"},
               {"prefill_flops", "prompt work"},
               {"kv_bytes", "KV cache"},
               {"first_token_s", "first token"},
               {"decode_tokens_per_s", "tokens/s"}});
  std::vector<int> full_likeliest;  // what is drawn at a temperature is not what was likeliest
  for (size_t j = 0; j < policies.size(); ++j) {
    const Policy& p = policies[j];
    const Answer& a = answers[j];
    const auto& reference = answers[0].ids;
    const size_t first_difference =
        size_t(std::mismatch(a.ids.begin(), a.ids.end(), reference.begin(), reference.end()).first - a.ids.begin());
    const bool differs = a.ids != reference;
    const TeacherForced forced = teacher_force(model, p, r, split_under(p, o, r), reference, o, backend);
    if (j == 0) full_likeliest = forced.likeliest;
    size_t same = 0;
    for (size_t i = 0; i < reference.size(); ++i) same += forced.likeliest[i] == full_likeliest[i];
    const double same_top1 = double(same) / double(reference.size());
    const double rate = a.decode_steps ? double(a.decode_steps) / a.decode : 0;
    table.row({name(p.method),
               p.k,
               bos_of(p),
               describe(p),
               {same_top1, percent(same_top1)},
               {differs ? json(first_difference + 1) : json(),
                differs ? "token " + std::to_string(first_difference + 1) : "-"},
               {a.prompt.flops, flops_text(double(a.prompt.flops))},
               {forced.kv_bytes, bytes_text(double(forced.kv_bytes))},
               {median(first[j]), seconds_text(median(first[j]))},
               {rate, fixed(rate, 1)}});
  }
  if (show) std::cout << "\n";
  table.print(std::cout, o.format);
  record["results"] = table.rows_as_json();
  note_if_not_adapted(policies, c);
  return 0;
}

template <class B>
int generate_text(const Options& o, json& record, const Model& model, B& backend) {
  const Config& c = model.config;
  const Policy policy = make_policy(o, model);
  const Request r = make_request(o, model);
  if (o.compare) return compare(o, record, model, r, backend);
  const size_t N = r.ids.size(), context = context_for(o, c, N, size_t(o.n)), split = split_under(policy, o, r);
  const size_t n = std::min(size_t(o.n), context - N + 1);
  note_if_not_adapted({policy}, c);
  Engine<B> engine = make_engine(model, policy, context, std::min(context, N - split + n), o, backend, true);
  std::string text;
  const Answer a = answer(engine, model, r, split, n, o, [&](const std::string& s) {
    text += s;
    if (o.format != "json") std::cout << s << std::flush;
  });
  record["result"] = answer_record(policy, N, split, a, size_t(o.n));
  record["prompt_ids"] = r.ids;
  record["new_ids"] = a.ids;
  record["text"] = text;
  if (o.format == "json") {
    json all = record["result"];
    all["text"] = text;
    all["model"] = model_record(model);
    all["date"] = now();
    std::cout << indented(all);
  }
  std::cout << std::endl;
  print_summary(policy, r, split, a, size_t(o.n));
  return a.ended == Ended::interrupted ? 130 : 0;
}

int run_generate(const Options& o, json& record) {
  return on_device(o, record, [&](Model& m, auto& backend) { return generate_text(o, record, m, backend); });
}

}  // namespace speed
