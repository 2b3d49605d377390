// How do fuseer::swapped_prediction and its gradient run on the CPU? One image at a time: its codes are made in a thread's own rows,
// charged to the image's other crops, and forgotten.
#include "swapped_prediction_cpu.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <tuple>

namespace fuseer {
namespace {

template <typename T>
const SwappedKernels<T>& kernels(ScoreType type) {
  const SwappedKernelSet& set = FUSEER_CHOSEN_KERNELS(swapped_kernels);
  if constexpr (std::is_same_v<T, double>) {
    return set.of_f64;
  } else {
    return type == ScoreType::bf16 ? set.of_bf16 : type == ScoreType::f16 ? set.of_f16 : set.of_f32;
  }
}

// The crops, or their queues, by pointer: of one tensor [V, B, K], or of V tensors [B, K] wherever each lies. None is stacked.
struct Crops {
  explicit Crops(at::TensorList scores) {
    for (const at::Tensor& given : scores) {
      const at::Tensor& x = memory.emplace_back(rows_in_one_piece(given));
      b = x.size(-2), k = x.size(-1), item = x.element_size();
      for (int64_t crop = 0; crop < (x.dim() == 3 ? x.size(0) : 1); ++crop) {
        crops.push_back({static_cast<const char*>(x.const_data_ptr()) + crop * x.stride(0) * item, b, x.stride(-2) * item});
      }
    }
    v = static_cast<int64_t>(crops.size());
  }
  const void* row(int64_t crop, int64_t image) const { return crops[crop].data + image * crops[crop].stride; }
  // What is read after a crop: the image's next one, after the last the next image's first code; of no image, an address.
  const void* after(int64_t crop, int64_t image, int64_t first_code) const {
    return crop + 1 < v ? row(crop + 1, image) : row(first_code, image + 1);
  }
  int64_t v = 0, b = 0, k = 0, item = 0;
  std::vector<Segment> crops;
  std::vector<at::Tensor> memory;  // what they point into: the scores, or a copy where the numbers of a row do not lie side by side
};

// One image's codes, and what each of its crops is charged with: the sum of the codes of the assign crops other than itself.
template <typename T>
class Targets {
 public:
  Targets(const SwappedKernels<T>& kernels, at::IntArrayRef assign, int64_t k)
      : kernels_(kernels), assign_(assign), width_(padded(k)), rows_((assign.size() + 2) * width_, T(0)) {}
  T* code(int64_t a) { return &rows_[a * width_]; }
  // Called once all codes of an image are there.
  void gather() { add_all(-1, sum()); }
  // The target of a crop and how many codes are in it; no row where there is none.
  const T* of(int64_t crop, int64_t& count) {
    const auto found = std::find(assign_.begin(), assign_.end(), crop);
    const int64_t own = found == assign_.end() ? -1 : found - assign_.begin(), codes = static_cast<int64_t>(assign_.size());
    count = codes - (own >= 0);
    if (count == 0) {
      return nullptr;
    }
    if (count == 1) {
      return code(own == 0 ? 1 : 0);
    }
    if (own < 0) {
      return sum();
    }
    add_all(own, others());
    return others();
  }

