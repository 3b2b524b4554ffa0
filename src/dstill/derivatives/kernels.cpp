// The CPU kernels of the hand-written derivatives, in float and double.
//
// Memory is channels-last, [image, row, column, channel], so that neighbouring lanes of a vector are neighbouring channels
// and no kernel shuffles lanes. Kernels are single-threaded: the callers run pieces of a batch on several threads.
//
//   unit_*      instance norm, ReLU and 2x2 average pooling of one block, in its four forms (dstill.derivatives.unit.Unit)
//   winograd_*  the transforms of Winograd's F(4x4, 3x3) convolution (dstill.derivatives.cpu_convolutions)
//   patches_*   images as rows of 3x3 patches, for images of few channels (dstill.derivatives.cpu_convolutions)
//   products    a batch of small matrix products, and sums of two of them
//   adam_*      a step of Adam and its pullback, each in one pass over memory (dstill.unrolling.optimisers)

#include <algorithm>
#include <cmath>
#include <cstring>

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

template <class T>
struct Simd {
  typedef T Vector __attribute__((vector_size(kBytes)));
  static constexpr long lanes = kBytes / sizeof(T);
};
template <class T>
using Vec = typename Simd<T>::Vector;

// A run of `n` channels. `Full` says that n is a whole vector: the copies below then become single instructions.
template <class T, bool Full>
struct Channels {
  long n;
  Vec<T> load(const T* p) const {
    Vec<T> v{};
    std::memcpy(&v, p, Full ? kBytes : n * sizeof(T));
    return v;
  }
  void store(T* p, Vec<T> v) const { std::memcpy(p, &v, Full ? kBytes : n * sizeof(T)); }
};

template <class T, class Body>
void for_channels(long count, Body body) {
  for (long c = 0; c < count; c += Simd<T>::lanes) {
    const long n = std::min(Simd<T>::lanes, count - c);
    if (n == Simd<T>::lanes) body(c, Channels<T, true>{n});
    else body(c, Channels<T, false>{n});
  }
}

// This comparison keeps NaN: a student that has diverged must not look healthy.
template <class T>
Vec<T> relu(Vec<T> a) { return Vec<T>{} > a ? Vec<T>{} : a; }

struct Size {
  long height, width, channels;
  long pixels() const { return height * width; }
  long pooled() const { return (height / 2) * (width / 2); }
};

// One image and a group of neighbouring runs of channels of a block:  n = (z - mean) r,  a = n scale + shift. A group of
// several runs reads each pixel in one piece of memory, which the processor can foresee.
template <class T, int Runs, bool Full>
struct Unit {
  Channels<T, Full> lanes;
  Size s;
  const T* z;
  Vec<T> mean[Runs], r[Runs], scale[Runs], shift[Runs];

  Vec<T> load(const T* p, int run) const { return lanes.load(p + run * Simd<T>::lanes); }
  void store(T* p, int run, Vec<T> v) const { lanes.store(p + run * Simd<T>::lanes, v); }
  long at(long i, long j) const { return (i * s.width + j) * s.channels; }
  long pooled(long i, long j) const { return (i / 2 * (s.width / 2) + j / 2) * s.channels; }
  bool inside(long i, long j) const { return i < s.height / 2 * 2 && j < s.width / 2 * 2; }
  Vec<T> normalised(long pixel, int run) const { return (load(z + pixel, run) - mean[run]) * r[run]; }
  Vec<T> activation(Vec<T> n, int run) const { return n * scale[run] + shift[run]; }
  // Backward through pooling and ReLU: the gradient at pixel (i, j), from the gradient `gy` at the pooled pixels.
  Vec<T> unpooled(const T* gy, Vec<T> n, long i, long j, int run) const {
    if (!inside(i, j)) return Vec<T>{};
    const Vec<T> quarter = load(gy + pooled(i, j), run) * T(0.25);
    return activation(n, run) > T(0) ? quarter : Vec<T>{};
  }

  template <class Body>
  void for_runs(Body body) const {
    for (int run = 0; run < Runs; ++run) body(run);
  }
  template <class Body>
  void for_pixels(Body body) const {
    for (long i = 0; i < s.height; ++i)
      for (long j = 0; j < s.width; ++j) for_runs([&](int run) { body(i, j, run); });
  }
  // Sums over the image, row by row: the rounding error grows with the side and not with the number of pixels.
  template <class Term>
  void sum(Vec<T>* total, Term term) const {
    for_runs([&](int run) { total[run] = Vec<T>{}; });
    for (long i = 0; i < s.height; ++i) {
      Vec<T> row[Runs] = {};
      for (long j = 0; j < s.width; ++j) for_runs([&](int run) { row[run] += term(i, j, run); });
      for_runs([&](int run) { total[run] += row[run]; });
    }
  }
};

