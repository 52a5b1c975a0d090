// Which elements of a map lie between two bounds, a bit each: all that the
// backward of a clamp needs. mmtune/activations.py computes the same with
// ATen operators.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace mmtune {

// Bits are gathered from bytes, eight at a time, since compilers vectorize
// what writes bytes. A product moves the lowest bit of byte k to bit 56 + k.
constexpr int64_t kBytes = 512;
constexpr uint64_t kGather = 0x0102040810204080;
constexpr uint64_t kSpread = 0x0101010101010101;
constexpr uint64_t kOneEach = 0x8040201008040201;

template <typename scalar_t>
void find_inside(const scalar_t* map, int64_t count, scalar_t low,
                 scalar_t high, uint8_t* bits) {
  uint8_t bytes[kBytes] = {};
  for (int64_t i = 0; i < count; ++i) {
    bytes[i] = (map[i] > low) & (map[i] < high);
  }
  for (int64_t i = 0; i < count; i += 8) {
    uint64_t word;
    std::memcpy(&word, bytes + i, 8);
    bits[i / 8] = static_cast<uint8_t>((word * kGather) >> 56);
  }
}

// Word: an unsigned integer as wide as an element, since a branch of an
// element each would cost ten times as much.
template <typename Word>
void select_inside(const Word* grad, int64_t count, const uint8_t* bits,
                   Word* selected) {
  uint8_t bytes[kBytes];
  for (int64_t i = 0; i < count; i += 8) {
    uint64_t word = (bits[i / 8] * kSpread) & kOneEach;
    std::memcpy(bytes + i, &word, 8);
  }
  for (int64_t i = 0; i < count; ++i) {
    selected[i] = grad[i] & -static_cast<Word>(bytes[i] != 0);
  }
}

// Calls a function for parts of at most kBytes elements.
template <typename Function>
void for_each_part(int64_t count, const Function& function) {
  const int64_t parts = (count + kBytes - 1) / kBytes;
  at::parallel_for(0, parts, 64, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t first = part * kBytes;
      function(first, std::min(kBytes, count - first));
    }
  });
}

// map: dense, float32 or float64, on the CPU. Returns uint8, one element for
// every eight of the map as they lie in memory; a NaN is outside,
// as in the vectorized part of stock's loop.
inline at::Tensor inside(const at::Tensor& map, double low, double high) {
  const int64_t count = map.numel();
  at::Tensor bits = at::empty({(count + 7) / 8}, at::kByte);
  uint8_t* to = bits.mutable_data_ptr<uint8_t>();
  AT_DISPATCH_FLOATING_TYPES(map.scalar_type(), "inside", [&] {
    const scalar_t* from = map.const_data_ptr<scalar_t>();
    for_each_part(count, [&](int64_t first, int64_t size) {
      find_inside<scalar_t>(from + first, size, static_cast<scalar_t>(low),
                            static_cast<scalar_t>(high), to + first / 8);
    });
  });
  return bits;
}

template <typename Word>
void select_words(const at::Tensor& grad, const at::Tensor& bits,
                  const at::Tensor& selected) {
  const uint8_t* with = bits.const_data_ptr<uint8_t>();
  const Word* from = static_cast<const Word*>(grad.const_data_ptr());
  Word* to = static_cast<Word*>(selected.mutable_data_ptr());
  for_each_part(grad.numel(), [&](int64_t first, int64_t size) {
    select_inside<Word>(from + first, size, with + first / 8, to + first);
  });
}

// grad: as the map of `inside`. Returns grad where a bit is set, else 0.
inline at::Tensor select(const at::Tensor& grad, const at::Tensor& bits) {
  at::Tensor selected = at::empty_like(grad);
  if (grad.element_size() == 4) {
    select_words<uint32_t>(grad, bits, selected);
  } else {
    select_words<uint64_t>(grad, bits, selected);
  }
  return selected;
}

}  // namespace mmtune
