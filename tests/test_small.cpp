// The trained model in models/, through the whole program: its exact greedy answers as K falls.
//
// The two stories were never trained on. Right answers: a barber; a camera. One hop needs K >= 3, two hops K >= 5.
#include "helpers.h"

using namespace test;

namespace {

const char* one_hop =
    "Listen to this. Feta has a clock. Pale lives in the chapel. Kara is a driver. Feta is a barber. Pale has a lamp. "
    "Kara has a book. "
    "Pale is a wizard. Kara lives in the palace. The code word is resane. Feta lives in the forest. What is Feta?";
const char* two_hop =
    "Once upon a time. Finsu lives in the valley. Datha is a banker. Finsu is a pilot. The code word is vonuro. Datha "
    "has a candle. "
    "Jedy is a driver. Datha lives in the garage. Jedy has a book. Finsu has a camera. Jedy lives in the factory. "
    "What does the one in the valley have?";

std::string answer(const Model& m, const Policy& p, const std::string& text) {
  const auto [ids, begin] = m.chat->first(std::nullopt, text, std::nullopt);
  const size_t split = p.split(begin, ids.size());
  Cpu cpu;
  Engine<Cpu> engine(m, p, {ids.size() + 12, ids.size() - split + 12, 512}, cpu);
  int id = 0;
  engine.prefill(ids, split, [&](size_t, const float* l) { id = arg_max(l, m.config.shape.vocab); });
  std::string said;
  for (int i = 0; i < 12 && std::count(m.config.eos.begin(), m.config.eos.end(), id) == 0; ++i) {
    said += m.tokenizer->decode(id);
    id = arg_max(engine.decode(id), m.config.shape.vocab);
  }
  return said;
}

}  // namespace

TEST_CASE("the small model's answers at every K", "[small]") {
  const Model m("models/small.safetensors");
  const int L = m.config.shape.n_layers;
  REQUIRE(L == 8);
  CHECK(answer(m, full_depth(L), one_hop) == "A barber.");
  CHECK(answer(m, full_depth(L), two_hop) == "A camera.");
  const std::vector<std::pair<std::string, std::string>> at = {
      {"A miner.", "A pencil."},  {"A judge.", "A pencil."},  {"A barber.", "A pencil."}, {"A barber.", "A ring."},
      {"A barber.", "A camera."}, {"A barber.", "A camera."}, {"A barber.", "A camera."}, {"A barber.", "A camera."}};
  for (int k = 1; k <= L; ++k) {
    INFO("K = " << k);
    CHECK(answer(m, policy(Method::speed, L, k), one_hop) == at[k - 1].first);
    CHECK(answer(m, policy(Method::speed, L, k), two_hop) == at[k - 1].second);
  }
  CHECK(answer(m, policy(Method::speed, L, 3, false), one_hop) == "A barber.");
  CHECK(answer(m, policy(Method::pop, L, 2), two_hop) == "A camera.");
  CHECK(answer(m, policy(Method::pop, L, 1), two_hop) == "A driver.");
}

TEST_CASE("the small model is small and says what it was trained for", "[small]") {
  CHECK(std::filesystem::file_size("models/small.safetensors") <= 6'000'000);
  const Model m("models/small.safetensors");
  REQUIRE(m.config.adapted.size() == 2);
  for (const Adaptation& a : m.config.adapted) {
    CHECK(a.method == Method::speed);
    CHECK(a.k == 0);  // any
  }
}
