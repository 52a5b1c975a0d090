// A convolution (or linear layer) and a BatchNorm with fixed statistics as
// one autograd node: the fold, the convolution and their backward.
//
// It computes what mmtune/functional.py does and keeps what that keeps, the
// input and the weight; docs/en/method.md has the formulas. Two plans, equal
// but for rounding:
//
// - fold the weight: convolve with w' = w * coeff, in backward made anew;
// - scale the map: convolve with w, as Eval does, and normalize the output in
//   place. Backward needs no output either: dX comes from dY = coeff * dZ,
//   and everything else from dw', which is taken from dZ itself.
//
// On a CPU, passes over dense float32 and float64 tensors are the loops of
// "One pass" below, which the compiler vectorizes. All else runs as ATen
// operators. There a batch norm with mean 0 and no bias multiplies by coeff,
// and its backward gives both the chain through that and gamma's gradient:
// one operator in the place of four.

#include <ATen/Dispatch.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/native_batch_norm.h>
#include <ATen/ops/native_batch_norm_backward.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <c10/util/accumulate.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/utils/pybind.h>

#include "clamp.h"
#include "guard.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

namespace {

using at::IntArrayRef;
using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Ints = std::vector<int64_t>;
using MaybeTensor = std::optional<Tensor>;

// The last is what asking for kScale in float16 turns into.
enum Plan : int64_t { kChoose, kFold, kScale, kScaleHalf };

// The map is scaled where it has at most this many elements for each of the
// weight's. tests/benchmarks/plans.py on one core of an AMD EPYC that others
// used as well (torch 2.13, float32, two images): by elements of the map for
// each of the weight's, the time of folding and of scaling as a share of
// Eval's, the least of two runs; another run is up to 0.05 off.
//
//     512 channels, 1x1   0.06: 1.09, 0.98   0.25: 1.08, 1.03   1: 1.01, 1.00
//     256 channels, 1x1   0.13: 0.99, 0.94      2: 0.90, 0.90   8: 0.79, 0.93
//      64 channels, 1x1   0.5:  0.93, 0.89      2: 0.93, 0.88  32: 0.81, 0.89
//     256 channels, 3x3   0.01: 1.05, 0.98   0.06: 1.11, 1.01
//      64 channels, 3x3   0.06: 0.97, 0.95    0.9: 0.96, 0.94  3.6: 0.97, 0.99
//      depthwise,   3x3   3.6:  0.95, 0.94     14: 0.93, 0.94  57: 0.89, 0.95
//
// Without gradients (--no-gradient):
//
//     512 channels, 1x1   0.06: 1.12, 0.97   0.25: 1.13, 0.97   1: 0.97, 0.99
//     256 channels, 1x1   0.13: 1.02, 0.91    0.5: 0.98, 0.94   2: 0.91, 0.93
//      64 channels, 1x1   0.5:  0.83, 0.78      2: 0.87, 0.84   8: 0.83, 0.89
//     256 channels, 3x3   0.06: 1.54, 1.05   0.22: 1.10, 0.98
//      64 channels, 3x3   0.06: 0.99, 0.93    0.9: 0.97, 0.99 3.6: 0.94, 0.95
constexpr double kMapPerWeight = 1;
// In bfloat16 (--dtype bfloat16) the loops do not serve for a map.
//
//     512 channels, 1x1   0.06: 1.06, 1.05   0.25: 1.04, 1.08   1: 1.04, 1.09
//     256 channels, 3x3   0.01: 1.16, 1.12   0.06: 1.07, 1.07
//      64 channels, 1x1   0.5:  0.99, 1.14     32: 0.91, 1.19
constexpr double kBrainMapPerWeight = 1. / 16;

Tensor or_undefined(const MaybeTensor& tensor) {
  return tensor.has_value() ? *tensor : Tensor();
}

MaybeTensor or_none(const Tensor& tensor) {
  return tensor.defined() ? MaybeTensor(tensor) : std::nullopt;
}

// Tensor::to asks the dispatcher, which takes as long as a small pass.
Tensor cast(const Tensor& tensor, at::ScalarType dtype) {
  return !tensor.defined() || tensor.scalar_type() == dtype ? tensor
                                                            : tensor.to(dtype);
}

// --------------------------------------------------------------------------
// What is done with the weight
// --------------------------------------------------------------------------

// A convolution by its geometry, or x @ weight.T where that is empty.
struct LinearMap {
  Ints stride, padding, dilation, output_padding;
  bool transposed;
  int64_t groups;

  bool is_product() const {
    return stride.empty();
  }

  int64_t out_channels(const Tensor& weight) const {
    return transposed ? weight.size(1) * groups : weight.size(0);
  }

  Tensor run(const Tensor& x, const Tensor& weight, const Tensor& bias) const {
    if (!is_product()) {
      return at::convolution(x, weight, or_none(bias), stride, padding,
                             dilation, transposed, output_padding, groups);
    }
    return bias.defined() ? at::addmm(bias, x, weight.t())
                          : x.mm(weight.t());
  }

  // The gradients of the input and of the weight, where they are needed.
  std::pair<Tensor, Tensor> gradients(const Tensor& grad, const Tensor& x,
                                      const Tensor& weight, bool needs_x,
                                      bool needs_weight) const {
    if (is_product()) {
      Tensor grad_weight;
      if (needs_weight) {
        // In which order decides the strides of the result: as torch's own.
        grad_weight =
            weight.stride(0) == weight.size(1) && weight.stride(1) == 1
            ? grad.t().mm(x)
            : x.t().mm(grad).t();
      }
      return {needs_x ? grad.mm(weight) : Tensor(), grad_weight};
    }
    auto [grad_x, grad_weight, _] = at::convolution_backward(
        grad, x, weight, at::OptionalIntArrayRef(), stride, padding, dilation,
        transposed, output_padding, groups, {needs_x, needs_weight, false});
    return {grad_x, grad_weight};
  }

