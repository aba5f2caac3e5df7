# Builds libandmask_cuda.so from ${cuda_sources}. Needs nvcc, but neither a GPU nor a torch with CUDA.
#
# Architectures: CMAKE_CUDA_ARCHITECTURES, else the environment variable TORCH_CUDA_ARCH_LIST in
# torch's notation ("8.0;9.0a;12.0+PTX"), else those below.
set(default_architectures 80-real 86-real 89-real 90-real 100-real 120)
set(default_architectures_before_12_8 80-real 86-real 89-real 90)

if(NOT ANDMASK_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "ANDMASK_CUDA: expected AUTO, ON or OFF, but got ${ANDMASK_CUDA}")
endif()
if(ANDMASK_CUDA STREQUAL "OFF")
  return()
endif()
if(ANDMASK_CUDA STREQUAL "AUTO" AND NOT EXISTS ${ANDMASK_TORCH_DIR}/lib/libtorch_cuda.so)
  message(STATUS "andmask: no CUDA library, because torch has no CUDA (ANDMASK_CUDA=ON builds it)")
  return()
endif()
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(ANDMASK_CUDA STREQUAL "ON")
    message(FATAL_ERROR "ANDMASK_CUDA=ON needs nvcc, which is neither on PATH nor in CUDACXX")
  endif()
  message(STATUS "andmask: no CUDA library, because there is no nvcc on PATH or in CUDACXX")
  return()
endif()

if(NOT CMAKE_CUDA_ARCHITECTURES AND DEFINED ENV{TORCH_CUDA_ARCH_LIST})
  string(REGEX REPLACE "[ ,;]+" ";" listed "$ENV{TORCH_CUDA_ARCH_LIST}")
  set(architectures)
  foreach(item IN LISTS listed)
    if(NOT item MATCHES "^([0-9]+)\\.([0-9][af]?)([+]PTX)?$")
      message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST: expected numbers like 9.0, 9.0a or 12.0+PTX, "
                          "but got ${item}")
    endif()
    set(number ${CMAKE_MATCH_1}${CMAKE_MATCH_2})
    if(CMAKE_MATCH_3) # both its code and PTX
      list(APPEND architectures ${number})
    else()
      list(APPEND architectures ${number}-real)
    endif()
  endforeach()
elseif(CMAKE_CUDA_ARCHITECTURES)
  set(architectures ${CMAKE_CUDA_ARCHITECTURES})
endif()
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES OFF) # else CMake asks the GPU, and takes the oldest without one
endif()
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_FLAGS_RELEASE "-O3 -DNDEBUG")
enable_language(CUDA)
if(NOT architectures)
  set(architectures ${default_architectures})
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8)
    set(architectures ${default_architectures_before_12_8})
  endif()
endif()

add_library(andmask_cuda SHARED csrc/cuda/device.cpp ${cuda_sources})
# The runtime is torch's own: the loader asks for the same major version.
set_target_properties(andmask_cuda PROPERTIES CUDA_ARCHITECTURES "${architectures}"
                                              CUDA_RUNTIME_LIBRARY Shared)
# As for the CPU, a multiply and an add are not made one: both devices give the same bits.
target_compile_options(
  andmask_cuda PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:-fmad=false;--expt-relaxed-constexpr;--extended-lambda>")
target_compile_definitions(andmask_cuda PRIVATE USE_CUDA)
add_library(andmask_torch_cuda SHARED csrc/cuda/torch_cuda_stub.cpp)
set_target_properties(andmask_torch_cuda PROPERTIES OUTPUT_NAME torch_cuda
                                                    LIBRARY_OUTPUT_DIRECTORY stub)
target_link_libraries(andmask_cuda PRIVATE andmask_ops andmask_torch_cuda)
# What build_info() tells, and what the loader checks before it loads the library.
string(REGEX MATCH "^[0-9]+\\.[0-9]+" cuda_version ${CMAKE_CUDA_COMPILER_VERSION})
file(CONFIGURE OUTPUT libandmask_cuda.txt CONTENT "${cuda_version}\n${architectures}\n")
install(TARGETS andmask_cuda LIBRARY DESTINATION lib)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/libandmask_cuda.txt DESTINATION lib)