template <class T, int Runs, bool Full, class Body>
void for_group(long images, Size s, const T* z, const T* scale, const T* shift, long c, Channels<T, Full> lanes, Body body) {
  for (long b = 0; b < images; ++b) {
    Unit<T, Runs, Full> u{lanes, s, z + b * s.pixels() * s.channels + c};
    u.for_runs([&](int run) {
      u.scale[run] = u.load(scale + c, run);
      u.shift[run] = u.load(shift + c, run);
    });
    body(u, b * s.channels + c, b * s.pixels() * s.channels + c, b * s.pooled() * s.channels + c);
  }
}

// Groups of eight runs, then of two, then single runs, and at last what does not fill one. Doubles are for tests: without groups,
// these kernels are compiled in two thirds of the time.
template <class T, int Runs = sizeof(T) == 4 ? 8 : 1, class Body>
void for_units(long images, Size s, const T* z, const T* scale, const T* shift, Body body, long c = 0) {
  constexpr long width = Simd<T>::lanes;
  const Channels<T, true> all{width};
  for (; c + Runs * width <= s.channels; c += Runs * width) for_group<T, Runs>(images, s, z, scale, shift, c, all, body);
  if constexpr (Runs > 1) for_units<T, Runs == 8 ? 2 : 1>(images, s, z, scale, shift, body, c);
  else if (c < s.channels) for_group<T, 1>(images, s, z, scale, shift, c, Channels<T, false>{s.channels - c}, body);
}

template <class T>
void unit_forward(const T* z, const T* scale, const T* shift, T* y, T* mean, T* r, T eps, long images, Size s) {
  const T share = T(1) / s.pixels();
  for_units(images, s, z, scale, shift, [&](auto u, long stat, long, long out) {
    using V = Vec<T>;
    decltype(u.mean) variance;
    u.sum(u.mean, [&](long i, long j, int run) { return u.load(u.z + u.at(i, j), run); });
    u.for_runs([&](int run) { u.mean[run] *= share; });
    u.sum(variance, [&](long i, long j, int run) {
      const V d = u.load(u.z + u.at(i, j), run) - u.mean[run];
      return V(d * d);
    });
    u.for_runs([&](int run) {
      for (long k = 0; k < Simd<T>::lanes; ++k) u.r[run][k] = T(1) / std::sqrt(variance[run][k] * share + eps);
      u.store(mean + stat, run, u.mean[run]);
      u.store(r + stat, run, u.r[run]);
    });
    for (long i = 0; i < s.height / 2 * 2; i += 2)
      for (long j = 0; j < s.width / 2 * 2; j += 2)
        u.for_runs([&](int run) {
          V total{};
          for (long k = 0; k < 4; ++k) total += relu<T>(u.activation(u.normalised(u.at(i + k / 2, j + k % 2), run), run));
          u.store(y + out + u.pooled(i, j), run, total * T(0.25));
        });
  });
}

template <class T>
void unit_backward(const T* z, const T* mean, const T* r, const T* scale, const T* shift, const T* gy, T* gz, T* sum_ga,
                   T* sum_ga_n, long images, Size s) {
  const T share = T(1) / s.pixels();
  for_units(images, s, z, scale, shift, [&](auto u, long stat, long full, long half) {
    using V = Vec<T>;
    u.for_runs([&](int run) {
      u.mean[run] = u.load(mean + stat, run);
      u.r[run] = u.load(r + stat, run);
    });
    decltype(u.mean) total, total_n = {};
    u.sum(total, [&](long i, long j, int run) {
      const V n = u.normalised(u.at(i, j), run), ga = u.unpooled(gy + half, n, i, j, run);
      total_n[run] += ga * n;
      return ga;
    });
    u.for_runs([&](int run) {
      u.store(sum_ga + stat, run, total[run]);
      u.store(sum_ga_n + stat, run, total_n[run]);
    });
    u.for_pixels([&](long i, long j, int run) {
      const V mean_ga = total[run] * share, mean_ga_n = total_n[run] * share, factor = u.scale[run] * u.r[run];
      const V n = u.normalised(u.at(i, j), run), ga = u.unpooled(gy + half, n, i, j, run);
      u.store(gz + full + u.at(i, j), run, factor * (ga - mean_ga - n * mean_ga_n));
    });
  });
}

