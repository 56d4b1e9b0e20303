// The locality module's training step on the CPU: what lies between the matrix products, in float32.
//
// Statistics are computed by the pass that makes a map; normalization, activation and gate by the pass that reads it.
// Compiled by `localvit.ops.cpu_kernels`, which says what each function computes.
//
// Maps are channels-last. B images, H and W the grid, S = H * W positions, E channels (a multiple of LANES).
// A norm is given as three vectors of E values: mean, scale (weight over deviation) and bias.
// Sums are made image by image, so that they do not depend on the number of threads.

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

namespace {

using Vec = at::vec::Vectorized<float>;
using Size = int64_t;
constexpr Size LANES = Vec::size();
// Channels of a task that passes over positions: long contiguous reads, and sums that stay in the L1 cache.
constexpr Size PASS = 768;
// Channels of a task that convolves: three rows of a map stay in the L1 cache.
constexpr Size TILE = 64;

Vec load(const float* from) { return Vec::loadu(from); }

// Tasks that convolve read short pieces of each position, which the processor does not foresee: they ask for the next
// row while they compute one.
void prefetch_to_read(const float* from) {
#if defined(__GNUC__)
  __builtin_prefetch(from, 0);
#endif
}

void prefetch_to_write(const float* from) {
#if defined(__GNUC__)
  __builtin_prefetch(from, 1);
#endif
}

template <Size WIDTH, class Task>
void for_tasks(Size images, Size channels, Size threads, Task task) {
  const Size blocks = (channels + WIDTH - 1) / WIDTH;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (Size t = 0; t < images * blocks; t++) {
    const Size first = t % blocks * WIDTH;
    task(t / blocks, first, std::min(WIDTH, channels - first) / LANES);
  }
}

struct Norm {
  Vec mean, scale, bias;
  Norm() = default;
  Norm(const float* norm, Size channels, Size e)
      : mean(load(norm + e)), scale(load(norm + channels + e)), bias(load(norm + 2 * channels + e)) {}
  Vec of_deviation(Vec deviation) const { return at::vec::fmadd(deviation, scale, bias); }
  Vec operator()(Vec z) const { return of_deviation(z - mean); }
};

// NaN stays NaN.
Vec clamp_to_6(Vec u) { return at::vec::clamp(u, Vec(0.f), Vec(6.f)); }

template <bool HARDSWISH>
Vec activated(Vec u) {
  return HARDSWISH ? u * (clamp_to_6(u + Vec(3.f)) * Vec(1.f / 6.f)) : clamp_to_6(u);
}

template <bool HARDSWISH>
Vec slope(Vec u) {
  if (!HARDSWISH) return (u > Vec(0.f)) & (u < Vec(6.f)) & Vec(1.f);
  const Vec sixth = u * Vec(1.f / 6.f);
  return clamp_to_6(u + Vec(3.f)) * Vec(1.f / 6.f) + ((u.abs() < Vec(3.f)) & sixth);
}

// Mean and squared deviations from it, by Chan's formula, of rows that are still in the L1 cache.
template <Size WIDTH>
struct Moments {
  std::array<Vec, WIDTH / LANES> means, squares;
  float count = 0;
  Moments() {
    means.fill(Vec(0.f));
    squares.fill(Vec(0.f));
  }
  void add_row(const float* row, Size width, Size channels, Size vecs) {
    const float total = count + width, share = width / total;
    for (Size v = 0; v < vecs; v++) {
      const float* from = row + v * LANES;
      Vec sum(0.f), square(0.f);
      for (Size j = 0; j < width; j++) sum = sum + load(from + j * channels);
      const Vec mean = sum * Vec(1.f / width);
      for (Size j = 0; j < width; j++) {
        const Vec deviation = load(from + j * channels) - mean;
        square = at::vec::fmadd(deviation, deviation, square);
      }
      const Vec step = mean - means[v];
      means[v] = at::vec::fmadd(step, Vec(share), means[v]);
      squares[v] = squares[v] + at::vec::fmadd(step * step, Vec(count * share), square);
    }
    count = total;
  }
  void store(float* out_2E, Size channels, Size vecs) const {
    for (Size v = 0; v < vecs; v++) {
      means[v].store(out_2E + v * LANES);
      squares[v].store(out_2E + channels + v * LANES);
    }
  }
};

// Sums over an image's positions of what `terms(v, position, sums)` adds: (N, E).
template <Size N, class Terms>
void sum_over_positions(float* out_NE, Size positions, Size channels, Size vecs, Terms terms) {
  constexpr Size TOGETHER = 4;  // so that the sums are loaded and stored once for four positions
  std::array<std::array<Vec, N>, PASS / LANES> sums;
  for (Size v = 0; v < vecs; v++) sums[v].fill(Vec(0.f));
  for (Size first = 0; first < positions; first += TOGETHER) {
    const Size last = std::min(first + TOGETHER, positions);
    for (Size v = 0; v < vecs; v++) {
      std::array<Vec, N> own = sums[v];
      for (Size s = first; s < last; s++) terms(v, s, own);
      sums[v] = own;
    }
  }
  for (Size v = 0; v < vecs; v++)
    for (Size n = 0; n < N; n++) sums[v][n].store(out_NE + n * channels + v * LANES);
}

// Three rows of a map with a column of zeros on both sides, held in turn. At first they are zeros, as above the map.
class Window {
 public:
  explicit Window(Size width) : width_(width), values_(3 * (width + 2) * VECS, Vec(0.f)) {}
  Vec* row(Size i) { return values_.data() + ((i + 3) % 3 * (width_ + 2) + 1) * VECS; }
  void clear(Size i) { std::fill_n(row(i), width_ * VECS, Vec(0.f)); }
  static constexpr Size VECS = TILE / LANES;

