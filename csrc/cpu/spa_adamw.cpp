#include "../arithmetic.h"
#include "common.h"
#include "simd.h"

namespace safekern {
namespace {

constexpr int64_t kChunk = 1 << 18;
// Of weights, between which no mark is looked up. Measured: of 16 bits, 128 are 6% slower, and of 32, 512 are 3% slower
// with AVX-512 (and 2% faster with AVX2).
template <class Param>
constexpr int64_t kBlock = sizeof(Param) == 2 ? 512 : 128;

// The bits of `before` where those of `kept` are set, and of `after` elsewhere.
template <class T>
SAFEKERN_INLINE T blend(T kept, T before, T after) {
  return static_cast<T>((before & kept) | (after & ~kept));
}

// Bytes per element: the gradient once, the parameter and both moments twice, so 28 in fp32 and 14 in bf16. In
// the cache both are bound by the unit that divides and takes roots, three times per element, beside which looking at
// `kept` costs nothing.
template <class Param, class Grad, class Moment, class Kept>
SAFEKERN_INLINE void update(Param* __restrict param, const Grad* __restrict grad, Moment* __restrict exp_avg,
                            Moment* __restrict exp_avg_sq, Kept kept, int64_t numel, const AdamW<Real<Param>> adamw) {
  for (int64_t i = 0; i < numel; i++) {
    auto first = static_cast<Real<Param>>(exp_avg[i]), second = static_cast<Real<Param>>(exp_avg_sq[i]);
    const auto value =
        adamw.update(static_cast<Real<Param>>(param[i]), static_cast<Real<Param>>(grad[i]), first, second);
    exp_avg[i] = static_cast<Moment>(first);
    exp_avg_sq[i] = static_cast<Moment>(second);
    if constexpr (std::is_same_v<Kept, std::nullptr_t>) {
      param[i] = static_cast<Param>(value);
    } else {
      const auto before = bit_copy<Bits<Param>>(param[i]), after = bit_copy<Bits<Param>>(static_cast<Param>(value));
      param[i] = bit_copy<Param>(blend(kept[i], before, after));
    }
  }
}

// Two neighbours in bf16 as fp32 values. Taken from one 32-bit word, they need no shuffle between vectors of different
// element sizes, which is what a loop over single elements spends most of its time on with AVX2.
struct Pair {
  float low, high;

  static SAFEKERN_INLINE Pair load(const BFloat16* memory) {
    uint32_t word;
    std::memcpy(&word, memory, sizeof word);
    return {bit_copy<float>(word << 16), bit_copy<float>(word & 0xffff0000u)};
  }

  SAFEKERN_INLINE uint32_t word() const { return rounded(low) >> 16 | (rounded(high) & 0xffff0000u); }

  SAFEKERN_INLINE void store(BFloat16* memory) const {
    const uint32_t after = word();
    std::memcpy(memory, &after, sizeof after);
  }

  SAFEKERN_INLINE void store(BFloat16* memory, const uint16_t* kept) const {
    uint32_t kept_word, before;
    std::memcpy(&kept_word, kept, sizeof kept_word);
    std::memcpy(&before, memory, sizeof before);
    const uint32_t blended = blend(kept_word, before, word());
    std::memcpy(memory, &blended, sizeof blended);
  }

 private:
  // To nearest and ties to even, in the upper half. NaNs need no care: one that comes from bf16 values has a lower half
  // of zero, so that nothing carries into the upper one.
  static SAFEKERN_INLINE uint32_t rounded(float value) {
    const uint32_t bits = bit_copy<uint32_t>(value);
    return bits + 0x7fffu + (bits >> 16 & 1u);
  }
};

SAFEKERN_INLINE void update(BFloat16* __restrict param, const BFloat16* __restrict grad, BFloat16* __restrict exp_avg,
                            BFloat16* __restrict exp_avg_sq, const uint16_t* __restrict kept, int64_t numel,
                            const AdamW<float> adamw) {
  const int64_t even = numel / 2 * 2;
  for (int64_t i = 0; i < even; i += 2) {
    const Pair value = Pair::load(param + i), slope = Pair::load(grad + i);
    Pair first = Pair::load(exp_avg + i), second = Pair::load(exp_avg_sq + i);
    const Pair updated{adamw.update(value.low, slope.low, first.low, second.low),
                       adamw.update(value.high, slope.high, first.high, second.high)};
    first.store(exp_avg + i);
    second.store(exp_avg_sq + i);
    updated.store(param + i, kept + i);
  }
  update<BFloat16, BFloat16, BFloat16, const uint16_t*>(param + even, grad + even, exp_avg + even, exp_avg_sq + even,
                                                        kept + even, numel - even, adamw);
}

// What the loop works on: a tensor's memory itself, or a block of float values for the dtype whose conversion does not
// vectorise inside it.
template <class T>
struct Staged {
  T* load(T* memory, int64_t) { return memory; }
  void store(T*, int64_t) {}
};

template <>
struct Staged<Half> {
  float values[kBlock<Half>];

  float* load(const Half* memory, int64_t numel) {
    convert(memory, values, numel);
    return values;
  }
  void store(Half* memory, int64_t numel) { convert(values, memory, numel); }
};

template <>
struct Staged<const Half> : Staged<Half> {};

// How the spared weights of a block that begins at `begin` keep their bits: the loop finds them marked, in the L1
// cache.
template <class Param>
struct Spares {
  Bits<Param> kept[kBlock<Param>] = {};

  const Bits<Param>* marks() const { return kept; }

