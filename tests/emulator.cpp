// emulator.cpp - the part of emulator.h that no template needs: fibers, scheduler, memory, tensor cores.
#include "../gpu/cuda.cuh"

#include <cblas.h>
#include <cxxabi.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <boost/context/detail/fcontext.hpp>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <random>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace speed {

namespace {

namespace context = boost::context::detail;
using emulator::options;

// ---- fibers -------------------------------------------------------------------------------------------------------

struct Fiber {
  context::fcontext_t context = nullptr;
  void* stack = nullptr;  // lowest address
  size_t stack_bytes = 0;
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack = nullptr;
#endif
};

Fiber host;              // the thread of the host itself
Fiber* running = &host;  // the fiber that has the processor

// What the fiber that has just got the processor does first: notes where the one before it stopped.
void arrived(context::transfer_t t) {
  Fiber* before = static_cast<Fiber*>(t.data);
  before->context = t.fctx;
#ifdef __SANITIZE_ADDRESS__
  const void* bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(running->fake_stack, &bottom, &bytes);
  if (before == &host) host.stack = const_cast<void*>(bottom), host.stack_bytes = bytes;
#endif
}

void go_to(Fiber& to) {
  Fiber* from = std::exchange(running, &to);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&from->fake_stack, to.stack, to.stack_bytes);
#endif
  arrived(context::jump_fcontext(to.context, from));
}

void make(Fiber& f, void (*body)(context::transfer_t)) {
  constexpr size_t bytes = size_t(256) << 10, guard = 4096;
  if (!f.stack) {
    char* p = static_cast<char*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (p == MAP_FAILED) throw Error(1, "emulator", "no memory for a thread's stack", "free some memory");
    mprotect(p, guard, PROT_NONE);
    f.stack = p + guard;
    f.stack_bytes = bytes - guard;
  }
#ifdef __SANITIZE_ADDRESS__
  f.fake_stack = nullptr;
  __asan_unpoison_memory_region(f.stack, f.stack_bytes);  // of frames that were left in the middle
#endif
  // Stacks begin at different lines of the processor's cache; they would push each other out of it.
  static size_t made = 0;
  const size_t apart = made++ % 64 * (17 * 64);
  f.context = context::make_fcontext(static_cast<char*>(f.stack) + f.stack_bytes - apart, f.stack_bytes - apart, body);
}

// ---- a block of threads -------------------------------------------------------------------------------------------

enum class State { ready, at_warp, at_block, done };

struct Copy {
  void* to;
  const void* from;
  bool valid;
};

struct Lane {
  Fiber fiber;
  uint3 index;
  State state;
  Where where;                 // the line it waits at
  void* brought;               // to its warp's operation
  std::vector<Copy> copies;    // begun and not there yet
  std::vector<size_t> groups;  // ends, in `copies`, of the groups committed
};

struct Warp {
  Lane lanes[32];
  uint32_t ready;  // a bit a lane
  int met = 0;     // lanes at the operation `what` of line `where`
  const char* what = nullptr;
  Where where;
};

struct Block {
  std::vector<std::unique_ptr<Warp>> warps;  // as many as any block had; `n` are in use
  size_t n = 0;
  Warp* warp = nullptr;  // of the thread that runs
  Lane* lane = nullptr;  // the thread that runs
  int at_barrier = 0;
  Where barrier;
  Warp* held = nullptr;  // runs only when no other can
  bool descending = false, restless = false;
  const void* kernel = nullptr;
  Where launched;
  const std::function<void()>* body = nullptr;
  std::exception_ptr error;
  std::mt19937_64 random;
} block;

constexpr size_t red_zone = 1024;
constexpr unsigned char canary = 0xFF;  // NaN, as a bf16 and as a float
std::vector<unsigned char> shared_storage;
unsigned char* shared = nullptr;
size_t shared_bytes = 0;

std::string place(Where w) {
  const std::string file = w.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(w.line());
}

std::string kernel_name() {
  Dl_info info{};
  if (!block.kernel) return "host";
  std::string name = "kernel";
  if (dladdr(block.kernel, &info) && info.dli_sname && info.dli_saddr == block.kernel) {
    int status = 0;
    std::unique_ptr<char, void (*)(void*)> text(abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status), free);
    name = status == 0 ? text.get() : info.dli_sname;
    name = name.substr(0, name.find('('));
  }
  return name + " launched at " + place(block.launched) + ", block (" + std::to_string(blockIdx.x) + ", " +
         std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z) + ")";
}

