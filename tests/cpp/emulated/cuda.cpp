// The GPU engine, for the CPU.
#include "../../../csrc/cuda/engine.cu"
