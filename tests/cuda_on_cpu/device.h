// Stands in for the class of csrc/cuda/common.cuh: tensors on the CPU, and no stream.
class Device {
 public:
  explicit Device(const Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
  int multiprocessors() const { return 2; }
  void check(std::initializer_list<const Tensors*>) const {}
};