  template <class Index>
  void save(const Param*, int64_t begin, int64_t, const Index* first, const Index* last) {
    for (; first != last; first++) kept[*first - begin] = static_cast<Bits<Param>>(-1);
  }

  template <class Index>
  void put_back(Param*, int64_t begin, const Index* first, const Index* last) {
    for (; first != last; first++) kept[*first - begin] = 0;
  }
};

// Some NaNs come back from staging with other bits, so that these are copied, and the loop overwrites them. The whole
// block is: reading the spared ones alone, ahead of the stream, would wait for memory.
template <>
struct Spares<Half> {
  Half before[kBlock<Half>];

  std::nullptr_t marks() const { return nullptr; }

  template <class Index>
  void save(const Half* param, int64_t begin, int64_t size, const Index*, const Index*) {
    std::copy_n(param + begin, size, before);
  }

  template <class Index>
  void put_back(Half* param, int64_t begin, const Index* first, const Index* last) {
    for (; first != last; first++) param[*first] = before[*first - begin];
  }
};

// The tensors of one parameter, as raw pointers.
template <class Param, class Grad, class Moment, class Index>
struct Spared {
  Param* param;
  const Grad* grad;
  Moment *exp_avg, *exp_avg_sq;
  const Index* index;
  int64_t count;

  void step(int64_t begin, int64_t end, const AdamW<Real<Param>>& adamw) const {
    Spares<Param> spares;
    Staged<Param> params;
    Staged<const Grad> grads;
    Staged<Moment> exp_avgs, exp_avg_sqs;
    const Index *last = index + count, *spared = std::lower_bound(index, last, begin);
    for (int64_t block = begin; block < end; block += kBlock<Param>) {
      const int64_t size = std::min(kBlock<Param>, end - block);
      const Index* first = spared;
      while (spared != last && *spared < block + size) spared++;
      spares.save(param, block, size, first, spared);
      auto* p = params.load(param + block, size);
      const auto* g = grads.load(grad + block, size);
      auto *m = exp_avgs.load(exp_avg + block, size), *v = exp_avg_sqs.load(exp_avg_sq + block, size);
      const auto kept = spares.marks();
      vectorised([=]() SAFEKERN_INLINE_LAMBDA { update(p, g, m, v, kept, size, adamw); });
      params.store(param + block, size);
      exp_avgs.store(exp_avg + block, size);
      exp_avg_sqs.store(exp_avg_sq + block, size);
      spares.put_back(param, block, first, spared);
    }
  }
};

// A weight is spared because a binary search finds it, so order matters as much as range.
void check_ascending(const Tensors& indices, const Tensors& params) {
  const std::vector<Chunk> chunks = cut(indices, kChunk);
  std::vector<uint8_t> wrong(chunks.size());
  each_chunk(chunks, [&](int64_t c) {
    const Chunk& chunk = chunks[c];
    with_index_type(indices[chunk.tensor].scalar_type(), [&](auto* type) {
      using Index = std::remove_pointer_t<decltype(type)>;
      const Index* index = indices[chunk.tensor].const_data_ptr<Index>();
      bool descends = false;
      for (int64_t j = std::max<int64_t>(chunk.begin, 1); j < chunk.end; j++) descends |= index[j] <= index[j - 1];
      const bool outside = index[chunk.begin] < 0 || index[chunk.end - 1] >= params[chunk.tensor].numel();
      wrong[c] = descends || outside;
    });
  });
  STD_TORCH_CHECK(std::find(wrong.begin(), wrong.end(), 1) == wrong.end(),
                  "safekern: indices must ascend without repetition and lie inside their parameter");
}

void spa_adamw_(Tensors params, Tensors grads, Tensors indices, Tensors exp_avgs, Tensors exp_avg_sqs,
                std::vector<double> step_sizes, std::vector<double> bias_correction2_sqrts, double beta1, double beta2,
                double eps, double decay) {
  check_spa_adamw(params, grads, indices, exp_avgs, exp_avg_sqs, step_sizes, bias_correction2_sqrts);
  check_ascending(indices, params);
  const std::vector<Chunk> chunks = cut(params, kChunk);
  each_chunk(chunks, [&](int64_t c) {
    const int64_t t = chunks[c].tensor;
    with_float_type(params[t].scalar_type(), [&](auto* param_type) {
      using Param = std::remove_pointer_t<decltype(param_type)>;
      with_param_type_or_float<Param>(grads[t].scalar_type(), [&](auto* grad_type) {
        with_param_type_or_float<Param>(exp_avgs[t].scalar_type(), [&](auto* moment_type) {
          with_index_type(indices[t].scalar_type(), [&](auto* index_type) {
            using Grad = std::remove_pointer_t<decltype(grad_type)>;
            using Moment = std::remove_pointer_t<decltype(moment_type)>;
            using Index = std::remove_pointer_t<decltype(index_type)>;
            const Spared<Param, Grad, Moment, Index> spared{
                params[t].mutable_data_ptr<Param>(),    grads[t].const_data_ptr<Grad>(),
                exp_avgs[t].mutable_data_ptr<Moment>(), exp_avg_sqs[t].mutable_data_ptr<Moment>(),
                indices[t].const_data_ptr<Index>(),     indices[t].numel()};
            spared.step(chunks[c].begin, chunks[c].end,
                        {beta1, beta2, eps, decay, step_sizes[t], bias_correction2_sqrts[t]});
          });
        });
      });
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(safekern, CPU, m) { m.impl("spa_adamw_", TORCH_BOX(&spa_adamw_)); }

}  // namespace safekern
