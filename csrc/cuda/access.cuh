// How a thread of an elementwise kernel reads and writes its numbers: in vectors of 16 bytes, or one by one with any strides
// and dtypes. Access is Vectors or Strided; Access::Thread<kOperands> is a thread's view of the operands in its plan:
//
//   kItems                              the numbers of each operand that a thread works on
//   load(first, loaded, ...)            loads consecutive operands; all loads are issued before any number is used
//   get<T>(loaded, operand, item)       one number, widened to the arithmetic type T
//   store<S>(first, results)            rounds and stores consecutive operands; those without data are left out
//
// S is the dtype of the operands, which Strided only knows at run time.
#pragma once

#include "convert.cuh"
#include "pack.cuh"

namespace kl_ext::cuda {

// One vector of each operand per thread; the last one may be short. kInRows: at most two dimensions, and no splats.
template <int kNumbers, bool kInRows>
struct Vectors {
  static constexpr int kItems = kNumbers;
  static constexpr int kDims = kInRows ? 2 : kMaxVectorDims;

  // One of the two is zero bits: the pack for a splat, the splat for a vector.
  template <class S>
  struct Loaded {
    Held<S, kItems> pack;
    S splat;
  };

  template <int kOperands>
  using Plan = VectorPlan<kOperands>;

  template <int kOperands>
  class Thread {
   public:
    KL_EXT_INLINE Thread(const Plan<kOperands>& plan, std::uint32_t block, std::uint32_t thread)
        : Thread(plan, block * kElementwiseThreads + thread) {}

    // index: of the vector.
    KL_EXT_INLINE Thread(const Plan<kOperands>& plan, std::uint32_t index) : plan_(plan) {
      is_whole_ = index < plan.vectors;
      numbers_ = is_whole_ ? kItems : index == plan.vectors ? plan.tail : 0;
      coordinates_[0] = index;
      for (int dim = 1; dim < kDims; ++dim) {
        coordinates_[dim] = 0;
        if (kInRows || dim < plan.ndim) {
          const Divider& size = plan.sizes[dim - 1];
          coordinates_[dim] = size.quotient(coordinates_[dim - 1]);
          coordinates_[dim - 1] -= coordinates_[dim] * size.divisor;
        }
      }
    }

    KL_EXT_INLINE bool is_idle() const { return numbers_ == 0; }

    template <class... S, int... kCounts>
    KL_EXT_INLINE void load(int first, Loaded<S> (&... loaded)[kCounts]) const {
      // One branch for all operands, so that the loads follow each other.
      if (is_whole_) {
        (load_each<true>(first, loaded), ...);
      } else {
        (load_each<false>(first, loaded), ...);
      }
    }

    template <class T, class S>
    KL_EXT_INLINE T get(const Loaded<S>& loaded, int, int item) const {
      const T value = widened(loaded.pack.get(item));
      if constexpr (kInRows) {
        return value;
      } else {
        // Combined by bits: for a condition the compiler would write the whole arithmetic twice.
        const T splat = widened(loaded.splat);
        return math::from_bits<T>(math::to_bits(value) | math::to_bits(splat));
      }
    }

    template <class S, class T, int kCount>
    KL_EXT_INLINE void store(int first, const T (&results)[kCount][kItems]) const {
      Pack<S, kItems> packs[kCount];
      for (int i = 0; i < kCount; ++i) {
        for (int item = 0; item < kItems; item += 2) {
          narrow_pair(packs[i].values[item], packs[i].values[item + 1], results[i][item], results[i][item + 1]);
        }
      }
      for (int i = 0; i < kCount; ++i) {
        if (plan_.operand[first + i].data == nullptr) {
          continue;
        }
        auto* vector = at<Pack<S, kItems>>(first + i);
        if (is_whole_) {
          *vector = packs[i];
        } else {
          for (std::uint32_t item = 0; item < kItems; ++item) {
            if (item < numbers_) {
              vector->values[item] = packs[i].values[item];
            }
          }
        }
      }
    }

   private:
    KL_EXT_INLINE bool is_splat(int operand) const { return !kInRows && plan_.operand[operand].is_splat; }

