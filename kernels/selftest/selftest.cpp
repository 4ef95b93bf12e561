// The kernels against a plain double-precision loop, without Python or PyTorch: for processors
// that are only at hand in an emulator (see `make test-neon`). Prints the worst errors.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../src/half.h"
#include "../src/plan.h"

namespace {

uint64_t state = 1;
float uniform() {
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return float(int64_t(state >> 40) - (1 << 23)) / float(1 << 22);
}

struct Case {
  int64_t heads, kv_heads, tq, tk, d_qk, d_v, start, length;
  bool causal;
  int threads;
};

// Relative error of one case; T is how numbers are stored. What lies outside of the bounds is NaN.
template <class T>
double check(const gk::KernelSet &kernels, int32_t dtype, const Case &c) {
  std::vector<T> q(size_t(c.heads * c.tq * c.d_qk)), k(size_t(c.kv_heads * c.tk * c.d_qk));
  std::vector<T> v(size_t(c.kv_heads * c.tk * c.d_v)), out(size_t(c.heads * c.tq * c.d_v));
  for (auto *x : {&q, &k, &v})
    for (T &value : *x) gk::from_float(uniform(), &value);
  for (int64_t g = 0; g < c.kv_heads; ++g)
    for (int64_t j = 0; j < c.tk; ++j)
      if (j < c.start || j >= c.length) {
        for (int64_t i = 0; i < c.d_qk; ++i) gk::from_float(NAN, &k[size_t((g * c.tk + j) * c.d_qk + i)]);
        for (int64_t i = 0; i < c.d_v; ++i) gk::from_float(NAN, &v[size_t((g * c.tk + j) * c.d_v + i)]);
      }
  gk::Problem p{};
  p.q = q.data(), p.k = k.data(), p.v = v.data(), p.out = out.data();
  p.dtype = dtype, p.causal = c.causal, p.scale = 1.0 / std::sqrt(double(c.d_qk));
  p.batch = 1, p.heads = c.heads, p.kv_heads = c.kv_heads, p.tq = c.tq, p.tk = c.tk;
  p.d_qk = c.d_qk, p.d_v = c.d_v, p.starts = &c.start, p.lengths = &c.length;
  p.qs[1] = c.tq * c.d_qk, p.qs[2] = c.d_qk, p.ks[1] = c.tk * c.d_qk, p.ks[2] = c.d_qk;
  p.vs[1] = c.tk * c.d_v, p.vs[2] = c.d_v, p.os[1] = c.tq * c.d_v, p.os[2] = c.d_v;
  if (!gk::run_problem(p, kernels, c.threads)) return 1e9;

  const auto at = [](const std::vector<T> &x, int64_t i) { return double(gk::to_float(x[size_t(i)])); };
  double difference = 0, norm = 0;
  std::vector<double> w(static_cast<size_t>(c.tk));
  for (int64_t h = 0; h < c.heads; ++h)
    for (int64_t i = 0; i < c.tq; ++i) {
      const int64_t g = h / (c.heads / c.kv_heads);
      const int64_t end = c.causal ? c.length - c.tq + i + 1 : c.length;
      double top = -1e300, sum = 0;
      for (int64_t j = c.start; j < end; ++j) {
        double s = 0;
        for (int64_t d = 0; d < c.d_qk; ++d)
          s += at(q, (h * c.tq + i) * c.d_qk + d) * at(k, (g * c.tk + j) * c.d_qk + d);
        w[size_t(j)] = s * p.scale;
        top = w[size_t(j)] > top ? w[size_t(j)] : top;
      }
      for (int64_t j = c.start; j < end; ++j) sum += w[size_t(j)] = std::exp(w[size_t(j)] - top);
      for (int64_t d = 0; d < c.d_v; ++d) {
        double o = 0;
        for (int64_t j = c.start; j < end; ++j) o += w[size_t(j)] * at(v, (g * c.tk + j) * c.d_v + d);
        if (end > c.start) o /= sum;
        const double got = at(out, (h * c.tq + i) * c.d_v + d);
        difference += (got - o) * (got - o), norm += o * o;
      }
    }
  const double error = norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference);
  return error == error ? error : 1e9;
}

struct Format {
  const char *name;
  double (*check)(const gk::KernelSet &, int32_t, const Case &);
  int32_t dtype;
  double tolerance;
};

}  // namespace

int main(int count, char **names) {
  const Format formats[] = {{"float32", check<float>, gk::F32, 2e-6},
                            {"bfloat16", check<gk::bf16>, gk::BF16, 4e-3},
                            {"float16", check<gk::f16>, gk::F16, 1e-3}};
  bool good = true;
  for (int i = 1; i < count; ++i) {
    const gk::KernelSet *const kernels = gk::kernels_named(names[i]);
    if (!kernels) return std::printf("%s: not on this processor\n", names[i]), 2;
    for (const Format &f : formats) {
      double worst = 0;
      for (int64_t tq : {1, 2, 5, 33})
        for (int64_t tk : {33, 130, 700})
          for (int64_t d : {1, 12, 16, 33, 64})
            for (int64_t group : {1, 3})
              for (bool causal : {false, true}) {
                const bool bounded = (tq + tk + d + group) % 3 == 0;
                const Case c{2 * group,         2,
                             tq,                tk,
                             d,                 d + 7 * (d > 12),
                             bounded ? 9 : 0,   bounded ? tk - 5 : tk,
                             causal,            1 + int(tq % 3)};
                worst = std::fmax(worst, f.check(*kernels, f.dtype, c));
              }
      std::printf("%s, %s: worst relative error %.2e\n", names[i], f.name, worst);
      good = good && worst <= f.tolerance;
    }
  }
  return good ? 0 : 1;
}
