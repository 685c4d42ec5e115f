// What of Metal's language and library the kernels use, in C++, so that a kernel's own source runs on the CPU.
//
// A threadgroup's threads are fibers. One runs until it meets a barrier or an operation of its simdgroup, where it waits
// for the others: for all threads of the threadgroup, or for the 32 of its simdgroup. An order of threads is drawn for
// each launch. A launch fails where a kernel
//     reads or writes outside a buffer or a threadgroup array;
//     reads threadgroup memory that nobody wrote, or that another thread writes with no barrier between;
//     writes what another thread reads or writes with no barrier between; for device memory, in another threadgroup;
//     lets some threads of a group pass a barrier, or of a simdgroup an operation, that others do not reach;
//     leaves an element of an output unwritten.
// half and bfloat have no arithmetic here and no implicit conversion: kernels widen to float, and round once.
// exp, log and tanh are off by as much as Metal's may be, by a hash of the argument and the launch; rsqrt is correctly
// rounded (Metal Shading Language Specification, "ULP values of relative error", fast math off: at most 4, 4 and 5).
//
// Little is included and little is inline: the compiler reads this for every kernel. What it calls is in metal_shim.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

using uint = uint32_t;
using ushort = uint16_t;
using uchar = uint8_t;

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")

struct uint3 {
  uint x, y, z;
};

struct half {
  _Float16 value;
  half() = default;
  explicit half(float x) : value(static_cast<_Float16>(x)) {}
  explicit operator float() const { return static_cast<float>(value); }
};
using float16_t = half;

struct bfloat {
  uint16_t bits;
  bfloat() = default;
  explicit bfloat(float x) {
    uint32_t wide;
    __builtin_memcpy(&wide, &x, 4);
    bits = x != x ? 0x7fc0 : (wide + 0x7fff + (wide >> 16 & 1)) >> 16;  // to nearest, ties to even
  }
  explicit operator float() const {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float x;
    __builtin_memcpy(&x, &wide, 4);
    return x;
  }
};
using bfloat16_t = bfloat;

namespace emulator {

constexpr uint SIMD_WIDTH = 32;

// Who last wrote and read an element, and behind which barrier.
struct Shadow {
  uint writer, write_epoch, write_group, reader, read_epoch;
};

struct Buffer {
  const char* name;
  char *low, *high;
  size_t size;
  bool shared, output;
  Shadow* shadows;  // one an element, of what may be written

  // Checks that the thread may read, or write, an element. Does not return where it may not.
  void touch(const void* at, bool writes);
};

// A fresh array of a threadgroup.
void declare(Buffer& buffer, const char* name, void* values, size_t bytes, size_t size);

// Waits for the whole threadgroup.
void barrier(int flags, int line);

// Waits for the simdgroup; what each of its threads gave.
const uint64_t* exchange(uint64_t given, int line);

float exp(float x);
float log(float x);
float tanh(float x);
float rsqrt(float x);

template <class T>
struct Reference {
  T* at;
  Buffer* buffer;
  operator T() const {
    buffer->touch(at, false);
    return *at;
  }
  void operator=(T value) const {
    buffer->touch(at, true);
    *at = value;
  }
  void operator=(const Reference& other) const { *this = static_cast<T>(other); }
  void operator+=(T value) const { *this = static_cast<T>(*this) + value; }
};

struct device {};
struct constant {};
struct threadgroup {};

// A pointer of an address space: of another it is another type, as in Metal.
template <class Space, class T>
struct Pointer {
  using Value = std::remove_const_t<T>;
  Value* at;
  Buffer* buffer;

  Pointer(Value* at, Buffer* buffer) : at(at), buffer(buffer) {}
  template <class U, class = std::enable_if_t<std::is_same_v<const U, T>>>
  Pointer(const Pointer<Space, U>& other) : at(other.at), buffer(other.buffer) {}

  auto operator[](ptrdiff_t index) const {
    if constexpr (std::is_const_v<T>) {
      buffer->touch(at + index, false);
      return at[index];
    } else {
      return Reference<T>{at + index, buffer};
    }
  }
  auto operator*() const { return (*this)[0]; }
  Pointer operator+(ptrdiff_t by) const { return {at + by, buffer}; }
  Pointer& operator+=(ptrdiff_t by) { at += by; return *this; }
};

template <class T, size_t N>
struct Shared {
  T values[N];
  Buffer buffer;
  explicit Shared(const char* name) { declare(buffer, name, values, sizeof(values), sizeof(T)); }
};

template <class T>
T value_of(T value) { return value; }
template <class T>
T value_of(Reference<T> value) { return value; }

template <class T>
struct Lanes {
  static_assert(std::is_arithmetic_v<T>);
  T all[SIMD_WIDTH];
  Lanes(T value, int line) {
    uint64_t given = 0;
    __builtin_memcpy(&given, &value, sizeof(T));
    const uint64_t* found = exchange(given, line);
    for (uint i = 0; i < SIMD_WIDTH; i++) {
      __builtin_memcpy(&all[i], &found[i], sizeof(T));
    }
  }
};

}  // namespace emulator

namespace metal {

namespace precise {
using emulator::exp;
using emulator::log;
using emulator::rsqrt;
using emulator::tanh;
}  // namespace precise

// fmax: a NaN is left out.
template <class T>
T max(T a, T b) { return a != a ? b : b != b || a > b ? a : b; }

// As a tree: lane i and lane i + 16, then i + 8, ...
template <class T>
auto simd_sum(T given, int line = __builtin_LINE()) {
  const auto value = emulator::value_of(given);
  emulator::Lanes<std::remove_const_t<decltype(value)>> lanes(value, line);
  for (uint half = emulator::SIMD_WIDTH / 2; half; half /= 2) {
    for (uint i = 0; i < half; i++) {
      lanes.all[i] += lanes.all[i + half];
    }
  }
  return lanes.all[0];
}
template <class T>
auto simd_max(T given, int line = __builtin_LINE()) {
  const auto value = emulator::value_of(given);
  emulator::Lanes<std::remove_const_t<decltype(value)>> lanes(value, line);
  for (uint i = 1; i < emulator::SIMD_WIDTH; i++) {
    lanes.all[0] = metal::max(lanes.all[0], lanes.all[i]);
  }
  return lanes.all[0];
}

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
inline void threadgroup_barrier(mem_flags flags, int line = __builtin_LINE()) {
  emulator::barrier(static_cast<int>(flags), line);
}

}  // namespace metal

using namespace metal;

namespace emulator {

// What the text of a kernel is compiled to, and is told of a launch.
extern uint groups[3], group[3], threads_in_group;
extern Buffer buffers[32];
struct Argument {
  const char* name;
  size_t size;
  bool output;
};
int launch(void (*body)(uint), const Argument* arguments, size_t count, void** data, const int64_t* bytes,
           const uint* given, uint threads, uint drawn, uint shuffle, char* message);

}  // namespace emulator

#define THREADGROUP_ARRAY(T, name, N)                \
  static emulator::Shared<T, N> name##_memory(#name); \
  const emulator::Pointer<emulator::threadgroup, T> name(name##_memory.values, &name##_memory.buffer)
