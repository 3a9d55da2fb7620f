// tokenizer.h - text to token ids and back: byte-level byte pair encoding, as GPT-2, Llama 3 and SmolLM2 use it.
//
// The model's own regular expressions cut a text into pieces; each piece's bytes become tokens, and neighbours merge in
// the order in which training learnt the merges. Equals Hugging Face's `tokenizers` on any valid UTF-8.
//
//   UTF-8          characters whole or not at all
//   SplitPattern   one regular expression, with the Unicode of unicode.h
//   Tokenizer      vocabulary, merges and special tokens
#pragma once

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <ctime>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "error.h"
#include "unicode.h"

namespace speed {

// ---- UTF-8 ----------------------------------------------------------------------------------------------------------

// The character that s, not empty, begins with, by table 3-7 of the Unicode Standard (no surrogates, no overlong form,
// nothing above U+10FFFF): its length in bytes; 0 if s ends before it does; -n if the first n bytes begin no character.
inline int utf8_character(std::string_view s) {
  auto byte = [&](size_t i) { return static_cast<unsigned char>(s[i]); };
  const unsigned first = byte(0);
  if (first < 0x80) return 1;
  if (first < 0xC2 || first > 0xF4) return -1;
  const int length = first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
  unsigned low = first == 0xE0 ? 0xA0 : first == 0xF0 ? 0x90 : 0x80;
  unsigned high = first == 0xED ? 0x9F : first == 0xF4 ? 0x8F : 0xBF;
  for (int i = 1; i < length; ++i) {
    if (size_t(i) == s.size()) return 0;
    if (byte(i) < low || byte(i) > high) return -i;
    low = 0x80, high = 0xBF;
  }
  return length;
}

// Offset of the first byte that belongs to no character, std::string_view::npos if there is none.
inline size_t first_invalid_utf8(std::string_view text) {
  for (size_t at = 0; at < text.size();) {
    const int n = utf8_character(text.substr(at));
    if (n <= 0) return at;
    at += n;
  }
  return std::string_view::npos;
}

inline void require_utf8(std::string_view text) {
  if (const size_t bad = first_invalid_utf8(text); bad != std::string_view::npos)
    throw Error(1, "text", "not UTF-8 at byte " + std::to_string(bad), "convert it to UTF-8");
}

// Bytes of tokens in, whole characters out. A token may end within a character, which is then held back until the rest
// comes. Bytes that form no character come out as U+FFFD, one for each maximal subpart, as Python and Rust decode them.
class Utf8Stream {
 public:
  std::string push(std::string_view bytes) {
    held_ += bytes;
    std::string out;
    size_t at = 0;
    while (at < held_.size()) {
      const int n = utf8_character(std::string_view(held_).substr(at));
      if (n == 0) break;
      if (n > 0) out.append(held_, at, n);
      else out += "\xEF\xBF\xBD";
      at += n > 0 ? n : -n;
    }
    held_.erase(0, at);
    return out;
  }
  // At the end of the text: what is held back will not be completed any more.
  std::string flush() {
    const bool partial = !held_.empty();
    held_.clear();
    return partial ? "\xEF\xBF\xBD" : "";
  }

