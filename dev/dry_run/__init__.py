"""A dry run on fake CUDA tensors: what a GPU would launch, counted without one."""
