// program.cpp - from the command line to a mode and an exit code: signals, libraries, run records, errors.
#include <sys/resource.h>

#include <array>
#include <csignal>
#include <iostream>

#include "backend.h"
#include "lines.h"
#include "modes.h"

namespace speed {

// ---- signals ------------------------------------------------------------------------------------------------------
// The first Ctrl-C stops the run at the next layer, so that it can still report; a second one kills the program. Any
// signal that kills also removes a half-written file, and gives the terminal back as it was. SIGBUS means that the model file was cut short while mapped.

static void die(int signal) {
  if (unfinished[0]) ::unlink(unfinished);
  if (restore_terminal) restore_terminal();
  if (signal == SIGBUS) {
    constexpr std::string_view line =
        "speed: model file: it was cut short or became unreadable while in use; start again with a whole file\n";
    [[maybe_unused]] const ssize_t written = ::write(2, line.data(), line.size());
    ::_exit(1);
  }
  ::signal(signal, SIG_DFL);
  ::raise(signal);
}

void watch_interrupts() {
  interrupted = false;
  struct sigaction action {};  // without SA_RESTART: a read that waits for input ends
  action.sa_handler = [](int) { interrupted = true, ::signal(SIGINT, die); };
  sigaction(SIGINT, &action, nullptr);
}

static void watch_signals() {
  for (int signal : {SIGBUS, SIGHUP, SIGPIPE, SIGTERM})
    if (struct sigaction now{}; sigaction(signal, nullptr, &now) == 0 && now.sa_handler == SIG_DFL)
      ::signal(signal, die);
  ::signal(SIGXFSZ, SIG_IGN);  // a file-size limit is then an error of write, as a full disk is
  watch_interrupts();
}

// ---- libraries, run records ---------------------------------------------------------------------------------------

static void write_record(const Options& o, int argc, char** argv, json record) {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  json line = json::array();
  for (int i = 0; i < argc; ++i) line.push_back(argv[i]);
  record["program"] = version;
  record["date"] = now();
  record["command"] = line;
  record["mode"] = o.mode;
  if (!record.contains("device")) record["device"] = device_record(Cpu(o.threads));
  record["seed"] = o.seed;
  record["peak_bytes"] = uint64_t(usage.ru_maxrss) * 1024;
  std::cout.flush();  // the record may go there too
  OutputFile out(o.record);
  out.write(indented(record) + "\n");
  out.finish();
}

// OpenBLAS and OpenMP read these settings when they are loaded, so the program sets them and starts itself again, once.
// OpenBLAS: one thread, because OpenMP makes the threads here; and kernels for this processor, which Debian's version
// may be too old to know. OpenMP: a thread that waits for the next loop spins some microseconds, then sleeps. With the
// default, milliseconds, a run is a hundred times slower as soon as another program needs the core.
static void set_up_libraries(char** argv) {
  if (std::getenv("OPENBLAS_NUM_THREADS")) return;
  setenv("OPENBLAS_NUM_THREADS", "1", 1);
  setenv("GOMP_SPINCOUNT", "1000", 0);
  const std::string core = openblas_get_corename();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      (core == "Haswell" || core == "Zen"))
    setenv("OPENBLAS_CORETYPE", "SkylakeX", 0);
  execv("/proc/self/exe", argv);
}

// ---- the program --------------------------------------------------------------------------------------------------

static int run(int argc, char** argv) {
  const std::optional<Options> o = read_options(argc, argv);
  if (!o) return 0;
  const std::array outputs = {o->record, o->out, o->dump, o->html, o->svg};
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (outputs[i].empty()) continue;
    require_writable(outputs[i]);
    const Destination to = destination_of(outputs[i]);
    auto same = [&](const std::string& other) {
      std::error_code none;
      return !other.empty() &&
             (to.path == destination_of(other).path || std::filesystem::equivalent(to.path, other, none));
    };
    if (to.in_place) continue;
    for (const std::string& input : {model_path(*o), o->file, o->tokens_file})
      if (same(input)) throw Error(2, outputs[i], "is read by this run", "write to another file");
    for (size_t j = 0; j < i; ++j)
      if (same(outputs[j])) throw Error(2, outputs[i], "is written twice", "give each output a file of its own");
  }
  json record;
  int code = 0;
  for (const Mode& mode : modes)
    if (o->mode == mode.name) code = mode.run(*o, record);
  release_notes();
  if (!o->record.empty()) write_record(*o, argc, argv, record);
  return code;
}

int program(int argc, char** argv) {
  set_up_libraries(argv);
  watch_signals();
  std::cout.exceptions(std::ios::badbit | std::ios::failbit);
  auto failed = [](const std::string& why, int code) {
    std::cout.exceptions(std::ios::goodbit);  // because std::cerr flushes it
    std::cerr << "speed: " << why << "\n";
    return code;
  };
  try {
    const int code = run(argc, argv);
    std::cout.flush();
    return code;
  } catch (const Error& e) {
    return failed(e.what(), e.code);
  } catch (const Interrupted&) {
    return 130;
  } catch (const std::ios::failure&) {
    return failed(std::string("standard output: cannot be written: ") + std::strerror(errno) + "; check where it goes",
                  1);
  } catch (const std::bad_alloc&) {
    return failed("memory: there is not enough; use a smaller -c, -n or --chunk", 1);
  }
}

}  // namespace speed