[[noreturn]] void fault(const std::string& why) { throw Error(1, kernel_name(), why, "mend the kernel"); }

std::string threads_waiting() {
  std::map<std::string, std::pair<int, int>> at;  // place -> how many, the first of them
  for (size_t w = 0; w < block.n; ++w)
    for (int i = 0; i < 32; ++i) {
      const Lane& l = block.warps[w]->lanes[i];
      const std::string what = l.state == State::done ? "returned"
                               : l.state == State::at_warp
                                   ? "at " + std::string(block.warps[w]->what) + ", " + place(l.where)
                               : l.state == State::at_block ? "at sync_threads, " + place(l.where)
                                                            : "running";
      auto [it, first] = at.try_emplace(what, 0, int(w * 32) + i);
      ++it->second.first;
    }
  std::string text;
  for (auto& [what, n] : at)
    text += (text.empty() ? "" : "; ") + std::to_string(n.first) + " threads " + what + " (the first is thread " +
            std::to_string(n.second) + ")";
  return text;
}

// ---- who runs next ------------------------------------------------------------------------------------------------

void resume(Warp& w, Lane& l) {
  block.warp = &w;
  threadIdx = l.index;
  if (block.lane == &l && running == &l.fiber) return;
  block.lane = &l;
  go_to(l.fiber);
}

Lane& next_lane(Warp& w) {
  return w.lanes[block.descending ? 31 - std::countl_zero(w.ready) : std::countr_zero(w.ready)];
}

// Another warp that can run, any one; the one that is held back only if there is no other.
Warp* next_warp() {
  const size_t start = options.adversarial ? block.random() % block.n : 0;
  for (size_t i = 0; i < block.n; ++i) {
    Warp* w = block.warps[(start + i) % block.n].get();
    if (w->ready && w != block.held) return w;
  }
  if (block.held && block.held->ready) return std::exchange(block.held, nullptr);
  return nullptr;
}

// Gives the processor away; comes back when this thread can go on.
void pass_on() {
  Lane* me = block.lane;
  Warp* w = block.warp;
  if (!w->ready || w == block.held) {
    if (w->met && !w->ready) fault("not all lanes of a warp come to one operation: " + threads_waiting());
    w = next_warp();
  }
  if (w) resume(*w, next_lane(*w));
  else go_to(host);
  if (block.lane != me) fault("the emulator resumed the wrong thread");
}

void wait(State state, Where where) {
  block.lane->state = state;
  block.lane->where = where;
  block.warp->ready &= ~(1u << (threadIdx.x % 32));
  pass_on();
}

void wake(Warp& w) {
  w.ready = 0xFFFFFFFF;
  for (Lane& l : w.lanes) l.state = State::ready;
}

void thread_body(context::transfer_t t) {
  arrived(t);
  for (;;) {
    try {
      (*block.body)();
      block.lane->copies.clear();
      block.lane->groups.clear();
      wait(State::done, Where());
    } catch (...) {
      block.error = std::current_exception();
      block.lane->state = State::done;
    }
    if (block.error) go_to(host);
  }
}

// ---- memory -------------------------------------------------------------------------------------------------------

std::map<uintptr_t, size_t> allocations;  // address -> bytes
size_t allocated_bytes = 0;
uintptr_t last_address = 0;  // of the allocation that was asked for last
size_t last_bytes = 0;
constexpr size_t allocation_zone = 256;
std::vector<emulator::Queue*> queues;
std::exception_ptr late_error;  // of work that nobody waited for; whoever waits next gets it

bool on_device(const void* p, size_t bytes) {
  const uintptr_t a = reinterpret_cast<uintptr_t>(p);
  if (a - last_address <= last_bytes && bytes <= last_bytes - (a - last_address)) return true;
  auto it = allocations.upper_bound(a);
  if (it == allocations.begin()) return false;
  --it;
  if (a - it->first > it->second || bytes > it->second - (a - it->first)) return false;
  last_address = it->first, last_bytes = it->second;
  return true;
}