 private:
  T* sum() { return &rows_[assign_.size() * width_]; }
  T* others() { return sum() + width_; }
  void add_all(int64_t except, T* out) {
    if (assign_.size() < 2) {
      return;
    }
    std::fill_n(out, width_, T(0));
    for (int64_t a = 0; a < static_cast<int64_t>(assign_.size()); ++a) {
      if (a != except) {
        kernels_.add(code(a), width_, out);
      }
    }
  }
  const SwappedKernels<T>& kernels_;
  at::IntArrayRef assign_;
  int64_t width_;
  std::vector<T> rows_;
};

int64_t images_of_a_thread(const Crops& crops) {
  return 1 + kThreadScores / (crops.v * crops.k);
}

// Potentials [A, K], float64, in nats as base-2 high rows, then low rows, as the code kernels take them.
template <typename T>
std::vector<T> in_powers_of_two(const at::Tensor& potentials) {
  const int64_t codes = potentials.size(0), k = potentials.size(1), width = padded(k);
  std::vector<T> both(2 * codes * width, T(0));
  const double* x = potentials.const_data_ptr<double>();
  for (int64_t a = 0; a < codes; ++a) {
    for (int64_t j = 0; j < width; ++j) {
      const double v = j < k ? x[a * k + j] * kPowersPerNat : kAbsent<double>;
      const T near = static_cast<T>(v);
      both[a * width + j] = near;
      both[(codes + a) * width + j] = static_cast<T>(v - near);
    }
  }
  return both;
}

// Sinkhorn's potentials of the assign crops' columns over queue and own rows; `scale` becomes W / max(1, sum over ranks of B).
template <typename T>
std::unique_ptr<Potentials<T>> potentials_of(const Crops& crops, ScoreType type, const Crops& queue, at::IntArrayRef assign,
                                                    double epsilon, int64_t iterations, const std::string& group_name, double& scale) {
  const int64_t codes = static_cast<int64_t>(assign.size()), queued = queue.b;
  std::vector<std::vector<Segment>> segments;
  for (int64_t a = 0; a < codes; ++a) {
    segments.emplace_back();
    if (queued > 0) {
      segments[a].push_back(queue.crops[a]);
    }
    segments[a].push_back(crops.crops[assign[a]]);
  }
  // Exponentials are kept where that takes no more memory than the gradient will. The block is of the gradient's size, so that the
  // gradient can have it afterwards; what is not touched of it costs nothing.
  const int64_t rows = codes * (queued + crops.b), item = sizeof(T), gradient = crops.v * crops.b * crops.k * crops.item;
  at::Tensor cache;
  if (rows * crops.k * item <= gradient) {
    cache = result({gradient / item}, c10::CppTypeToScalarType<T>::value);
  }
  auto potentials =
      std::make_unique<Potentials<T>>(segments, type, crops.k, epsilon, cache.defined() ? cache.mutable_data_ptr<T>() : nullptr);
  std::vector<double> images_and_ranks{static_cast<double>(crops.b), 1};
  potentials->iterate(iterations, group_name, images_and_ranks);
  scale = images_and_ranks[1] / std::max(1.0, images_and_ranks[0]);
  return potentials;
}

template <typename T>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward(at::TensorList scores, at::TensorList queue, at::IntArrayRef assign,
                                                                   double epsilon, int64_t iterations, double temperature,
                                                                   const std::string& group_name) {
  const Crops crops(scores), stored(queue);
  const ScoreType type = score_type(scores[0], "swapped_prediction");
  double scale;
  const auto found = potentials_of<T>(crops, type, stored, assign, epsilon, iterations, group_name, scale);
  const at::Tensor potentials = found->in_nats();
  const int64_t codes = static_cast<int64_t>(assign.size());
  at::Tensor statistics = at::empty({crops.v + codes, crops.b, 2}, c10::CppTypeToScalarType<T>::value);
  auto* row_statistics = reinterpret_cast<RowStatistics<T>*>(statistics.mutable_data_ptr<T>());
  std::vector<double> charged(crops.b);
  at::parallel_for(0, crops.b, images_of_a_thread(crops), [&](int64_t begin, int64_t end) {
    const SwappedKernels<T>& run = kernels<T>(type);
    Targets<T> targets(run, assign, crops.k);
    for (int64_t image = begin; image < end; ++image) {
      for (int64_t a = 0; a < codes; ++a) {
        row_statistics[(crops.v + a) * crops.b + image] =
            run.code(crops.row(assign[a], image), crops.k, epsilon, found->columns(a), crops.row(assign[(a + 1) % codes], image), targets.code(a));
      }
      targets.gather();
      for (int64_t crop = 0; crop < crops.v; ++crop) {
        int64_t count;
        const T* target = targets.of(crop, count);
        charged[image] += run.charge(crops.row(crop, image), crops.k, temperature, target, static_cast<double>(count),
                                     crops.after(crop, image, assign[0]), &row_statistics[crop * crops.b + image]);
      }
    }
  });
  double sum = 0;
  for (const double of_image : charged) {
    sum += of_image;
  }
  at::Tensor loss = at::empty({}, statistics.scalar_type()), factor = at::empty({}, statistics.scalar_type());
  *loss.mutable_data_ptr<T>() = static_cast<T>(scale * sum / static_cast<double>(codes * (crops.v - 1)));
  *factor.mutable_data_ptr<T>() = static_cast<T>(scale);
  return {loss, potentials, statistics, factor};
}

template <typename T>
at::Tensor backward(const at::Tensor& dloss, at::TensorList scores, const at::Tensor& potentials, const at::Tensor& statistics,
                    const at::Tensor& scale, at::IntArrayRef assign, double epsilon, double temperature) {
  const Crops crops(scores);
  const ScoreType type = score_type(scores[0], "swapped_prediction");
  const int64_t codes = static_cast<int64_t>(assign.size()), width = padded(crops.k);
  const std::vector<T> columns = in_powers_of_two<T>(potentials);
  const auto* row_statistics = reinterpret_cast<const RowStatistics<T>*>(statistics.const_data_ptr<T>());
  const double factor = dloss.item<double>() * scale.item<double>() / (static_cast<double>(codes * (crops.v - 1)) * temperature);
  at::Tensor dscores = result({crops.v, crops.b, crops.k}, scores[0].scalar_type());
  char* out = static_cast<char*>(dscores.mutable_data_ptr());
  const bool stream = static_cast<int64_t>(dscores.nbytes()) > kStreamedBytes;
  at::parallel_for(0, crops.b, images_of_a_thread(crops), [&](int64_t begin, int64_t end) {
    const SwappedKernels<T>& run = kernels<T>(type);
    Targets<T> targets(run, assign, crops.k);
    const std::vector<T> none(width, T(0));
    for (int64_t image = begin; image < end; ++image) {
      for (int64_t a = 0; a < codes; ++a) {
        const Columns<T> v{&columns[a * width], &columns[(codes + a) * width], nullptr};
        run.code(crops.row(assign[a], image), crops.k, epsilon, v, crops.row(assign[(a + 1) % codes], image), targets.code(a));
      }
      targets.gather();
      for (int64_t crop = 0; crop < crops.v; ++crop) {
        int64_t count;
        const T* target = targets.of(crop, count);
        run.gradient(crops.row(crop, image), crops.k, temperature, row_statistics[crop * crops.b + image].log_sum,
                     target == nullptr ? none.data() : target, static_cast<double>(count), factor,
                     crops.after(crop, image, assign[0]), stream,
                     out + (crop * crops.b + image) * crops.k * crops.item);
      }
    }
  });
  return dscores;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> swapped_prediction_cpu(at::TensorList scores, at::TensorList queue_scores,
                                                                                  at::IntArrayRef assign, double epsilon, int64_t iterations,
                                                                                  double temperature, const std::string& group_name) {
  const auto run = scores[0].scalar_type() == at::kDouble ? forward<double> : forward<float>;
  return run(scores, queue_scores, assign, epsilon, iterations, temperature, group_name);
}

at::Tensor swapped_prediction_backward_cpu(const at::Tensor& dloss, at::TensorList scores, const at::Tensor& potentials,
                                           const at::Tensor& statistics, const at::Tensor& scale, at::IntArrayRef assign, double epsilon,
                                           double temperature) {
  const auto run = scores[0].scalar_type() == at::kDouble ? backward<double> : backward<float>;
  return run(dloss, scores, potentials.contiguous(), statistics.contiguous(), scale, assign, epsilon, temperature);
}

}  // namespace fuseer
