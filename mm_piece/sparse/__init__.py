"""Sparse training: gradients and values of a mask's entries, and nothing else.

tuning               `sparse_tuning`: any loop, any optimizer
patches              one weight with its selected entries
gradients            a linear layer's gradient at selected entries
triton_kernels       the same on a GPU
change_measurement   what a task changed in each group of weights
change_report        that, as a delta holds it
"""