 private:
  std::string held_;
};

// ---- split patterns -------------------------------------------------------------------------------------------------

[[noreturn]] inline void bad_tokenizer(const std::string& why) {
  throw Error(1, "tokenizer", why, "export the checkpoint again");
}

// One regular expression. Accepts the syntax in which PCRE2, Oniguruma (Hugging Face) and Rust (tiktoken) agree, and
// writes \p{L}, \p{N}, \s and their negations out as the ranges of unicode.h, for PCRE2's own are another Unicode's.
class SplitPattern {
 public:
  explicit SplitPattern(const std::string& pattern) {
    const std::string ranges = with_ranges(pattern);
    int error = 0;
    size_t offset = 0;
    code_.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(ranges.data()), ranges.size(),
                              PCRE2_UTF | PCRE2_ANCHORED | PCRE2_NEVER_BACKSLASH_C, &error, &offset, nullptr));
    if (!code_) {
      unsigned char message[256] = "";
      pcre2_get_error_message(error, message, sizeof message);
      bad_tokenizer("split pattern does not compile: " + std::string(reinterpret_cast<char*>(message)));
    }
    uint32_t matches_empty = 0;
    pcre2_pattern_info(code_.get(), PCRE2_INFO_MATCHEMPTY, &matches_empty);
    if (matches_empty) bad_tokenizer("split pattern can match the empty text");
  }

  // Appends the pieces of `text` (valid UTF-8): every match, and every stretch between matches; together, `text`.
  void split(std::string_view text, std::vector<std::string_view>& pieces) const {
    std::unique_ptr<pcre2_match_data, Free> found(pcre2_match_data_create(1, nullptr));
    std::unique_ptr<pcre2_match_context, Free> context(pcre2_match_context_create(nullptr));
    if (!found || !context) throw std::bad_alloc();
    pcre2_set_heap_limit(context.get(), 1 << 20);  // in KiB
    // Each starting position gets a few steps, and what more it needs comes from one store: backtracking a few times
    // over the whole text is within it, running away is not. PCRE2's JIT is three times as fast, but leaves steps
    // uncounted. A step may still scan the whole text (a possessive repetition in a look-ahead does, everywhere), so
    // there is a limit of processor time too: 4 microseconds a byte, far more than published patterns take.
    uint64_t store = std::min<uint64_t>(1'000'000 + 32 * uint64_t(text.size()), 1u << 31);
    const double most_seconds = processor_seconds() + 1 + 4e-6 * double(text.size());
    auto looked = std::chrono::steady_clock::now();  // a cheap clock says when to ask the dear one
    const auto subject = reinterpret_cast<PCRE2_SPTR>(text.data());
    auto match_at = [&](size_t at) {
      for (uint32_t limit = 256;; limit *= 2) {
        pcre2_set_match_limit(context.get(), limit);
        const int rc =
            pcre2_match(code_.get(), subject, text.size(), at, PCRE2_NO_UTF_CHECK, found.get(), context.get());
        if (const auto now = std::chrono::steady_clock::now(); now - looked > std::chrono::milliseconds(20)) {
          looked = now;
          if (processor_seconds() > most_seconds)
            bad_tokenizer("split pattern gives up on this text (it takes too long)");
        }
        if (rc != PCRE2_ERROR_MATCHLIMIT || store < limit) return rc;
        store -= limit;
      }
    };
    size_t done = 0;
    for (size_t at = 0; at < text.size();) {
      const int rc = match_at(at);
      if (rc == PCRE2_ERROR_NOMATCH) {
        at += size_t(utf8_character(text.substr(at)));
        continue;
      }
      if (rc < 0) bad_tokenizer("split pattern gives up on this text (PCRE2 error " + std::to_string(rc) + ")");
      const size_t end = pcre2_get_ovector_pointer(found.get())[1];
      if (at > done) pieces.push_back(text.substr(done, at - done));
      pieces.push_back(text.substr(at, end - at));
      done = at = end;
    }
    if (done < text.size()) pieces.push_back(text.substr(done));
  }

 private:
  // Of this thread: a busy or paused machine does not stretch it.
  static double processor_seconds() {
    timespec t{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
  }

  struct Free {
    void operator()(pcre2_code* p) const { pcre2_code_free(p); }
    void operator()(pcre2_match_data* p) const { pcre2_match_data_free(p); }
    void operator()(pcre2_match_context* p) const { pcre2_match_context_free(p); }
  };

  // The members of a class (the rest of the code points, if negated) as they are written between [ and ].
  static std::string ranges_of(std::span<const CodePoints> members, bool negated) {
    std::string out;
    auto add = [&](char32_t first, char32_t last) {
      char text[40];
      snprintf(text, sizeof text, "\\x{%X}-\\x{%X}", unsigned(first), unsigned(last));
      if (first <= last) out += text;
    };
    char32_t gap = 0;
    for (const auto& [first, last] : members) {
      if (!negated) add(first, last);
      else if (first > gap) add(gap, first - 1);
      gap = last + 1;
    }
    if (negated) add(gap, 0x10FFFF);
    return out;
  }

  static std::string with_ranges(std::string_view pattern) {
    if (pattern.empty() || pattern.size() > 4096) bad_tokenizer("split pattern is empty or longer than 4096 bytes");
    auto refuse = [](const std::string& what) { bad_tokenizer("split pattern has " + what + ", unknown here"); };
    auto next_is = [&](size_t at, std::string_view s) { return pattern.substr(at).starts_with(s); };
    std::string out;
    bool in_class = false;
    for (size_t i = 0; i < pattern.size(); ++i) {
      const char c = pattern[i];
      if (c == '\\') {
        const char kind = ++i < pattern.size() ? pattern[i] : '\0';
        if (kind == 'p' || kind == 'P' || kind == 's' || kind == 'S') {
          std::span<const CodePoints> members = white_space;
          if (kind == 'p' || kind == 'P') {
            const std::string_view property = pattern.substr(i + 1, 3);
            if (property != "{L}" && property != "{N}") refuse("a property other than {L} and {N}");
            members = property == "{L}" ? std::span<const CodePoints>(letters) : numbers;
            i += 3;
          }
          const bool negated = kind == 'P' || kind == 'S';
          out += in_class ? ranges_of(members, negated) : (negated ? "[^" : "[") + ranges_of(members, false) + "]";
          continue;
        }
        const bool ascii = static_cast<unsigned char>(kind) < 0x80;
        if (!ascii || kind == '\0' || (isalnum(kind) && kind != 'r' && kind != 'n' && kind != 't' && !next_is(i, "x{")))
          refuse(std::string("the escape \\") + (ascii && isalnum(kind) ? std::string(1, kind) : "?"));
        out += c;
        out += kind;
        continue;
      }
      if (in_class) {
        if (c == '[' || next_is(i, "&&") || next_is(i, "--") || next_is(i, "~~")) refuse("a class within a class");
        if (c == ']') in_class = false;
      } else if (c == '[') {
        in_class = true;
        if (next_is(i + 1, "^")) out += pattern[i++];
        if (next_is(i + 1, "]")) refuse("an empty class");
        out += pattern[i];
        continue;
      } else if (c == '^' || c == '$' || c == '.') {
        refuse(std::string("the symbol ") + c);
      } else if (c == '(') {
        if (next_is(i + 1, "*")) refuse("a verb (*");
        bool known = !next_is(i + 1, "?");
        for (const char* group : {"?:", "?i:", "?=", "?!", "?<=", "?<!", "?>"}) known = known || next_is(i + 1, group);
        if (!known) refuse("a group other than (?: (?i: (?> and look-around");
      }
      out += c;
    }
    return out;
  }

  std::unique_ptr<pcre2_code, Free> code_;
};

