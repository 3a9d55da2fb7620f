// safetensors.h - reads the header of a .safetensors file and checks every offset and size in it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <map>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "files.h"
#include "json.h"

namespace speed {

// What a .safetensors file begins with: the header's length in 8 bytes, and the header, with blanks up to where tensors
// are aligned to 64 bytes.
inline std::string safetensors_begin(const json& header) {
  std::string text = header.dump();
  text.resize((8 + text.size() + 63) / 64 * 64 - 8, ' ');
  std::string length(8, '\0');
  for (size_t i = 0; i < 8; ++i) length[i] = char(text.size() >> 8 * i & 255);
  return length + text;
}

// A safetensors container: 8 bytes header length, a JSON header, then the tensors one after the other.
class SafeTensors {
 public:
  struct Tensor {
    std::string dtype;
    std::vector<uint64_t> shape;
    const uint8_t* data;
    uint64_t bytes;
  };

  explicit SafeTensors(const MappedFile& f) : path_(f.path()) {
    if (f.size() < 8) fail("file of " + std::to_string(f.size()) + " bytes is too short for a model");
    uint64_t header = 0;
    for (int i = 7; i >= 0; --i) header = header << 8 | f.data()[i];
    if (header > f.size() - 8 || header > 100'000'000)
      fail("header of " + std::to_string(header) + " bytes in a file of " + std::to_string(f.size()));
    header_ = parse_json({reinterpret_cast<const char*>(f.data()) + 8, header}, path_, hint_);
    if (!header_.is_object()) fail("header is not a JSON object");
    data_ = {f.data() + 8 + header, f.size() - 8 - header};
    const uint64_t total = data_.size();
    std::vector<std::pair<uint64_t, uint64_t>> ranges;
    for (auto& [key, t] : header_.items()) {
      if (key == "__metadata__") {
        if (!t.is_object()) fail("__metadata__ is not an object");
        for (auto& [k, v] : t.items()) {
          if (!v.is_string()) fail("metadata " + k + " is not a string");
          metadata_[k] = v.get<std::string>();
        }
        continue;
      }
      tensors_[key] = read_entry(key, t, data_.data(), total, ranges);
    }
    std::sort(ranges.begin(), ranges.end());
    uint64_t end = 0;
    for (auto [b, e] : ranges) {
      if (b != end)
        fail("tensor data at offset " + std::to_string(b) + ", expected " + std::to_string(end) + " (gap or overlap)");
      end = e;
    }
    if (end != total) fail("tensors end at " + std::to_string(end) + ", the file's data at " + std::to_string(total));
  }

  const json& header() const { return header_; }
  std::span<const uint8_t> data() const { return data_; }  // of all tensors
  const std::map<std::string, Tensor>& tensors() const { return tensors_; }

  const std::string& metadata(const std::string& key) const {
    auto it = metadata_.find(key);
    if (it == metadata_.end()) fail("metadata \"" + key + "\" is missing");
    return it->second;
  }

  bool has_metadata(const std::string& key) const { return metadata_.count(key) > 0; }
  bool has(const std::string& name) const { return tensors_.count(name) > 0; }

  // The tensor's data, after its dtype, shape and alignment were compared with what is expected.
  template <class T>
  const T* get(const std::string& name, const std::string& dtype, const std::vector<uint64_t>& shape) const {
    auto it = tensors_.find(name);
    if (it == tensors_.end()) fail("tensor " + name + " is missing");
    const Tensor& t = it->second;
    if (t.dtype != dtype || t.shape != shape)
      fail("tensor " + name + ": expected " + describe(dtype, shape) + ", got " + describe(t.dtype, t.shape));
    if (reinterpret_cast<uintptr_t>(t.data) % alignof(T)) fail("tensor " + name + " is not aligned");
    return reinterpret_cast<const T*>(t.data);
  }

  [[noreturn]] void fail(const std::string& why) const { throw Error(1, path_, why, hint_); }

 private:
  static std::string describe(const std::string& dtype, const std::vector<uint64_t>& shape) {
    std::string s = dtype + " [";
    for (size_t i = 0; i < shape.size(); ++i) s += (i ? ", " : "") + std::to_string(shape[i]);
    return s + "]";
  }

  Tensor read_entry(const std::string& key, const json& t, const uint8_t* base, uint64_t total,
                    std::vector<std::pair<uint64_t, uint64_t>>& ranges) const {
    auto whole = [](const json& v) { return v.is_number_unsigned(); };
    if (!t.is_object() || !t.contains("dtype") || !t["dtype"].is_string() || !t.contains("shape") ||
        !t["shape"].is_array() || !t.contains("data_offsets") || !t["data_offsets"].is_array() ||
        t["data_offsets"].size() != 2 || !whole(t["data_offsets"][0]) || !whole(t["data_offsets"][1]))
      fail("tensor " + key + " has no dtype, shape or data_offsets");
    static const std::map<std::string, uint64_t> width = {{"BF16", 2}, {"F32", 4}, {"U32", 4}, {"U8", 1}};
    Tensor out;
    out.dtype = t["dtype"];
    auto w = width.find(out.dtype);
    if (w == width.end()) fail("tensor " + key + " has dtype " + out.dtype + ", expected BF16, F32, U32 or U8");
    uint64_t bytes = w->second;
    for (auto& dim : t["shape"]) {
      if (!whole(dim)) fail("tensor " + key + " has a size that is no whole number");
      out.shape.push_back(dim);
      if (out.shape.back() != 0 && bytes > std::numeric_limits<uint64_t>::max() / out.shape.back())
        fail("tensor " + key + " is larger than any memory");
      bytes *= out.shape.back();
    }
    uint64_t b = t["data_offsets"][0], e = t["data_offsets"][1];
    if (b > e || e > total || e - b != bytes)
      fail("tensor " + key + ": " + describe(out.dtype, out.shape) + " needs " + std::to_string(bytes) +
           " bytes, got offsets " + std::to_string(b) + " to " + std::to_string(e) + " of " + std::to_string(total));
    ranges.emplace_back(b, e);
    out.data = base + b;
    out.bytes = bytes;
    return out;
  }

  std::string path_;
  const std::string hint_ = "export the checkpoint again with export_weights.py";
  std::map<std::string, Tensor> tensors_;
  json header_;
  std::span<const uint8_t> data_;
  std::map<std::string, std::string> metadata_;
};

}  // namespace speed
