// How does fuseer::ema_update_ run on the CPU? One pass over the elements of all tensors, each thread an equal share.
#include "ema_update_cpu.h"

#include "../library.h"
#include "../lists.h"

namespace fuseer {

void ema_update_cpu(at::TensorList teacher, at::TensorList student, double momentum, const std::optional<at::Tensor>& momentum_scalar,
                    at::TensorList shadow) {
  const Places places("ema_update_", teacher, student, shadow);
  const double m = momentum_scalar.has_value() ? momentum_scalar->item<double>() : momentum;
  const EmaKernelSet& kernels = FUSEER_CHOSEN_KERNELS(ema_kernels);
  int64_t shadowed = 0;
  for (const Place& place : places.all) {
    shadowed += place.other.data == nullptr ? 0 : place.numel * bytes_of(place.other.type);
  }
  over_places(places.all.data(), places.all.size(), [&](int64_t k, int64_t begin, int64_t end) {
    const Place& place = places.all[k];
    const EmaKernels& chosen = place.target.type == ScoreType::f64 ? kernels.of_double : kernels.of_float;
    chosen.update(place, begin, end, m, shadowed > kStreamedBytes);
  });
  places.write_back();
}

}  // namespace fuseer