// ---- the tokenizer --------------------------------------------------------------------------------------------------

// Byte-level byte pair encoding. The arrays it is given are copied before they are checked: a mapped file can change.
//
//   json     {"split": [pattern, ...], "ignore_merges": bool, "special": [[id, "spelling"], ...]}; patterns apply in
//            order, each to the pieces left by the one before. ignore_merges: a piece that is a token is that token,
//            even where the merges would not make it.
//   bytes    the bytes of tokens 0, 1, ... one after the other; token i is bytes[offsets[i], offsets[i+1])
//   offsets  [V+1]; an id without a token has no bytes
//   merges   [M, 3] rows left id, right id, merged id, in rank order
//
// Nothing of it is trusted: whatever does not fit together is an Error with code 1.
class Tokenizer {
 public:
  Tokenizer(std::string_view json, std::span<const uint8_t> bytes, std::span<const uint32_t> offsets,
            std::span<const uint32_t> merges, size_t vocab_size)
      : bytes_(bytes.begin(), bytes.end()),
        offsets_(offsets.begin(), offsets.end()),
        merges_(merges.begin(), merges.end()),
        vocab_size_(vocab_size) {
    check_offsets();
    read_json(json);
    index_tokens();
    index_merges();
  }

  size_t vocab_size() const { return vocab_size_; }

