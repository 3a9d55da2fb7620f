// tokenize.cpp - the mode `tokenize`: text to token ids, and back.
#include <iostream>

#include "modes.h"
#include "policies.h"
#include "report.h"
#include "request.h"

namespace speed {

// Between quotation marks; what is not printable, and bytes that are no whole character, as \n or \xE4.
static std::string quoted(const std::string& piece) {
  const bool whole = first_invalid_utf8(piece) == std::string::npos;
  std::string s = "\"";
  for (unsigned char c : piece) {
    constexpr const char* digits = "0123456789ABCDEF";
    if (c == '\n') s += "\\n";
    else if (c == '"' || c == '\\') s += std::string("\\") + char(c);
    else if (c < 32 || c == 127 || (c >= 128 && !whole)) s += std::string("\\x") + digits[c >> 4] + digits[c & 15];
    else s += char(c);
  }
  return s + "\"";
}

int run_tokenize(const Options& o, json&) {
  Model model = load(o);
  const Tokenizer& t = *model.tokenizer;
  const std::string text = read_text(o);
  if (o.decode) {
    const std::vector<int> ids = read_ids(text, "--decode");
    for (int id : ids)
      if (id >= model.config.shape.vocab)
        throw Error(2, "token " + std::to_string(id),
                    "outside a vocabulary of " + std::to_string(model.config.shape.vocab), "use ids of this model");
    for (int id : ids) std::cout << t.decode(id);
    return 0;
  }
  const std::vector<int> ids = t.encode(text, o.special);
  if (o.ids) {
    for (size_t i = 0; i < ids.size(); ++i) std::cout << (i ? " " : "") << ids[i];
    std::cout << "\n";
    return 0;
  }
  Table table({{"id", "id"}, {"piece", "piece"}});
  for (int id : ids) {
    const std::string piece(t.decode(id));  // may be part of a character
    table.row({id, {first_invalid_utf8(piece) == std::string::npos ? json(piece) : json(), quoted(piece)}});
  }
  table.print(std::cout, o.format);
  if (o.format == "text")
    std::cout << "\n" << counted(ids.size(), "token") << " of " << counted(text.size(), "byte") << "\n";
  return 0;
}

}  // namespace speed
