// tokenize_lines.cpp - many texts through one tokenizer, for test_tokenizer.py: a process each would take hours.
//
// Usage: tokenize_lines MODEL.safetensors < requests > replies
//   request  one letter, the length as 4 bytes (little-endian), then that many bytes:
//            'o' a text, special tokens are ordinary characters    's' a text, special tokens are recognised
//            'c' a conversation: {"system": text or null, "date": text or null, "turns": [user, answer, ..., user],
//                "prefix": text}; the assistant header and the prefix follow the last turn
//   reply    the number of ids as 4 bytes, then the ids, 4 bytes each
#include <cstdio>
#include <iostream>

#include "../model.h"

using namespace speed;

static std::vector<int> conversation(const Model& model, const std::string& text) {
  const auto json = nlohmann::json::parse(text);
  auto given = [&](const char* key) {
    return json[key].is_null() ? std::nullopt : std::optional<std::string>(json[key].get<std::string>());
  };
  const std::vector<std::string> turns = json["turns"];
  return model.chat.value().whole(given("system"), turns, given("date"), json["prefix"].get<std::string>()).ids;
}

int main(int argc, char** argv) try {
  const Model model(argc > 1 ? argv[1] : "");
  char kind;
  uint32_t size;
  std::string text;
  while (std::cin.get(kind) && std::cin.read(reinterpret_cast<char*>(&size), 4)) {
    text.resize(size);
    std::cin.read(text.data(), size);
    const std::vector<int> ids = kind == 'c' ? conversation(model, text) : model.tokenizer->encode(text, kind == 's');
    const uint32_t n = uint32_t(ids.size());
    std::cout.write(reinterpret_cast<const char*>(&n), 4);
    std::cout.write(reinterpret_cast<const char*>(ids.data()), 4 * std::streamsize(n));
  }
} catch (const std::exception& error) {
  std::cerr << "tokenize_lines: " << error.what() << "\n";
  return 1;
}