template <class T>
void unit_tangent(const T* z, const T* mean, const T* r, const T* scale, const T* shift, const T* dz, const T* dscale,
                  const T* dshift, T* y, T* dy, T* mean_dz, T* projection, long images, Size s) {
  const T share = T(1) / s.pixels();
  for_units(images, s, z, scale, shift, [&](auto u, long stat, long full, long half) {
    using V = Vec<T>;
    const long c = stat % s.channels;
    decltype(u.mean) m, p = {}, ds = {}, dh = {};
    u.for_runs([&](int run) {
      u.mean[run] = u.load(mean + stat, run);
      u.r[run] = u.load(r + stat, run);
      if (dscale) ds[run] = u.load(dscale + c, run);
      if (dshift) dh[run] = u.load(dshift + c, run);
    });
    u.sum(m, [&](long i, long j, int run) {
      const V d = u.load(dz + full + u.at(i, j), run);
      p[run] += d * u.normalised(u.at(i, j), run);
      return d;
    });
    u.for_runs([&](int run) {
      u.store(mean_dz + stat, run, m[run] *= share);
      u.store(projection + stat, run, p[run] *= share);
    });
    for (long i = 0; i < s.height / 2 * 2; i += 2)
      for (long j = 0; j < s.width / 2 * 2; j += 2)
        u.for_runs([&](int run) {
          V total{}, dtotal{};
          for (long k = 0; k < 4; ++k) {
            const long q = u.at(i + k / 2, j + k % 2);
            const V n = u.normalised(q, run), a = u.activation(n, run);
            const V dn = u.r[run] * (u.load(dz + full + q, run) - m[run] - n * p[run]);
            const V da = dn * u.scale[run] + n * ds[run] + dh[run];
            total += relu<T>(a);
            dtotal += a > T(0) ? da : V{};
          }
          u.store(y + half + u.pooled(i, j), run, total * T(0.25));
          u.store(dy + half + u.pooled(i, j), run, dtotal * T(0.25));
        });
  });
}

template <class T>
void unit_tangent_backward(const T* z, const T* mean, const T* r, const T* scale, const T* shift, const T* dz,
                           const T* mean_dz, const T* projection, const T* dscale, const T* gy, const T* sum_ga,
                           const T* sum_ga_n, const T* dgy, T* gz, T* dgz, T* sum_dga, T* sum_scale, long images, Size s) {
  const T share = T(1) / s.pixels();
  for_units(images, s, z, scale, shift, [&](auto u, long stat, long full, long half) {
    using V = Vec<T>;
    decltype(u.mean) m, p, mean_ga, mean_ga_n, ds = {}, mean_dga, mixed = {};
    u.for_runs([&](int run) {
      u.mean[run] = u.load(mean + stat, run);
      u.r[run] = u.load(r + stat, run);
      m[run] = u.load(mean_dz + stat, run);
      p[run] = u.load(projection + stat, run);
      mean_ga[run] = u.load(sum_ga + stat, run) * share;
      mean_ga_n[run] = u.load(sum_ga_n + stat, run) * share;
      if (dscale) ds[run] = u.load(dscale + stat % s.channels, run);
    });
    const auto tangent_n = [&](V n, long q, int run) {
      return V(u.r[run] * (u.load(dz + full + q, run) - m[run] - n * p[run]));
    };
    u.sum(mean_dga, [&](long i, long j, int run) {
      const V n = u.normalised(u.at(i, j), run);
      const V dga = u.unpooled(dgy + half, n, i, j, run), ga = u.unpooled(gy + half, n, i, j, run);
      mixed[run] += dga * n + ga * tangent_n(n, u.at(i, j), run);
      return dga;
    });
    u.for_runs([&](int run) {
      u.store(sum_dga + stat, run, mean_dga[run]);
      u.store(sum_scale + stat, run, mixed[run]);
      mean_dga[run] *= share;
      mixed[run] *= share;
    });
    u.for_pixels([&](long i, long j, int run) {
      const long k = u.at(i, j);
      const V factor = u.scale[run] * u.r[run], dfactor = ds[run] * u.r[run] - u.scale[run] * u.r[run] * u.r[run] * p[run];
      const V n = u.normalised(k, run);
      const V dga = u.unpooled(dgy + half, n, i, j, run), ga = u.unpooled(gy + half, n, i, j, run);
      const V q = ga - mean_ga[run] - n * mean_ga_n[run];
      const V dq = dga - mean_dga[run] - tangent_n(n, k, run) * mean_ga_n[run] - n * mixed[run];
      u.store(gz + full + k, run, factor * q);
      u.store(dgz + full + k, run, dfactor * q + factor * dq);
    });
  });
}

// Winograd's F(4, 3) on the points 0, +-a, +-b and infinity. a = 5/8 and b = 3/2 lose half as many digits as the usual 1 and
// 2, and make every constant below exact in binary.
constexpr double kA = 0.625, kB = 1.5, kA2 = kA * kA, kB2 = kB * kB;
constexpr int kTile = 4, kPatch = 6;

