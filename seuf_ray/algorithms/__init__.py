"""Unlearning losses, one file each; the file name is `algorithm.name`.

`loss(self, forget, ...)` is a pure function of `Forward`s. Its parameter names say which passes run: `forget`,
`retain`, `idk` (each forget row with another answer), and `forget_ref`, `retain_ref`, `idk_ref` for the original model;
`targets` and `seed` are the run's. It returns named terms: their sum is optimised, their names are the metrics.
"""
