// Turns a dtype, known at run time, into a type.
#pragma once

#include "../math/scalar.h"
#include "../tasks/dtype.h"

namespace andmask {

template <typename T>
struct Type {
  using type = T;
};

// Calls f(Type<T>()) for the element type T of `dtype`.
template <typename F>
void with_type(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::float16: return f(Type<Half>());
    case Dtype::bfloat16: return f(Type<BFloat16>());
    case Dtype::float32: return f(Type<float>());
    case Dtype::float64: return f(Type<double>());
  }
}

}  // namespace andmask
