"""A budget in, bits and block size of every weight out: sensitivities measured, the choice an integer program."""