  // The gradient of the input without the input, which
  // at::convolution_backward asks for: the convolution that it is.
  Tensor input_gradient(const Tensor& grad, const Tensor& weight,
                        IntArrayRef input_shape) const {
    if (is_product()) {
      return grad.mm(weight);
    }
    Ints adjust(stride.size(), 0);
    if (!transposed) {
      for (size_t i = 0; i < adjust.size(); i++) {
        adjust[i] = input_shape[i + 2] - (grad.size(i + 2) - 1) * stride[i] +
            2 * padding[i] - dilation[i] * (weight.size(i + 2) - 1) - 1;
      }
    }
    Tensor gradient =
        at::convolution(grad, weight, std::nullopt, stride, padding, dilation,
                        !transposed, adjust, groups);
    if (gradient.sizes() == input_shape) {
      return gradient;
    }
    // An output padding of a stride or more gives positions beyond those of
    // the input. Copied, to lie as densely as torch's own gradient.
    for (size_t i = 0; i < adjust.size(); i++) {
      gradient = gradient.narrow(i + 2, 0, input_shape[i + 2]);
    }
    return gradient.clone();
  }

  double output_numel(const Tensor& x, const Tensor& weight) const {
    double numel = static_cast<double>(x.size(0)) *
        static_cast<double>(out_channels(weight));
    for (size_t i = 0; i < stride.size(); i++) {
      const int64_t in = x.size(i + 2);
      const int64_t reach = dilation[i] * (weight.size(i + 2) - 1) + 1;
      numel *= static_cast<double>(
          transposed
              ? (in - 1) * stride[i] - 2 * padding[i] + reach +
                  output_padding[i]
              : (in + 2 * padding[i] - reach) / stride[i] + 1);
    }
    return numel;
  }
};

// One number for each dimension, as torch::convolution takes them.
using Setting = std::variant<Ints, int64_t>;

Ints expand(Setting setting, int64_t dims, const char* name) {
  Ints numbers = std::holds_alternative<int64_t>(setting)
      ? Ints{std::get<int64_t>(setting)}
      : std::get<Ints>(std::move(setting));
  if (numbers.size() == 1) {
    numbers.resize(dims, numbers[0]);
  }
  TORCH_CHECK(static_cast<int64_t>(numbers.size()) == dims, "expected ", name,
              " to be a single integer value or a list of ", dims,
              " values, but got ", IntArrayRef(numbers));
  return numbers;
}

// What would be divided by; at::convolution says more.
void check(const LinearMap& map, const Tensor& weight) {
  for (int64_t stride : map.stride) {
    TORCH_CHECK(stride > 0, "non-positive stride is not supported");
  }
  TORCH_CHECK(map.groups > 0, "non-positive groups is not supported");
  TORCH_CHECK(!map.transposed || weight.size(0) % map.groups == 0,
              "expected weight to be divisible by ", map.groups,
              " at dimension 0, but got weight of size ", weight.sizes());
}

Plan choose(const LinearMap& map, const Tensor& x, const Tensor& weight) {
  // In float16 dw' has fewer digits than Eval's dw where coeff is large.
  if (x.scalar_type() == at::kHalf) {
    return kScale;
  }
  const double most =
      x.scalar_type() == at::kBFloat16 ? kBrainMapPerWeight : kMapPerWeight;
  return map.output_numel(x, weight) <=
          most * static_cast<double>(weight.numel())
      ? kScale
      : kFold;
}

// --------------------------------------------------------------------------
// Layouts
// --------------------------------------------------------------------------

// What at::empty and at::empty_like give on a CPU for dense tensors, without
// the dispatcher, which takes as long as a small pass.
Tensor make(IntArrayRef sizes, at::ScalarType dtype) {
  return Tensor(at::detail::empty_cpu(sizes, dtype));
}

Tensor make_like(const Tensor& tensor) {
  return Tensor(at::detail::empty_strided_cpu(
      tensor.sizes(), tensor.strides(), tensor.scalar_type()));
}

// How a dense tensor lies in memory, by channels: (groups, outer, channels,
// inner), where channel number ``group * channels + channel`` multiplies.
struct Rows {
  int64_t groups, outer, channels, inner;
};

bool is_channels_last(const Tensor& tensor) {
  return tensor.is_contiguous(at::MemoryFormat::ChannelsLast) ||
      tensor.is_contiguous(at::MemoryFormat::ChannelsLast3d);
}

bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t i = 0; i < a.dim(); i++) {
    // With one element a dimension's stride says nothing.
    if (a.size(i) != 1 && a.stride(i) != b.stride(i)) {
      return false;
    }
  }
  return true;
}

// Of a weight, or of its gradient, in any order of the dimensions; none where
// that cannot be said so.
std::optional<Rows> weight_rows(const Tensor& weight, const LinearMap& map) {
  const int64_t numel = weight.numel();
  if (!weight.is_non_overlapping_and_dense()) {
    return std::nullopt;
  }
  if (numel == 0) {
    return Rows{1, 0, map.out_channels(weight), 1};
  }
  // In a dense tensor a stride is the size of all that lies further in.
  const auto along = [&](int64_t channels, int64_t stride) {
    return channels == 1
        ? Rows{1, 1, 1, numel}
        : Rows{1, numel / (channels * stride), channels, stride};
  };
  const int64_t first = weight.size(0), second = weight.size(1);
  if (!map.transposed) {
    return along(first, weight.stride(0));
  }
  if (map.groups == 1) {
    return along(second, weight.stride(1));
  }
  const int64_t inputs = first / map.groups;
  const int64_t group = inputs * weight.stride(0);
  if (second == 1) {
    return along(map.groups, group);
  }
  if (first * weight.stride(0) != numel) {
    return std::nullopt;
  }
  return Rows{map.groups, group / (second * weight.stride(1)), second,
              weight.stride(1)};
}

// The weight with the dimensions of what multiplies it, and the shape in which
// a number for each channel does.
Tensor by_group(const Tensor& weight, const LinearMap& map) {
  return map.transposed ? weight.unflatten(0, {map.groups, -1}) : weight;
}

Ints channels_shape(const Tensor& weight, const LinearMap& map) {
  Ints shape(weight.dim(), 1);
  if (map.transposed) {
    shape[1] = weight.size(1);
    shape.insert(shape.begin(), map.groups);
  } else {
    shape[0] = weight.size(0);
  }
  return shape;
}

// The tensor, or a copy, of which there are rows.
Tensor in_rows(const Tensor& weight, const LinearMap& map) {
  if (weight_rows(weight, map)) {
    return weight;
  }
  // Dense, and in the weight's own order if there are rows of that.
  const Tensor dense = weight.clone();
  return weight_rows(dense, map) ? dense : dense.contiguous();
}

