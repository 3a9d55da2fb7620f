// The cost model against figures that were worked out apart from it, and the laws of arithmetic the policies obey.
#include "helpers.h"

using namespace test;

namespace {

const Shape llama8b = known_shapes()[2];
double gib(uint64_t bytes) { return double(bytes) / (1 << 30); }
std::vector<int> every(int g, int L) {
  std::vector<int> keep;
  for (int l = 0; l < L; l += g) keep.push_back(l);
  return keep;
}

}  // namespace

TEST_CASE("prefill FLOPs of Llama-3.1-8B at 1,024 tokens, tail 1", "[policy]") {
  const int L = 32;
  auto flops = [](const Policy& p) { return Cost{llama8b, p}.prefill_flops(1024, 1); };
  CHECK(flops(full_depth(L)) == 14132189331456);
  CHECK(flops(policy(Method::speed, L, 24)) == 10493479878656);
  CHECK(flops(policy(Method::pop, L, 22)) == 10193259724800);
  CHECK(flops(policy(Method::swiftkv, L, 24, true, {}, 2)) == 10999857938432);
  CHECK(flops(policy(Method::share, L, 0, true, every(4, L))) == 12406895935488);
  CHECK(flops(policy(Method::speed, L, 23)) != 10493479878656);
  CHECK(flops(policy(Method::speed, L, 24, false)) != 10493479878656);
}

TEST_CASE("KV bytes of Llama-3.1-8B in bf16", "[policy]") {
  const int L = 32;
  const Policy full = full_depth(L), speed24 = policy(Method::speed, L, 24),
               pairs = policy(Method::swiftkv, L, 24, true, {}, 2);
  auto kv = [](const Policy& p, uint64_t prompt, uint64_t generated) {
    return gib(Cost{llama8b, p}.kv_bytes(prompt - 1, 1 + generated, 2));
  };
  CHECK(kv(full, 131072, 0) == 16.0);
  CHECK(kv(speed24, 131072, 0) == Approx(12.0).epsilon(1e-5));
  CHECK(kv(pairs, 131072, 0) == 14.0);
  CHECK(kv(full, 1024, 128) == Approx(0.1406).margin(5e-5));
  CHECK(kv(speed24, 1024, 128) == Approx(0.1094).margin(5e-5));
  CHECK(kv(pairs, 1024, 128) == Approx(0.1230).margin(5e-5));
  for (int g : {2, 4}) CHECK(kv(policy(Method::share, L, 0, true, every(g, L)), 131072, 0) == 16.0 / g);
}

TEST_CASE("POP at K = 22 of 32 does 22/32 of the prompt's matrix work and its upper keys and values", "[policy]") {
  const int L = 32;
  const uint64_t n = 100000;
  const Policy pop = policy(Method::pop, L, 22);
  const Cost cost{llama8b, pop};
  uint64_t lower = 0, upper = 0;
  for (int l = 0; l < L; ++l) (l < 22 ? lower : upper) += cost.prompt_flops(l, n);
  const uint64_t layer = n * (cost.q_flops() + cost.kv_flops() + cost.o_flops() + cost.mlp_flops()) +
                         cost.attention_flops(n * (n + 1) / 2);
  CHECK(lower == 22 * layer);
  CHECK(upper == 10 * n * cost.kv_flops());
}

TEST_CASE("K = L is full in every count", "[policy]") {
  for (const Shape& s : known_shapes()) {
    const int L = s.n_layers;
    std::vector<int> all = every(1, L);
    for (const PolicyInfo& takes : policy_table) {
      INFO(takes.name);
      const Policy p = policy(takes.method, L, L, true, takes.takes_kept ? all : std::vector<int>{}, 3);
      CHECK(p.is_full());
      const Policy full = full_depth(L);
      const Cost a{s, p}, b{s, full};
      CHECK(a.prefill_flops(777, 4) == b.prefill_flops(777, 4));
      CHECK(a.decode_flops(777, 4) == b.decode_flops(777, 4));
      CHECK(a.kv_bytes(773, 20, 2) == b.kv_bytes(773, 20, 2));
      CHECK(a.decode_read_bytes(777, 4, 2, 2) == b.decode_read_bytes(777, 4, 2, 2));
    }
    const Policy almost = policy(Method::pop, L, L - 1), full = full_depth(L);
    CHECK(Cost{s, almost}.prefill_flops(777, 1) == Cost{s, full}.prefill_flops(777, 1));
  }
}

TEST_CASE("a prompt stops at the last layer whose cache it fills", "[policy]") {
  const Policy p = policy(Method::share, 32, 0, true, every(4, 32));
  CHECK(p.full_prompt_layers() == 28);
  CHECK(full_depth(32).full_prompt_layers() == 31);
  CHECK(policy(Method::speed, 32, 24).full_prompt_layers() == 23);
  CHECK(policy(Method::pop, 32, 24).full_prompt_layers() == 24);
  CHECK(p.cache_of(27) == 24);
  CHECK(policy(Method::swiftkv, 32, 24, true, {}, 3).cache_of(31) == 30);
  CHECK(policy(Method::swiftkv, 32, 24, true, {}, 3).cache_of(29) == 27);
}

TEST_CASE("weight bytes of a decode step", "[policy]") {
  // Llama-3.1-8B has 8,030,261,248 parameters; a step reads all but the embedding table of 128,256 x 4,096.
  const Policy full = full_depth(32);
  CHECK(Cost{llama8b, full}.weight_bytes(2) == 2 * (8030261248ull - 128256ull * 4096));
  // Llama-3.2-1B is tied, 1,235,814,400 parameters, so it reads all of them.
  const Policy full1b = full_depth(16);
  CHECK(Cost{known_shapes()[0], full1b}.weight_bytes(2) == 2 * 1235814400ull);
}
