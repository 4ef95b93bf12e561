// The kernels for one instruction set; compiled with its own flags (see CMakeLists.txt).
#include "problem.h"

#ifdef GK_HAVE_AVX512
#include "simd_avx512.h"

#include "attend.h"

namespace gk {
const KernelSet *kernels_avx512() {
  static const KernelSet set{"avx512", MR, scratch_floats, attend, combine, read_all};
  return &set;
}
}  // namespace gk
#else
namespace gk {
const KernelSet *kernels_avx512() { return nullptr; }
}  // namespace gk
#endif
