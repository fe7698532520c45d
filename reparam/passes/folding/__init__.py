"""Folding: regions of linear operators found on a graph, folded, and put back into the network."""
