// fuzz.h - what the libFuzzer targets share: checks that abort, and damage done to JSON rather than to its bytes.
//
// A harness aborts on a finding; libFuzzer then keeps the input. An Error of the promised form is no finding.
#pragma once

#include <sys/time.h>

#include <csignal>
#include <random>

#include "../../model.h"

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

namespace fuzz {

using namespace speed;

inline void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "FINDING: %s\n", what);
  std::abort();
}

// Runs `act`; an Error must have the exit code that a bad file has. True if there was none.
template <class Act>
bool accepted(Act&& act) {
  try {
    act();
    return true;
  } catch (const Error& e) {
    require(e.code == 1, "a bad file is not the command line's fault");
    require(std::string_view(e.what()).find(": ") != std::string::npos, "an error says what and why");
    return false;
  }
}

// While it lives, more than so many seconds of processor time are a finding. A machine that is busy or paused stretches
// the clock, not these.
class Limit {
 public:
  explicit Limit(int seconds) {
    std::signal(SIGPROF, [](int) { require(false, "an input of this size takes less processor time"); });
    set(seconds);
  }
  ~Limit() { set(0); }

 private:
  static void set(int seconds) {
    itimerval t{};
    t.it_value.tv_sec = seconds;
    setitimer(ITIMER_PROF, &t, nullptr);
  }
};

inline std::string read_file(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  require(bool(in), "run it in the repository's top folder");
  return {std::istreambuf_iterator<char>(in), {}};
}

// The JSON header of a safetensors file and the data after it.
struct Parts {
  json header;
  std::string data;
  explicit Parts(std::string_view file) {
    uint64_t n = 0;
    if (file.size() >= 8) std::memcpy(&n, file.data(), 8);
    if (file.size() < 8 || n > file.size() - 8) return;
    header = json::parse(file.substr(8, n), nullptr, false);
    data = file.substr(8 + n);
  }
  bool valid() const { return header.is_object(); }
  std::string file() const {
    std::string text = header.dump(-1, ' ', false, json::error_handler_t::replace);
    text.resize((8 + text.size() + 63) / 64 * 64 - 8, ' ');
    const uint64_t n = text.size();
    return std::string(reinterpret_cast<const char*>(&n), 8) + text + data;
  }
};

// Changes one value anywhere in j, also within strings that are JSON themselves.
inline void mutate(json& j, std::mt19937& random) {
  std::vector<json*> all;
  auto collect = [&](auto& self, json& value) -> void {
    all.push_back(&value);
    if (value.is_structured())
      for (json& part : value) self(self, part);
  };
  collect(collect, j);
  json& value = *all[random() % all.size()];
  if (value.is_string()) {
    std::string s = value;
    if (json inner = json::parse(s, nullptr, false); inner.is_structured() && random() % 16) {
      mutate(inner, random);
      s = inner.dump(-1, ' ', false, json::error_handler_t::replace);
    } else {
      const size_t size = s.size();
      s.resize(size + 64);
      s.resize(LLVMFuzzerMutate(reinterpret_cast<uint8_t*>(s.data()), size, s.size()));
    }
    if (random() % 8) return void(value = s);
  }
  static const std::vector<json> odd = {nullptr,       true,           false, 0,         1,         -1,
                                        2.5,           1e300,          -0.0,  1ll << 31, 1ll << 32, UINT64_MAX,
                                        INT64_MIN,     1000000000000,  "",    "\n",      "{date}",  "<|eot_id|>",
                                        json::array(), json::object(), {0, 1}};
  switch (random() % 5) {
    case 0: value = odd[random() % odd.size()]; break;
    case 1: value = json(*all[random() % all.size()]); break;
    case 2:
      if (value.is_number_integer()) value = value.get<uint64_t>() + random() % 9 - 4;
      break;
    case 3:
      if (value.is_structured() && !value.empty()) value.erase(std::next(value.begin(), long(random() % value.size())));
      break;
    case 4:
      if (value.is_array()) value.push_back(value.empty() ? json(0) : json(value[random() % value.size()]));
      else if (value.is_object()) value["name"] = odd[random() % odd.size()];
      break;
  }
}

// Replaces data by text, or leaves it to libFuzzer's own mutations where that is too long.
inline size_t replace(uint8_t* data, size_t size, size_t max_size, const std::string& text) {
  if (text.empty() || text.size() > max_size) return LLVMFuzzerMutate(data, size, max_size);
  std::memcpy(data, text.data(), text.size());
  return text.size();
}

}  // namespace fuzz
