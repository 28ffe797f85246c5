"""The paper's tables for the embedded model: a matrix of small runs, their rows, and what is written of them."""
