// The kernels for one instruction set; compiled with its own flags (see CMakeLists.txt).
#include "problem.h"

#ifdef GK_HAVE_NEON
#include "simd_neon.h"

#include "attend.h"

namespace gk {
const KernelSet *kernels_neon() {
  static const KernelSet set{"neon", MR, scratch_floats, attend, combine, read_all};
  return &set;
}
}  // namespace gk
#else
namespace gk {
const KernelSet *kernels_neon() { return nullptr; }
}  // namespace gk
#endif
