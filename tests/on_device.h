// on_device.h - arrays on the device for tests: in the emulator's memory, or on a GPU.
#pragma once

#include "device.cuh"
#include "helpers.h"

namespace test {

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
