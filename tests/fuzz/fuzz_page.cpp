// The page of `trace --html` around text of any bytes: it stays data. Nothing ends its element, and what the page reads
// is what was written.
//
// Input: tokens, split by NUL; they are also the model's name, keys and the words.
#define SPEED_METHOD_ONLY
#include "../../speed.cu"

#include "fuzz.h"
#include "../../cli/policies.cpp"
#include "../../cli/report.cpp"
#include "../../cli/request.cpp"
#include "../../cli/trace_document.cpp"
#include "../../cli/trace_html.cpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace fuzz;
  const std::string_view all(reinterpret_cast<const char*>(data), size);
  std::vector<std::string_view> tokens(1);
  for (size_t begin = 0, i = 0; i <= size; ++i)
    if (i == size || all[i] == 0) tokens.back() = all.substr(begin, i - begin), begin = i + 1, tokens.emplace_back();
  tokens.pop_back();
  const Limit limit(5);
  const std::vector<std::string> texts = readable_tokens(tokens);
  require(texts.size() == tokens.size(), "each token has a text");
  std::string joined, apart;
  for (const std::string& text : texts) joined += text;
  for (std::string_view token : tokens) apart += token;
  require(first_invalid_utf8(joined) == std::string::npos, "texts are UTF-8");
  require(joined == readable(apart), "split characters are put together, nothing is lost");

  json document = {{"tokens", texts}, {"words", json::array()}, {"model", {{"name", joined}}}};
  for (std::string_view token : tokens) document["words"].push_back(readable(token));
  if (first_invalid_utf8(all) == std::string::npos) document[std::string(all)] = base64({data, size});
  static const std::string open = "id=\"data\">", close = "</script>", empty = trace_page(json::object());
  const std::string page = trace_page(document);
  const size_t begin = page.find(open) + open.size(), end = page.find(close, begin);
  const std::string inside = page.substr(begin, end - begin);
  require(inside.find_first_of("<>&") == std::string::npos, "no markup within the data");
  require(json::parse(inside) == document, "the data is what was written");
  require(page.substr(0, begin) == empty.substr(0, begin), "what precedes it is as ever");
  require(page.substr(end) == empty.substr(empty.find(close, begin)), "and so is what follows");
  return 0;
}
