"""Evaluate the original, and the patch of this run (or inputs.patch): writes evaluation_before/after.json.

python jobs/evaluate.py jobs/demo.toml
"""

from seuf_ray.command import command

config = command(__doc__)

from seuf_ray.console import heading, show_evaluation
from seuf_ray.job import prepare
from seuf_ray.outputs import AFTER, BEFORE, claim
from seuf_ray.stages.evaluate import evaluate
from seuf_ray.stages.session import session

job = prepare(config)
patch = config.inputs.patch or job.path("patch")
claim(config, BEFORE, AFTER)
with session(config.cluster):
    heading("evaluate: the original")
    show_evaluation(evaluate(job))
    if patch.exists():
        heading(f"evaluate: {patch}")
        show_evaluation(evaluate(job, patch))
heading(f"done: {config.output_dir}")
