// The loader on any file: it refuses in words or loads, and what it loaded can be used.
//
// Seeds are the golden models, and the tokenizer alone of each: small, so that damage meets what is checked.
#include <sys/mman.h>

#define SPEED_METHOD_ONLY
#include "../../speed.cu"

#include "../../cli/policies.cpp"
#include "../../cli/report.cpp"
#include "fuzz.h"

using namespace fuzz;

namespace {

// What every mode reads of a model, short of computing.
void use(const Model& m) {
  const Tokenizer& t = *m.tokenizer;
  require(int(t.vocab_size()) == m.config.shape.vocab, "the tokenizer's vocabulary is the config's");
  accepted([&] {
    for (bool special : {false, true})
      for (int id : t.encode("Hello, w\u00f6rld <|eot_id|> 12345\n\n  x", special)) t.decode(id);
  });
  for (int id : m.config.eos) t.decode(id);
  if (m.config.bos >= 0) t.decode(m.config.bos);
  if (m.chat) accepted([&] { m.chat->first("system", "user", {}), m.chat->next("user"); });
  if (m.config.tokenizer_only) return;
  const Shape& s = m.config.shape;
  require(m.weights.layers.size() == size_t(s.n_layers), "as many layers as the config says");
  uint32_t sum = m.weights.embedding[uint64_t(s.vocab) * s.hidden - 1].bits +
                 m.weights.head[uint64_t(s.vocab) * s.hidden - 1].bits;
  for (const LayerWeights& l : m.weights.layers)
    sum += l.down[uint64_t(s.mlp) * s.hidden - 1].bits + l.wo[s.q_width() * s.hidden - 1].bits;
  require(sum != 1, "any sum but an unlikely one");  // so that the reads are made
  for (const PolicyInfo& policy : policy_table) {
    Options o;
    o.policy = policy.name;
    if (policy.takes_kept) o.every = 2;
    try {
      const Policy p = make_policy(o, m);
      const Cost cost{s, p};
      require(cost.kv_bytes(10, 10, 2) > 0 && cost.prefill_flops(10, 1) > 0 && cost.weight_bytes(2) > 0,
              "costs are positive");
    } catch (const Error& e) {
      require(e.code == 2, "a policy that this file cannot run is the command line's fault");
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const int file = memfd_create("model", 0);
  static const std::string path = "/proc/self/fd/" + std::to_string(file);
  require(ftruncate(file, off_t(size)) == 0 && pwrite(file, data, size, 0) == ssize_t(size), "room for the input");
  const Limit limit(5);
  accepted([&] { use(Model(path)); });
  return 0;
}

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned seed) {
  std::mt19937 random(seed);
  Parts parts({reinterpret_cast<char*>(data), size});
  if (!parts.valid() || random() % 8 == 0) return LLVMFuzzerMutate(data, size, max_size);
  if (random() % 8 == 0 && !parts.data.empty()) {
    LLVMFuzzerMutate(reinterpret_cast<uint8_t*>(parts.data.data()), parts.data.size(), parts.data.size());
  } else {
    // The config, the rules and the template are few among many tensors, and hold most of what is checked.
    const bool metadata = random() % 2 && parts.header.contains("__metadata__");
    for (int n = 1 + int(random() % 3); n > 0; --n)
      mutate(metadata ? parts.header["__metadata__"] : parts.header, random);
  }
  return replace(data, size, max_size, parts.file());
}
