"""The paper's tables for the embedded model: every method x algorithm x seed, as Markdown, JSON and a picture.

python jobs/paper_tables.py jobs/paper_tables.toml
python jobs/paper_tables.py jobs/paper_tables.toml cluster.num_workers=16 record=benchmarks

Stopped at any time, the same command goes on with the cells that are missing.
"""

from seuf_ray.command import command_as
from seuf_ray.paper.settings import PaperSettings

settings = command_as(PaperSettings, __doc__)  # before torch and ray are imported

from seuf_ray.console import heading
from seuf_ray.paper.publish import publish, show_cell
from seuf_ray.stages.paper import prepare_matrix, run_matrix
from seuf_ray.stages.session import session

jobs = prepare_matrix(settings)  # reads and checks everything; nothing is written before this returns

with session(settings.cluster):
    heading("run: every cell of the matrix that is not done yet")
    results = run_matrix(settings, jobs, show_cell)

heading("write: tables, rows and the picture")
print(publish(settings, results))
heading(f"done: {settings.output_dir / 'paper_tables.md'}")
