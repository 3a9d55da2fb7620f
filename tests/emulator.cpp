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

void switch_to(Fiber& to) {
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
  static size_t stacks = 0;
  const size_t apart = stacks++ % 64 * (17 * 64);
  f.context = context::make_fcontext(static_cast<char*>(f.stack) + f.stack_bytes - apart, f.stack_bytes - apart, body);
}

// ---- a block of threads -------------------------------------------------------------------------------------------

enum class State { ready, at_warp, at_block, parked, done };

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
  const char* what;            // that it waits for, while parked
  void* argument;              // for its warp's operation
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

// ---- of Hopper ----

struct Waiting {  // a thread that is parked
  Warp* warp = nullptr;
  int lane = 0;
};

struct Mbarrier {
  int arrivals, pending;     // of a phase; still to come
  int64_t bytes = 0;         // expected and not copied yet
  int phases = 0;            // that have ended
  int copied = 0, seen = 0;  // phases that copies end; phases that somebody waited for
  bool ready = false;        // barriers_ready() came after barrier_init()
  std::vector<Waiting> waiting = {};
};

struct NamedBarrier {
  int threads = 0, come = 0;
  std::vector<Waiting> waiting;
};

struct TileCopy {
  unsigned char* to;
  TensorMap map;
  Mbarrier* barrier;
  int row, head;
  Where where;
};

// The registers that hold a result, while products on it are under way.
struct Accumulators {
  int n;  // columns; a thread holds n / 2 values
  float* d[128];
  std::vector<float> values;  // [128, n / 2]
  int products = 0;           // under way
};
struct Product {
  std::shared_ptr<Accumulators> result;
  const uint32_t* a_registers[128];
  bool registers, add;
  uint64_t a, b;
};
struct Warpgroup {
  int met = 0;
  const char* what = nullptr;
  Where where;
  void* arguments[128];
  std::vector<Waiting> waiting;
  bool in_batch = false;
  std::vector<std::vector<Product>> batches;  // not waited for; the last is open while in_batch
  int registers = 0;                          // of a thread, once it was set
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
  std::map<const Barrier*, Mbarrier> mbarriers;
  NamedBarrier named[16];
  std::vector<TileCopy> tile_copies;  // under way
  Warpgroup groups[8];
} block;

constexpr size_t red_zone = 1024;
constexpr unsigned char canary = 0xFF;  // NaN, as a bf16 and as a float
std::vector<unsigned char> shared_storage;
unsigned char* shared = nullptr;
unsigned char* shared_window = nullptr;  // what address 0 of shared memory would be; a multiple of 1024
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
                               : l.state == State::parked   ? "at " + std::string(l.what) + ", " + place(l.where)
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
  switch_to(l.fiber);
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

bool any_parked(const Warp& w) {
  return std::any_of(w.lanes, w.lanes + 32, [](const Lane& l) { return l.state == State::parked; });
}

void unpark(std::vector<Waiting>& waiting) {
  for (const Waiting& t : std::exchange(waiting, {})) {
    t.warp->ready |= 1u << t.lane;
    t.warp->lanes[t.lane].state = State::ready;
  }
}

// Ends the phase if nothing more must come. One of the threads that waited for that, if any did.
Waiting end_phase_if_over(Mbarrier& b) {
  if (b.pending > 0 || b.bytes != 0) return {};
  ++b.phases;
  b.pending = b.arrivals;
  const Waiting one = b.waiting.empty() ? Waiting{} : b.waiting[block.random() % b.waiting.size()];
  unpark(b.waiting);
  if (options.adversarial && block.random() % 4 == 0) block.held = block.warps[block.random() % block.n].get();
  return one;
}

// Completes one of the tile copies that are under way, any one.
bool land_a_tile() {
  if (block.tile_copies.empty()) return false;
  std::swap(block.tile_copies[block.random() % block.tile_copies.size()], block.tile_copies.back());
  const TileCopy c = block.tile_copies.back();
  block.tile_copies.pop_back();
  for (int half = 0; half < c.map.e / 64; ++half)
    for (int row = 0; row < 128; ++row) {
      const int64_t from = int64_t(c.row) + row;
      for (int piece = 0; piece < 8; ++piece) {  // of 16 bytes
        unsigned char* to = c.to + (half * 128 + row) * 128 + (piece ^ (row & 7)) * 16;
        if (from < 0 || from >= int64_t(c.map.rows) || size_t(c.head) >= c.map.heads) std::memset(to, 0, 16);
        else
          std::memcpy(to, c.map.base + c.head * c.map.head_pitch + from * c.map.row_pitch + half * 64 + piece * 8, 16);
      }
    }
  c.barrier->bytes -= 128 * c.map.e * int64_t(sizeof(bf16));
  end_phase_if_over(*c.barrier);
  return true;
}

