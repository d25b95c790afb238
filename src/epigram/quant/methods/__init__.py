"""Ways to round a matrix to its grid: one file each, chosen by name (`quant.method = "gptq"`).

A method offers `NEEDS_HESSIANS` and `quantize(weights (n, rows, cols) float32, hessians (n, cols, cols) |
None, grid, config) -> Outcome`, on whatever device the tensors live. `config` is the field of `QuantConfig`
with the method's own name, or None. Matrices of a batch never influence each other.
"""
