"""Split kernels: products of coins and pair exponentials, composed, between walls, and read back."""