bool untouched(const unsigned char* p, size_t bytes) {  // every byte equals the next, and the first is right
  return *p == canary && std::memcmp(p, p + 1, bytes - 1) == 0;
}

void check_canaries() {
  for (auto& [address, bytes] : allocations) {
    const auto* p = reinterpret_cast<const unsigned char*>(address);
    if (!untouched(p - allocation_zone, allocation_zone))
      fault("wrote before the start of " + std::to_string(bytes) + " bytes of device memory");
    if (!untouched(p + bytes, allocation_zone))
      fault("wrote past the end of " + std::to_string(bytes) + " bytes of device memory");
  }
}

void need_device_memory(const char* what, const void* p, size_t bytes, Where where) {
  if (!on_device(p, bytes))
    throw Error(1, std::string(what) + " (" + place(where) + ")", std::to_string(bytes) + " bytes not in device memory",
                "check address and size");
}

void forbid_recording(const char* what, Where where) {
  for (const emulator::Queue* q : queues)
    if (q->recording)
      throw Error(1, std::string(what) + " (" + place(where) + ")", "not allowed while a graph is recorded",
                  "do it before or after");
}

}  // namespace

namespace emulator {

void meet(const char* what, Where where, void* mine, void (*all)(void* const* of_lane)) {
  if (!block.lane) throw Error(1, what, "not in a kernel", "launch one");
  Warp& w = *block.warp;
  if (w.met == 0) {
    w.what = what;
    w.where = where;
  } else if (w.what != what || w.where.line() != where.line() || w.where.column() != where.column()) {
    fault("lanes of a warp part: thread " + std::to_string(threadIdx.x) + " at " + what + ", " + place(where) + "; " +
          threads_waiting());
  }
  block.lane->brought = mine;
  if (++w.met < 32) return wait(State::at_warp, where);
  void* brought[32];
  for (int i = 0; i < 32; ++i) brought[i] = w.lanes[i].brought;
  all(brought);
  w.met = 0;
  wake(w);
  if (block.restless && block.random() % 8 == 0) {
    Warp* other = next_warp();
    if (other && other != &w) {
      Lane* me = block.lane;
      resume(*other, next_lane(*other));
      if (block.lane != me) fault("the emulator resumed the wrong thread");
    }
  }
}

void check(const char* what, Memory memory, const void* p, size_t bytes, size_t alignment, Where where) {
  const uintptr_t offset = static_cast<const unsigned char*>(p) - shared;
  const bool in_shared = shared && offset <= shared_bytes && bytes <= shared_bytes - offset;
  if (reinterpret_cast<uintptr_t>(p) % alignment)
    fault(std::string(what) + " at " + place(where) + ": address not aligned to " + std::to_string(alignment));
  if (memory != Memory::global && in_shared) return;
  if (memory == Memory::shared)
    fault(std::string(what) + " at " + place(where) + ": not within the " + std::to_string(shared_bytes) +
          " bytes of shared memory");
  if (!on_device(p, bytes)) fault(std::string(what) + " at " + place(where) + ": not within device memory");
}

void* shared_memory() { return shared; }

static void land(const Copy& c) {
  if (c.valid) std::memcpy(c.to, c.from, 16);
  else std::memset(c.to, 0, 16);
}

void copy_later(void* to, const void* from, bool valid) {
  if (!options.adversarial) return land({to, from, valid});
  std::memset(to, canary, 16);
  block.lane->copies.push_back({to, from, valid});
}

void end_group() { block.lane->groups.push_back(block.lane->copies.size()); }

void wait_for_groups(int but_latest) {
  Lane& l = *block.lane;
  if (l.groups.size() <= size_t(but_latest)) return;
  const size_t groups = l.groups.size() - but_latest, copies = l.groups[groups - 1];
  for (size_t i = 0; i < copies; ++i) land(l.copies[i]);
  l.copies.erase(l.copies.begin(), l.copies.begin() + copies);
  l.groups.erase(l.groups.begin(), l.groups.begin() + groups);
  for (size_t& end : l.groups) end -= copies;
}

void run_grid(const void* kernel, dim3 grid, dim3 size, size_t bytes, Where where, const std::function<void()>& body) {
  static uint64_t launches = 0;
  block.kernel = kernel;
  block.launched = where;
  blockIdx = {};
  const size_t threads = size_t(size.x) * size.y * size.z, blocks = size_t(grid.x) * grid.y * grid.z;
  if (blocks == 0) return;
  if (grid.x > 0x7FFFFFFF || grid.y > 65535 || grid.z > 65535) fault("the grid is larger than any GPU allows");
  if (size.y != 1 || size.z != 1 || threads % 32 || threads == 0 || threads > 1024)
    fault("a block of " + std::to_string(threads) + " threads: x alone counts, whole warps, at most 1024");
  if (bytes > options.shared_limit)
    fault(std::to_string(bytes) + " bytes of shared memory, more than " + std::to_string(options.shared_limit));

  block.random.seed(options.seed * 0x9E3779B97F4A7C15 + ++launches);
  block.n = threads / 32;
  block.body = &body;
  block.error = nullptr;
  blockDim = size;
  gridDim = grid;
  while (block.warps.size() < block.n) {
    block.warps.push_back(std::make_unique<Warp>());
    for (Lane& l : block.warps.back()->lanes) make(l.fiber, thread_body);
  }
  shared_storage.resize(bytes + 2 * red_zone + 128);
  shared = shared_storage.data() + red_zone;
  shared += -reinterpret_cast<uintptr_t>(shared) % 128;
  shared_bytes = bytes;
  std::memset(shared_storage.data(), canary, shared_storage.size());

  std::vector<uint32_t> order(blocks);
  for (size_t i = 0; i < blocks; ++i) order[i] = uint32_t(i);
  if (options.adversarial) std::shuffle(order.begin(), order.end(), block.random);
  for (uint32_t i : order) {
    blockIdx = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
    if (options.adversarial) {
      std::memset(shared, canary, bytes);
      const uint64_t r = block.random();
      block.descending = r & 1;
      block.restless = r & 2;
      block.held = r & 4 ? block.warps[(r >> 8) % block.n].get() : nullptr;
    }
    for (size_t w = 0; w < block.n; ++w) {
      Warp& warp = *block.warps[w];
      wake(warp);
      warp.met = 0;
      for (int l = 0; l < 32; ++l) warp.lanes[l].index = {unsigned(w * 32 + l), 0, 0};
    }
    block.at_barrier = 0;
    Warp* first = next_warp();
    resume(*first, next_lane(*first));
    bool all_done = true;
    for (size_t w = 0; w < block.n; ++w)
      for (const Lane& l : block.warps[w]->lanes) all_done = all_done && l.state == State::done;
    if (!block.error && !all_done)
      block.error = std::make_exception_ptr(
          Error(1, kernel_name(), "no thread can go on: " + threads_waiting(), "mend the kernel"));
    block.lane = nullptr;
    if (block.error) {  // threads that were stopped in the middle begin anew
      for (auto& w : block.warps)
        for (Lane& l : w->lanes) {
          make(l.fiber, thread_body);
          l.copies.clear();
          l.groups.clear();
        }
      shared = nullptr;
      std::rethrow_exception(std::exchange(block.error, nullptr));
    }
    if (!untouched(shared_storage.data(), shared - shared_storage.data()) || !untouched(shared + bytes, red_zone))
      fault("wrote outside the " + std::to_string(bytes) + " bytes of shared memory");
  }
  shared = nullptr;
  check_canaries();
  block.kernel = nullptr;
}

// ---- streams ------------------------------------------------------------------------------------------------------

Queue::Queue() { queues.push_back(this); }
Queue::~Queue() { std::erase(queues, this); }

void Queue::give(Operation o) {
  if (recording) return recording->push_back(std::move(o));
  if (o.issue) o.issue();
  work.push_back(std::move(o));
  if (!options.adversarial) drain();
}

void Queue::drain() {
  const std::vector<Operation> now = std::exchange(work, {});
  if (late_error) std::rethrow_exception(std::exchange(late_error, nullptr));
  for (const Operation& o : now) o.run();
}

}  // namespace emulator

