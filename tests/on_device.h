// on_device.h - arrays on the device for tests: in the emulator's memory, or on a GPU.
#pragma once

#include "../gpu/cuda.cuh"
#include "helpers.h"

namespace test {

// Does `work` under several schedules of the emulator; on a GPU, whose schedules nobody chooses, once.
template <class Work>
void under_seeds(uint64_t seeds, Work work) {
#ifdef SPEED_EMULATOR
  for (emulator::options.seed = 1; emulator::options.seed <= seeds; ++emulator::options.seed) work();
  emulator::options.seed = 1;
#else
  for (uint64_t i = 0; i < std::min<uint64_t>(seeds, 1); ++i) work();
#endif
}

// Does `work` on a Hopper GPU: in the emulator, which can be one; on another GPU not at all.
template <class Work>
void on_hopper(Work work) {
#ifdef SPEED_EMULATOR
  struct Back {
    ~Back() { emulator::options.major = 8; }
  } back;
  emulator::options.major = 9;
#endif
  if (open_device().major == 9) work();
}

// The seed of a test's random inputs; SPEED_TEST_SEED, a number, makes them fresh ones.
inline uint64_t fresh(uint64_t seed) {
  const char* more = std::getenv("SPEED_TEST_SEED");
  return seed + 1000003 * (more ? std::strtoull(more, nullptr, 10) : 0);
}

inline std::vector<bf16> narrow(const std::vector<float>& v) {
  std::vector<bf16> r(v.size());
  for (size_t i = 0; i < v.size(); ++i) {
    const uint32_t bits = std::bit_cast<uint32_t>(v[i]);
    r[i].bits = uint16_t(std::isnan(v[i]) ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
  }
  return r;
}
inline std::vector<float> wide(const std::vector<bf16>& v) {
  std::vector<float> r(v.size());
  for (size_t i = 0; i < v.size(); ++i) r[i] = to_float(v[i]);
  return r;
}

template <class T>
class OnDevice {
 public:
  // n values of anything; fresh memory holds NaN in the emulator, and here it does so everywhere.
  OnDevice(const Stream& s, size_t n) : stream_(s), n_(n), p_(static_cast<T*>(device_allocate(n * sizeof(T)))) {
    fill_bytes(p_, 0xFF, n * sizeof(T), s);
  }
  OnDevice(const Stream& s, const std::vector<T>& v) : OnDevice(s, v.size()) {
    copy_to_device(p_, v.data(), n_ * sizeof(T), s);
    synchronize(s);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  ~OnDevice() { device_free(p_); }
  T* get() const { return p_; }
  size_t size() const { return n_; }
  std::vector<T> read() const {
    std::vector<T> v(n_);
    copy_to_host(v.data(), p_, n_ * sizeof(T), stream_);
    synchronize(stream_);
    return v;
  }

 private:
  const Stream& stream_;
  size_t n_;
  T* p_;
};

}  // namespace test