 private:
  Size width_;
  std::vector<Vec> values_;
};

// A tile's weights, side by side.
using Weights = std::array<std::array<Vec, 9>, Window::VECS>;

Weights weights_of(const float* weight_9E, Size channels, Size e, Size vecs) {
  Weights weights;
  for (Size v = 0; v < vecs; v++)
    for (Size k = 0; k < 9; k++) weights[v][k] = load(weight_9E + k * channels + e + v * LANES);
  return weights;
}

template <bool HARDSWISH>
void activate_row(const float* z, const float* norm_3E, Size width, Size channels, Size e, Size vecs, Vec* to) {
  for (Size v = 0; v < vecs; v++) {
    const Norm norm(norm_3E, channels, e + v * LANES);
    for (Size j = 0; j < width; j++) {
      const float* from = z + j * channels + v * LANES;
      prefetch_to_read(from + width * channels);
      to[j * Window::VECS + v] = activated<HARDSWISH>(norm(load(from)));
    }
  }
}

template <bool HARDSWISH>
void depthwise_image(const float* z, const float* norm_3E, const float* weight_9E, float* out, float* moments_2E,
                     Size height, Size width, Size channels, Size e, Size vecs) {
  Window window(width);
  Moments<TILE> moments;
  const Weights weights = weights_of(weight_9E, channels, e, vecs);
  const Size pitch = width * channels;
  activate_row<HARDSWISH>(z, norm_3E, width, channels, e, vecs, window.row(0));
  for (Size i = 0; i < height; i++) {
    if (i + 1 < height) {
      activate_row<HARDSWISH>(z + (i + 1) * pitch, norm_3E, width, channels, e, vecs, window.row(i + 1));
    } else {
      window.clear(i + 1);
    }
    for (Size v = 0; v < vecs; v++) {
      const std::array<Vec, 9> own = weights[v];
      const Vec* rows[3] = {window.row(i - 1) + v, window.row(i) + v, window.row(i + 1) + v};
      for (Size j = 0; j < width; j++) {
        float* to = out + i * pitch + j * channels + v * LANES;
        prefetch_to_write(to + pitch);
        Vec sum(0.f);
        for (Size k = 0; k < 9; k++) sum = at::vec::fmadd(own[k], rows[k / 3][(j + k % 3 - 1) * Window::VECS], sum);
        sum.store(to);
      }
    }
    moments.add_row(out + i * pitch, width, channels, vecs);
  }
  moments.store(moments_2E, channels, vecs);
}

// A row of the gradient of the convolution's map, through the gate, the activation and the batch norm after it.
template <bool HARDSWISH>
void gradient_row(const float* grad, const float* z, const float* norm_3E, const float* gate_2E, const float* slopes_2E,
                  Size width, Size channels, Size e, Size vecs, Vec* to) {
  for (Size v = 0; v < vecs; v++) {
    const Size c = v * LANES;
    const Norm norm(norm_3E, channels, e + c);
    const Vec factor = load(gate_2E + c), constant = load(gate_2E + channels + c);
    const Vec by_deviation = load(slopes_2E + e + c), shift = load(slopes_2E + channels + e + c);
    for (Size j = 0; j < width; j++) {
      prefetch_to_read(z + (j + width) * channels + c);
      prefetch_to_read(grad + (j + width) * channels + c);
      const Vec deviation = load(z + j * channels + c) - norm.mean;
      const Vec grad_u = at::vec::fmadd(load(grad + j * channels + c), factor, constant) *
                         slope<HARDSWISH>(norm.of_deviation(deviation));
      to[j * Window::VECS + v] = at::vec::fmadd(grad_u, norm.scale, at::vec::fmadd(deviation, by_deviation, shift));
    }
  }
}

struct DepthwiseBackward {
  float* grad;
  const float *z2, *norm2_3E, *gate_B2E, *slopes_2E, *z1, *norm1_3E, *weight_9E;
  float *weight_sums_B9E, *sums_B2E;
  Size height, width, channels;

