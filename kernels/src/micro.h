// The register-blocked pieces: packing, scores, softmax step, weighted values.
// Included after one of the simd headers, so that each instruction set has its own copy.
#pragma once
#include "exp2.h"

namespace gk {
namespace {

constexpr int NR = NV * W;  // keys of a score tile

GK_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
GK_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
GK_INLINE int64_t round_up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }
constexpr float INF = __builtin_inff();

// The keys of the block after this one, to be prefetched one by one.
struct Stream {
  const char *k;
  int64_t k_stride, k_bytes, keys;
};
GK_INLINE void prefetch_key(const Stream &st, int64_t key) {
  if (key >= st.keys) return;
  const char *k = st.k + key * st.k_stride;
  for (int64_t i = 0; i < st.k_bytes; i += 64) prefetch(k + i);
}

// Keys [count, d] to panels [panel][d][NR], zeros behind the last key.
template <class T>
static void pack_keys(const T *k, int64_t stride, int64_t count, int64_t d, float *out,
                      const Stream &ahead) {
  for (int64_t key = 0; key < count; key += NR, out += d * NR)
    for (int part = 0; part < NV; ++part) {
      const int64_t base = key + part * W;
      const int rows = int(max64(0, min64(W, count - base)));
      float *dst = out + part * W;
      for (int i = 0; i < rows; ++i) prefetch_key(ahead, base + i);
      for (int64_t c = 0; c < d; c += W) {
        const int width = int(min64(W, d - c));
        vf r[W];
        for (int i = 0; i < W; ++i) {
          if (i >= rows)
            r[i] = zero();
          else if (width == W)
            r[i] = load(k + (base + i) * stride + c);
          else
            r[i] = load_n(k + (base + i) * stride + c, width);
        }
        transpose(r);
        for (int i = 0; i < width; ++i) store(dst + (c + i) * NR, r[i]);
      }
    }
}

// Values [count, d] to float rows of `width` (a multiple of W), zeros behind the last column.
template <class T>
static void pack_values(const T *v, int64_t stride, int64_t count, int64_t d, float *out,
                        int64_t width) {
  for (int64_t i = 0; i < count; ++i, v += stride, out += width) {
    int64_t c = 0;
    for (; c + W <= d; c += W) store(out + c, load(v + c));
    if (c < d) store(out + c, load_n(v + c, int(d - c)));
  }
}

// scores[r][key] = q[r] · k[key] for R rows and `panels` panels; q packed [d][MR].
template <int R>
static void score_tile(const float *q, const float *kt, int64_t d, int64_t panels, float *s,
                       int64_t lds) {
  for (int64_t panel = 0; panel < panels; ++panel, s += NR) {
    vf acc[R][NV];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < NV; ++c) acc[r][c] = zero();
    const float *a = q;
    for (int64_t i = 0; i < d; ++i, a += MR, kt += NR) {
      vf b[NV];
#pragma GCC unroll 4
      for (int c = 0; c < NV; ++c) b[c] = load(kt + c * W);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const vf x = set1(a[r]);
#pragma GCC unroll 4
        for (int c = 0; c < NV; ++c) acc[r][c] = fma(x, b[c], acc[r][c]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < NV; ++c) store(s + r * lds + c * W, acc[r][c]);
  }
}

// The same for one to four rows without packing: each key is read from memory once and its
// products are summed across lanes. q is [R][dp] with zeros behind d.
template <int R, class T>
static void score_stream(const float *q, int64_t dp, const T *k, int64_t stride, int64_t count,
                         int64_t d, float *s, int64_t lds, const Stream &ahead) {
  const int64_t whole = d / W * W;
  const int tail = int(d - whole);
  for (int64_t key = 0; key < count; key += W) {
    vf chunks[R][W / 4];
#pragma GCC unroll 4
    for (int group = 0; group < W / 4; ++group) {
      vf acc[R][4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j)
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) acc[r][j] = zero();
      const int64_t base = key + group * 4;
      if (base < count) {
        const T *rows[4];
        for (int j = 0; j < 4; ++j) rows[j] = k + min64(base + j, count - 1) * stride;
        for (int j = 0; j < 4; ++j) prefetch_key(ahead, base + j);
        for (int64_t i = 0; i < whole; i += W) {
          vf x[R];
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) x[r] = load(q + r * dp + i);
#pragma GCC unroll 4
          for (int j = 0; j < 4; ++j) {
            const vf y = load(rows[j] + i);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) acc[r][j] = fma(x[r], y, acc[r][j]);
          }
        }
        if (tail) {
          for (int j = 0; j < 4; ++j) {
            const vf y = load_n(rows[j] + whole, tail);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) acc[r][j] = fma(load(q + r * dp + whole), y, acc[r][j]);
          }
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
        chunks[r][group] = sum4(acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) store(s + r * lds + key, sum_chunks(chunks[r]));
  }
}