    // operand: the index of the first; left at the one after the last.
    template <bool whole, class S, int kCount>
    KL_EXT_INLINE void load_each(int& operand, Loaded<S> (&loaded)[kCount]) const {
      for (int i = 0; i < kCount; ++i, ++operand) {
        loaded[i] = {};
        if (is_splat(operand)) {
          loaded[i].splat = *at<S>(operand);
        } else if constexpr (whole) {
          loaded[i].pack = *at<Held<S, kItems>>(operand);
        } else {
          const S* values = at<Pack<S, kItems>>(operand)->values;
          for (std::uint32_t item = 0; item < kItems; ++item) {
            if (item < numbers_) {
              loaded[i].pack.set(static_cast<int>(item), values[item]);
            }
          }
        }
      }
    }

    // The address of the thread's unit of an operand.
    template <class Unit>
    KL_EXT_INLINE Unit* at(int operand) const {
      const auto& [data, strides, splat] = plan_.operand[operand];
      std::uint32_t offset = kInRows ? coordinates_[0] : coordinates_[0] * strides[0];
      for (int dim = 1; dim < kDims; ++dim) {
        offset += coordinates_[dim] * strides[dim];
      }
      return reinterpret_cast<Unit*>(data) + offset;
    }

    const Plan<kOperands>& plan_;
    bool is_whole_;
    std::uint32_t numbers_;
    std::uint32_t coordinates_[kDims];
  };
};

// A number from its bits; float64 only if T is double, bool only with_bool.
template <class T, bool with_bool = false>
KL_EXT_INLINE T from_storage(Storage dtype, typename math::Format<T>::Bits bits) {
  if constexpr (with_bool) {
    if (dtype == kBool) {
      return widened(math::Bool{static_cast<std::uint8_t>(bits)});
    }
  }
  switch (dtype) {
    case kFloat16:
      return widened(math::Half{static_cast<std::uint16_t>(bits)});
    case kBFloat16:
      return widened(math::BFloat16{static_cast<std::uint16_t>(bits)});
    case kFloat32:
      return math::from_bits<float>(static_cast<std::uint32_t>(bits));
    default:
      return math::from_bits<T>(bits);
  }
}

// The bits of a number in memory.
template <class T, bool with_bool>
KL_EXT_INLINE typename math::Format<T>::Bits bits_at(const char* place, Storage dtype) {
  if constexpr (with_bool) {
    if (dtype == kBool) {
      return *reinterpret_cast<const std::uint8_t*>(place);
    }
  }
  const std::int64_t size = size_of(dtype);
  return size == 2   ? *reinterpret_cast<const std::uint16_t*>(place)
         : size == 4 ? *reinterpret_cast<const std::uint32_t*>(place)
                     : *reinterpret_cast<const typename math::Format<T>::Bits*>(place);
}

// Two numbers of each operand per thread, a block's width apart. Dtypes are known at run time; float64 only if T is double.
template <class T, bool with_bool = false>
struct Strided {
  static constexpr int kItems = 2;

  using Bits = typename math::Format<T>::Bits;

  template <class>
  struct Loaded {
    Bits bits[kItems];
  };

  template <int kOperands>
  using Plan = StridedPlan<kOperands>;

  template <int kOperands>
  class Thread {
   public:
    // A thread beyond the end reads the last number and writes none.
    KL_EXT_INLINE Thread(const Plan<kOperands>& plan, std::uint32_t block, std::uint32_t thread) : plan_(plan) {
      std::uint32_t rest[kItems];
      for (std::uint32_t item = 0; item < kItems; ++item) {
        const std::uint32_t index = (block * kItems + item) * kElementwiseThreads + thread;
        is_valid_[item] = index < plan.numel;
        rest[item] = is_valid_[item] ? index : plan.numel - 1;
        for (int operand = 0; operand < kOperands; ++operand) {
          offsets_[operand][item] = 0;
        }
      }
      for (int dim = 0; dim < plan.ndim; ++dim) {
        for (int item = 0; item < kItems; ++item) {
          const std::uint32_t quotient = plan.sizes[dim].quotient(rest[item]);
          const auto coordinate = static_cast<std::int32_t>(rest[item] - quotient * plan.sizes[dim].divisor);
          rest[item] = quotient;
          for (int operand = 0; operand < kOperands; ++operand) {
            offsets_[operand][item] += coordinate * plan.strides[dim][operand];
          }
        }
      }
    }

    KL_EXT_INLINE bool is_idle() const { return !is_valid_[0]; }

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
    std::int32_t offsets_[kOperands][kItems];
  };
};

} // namespace kl_ext::cuda