// Gives the processor away; comes back when this thread can go on.
void yield() {
  Lane* me = block.lane;
  Warp* w = block.warp;
  if (!block.tile_copies.empty() && block.random() % 4 == 0) land_a_tile();
  if (!w->ready || w == block.held) {
    if (w->met && !w->ready && !any_parked(*w))
      fault("not all lanes of a warp reach one operation: " + threads_waiting());
    w = next_warp();
  }
  while (!w && land_a_tile()) w = next_warp();
  if (w) resume(*w, next_lane(*w));
  else switch_to(host);
  if (block.lane != me) fault("the emulator resumed the wrong thread");
}

void wait(State state, Where where) {
  block.lane->state = state;
  block.lane->where = where;
  block.warp->ready &= ~(1u << (threadIdx.x % 32));
  yield();
}

void park(const char* what, std::vector<Waiting>& waiting, Where where) {
  waiting.push_back({block.warp, int(threadIdx.x % 32)});
  block.lane->what = what;
  wait(State::parked, where);
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
    if (block.error) switch_to(host);
  }
}

// ---- memory -------------------------------------------------------------------------------------------------------

std::map<uintptr_t, size_t> allocations;  // address -> bytes
size_t allocated_bytes = 0;
uintptr_t last_address = 0;  // of the allocation that was looked up last
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