template <class T, class X>
void input_1d(const X* d, X* v) {  // B^T d
  const X even_a = d[4] - T(kB2) * d[2], odd_a = T(kA) * (d[3] - T(kB2) * d[1]);
  const X even_b = d[4] - T(kA2) * d[2], odd_b = T(kB) * (d[3] - T(kA2) * d[1]);
  v[0] = T(kA2 * kB2) * d[0] - T(kA2 + kB2) * d[2] + d[4];
  v[1] = even_a + odd_a;
  v[2] = even_a - odd_a;
  v[3] = even_b + odd_b;
  v[4] = even_b - odd_b;
  v[5] = T(kA2 * kB2) * d[1] - T(kA2 + kB2) * d[3] + d[5];
}

template <class T, class X>
void input_adjoint_1d(const X* v, X* d) {  // B v
  const X even_a = v[1] + v[2], odd_a = T(kA) * (v[1] - v[2]), even_b = v[3] + v[4], odd_b = T(kB) * (v[3] - v[4]);
  d[0] = T(kA2 * kB2) * v[0];
  d[1] = T(kA2 * kB2) * v[5] - T(kB2) * odd_a - T(kA2) * odd_b;
  d[2] = -T(kA2 + kB2) * v[0] - T(kB2) * even_a - T(kA2) * even_b;
  d[3] = odd_a + odd_b - T(kA2 + kB2) * v[5];
  d[4] = v[0] + even_a + even_b;
  d[5] = v[5];
}

template <class T, class X>
void output_1d(const X* m, X* y) {  // A^T m
  const X even_a = m[1] + m[2], odd_a = T(kA) * (m[1] - m[2]), even_b = m[3] + m[4], odd_b = T(kB) * (m[3] - m[4]);
  y[0] = m[0] + even_a + even_b;
  y[1] = odd_a + odd_b;
  y[2] = T(kA2) * even_a + T(kB2) * even_b;
  y[3] = T(kA2) * odd_a + T(kB2) * odd_b + m[5];
}

template <class T, class X>
void output_adjoint_1d(const X* y, X* m) {  // A y
  const X even_a = y[0] + T(kA2) * y[2], odd_a = T(kA) * (y[1] + T(kA2) * y[3]);
  const X even_b = y[0] + T(kB2) * y[2], odd_b = T(kB) * (y[1] + T(kB2) * y[3]);
  m[0] = y[0];
  m[1] = even_a + odd_a;
  m[2] = even_a - odd_a;
  m[3] = even_b + odd_b;
  m[4] = even_b - odd_b;
  m[5] = y[3];
}

constexpr double kScale0 = 1 / (kA2 * kB2), kScaleA = 1 / (2 * kA2 * (kA2 - kB2)), kScaleB = 1 / (2 * kB2 * (kB2 - kA2));

template <class T, class X>
void weight_1d(const X* g, X* u) {  // G g
  const X even_a = T(kScaleA) * (g[0] + T(kA2) * g[2]), odd_a = T(kScaleA * kA) * g[1];
  const X even_b = T(kScaleB) * (g[0] + T(kB2) * g[2]), odd_b = T(kScaleB * kB) * g[1];
  u[0] = T(kScale0) * g[0];
  u[1] = even_a + odd_a;
  u[2] = even_a - odd_a;
  u[3] = even_b + odd_b;
  u[4] = even_b - odd_b;
  u[5] = g[2];
}

template <class T, class X>
void weight_adjoint_1d(const X* u, X* g) {  // G^T u
  const X even_a = T(kScaleA) * (u[1] + u[2]), even_b = T(kScaleB) * (u[3] + u[4]);
  g[0] = T(kScale0) * u[0] + even_a + even_b;
  g[1] = T(kScaleA * kA) * (u[1] - u[2]) + T(kScaleB * kB) * (u[3] - u[4]);
  g[2] = T(kA2) * even_a + T(kB2) * even_b + u[5];
}

// M x M^T for the matrix that `one` applies to From numbers, giving To.
template <int From, int To, class X, class One>
void both_sides(const X* x, X* y, One one) {
  X half[To * From], column[From], result[To];
  for (int j = 0; j < From; ++j) {
    for (int i = 0; i < From; ++i) column[i] = x[i * From + j];
    one(column, result);
    for (int i = 0; i < To; ++i) half[i * From + j] = result[i];
  }
  for (int i = 0; i < To; ++i) one(half + i * From, y + i * To);
}

