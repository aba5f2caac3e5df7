// The devices that run tasks. A task is a plain struct that holds all that an op asks of a device;
// its pointers point into the device's memory. Tasks know nothing of torch, so that the test
// harness can fill them in too. Beside each task stand its declarations of `run`, one for each
// device; every device defines them in a file of its own folder. Arguments have been checked.
#pragma once

namespace andmask {

class Cpu;      // csrc/cpu/device.h
struct Stream;  // csrc/cuda/stream.h

}  // namespace andmask
