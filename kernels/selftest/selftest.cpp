// The kernels against a plain double-precision loop, without Python or PyTorch: for processors
// that are only at hand in an emulator (see `make test-neon`). Prints the worst error.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../src/plan.h"

namespace {

uint64_t state = 1;
float uniform() {
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return float(int64_t(state >> 40) - (1 << 23)) / float(1 << 22);
}

double check(const gk::KernelSet &kernels, int64_t heads, int64_t kv_heads, int64_t tq, int64_t tk,
             int64_t d_qk, int64_t d_v, bool causal, int threads) {
  std::vector<float> q(size_t(heads * tq * d_qk)), k(size_t(kv_heads * tk * d_qk));
  std::vector<float> v(size_t(kv_heads * tk * d_v)), out(size_t(heads * tq * d_v));
  for (auto *x : {&q, &k, &v})
    for (float &value : *x) value = uniform();
  gk::Problem p{};
  p.q = q.data(), p.k = k.data(), p.v = v.data(), p.out = out.data();
  p.dtype = gk::F32, p.causal = causal, p.scale = 1.0 / std::sqrt(double(d_qk));
  p.batch = 1, p.heads = heads, p.kv_heads = kv_heads, p.tq = tq, p.tk = tk;
  p.d_qk = d_qk, p.d_v = d_v;
  p.qs[1] = tq * d_qk, p.qs[2] = d_qk, p.ks[1] = tk * d_qk, p.ks[2] = d_qk;
  p.vs[1] = tk * d_v, p.vs[2] = d_v, p.os[1] = tq * d_v, p.os[2] = d_v;
  if (!gk::run_problem(p, kernels, threads)) return 1e9;
  double difference = 0, norm = 0;
  std::vector<double> w(static_cast<size_t>(tk));
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t i = 0; i < tq; ++i) {
      const int64_t g = h / (heads / kv_heads), end = causal ? tk - tq + i + 1 : tk;
      double top = -1e300, sum = 0;
      for (int64_t j = 0; j < end; ++j) {
        double s = 0;
        for (int64_t c = 0; c < d_qk; ++c)
          s += double(q[size_t((h * tq + i) * d_qk + c)]) * double(k[size_t((g * tk + j) * d_qk + c)]);
        w[size_t(j)] = s * p.scale;
        top = w[size_t(j)] > top ? w[size_t(j)] : top;
      }
      for (int64_t j = 0; j < end; ++j) sum += w[size_t(j)] = std::exp(w[size_t(j)] - top);
      for (int64_t c = 0; c < d_v; ++c) {
        double o = 0;
        for (int64_t j = 0; j < end; ++j) o += w[size_t(j)] * double(v[size_t((g * tk + j) * d_v + c)]);
        if (end > 0) o /= sum;
        const double got = double(out[size_t((h * tq + i) * d_v + c)]);
        difference += (got - o) * (got - o), norm += o * o;
      }
    }
  return std::sqrt(difference / norm);
}

}  // namespace

int main(int count, char **names) {
  double worst = 0;
  for (int i = 1; i < count; ++i) {
    const gk::KernelSet *const kernels = gk::kernels_named(names[i]);
    if (!kernels) return std::printf("%s: not on this processor\n", names[i]), 2;
    for (int64_t tq : {1, 2, 5, 33})
      for (int64_t tk : {33, 130, 700})
        for (int64_t d : {1, 12, 16, 33, 64})
          for (int64_t group : {1, 3})
            for (bool causal : {false, true})
              worst = std::fmax(worst, check(*kernels, 2 * group, 2, tq, tk, d, d + 7 * (d > 12),
                                             causal, 1 + int(tq % 3)));
    std::printf("%s: worst relative error %.2e\n", names[i], worst);
  }
  return worst < 2e-6 ? 0 : 1;
}
