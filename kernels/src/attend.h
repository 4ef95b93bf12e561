// One task from packed queries to output, for the instruction set whose simd header was
// included before. Nothing of size tq × tk exists: keys are taken in blocks.
#pragma once
#include "micro.h"
#include "problem.h"

namespace gk {
namespace {

constexpr int64_t STREAM_ROWS = 8;  // up to here rows are few enough not to pack the keys

// Keys of a block. Many rows: wide, to pay the softmax's fixed costs rarely. Few rows: this
// block of keys and values and the next, which is on its way, stay in the second-level cache.
static int64_t block_keys(const Problem &p, int64_t rows) {
  if (rows > 2 * MR) return 128;
  const int64_t keys = 12288 / (p.d_qk + p.d_v) / NR * NR;
  return max64(NR, min64(128, keys));
}

struct Layout {
  int64_t rows, tiles, block, dp, width;
  bool stream;
  int64_t q, o, maximum, sums, s, kt, v, total;

  Layout(const Problem &p, int64_t n) : rows(n) {
    tiles = (n + MR - 1) / MR;
    stream = n <= STREAM_ROWS;
    block = block_keys(p, n);
    dp = round_up(p.d_qk, W);
    width = round_up(p.d_v, W);
    int64_t at = 0;
    const auto take = [&at](int64_t floats) {
      const int64_t here = at;
      at += round_up(floats, 16);
      return here;
    };
    q = take(stream ? n * dp : tiles * MR * p.d_qk);
    o = take(n * width);
    maximum = take(n);
    sums = take(n * W);
    s = take(MR * block);
    kt = take(stream ? 0 : block * p.d_qk);
    v = take(block * width);
    total = at;
  }
};

static int64_t scratch_floats(const Problem &p, int64_t rows) { return Layout(p, rows).total; }

// What a row may see: keys below this, given the end of the valid keys.
GK_INLINE int64_t row_end(const Problem &p, int64_t end, int64_t position) {
  return p.causal ? min64(end, end - p.tq + position + 1) : end;
}

template <class T>
static void pack_queries(const Problem &p, const Task &t, const Layout &l, float factor, float *out) {
  const int64_t group = p.group(), d = p.d_qk;
  if (l.stream)
    for (int64_t i = 0; i < l.rows * l.dp; ++i) out[i] = 0.0f;
  else if (l.rows % MR)
    for (int64_t i = (l.tiles - 1) * MR * d; i < l.tiles * MR * d; ++i) out[i] = 0.0f;
  for (int64_t r = 0; r < l.rows; ++r) {
    const int64_t row = t.row0 + r, head = t.kv_head * group + row % group;
    const T *src = static_cast<const T *>(p.q) + t.batch * p.qs[0] + head * p.qs[1] +
                   row / group * p.qs[2];
    float *dst = l.stream ? out + r * l.dp : out + r / MR * MR * d + r % MR;
    const int64_t step = l.stream ? 1 : MR;
    for (int64_t i = 0; i < d; ++i) dst[i * step] = to_float(src[i]) * factor;
  }
}

template <class T>
static void write_row(const Problem &p, const Task &t, int64_t row, const float *o, float factor) {
  const int64_t group = p.group(), head = t.kv_head * group + row % group;
  T *dst = static_cast<T *>(p.out) + t.batch * p.os[0] + head * p.os[1] + row / group * p.os[2];
  for (int64_t i = 0; i < p.d_v; ++i) from_float(o[i] * factor, dst + i);
}

// 1 / sum; a row that may see no key gives zeros, one whose scores are all minus infinity NaN.
GK_INLINE float row_factor(const Problem &p, const Task &t, int64_t row, float sum) {
  if (sum == 0.0f) {
    const int64_t end = row_end(p, p.key_end(t.batch), row / p.group());
    return end > p.key_begin(t.batch) ? __builtin_nanf("") : 0.0f;
  }
  return 1.0f / sum;
}

template <class T>
static void attend_typed(const Problem &p, const Task &t, float *scratch) {
  const Layout l(p, t.row1 - t.row0);
  const int64_t group = p.group(), end = p.key_end(t.batch), d = p.d_qk;
  float *const q = scratch + l.q, *const o = scratch + l.o, *const maximum = scratch + l.maximum;
  float *const sums = scratch + l.sums, *const s = scratch + l.s, *const kt = scratch + l.kt;
  float *const packed_v = scratch + l.v;

  // Scores are q·k times scale; base-2 exponentials of q·k times c are the same thing. A scale
  // that is zero or negative goes into the queries, so that c > 0 and maxima stay maxima.
  float c = float((p.scale < 0 ? -p.scale : p.scale) * 1.4426950408889634);
  float factor = p.scale < 0 ? -1.0f : 1.0f;
  if (!(c > 0.0f)) factor = float(p.scale), c = 1.0f;
  pack_queries<T>(p, t, l, factor, q);
  for (int64_t i = 0; i < l.rows * l.width; ++i) o[i] = 0.0f;
  for (int64_t i = 0; i < l.rows; ++i) maximum[i] = -INF;
  for (int64_t i = 0; i < l.rows * W; ++i) sums[i] = 0.0f;

  const T *const k_base = static_cast<const T *>(p.k) + t.batch * p.ks[0] + t.kv_head * p.ks[1];
  const T *const v_base = static_cast<const T *>(p.v) + t.batch * p.vs[0] + t.kv_head * p.vs[1];
  const int64_t last = min64(t.key1, row_end(p, end, (t.row1 - 1) / group));
  // Float values can be used where they lie if no vector would hang over their end; with many
  // rows a compact copy avoids cache conflicts between rows that lie far apart.
  const bool copy_v = sizeof(T) != 4 || p.d_v % W != 0 || l.rows > 4 * PR;

  for (int64_t key0 = t.key0; key0 < last; key0 += l.block) {
    const int64_t count = min64(l.block, last - key0);
    const T *const k = k_base + key0 * p.ks[2];
    const T *const v = v_base + key0 * p.vs[2];
    // With few rows memory is the limit: ask for the next block while working on this one.
    Stream ahead{};
    if (l.rows <= 2 * MR) {
      ahead.k = reinterpret_cast<const char *>(k + l.block * p.ks[2]);
      ahead.k_stride = p.ks[2] * int64_t(sizeof(T));
      ahead.k_bytes = d * int64_t(sizeof(T));
      ahead.keys = last - key0 - l.block;
    }
    // Values that are used where they lie; the packing of the others touches them early itself.
    int64_t ahead_v = ahead.keys > 0 && !copy_v ? l.block * p.vs[2] : 0;
    if (!l.stream) pack_keys(k, p.ks[2], count, d, kt, ahead);
    const float *values = reinterpret_cast<const float *>(v);
    int64_t ldv = p.vs[2];
    if (copy_v) {
      pack_values(v, p.vs[2], count, p.d_v, packed_v, l.width);
      values = packed_v;
      ldv = l.width;
    }
    for (int64_t tile = 0; tile < l.tiles; ++tile) {
      const int64_t r0 = tile * MR;
      const int rows = int(min64(MR, l.rows - r0));
      int64_t seen[MR];
      int64_t most = 0;
      for (int r = 0; r < rows; ++r) {
        const int64_t ends = row_end(p, end, (t.row0 + r0 + r) / group);
        seen[r] = max64(0, min64(count, ends - key0));
        most = max64(most, seen[r]);
      }
      if (most == 0) continue;
      if (l.stream) {
        for (int r = 0; r < rows; r += 4) {
          const float *const x = q + (r0 + r) * l.dp;
          float *const dst = s + r * l.block;
          const int64_t ld = l.block, ks = p.ks[2];
          switch (min64(4, rows - r)) {
            case 1: score_stream<1, T>(x, l.dp, k, ks, most, d, dst, ld, ahead); break;
            case 2: score_stream<2, T>(x, l.dp, k, ks, most, d, dst, ld, ahead); break;
            case 3: score_stream<3, T>(x, l.dp, k, ks, most, d, dst, ld, ahead); break;
            default: score_stream<4, T>(x, l.dp, k, ks, most, d, dst, ld, ahead);
          }
          ahead.keys = 0;  // asked for once
        }
      } else {
        pick_score<MR>(rows)(q + r0 * d, kt, d, (most + NR - 1) / NR, s, l.block);
      }
      float alpha[MR];
      for (int r = 0; r < rows; ++r)
        alpha[r] = seen[r] ? softmax_row(s + r * l.block, seen[r], c, maximum + r0 + r,
                                         sums + (r0 + r) * W)
                           : 1.0f;
      for (int r = 0; r < rows; r += PR) {
        const int n = rows - r < PR ? rows - r : PR;
        int64_t common = seen[r];
        for (int i = 1; i < n; ++i) common = min64(common, seen[r + i]);
        const float *const weights = s + r * l.block;
        float *const dst = o + (r0 + r) * l.width;
        value_rows(n, weights, l.block, values, ldv, common, alpha + r, dst, l.width, ahead_v);
        ahead_v = 0;
        // Keys that only some of the rows may see: row by row, so that what a row may not see
        // (it could be NaN) never touches it.
        const float one = 1.0f;
        for (int i = 0; i < n; ++i)
          if (seen[r + i] > common)
            value_rows(1, weights + i * l.block + common, l.block, values + common * ldv, ldv,
                       seen[r + i] - common, &one, dst + i * l.width, l.width, 0);
      }
    }
  }

  for (int64_t r = 0; r < l.rows; ++r) {
    const float sum = hsum(load(sums + r * W));
    if (t.partial) {
      t.partial[r] = maximum[r];
      t.partial[l.rows + r] = sum;
      std::memcpy(t.partial + 2 * l.rows + r * p.d_v, o + r * l.width, sizeof(float) * size_t(p.d_v));
    } else {
      write_row<T>(p, t, t.row0 + r, o + r * l.width, row_factor(p, t, t.row0 + r, sum));
    }
  }
}

template <class T>
static void combine_typed(const Problem &p, const Task &t, const float *partials, int64_t splits,
                          int64_t stride) {
  const int64_t rows = t.row1 - t.row0;
  float o[256];
  for (int64_t r = 0; r < rows; ++r) {
    float top = -INF, sum = 0.0f;
    for (int64_t i = 0; i < splits; ++i) {
      const float m = partials[i * stride + r];
      top = m > top ? m : top;
    }
    for (int64_t d = 0; d < p.d_v; ++d) o[d] = 0.0f;
    for (int64_t i = 0; i < splits; ++i) {
      const float *part = partials + i * stride, m = part[r];
      const float weight = m == top ? 1.0f : exp2_scalar(m - top);
      sum += part[rows + r] * weight;
      const float *src = part + 2 * rows + r * p.d_v;
      for (int64_t d = 0; d < p.d_v; ++d) o[d] += src[d] * weight;
    }
    write_row<T>(p, t, t.row0 + r, o, row_factor(p, t, t.row0 + r, sum));
  }
}

static void attend(const Problem &p, const Task &t, float *scratch) {
  if (p.dtype == F32) return attend_typed<float>(p, t, scratch);
  if (p.dtype == BF16) return attend_typed<bf16>(p, t, scratch);
  attend_typed<f16>(p, t, scratch);
}
static void combine(const Problem &p, const Task &t, const float *partials, int64_t splits,
                    int64_t stride) {
  if (p.dtype == F32) return combine_typed<float>(p, t, partials, splits, stride);
  if (p.dtype == BF16) return combine_typed<bf16>(p, t, partials, splits, stride);
  combine_typed<f16>(p, t, partials, splits, stride);
}

static float read_all(const float *data, int64_t n, int64_t ahead) {
  vf acc[8];
  for (int i = 0; i < 8; ++i) acc[i] = zero();
  int64_t at = 0;
  for (; at + 8 * W <= n; at += 8 * W) {
    const char *const line = reinterpret_cast<const char *>(data + at) + ahead;
    if (ahead)
      for (int i = 0; i < 8 * W * 4; i += 64) prefetch(line + i);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) acc[i] = add(acc[i], load(data + at + i * W));
  }
  float sum = 0.0f;
  for (int i = 0; i < 8; ++i) sum += hsum(acc[i]);
  for (; at < n; ++at) sum += data[at];
  return sum;
}

}  // namespace
}  // namespace gk