template <class T, class Body>
void for_tiles(long images, Size s, Body body) {
  const long rows = (s.height + kTile - 1) / kTile, columns = (s.width + kTile - 1) / kTile;
  for (long b = 0, tile = 0; b < images; ++b)
    for (long i = 0; i < rows; ++i)
      for (long j = 0; j < columns; ++j, ++tile)
        for_channels<T>(s.channels, [&](long c, auto lanes) {
          body(lanes, b * s.pixels() * s.channels + c, i * kTile, j * kTile, tile * s.channels + c);
        });
}

// Calls body(element of a Side x Side window, offset of its pixel) for the pixels that lie inside the image.
template <int Side, class Body>
void for_window(const Size& s, long top, long left, Body body) {
  for (int i = 0; i < Side; ++i)
    for (int j = 0; j < Side; ++j)
      if (top + i >= 0 && top + i < s.height && left + j >= 0 && left + j < s.width)
        body(i * Side + j, ((top + i) * s.width + left + j) * s.channels);
}

template <class T>
void winograd_input(const T* x, T* v, long plane, long images, Size s) {
  for_tiles<T>(images, s, [&](auto lanes, long image, long top, long left, long tile) {
    Vec<T> d[kPatch * kPatch] = {}, w[kPatch * kPatch];
    for_window<kPatch>(s, top - 1, left - 1, [&](int k, long pixel) { d[k] = lanes.load(x + image + pixel); });
    both_sides<kPatch, kPatch>(d, w, input_1d<T, Vec<T>>);
    for (int k = 0; k < kPatch * kPatch; ++k) lanes.store(v + k * plane + tile, w[k]);
  });
}

template <class T>
void winograd_input_adjoint(const T* v, T* x, long plane, long images, Size s) {
  std::memset(x, 0, images * s.pixels() * s.channels * sizeof(T));
  for_tiles<T>(images, s, [&](auto lanes, long image, long top, long left, long tile) {
    Vec<T> w[kPatch * kPatch], d[kPatch * kPatch];
    for (int k = 0; k < kPatch * kPatch; ++k) w[k] = lanes.load(v + k * plane + tile);
    both_sides<kPatch, kPatch>(w, d, input_adjoint_1d<T, Vec<T>>);
    for_window<kPatch>(s, top - 1, left - 1, [&](int k, long pixel) {
      T* p = x + image + pixel;
      lanes.store(p, lanes.load(p) + d[k]);
    });
  });
}

template <class T>
void winograd_output(const T* m, T* y, long plane, long images, Size s) {
  for_tiles<T>(images, s, [&](auto lanes, long image, long top, long left, long tile) {
    Vec<T> w[kPatch * kPatch], d[kTile * kTile];
    for (int k = 0; k < kPatch * kPatch; ++k) w[k] = lanes.load(m + k * plane + tile);
    both_sides<kPatch, kTile>(w, d, output_1d<T, Vec<T>>);
    for_window<kTile>(s, top, left, [&](int k, long pixel) { lanes.store(y + image + pixel, d[k]); });
  });
}

template <class T>
void winograd_output_adjoint(const T* y, T* m, long plane, long images, Size s) {
  for_tiles<T>(images, s, [&](auto lanes, long image, long top, long left, long tile) {
    Vec<T> d[kTile * kTile] = {}, w[kPatch * kPatch];
    for_window<kTile>(s, top, left, [&](int k, long pixel) { d[k] = lanes.load(y + image + pixel); });
    both_sides<kTile, kPatch>(d, w, output_adjoint_1d<T, Vec<T>>);
    for (int k = 0; k < kPatch * kPatch; ++k) lanes.store(m + k * plane + tile, w[k]);
  });
}

// `count` filters of nine numbers; lanes run over filters.
template <class T>
void winograd_weight(const T* g, T* u, long plane, long count) {
  for_channels<T>(count, [&](long i, auto lanes) {
    T gathered[9][Simd<T>::lanes] = {};
    for (long lane = 0; lane < lanes.n; ++lane)
      for (int k = 0; k < 9; ++k) gathered[k][lane] = g[(i + lane) * 9 + k];
    Vec<T> d[9], w[kPatch * kPatch];
    std::memcpy(d, gathered, sizeof d);
    both_sides<3, kPatch>(d, w, weight_1d<T, Vec<T>>);
    for (int k = 0; k < kPatch * kPatch; ++k) lanes.store(u + k * plane + i, w[k]);
  });
}

template <class T>
void winograd_weight_adjoint(const T* u, T* g, long plane, long count) {
  for_channels<T>(count, [&](long i, auto lanes) {
    Vec<T> w[kPatch * kPatch], d[9];
    for (int k = 0; k < kPatch * kPatch; ++k) w[k] = lanes.load(u + k * plane + i);
    both_sides<kPatch, 3>(w, d, weight_adjoint_1d<T, Vec<T>>);
    for (long lane = 0; lane < lanes.n; ++lane)
      for (int k = 0; k < 9; ++k) g[(i + lane) * 9 + k] = d[k][lane];
  });
}

