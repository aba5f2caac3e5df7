// Kernel tables: one per op family and instruction set, chosen once at run time.
//
// A file in this folder is compiled once per instruction set, each time with another ANDMASK_ISA,
// which names the namespace of its table. It may use only csrc/math, csrc/tasks and C headers, and
// it keeps all it defines in an anonymous namespace, except for the table.
#pragma once

#include "../../tasks/dtype.h"
#include "../capability.h"

namespace andmask {

// Declares a table of kernels for every compiled instruction set, and the function that picks one.
#if defined(ANDMASK_X86_LEVELS)
#define ANDMASK_DECLARE_KERNELS(Table, table)                                         \
  namespace baseline {                                                                \
  extern const Table table;                                                           \
  }                                                                                   \
  namespace v3 {                                                                      \
  extern const Table table;                                                           \
  }                                                                                   \
  namespace v4 {                                                                      \
  extern const Table table;                                                           \
  }                                                                                   \
  static inline const Table& table(Isa isa) {                                         \
    return isa == Isa::v4 ? v4::table : isa == Isa::v3 ? v3::table : baseline::table; \
  }
#else
#define ANDMASK_DECLARE_KERNELS(Table, table) \
  namespace baseline {                        \
  extern const Table table;                   \
  }                                           \
  static inline const Table& table(Isa) { return baseline::table; }
#endif

}  // namespace andmask
