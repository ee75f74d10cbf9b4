"""Python's side of the CUDA kernels: arguments checked, scratch memory kept, launches made. Needs PyTorch and a GPU."""
