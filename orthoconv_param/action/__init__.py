"""The exponential of a skew convolution, applied to images without a kernel."""
