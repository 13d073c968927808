// How a thread of a summing kernel reads its terms: as in access.cuh, but by the index of the first of them.
//
//   kItems          the numbers of each operand that a thread works on at a time
//   kNeighbours     whether they are beside each other; else their distance is the number of threads that work together
//   kIsWhole        whether there are always kItems of them
//   index_of(rank)  the index of the vector of the number of this rank, or the rank itself
//   Thread(plan, first, gap, valid)   the index of the first number, the ranks between two, the number of those that exist
#pragma once

#include "access.cuh"
#include "sum_layout.h"

namespace kl_ext::cuda {

// 16 bytes of each operand, or a splat.
template <int kNumbers>
struct VectorTerms : Vectors<kNumbers, false> {
  using Base = Vectors<kNumbers, false>;
  static constexpr int kItems = kNumbers;
  static constexpr bool kNeighbours = true;
  static constexpr bool kIsWhole = false;

  static KL_EXT_INLINE std::uint32_t index_of(std::uint64_t rank) { return static_cast<std::uint32_t>(rank / kItems); }

  template <int kOperands>
  class Thread : public Base::template Thread<kOperands> {
   public:
    KL_EXT_INLINE Thread(const VectorPlan<kOperands>& plan, std::uint32_t first, std::int32_t, std::int64_t)
        : Base::template Thread<kOperands>(plan, first) {}
  };
};

// 16 bytes of each operand, in rows of whole vectors. Without splats and with a single division it takes fewer instructions,
// which half types are bound by.
template <int kNumbers>
struct RowTerms {
  static constexpr int kItems = kNumbers;
  static constexpr bool kNeighbours = true;
  static constexpr bool kIsWhole = true;

  static KL_EXT_INLINE std::uint32_t index_of(std::uint64_t rank) { return static_cast<std::uint32_t>(rank / kItems); }

  template <class S>
  using Loaded = Held<S, kItems>;

  template <int kOperands>
  using Plan = RowPlan<kOperands>;

  template <int kOperands>
  class Thread {
   public:
    KL_EXT_INLINE Thread(const Plan<kOperands>& plan, std::uint32_t first, std::int32_t, std::int64_t) : plan_(plan) {
      row_ = plan.vectors.quotient(first);
      in_row_ = first - row_ * plan.vectors.divisor;
    }

    KL_EXT_INLINE std::uint32_t vector_in_row() const { return in_row_; }

    template <class S, int kCount>
    KL_EXT_INLINE void load(int first, Held<S, kItems> (&loaded)[kCount]) const {
      for (int i = 0; i < kCount; ++i) {
        const auto* vectors = reinterpret_cast<const Held<S, kItems>*>(plan_.data[first + i]);
        loaded[i] = vectors[in_row_ + row_ * plan_.pitch[first + i]];
      }
    }

    template <class T, class S>
    KL_EXT_INLINE T get(const Held<S, kItems>& loaded, int, int item) const {
      return widened(loaded.get(item));
    }

   private:
    const Plan<kOperands>& plan_;
    std::uint32_t row_;
    std::uint32_t in_row_;
  };
};

// Any strides and dtypes, known at run time; none is float64 unless T is double.
template <class T, bool with_bool = false>
struct StridedTerms {
  static constexpr int kItems = 2;
  static constexpr bool kNeighbours = false;
  static constexpr bool kIsWhole = false;

  static KL_EXT_INLINE std::int64_t index_of(std::int64_t rank) { return rank; }

  using Bits = typename math::Format<T>::Bits;

  template <class>
  struct Loaded {
    Bits bits[kItems];
  };

  template <int kOperands>
  using Plan = TermsPlan<kOperands>;

  template <int kOperands>
  class Thread {
   public:
    // Missing items read the first one and are not written.
    KL_EXT_INLINE Thread(const Plan<kOperands>& plan, std::int64_t first, std::int32_t gap, std::int64_t valid) : plan_(plan) {
      std::int64_t rest[kItems];
      for (int item = 0; item < kItems; ++item) {
        is_valid_[item] = item < valid;
        rest[item] = is_valid_[item] ? first + static_cast<std::int64_t>(item) * gap : first;
        for (int operand = 0; operand < kOperands; ++operand) {
          offsets_[operand][item] = 0;
        }
      }
      for (int dim = 0; dim < plan.ndim; ++dim) {
        for (int item = 0; item < kItems; ++item) {
          const std::int64_t quotient = plan.is_small ? plan.dividers[dim].quotient(static_cast<std::uint32_t>(rest[item]))
                                                      : rest[item] / plan.sizes[dim];
          const std::int64_t coordinate = rest[item] - quotient * plan.sizes[dim];
          rest[item] = quotient;
          for (int operand = 0; operand < kOperands; ++operand) {
            offsets_[operand][item] += coordinate * plan.strides[dim][operand];
          }
        }
      }
    }

    template <class... L, int... kCounts>
    KL_EXT_INLINE void load(int first, L (&... loaded)[kCounts]) const {
      (load_each(first, loaded), ...);
    }

    template <class, class L>
    KL_EXT_INLINE T get(const L& loaded, int operand, int item) const {
      return from_storage<T, with_bool>(plan_.operand[operand].dtype, loaded.bits[item]);
    }

    template <class, int kCount>
    KL_EXT_INLINE void store(int first, const T (&results)[kCount][kItems]) const {
      for (int i = 0; i < kCount; ++i) {
        if (plan_.operand[first + i].data == nullptr) {
          continue;
        }
        switch (plan_.operand[first + i].dtype) {
          case kFloat16:
            store_as<math::Half>(first + i, results[i]);
            break;
          case kBFloat16:
            store_as<math::BFloat16>(first + i, results[i]);
            break;
          case kFloat32:
            store_as<float>(first + i, results[i]);
            break;
          default:
            store_as<T>(first + i, results[i]);
        }
      }
    }

   private:
    // operand: the index of the first; left at the one after the last.
    template <class L, int kCount>
    KL_EXT_INLINE void load_each(int& operand, L (&loaded)[kCount]) const {
      for (int i = 0; i < kCount; ++i, ++operand) {
        for (int item = 0; item < kItems; ++item) {
          loaded[i].bits[item] = bits_at<T, with_bool>(at<char>(operand, item), plan_.operand[operand].dtype);
        }
      }
    }

    template <class S>
    KL_EXT_INLINE S* at(int operand, int item) const {
      return reinterpret_cast<S*>(plan_.operand[operand].data + offsets_[operand][item]);
    }

    template <class S>
    KL_EXT_INLINE void store_as(int operand, const T (&results)[kItems]) const {
      S values[kItems];
      narrow_pair(values[0], values[1], results[0], results[1]);
      for (int item = 0; item < kItems; ++item) {
        if (is_valid_[item]) {
          *at<S>(operand, item) = values[item];
        }
      }
    }

    const Plan<kOperands>& plan_;
    bool is_valid_[kItems];
    std::int64_t offsets_[kOperands][kItems];
  };
};

} // namespace kl_ext::cuda
