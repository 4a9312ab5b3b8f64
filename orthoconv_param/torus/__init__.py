"""What is convolved and where: geometry, boundaries, kernels and their spectra on periodic grids."""
