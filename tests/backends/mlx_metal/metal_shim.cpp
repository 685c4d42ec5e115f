// The run of a launch: fibers, rendezvous, and who touched what. See metal_shim.h.
#include "metal_shim.h"

#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <utility>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>

namespace emulator {

uint groups[3], group[3], threads_in_group;
Buffer buffers[32];

namespace {

enum State { READY, AT_BARRIER, AT_SIMD, DONE };
constexpr uint NOBODY = ~0u, MANY = ~0u - 1;
constexpr size_t STACK = 1 << 16;

struct Site {
  int line, count;
};

struct Thread {
  ucontext_t context;
  State state;
  int flags;
  Site barriers, simds;
  uint64_t given;
};

std::vector<Thread> threads;
std::vector<uint64_t> snapshot;  // what each thread gave to its simdgroup's last operation
std::vector<std::vector<Shadow>> shadows;
ucontext_t scheduler;
void (*body)(uint);
uint current, group_index, seed, epoch, device_epoch, group_epoch;
bool failed;
char* message;

void say(const char* format, ...) {
  if (!failed) {
    va_list args;
    va_start(args, format);
    vsnprintf(message, 256, format, args);
    va_end(args);
  }
  failed = true;
}

void leave() { swapcontext(&threads[current].context, &scheduler); }

void wait(State state, Site& site, int line) {
  site = {line, site.count + 1};
  threads[current].state = state;
  leave();
}

uint mixed(uint x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

// x, wrong by at most `ulp` units of its last place.
float inexact(float x, float of, int ulp) {
  if (!std::isfinite(x) || x == 0.0f) {
    return x;
  }
  uint bits;
  std::memcpy(&bits, &of, 4);
  int steps = static_cast<int>(mixed(bits + seed) % (2 * ulp + 1)) - ulp;
  for (; steps > 0; steps--) {
    x = std::nextafter(x, INFINITY);
  }
  for (; steps < 0; steps++) {
    x = std::nextafter(x, -INFINITY);
  }
  return x;
}

Shadow* shadow(size_t count) {
  shadows.emplace_back(count, Shadow{NOBODY, 0, 0, NOBODY, 0});
  return shadows.back().data();
}

void start() {
  body(current);
  threads[current].state = DONE;
  leave();
}

// Whether the threads from `first` on all wait in `state` at the same place.
bool together(uint first, uint count, State state, Site Thread::* site) {
  const Site at = threads[first].*site;
  for (uint i = first; i < first + count; i++) {
    const Site each = threads[i].*site;
    if (threads[i].state != state || each.line != at.line || each.count != at.count) {
      return false;
    }
  }
  return true;
}

void release(uint first, uint count) {
  for (uint i = first; i < first + count; i++) {
    snapshot[i] = threads[i].given;
    threads[i].state = READY;
  }
}

void run_group(uint count, char* stacks, const std::vector<uint>& order) {
  group_epoch = ++epoch;
  for (uint i = 0; i < count; i++) {
    Thread& thread = threads[i];
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = stacks + i * STACK;
    thread.context.uc_stack.ss_size = STACK;
    thread.context.uc_link = nullptr;
    thread.state = READY;
    thread.barriers = thread.simds = {0, 0};
    makecontext(&thread.context, start, 0);
  }
  while (true) {
    for (uint i : order) {
      if (threads[i].state == READY) {
        current = i;
        swapcontext(&scheduler, &threads[i].context);
        if (failed) {
          return;
        }
      }
    }
    bool moved = false;
    for (uint first = 0; first < count; first += SIMD_WIDTH) {
      if (together(first, SIMD_WIDTH, AT_SIMD, &Thread::simds)) {
        release(first, SIMD_WIDTH);
        moved = true;
      }
    }
    if (moved) {
      continue;
    }
    if (together(0, count, DONE, &Thread::barriers)) {
      return;
    }
    if (!together(0, count, AT_BARRIER, &Thread::barriers)) {
      return say("threads wait at a barrier or for their simdgroup, and others do not get there");
    }
    epoch += threads[0].flags / 2 % 2;
    device_epoch += threads[0].flags % 2;
    release(0, count);
  }
}

}  // namespace

void Buffer::touch(const void* place, bool writes) {
  const char* at = static_cast<const char*>(place);
  const long index = (at - low) / static_cast<long>(size);
  if (at < low || at + size > high) {
    say("%s[%ld] is outside its %ld elements", name, index, static_cast<long>((high - low) / size));
    return leave();
  }
  if (shadows == nullptr) {
    return;
  }
  Shadow& last = shadows[index];
  const uint now = shared ? epoch : device_epoch;
  const bool elsewhere = !shared && last.write_group != group_index;
  if (!writes && shared && (last.writer == NOBODY || last.write_epoch < group_epoch)) {
    say("%s[%ld] is read before it is written", name, index);
    return leave();
  }
  if (last.writer != NOBODY && (elsewhere || (last.writer != current && last.write_epoch == now))) {
    say("race: %s[%ld] is %s by a thread and written by another", name, index, writes ? "written" : "read");
    return leave();
  }
  if (!writes) {
    last.reader = last.read_epoch == now && last.reader != current && last.reader != NOBODY ? MANY : current;
    last.read_epoch = now;
    return;
  }
  if (last.reader != NOBODY && last.reader != current && last.read_epoch == now) {
    say("race: %s[%ld] is written by a thread and read by another", name, index);
    return leave();
  }
  last.writer = current;
  last.write_epoch = now;
  last.write_group = group_index;
}

void declare(Buffer& buffer, const char* name, void* values, size_t bytes, size_t size) {
  char* low = static_cast<char*>(values);
  std::memset(low, 0xff, bytes);
  static std::vector<std::vector<Shadow>> kept;  // as long as the kernel is loaded
  kept.emplace_back(bytes / size, Shadow{NOBODY, 0, 0, NOBODY, 0});
  buffer = {name, low, low + bytes, size, true, false, kept.back().data()};
}

void barrier(int flags, int line) {
  threads[current].flags = flags;
  wait(AT_BARRIER, threads[current].barriers, line);
}

const uint64_t* exchange(uint64_t given, int line) {
  threads[current].given = given;
  wait(AT_SIMD, threads[current].simds, line);
  return &snapshot[current / SIMD_WIDTH * SIMD_WIDTH];
}

float exp(float x) { return inexact(std::exp(x), x, 4); }
float log(float x) { return inexact(std::log(x), x, 4); }
float tanh(float x) { return inexact(std::tanh(x), x, 5); }
float rsqrt(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }

int launch(void (*of)(uint), const Argument* arguments, size_t count, void** data, const int64_t* bytes,
           const uint* given, uint in_group, uint drawn, uint shuffle, char* where) {
  body = of;
  seed = drawn;
  message = where;
  threads_in_group = in_group;
  failed = false;
  shadows.clear();
  for (size_t i = 0; i < count; i++) {
    char* low = static_cast<char*>(data[i]);
    const Argument& each = arguments[i];
    Shadow* of_output = each.output ? shadow(bytes[i] / each.size) : nullptr;
    buffers[i] = {each.name, low, low + bytes[i], each.size, false, each.output, of_output};
  }
  threads.assign(in_group, Thread{});
  snapshot.assign(in_group, 0);
  device_epoch = group_index = 0;
  void* stacks =
      mmap(nullptr, in_group * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  std::vector<uint> order(in_group);
  for (uint i = 0; i < in_group; i++) {
    order[i] = i;
  }
  for (uint i = in_group; i > 1; i--) {
    std::swap(order[i - 1], order[mixed(shuffle * 1000003 + i) % i]);
  }
  for (int i = 0; i < 3; i++) {
    groups[i] = given[i];
  }
  for (group[2] = 0; group[2] < groups[2] && !failed; group[2]++) {
    for (group[1] = 0; group[1] < groups[1] && !failed; group[1]++) {
      for (group[0] = 0; group[0] < groups[0] && !failed; group[0]++) {
        group_index++;
        run_group(in_group, static_cast<char*>(stacks), order);
      }
    }
  }
  munmap(stacks, in_group * STACK);
  for (size_t i = 0; i < count; i++) {
    for (size_t index = 0; arguments[i].output && index < bytes[i] / arguments[i].size && !failed; index++) {
      if (buffers[i].shadows[index].writer == NOBODY) {
        say("%s[%zu] is never written", arguments[i].name, index);
      }
    }
  }
  return failed;
}

}  // namespace emulator
