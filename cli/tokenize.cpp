// tokenize.cpp - the mode `tokenize`: text to token ids, and back.
#include <iostream>

#include "modes.h"
#include "policies.h"
#include "request.h"

namespace speed {

int run_tokenize(const Options& o, json&) {
  Model model = load(o);
  const Tokenizer& t = *model.tokenizer;
  const std::string text = read_text(o);
  if (o.decode) {
    for (int id : read_ids(text, "--decode")) {
      if (id >= model.config.shape.vocab)
        throw Error(2, "token " + std::to_string(id),
                    "outside a vocabulary of " + std::to_string(model.config.shape.vocab), "use ids of this model");
      std::cout << t.decode(id);
    }
    return 0;
  }
  const char* space = "";
  for (int id : t.encode(text, o.special)) {
    std::cout << space << id;
    space = " ";
  }
  std::cout << "\n";
  return 0;
}

}  // namespace speed
