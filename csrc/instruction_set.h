// Which instruction set's kernels run on this CPU, and how is one declared and chosen?
#pragma once

#include <type_traits>

namespace fuseer {

// That of at::get_cpu_capability(), which honours ATEN_CPU_CAPABILITY.
enum class InstructionSet { base, avx2, avx512 };
InstructionSet instruction_set();

// Every csrc/**/*_simd.cpp defines its set of functions once per instruction set, in the namespace of that name.
#ifdef FUSEER_X86_SIMD
#define FUSEER_DECLARE_KERNELS(Set, name) \
  namespace DEFAULT {                     \
  extern const Set name;                  \
  }                                       \
  namespace AVX2 {                        \
  extern const Set name;                  \
  }                                       \
  namespace AVX512 {                      \
  extern const Set name;                  \
  }
#define FUSEER_CHOSEN_KERNELS(name)                              \
  (instruction_set() == InstructionSet::avx512 ? AVX512::name    \
   : instruction_set() == InstructionSet::avx2 ? AVX2::name : DEFAULT::name)
#else
#define FUSEER_DECLARE_KERNELS(Set, name) \
  namespace DEFAULT {                     \
  extern const Set name;                  \
  }
#define FUSEER_CHOSEN_KERNELS(name) DEFAULT::name
#endif

// The functions of a set {of_float, of_double} for arithmetic in T.
template <typename T, typename Set>
const auto& of_type(const Set& set) {
  if constexpr (std::is_same_v<T, float>) {
    return set.of_float;
  } else {
    return set.of_double;
  }
}

}  // namespace fuseer
