"""A graph and text in, quantized weights out, chosen for the inputs that each layer sees."""
