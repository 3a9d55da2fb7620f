// The tokenizer: any text under the patterns of real models, and any text under any rules.
//
// Input: a byte of flags. Bit 0 clear, a text for the fixed vocabulary: nothing is lost, and a text of 16 KiB made by
// repetition (bits 1 and 4: not too often, it is slow) takes no longer than its length allows. Bit 0 set, rules of the
// input's own: they are refused, or the ids are those of byte pair encoding's definition.
#include <fuzzer/FuzzedDataProvider.h>

#include "fuzz.h"

using namespace fuzz;

namespace {

const char* const splits[][2] = {
    {R"(\p{N})", R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)"},
    {R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3})"
     R"(| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)",
     "(?<=a)b|x+"}};

struct Vocabulary {
  std::vector<uint8_t> bytes;
  std::vector<uint32_t> offsets{0}, merges;
  json rules = {{"split", json::array()}, {"ignore_merges", false}, {"special", json::array()}};

  uint32_t add(const std::string& token) {
    bytes.insert(bytes.end(), token.begin(), token.end());
    offsets.push_back(uint32_t(bytes.size()));
    return uint32_t(size() - 1);
  }
  std::string token(uint32_t id) const { return {bytes.begin() + offsets[id], bytes.begin() + offsets[id + 1]}; }
  void merge(uint32_t left, uint32_t right) {
    merges.insert(merges.end(), {left, right, add(token(left) + token(right))});
  }
  size_t size() const { return offsets.size() - 1; }

  Vocabulary() {
    for (int b = 0; b < 256; ++b) add(std::string(1, char(b)));
  }
};

// All bytes, runs of some up to 32 long, merges across bytes of a character, and special tokens that share a beginning.
struct Fixed : Vocabulary {
  Tokenizer tokenizer;
  explicit Fixed(bool llama)
      : tokenizer([&] {
          for (uint32_t c : {'a', ' ', '\n', '!', '0'})
            for (uint32_t run = c, i = 0; i < 5; ++i, run = uint32_t(size() - 1)) merge(run, run);
          for (auto [l, r] :
               {std::pair<uint32_t, uint32_t>('a', 'b'), {' ', 'a'}, {0xC3, 0xA9}, {0xF0, 0x9F}, {'\r', '\n'}})
            merge(l, r);
          for (const char* s : {"<|a|>", "<|a|><|b|>", "<|", "|>"}) rules["special"].push_back({add(s), s});
          rules["split"] = splits[llama];
          rules["ignore_merges"] = llama;
          return Tokenizer(rules.dump(), bytes, offsets, merges, size());
        }()) {}
};

std::string decoded(const Tokenizer& t, const std::vector<int>& ids) {
  std::string s;
  for (int id : ids) s += t.decode(id);
  return s;
}

void any_text(uint8_t flags, std::string text) {
  static const Fixed gpt2(false), llama(true);
  const Tokenizer& t = (flags & 8 ? llama : gpt2).tokenizer;
  if ((flags & 18) == 18 && !text.empty()) {
    const std::string unit = text;
    while (text.size() < 1 << 14) text += unit;
  }
  const Limit limit(2);
  std::vector<int> ids;
  if (!accepted([&] { ids = t.encode(text, flags & 4); }))
    return require(first_invalid_utf8(text) != std::string::npos, "only UTF-8 is asked for");
  require(decoded(t, ids) == text, "decode undoes encode");
  if (!(flags & 4))
    for (int id : ids) require(id < int(t.vocab_size()) - 4, "no special token comes from text");
  Utf8Stream stream;
  std::string shown;
  for (int id : ids) shown += stream.push(t.decode(id));
  require(shown + stream.flush() == text, "the stream shows the text");
}

std::vector<int> merged_by_definition(const Vocabulary& v, const std::string& text) {
  std::vector<uint32_t> ids;
  for (char c : text) ids.push_back(uint8_t(c));
  for (;;) {
    size_t best = SIZE_MAX, at = 0;
    for (size_t i = 0; i + 1 < ids.size(); ++i)
      for (size_t rank = 0; rank < v.merges.size() / 3 && rank < best; ++rank)
        if (v.merges[3 * rank] == ids[i] && v.merges[3 * rank + 1] == ids[i + 1]) best = rank, at = i;
    if (best == SIZE_MAX) return {ids.begin(), ids.end()};
    ids[at] = v.merges[3 * best + 2];
    ids.erase(ids.begin() + long(at) + 1);
  }
}

void any_rules(FuzzedDataProvider in) {
  Vocabulary v;
  const unsigned how = in.ConsumeIntegral<uint8_t>();
  const size_t n_patterns = how % 4 % 3, n_merges = in.ConsumeIntegralInRange<size_t>(0, 24);
  std::vector<uint32_t> parts = {'a', 'b', 'c', 0xC3, 0xA9, ' '};
  std::set<std::string> made;
  for (size_t i = 0; i < n_merges; ++i) {
    const uint32_t left = parts[in.ConsumeIntegral<uint8_t>() % parts.size()];
    const uint32_t right = parts[in.ConsumeIntegral<uint8_t>() % parts.size()];
    if (!made.insert(v.token(left) + v.token(right)).second) continue;
    v.merge(left, right);
    parts.push_back(uint32_t(v.size() - 1));
  }
  for (size_t i = 0; i < n_patterns; ++i) v.rules["split"].push_back(in.ConsumeRandomLengthString(200));
  v.rules["ignore_merges"] = how / 4 % 2 == 1;
  if (how / 8 % 2) {
    const std::string s = in.ConsumeRandomLengthString(16);
    v.rules["special"].push_back({v.add(s), s});
  }
  std::string json = v.rules.dump(-1, ' ', false, json::error_handler_t::replace);
  bool sound = true;  // a byte of a damaged vocabulary may have no token
  if (how / 16 % 4 == 3) json = in.ConsumeRandomLengthString(400), sound = false;
  if (how / 64 == 3) {  // arrays that do not fit together
    auto& values = in.ConsumeBool() ? v.offsets : v.merges;
    const uint32_t any = in.ConsumeIntegral<uint32_t>();  // or near what is allowed
    if (!values.empty())
      values[in.ConsumeIntegralInRange<size_t>(0, values.size() - 1)] =
          any % 2 ? any : uint32_t(v.size()) - 2 + any / 2 % 4;
    sound = false;
  }
  const std::string text = in.ConsumeRemainingBytesAsString();
  accepted([&] {
    const Limit limit(20);
    const Tokenizer t(json, v.bytes, v.offsets, v.merges, v.size());
    const std::vector<int> ids = t.encode(text, false);
    const std::vector<int> with_special = t.encode(text, true);
    if (sound) {
      require(decoded(t, ids) == text && decoded(t, with_special) == text,
              "every byte has a token, so nothing is lost");
      if (n_patterns == 0 && !v.rules["ignore_merges"] && text.size() < 200)
        require(ids == merged_by_definition(v, text), "merges are done by rank, leftmost first");
    }
  });
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const uint8_t flags = data[0];
  if (flags & 1) any_rules(FuzzedDataProvider(data + 1, size - 1));
  else any_text(flags, {reinterpret_cast<const char*>(data) + 1, size - 1});
  return 0;
}