  template <bool HARDSWISH>
  void image(Size b, Size e, Size vecs) const {
    Window window(width);
    std::array<std::array<Vec, 9>, Window::VECS> weight_sums;
    std::array<std::array<Vec, 2>, Window::VECS> sums;
    for (auto& each : weight_sums) each.fill(Vec(0.f));
    for (auto& each : sums) each.fill(Vec(0.f));
    const Weights weights = weights_of(weight_9E, channels, e, vecs);
    const Size base = b * height * width * channels + e;
    const auto fill = [&](Size i) {
      const Size at = base + i * width * channels;
      gradient_row<HARDSWISH>(grad + at, z2 + at, norm2_3E, gate_B2E + 2 * b * channels + e, slopes_2E, width, channels,
                              e, vecs, window.row(i));
    };
    fill(0);
    for (Size i = 0; i < height; i++) {
      if (i + 1 < height) {
        fill(i + 1);
      } else {
        window.clear(i + 1);
      }
      for (Size v = 0; v < vecs; v++) {
        // Where an output of each row of the weight lies, for an input in row i.
        const Vec* rows[3] = {window.row(i + 1) + v, window.row(i) + v, window.row(i - 1) + v};
        const Size at = base + i * width * channels + v * LANES;
        const Norm norm(norm1_3E, channels, e + v * LANES);
        add_weight_products<HARDSWISH>(z1 + at, norm, rows, weight_sums[v]);
        input_gradient<HARDSWISH>(at, norm, weights[v], rows, sums[v]);
      }
    }
    for (Size v = 0; v < vecs; v++) {
      const Size c = e + v * LANES;
      for (Size k = 0; k < 9; k++) weight_sums[v][k].store(weight_sums_B9E + (9 * b + k) * channels + c);
      for (Size k = 0; k < 2; k++) sums[v][k].store(sums_B2E + (2 * b + k) * channels + c);
    }
  }

  // Two loops, since the sums of one and the weights of the other fill the registers.
  template <bool HARDSWISH>
  void add_weight_products(const float* z, const Norm& norm, const Vec* const* rows, std::array<Vec, 9>& sums) const {
    std::array<Vec, 9> own = sums;
    for (Size j = 0; j < width; j++) {
      prefetch_to_read(z + (j + width) * channels);
      const Vec a = activated<HARDSWISH>(norm(load(z + j * channels)));
      for (Size k = 0; k < 9; k++) own[k] = at::vec::fmadd(a, rows[k / 3][(j + 1 - k % 3) * Window::VECS], own[k]);
    }
    sums = own;
  }

  template <bool HARDSWISH>
  void input_gradient(Size at, const Norm& norm, const std::array<Vec, 9> weights, const Vec* const* rows,
                      std::array<Vec, 2>& sums) const {
    Vec total = sums[0], total_deviation = sums[1];
    for (Size j = 0; j < width; j++) {
      Vec sum(0.f);
      for (Size k = 0; k < 9; k++) sum = at::vec::fmadd(weights[k], rows[k / 3][(j + 1 - k % 3) * Window::VECS], sum);
      const Vec deviation = load(z1 + at + j * channels) - norm.mean;
      sum = sum * slope<HARDSWISH>(norm.of_deviation(deviation));
      sum.store(grad + at + j * channels);
      total = total + sum;
      total_deviation = at::vec::fmadd(sum, deviation, total_deviation);
    }
    sums = {total, total_deviation};
  }
};

template <bool HARDSWISH>
void channel_means_of(const float* z, const float* norm_3E, float* mean_BE, Size B, Size S, Size E, Size threads) {
  for_tasks<PASS>(B, E, threads, [=](Size b, Size e, Size vecs) {
    const float* image = z + b * S * E + e;
    sum_over_positions<1>(mean_BE + b * E + e, S, E, vecs, [=](Size v, Size s, auto& sums) {
      sums[0] = sums[0] + activated<HARDSWISH>(Norm(norm_3E, E, e + v * LANES)(load(image + s * E + v * LANES)));
    });
    for (Size c = e; c < e + vecs * LANES; c++) mean_BE[b * E + c] /= S;
  });
}

template <bool HARDSWISH>
void gated_of(const float* z, const float* norm_3E, const float* gate_BE, float* out, Size B, Size S, Size E,
              Size threads) {
  for_tasks<PASS>(B, E, threads, [=](Size b, Size e, Size vecs) {
    for (Size s = b * S; s < (b + 1) * S; s++)
      for (Size c = e; c < e + vecs * LANES; c += LANES) {
        const Vec a = activated<HARDSWISH>(Norm(norm_3E, E, c)(load(z + s * E + c)));
        (a * load(gate_BE + b * E + c)).store(out + s * E + c);
      }
  });
}

template <bool HARDSWISH>
void gated_backward_of(const float* grad, const float* z, const float* norm_3E, const float* gate_BE, float* out,
                       float* sums_B5E, Size B, Size S, Size E, Size threads) {
  for_tasks<PASS>(B, E, threads, [=](Size b, Size e, Size vecs) {
    sum_over_positions<5>(sums_B5E + 5 * b * E + e, S, E, vecs, [=](Size v, Size s, auto& sums) {
      const Size c = e + v * LANES, at = (b * S + s) * E + c;
      const Norm norm(norm_3E, E, c);
      const Vec deviation = load(z + at) - norm.mean, u = norm.of_deviation(deviation);
      const Vec g = load(grad + at), a = activated<HARDSWISH>(u), h = slope<HARDSWISH>(u), gh = g * h;
      (a * load(gate_BE + b * E + c)).store(out + at);
      sums[0] = at::vec::fmadd(g, a, sums[0]);
      sums[1] = sums[1] + gh;
      sums[2] = sums[2] + h;
      sums[3] = at::vec::fmadd(gh, deviation, sums[3]);
      sums[4] = at::vec::fmadd(h, deviation, sums[4]);
    });
  });
}

}  // namespace