// Matrix products C = A B (+ A2 B2), one for each of `planes` planes. Rows of B and C are contiguous, A has any strides.
struct Matrices {
  long planes, m, n, k, a_row, a_column, a_plane, b_row, b_plane, c_row, c_plane;
};

constexpr int kRows = kBytes == 64 ? 6 : 4, kVectors = kBytes == 64 ? 4 : 2;
// Sums are cut into chains of this length: a single chain of 128 additions would lose half a digit more than all the rest.
constexpr long kChain = 32;

// Memory that the next product will read. It is fetched into the cache while this one is computed, since the processor's own
// prefetching stops at the end of each page.
struct Ahead {
  struct Range {
    const char *at = nullptr, *end = nullptr;
  } left, right;

  template <class T>
  static Range range(const T* first, long count) {
    return {reinterpret_cast<const char*>(first), reinterpret_cast<const char*>(first + count)};
  }
  void fetch() {
    Range& range = left.at < left.end ? left : right;
    if (range.at < range.end) {
      __builtin_prefetch(range.at, 0, 2);
      range.at += 64;
    }
  }
};

template <class T, int Rows, int Vectors, bool Full>
void tile(const Matrices& x, const T* a, const T* b, T* c, bool add, Channels<T, Full> lanes, Ahead& ahead) {
  constexpr long width = Simd<T>::lanes;
  Vec<T> total[Rows][Vectors] = {};
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < Vectors; ++j) __builtin_prefetch(c + i * x.c_row + j * width, 1);
  for (long first = 0; first < x.k; first += kChain) {
    Vec<T> chain[Rows][Vectors] = {};
    for (long k = first; k < std::min(first + kChain, x.k); ++k) {
      ahead.fetch();
      Vec<T> row[Vectors];
      for (int j = 0; j < Vectors; ++j) row[j] = lanes.load(b + k * x.b_row + j * width);
      for (int i = 0; i < Rows; ++i) {
        const T factor = a[i * x.a_row + k * x.a_column];
        for (int j = 0; j < Vectors; ++j) chain[i][j] += factor * row[j];
      }
    }
    for (int i = 0; i < Rows; ++i)
      for (int j = 0; j < Vectors; ++j) total[i][j] += chain[i][j];
  }
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < Vectors; ++j) {
      T* p = c + i * x.c_row + j * width;
      lanes.store(p, add ? lanes.load(p) + total[i][j] : total[i][j]);
    }
}

template <class T, int Vectors, bool Full>
void column(const Matrices& x, const T* a, const T* b, T* c, bool add, Channels<T, Full> lanes, Ahead& ahead) {
  long i = 0;
  for (; i + kRows <= x.m; i += kRows) tile<T, kRows, Vectors>(x, a + i * x.a_row, b, c + i * x.c_row, add, lanes, ahead);
  for (; i + 2 <= x.m; i += 2) tile<T, 2, Vectors>(x, a + i * x.a_row, b, c + i * x.c_row, add, lanes, ahead);
  if (i < x.m) tile<T, 1, Vectors>(x, a + i * x.a_row, b, c + i * x.c_row, add, lanes, ahead);
}

template <class T>
void product(const Matrices& x, const T* a, const T* b, T* c, bool add, Ahead& ahead) {
  constexpr long width = Simd<T>::lanes;
  const Channels<T, true> all{width};
  long j = 0;
  for (; j + kVectors * width <= x.n; j += kVectors * width) column<T, kVectors>(x, a, b + j, c + j, add, all, ahead);
  for (; j + 2 * width <= x.n; j += 2 * width) column<T, 2>(x, a, b + j, c + j, add, all, ahead);
  for (; j + width <= x.n; j += width) column<T, 1>(x, a, b + j, c + j, add, all, ahead);
  if (j < x.n) column<T, 1>(x, a, b + j, c + j, add, Channels<T, false>{x.n - j}, ahead);
}

// Long sums are computed in sections whose operands stay in the cache while every tile of C reads them.
constexpr long kStretch = 512;

template <class T>
void sum_of_products(const Matrices& x, const T* a, const T* b, T* c, bool add, Ahead ahead) {
  for (long first = 0; first < x.k; first += kStretch) {
    Matrices stretch = x;
    stretch.k = std::min(kStretch, x.k - first);
    product(stretch, a + first * x.a_column, b + first * x.b_row, c, add || first > 0, ahead);
  }
}