// ---- wrappers -----------------------------------------------------------------------------------------------------

void sync_threads(Where where) {
  if (block.at_barrier == 0) block.barrier = where;
  else if (block.barrier.line() != where.line() || block.barrier.column() != where.column())
    fault("thread " + std::to_string(threadIdx.x) + " at the sync_threads of " + place(where) + "; " +
          threads_waiting());
  if (size_t(++block.at_barrier) < block.n * 32) return wait(State::at_block, where);
  block.at_barrier = 0;
  for (size_t w = 0; w < block.n; ++w) wake(*block.warps[w]);
  if (!options.adversarial) return;
  const uint64_t r = block.random();
  block.held = r & 1 ? block.warps[(r >> 8) % block.n].get() : nullptr;
  Warp* w = next_warp();
  resume(*w, next_lane(*w));
}

static void load_matrices(uint32_t (&r)[4], const void* row, bool transposed, const char* what, Where where) {
  emulator::check(what, emulator::Memory::shared, row, 16, 16, where);
  struct Mine {
    uint32_t (&r)[4];
    const uint16_t* row;
    bool transposed;
  } mine{r, static_cast<const uint16_t*>(row), transposed};
  emulator::meet(what, where, &mine, [](void* const* of_lane) {
    auto lane = [&](int i) -> Mine& { return *static_cast<Mine*>(of_lane[i]); };
    for (int i = 0; i < 4; ++i)
      for (int l = 0; l < 32; ++l) {
        const int g = l / 4, t = l % 4;
        const bool across = lane(0).transposed;
        const uint16_t low = across ? lane(8 * i + 2 * t).row[g] : lane(8 * i + g).row[2 * t];
        const uint16_t high = across ? lane(8 * i + 2 * t + 1).row[g] : lane(8 * i + g).row[2 * t + 1];
        lane(l).r[i] = uint32_t(high) << 16 | low;
      }
  });
}
void load_matrix_x4(uint32_t (&r)[4], const void* shared_row, Where where) {
  load_matrices(r, shared_row, false, "load_matrix_x4", where);
}
void load_matrix_x4_transposed(uint32_t (&r)[4], const void* shared_row, Where where) {
  load_matrices(r, shared_row, true, "load_matrix_x4_transposed", where);
}

