from seuf_ray.paper.cells import Cell, Result
def show_cell(cell: Cell, result: Result, done: int, total: int) -> None:
    """One line for a cell that is done."""
    row = result["row"]
    figures = (f"forget {row['forget']:.3f}  utility {row['utility']:.3f}  perplexity {row['perplexity']:.4g}  overlap {row['overlap']:.3f} kl {row['kl']:.3f}" if "forget" in row else "") + f"  at level {row['utility_at_level']}"
    print(f"  {done}/{total}  {cell.label}: {figures}  ({result['seconds']:.0f} s)", flush=True)
    if 'robustness' in result: print('   ', result['robustness'], flush=True)
def publish(settings, results): return ""
