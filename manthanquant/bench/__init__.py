"""`manthanquant bench`: the GPU kernels beside those of others, on the card at hand. One suite a module."""
