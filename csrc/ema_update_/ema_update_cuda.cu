// What does ema_update_ run on a GPU?
#include "../launch.cuh"
#include "../tensor_lists.cuh"

namespace fuseer {
namespace {

template <typename Real>
__device__ inline void update(const Row& row, const Place& place, double momentum) {
  // Both add up to 1 in Real, so that a teacher equal to its student stays so to the bit.
  const Real kept = static_cast<Real>(momentum), taken = Real(1) - kept;
  Real teacher[share], student[share];
  load(teacher, row, 0, place);
  load(student, row, 1, place);
#pragma unroll
  for (int e = 0; e < share; ++e) {
    teacher[e] = fma(kept, teacher[e], taken * student[e]);
  }
  store(row, 0, teacher, place);
  if (row.data[2] != nullptr) {
    store(row, 2, teacher, place);
  }
}

// Rows are (teacher, student, shadow or null).
__global__ void __launch_bounds__(threads, 4) ema_update(Lists lists, double momentum, const void* scalar, bool scalar_is_double) {
  if (scalar != nullptr) {
    momentum = scalar_is_double ? *static_cast<const double*>(scalar) : *static_cast<const float*>(scalar);
  }
  const Row row = lists.row();
  for_each_block(row, [&](const Place& place) {
    if (row.kind_of(0) == f64) {
      update<double>(row, place, momentum);
    } else {
      update<float>(row, place, momentum);
    }
  });
}

}  // namespace
}  // namespace fuseer

// scalar: the momentum on the device, or null for `momentum`. Returns a cudaError_t.
extern "C" int fuseer_ema_update(const void* rows, const int32_t* owners, int64_t programs, double momentum, const void* scalar,
                                 int64_t scalar_is_double, void* stream) {
  using namespace fuseer;
  return launch(ema_update, programs, stream, Lists{static_cast<const Row*>(rows), owners}, momentum, scalar, scalar_is_double != 0);
}