  // The bytes of a token, perhaps part of a character; a special token's spelling; nothing for an id without a token.
  std::string_view decode(int id) const {
    if (id < 0 || size_t(id) >= vocab_size_)
      throw Error(2, "token " + std::to_string(id), "outside a vocabulary of " + std::to_string(vocab_size_),
                  "use ids from 0 to " + std::to_string(vocab_size_ - 1));
    return token(id);
  }

  // Ids of `text`, which must be valid UTF-8; nothing is added. With `special`, spellings of special tokens become
  // their ids, the leftmost first and of those the longest; without, they are ordinary characters. Time: n log n.
  std::vector<int> encode(std::string_view text, bool special) const {
    require_utf8(text);
    if (text.size() >= UINT32_MAX) throw Error(2, "text", "longer than 4 GiB", "use a shorter text");
    std::vector<int> ids;
    if (special) {
      for (Special s; (s = find_special(text)).id >= 0; text.remove_prefix(s.at + s.size)) {
        encode_ordinary(text.substr(0, s.at), ids);
        ids.push_back(s.id);
      }
    }
    encode_ordinary(text, ids);
    return ids;
  }

  struct Special {
    size_t at = 0, size = 0;
    int id = -1;
  };
  // The first spelling of a special token in `text`, the longest that begins there; id -1 if there is none.
  Special find_special(std::string_view text) const {
    for (size_t at = 0; at < text.size(); ++at) {
      Special longest;
      auto low = specials_.begin(), high = specials_.end();  // spellings that agree with the text so far
      for (size_t n = 0; at + n < text.size() && low != high; ++n) {
        const unsigned char c = text[at + n];
        auto less = [n](const auto& s, unsigned char c) { return n >= s.first.size() || uint8_t(s.first[n]) < c; };
        auto more = [n](unsigned char c, const auto& s) { return n < s.first.size() && c < uint8_t(s.first[n]); };
        low = std::lower_bound(low, high, c, less);
        high = std::upper_bound(low, high, c, more);
        if (low != high && low->first.size() == n + 1) longest = {at, n + 1, low->second};
      }
      if (longest.id >= 0) return longest;
    }
    return {};
  }

 private:
  static constexpr uint32_t none = UINT32_MAX;

  std::string_view token(size_t id) const {
    return {reinterpret_cast<const char*>(bytes_.data()) + offsets_[id], offsets_[id + 1] - offsets_[id]};
  }

  void check_offsets() const {
    if (vocab_size_ == 0 || vocab_size_ > INT32_MAX || offsets_.size() != vocab_size_ + 1)
      bad_tokenizer("expected " + std::to_string(vocab_size_ + 1) + " offsets, got " + std::to_string(offsets_.size()));
    for (size_t i = 0; i < vocab_size_; ++i)
      if (offsets_[i] > offsets_[i + 1]) bad_tokenizer("offsets decrease at token " + std::to_string(i));
    if (offsets_.front() != 0 || offsets_.back() != bytes_.size())
      bad_tokenizer("offsets: expected 0 to " + std::to_string(bytes_.size()) + ", got " +
                    std::to_string(offsets_.front()) + " to " + std::to_string(offsets_.back()));
  }

  void read_json(std::string_view text) {
    const auto json = nlohmann::json::parse(text, nullptr, false);
    auto of = [&](const char* key) { return json.is_object() && json.contains(key) ? json[key] : nlohmann::json(); };
    const auto split = of("split"), ignore = of("ignore_merges"), special = of("special");
    if (!split.is_array() || split.size() > 16 || !ignore.is_boolean() || !special.is_array())
      bad_tokenizer("its JSON lacks the keys split, ignore_merges and special");
    for (const auto& pattern : split) {
      if (!pattern.is_string()) bad_tokenizer("split pattern is no string");
      patterns_.emplace_back(pattern.get<std::string>());
    }
    ignore_merges_ = ignore;
    is_special_.assign(vocab_size_, false);
    for (const auto& s : special) {
      if (!s.is_array() || s.size() != 2 || !s[0].is_number_unsigned() || !s[1].is_string())
        bad_tokenizer("special token is no [id, spelling]");
      const size_t id = s[0];
      const std::string what = "special token " + std::to_string(id);
      if (id >= vocab_size_) bad_tokenizer(what + ": outside a vocabulary of " + std::to_string(vocab_size_));
      if (is_special_[id]) bad_tokenizer(what + ": there twice");
      if (token(id).empty() || token(id) != s[1].get_ref<const std::string&>())
        bad_tokenizer(what + ": its spelling is not its bytes");
      if (token(id).size() > 1024) bad_tokenizer(what + ": its spelling is longer than 1024 bytes");
      is_special_[id] = true;
      specials_.emplace_back(token(id), int(id));
    }
    std::sort(specials_.begin(), specials_.end());
    for (size_t i = 1; i < specials_.size(); ++i)
      if (specials_[i].first == specials_[i - 1].first)
        bad_tokenizer("special tokens " + std::to_string(specials_[i - 1].second) + " and " +
                      std::to_string(specials_[i].second) + ": the same spelling");
  }