void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where where) {
  struct Mine {
    float (&d)[4];
    const uint32_t (&a)[4];
    const uint32_t (&b)[2];
  } mine{d, a, b};
  emulator::meet("mma_m16n8k16", where, &mine, [](void* const* of_lane) {
    alignas(64) float A[16][16], B[16][8], D[16][8];  // rows and columns as the PTX ISA numbers them
    for (int l = 0; l < 32; ++l) {
      const Mine& m = *static_cast<Mine*>(of_lane[l]);
      const int g = l / 4, t = l % 4;
      for (int i = 0; i < 4; ++i) {
        A[g + i % 2 * 8][2 * t + i / 2 * 8] = low_bf16(m.a[i]);
        A[g + i % 2 * 8][2 * t + i / 2 * 8 + 1] = high_bf16(m.a[i]);
        D[g + i / 2 * 8][2 * t + i % 2] = m.d[i];
      }
      for (int i = 0; i < 2; ++i) {
        B[2 * t + i * 8][g] = low_bf16(m.b[i]);
        B[2 * t + i * 8 + 1][g] = high_bf16(m.b[i]);
      }
    }
    for (int r = 0; r < 16; ++r)
      for (int k = 0; k < 16; ++k)
        for (int c = 0; c < 8; ++c) D[r][c] += A[r][k] * B[k][c];
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 4; ++i) static_cast<Mine*>(of_lane[l])->d[i] = D[l / 4 + i / 2 * 8][2 * (l % 4) + i % 2];
  });
}

// ---- the host's side ----------------------------------------------------------------------------------------------

Device open_device(Where) {
  Device d;
  d.name = "emulator";
  d.major = 8;
  d.multiprocessors = options.multiprocessors;
  d.total_bytes = options.memory;
  d.free_bytes = options.memory - allocated_bytes;
  d.l2_bytes = size_t(4) << 20;
  return d;
}

void* device_allocate(size_t bytes, Where where) {
  forbid_recording("device_allocate", where);
  if (bytes > options.memory - allocated_bytes)
    throw Error(1, "GPU memory",
                std::to_string(bytes >> 20) + " MiB asked for, " +
                    std::to_string((options.memory - allocated_bytes) >> 20) + " MiB free",
                "use a smaller -c, -n or --chunk, or a GPU that is free");
  const size_t whole = (bytes + 2 * allocation_zone + 255) / 256 * 256;
  auto* p = static_cast<unsigned char*>(std::aligned_alloc(256, whole));
  std::memset(p, canary, whole);
  allocations[reinterpret_cast<uintptr_t>(p + allocation_zone)] = bytes;
  allocated_bytes += bytes;
  return p + allocation_zone;
}

