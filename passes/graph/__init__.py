"""Find things in a graph, and build nodes: names, decoder blocks, attention, quantized operators. Changes no weight."""