template <class T>
void products(const T* a, const T* b, const T* a2, const T* b2, T* c, const Matrices& x) {
  const auto operands = [&](const T* left, const T* right, long p) {
    if (p == x.planes) return Ahead{};
    return Ahead{Ahead::range(left + p * x.a_plane, x.m * x.k), Ahead::range(right + p * x.b_plane, x.k * x.n)};
  };
  for (long p = 0; p < x.planes; ++p) {
    T* result = c + p * x.c_plane;
    const Ahead next = operands(a, b, p + 1);
    sum_of_products(x, a + p * x.a_plane, b + p * x.b_plane, result, false, a2 ? operands(a2, b2, p) : next);
    if (a2) sum_of_products(x, a2 + p * x.a_plane, b2 + p * x.b_plane, result, true, next);
  }
}

// Calls body(offset in the image, offset in the patches, count) for each row of each 3x3 patch, clipped to the image. Such a
// row is contiguous in both. A patch takes `length` numbers, the last of which may be padding.
template <class Body>
void for_patches(long images, Size s, long length, Body body) {
  for (long b = 0, row = 0; b < images; ++b)
    for (long i = 0; i < s.height; ++i)
      for (long j = 0; j < s.width; ++j, ++row)
        for (long k = std::max(0L, 1 - i); k < std::min(3L, s.height + 1 - i); ++k) {
          const long left = std::max(0L, 1 - j), right = std::min(3L, s.width + 1 - j);
          body(((b * s.height + i + k - 1) * s.width + j + left - 1) * s.channels,
               row * length + (3 * k + left) * s.channels, (right - left) * s.channels);
        }
}

template <class T>
void patches(const T* x, T* rows, long length, long images, Size s) {
  std::memset(rows, 0, images * s.pixels() * length * sizeof(T));
  for_patches(images, s, length, [&](long from, long to, long count) { std::copy_n(x + from, count, rows + to); });
}

template <class T>
void patches_adjoint(const T* rows, T* x, long length, long images, Size s) {
  std::memset(x, 0, images * s.pixels() * s.channels * sizeof(T));
  for_patches(images, s, length, [&](long to, long from, long count) {
    for (long c = 0; c < count; ++c) x[to + c] += rows[from + c];
  });
}

// The derivative of a step by the squares of the gradients is left out where they have all been 0 (r = 0).
// Without __restrict__ a compiler would have to check every pair of pointers, and does not vectorise.
template <class T>
void adam_step(const T* __restrict__ theta, const T* __restrict__ first, const T* __restrict__ second,
               const T* __restrict__ g, T* __restrict__ theta_out, T* __restrict__ first_out, T* __restrict__ second_out,
               T rate, T decay, T beta1, T beta2, T c2, T eps, long count) {
  for (long i = 0; i < count; ++i) {
    const T m = beta1 * first[i] + (1 - beta1) * g[i], v = beta2 * second[i] + (1 - beta2) * g[i] * g[i];
    first_out[i] = m;
    second_out[i] = v;
    theta_out[i] = decay * theta[i] - rate * m / (std::sqrt(v / c2) + eps);
  }
}

template <class T>
void adam_pullback(const T* __restrict__ g, const T* __restrict__ first, const T* __restrict__ second,
                   const T* __restrict__ by_theta, const T* __restrict__ by_first, const T* __restrict__ by_second,
                   T* __restrict__ p, T* __restrict__ by_first_out, T* __restrict__ by_second_out, T* __restrict__ update,
                   T lr, T beta1, T beta2, T c1, T c2, T eps, long count) {
  for (long i = 0; i < count; ++i) {
    const T r = std::sqrt(second[i] / c2), inverse = 1 / (r + eps), scaled = lr * by_theta[i] * inverse;
    const T by_m = by_first[i] - scaled / c1;
    const T u = first[i] * inverse / c1, slope = scaled * u / (2 * c2 * (r > 0 ? r : T(1)));
    const T by_v = by_second[i] + (r > 0 ? slope : T(0));
    update[i] = u;
    p[i] = (1 - beta1) * by_m + 2 * (1 - beta2) * g[i] * by_v;
    by_first_out[i] = beta1 * by_m;
    by_second_out[i] = beta2 * by_v;
  }
}

}  // namespace