void device_free(void* p) noexcept {
  if (!p) return;
  try {
    forbid_recording("device_free", Where::current());
    for (emulator::Queue* q : queues) q->drain();
  } catch (...) {
    late_error = std::current_exception();
  }
  const auto it = allocations.find(reinterpret_cast<uintptr_t>(p));
  if (it == allocations.end()) std::abort();
  allocated_bytes -= it->second;
  allocations.erase(it);
  last_bytes = 0, last_address = 0;
  std::free(static_cast<unsigned char*>(p) - allocation_zone);
}

Stream::~Stream() noexcept(false) {
  if (std::uncaught_exceptions() == 0) queue_->drain();
}

void synchronize(const Stream& s, Where where) {
  forbid_recording("synchronize", where);
  s.queue().drain();
}

void copy_to_device(void* to, const void* from, size_t bytes, const Stream& s, Where where) {
  s.queue().give({nullptr, [=] {
                    need_device_memory("copy_to_device", to, bytes, where);
                    std::memcpy(to, from, bytes);
                  }});
}
void copy_to_host(void* to, const void* from, size_t bytes, const Stream& s, Where where) {
  s.queue().give({[=] {
                    if (options.adversarial) std::memset(to, canary, bytes);
                  },
                  [=] {
                    need_device_memory("copy_to_host", from, bytes, where);
                    std::memcpy(to, from, bytes);
                  }});
}
void copy_on_device(void* to, const void* from, size_t bytes, const Stream& s, Where where) {
  s.queue().give({nullptr, [=] {
                    need_device_memory("copy_on_device", to, bytes, where);
                    need_device_memory("copy_on_device", from, bytes, where);
                    std::memcpy(to, from, bytes);
                  }});
}
void fill_bytes(void* to, int byte, size_t bytes, const Stream& s, Where where) {
  s.queue().give({nullptr, [=] {
                    need_device_memory("fill_bytes", to, bytes, where);
                    std::memset(to, byte, bytes);
                  }});
}

static void product(float* y, const bf16* x, const bf16* w, size_t n, size_t in, size_t out, float beta) {
  std::vector<float> wide_x(n * in), wide_w(out * in);
  for (size_t i = 0; i < wide_x.size(); ++i) wide_x[i] = widen(x[i]);
  for (size_t i = 0; i < wide_w.size(); ++i) wide_w[i] = widen(w[i]);
  openblas_set_num_threads(1);
  cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, int(n), int(out), int(in), 1, wide_x.data(), int(in),
              wide_w.data(), int(in), beta, y, int(out));
}

static void need_operands(const void* y, size_t size, const bf16* x, const bf16* w, size_t n, size_t in, size_t out,
                          Where where) {
  need_device_memory("gemm, y", y, n * out * size, where);
  need_device_memory("gemm, x", x, n * in * sizeof(bf16), where);
  need_device_memory("gemm, w", w, out * in * sizeof(bf16), where);
}

void Blas::gemm(float* y, const bf16* x, const bf16* w, size_t n, size_t in, size_t out, float beta, Where where) {
  if (n == 0) return;
  stream_.queue().give({nullptr, [=] {
                          need_operands(y, sizeof *y, x, w, n, in, out, where);
                          product(y, x, w, n, in, out, beta);
                        }});
}

void Blas::gemm(bf16* y, const bf16* x, const bf16* w, size_t n, size_t in, size_t out, float beta, Where where) {
  if (n == 0) return;
  stream_.queue().give({nullptr, [=] {
                          need_operands(y, sizeof *y, x, w, n, in, out, where);
                          std::vector<float> wide(n * out);
                          for (size_t i = 0; beta != 0 && i < wide.size(); ++i) wide[i] = widen(y[i]);
                          product(wide.data(), x, w, n, in, out, beta);
                          for (size_t i = 0; i < wide.size(); ++i) y[i] = round_bf16(wide[i]);
                        }});
}

}  // namespace speed