// One row of the online softmax over `count` scores (base 2, scaled by c): turns them into
// weights in place, updates the running maximum and the per-lane sums, and returns the factor
// for what was accumulated before. The buffer is padded to a whole vector.
GK_INLINE float softmax_row(float *s, int64_t count, float c, float *maximum, float *sums) {
  const int64_t padded = round_up(count, W);
  for (int64_t j = count; j < padded; ++j) s[j] = -INF;
  vf m = load(s);
  for (int64_t j = W; j < padded; j += W) m = vmax(m, load(s + j));
  const float before = *maximum, block = hmax(m) * c;
  const float now = before > block ? before : block;
  // All scores minus infinity: any finite reference gives weights of zero.
  const float reference = now == -INF ? 0.0f : now;
  const vf scale = set1(c), shift = set1(-reference);
  vf sum = zero();
  for (int64_t j = 0; j < padded; j += W) {
    const vf p = exp2_vector(fma(load(s + j), scale, shift));
    store(s + j, p);
    sum = add(sum, p);
  }
  float factor = 1.0f;
  if (!(now == before)) factor = exp2_scalar(before - reference);
  store(sums, fma(load(sums), set1(factor), sum));
  *maximum = now;
  return factor;
}

// o[r] = o[r]·factor[r] + Σ_j p[r][j] v[j] for R rows and C column vectors. The block has its
// own accumulators, added at the end, so that rounding errors grow with the root of the block.
// With `ahead` the values that many floats further on are prefetched.
template <int R, int C>
static void value_tile(const float *p, int64_t ldp, const float *v, int64_t ldv, int64_t count,
                       const float *factor, float *o, int64_t ldo, int64_t ahead) {
  vf acc[R][C];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) acc[r][c] = zero();
  for (int64_t j = 0; j < count; ++j, v += ldv) {
    vf b[C];
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) b[c] = load(v + c * W);
    if (ahead) {
#pragma GCC unroll 16
      for (int c = 0; c < C; c += W < 16 ? 16 / W : 1) prefetch(v + ahead + c * W);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const vf x = set1(p[r * ldp + j]);
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) acc[r][c] = fma(x, b[c], acc[r][c]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const vf f = set1(factor[r]);
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) {
      float *dst = o + r * ldo + c * W;
      store(dst, fma(load(dst), f, acc[r][c]));
    }
  }
}

using ScoreTile = void (*)(const float *, const float *, int64_t, int64_t, float *, int64_t);
using ValueTile = void (*)(const float *, int64_t, const float *, int64_t, int64_t, const float *,
                           float *, int64_t, int64_t);

template <int R>
GK_INLINE ScoreTile pick_score(int rows) {
  if constexpr (R > 1)
    if (rows < R) return pick_score<R - 1>(rows);
  return score_tile<R>;
}

// Widest column tile for R rows that leaves registers for the operands.
constexpr int columns_for(int rows) {
  if (rows > PR / 2) return PC;
  const int c = ACC / rows;
  return c >= 8 ? 8 : c >= 4 ? 4 : c;
}

template <int R, int C>
GK_INLINE ValueTile pick_value_columns(int columns) {
  if constexpr (C > 1)
    if (columns < C) return pick_value_columns<R, C - 1>(columns);
  return value_tile<R, C>;
}
template <int R>
GK_INLINE ValueTile pick_value(int rows, int columns, int *taken) {
  if constexpr (R > 1)
    if (rows < R) return pick_value<R - 1>(rows, columns, taken);
  constexpr int widest = columns_for(R);
  *taken = columns < widest ? columns : widest;
  return pick_value_columns<R, widest>(*taken);
}

// Weighted values of up to PR rows over all columns (`width` a multiple of W).
static void value_rows(int rows, const float *p, int64_t ldp, const float *v, int64_t ldv,
                       int64_t count, const float *factor, float *o, int64_t width,
                       int64_t ahead) {
  int taken = 1;
  for (int64_t c = 0; c < width; c += taken * W) {
    const ValueTile tile = pick_value<PR>(rows, int((width - c) / W), &taken);
    tile(p, ldp, v + c, ldv, count, factor, o + c, width, ahead);
  }
}

}  // namespace
}  // namespace gk