void warp_operation(const char* what, Where where, void* mine, void (*all)(void* const* of_lane)) {
  if (!block.lane) throw Error(1, what, "not in a kernel", "launch one");
  Warp& w = *block.warp;
  if (w.met == 0) {
    w.what = what;
    w.where = where;
  } else if (w.what != what || w.where.line() != where.line() || w.where.column() != where.column()) {
    fault("lanes of a warp part: thread " + std::to_string(threadIdx.x) + " at " + what + ", " + place(where) + "; " +
          threads_waiting());
  }
  block.lane->argument = mine;
  if (++w.met < 32) return wait(State::at_warp, where);
  void* arguments[32];
  for (int i = 0; i < 32; ++i) arguments[i] = w.lanes[i].argument;
  all(arguments);
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

// What a block may not leave behind.
static std::exception_ptr left_over() {
  std::string what;
  for (const auto& [address, b] : block.mbarriers)
    if (b.copied > b.seen) what = "a copy_tile that nobody waited for,";
  for (int id = 0; id < 16; ++id)
    if (block.named[id].come) what = "arrivals at the named barrier " + std::to_string(id);
  size_t registers = 0;
  for (size_t i = 0; i < block.n / 4; ++i) {
    if (!block.groups[i].batches.empty()) what = "products that nobody waited for";
    registers += block.groups[i].registers * 128;
  }
  if (registers > 65536)
    what = std::to_string(registers) + " registers wanted, of 65536: registers_up would never return, and so";
  if (what.empty()) return nullptr;
  return std::make_exception_ptr(Error(1, kernel_name(), what + " at the end of the block", "mend the kernel"));
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
  if (bytes > options.shared_limit())
    fault(std::to_string(bytes) + " bytes of shared memory, more than " + std::to_string(options.shared_limit()));

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
  // Aligned to 128, which is what shared_memory() promises, and never to 1024.
  shared_storage.resize(bytes + 2 * red_zone + 2048);
  shared_window = shared_storage.data() + red_zone;
  shared_window += -reinterpret_cast<uintptr_t>(shared_window) % 1024;
  shared = shared_window + 128 * (1 + launches % 7);
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
    block.mbarriers.clear();
    block.tile_copies.clear();
    for (NamedBarrier& b : block.named) b = {};
    for (Warpgroup& g : block.groups) g = {};
    Warp* first = next_warp();
    resume(*first, next_lane(*first));
    bool all_done = true;
    for (size_t w = 0; w < block.n; ++w)
      for (const Lane& l : block.warps[w]->lanes) all_done = all_done && l.state == State::done;
    if (!block.error && !all_done)
      block.error = std::make_exception_ptr(
          Error(1, kernel_name(), "no thread can go on: " + threads_waiting(), "mend the kernel"));
    if (!block.error) block.error = left_over();
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

// ---- Hopper ----

uint32_t shared_address(const void* p) { return uint32_t(static_cast<const unsigned char*>(p) - shared_window); }

// An operation of four warps together: as warp_operation(), with 128 threads.
static Warpgroup& warpgroup_operation(const char* what, Where where, void* mine, void (*all)(Warpgroup&)) {
  if (!block.lane) throw Error(1, what, "not in a kernel", "launch one");
  Warpgroup& g = block.groups[threadIdx.x / 128];
  if (block.n % 4) fault(std::string(what) + " at " + place(where) + ": the block is not made of whole warpgroups");
  if (g.met == 0) g.what = what, g.where = where;
  else if (g.what != what || g.where.line() != where.line() || g.where.column() != where.column())
    fault("threads of a warpgroup part: thread " + std::to_string(threadIdx.x) + " at " + what + ", " + place(where) +
          "; " + threads_waiting());
  g.arguments[threadIdx.x % 128] = mine;
  if (++g.met < 128) {
    park(what, g.waiting, where);
    return g;
  }
  all(g);
  g.met = 0;
  unpark(g.waiting);
  return g;
}

// A value of a tile in shared memory, at its byte address before the swizzle.
static float swizzled(uint32_t address) {
  const uint32_t at = address ^ (address >> 3 & 0x70);
  const unsigned char* p = shared_window + at;
  if (p < shared || p + 2 > shared + shared_bytes) fault("a warpgroup product reads outside shared memory");
  bf16 x;
  std::memcpy(&x, p, 2);
  return widen(x);
}

static void execute(Product& p) {
  Accumulators& r = *p.result;
  const int n = r.n;
  auto address = [](uint64_t d) { return uint32_t(d & 0x3FFF) << 4; };
  auto leading = [](uint64_t d) { return uint32_t(d >> 16 & 0x3FFF) << 4; };
  auto stride = [](uint64_t d) { return uint32_t(d >> 32 & 0x3FFF) << 4; };
  alignas(64) static float A[64][16], B[16][128], D[64][128];
  for (int row = 0; row < 64; ++row)
    for (int k = 0; k < 16; ++k) {
      if (p.registers) {  // as the operand a of mma_m16n8k16, 16 rows a warp
        const int thread = row / 16 * 32 + row % 8 * 4 + k % 8 / 2, i = row / 8 % 2 + k / 8 * 2;
        const uint32_t pair = p.a_registers[thread][i];
        A[row][k] = k % 2 ? high_bf16(pair) : low_bf16(pair);
      } else {
        A[row][k] = swizzled(address(p.a) + row / 8 * stride(p.a) + row % 8 * 128 + k * 2);
      }
    }
  for (int k = 0; k < 16; ++k)
    for (int c = 0; c < n; ++c)
      B[k][c] = p.registers ? swizzled(address(p.b) + c / 64 * leading(p.b) + k / 8 * stride(p.b) + k % 8 * 128 +
                                       c % 64 * 2)                                                 // rows of B
                            : swizzled(address(p.b) + c / 8 * stride(p.b) + c % 8 * 128 + k * 2);  // columns of B
  auto each = [&](auto visit) {
    for (int t = 0; t < 128; ++t)
      for (int i = 0; i < n / 2; ++i)
        visit(r.values[t * (n / 2) + i], D[t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8][i / 4 * 8 + t % 4 * 2 + i % 2]);
  };
  each([&](float v, float& d) { d = p.add ? v : 0; });
  for (int row = 0; row < 64; ++row)
    for (int k = 0; k < 16; ++k)
      for (int c = 0; c < n; ++c) D[row][c] += A[row][k] * B[k][c];
  each([&](float& v, float d) { v = d; });
  if (--r.products == 0)
    for (int t = 0; t < 128; ++t) std::memcpy(r.d[t], &r.values[t * (n / 2)], n / 2 * sizeof(float));
}

static void run_batches(Warpgroup& g, size_t but_latest) {
  while (g.batches.size() > but_latest) {
    for (Product& p : g.batches.front()) execute(p);
    g.batches.erase(g.batches.begin());
  }
}

void add_product(float* d, int n, const uint32_t* a_registers, uint64_t a, uint64_t b, bool add, Where where) {
  struct Mine {
    float* d;
    int n;
    const uint32_t* a_registers;
    uint64_t a, b;
    bool add;
    Where where;
  } mine{d, n, a_registers, a, b, add, where};
  warpgroup_operation("warpgroup_product", where, &mine, [](Warpgroup& g) {
    auto of = [&](int t) -> const Mine& { return *static_cast<const Mine*>(g.arguments[t]); };
    const Mine& m = of(0);
    const std::string here = "warpgroup_product at " + place(m.where) + ": ";
    if (!g.in_batch) fault(here + "not in a batch: { Products batch; ... }");
    Product p{nullptr, {}, m.a_registers != nullptr, m.add, m.a, m.b};
    for (uint64_t descriptor : {m.a, m.b}) {
      if (descriptor == m.a && p.registers) continue;
      if (descriptor >> 62 != 1) fault(here + "a descriptor without 128-byte swizzle");
    }
    for (auto& batch : g.batches)
      for (Product& other : batch)
        if (other.result->d[0] == m.d) p.result = other.result;
    const bool fresh = !p.result;
    if (fresh) {
      p.result = std::make_shared<Accumulators>();
      p.result->n = m.n;
      p.result->values.resize(64 * m.n);
    }
    for (int t = 0; t < 128; ++t) {
      if (of(t).a != m.a || of(t).b != m.b || of(t).add != m.add) fault(here + "threads name different operands");
      p.a_registers[t] = of(t).a_registers;
      if (!fresh) continue;
      p.result->d[t] = of(t).d;
      std::memcpy(&p.result->values[t * (m.n / 2)], of(t).d, m.n / 2 * sizeof(float));
      if (options.adversarial) std::memset(of(t).d, canary, m.n / 2 * sizeof(float));
    }
    ++p.result->products;
    g.batches.back().push_back(p);
  });
}

void wait_for_products(int but_latest, Where where) {
  warpgroup_operation("products_wait", where, &but_latest, [](Warpgroup& g) {
    if (g.in_batch) fault("products_wait inside a batch");
    run_batches(g, *static_cast<int*>(g.arguments[0]));
  });
}

void set_registers(int count, bool up, Where where) {
  struct Mine {
    int count;
    bool up;
    Where where;
  } mine{count, up, where};
  warpgroup_operation(up ? "registers_up" : "registers_down", where, &mine, [](Warpgroup& g) {
    const Mine& m = *static_cast<Mine*>(g.arguments[0]);
    const int now = g.registers ? g.registers : int(65536 / (block.n * 32) / 8 * 8);  // as many as launch bounds leave
    if (m.up ? m.count < now : m.count > now)
      fault("registers at " + place(m.where) + ": from " + std::to_string(now) + " to " + std::to_string(m.count) +
            " is the other way");
    g.registers = m.count;
  });
}

// ---- streams ------------------------------------------------------------------------------------------------------

Queue::Queue() { queues.push_back(this); }
Queue::~Queue() { std::erase(queues, this); }

void Queue::enqueue(Operation o) {
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

static Mbarrier& ready_barrier(const char* what, Barrier* b, Where where) {
  emulator::check(what, emulator::Memory::shared, b, sizeof *b, 8, where);
  auto it = block.mbarriers.find(b);
  if (it == block.mbarriers.end() || !it->second.ready)
    fault(std::string(what) + " at " + place(where) + ": a barrier that is not ready: barrier_init, barriers_ready");
  return it->second;
}

void barrier_init(Barrier* b, int arrivals, Where where) {
  emulator::check("barrier_init", emulator::Memory::shared, b, sizeof *b, 8, where);
  if (arrivals < 1) fault("barrier_init at " + place(where) + ": no arrivals");
  block.mbarriers[b] = {arrivals, arrivals};
}

void barriers_ready() {
  for (auto& [address, b] : block.mbarriers) b.ready = true;
}

static void arrive(Mbarrier& b, const char* what, Where where) {
  if (b.pending == 0)
    fault(std::string(what) + " at " + place(where) + ": more arrivals than the " + std::to_string(b.arrivals) +
          " of the phase");
  --b.pending;
  const Waiting next = end_phase_if_over(b);
  if (!options.adversarial || !next.warp || block.random() % 2) return;
  Lane* me = block.lane;  // what waited comes first, before this thread can do anything more
  resume(*next.warp, next.warp->lanes[next.lane]);
  if (block.lane != me) fault("the emulator resumed the wrong thread");
}

void barrier_expect(Barrier* b, int bytes, Where where) {
  Mbarrier& m = ready_barrier("barrier_expect", b, where);
  m.bytes += bytes;
  arrive(m, "barrier_expect", where);
}

void barrier_arrive(Barrier* b, Where where) {
  arrive(ready_barrier("barrier_arrive", b, where), "barrier_arrive", where);
}

void barrier_wait(Barrier* b, int parity, Where where) {
  if (parity != 0 && parity != 1) fault("barrier_wait at " + place(where) + ": parity " + std::to_string(parity));
  Mbarrier& m = ready_barrier("barrier_wait", b, where);
  while (m.phases % 2 == parity) park("barrier_wait", m.waiting, where);
  m.seen = m.phases;
}

TensorMap tensor_map(const bf16* base, size_t rows, size_t heads, size_t row_pitch, size_t head_pitch, int e,
                     Where where) {
  const char* why = reinterpret_cast<uintptr_t>(base) % 16    ? "the address is not a multiple of 16"
                    : rows == 0 || heads == 0                 ? "it is empty"
                    : rows > 0xFFFFFFFF || heads > 0xFFFFFFFF ? "it is too large"
                    : row_pitch % 8 || head_pitch % 8         ? "a pitch is not a multiple of 16 bytes"
                    : e != 64 && e != 128                     ? "rows are not of 64 or 128 values"
                                                              : nullptr;
  if (why) throw Error(1, "tensor_map (" + place(where) + ")", why, "mend the call");
  return {base, rows, heads, row_pitch, head_pitch, e};
}

void copy_tile(void* to, const TensorMap& map, Barrier* b, int row, int head, Where where) {
  const size_t bytes = 128 * map.e * sizeof(bf16);
  emulator::check("copy_tile", emulator::Memory::shared, to, bytes, 1024, where);
  Mbarrier& m = ready_barrier("copy_tile", b, where);
  const int64_t first = std::max(row, 0), last = std::min<int64_t>(int64_t(row) + 128, map.rows) - 1;
  if (first <= last && head >= 0 && size_t(head) < map.heads)
    for (int64_t r : {first, last})
      emulator::check("copy_tile", emulator::Memory::global, map.base + head * map.head_pitch + r * map.row_pitch,
                      map.e * sizeof(bf16), 16, where);
  m.copied = m.phases + 1;
  block.tile_copies.push_back({static_cast<unsigned char*>(to), map, &m, row, head, where});
  if (options.adversarial) std::memset(to, canary, bytes);
  else land_a_tile();
}

Products::Products(Where where) : where(where) {
  emulator::warpgroup_operation("Products", where, nullptr, [](Warpgroup& g) {
    if (g.in_batch) fault("a batch of products inside another");
    g.in_batch = true;
    g.batches.emplace_back();
  });
}
Products::~Products() noexcept(false) {
  if (std::uncaught_exceptions()) return;
  emulator::warpgroup_operation("end of Products", where, nullptr, [](Warpgroup& g) {
    g.in_batch = false;
    if (!options.adversarial) emulator::run_batches(g, 0), g.batches.emplace_back();
  });
}

static NamedBarrier& join_named(const char* what, int id, int threads, Where where) {
  const std::string here = std::string(what) + " at " + place(where) + ": ";
  if (id < 1 || id > 15) fault(here + "barrier " + std::to_string(id) + " of 1 to 15");
  if (threads < 32 || threads % 32 || size_t(threads) > block.n * 32)
    fault(here + std::to_string(threads) + " threads");
  NamedBarrier& b = block.named[id];
  if (b.come && b.threads != threads)
    fault(here + std::to_string(threads) + " threads, where others said " + std::to_string(b.threads));
  b.threads = threads;
  ++b.come;
  return b;
}

void named_barrier_wait(int id, int threads, Where where) {
  NamedBarrier& b = join_named("named_barrier_wait", id, threads, where);
  if (b.come < threads) return park("named_barrier_wait", b.waiting, where);
  b.come = 0;
  unpark(b.waiting);
}

void named_barrier_arrive(int id, int threads, Where where) {
  NamedBarrier& b = join_named("named_barrier_arrive", id, threads, where);
  if (b.come < threads) return;
  b.come = 0;
  unpark(b.waiting);
}

static void load_matrices(uint32_t (&r)[4], const void* row, bool transposed, const char* what, Where where) {
  emulator::check(what, emulator::Memory::shared, row, 16, 16, where);
  struct Mine {
    uint32_t (&r)[4];
    const uint16_t* row;
    bool transposed;
  } mine{r, static_cast<const uint16_t*>(row), transposed};
  emulator::warp_operation(what, where, &mine, [](void* const* of_lane) {
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
  emulator::warp_operation("mma_m16n8k16", where, &mine, [](void* const* of_lane) {
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
  d.major = options.major;
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
                std::to_string(bytes >> 20) + " MiB needed, " +
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

void* host_allocate(size_t bytes, Where where) {
  forbid_recording("host_allocate", where);
  void* p = std::malloc(std::max<size_t>(bytes, 1));
  std::memset(p, canary, bytes);
  return p;
}
void host_free(void* p) noexcept { std::free(p); }

Stream::~Stream() noexcept(false) {
  if (std::uncaught_exceptions() == 0) queue_->drain();
}

void synchronize(const Stream& s, Where where) {
  forbid_recording("synchronize", where);
  s.queue().drain();
}

void copy_to_device(void* to, const void* from, size_t bytes, const Stream& s, Where where) {
  s.queue().enqueue({nullptr, [=] {
                       need_device_memory("copy_to_device", to, bytes, where);
                       std::memcpy(to, from, bytes);
                     }});
}
void copy_to_host(void* to, const void* from, size_t bytes, const Stream& s, Where where) {
  s.queue().enqueue({[=] {
                       if (options.adversarial) std::memset(to, canary, bytes);
                     },
                     [=] {
                       need_device_memory("copy_to_host", from, bytes, where);
                       std::memcpy(to, from, bytes);
                     }});
}
void copy_on_device(void* to, const void* from, size_t bytes, const Stream& s, Where where) {
  s.queue().enqueue({nullptr, [=] {
                       need_device_memory("copy_on_device", to, bytes, where);
                       need_device_memory("copy_on_device", from, bytes, where);
                       std::memcpy(to, from, bytes);
                     }});
}
void fill_bytes(void* to, int byte, size_t bytes, const Stream& s, Where where) {
  s.queue().enqueue({nullptr, [=] {
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
  stream_.queue().enqueue({nullptr, [=] {
                             need_operands(y, sizeof *y, x, w, n, in, out, where);
                             product(y, x, w, n, in, out, beta);
                           }});
}

void Blas::gemm(bf16* y, const bf16* x, const bf16* w, size_t n, size_t in, size_t out, float beta, Where where) {
  if (n == 0) return;
  stream_.queue().enqueue({nullptr, [=] {
                             need_operands(y, sizeof *y, x, w, n, in, out, where);
                             std::vector<float> wide(n * out);
                             for (size_t i = 0; beta != 0 && i < wide.size(); ++i) wide[i] = widen(y[i]);
                             product(wide.data(), x, w, n, in, out, beta);
                             for (size_t i = 0; i < wide.size(); ++i) y[i] = round_bf16(wide[i]);
                           }});
}

void Blas::gemm_pair(bf16* y0, bf16* y1, const bf16* x, const bf16* w0, const bf16* w1, size_t n, size_t in, size_t out,
                     Where where) {
  const ptrdiff_t w_step = w1 - w0, y_step = y1 - y0;
  if (w_step < 0 || w_step % 8 || y_step < ptrdiff_t(n * out) || y_step % 8)
    throw Error(1, "gemm_pair (" + place(where) + ")",
                "the second of a pair does not lie after the first, aligned to 16", "mend the call");
  gemm(y0, x, w0, n, in, out, 0, where);
  gemm(y1, x, w1, n, in, out, 0, where);
}

}  // namespace speed