// The tensor in the strides of another, in those of dimensions of size 1 as
// well: from them kernels tell channels_last, by which they choose the strides
// of their results.
Tensor strided_as(const Tensor& tensor, const Tensor& like) {
  if (tensor.strides() == like.strides() ||
      !like.is_non_overlapping_and_dense()) {
    return tensor;
  }
  if (same_strides(tensor, like)) {
    return tensor.as_strided(like.sizes(), like.strides());
  }
  return at::empty_strided(like.sizes(), like.strides(), tensor.options())
      .copy_(tensor);
}

std::optional<Rows> map_rows(const Tensor& map) {
  const int64_t pixels = c10::multiply_integers(map.sizes().slice(2));
  if (map.is_contiguous()) {
    return Rows{1, map.size(0), map.size(1), pixels};
  }
  if (is_channels_last(map)) {
    return Rows{1, map.size(0) * pixels, map.size(1), 1};
  }
  return std::nullopt;
}

// As (batch, channels, pixels), the shape that a batch norm takes.
Tensor as_map(const Tensor& tensor, const Rows& rows) {
  const auto [groups, outer, channels, inner] = rows;
  if (groups == 1) {
    return tensor.as_strided({outer, channels, inner},
                             {channels * inner, inner, 1});
  }
  return tensor
      .as_strided({groups, outer, channels, inner},
                  {outer * channels * inner, channels * inner, inner, 1})
      .transpose(0, 1)
      .reshape({outer, groups * channels, inner});
}

// The inverse, in the shape and the strides of ``like``, whose rows they are.
Tensor from_map(Tensor map, const Rows& rows, const Tensor& like) {
  if (rows.groups > 1) {
    map = map.view({rows.outer, rows.groups, rows.channels, rows.inner})
              .transpose(0, 1)
              .contiguous();
  }
  return map.as_strided(like.sizes(), like.strides());
}

// --------------------------------------------------------------------------
// One pass
// --------------------------------------------------------------------------

constexpr int64_t kGrain = 32768;
// What any x86-64 and 64-bit Arm has. Left to itself, a compiler may not add
// up a row in several sums at a time.
template <typename T>
using Vector [[gnu::vector_size(16)]] = T;
constexpr int64_t kVectors = 4;
// How many terms of a sum are added up in T before they go to a double.
constexpr int64_t kTerms = 32;

