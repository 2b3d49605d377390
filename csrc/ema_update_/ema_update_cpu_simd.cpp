// How does a run of a teacher's elements move towards its student by vectors? Compiled once per instruction set.
#include "../lists_simd.h"
#include "ema_update_cpu.h"

namespace fuseer {
namespace CPU_CAPABILITY {
namespace {

template <typename T>
void update(const Place& place, int64_t begin, int64_t end, double momentum, bool stream) {
  // 1 - the rounded momentum: the two add up to 1, so that from m = 1/2 on a teacher that equals its student stays so, to the bit
  const T rounded = static_cast<T>(momentum);
  const Vec<T> kept(rounded), taken(T(1) - rounded);
  over_blocks(begin, end, [&](int64_t at, int64_t count) {
    alignas(64) T teachers[kChunk + 2 * kLanes], students[kChunk + 2 * kLanes], made[kChunk + 2 * kLanes];
    const T* teacher = values_at(place.target, at, count, teachers);
    const T* student = values_at(place.source, at, count, students);
    T* out = written_at(place.target, at, count, made);
    for (int64_t j = 0; j < count; j += Vec<T>::size()) {
      fused(kept, Vec<T>::loadu(teacher + j), taken * Vec<T>::loadu(student + j)).store(out + j);
    }
    if (out == made) {
      put_as(place.target, at, made, count, false);
    }
    if (place.other.data != nullptr) {
      put_as(place.other, at, out, count, stream);
    }
  });
  if (stream) {
    fence_streams();
  }
}

}  // namespace

extern const EmaKernelSet ema_kernels = {{update<float>}, {update<double>}};

}  // namespace CPU_CAPABILITY
}  // namespace fuseer
