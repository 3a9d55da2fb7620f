// Writes the seeds of the fuzz targets into FOLDER/model, FOLDER/tokenizer, FOLDER/chat and FOLDER/page, from the golden
// models, the bundled one and the texts of this project.
#include <filesystem>

#include "fuzz.h"

using namespace fuzz;

int main(int, char** argv) {
  const std::filesystem::path folder = argv[1];
  int count = 0;
  auto write = [&](const char* target, const std::string& bytes) {
    std::filesystem::create_directories(folder / target);
    std::ofstream(folder / target / ("seed-" + std::to_string(count++)), std::ios::binary) << bytes;
  };
  json templates = json::array();
  for (const std::string path : {"tests/golden/tied.safetensors", "tests/golden/scaled.safetensors",
                                 "tests/golden/swiftkv.safetensors", "models/small.safetensors"}) {
    if (std::filesystem::file_size(path) < 1 << 17) write("model", read_file(path));
    // The same without weights.
    Parts parts(read_file(path));
    json header = {{"__metadata__", parts.header["__metadata__"]}},
         config = json::parse(header["__metadata__"]["config"].get<std::string>());
    templates.push_back(json::parse(header["__metadata__"]["chat"].get<std::string>()));
    config = {{"name", config["name"]},
              {"vocab_size", config["vocab_size"]},
              {"bos_token_id", config["bos_token_id"]},
              {"eos_token_id", config["eos_token_id"]},
              {"tokenizer_only", true}};
    header["__metadata__"]["config"] = config.dump();
    std::string data;
    for (const char* tensor : {"tokenizer.offsets", "tokenizer.merges", "tokenizer.bytes"}) {
      json entry = parts.header[tensor];
      const uint64_t begin = entry["data_offsets"][0], end = entry["data_offsets"][1];
      entry["data_offsets"] = {data.size(), data.size() + end - begin};
      header[tensor] = entry;
      data += parts.data.substr(begin, end - begin);
    }
    parts.header = header, parts.data = data;
    write("model", parts.file());
  }

  // Real texts, in pieces.
  for (const char* path : {"README.md", "tokenizer.h", "tests/test_tokenizer.cpp"}) {
    const std::string text = read_file(path);
    for (size_t at = 0, size; at < text.size(); at += size) {
      for (size = std::min<size_t>(2000, text.size() - at);
           size < text.size() - at && (text[at + size] & 0xC0) == 0x80;)
        ++size;
      write("tokenizer", char(count % 2 ? 0 : 12) + text.substr(at, size));
    }
  }

  // Template forms that the golden models lack: a date, a default system text, marks without trimming.
  const std::string user = "<|start_header_id|>user<|end_header_id|>\n\n", end = "<|eot_id|>",
                    header = "<|start_header_id|>assistant<|end_header_id|>\n\n", date = "Today: {date}\n\n";
  const json none = {{"system", "none"}, {"after_system", "none"}, {"user", "none"}, {"assistant", "none"}};
  const json dated = {{"template", "dated"},
                      {"trim", none},
                      {"open", "<|begin_of_text|>" + date + end + user},
                      {"system", {"<|begin_of_text|>" + date, end + user}},
                      {"system_empty", "<|begin_of_text|>" + user},
                      {"generation", {end, header}},
                      {"past", {end + header, end + user}},
                      {"date_default", "26 Jul 2024"}};
  json words = dated, trims = dated;
  words["open"] = "USER: ", words["system"] = nullptr, words["system_empty"] = nullptr;
  words["generation"] = {"\n", "ANSWER:"}, words["past"] = {"\nANSWER: ", "\nUSER: "};
  trims["trim"] = {{"system", "both"}, {"after_system", "left"}, {"user", "right"}, {"assistant", "both"}};
  const std::string nul(1, 0);
  for (const json& j : {templates[0], dated, words, trims})
    for (const char* text :
         {"hello", "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", " \u00a0{date}\x1f", "\xff"})
      write("chat", j.dump() + nul + text + nul + text + nul + "{date}" + nul + text);

  for (const char* text :
       {"</script><script>", "<!-- -->]]>", "\"'\\u003c&lt;", "\u2028\u2029\u202e", "\x01\x1f\x7f", "/*data*/"})
    write("page", std::string("a") + nul + text + nul + "\xf0\x9f" + nul + "\x98\x80\xff");

  for (const char* text : {"It's 2024!\n\n  \t x", "a\u00e9\u4f60\U0001F600\u0301", "<|a|><|b|><|", "   ", "aaaaaaab",
                           "\r\n \n", "1234567", "'S 'LL \u017f"})
    for (char flags : {0, 18, 4, 8, 26, 12}) write("tokenizer", flags + std::string(text));
  // Rules of the input's own: FuzzedDataProvider takes texts from the front, "\\" and a letter after each, and numbers
  // from the end.
  std::mt19937 random(1);
  for (int how : {0, 1, 2, 4, 6, 8, 13, 49, 192, 201}) {
    std::string bytes(1, 1);
    for (int i = 0; i < how % 4 % 3; ++i) bytes += i ? R"((?:a|aa){1,18}[bc]\x)" : R"(\\s+(?!\\S)|\\p{L}{1,3}\x)";
    bytes += how / 8 % 2 ? R"(<s>\x)" : "";
    bytes += "aab aaab cabcab \u00e9\u00e9 <s> ";
    for (int i = 0; i < 48; ++i) bytes += char(random());
    write("tokenizer", bytes + char(24) + char(how));
  }
}
