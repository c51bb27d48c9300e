"""The Gluon kernel: what it refuses, what compilers make of it, and on a Hopper GPU what it computes."""
