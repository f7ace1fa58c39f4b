"""`python -m jaxrl_kernels.bench`: every kernel beside whatever else does the same work."""
