"""What a convolution module does, and the ways to evaluate it."""
