// logits.cpp - the mode `logits`: teacher-forced logits of all decode-phase tokens, into a NumPy file.
#include "modes.h"
#include "run.h"

namespace speed {

// Writes a NumPy array of float32, row by row.          https://numpy.org/neps/nep-0001-npy-format.html
class NpyWriter {
 public:
  NpyWriter(const std::string& path, size_t rows, size_t cols) : file_(path), bytes_(cols * sizeof(float)) {
    std::string header = "{'descr': '<f4', 'fortran_order': False, 'shape': (" + std::to_string(rows) + ", " +
                         std::to_string(cols) + "), }";
    header.resize((10 + header.size() + 1 + 63) / 64 * 64 - 10 - 1, ' ');
    header += "\n";
    file_.write(std::string("\x93NUMPY\x01\x00", 8) + char(header.size() & 255) + char(header.size() >> 8) + header);
  }
  void row(const float* x) { file_.write(x, bytes_); }
  void finish() { file_.finish(); }

 private:
  OutputFile file_;
  size_t bytes_;
};

template <class B>
int logits(const Options& o, json& record, const Model& model, B& backend) {
  if (o.out.empty()) throw Error(2, "--out", "where do the logits go?", "add --out x.npy");
  if (int(!o.tokens.empty()) + int(!o.tokens_file.empty()) + int(has_text(o)) > 1)
    throw Error(2, "tokens", "given in more than one way", "use one of --tokens, --tokens-file, -p, -f");
  const Config& c = model.config;
  std::vector<int> ids = given_ids(o);
  if (ids.empty()) ids = make_request(o, model).ids;
  const size_t N = ids.size();
  if (N < 2)
    throw Error(2, "tokens", std::to_string(N) + " given", "logits takes 2 or more: a prompt and what follows it");
  const size_t S = o.split ? size_t(*o.split) : N - 1;
  if (S < 1 || S > N - 1)
    throw Error(2, "--split " + std::to_string(S), "there are " + std::to_string(N) + " tokens",
                "use 1 to " + std::to_string(N - 1));
  if (N > size_t(c.context))
    note(std::to_string(N) + " tokens are more than the " + std::to_string(c.context) + " the model was made for");
  const Policy policy = make_policy(o, model);
  note_if_not_adapted({policy}, c);
  Engine<B> engine = make_engine(model, policy, N, N - S, o, backend);
  Progress progress("logits");
  engine.on_layer = prefill_progress(engine, N, [&](double share) { progress.update(share); });
  NpyWriter out(o.out, N - S, size_t(c.shape.vocab));
  engine.prefill(
      ids, S,
      [&](size_t, const float* l) {
        arg_max(l, size_t(c.shape.vocab));  // refuses NaN
        out.row(l);
      },
      true);
  out.finish();
  record["result"] = {{"policy", describe(policy)}, {"tokens", N}, {"split", S}, {"flops", engine.counted().flops}};
  return 0;
}

int run_logits(const Options& o, json& record) {
  return on_device(o, record, [&](Model& m, auto& backend) { return logits(o, record, m, backend); });
}

}  // namespace speed