// Sums of a, or of a * b, and at the same time out = a * factor. ``out`` may
// be ``a``: what is read is read before it is written.
template <typename T, bool kDot, bool kWrite>
double reduce_line(const T* a, const T* b, T* out, T factor, int64_t size) {
  constexpr int64_t kEach = sizeof(Vector<T>) / sizeof(T);
  const auto step = [&](int64_t k, Vector<T>& sum) {
    Vector<T> value, with;
    std::memcpy(&value, a + k, sizeof(value));
    if constexpr (kDot) {
      std::memcpy(&with, b + k, sizeof(with));
      sum += value * with;
    } else {
      sum += value;
    }
    if constexpr (kWrite) {
      value *= factor;
      std::memcpy(out + k, &value, sizeof(value));
    }
  };
  double total = 0;
  const auto add = [&](const Vector<T>& sum) {
    for (int64_t j = 0; j < kEach; j++) {
      total += sum[j];
    }
  };
  int64_t k = 0;
  while (k + kVectors * kEach <= size) {
    Vector<T> sums[kVectors] = {};
    for (int64_t term = 0; term < kTerms && k + kVectors * kEach <= size;
         term++, k += kVectors * kEach) {
      for (int64_t j = 0; j < kVectors; j++) {
        step(k + j * kEach, sums[j]);
      }
    }
    add((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
  Vector<T> rest = {};
  for (; k + kEach <= size; k += kEach) {
    step(k, rest);
  }
  add(rest);
  for (; k < size; k++) {
    const T value = a[k];
    total += kDot ? value * b[k] : value;
    if constexpr (kWrite) {
      out[k] = value * factor;
    }
  }
  return total;
}

// The same for each channel. A channel belongs to one thread, so that the
// order of its sum does not depend on how many there are.
template <typename T, bool kDot, bool kWrite>
void reduce(const T* a, const T* b, T* out, const T* coeff, double* totals,
            const Rows& rows) {
  const auto [groups, outer, channels, inner] = rows;
  const int64_t each = std::max<int64_t>(outer * inner, 1);
  std::fill(totals, totals + groups * channels, 0.);
  at::parallel_for(
      0, groups * channels, std::max<int64_t>(kGrain / each, 1),
      [&, outer = outer, channels = channels, inner = inner](
          int64_t begin, int64_t end) {
        while (begin < end) {
          const int64_t group = begin / channels;
          const int64_t stop = std::min(end, (group + 1) * channels);
          for (int64_t i = 0; i < outer; i++) {
            // Of the group's first channel; may lie before the tensor's
            // part that this thread sees.
            const int64_t row =
                ((group * outer + i) * channels - group * channels) * inner;
            if (inner == 1) {
              for (int64_t c = begin; c < stop; c++) {
                const T value = a[row + c];
                totals[c] += kDot ? value * b[row + c] : value;
                if constexpr (kWrite) {
                  out[row + c] = value * coeff[c];
                }
              }
            } else {
              for (int64_t c = begin; c < stop; c++) {
                const int64_t at = row + c * inner;
                totals[c] += reduce_line<T, kDot, kWrite>(
                    a + at, kDot ? b + at : nullptr, kWrite ? out + at : out,
                    kWrite ? coeff[c] : T(0), inner);
              }
            }
          }
          begin = stop;
        }
      });
}

// out = a * coeff, channel by channel; ``out`` may be ``a``.
template <typename T>
void scale(const T* a, T* out, const T* coeff, const Rows& rows) {
  const auto [groups, outer, channels, inner] = rows;
  const int64_t line = inner == 1 ? channels : inner;
  const int64_t lines = groups * outer * (inner == 1 ? 1 : channels);
  at::parallel_for(
      0, lines, std::max<int64_t>(kGrain / std::max<int64_t>(line, 1), 1),
      [&, outer = outer, channels = channels, inner = inner](
          int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
          const T* from = a + i * line;
          T* to = out + i * line;
          if (inner == 1) {
            const T* factors = coeff + i / outer * channels;
            for (int64_t k = 0; k < line; k++) {
              to[k] = from[k] * factors[k];
            }
          } else {
            const T factor =
                coeff[i / (outer * channels) * channels + i % channels];
            for (int64_t k = 0; k < line; k++) {
              to[k] = from[k] * factor;
            }
          }
        }
      });
}

// --------------------------------------------------------------------------
// The normalization
// --------------------------------------------------------------------------

bool is_half(at::ScalarType dtype) {
  return dtype == at::kHalf || dtype == at::kBFloat16;
}

// What the parameters promote to, at least float32: half precision would
// lose the variance.
at::ScalarType common_dtype(std::initializer_list<const Tensor*> tensors) {
  auto dtype = at::kFloat;
  for (const Tensor* tensor : tensors) {
    if (tensor->defined()) {
      dtype = c10::promoteTypes(dtype, tensor->scalar_type());
    }
  }
  return dtype;
}

// Whether the loops of this file serve: not for what a subclass or a dispatch
// mode stands behind, which must see operators.
bool serves(const Tensor& tensor, at::ScalarType dtype) {
  return !tensor.defined() ||
      (tensor.scalar_type() == dtype && tensor.is_cpu() &&
       tensor.layout() == at::kStrided && !tensor.is_neg() &&
       !tensor._is_zerotensor() &&
       !tensor.key_set().has(c10::DispatchKey::Python));
}

// The numbers of a normalization for the loops, made in double precision.
struct Factors {
  std::vector<double> rstd, shift;
  // In the dtype of what it multiplies.
  std::variant<std::vector<float>, std::vector<double>> coeff;
};

template <typename T>
Factors make_factors(const Tensor& constants, const Tensor& weight,
                     const Tensor& bias, double eps) {
  const int64_t channels = constants.size(1);
  const T* mean = constants.const_data_ptr<T>();
  const T* var = mean + channels;
  std::vector<double> rstd(channels), shift(channels);
  std::vector<T> coeff(channels);
  for (int64_t c = 0; c < channels; c++) {
    rstd[c] = 1 / std::sqrt(var[c] + eps);
    shift[c] = -static_cast<double>(mean[c]);
  }
  if (bias.defined()) {
    const T* add = bias.const_data_ptr<T>();
    for (int64_t c = 0; c < channels; c++) {
      shift[c] += add[c];
    }
  }
  const T* gamma = weight.defined() ? weight.const_data_ptr<T>() : nullptr;
  for (int64_t c = 0; c < channels; c++) {
    coeff[c] = static_cast<T>(gamma ? rstd[c] * gamma[c] : rstd[c]);
  }
  return {std::move(rstd), std::move(shift), std::move(coeff)};
}

// A batch norm with fixed statistics, in one dtype, and the bias before it.
struct Norm {
  // Those that are undefined count as 1 (weight) or 0.
  Tensor weight, bias, conv_bias;
  // Mean and variance: (2, channels).
  Tensor constants;
  double eps;
  // Whether the loops serve for parameters.
  bool looped;

  Norm(const Tensor& conv_weight, const Tensor& conv_bias_,
       const Tensor& weight_, const Tensor& bias_, const Tensor& constants_,
       double eps_, const Tensor& zero = Tensor())
      : constants(constants_), eps(eps_), zero_(zero) {
    const auto dtype = constants.scalar_type();
    const auto prepare = [&](const Tensor& tensor) {
      return tensor.defined() ? cast(tensor, dtype).contiguous() : tensor;
    };
    weight = prepare(weight_);
    bias = prepare(bias_);
    conv_bias = prepare(conv_bias_);
    looped = (dtype == at::kFloat || dtype == at::kDouble) &&
        !c10::impl::TorchDispatchModeTLS::any_modes_set();
    for (const Tensor* tensor : std::initializer_list<const Tensor*>{
             &conv_weight, &conv_bias, &weight, &bias, &constants}) {
      looped = looped && serves(*tensor, dtype);
    }
  }

  int64_t channels() const {
    return constants.size(1);
  }

  // A map in a dtype that a batch norm with these parameters takes: theirs,
  // or half precision where they are float32.
  Tensor to_take(const Tensor& map) const {
    const auto dtype = constants.scalar_type();
    return is_half(map.scalar_type()) && dtype == at::kFloat
        ? map
        : cast(map, dtype);
  }

  // ``tensor * coeff`` where the second dimension has the channels; with
  // ``mean`` and ``bias``, the whole normalization.
  Tensor apply(const Tensor& tensor, const Tensor& mean,
               const Tensor& bias) const {
    return std::get<0>(at::native_batch_norm(
        tensor, or_none(weight), or_none(bias), mean, constants.select(0, 1),
        false, 0., eps));
  }

  // Of ``apply`` without ``bias``: the gradients of ``tensor`` and weight.
  std::pair<Tensor, Tensor> gradients(const Tensor& grad, const Tensor& tensor,
                                      const Tensor& mean, bool needs_tensor,
                                      bool needs_weight) const {
    // Some kernels ask whether these are empty, not whether they are given.
    const Tensor none = constants.select(0, 0).narrow(0, 0, 0);
    // Where channels lie next to each other, some read a mean as if it did.
    const Tensor dense = tensor.stride(1) == 1 ? mean.contiguous() : mean;
    auto [grad_tensor, grad_weight, _] = at::native_batch_norm_backward(
        grad, tensor, or_none(weight), dense, constants.select(0, 1), none,
        none, false, eps, {needs_tensor, needs_weight, false});
    return {grad_tensor, grad_weight};
  }

  Tensor mean() const {
    return constants.select(0, 0);
  }

  // One zero for all channels: a vector of them, kept for backward, would be
  // half as much as the statistics.
  Tensor zeros() const {
    if (!zero_.defined()) {
      zero_ = at::zeros({1}, constants.options());
    }
    return zero_.expand({channels()});
  }

  // The zero, if it was asked for.
  const Tensor& zero() const {
    return zero_;
  }

  // The bias before the normalization, as a map of one pixel.
  Tensor bias_map() const {
    return (conv_bias.defined() ? conv_bias : zeros()).view({1, channels()});
  }

  // Only where the loops serve.
  const Factors& factors() const {
    if (!factors_) {
      AT_DISPATCH_FLOATING_TYPES(constants.scalar_type(), "factors", [&] {
        factors_ = make_factors<scalar_t>(constants, weight, conv_bias, eps);
      });
    }
    return *factors_;
  }

  template <typename T>
  const T* coeff() const {
    return std::get<std::vector<T>>(factors().coeff).data();
  }

 private:
  mutable Tensor zero_;
  mutable std::optional<Factors> factors_;
};

// The folded weight, in the weight's strides. Where the weight is of the
// convolution's own half precision, so is the result.
Tensor fold_weight(const Tensor& weight, const Rows& rows, const Norm& norm) {
  if (!norm.looped) {
    return from_map(norm.apply(as_map(weight, rows), norm.zeros(), Tensor()),
                    rows, weight);
  }
  Tensor folded = make_like(weight);
  AT_DISPATCH_FLOATING_TYPES(weight.scalar_type(), "fold_weight", [&] {
    scale(weight.const_data_ptr<scalar_t>(),
          folded.mutable_data_ptr<scalar_t>(), norm.coeff<scalar_t>(), rows);
  });
  return folded;
}

Tensor fold_bias(const Norm& norm) {
  if (!norm.looped) {
    return norm.apply(norm.bias_map(), norm.mean(), norm.bias).view(-1);
  }
  const auto dtype = norm.constants.scalar_type();
  Tensor folded = make({norm.channels()}, dtype);
  AT_DISPATCH_FLOATING_TYPES(dtype, "fold_bias", [&] {
    const scalar_t* coeff = norm.coeff<scalar_t>();
    const std::vector<double>& shift = norm.factors().shift;
    const scalar_t* bias =
        norm.bias.defined() ? norm.bias.const_data_ptr<scalar_t>() : nullptr;
    scalar_t* out = folded.mutable_data_ptr<scalar_t>();
    for (int64_t c = 0; c < norm.channels(); c++) {
      out[c] = static_cast<scalar_t>(shift[c] * coeff[c] +
                                     (bias ? bias[c] : 0.));
    }
  });
  return folded;
}

// Z from Y, as stock's batch norm does it, and bit for bit.
Tensor normalize(const Tensor& map, const Norm& norm) {
  if (!norm.looped || !serves(map, map.scalar_type()) ||
      !map.is_same(norm.to_take(map))) {
    return cast(norm.apply(norm.to_take(map), norm.mean(), norm.bias),
                map.scalar_type());
  }
  // In place: the kernel reads each element before it writes it.
  Tensor out = map;
  Tensor unused = make({0}, norm.constants.scalar_type());
  at::native_batch_norm_out(out, unused, unused, map,
                            or_none(norm.weight), or_none(norm.bias),
                            norm.mean(), norm.constants.select(0, 1), false,
                            0., norm.eps);
  return out;
}

// --------------------------------------------------------------------------
// The node
// --------------------------------------------------------------------------

struct Block {
  LinearMap map;
  Plan plan;
  double eps;
  at::ScalarType bn_bias_dtype;
  Ints input_shape;

  // As plain lists: the context keeps nothing else, and a compiled backward
  // takes nothing else.
  void save(AutogradContext* ctx) const {
    Ints numbers = {plan, map.transposed, map.groups,
                    static_cast<int64_t>(bn_bias_dtype),
                    static_cast<int64_t>(map.stride.size())};
    for (const Ints* part : {&map.stride, &map.padding, &map.dilation,
                             &map.output_padding, &input_shape}) {
      numbers.insert(numbers.end(), part->begin(), part->end());
    }
    ctx->saved_data["block"] = std::move(numbers);
    ctx->saved_data["eps"] = eps;
  }

  static Block load(const AutogradContext* ctx) {
    const Ints numbers = ctx->saved_data.at("block").toIntVector();
    auto next = numbers.begin() + 5;
    const auto take = [&](int64_t size) {
      Ints part(next, next + size);
      next += size;
      return part;
    };
    const int64_t dims = numbers[4];
    Block block;
    block.plan = static_cast<Plan>(numbers[0]);
    block.map.transposed = numbers[1];
    block.map.groups = numbers[2];
    block.bn_bias_dtype = static_cast<at::ScalarType>(numbers[3]);
    block.map.stride = take(dims);
    block.map.padding = take(dims);
    block.map.dilation = take(dims);
    block.map.output_padding = take(dims);
    block.input_shape.assign(next, numbers.end());
    block.eps = ctx->saved_data.at("eps").toDouble();
    return block;
  }
};

// Operators here are not cast; below, they are not recorded either.
struct Uncast {
  c10::impl::ExcludeDispatchKeyGuard no_autocast{
      c10::autocast_dispatch_keyset};
};

struct Below {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  Uncast uncast;
};

// Whether what is done to a tensor has to be seen operator by operator: in a
// vectorized backward (is_grads_batched), and where it has a tangent.
bool is_followed(const Tensor& tensor) {
  constexpr c10::DispatchKeySet keys{
      c10::DispatchKey::FuncTorchBatched,
      c10::DispatchKey::FuncTorchGradWrapper};
  return tensor.defined() &&
      (tensor.key_set().has_any(keys) || !tensor.has_storage() ||
       tensor._fw_grad(0).defined());
}

// A copy: a training step may change the statistics before backward.
Tensor make_constants(const Tensor& mean, const Tensor& var,
                      at::ScalarType dtype) {
  if (c10::impl::TorchDispatchModeTLS::any_modes_set() ||
      !serves(mean, dtype) || !serves(var, dtype) || !mean.is_contiguous() ||
      !var.is_contiguous()) {
    return at::stack({mean, var}).to(dtype);
  }
  Tensor constants = make({2, mean.numel()}, dtype);
  auto* to = static_cast<char*>(constants.mutable_data_ptr());
  const size_t size = mean.nbytes();
  std::memcpy(to, mean.const_data_ptr(), size);
  std::memcpy(to + size, var.const_data_ptr(), size);
  return constants;
}

// The weight in a dtype that a batch norm with these parameters takes. One in
// half precision stays so if its fold would end there in any case: it is
// folded in float32 all the same.
Tensor to_fold(const Tensor& weight, at::ScalarType dtype, const Norm& norm,
               const LinearMap& map) {
  const bool stays = is_half(dtype) && weight.scalar_type() == dtype &&
      norm.constants.scalar_type() == at::kFloat;
  const Tensor dense =
      stays ? weight : cast(weight, norm.constants.scalar_type());
  return in_rows(dense, map);
}

Tensor run(const Block& block, const Tensor& x, const Tensor& weight,
           const Norm& norm) {
  const auto dtype = x.scalar_type();
  if (block.plan != kFold) {
    return normalize(block.map.run(x, cast(weight, dtype),
                                   cast(norm.conv_bias, dtype)),
                     norm);
  }
  const Tensor dense = to_fold(weight, dtype, norm, block.map);
  const Tensor folded = strided_as(
      fold_weight(dense, *weight_rows(dense, block.map), norm), weight);
  return block.map.run(x, cast(folded, dtype), cast(fold_bias(norm), dtype));
}

struct Needs {
  bool x, weight, bias, bn_weight, bn_bias;
};

// What backward has at hand.
struct Saved {
  Tensor x, weight, bias, bn_weight, constants, zero;
};

struct Gradients {
  Tensor x, weight, bias, bn_weight, bn_bias;
};

// The gradient of the map before the scaling, coeff * dZ, and the sum of dZ
// by channels where the same pass gives it.
std::pair<Tensor, Tensor> scale_gradient(const Tensor& grad, const Norm& norm,
                                         bool needs_sum) {
  const auto dtype = norm.constants.scalar_type();
  if (!norm.looped || !serves(grad, dtype)) {
    const Tensor scaled =
        norm.apply(norm.to_take(grad), norm.zeros(), Tensor());
    return {cast(scaled, grad.scalar_type()), Tensor()};
  }
  const auto dense_rows = map_rows(grad);
  const Tensor dense = dense_rows ? grad : grad.contiguous();
  const Rows rows = dense_rows ? *dense_rows : *map_rows(dense);
  Tensor scaled = make_like(dense);
  Tensor sum;
  AT_DISPATCH_FLOATING_TYPES(dtype, "scale_gradient", [&] {
    const scalar_t* coeff = norm.coeff<scalar_t>();
    const scalar_t* from = dense.const_data_ptr<scalar_t>();
    scalar_t* to = scaled.mutable_data_ptr<scalar_t>();
    if (needs_sum) {
      std::vector<double> totals(norm.channels());
      reduce<scalar_t, false, true>(from, nullptr, to, coeff, totals.data(),
                                    rows);
      sum = make({norm.channels()}, dtype);
      std::copy(totals.begin(), totals.end(),
                sum.mutable_data_ptr<scalar_t>());
    } else {
      scale(from, to, coeff, rows);
    }
  });
  return {scaled, sum};
}

// The sum of dZ over all but the channels, in the dtype of the parameters: a
// convolution's kernel would sum less exactly.
Tensor sum_gradient(const Tensor& grad, const Norm& norm) {
  const auto dtype = norm.constants.scalar_type();
  const auto rows = map_rows(grad);
  if (!norm.looped || !serves(grad, dtype) || !rows) {
    Ints others = {0};
    for (int64_t i = 2; i < grad.dim(); i++) {
      others.push_back(i);
    }
    return grad.sum(others, false, dtype);
  }
  Tensor sum = make({norm.channels()}, dtype);
  AT_DISPATCH_FLOATING_TYPES(dtype, "sum_gradient", [&] {
    std::vector<double> totals(norm.channels());
    reduce<scalar_t, false, false>(grad.const_data_ptr<scalar_t>(), nullptr,
                                   nullptr, nullptr, totals.data(), *rows);
    std::copy(totals.begin(), totals.end(), sum.mutable_data_ptr<scalar_t>());
  });
  return sum;
}

// From the gradients of the folded weight (which is overwritten, or undefined
// where nothing needs it) and of the folded bias to those of the parameters.
void chain_looped(const Tensor& folded, const Tensor& sum,
                  const Tensor& weight, const Rows& rows, const Norm& norm,
                  const Needs& needs, Gradients& result) {
  AT_DISPATCH_FLOATING_TYPES(weight.scalar_type(), "chain", [&] {
    const Factors& factors = norm.factors();
    const int64_t channels = norm.channels();
    const scalar_t* coeff = norm.coeff<scalar_t>();
    const scalar_t* sums =
        sum.defined() ? sum.const_data_ptr<scalar_t>() : nullptr;
    if (needs.bn_weight) {
      // sum(dZ * Y) = <w, dw'>: the reason why Y need not be kept.
      std::vector<double> dots(channels);
      scalar_t* grad = folded.mutable_data_ptr<scalar_t>();
      const scalar_t* with = weight.const_data_ptr<scalar_t>();
      if (needs.weight) {
        reduce<scalar_t, true, true>(grad, with, grad, coeff, dots.data(),
                                     rows);
      } else {
        reduce<scalar_t, true, false>(grad, with, nullptr, nullptr,
                                      dots.data(), rows);
      }
      result.bn_weight = make({channels}, weight.scalar_type());
      scalar_t* out = result.bn_weight.mutable_data_ptr<scalar_t>();
      for (int64_t c = 0; c < channels; c++) {
        out[c] = static_cast<scalar_t>(
            (dots[c] + sums[c] * factors.shift[c]) * factors.rstd[c]);
      }
    } else if (needs.weight) {
      scalar_t* grad = folded.mutable_data_ptr<scalar_t>();
      scale(grad, grad, coeff, rows);
    }
    if (needs.weight) {
      result.weight = folded;
    }
    if (needs.bias) {
      result.bias = make({channels}, weight.scalar_type());
      scalar_t* out = result.bias.mutable_data_ptr<scalar_t>();
      for (int64_t c = 0; c < channels; c++) {
        out[c] = sums[c] * coeff[c];
      }
    }
  });
}

void chain_by_operators(const Tensor& folded, const Tensor& sum,
                        const Tensor& weight, const Rows& rows,
                        const Norm& norm, const Needs& needs,
                        Gradients& result) {
  if (needs.weight || needs.bn_weight) {
    const auto [grad, grad_scale] = norm.gradients(
        as_map(folded, rows), as_map(weight, rows), norm.zeros(),
        needs.weight, needs.bn_weight);
    if (needs.weight) {
      result.weight = from_map(grad, rows, folded);
    }
    result.bn_weight = grad_scale;
  }
  if (needs.bias || needs.bn_weight) {
    const auto [grad, grad_scale] = norm.gradients(
        sum.view({1, -1}), norm.bias_map(), norm.mean(), needs.bias,
        needs.bn_weight);
    if (needs.bias) {
      result.bias = grad.view(-1);
    }
    if (needs.bn_weight) {
      result.bn_weight = result.bn_weight + grad_scale;
    }
  }
}

Tensor coefficients(const Tensor& constants, const Tensor& weight,
                    double eps) {
  const Tensor rstd = (constants.select(0, 1) + eps).rsqrt();
  return weight.defined() ? rstd * weight : rstd;
}

// A map in half precision, channel by channel, in its own dtype.
Tensor times(const Tensor& map, const Tensor& factors) {
  Ints shape(map.dim(), 1);
  shape[1] = map.size(1);
  return (map * factors.view(shape)).to(map.scalar_type());
}

// By which dZ is multiplied before dw' is taken, about coeff: where coeff is
// large, dw' could fall below the numbers of float16 that dw is one of. Below
// 1 the gradient of gamma would fall so. Multiplying by them rounds nothing.
Tensor powers_of_two(const Tensor& coeff) {
  return coeff.detach().abs().log2().round().nan_to_num(0, 0, 0).clamp(0, 15).exp2();
}

Gradients gradients(const Block& block, Tensor grad, const Saved& saved,
                    const Needs& needs) {
  const Below below;
  const auto dtype = grad.scalar_type();
  const Norm norm(saved.weight, saved.bias, saved.bn_weight, Tensor(),
                  saved.constants, block.eps, saved.zero);
  Tensor dense = to_fold(saved.weight, dtype, norm, block.map);
  Rows rows = *weight_rows(dense, block.map);
  const bool needs_folded = needs.weight || needs.bn_weight;
  const bool needs_sum = needs.bias || needs.bn_weight || needs.bn_bias;

  Gradients result;
  Tensor folded, laid_out, sum;
  if (block.plan != kFold) {
    const Tensor weight = cast(saved.weight, dtype);
    if (needs.x) {
      Tensor grad_map;
      std::tie(grad_map, sum) = scale_gradient(grad, norm, needs_sum);
      result.x = saved.x.defined()
          ? block.map.gradients(grad_map, saved.x, weight, true, false).first
          : block.map.input_gradient(grad_map, weight, block.input_shape);
    }
    if (needs_folded && block.plan == kScaleHalf) {
      const auto wide = norm.constants.scalar_type();
      const Tensor powers = powers_of_two(
          coefficients(norm.constants, norm.weight, norm.eps));
      folded = block.map
                   .gradients(times(grad, powers), saved.x, weight, false,
                              true)
                   .second.to(wide);
      by_group(folded, block.map)
          .div_(powers.view(channels_shape(folded, block.map)));
      dense = in_rows(cast(saved.weight, wide), block.map);
    } else if (needs_folded) {
      folded =
          block.map.gradients(grad, saved.x, weight, false, true).second;
    }
  } else {
    // Its values matter to the gradient of the input alone.
    const Tensor weight =
        cast(needs.x
                 ? strided_as(fold_weight(dense, rows, norm), saved.weight)
                 : saved.weight,
             dtype);
    if (needs_folded) {
      std::tie(result.x, folded) =
          block.map.gradients(grad, saved.x, weight, needs.x, true);
    } else if (needs.x) {
      result.x = saved.x.defined()
          ? block.map.gradients(grad, saved.x, weight, true, false).first
          : block.map.input_gradient(grad, weight, block.input_shape);
    }
  }
  if (needs_sum && !sum.defined()) {
    sum = sum_gradient(grad, norm);
  }
  if (needs_folded) {
    folded = cast(folded, dense.scalar_type());
    laid_out = folded;
    folded = in_rows(folded, block.map);
    rows = *weight_rows(folded, block.map);
    // The gradient keeps its strides, the weight is to lie as it does; only
    // gamma's gradient asks for its values.
    if (!same_strides(folded, dense)) {
      dense = needs.bn_weight ? strided_as(dense, folded) : folded;
    }
  }
  (norm.looped ? chain_looped : chain_by_operators)(folded, sum, dense, rows,
                                                    norm, needs, result);
  if (needs.weight) {
    result.weight = strided_as(result.weight, laid_out);
  }
  if (needs.bn_bias) {
    result.bn_bias = sum;
  }
  return result;
}

// The same in operators that autograd records, for a second derivative.
Gradients differentiable_gradients(const Block& block, const Tensor& grad,
                                   const Saved& saved, const Needs& needs) {
  const Uncast uncast;
  const auto& [x, weight, bias, bn_weight, constants, _] = saved;
  const auto dtype = constants.scalar_type();
  const Tensor mean = constants.select(0, 0);
  const Tensor coeff = coefficients(constants, bn_weight, block.eps);

  const Ints shape = channels_shape(weight, block.map);
  const Tensor grouped = by_group(weight, block.map);
  const Tensor factor = coeff.view(shape);

  Gradients result;
  Tensor folded;
  const bool needs_folded = needs.weight || needs.bn_weight;
  if (block.plan == kScaleHalf) {
    // No folded weight here either, which could leave float16's range.
    const Tensor narrow = weight.to(grad.scalar_type());
    if (needs.x) {
      const Tensor grad_map = times(grad, coeff);
      result.x = x.defined()
          ? block.map.gradients(grad_map, x, narrow, true, false).first
          : block.map.input_gradient(grad_map, narrow, block.input_shape);
    }
    if (needs_folded) {
      const Tensor powers = powers_of_two(coeff);
      folded = block.map
                   .gradients(times(grad, powers), x, narrow, false, true)
                   .second.to(dtype)
                   .reshape(grouped.sizes()) /
          powers.view(shape);
    }
  } else {
    const Tensor folded_weight =
        (grouped * factor).reshape(weight.sizes()).to(grad.scalar_type());
    if (needs_folded) {
      std::tie(result.x, folded) =
          block.map.gradients(grad, x, folded_weight, needs.x, true);
      folded = folded.to(dtype).reshape(grouped.sizes());
    } else if (needs.x) {
      result.x =
          block.map.input_gradient(grad, folded_weight, block.input_shape);
    }
  }
  Ints others = {0};
  for (int64_t i = 2; i < grad.dim(); i++) {
    others.push_back(i);
  }
  const Tensor sum = grad.sum(others, false, dtype);
  if (needs.weight) {
    result.weight = (folded * factor).reshape(weight.sizes());
  }
  if (needs.bias) {
    result.bias = sum * coeff;
  }
  if (needs.bn_weight) {
    const Tensor dot = (folded * grouped).sum_to_size(shape).reshape(-1);
    const Tensor shift = bias.defined() ? bias - mean : -mean;
    const Tensor rstd = coefficients(constants, Tensor(), block.eps);
    result.bn_weight = (dot + sum * shift) * rstd;
  }
  if (needs.bn_bias) {
    result.bn_bias = sum;
  }
  return result;
}

Norm make_norm(const Tensor& weight, const Tensor& bias,
               const Tensor& bn_weight, const Tensor& bn_bias,
               const Tensor& mean, const Tensor& var, double eps) {
  const auto dtype =
      common_dtype({&weight, &bias, &bn_weight, &bn_bias, &mean, &var});
  return Norm(weight, bias, bn_weight, bn_bias,
              make_constants(mean, var, dtype), eps);
}

struct Fold : torch::autograd::Function<Fold> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x,
                        const Tensor& weight, const MaybeTensor& bias,
                        const MaybeTensor& bn_weight,
                        const MaybeTensor& bn_bias, const Norm& norm,
                        const Block& block) {
    // What learns decides whether a gradient depends on x.
    const bool keeps_x = weight.requires_grad() ||
        (bn_weight.has_value() && bn_weight->requires_grad());
    ctx->set_materialize_grads(false);
    block.save(ctx);
    const Below below;
    Tensor output = run(block, x, weight, norm);
    ctx->save_for_backward({keeps_x ? x : Tensor(), weight,
                            or_undefined(bias), or_undefined(bn_weight),
                            norm.constants, norm.zero()});
    return output;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list results(7);
    if (!grads[0].defined()) {
      return results;
    }
    const Block block = Block::load(ctx);
    variable_list tensors = ctx->get_saved_variables();
    const Saved saved{tensors[0], tensors[1], tensors[2], tensors[3],
                      tensors[4], tensors[5]};
    const bool has_bn_bias = block.bn_bias_dtype != at::ScalarType::Undefined;
    // Edges are numbered without those that are None.
    size_t edge = 0;
    Needs needs{};
    needs.x = ctx->needs_input_grad(edge++);
    needs.weight = ctx->needs_input_grad(edge++);
    needs.bias = saved.bias.defined() && ctx->needs_input_grad(edge++);
    needs.bn_weight =
        saved.bn_weight.defined() && ctx->needs_input_grad(edge++);
    needs.bn_bias = has_bn_bias && ctx->needs_input_grad(edge++);

    const bool is_differentiable = at::GradMode::is_enabled() ||
        is_followed(grads[0]) ||
        std::any_of(tensors.begin(), tensors.end(), is_followed);
    Gradients result = is_differentiable
        ? differentiable_gradients(block, grads[0], saved, needs)
        : gradients(block, grads[0], saved, needs);
    const auto give = [&](size_t i, bool needed, const Tensor& grad,
                          at::ScalarType dtype) {
      if (needed) {
        results[i] = cast(grad, dtype);
      }
    };
    give(0, needs.x, result.x, grads[0].scalar_type());
    give(1, needs.weight, result.weight, saved.weight.scalar_type());
    if (needs.bias) {
      give(2, true, result.bias, saved.bias.scalar_type());
    }
    if (needs.bn_weight) {
      give(3, true, result.bn_weight, saved.bn_weight.scalar_type());
    }
    give(4, needs.bn_bias, result.bn_bias, block.bn_bias_dtype);
    return results;
  }
};