  // Open addressing over these arrays: a slot holds an index, or none; the key is read where it lies.
  struct Index {
    std::vector<uint32_t> slots;
    explicit Index(size_t n = 0) {
      size_t size = 2;
      while (size < 2 * n) size *= 2;
      slots.assign(size, none);
    }
    // Where the entry that `equal` accepts is, or the empty slot where it belongs.
    template <class Equal>
    size_t find(uint64_t hash, Equal&& equal) const {
      size_t i = hash & (slots.size() - 1);
      while (slots[i] != none && !equal(slots[i])) i = (i + 1) & (slots.size() - 1);
      return i;
    }
  };

  // The finisher of MurmurHash3: every bit of x changes every bit of the hash with probability one half.
  static uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 33)) * 0xFF51AFD7ED558CCDu;
    x = (x ^ (x >> 33)) * 0xC4CEB9FE1A85EC53u;
    return x ^ (x >> 33);
  }
  uint64_t hash(std::string_view bytes) const {
    uint64_t h = seed_ ^ bytes.size();
    for (; bytes.size() >= 8; bytes.remove_prefix(8)) {
      uint64_t word;
      std::memcpy(&word, bytes.data(), 8);
      h = mix(h ^ word);
    }
    uint64_t rest = 0;
    std::memcpy(&rest, bytes.data(), bytes.size());
    return mix(h ^ rest);
  }

  size_t token_slot(std::string_view bytes) const {
    return tokens_.find(hash(bytes), [&](uint32_t id) { return token(id) == bytes; });
  }
  size_t rank_slot(uint32_t left, uint32_t right) const {
    return ranks_.find(mix(seed_ ^ (uint64_t(left) << 32 | right)),
                       [&](uint32_t rank) { return merges_[3 * rank] == left && merges_[3 * rank + 1] == right; });
  }

  // Special tokens stay out: ordinary text never becomes one.
  void index_tokens() {
    byte_ids_.fill(-1);
    tokens_ = Index(vocab_size_);
    for (size_t id = 0; id < vocab_size_; ++id) {
      const std::string_view t = token(id);
      if (t.empty() || is_special_[id]) continue;
      uint32_t& slot = tokens_.slots[token_slot(t)];
      if (slot != none)
        bad_tokenizer("tokens " + std::to_string(slot) + " and " + std::to_string(id) + ": the same bytes");
      slot = uint32_t(id);
      if (t.size() == 1) byte_ids_[uint8_t(t[0])] = int(id);
    }
  }

  // A merged token is longer than its parts, so merges cannot run in a circle.
  void index_merges() {
    if (merges_.size() % 3 != 0) bad_tokenizer("merges are not rows of three");
    ranks_ = Index(merges_.size() / 3);
    for (size_t rank = 0; rank < merges_.size() / 3; ++rank) {
      const uint32_t left = merges_[3 * rank], right = merges_[3 * rank + 1], merged = merges_[3 * rank + 2];
      auto refuse = [&](const std::string& why) { bad_tokenizer("merge " + std::to_string(rank) + ": " + why); };
      for (uint32_t id : {left, right, merged}) {
        if (id >= vocab_size_)
          refuse("id " + std::to_string(id) + " outside a vocabulary of " + std::to_string(vocab_size_));
        if (is_special_[id]) refuse("token " + std::to_string(id) + " is special");
      }
      const std::string_view l = token(left), r = token(right), m = token(merged);
      if (l.empty() || r.empty() || m.size() != l.size() + r.size() || !m.starts_with(l) || !m.ends_with(r))
        refuse("the merged token is not its two parts");
      uint32_t& slot = ranks_.slots[rank_slot(left, right)];
      if (slot != none) refuse("the same pair as merge " + std::to_string(slot));
      slot = uint32_t(rank);
    }
  }

  void encode_ordinary(std::string_view text, std::vector<int>& ids) const {
    std::vector<std::string_view> pieces, finer;
    if (!text.empty()) pieces.push_back(text);
    for (const SplitPattern& pattern : patterns_) {
      finer.clear();
      for (std::string_view piece : pieces) pattern.split(piece, finer);
      pieces.swap(finer);
    }
    Symbols symbols;
    for (std::string_view piece : pieces) encode_piece(piece, symbols, ids);
  }

  // A piece on its way to tokens: a list of symbols linked by index, and a heap of pairs that could merge.
  struct Symbols {
    std::vector<uint32_t> id, previous, next;
    std::vector<uint64_t> pairs;  // rank << 32 | index of the left symbol; smallest first
  };

  // Merges the pair of lowest rank, the leftmost of equals, until none is left. A byte that has no token is left out
  // (SmolLM2 has none for six control characters), as Hugging Face does where there is no unknown token.
  void encode_piece(std::string_view piece, Symbols& s, std::vector<int>& ids) const {
    if (ignore_merges_) {
      if (const uint32_t id = tokens_.slots[token_slot(piece)]; id != none) return ids.push_back(int(id));
    }
    s.id.clear(), s.pairs.clear();
    for (const char c : piece)
      if (const int id = byte_ids_[uint8_t(c)]; id >= 0) s.id.push_back(uint32_t(id));
    const uint32_t n = uint32_t(s.id.size());
    s.previous.resize(n), s.next.resize(n);

    auto rank = [&](uint32_t i) { return s.next[i] < n ? ranks_.slots[rank_slot(s.id[i], s.id[s.next[i]])] : none; };
    auto offer = [&](uint32_t i) {
      if (const uint32_t r = rank(i); r != none) {
        s.pairs.push_back(uint64_t(r) << 32 | i);
        std::push_heap(s.pairs.begin(), s.pairs.end(), std::greater<>());
      }
    };
    for (uint32_t i = 0; i < n; ++i) s.previous[i] = i - 1, s.next[i] = i + 1;
    for (uint32_t i = 0; i < n; ++i) offer(i);
    while (!s.pairs.empty()) {
      const uint32_t r = uint32_t(s.pairs.front() >> 32), left = uint32_t(s.pairs.front());
      std::pop_heap(s.pairs.begin(), s.pairs.end(), std::greater<>());
      s.pairs.pop_back();
      if (s.id[left] == none || rank(left) != r) continue;  // one of the two has merged with another neighbour
      const uint32_t right = s.next[left];
      s.id[left] = merges_[3 * r + 2];
      s.id[right] = none;
      s.next[left] = s.next[right];
      if (s.next[left] < n) s.previous[s.next[left]] = left;
      if (left > 0) offer(s.previous[left]);
      offer(left);
    }
    for (uint32_t i = 0; i < n; i = s.next[i]) ids.push_back(int(s.id[i]));
  }

  std::vector<uint8_t> bytes_;
  std::vector<uint32_t> offsets_, merges_;
  size_t vocab_size_;
  std::vector<SplitPattern> patterns_;
  bool ignore_merges_ = false;
  std::vector<bool> is_special_;                            // [V]
  std::vector<std::pair<std::string_view, int>> specials_;  // by spelling
  std::array<int, 256> byte_ids_;                           // -1: no token
  Index tokens_, ranks_;                                    // bytes -> id, (left, right) -> row of merges
  const uint64_t seed_ = std::random_device()();            // so that no file can make its keys collide
};

}  // namespace speed
