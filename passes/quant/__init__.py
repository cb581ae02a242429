"""Codes, scales, packing and Hessians: lazy float weights in, packed blocks out; what passes and methods share."""