extern "C" {

Size lanes() { return LANES; }

void moments(const float* z, float* out_B2E, Size B, Size H, Size W, Size E, Size threads) {
  for_tasks<PASS>(B, E, threads, [=](Size b, Size e, Size vecs) {
    Moments<PASS> moments;
    for (Size i = b * H; i < (b + 1) * H; i++) moments.add_row(z + i * W * E + e, W, E, vecs);
    moments.store(out_B2E + 2 * b * E + e, E, vecs);
  });
}

void depthwise(Size hardswish, const float* z, const float* norm_3E, const float* weight_9E, float* out,
               float* moments_B2E, Size B, Size H, Size W, Size E, Size threads) {
  const auto image = hardswish ? depthwise_image<true> : depthwise_image<false>;
  for_tasks<TILE>(B, E, threads, [=](Size b, Size e, Size vecs) {
    const Size at = b * H * W * E + e;
    image(z + at, norm_3E, weight_9E, out + at, moments_B2E + 2 * b * E + e, H, W, E, e, vecs);
  });
}

void channel_means(Size hardswish, const float* z, const float* norm_3E, float* mean_BE, Size B, Size S, Size E,
                   Size threads) {
  (hardswish ? channel_means_of<true> : channel_means_of<false>)(z, norm_3E, mean_BE, B, S, E, threads);
}

void gated(Size hardswish, const float* z, const float* norm_3E, const float* gate_BE, float* out, Size B, Size S,
           Size E, Size threads) {
  (hardswish ? gated_of<true> : gated_of<false>)(z, norm_3E, gate_BE, out, B, S, E, threads);
}

void gated_backward(Size hardswish, const float* grad, const float* z, const float* norm_3E, const float* gate_BE,
                    float* out, float* sums_B5E, Size B, Size S, Size E, Size threads) {
  (hardswish ? gated_backward_of<true> : gated_backward_of<false>)(grad, z, norm_3E, gate_BE, out, sums_B5E, B, S, E,
                                                                  threads);
}

void depthwise_backward(Size hardswish, float* grad, const float* z2, const float* norm2_3E, const float* gate_B2E,
                        const float* slopes_2E, const float* z1, const float* norm1_3E, const float* weight_9E,
                        float* weight_sums_B9E, float* sums_B2E, Size B, Size H, Size W, Size E, Size threads) {
  const DepthwiseBackward pass{grad,      z2,        norm2_3E,        gate_B2E, slopes_2E, z1, norm1_3E,
                               weight_9E, weight_sums_B9E, sums_B2E, H,        W,         E};
  for_tasks<TILE>(B, E, threads, [=](Size b, Size e, Size vecs) {
    if (hardswish) {
      pass.image<true>(b, e, vecs);
    } else {
      pass.image<false>(b, e, vecs);
    }
  });
}

void norm_backward(float* grad, const float* z, const float* mean_E, const float* slopes_3E, Size B, Size S, Size E,
                   Size threads) {
  for_tasks<PASS>(B, E, threads, [=](Size b, Size e, Size vecs) {
    for (Size s = b * S; s < (b + 1) * S; s++)
      for (Size c = e; c < e + vecs * LANES; c += LANES) {
        const Vec deviation = load(z + s * E + c) - load(mean_E + c);
        const Vec rest = at::vec::fmadd(deviation, load(slopes_3E + E + c), load(slopes_3E + 2 * E + c));
        at::vec::fmadd(load(grad + s * E + c), load(slopes_3E + c), rest).store(grad + s * E + c);
      }
  });
}
}
