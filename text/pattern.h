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

// One regular expression. Accepts the syntax in which PCRE2, Oniguruma (Hugging Face) and Rust (tiktoken) agree.
// \p{L}, \p{N}, \s and their negations are replaced by the ranges of unicode.h, because PCRE2 has an older Unicode.
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

}  // namespace speed
