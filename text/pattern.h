// pattern.h - the regular expressions that cut a text into pieces before its bytes are merged into tokens.
#pragma once

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <chrono>
#include <ctime>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "../base/error.h"
#include "unicode.h"
#include "utf8.h"

namespace speed {

[[noreturn]] inline void bad_tokenizer(const std::string& why) {
  throw Error(1, "tokenizer", why, "export the checkpoint again");
}

// ---- sets of code points -------------------------------------------------------------------------------------------

// Ranges that ascend and do not touch.
using CodePointSet = std::vector<CodePoints>;

inline CodePointSet united(CodePointSet set) {
  std::sort(set.begin(), set.end(), [](CodePoints a, CodePoints b) { return a.first < b.first; });
  CodePointSet out;
  for (const CodePoints& r : set)
    if (!out.empty() && r.first <= out.back().last + 1) out.back().last = std::max(out.back().last, r.last);
    else out.push_back(r);
  return out;
}

inline CodePointSet complement(const CodePointSet& set) {
  CodePointSet out;
  char32_t gap = 0;
  for (const CodePoints& r : set) {
    if (r.first > gap) out.push_back({gap, r.first - 1});
    gap = r.last + 1;
  }
  if (gap <= 0x10FFFF) out.push_back({gap, 0x10FFFF});
  return out;
}

inline CodePointSet intersection(const CodePointSet& a, const CodePointSet& b) {
  CodePointSet outside = complement(a);
  const CodePointSet more = complement(b);
  outside.insert(outside.end(), more.begin(), more.end());
  return complement(united(std::move(outside)));
}

// The code points of a general category (Lu) or of a group of them (L); nothing if there is no such category.
inline CodePointSet in_category(std::string_view name) {
  CodePointSet out;
  char32_t at = 0;
  for (const char* run = category_runs; *run;) {
    const size_t category = size_t(*run <= 'Z' ? *run - 'A' : *run - 'a' + 26);
    char32_t length = 0;
    for (++run; *run >= '0' && *run <= '9'; ++run) length = 10 * length + char32_t(*run - '0');
    length = std::max<char32_t>(length, 1);
    if (!name.empty() && std::string_view(category_names + 2 * category, 2).starts_with(name))
      out.push_back({at, at + length - 1});
    at += length;
  }
  return united(std::move(out));
}

// What \d, \s and \w match.
inline CodePointSet of_escape(char kind) {
  if (kind == 's') return {std::begin(white_space), std::end(white_space)};
  if (kind == 'd') return in_category("Nd");
  CodePointSet out(std::begin(more_word), std::end(more_word));
  for (const char* name : {"L", "M", "Nd", "Nl", "Pc"}) {
    const CodePointSet more = in_category(name);
    out.insert(out.end(), more.begin(), more.end());
  }
  return united(std::move(out));
}

// ---- one pattern ---------------------------------------------------------------------------------------------------

// One regular expression. Accepts the syntax in which PCRE2 and Oniguruma (Hugging Face) agree. Properties and classes
// are replaced by ranges of code points, because PCRE2 has an older Unicode and no intersection. What is not accepted
// is refused by checkpoint/pattern.py as well, and tests/patterns.json holds both to the same list.
class SplitPattern {
 public:
  explicit SplitPattern(const std::string& pattern) {
    const std::string ranges = Reader(pattern).read();
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
    // A hostile pattern can backtrack for ever, so steps are limited: a few for each starting position, more from a
    // budget of the whole text, enough to backtrack over it a few times. PCRE2's JIT is three times as fast, but does
    // not count steps. One step may still scan the whole text (a possessive repetition in a look-ahead), so processor
    // time is limited too: 4 microseconds a byte, far more than published patterns take.
    uint64_t budget = std::min<uint64_t>(1'000'000 + 32 * uint64_t(text.size()), 1u << 31);
    const double most_seconds = processor_seconds() + 1 + 4e-6 * double(text.size());
    auto last_check = std::chrono::steady_clock::now();  // cheap to read; processor time is not
    const auto subject = reinterpret_cast<PCRE2_SPTR>(text.data());
    auto match_at = [&](size_t at) {
      for (uint32_t limit = 256;; limit *= 2) {
        pcre2_set_match_limit(context.get(), limit);
        const int rc =
            pcre2_match(code_.get(), subject, text.size(), at, PCRE2_NO_UTF_CHECK, found.get(), context.get());
        if (const auto now = std::chrono::steady_clock::now(); now - last_check > std::chrono::milliseconds(20)) {
          last_check = now;
          if (processor_seconds() > most_seconds)
            bad_tokenizer("split pattern gives up on this text (it takes too long)");
        }
        if (rc != PCRE2_ERROR_MATCHLIMIT || budget < limit) return rc;
        budget -= limit;
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
  // Of this thread: other programs on a busy machine do not count.
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

  // The pattern with ranges of code points in place of properties and classes.
  class Reader {
   public:
    explicit Reader(std::string_view pattern) : rest_(pattern) {
      if (pattern.empty() || pattern.size() > 4096) bad_tokenizer("split pattern is empty or longer than 4096 bytes");
      if (first_invalid_utf8(pattern) != std::string_view::npos) bad_tokenizer("split pattern is not UTF-8");
    }

    std::string read() {
      std::vector<bool> caseless{false};  // of the groups that are open
      bool repeats = false;               // the last element is a repetition, which cannot be repeated itself
      while (!rest_.empty()) {
        const char c = rest_[0];
        bool repeats_now = false;
        if (is_set_escape()) {
          write(read_set_escape(caseless.back()), false);
        } else if (c == '\\') {
          out_ += escaped(read_escape());
        } else if (c == '[') {
          rest_.remove_prefix(1);
          const bool negated = take("^");
          write(read_class(caseless.back(), 0), negated);
        } else if (c == '^' || c == '$' || c == '.') {
          refuse(std::string("the symbol ") + c);
        } else if (c == '(') {
          caseless.push_back(caseless.back() || read_group());
          if (caseless.size() > 100) refuse("more than 100 groups in each other");
        } else if (c == ')') {
          if (caseless.size() == 1) broken("a ) without its (");
          caseless.pop_back();
          copy(1);
        } else if (c == '*' || c == '+' || c == '?' || c == '{') {
          if (repeats) refuse("a repetition of a repetition");
          read_repetition();
          repeats_now = true;
        } else {
          copy(size_t(utf8_character(rest_)));
        }
        repeats = repeats_now;
      }
      return std::move(out_);
    }

   private:
    [[noreturn]] static void refuse(const std::string& what) {
      bad_tokenizer("split pattern has " + what + ", unknown here");
    }
    [[noreturn]] static void broken(const std::string& why) { bad_tokenizer("split pattern does not compile: " + why); }

    bool take(std::string_view s) {
      if (!rest_.starts_with(s)) return false;
      rest_.remove_prefix(s.size());
      return true;
    }
    void copy(size_t n) {
      out_ += rest_.substr(0, n);
      rest_.remove_prefix(n);
    }

    static std::string escaped(char32_t c) {
      char text[16];
      snprintf(text, sizeof text, "\\x{%X}", unsigned(c));
      return text;
    }
    // A class that is negated is written as such, so that within (?i: both cases are left out.
    void write(const CodePointSet& set, bool negated) {
      if (set.empty()) return void(out_ += negated ? "[\\x{0}-\\x{10FFFF}]" : "[^\\x{0}-\\x{10FFFF}]");
      out_ += negated ? "[^" : "[";
      for (auto [first, last] : set) {
        if (first >= 0xD800 && first < 0xE000) first = 0xE000;  // a surrogate is no character, and no end of a range
        if (last >= 0xD800 && last < 0xE000) last = 0xD7FF;
        if (last < first) continue;
        out_ += escaped(first);
        if (last > first) out_ += '-' + escaped(last);
      }
      out_ += "]";
    }

    // True for (?i: . Copies what opens the group.
    bool read_group() {
      if (rest_.starts_with("(*")) refuse("a verb (*");
      for (const std::string_view open : {"(?:", "(?i:", "(?=", "(?!", "(?<=", "(?<!", "(?>"})
        if (rest_.starts_with(open)) {
          copy(open.size());
          return open == "(?i:";
        }
      if (rest_.starts_with("(?")) refuse("a group other than (?: (?i: (?> and look-around");
      copy(1);
      return false;
    }

    // PCRE2 and Oniguruma disagree in what may follow {m,n}.
    void read_repetition() {
      if (rest_[0] != '{') {
        copy(1);
        if (!rest_.empty() && (rest_[0] == '?' || rest_[0] == '+')) copy(1);
        return;
      }
      size_t n = 1;
      auto digits = [&] {
        const size_t begin = n;
        while (n < rest_.size() && rest_[n] >= '0' && rest_[n] <= '9') ++n;
        return n > begin && n - begin < 4;
      };
      bool whole = digits();
      if (whole && n < rest_.size() && rest_[n] == ',') ++n, whole = rest_.substr(n).starts_with('}') || digits();
      if (!whole || !rest_.substr(n).starts_with('}')) refuse("a { that is no repetition below 1000");
      copy(n + 1);
      if (!rest_.empty() && (rest_[0] == '?' || rest_[0] == '+')) refuse("a repetition of a repetition");
    }

    bool is_set_escape() const {
      return rest_.size() > 1 && rest_[0] == '\\' && std::string_view("pPsSdDwW").find(rest_[1]) != rest_.npos;
    }

    CodePointSet read_set_escape(bool caseless) {
      const char kind = rest_[1];
      const bool negated = kind == 'P' || kind == 'S' || kind == 'D' || kind == 'W';
      rest_.remove_prefix(2);
      CodePointSet set;
      if (kind == 'p' || kind == 'P') {
        const std::string_view name = rest_.substr(0, rest_.find('}'));
        if (!name.starts_with('{') || name.size() == rest_.size() || name.size() > 3)
          refuse("a property that is no general category");
        set = in_category(name.substr(1));
        if (set.empty()) refuse("a property that is no general category");
        if (caseless && name.size() == 3 && (name == "{Lu" || name == "{Ll" || name == "{Lt"))
          refuse("a property of upper or lower case within (?i:");
        rest_.remove_prefix(name.size() + 1);
      } else {
        set = of_escape(char(kind | 0x20));
      }
      return negated ? complement(set) : set;
    }

    // A backslash and what follows, as one character.
    char32_t read_escape() {
      rest_.remove_prefix(1);
      if (take("x{")) {
        char32_t c = 0;
        size_t n = 0;
        for (; n < rest_.size() && isxdigit(static_cast<unsigned char>(rest_[n])) && n < 8; ++n)
          c = c << 4 | char32_t(rest_[n] <= '9' ? rest_[n] - '0' : (rest_[n] | 0x20) - 'a' + 10);
        if (n == 0 || n == 8 || !rest_.substr(n).starts_with('}') || c > 0x10FFFF || (c >= 0xD800 && c <= 0xDFFF))
          broken("an \\x{...} that is no character");
        rest_.remove_prefix(n + 1);
        return c;
      }
      const char kind = rest_.empty() ? '\0' : rest_[0];
      const bool ascii = static_cast<unsigned char>(kind) < 0x80;
      const std::string_view known = "rnt", meant = "\r\n\t";
      const size_t at = known.find(kind);
      if (!ascii || kind == '\0' || (isalnum(static_cast<unsigned char>(kind)) && at == known.npos))
        refuse(std::string("the escape \\") + (ascii && isalnum(kind) ? std::string(1, kind) : "?"));
      rest_.remove_prefix(1);
      return char32_t(at == known.npos ? kind : meant[at]);
    }

    char32_t read_character() {
      if (rest_[0] == '\\') return read_escape();
      const size_t size = size_t(utf8_character(rest_));
      char32_t c = static_cast<unsigned char>(rest_[0]);
      if (size > 1) c &= 0x7Fu >> size;
      for (size_t i = 1; i < size; ++i) c = c << 6 | (rest_[i] & 0x3F);
      rest_.remove_prefix(size);
      return c;
    }

    // A class after its [ or [^, up to and with its ].
    CodePointSet read_class(bool caseless, int depth) {
      CodePointSet set;
      std::vector<CodePointSet> sides;  // of &&
      bool empty = true;
      if (depth > 20) refuse("more than 20 classes in each other");
      auto add = [&](const CodePointSet& more) {
        set.insert(set.end(), more.begin(), more.end());
        empty = false;
      };
      auto end_side = [&] {
        if (empty) refuse("an empty class");
        sides.push_back(united(std::move(set)));
        set.clear(), empty = true;
      };
      while (!take("]")) {
        if (rest_.empty()) broken("a class without its end");
        if (rest_.starts_with("[:") || rest_.starts_with("--") || rest_.starts_with("~~"))
          refuse("a class within a class of the form [: or -- or ~~");
        if (caseless && (rest_[0] == '[' || rest_.starts_with("&&"))) refuse("a class within a class within (?i:");
        if (take("&&")) {
          end_side();
        } else if (take("[")) {
          const bool negated = take("^");
          const CodePointSet inner = read_class(caseless, depth + 1);
          add(negated ? complement(inner) : inner);
        } else if (is_set_escape()) {
          add(read_set_escape(caseless));
          if (rest_.starts_with('-') && !rest_.starts_with("-]")) refuse("a range that begins with a class");
        } else if (rest_[0] == '-' && !empty && !rest_.starts_with("-]")) {
          refuse("a - in the middle of a class");
        } else {
          const char32_t first = read_character();
          char32_t last = first;
          if (rest_.starts_with('-') && !rest_.starts_with("-]")) {
            rest_.remove_prefix(1);
            if (rest_.empty()) broken("a class without its end");
            if (is_set_escape() || rest_[0] == '[') refuse("a range that ends with a class");
            last = read_character();
            if (last < first) broken("a range that ends before it begins");
          }
          add({{first, last}});
        }
      }
      end_side();
      CodePointSet out = sides[0];
      for (size_t i = 1; i < sides.size(); ++i) out = intersection(out, sides[i]);
      return out;
    }

    std::string_view rest_;
    std::string out_;
  };

  std::unique_ptr<pcre2_code, Free> code_;
};

}  // namespace speed
