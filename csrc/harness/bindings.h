// What the files of the test harness share.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>

#include "../cpu/kernels/dispatch.h"

namespace andmask {

// Throws where this machine has none of that name.
Isa parse_isa(const std::string& wanted);

// numpy has no bfloat16: its bits come as uint16.
Dtype parse_dtype(const pybind11::array& array);

void bind_aggregate(pybind11::module_& m);
void bind_cuda_aggregate(pybind11::module_& m);
void bind_cuda_masked_mean(pybind11::module_& m);
void bind_cuda_moments(pybind11::module_& m);
void bind_elementary(pybind11::module_& m);
void bind_moments(pybind11::module_& m);
void bind_outer(pybind11::module_& m);
void bind_sign_outer(pybind11::module_& m);
void bind_vote_histogram(pybind11::module_& m);

}  // namespace andmask
