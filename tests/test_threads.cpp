// The number of threads changes no bit of a result. `make sanitize-threads` runs this, and the operations alone, under
// ThreadSanitizer.
#include "helpers.h"

using namespace test;

TEST_CASE("every policy gives the same bits with one thread and with several", "[threads]") {
  // Large enough that each operation goes parallel, for a single row too, with rows and slots past whole blocks.
  const Shape shape{"threads", 3, 256, 8, 4, 32, 530, 700, false};
  Model model(shape);
  model.make_weights();
  Random random(6);
  const std::vector<int> ids = random.ids(290, model.config.bos, shape.vocab);
  const int before = omp_get_max_threads();
  auto run = [&](const Policy& p, int threads) {
    Cpu cpu(threads);
    Engine<Cpu> engine(model, p, {ids.size() + 2, ids.size() + 2, 150}, cpu);
    std::vector<float> all = logits(engine, ids, ids.size() - 3, size_t(shape.vocab));
    for (int id : {5, 6}) {
      const float* l = engine.decode(id);
      all.insert(all.end(), l, l + shape.vocab);
    }
    return all;
  };
  for (const Policy& p : {full_depth(3), policy(Method::speed, 3, 1), policy(Method::pop, 3, 2),
                          policy(Method::share, 3, 0, true, {0, 2})}) {
    INFO(int(p.method));
    const std::vector<float> one = run(p, 1);
    for (int threads : {2, 5}) CHECK(same_bits(run(p, threads), one));
  }
  omp_set_num_threads(before);
}
