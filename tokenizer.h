// tokenizer.h - text to token ids and back, and a conversation as token ids.
//
//   Tokenizer      byte-level byte pair encoding, as GPT-2, Llama 3 and SmolLM2 use it: the model's own regular
//                  expressions cut a text into pieces (text/pattern.h); each piece's bytes become tokens, and
//                  neighbours merge in the order in which training learnt the merges. Equals Hugging Face's
//                  `tokenizers` on any valid UTF-8.
//   ChatTemplate   the model's turn marks around what people and the model say. Equals `apply_chat_template`.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/json.h"
#include "text/pattern.h"
#include "text/unicode.h"
#include "text/utf8.h"

namespace speed {

// ---- the tokenizer ------------------------------------------------------------------------------------------------

// Byte-level byte pair encoding. Its arrays are copied before they are checked, because a mapped file can change.
//
//   rules    JSON {"split": [pattern, ...], "ignore_merges": bool, "special": [[id, "spelling"], ...],
//            "added": [[id, "spelling"], ...], "unmatched": [id, ...]}. Patterns apply in order, each to the pieces left
//            by the one before. ignore_merges: a piece that is a token is that token, even where the merges would not
//            make it. special: tokens that text becomes only where that is asked for. added: tokens that it always
//            becomes, such as <think>. unmatched: tokens that no text becomes. The last two may be absent.
//   bytes    the bytes of tokens 0, 1, ... one after the other; token i is bytes[offsets[i], offsets[i+1])
//   offsets  [V+1]; an id without a token has no bytes
//   merges   [M, 3] rows left id, right id, merged id, in rank order
//
// All of it is checked: whatever is not consistent is an Error with code 1.
class Tokenizer {
 public:
  Tokenizer(std::string_view rules, std::span<const uint8_t> bytes, std::span<const uint32_t> offsets,
            std::span<const uint32_t> merges, size_t vocab_size)
      : bytes_(bytes.begin(), bytes.end()),
        offsets_(offsets.begin(), offsets.end()),
        merges_(merges.begin(), merges.end()),
        vocab_size_(vocab_size) {
    check_offsets();
    read_rules(rules);
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

  // Ids of `text`, which must be valid UTF-8; nothing is added. Spellings of added tokens become their ids, the leftmost
  // first and of those the longest. Without `special`, a special token's spelling is ordinary characters. Time: n log n.
  std::vector<int> encode(std::string_view text, bool special) const {
    require_utf8(text);
    if (text.size() >= UINT32_MAX) throw Error(2, "text", "longer than 4 GiB", "use a shorter text");
    std::vector<int> ids;
    for (Added a; (a = find_added(text, special)).id >= 0; text.remove_prefix(a.at + a.size)) {
      encode_ordinary(text.substr(0, a.at), ids);
      ids.push_back(a.id);
    }
    encode_ordinary(text, ids);
    return ids;
  }

  // How many of `ids`, which encode(text, false) gave, stand for bytes before `at` alone.
  size_t tokens_before(std::string_view text, const std::vector<int>& ids, size_t at) const {
    size_t begin = 0, n = 0;
    for (; n < ids.size(); ++n) {
      const std::string_view t = token(size_t(ids[n]));
      while (begin < text.size() && !text.substr(begin).starts_with(t)) ++begin;  // a byte that has no token
      if (begin + t.size() > at) break;
      begin += t.size();
    }
    return n;
  }

  bool is_special(int id) const { return kind_[size_t(id)] == Kind::special; }

  struct Added {
    size_t at = 0, size = 0;
    int id = -1;
  };
  // The first spelling of an added token in `text`, the longest that begins there; id -1 if there is none. Without
  // `special`, the spelling of a special token is passed over.
  Added find_added(std::string_view text, bool special) const {
    for (size_t at = 0; at < text.size(); ++at) {
      Added longest;
      auto low = added_.begin(), high = added_.end();  // spellings that agree with the text so far
      for (size_t n = 0; at + n < text.size() && low != high; ++n) {
        const unsigned char c = text[at + n];
        auto less = [n](const auto& s, unsigned char c) { return n >= s.first.size() || uint8_t(s.first[n]) < c; };
        auto more = [n](unsigned char c, const auto& s) { return n < s.first.size() && c < uint8_t(s.first[n]); };
        low = std::lower_bound(low, high, c, less);
        high = std::upper_bound(low, high, c, more);
        if (low != high && low->first.size() == n + 1) longest = {at, n + 1, low->second};
      }
      if (longest.id >= 0 && (special || !is_special(longest.id))) return longest;
      if (longest.id >= 0) at += longest.size - 1;
    }
    return {};
  }

 private:
  static constexpr uint32_t none = UINT32_MAX;
  enum class Kind : uint8_t { ordinary, unmatched, added, special };

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

  void read_rules(std::string_view text) {
    const json rules = json::parse(text, nullptr, false);
    auto of = [&](const char* key) { return rules.is_object() && rules.contains(key) ? rules[key] : json(); };
    const auto split = of("split"), ignore = of("ignore_merges"), special = of("special");
    if (!split.is_array() || split.size() > 16 || !ignore.is_boolean() || !special.is_array())
      bad_tokenizer("its JSON lacks the keys split, ignore_merges and special");
    for (const auto& pattern : split) {
      if (!pattern.is_string()) bad_tokenizer("split pattern is no string");
      patterns_.emplace_back(pattern.get<std::string>());
    }
    ignore_merges_ = ignore;
    kind_.assign(vocab_size_, Kind::ordinary);
    read_added(special, Kind::special, "special token");
    if (const json added = of("added"); !added.is_null()) read_added(added, Kind::added, "added token");
    if (const json unmatched = of("unmatched"); !unmatched.is_null()) {
      if (!unmatched.is_array()) bad_tokenizer("unmatched is no list");
      for (const auto& id : unmatched) {
        if (!id.is_number_unsigned() || id.get<uint64_t>() >= vocab_size_) bad_tokenizer("unmatched: no token");
        if (kind_[size_t(id)] == Kind::ordinary) kind_[size_t(id)] = Kind::unmatched;
      }
    }
    std::sort(added_.begin(), added_.end());
    for (size_t i = 1; i < added_.size(); ++i)
      if (added_[i].first == added_[i - 1].first)
        bad_tokenizer("added tokens " + std::to_string(added_[i - 1].second) + " and " +
                      std::to_string(added_[i].second) + ": the same spelling");
  }

  void read_added(const json& list, Kind kind, const std::string& name) {
    if (!list.is_array()) bad_tokenizer(name + "s are no list");
    for (const auto& s : list) {
      if (!s.is_array() || s.size() != 2 || !s[0].is_number_unsigned() || !s[1].is_string())
        bad_tokenizer(name + " is no [id, spelling]");
      const size_t id = s[0];
      const std::string what = name + " " + std::to_string(id);
      if (id >= vocab_size_) bad_tokenizer(what + ": outside a vocabulary of " + std::to_string(vocab_size_));
      if (kind_[id] != Kind::ordinary) bad_tokenizer(what + ": there twice");
      if (token(id).empty() || token(id) != s[1].get_ref<const std::string&>())
        bad_tokenizer(what + ": its spelling is not its bytes");
      if (token(id).size() > 1024) bad_tokenizer(what + ": its spelling is longer than 1024 bytes");
      kind_[id] = kind;
      added_.emplace_back(token(id), int(id));
    }
  }

  // A hash table with open addressing over the arrays below. A slot holds an index, or none; keys are not stored.
  struct Index {
    std::vector<uint32_t> slots;
    explicit Index(size_t n = 0) {
      size_t size = 2;
      while (size < 2 * n) size *= 2;
      slots.assign(size, none);
    }
    // The slot of the entry that `equal` accepts, or the empty slot where it belongs.
    template <class Equal>
    size_t find(uint64_t hash, Equal&& equal) const {
      size_t i = hash & (slots.size() - 1);
      while (slots[i] != none && !equal(slots[i])) i = (i + 1) & (slots.size() - 1);
      return i;
    }
  };

  // The last step of MurmurHash3: every bit of x changes every bit of the hash with probability one half.
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

  // Without added and unmatched tokens: the merging of ordinary text never makes one.
  void index_tokens() {
    byte_ids_.fill(-1);
    tokens_ = Index(vocab_size_);
    for (size_t id = 0; id < vocab_size_; ++id) {
      const std::string_view t = token(id);
      if (t.empty() || kind_[id] != Kind::ordinary) continue;
      uint32_t& slot = tokens_.slots[token_slot(t)];
      if (slot != none)
        bad_tokenizer("tokens " + std::to_string(slot) + " and " + std::to_string(id) + ": the same bytes");
      slot = uint32_t(id);
      if (t.size() == 1) byte_ids_[uint8_t(t[0])] = int(id);
    }
  }

  // A merged token must be longer than its parts, so merging always ends.
  void index_merges() {
    if (merges_.size() % 3 != 0) bad_tokenizer("merges are not rows of three");
    ranks_ = Index(merges_.size() / 3);
    for (size_t rank = 0; rank < merges_.size() / 3; ++rank) {
      const uint32_t left = merges_[3 * rank], right = merges_[3 * rank + 1], merged = merges_[3 * rank + 2];
      auto refuse = [&](const std::string& why) { bad_tokenizer("merge " + std::to_string(rank) + ": " + why); };
      for (uint32_t id : {left, right, merged}) {
        if (id >= vocab_size_)
          refuse("id " + std::to_string(id) + " outside a vocabulary of " + std::to_string(vocab_size_));
        if (kind_[id] != Kind::ordinary) refuse("token " + std::to_string(id) + " is added");
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

  // A piece while it is merged: a linked list of symbols, and a heap of pairs that could merge.
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
  std::vector<Kind> kind_;                               // [V]
  std::vector<std::pair<std::string_view, int>> added_;  // special or not, by spelling
  std::array<int, 256> byte_ids_;                        // -1: no token
  Index tokens_, ranks_;                                 // bytes -> id, (left, right) -> row of merges
  const uint64_t seed_ = std::random_device()();         // no file can choose keys that collide
};

// ---- the chat template --------------------------------------------------------------------------------------------

// A chat template, as data: the marks that stand before, between and after what people and the model say.
//   open text generation[0] generation[1] answer          the first turn; with a system text, it begins
//   system[0] text system[1] text ...                     so; with an empty one, it begins with system_empty
//   ... text past[0] answer past[1] text generation ...   earlier turns
// generation[1] is the answer's header, generation[0] closes the turn before it. past[0] may differ from them: a template
// may open an answer with <think>, and show earlier answers without. A mark is text in which the spelling of a special
// token means that token, and before the first user text {date} a date. Content is ordinary text, so no one can forge a
// turn. The text between two special tokens is tokenised as one string, as Hugging Face's apply_chat_template does, so
// the ids are equal. The tokenizer must outlive this object.
//
//   marks_json  {"template": name, "trim": {"system": side, "after_system": side, "user": side, "assistant": side},
//          "open": mark, "system": [mark, mark] or null, "system_empty": mark or null, "generation": [mark, mark],
//          "past": [mark, mark], "date_default": text or null}
//         trim: at which side texts lose white space: none, left, right, both; after_system: a first user text after a
//         system text. system null: it takes no system text.
//   The older form is read as well: {"template": name, "trim": bool, "begin": mark, "system": [mark, mark],
//          "system_default": text or null, "user": [mark, mark], "assistant": [mark, mark], "date_default": text or null}
class ChatTemplate {
 public:
  ChatTemplate(std::string_view marks_json, const Tokenizer& tokenizer) : tokenizer_(&tokenizer) {
    const json j = json::parse(marks_json, nullptr, false);
    name_ = text(j, "template");
    if (std::any_of(name_.begin(), name_.end(), [](unsigned char c) { return c < 0x20 || c == 0x7F; }))
      bad("template holds a control character");
    if (!j.contains("trim")) bad("trim is missing");
    date_default_ = text_or_null(j, "date_default");
    if (j["trim"].is_boolean()) {
      read_older(j);
    } else {
      const json& trim = j["trim"];
      trim_ = {side(trim, "system"), side(trim, "after_system"), side(trim, "user"), side(trim, "assistant")};
      open_ = text(j, "open");
      takes_system_ = !j.contains("system") || !j["system"].is_null();
      if (takes_system_) system_ = marks(j, "system");
      system_empty_ = text_or_null(j, "system_empty");
      generation_ = marks(j, "generation"), past_ = marks(j, "past");
    }
    for (const std::string& mark : {open_, system_[0], system_[1], system_empty_.value_or("")})
      shows_date_ = shows_date_ || mark.find(date_) != std::string::npos;
    if (shows_date_ && !date_default_) bad("date_default is missing");
    if (const auto s = tokenizer.find_added(past_[1], true); s.id >= 0 && s.at == 0 && tokenizer.is_special(s.id))
      stop_ = s.id;
  }

  const std::string& name() const { return name_; }

  // The special token that closes the model's turn, which therefore ends its answer; -1 if it is closed by text.
  int stop() const { return stop_; }

  // What the model is to process next. ids[0, split) are prompt tokens; the header of the answer follows, and the text
  // that the answer must begin with.
  struct Turn {
    std::vector<int> ids;
    size_t split = 0;
  };

  // A conversation from its start.
  Turn first(const std::optional<std::string>& system, std::string_view user, const std::optional<std::string>& date,
             std::string_view prefix = "") const {
    Ids ids(*tokenizer_);
    return ask(ids, user, begin(ids, system, date), prefix);
  }

  // A later user turn. Begins with what closes the assistant's turn before it, end token included.
  Turn next(std::string_view user, std::string_view prefix = "") const {
    Ids ids(*tokenizer_);
    ids.mark(past_[1]);
    return ask(ids, user, trim_.user, prefix);
  }

  // A conversation with earlier turns: user, answer, ..., user.
  Turn whole(const std::optional<std::string>& system, std::span<const std::string> turns,
             const std::optional<std::string>& date, std::string_view prefix = "") const {
    Ids ids(*tokenizer_);
    Trim sides = begin(ids, system, date);
    for (size_t i = 0; i + 2 < turns.size(); i += 2) {
      ids.text(trimmed(turns[i], std::exchange(sides, trim_.user)));
      ids.mark(past_[0]);
      ids.text(trimmed(turns[i + 1], trim_.assistant));
      ids.mark(past_[1]);
    }
    return ask(ids, turns.back(), sides, prefix);
  }

  // The most tokens that the header of an answer takes. Where it begins with text, a neighbour may change its first.
  size_t header_size() const {
    const Turn turn = next("");
    return turn.ids.size() - turn.split + (tokenizer_->is_special(turn.ids[turn.split]) ? 0 : 4);
  }

 private:
  using Marks = std::array<std::string, 2>;
  enum class Trim { none, left, right, both };

  // Collects marks and texts, and tokenises each stretch between two special tokens as one string.
  class Ids {
   public:
    explicit Ids(const Tokenizer& t) : tokenizer_(t) {}
    void mark(std::string_view mark) {
      for (Tokenizer::Added a; (a = tokenizer_.find_added(mark, true)).id >= 0; mark.remove_prefix(a.at + a.size)) {
        if (!tokenizer_.is_special(a.id)) {  // the stretch that it is in will be searched for it
          text(mark.substr(0, a.at + a.size));
          continue;
        }
        text(mark.substr(0, a.at));
        flush();
        turn_.ids.push_back(a.id);
      }
      text(mark);
    }
    void text(std::string_view text) { pending_ += text; }
    void split() { split_at_ = pending_.size(); }
    Turn finish() {
      flush();
      if (turn_.split == turn_.ids.size() && turn_.split > 0) --turn_.split;  // one token must make the logits
      return std::move(turn_);
    }

   private:
    void flush() {
      const std::vector<int> more = tokenizer_.encode(pending_, false);
      if (split_at_) turn_.split = turn_.ids.size() + tokenizer_.tokens_before(pending_, more, *split_at_);
      turn_.ids.insert(turn_.ids.end(), more.begin(), more.end());
      pending_.clear(), split_at_.reset();
    }
    const Tokenizer& tokenizer_;
    std::string pending_;
    std::optional<size_t> split_at_;  // in pending_
    Turn turn_;
  };

  // All before the first user text. Returns at which sides that is trimmed.
  Trim begin(Ids& ids, const std::optional<std::string>& system, const std::optional<std::string>& date) const {
    if (date && !shows_date_) throw Error(2, "--date", "this model's chat template shows none", "leave it out");
    const std::string day = date.value_or(date_default_.value_or(""));
    if (!system) {
      dated(ids, open_, day);
      return trim_.user;
    }
    if (!takes_system_)
      throw Error(2, "--system", "this model's chat template takes none", "say it in the user's text");
    const std::string_view shown = trimmed(*system, trim_.system);
    if (shown.empty() && system_empty_) {
      dated(ids, *system_empty_, day);
      return trim_.user;
    }
    dated(ids, system_[0], day);
    ids.text(shown);
    dated(ids, system_[1], day);
    return trim_.after_system;
  }

  // The user's text, then where the answer begins. A template without a header for it: all that follows the text.
  Turn ask(Ids& ids, std::string_view user, Trim sides, std::string_view prefix) const {
    ids.text(trimmed(user, sides));
    if (generation_[1].empty()) ids.split();
    ids.mark(generation_[0]);
    if (!generation_[1].empty()) ids.split();
    ids.mark(generation_[1]);
    ids.text(trimmed(prefix, trim_.assistant));
    return ids.finish();
  }

  // A mark with a date in place of every {date}; the date is text, not a mark.
  static void dated(Ids& ids, std::string_view mark, std::string_view date) {
    for (size_t at; (at = mark.find(date_)) != std::string_view::npos; mark.remove_prefix(at + date_.size())) {
      ids.mark(mark.substr(0, at));
      ids.text(date);
    }
    ids.mark(mark);
  }

  // As Python's str.strip, which templates call: Unicode's white space and the four ASCII separators U+001C to U+001F.
  static std::string_view trimmed(std::string_view s, Trim sides) {
    require_utf8(s);
    auto blank = [](std::string_view character) {
      char32_t c = static_cast<unsigned char>(character[0]);
      if (character.size() > 1) c &= 0x7Fu >> character.size();
      for (char byte : character.substr(1)) c = c << 6 | (byte & 0x3F);
      if (c >= 0x1C && c <= 0x1F) return true;
      return std::any_of(std::begin(white_space), std::end(white_space),
                         [c](CodePoints r) { return r.first <= c && c <= r.last; });
    };
    auto first_character = [](std::string_view s) { return s.substr(0, utf8_character(s)); };
    auto last_character = [](std::string_view s) {
      size_t at = s.size() - 1;
      while (at > 0 && (s[at] & 0xC0) == 0x80) --at;
      return s.substr(at);
    };
    if (sides == Trim::left || sides == Trim::both)
      while (!s.empty() && blank(first_character(s))) s.remove_prefix(first_character(s).size());
    if (sides == Trim::right || sides == Trim::both)
      while (!s.empty() && blank(last_character(s))) s.remove_suffix(last_character(s).size());
    return s;
  }

  [[noreturn]] static void bad(const std::string& why) {
    throw Error(1, "chat template", why, "export the checkpoint again");
  }
  static std::string text(const json& j, const char* key) {
    if (!j.is_object() || !j.contains(key) || !j[key].is_string()) bad(std::string(key) + " is no text");
    return checked(j[key], key);
  }
  // A mark may hold {date} thousands of times, so its length is limited.
  static std::string checked(const std::string& s, const char* key) {
    if (s.size() > 16384) bad(std::string(key) + " is longer than 16384 bytes");
    return s;
  }
  static std::optional<std::string> text_or_null(const json& j, const char* key) {
    if (j.contains(key) && j[key].is_null()) return {};
    return text(j, key);
  }
  static Marks marks(const json& j, const char* key) {
    const std::string what = std::string(key) + " is no pair of marks";
    if (!j.contains(key) || !j[key].is_array() || j[key].size() != 2) bad(what);
    if (!j[key][0].is_string() || !j[key][1].is_string()) bad(what);
    return {checked(j[key][0], key), checked(j[key][1], key)};
  }

  static Trim side(const json& trim, const char* role) {
    const auto given = trim.is_object() && trim.contains(role) ? trim[role] : json();
    const std::array<const char*, 4> sides = {"none", "left", "right", "both"};
    for (size_t i = 0; i < sides.size(); ++i)
      if (given == sides[i]) return Trim(i);
    bad(std::string("trim has no side for ") + role);
  }

  // A turn here is user[0] text user[1] or assistant[0] text assistant[1], and a system turn may come first.
  void read_older(const json& j) {
    const Trim sides = j["trim"] ? Trim::both : Trim::none;
    trim_ = {sides, sides, sides, sides};
    const std::string begin = text(j, "begin");
    const Marks system = marks(j, "system"), user = marks(j, "user"), assistant = marks(j, "assistant");
    const std::optional<std::string> system_default = text_or_null(j, "system_default");
    open_ = begin;
    if (system_default) open_ += system[0] + std::string(trimmed(*system_default, sides)) + system[1];
    open_ += user[0];
    system_ = {begin + system[0], system[1] + user[0]};
    generation_ = {user[1], assistant[0]};
    past_ = {user[1] + assistant[0], assistant[1] + user[0]};
  }

  static constexpr std::string_view date_ = "{date}";
  const Tokenizer* tokenizer_;
  std::string name_, open_;
  struct {
    Trim system, after_system, user, assistant;
  } trim_{};
  bool shows_date_ = false, takes_system_ = true;
  Marks system_, generation_, past_;
  std::optional<std::string> system_empty_, date_default_;
  int stop_ = -1;
};

}  // namespace speed