Tensor fold_and_run(const Tensor& x, const Tensor& weight,
                    const MaybeTensor& bias, const MaybeTensor& bn_weight,
                    const MaybeTensor& bn_bias, const Tensor& running_mean,
                    const Tensor& running_var, double eps, Setting stride,
                    Setting padding, Setting dilation, bool transposed,
                    Setting output_padding, int64_t groups, int64_t plan) {
  const int64_t dims = std::max<int64_t>(weight.dim() - 2, 0);
  Block block{{expand(std::move(stride), dims, "stride"),
               expand(std::move(padding), dims, "padding"),
               expand(std::move(dilation), dims, "dilation"),
               expand(std::move(output_padding), dims, "output_padding"),
               transposed, groups},
              static_cast<Plan>(plan),
              eps,
              bn_bias ? bn_bias->scalar_type() : at::ScalarType::Undefined,
              x.sizes().vec()};
  check(block.map, weight);
  const int64_t channels = block.map.out_channels(weight);
  for (const MaybeTensor& vector :
       {bias, bn_weight, bn_bias, MaybeTensor(running_mean),
        MaybeTensor(running_var)}) {
    TORCH_CHECK_VALUE(
        !vector || (vector->dim() == 1 && vector->size(0) == channels),
        "the weight has ", channels, " output channels, but a vector has the "
        "shape ", vector->sizes(), "; pass one number for each channel");
  }
  TORCH_CHECK_VALUE(
      x.dim() == weight.dim(), "the weight has ", weight.dim(),
      " dimensions and the input ", x.dim(), "; pass a batch of inputs");
  if (plan == kChoose) {
    block.plan = choose(block.map, x, weight);
  }
  if (block.plan == kScale && x.scalar_type() == at::kHalf) {
    block.plan = kScaleHalf;
  }
  std::optional<Norm> norm;
  {
    const Below below;
    norm.emplace(make_norm(weight, or_undefined(bias),
                           or_undefined(bn_weight), or_undefined(bn_bias),
                           running_mean, running_var, eps));
  }
  const auto learns = [](const MaybeTensor& tensor) {
    return tensor.has_value() && tensor->requires_grad();
  };
  if (at::GradMode::is_enabled() &&
      (x.requires_grad() || weight.requires_grad() || learns(bias) ||
       learns(bn_weight) || learns(bn_bias))) {
    return Fold::apply(x, weight, bias, bn_weight, bn_bias, *norm, block);
  }
  const Below below;
  return run(block, x, weight, *norm);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("fold_and_run",
             torch::wrap_pybind_function_no_gil(fold_and_run));
  module.def("inside", torch::wrap_pybind_function_no_gil(mmtune::inside));
  module.def("select", torch::wrap_pybind_function_no_gil(mmtune::select));
  module.def("like", mmtune::like);
  module.def("all_facts_hold", mmtune::all_facts_hold);
  module.def("unchanged", mmtune::unchanged);
  module.def("versions", mmtune::versions);
}
