"""The toys: each paper's own commands on synthetic pedestrians, from nothing to numbers and pictures."""
