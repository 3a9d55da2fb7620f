// backend.h - the device that --device names, and the model on it.
#pragma once

#include <sys/resource.h>

#include <fstream>
#include <memory>

#include "options.h"
#include "report.h"
#include "request.h"

namespace speed {

inline std::string processor() {
  std::ifstream in("/proc/cpuinfo");
  for (std::string line; std::getline(in, line);)
    if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 2);
  return "unknown";
}

inline std::string device_name(const Cpu&) { return std::to_string(omp_get_max_threads()) + " threads"; }
inline std::string hardware(const Cpu&) {
  return std::to_string(omp_get_max_threads()) + " threads of " + processor() + ", OpenBLAS " + openblas_get_corename();
}
inline uint64_t peak_bytes(const Cpu&) {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return uint64_t(usage.ru_maxrss) * 1024;
}
inline json device_record(const Cpu&) {
  return {{"kind", "cpu"},
          {"name", processor()},
          {"threads", omp_get_max_threads()},
          {"openblas", openblas_get_config()},
          {"openblas_core", openblas_get_corename()},
          {"compiler", __VERSION__}};
}

#ifdef __CUDACC__
inline std::string device_name(const Gpu& gpu) { return gpu.device().name; }
inline std::string hardware(const Gpu& gpu) { return gpu.device().name; }
inline uint64_t peak_bytes(const Gpu&) { return Gpu::peak_bytes(); }
inline json device_record(const Gpu& gpu) {
  const Device& d = gpu.device();
  auto version = [](int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); };
  return {{"kind", "cuda"},
          {"name", d.name},
          {"compute_capability", std::to_string(d.major) + "." + std::to_string(d.minor)},
          {"multiprocessors", d.multiprocessors},
          {"memory_bytes", d.total_bytes},
          {"l2_bytes", d.l2_bytes},
          {"driver_cuda", version(d.driver)},
          {"toolkit_cuda", version(d.runtime)},
          {"peak_bytes", Gpu::peak_bytes()},
          {"compiler", __VERSION__}};
}
#endif

inline json model_record(const Model& model) {
  return {{"name", model.config.shape.name},
          {"file", model.path()},
          {"sha256", model.sha256.empty() ? json() : json(model.sha256)}};
}

// Loads the model and calls work(model, backend) with the device that the flags name: under auto a GPU, if
// there is one that supports this shape, else the CPU. The run record says which.
template <class Work>
int on_device(const Options& o, json& record, Work work) {
  Model model = load(o);
  model.need_weights();
  auto run = [&](auto& backend) {
    const int code = work(model, backend);
    record["device"] = device_record(backend);
    if (model.has_file()) record["model"] = model_record(model);
    return code;
  };
#ifdef __CUDACC__
  if (o.device != "cpu") {
    std::unique_ptr<Gpu> gpu;
    try {
      Gpu::check(model.config.shape);
      gpu = std::make_unique<Gpu>();
    } catch (const Error&) {
      if (o.device == "cuda") throw;
    }
    if (gpu) {
      Progress progress("weights");
      gpu->on_load = [&](double share) { share < 1 ? progress.update(share) : progress.clear(); };
      return run(*gpu);
    }
  }
#endif
  Cpu cpu(o.threads);
  return run(cpu);
}

}  // namespace speed