#define EXPORT(T, S)                                                                                                        \
  extern "C" {                                                                                                              \
  void unit_forward_##S(const T* z, const T* scale, const T* shift, T* y, T* mean, T* r, double eps, long b, long h, long w,\
                        long c) {                                                                                           \
    unit_forward<T>(z, scale, shift, y, mean, r, T(eps), b, {h, w, c});                                                     \
  }                                                                                                                         \
  void unit_backward_##S(const T* z, const T* mean, const T* r, const T* scale, const T* shift, const T* gy, T* gz,         \
                         T* sum_ga, T* sum_ga_n, long b, long h, long w, long c) {                                          \
    unit_backward<T>(z, mean, r, scale, shift, gy, gz, sum_ga, sum_ga_n, b, {h, w, c});                                     \
  }                                                                                                                         \
  void unit_tangent_##S(const T* z, const T* mean, const T* r, const T* scale, const T* shift, const T* dz,                 \
                        const T* dscale, const T* dshift, T* y, T* dy, T* mean_dz, T* projection, long b, long h, long w,   \
                        long c) {                                                                                           \
    unit_tangent<T>(z, mean, r, scale, shift, dz, dscale, dshift, y, dy, mean_dz, projection, b, {h, w, c});                \
  }                                                                                                                         \
  void unit_tangent_backward_##S(const T* z, const T* mean, const T* r, const T* scale, const T* shift, const T* dz,        \
                                 const T* mean_dz, const T* projection, const T* dscale, const T* gy, const T* sum_ga,      \
                                 const T* sum_ga_n, const T* dgy, T* gz, T* dgz, T* sum_dga, T* sum_scale, long b, long h,  \
                                 long w, long c) {                                                                          \
    unit_tangent_backward<T>(z, mean, r, scale, shift, dz, mean_dz, projection, dscale, gy, sum_ga, sum_ga_n, dgy, gz, dgz, \
                             sum_dga, sum_scale, b, {h, w, c});                                                             \
  }                                                                                                                         \
  void winograd_input_##S(const T* x, T* v, long plane, long b, long h, long w, long c) {                                   \
    winograd_input<T>(x, v, plane, b, {h, w, c});                                                                           \
  }                                                                                                                         \
  void winograd_input_adjoint_##S(const T* v, T* x, long plane, long b, long h, long w, long c) {                           \
    winograd_input_adjoint<T>(v, x, plane, b, {h, w, c});                                                                   \
  }                                                                                                                         \
  void winograd_output_##S(const T* m, T* y, long plane, long b, long h, long w, long c) {                                  \
    winograd_output<T>(m, y, plane, b, {h, w, c});                                                                          \
  }                                                                                                                         \
  void winograd_output_adjoint_##S(const T* y, T* m, long plane, long b, long h, long w, long c) {                          \
    winograd_output_adjoint<T>(y, m, plane, b, {h, w, c});                                                                  \
  }                                                                                                                         \
  void winograd_weight_##S(const T* g, T* u, long plane, long count) { winograd_weight<T>(g, u, plane, count); }            \
  void winograd_weight_adjoint_##S(const T* u, T* g, long plane, long count) {                                              \
    winograd_weight_adjoint<T>(u, g, plane, count);                                                                         \
  }                                                                                                                         \
  void patches_##S(const T* x, T* rows, long length, long b, long h, long w, long c) {                                      \
    patches<T>(x, rows, length, b, {h, w, c});                                                                              \
  }                                                                                                                         \
  void patches_adjoint_##S(const T* rows, T* x, long length, long b, long h, long w, long c) {                              \
    patches_adjoint<T>(rows, x, length, b, {h, w, c});                                                                      \
  }                                                                                                                         \
  void adam_step_##S(const T* theta, const T* first, const T* second, const T* g, T* theta_out, T* first_out,               \
                     T* second_out, double rate, double decay, double beta1, double beta2, double c2, double eps, long n) { \
    adam_step<T>(theta, first, second, g, theta_out, first_out, second_out, rate, decay, beta1, beta2, c2, eps, n);         \
  }                                                                                                                         \
  void adam_pullback_##S(const T* g, const T* first, const T* second, const T* by_theta, const T* by_first,                 \
                         const T* by_second, T* p, T* by_first_out, T* by_second_out, T* update, double lr, double beta1,   \
                         double beta2, double c1, double c2, double eps, long n) {                                          \
    adam_pullback<T>(g, first, second, by_theta, by_first, by_second, p, by_first_out, by_second_out, update, lr, beta1,    \
                     beta2, c1, c2, eps, n);                                                                                \
  }                                                                                                                         \
  void products_##S(const T* a, const T* b, const T* a2, const T* b2, T* c, long planes, long m, long n, long k,            \
                    long a_row, long a_column, long a_plane, long b_row, long b_plane, long c_row, long c_plane) {          \
    products<T>(a, b, a2, b2, c, {planes, m, n, k, a_row, a_column, a_plane, b_row, b_plane, c_row, c_plane});              \
  }                                                                                                                         \
  }

EXPORT(float, float32)
EXPORT(double, float64)
