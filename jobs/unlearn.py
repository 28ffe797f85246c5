"""Plan from attribution.json (or take inputs.plan) and train it: writes plan.json, metrics.jsonl and patch/.

python jobs/unlearn.py jobs/demo.toml
python jobs/unlearn.py jobs/demo.toml inputs.attribution=runs/demo/attribution.json output_dir=runs/other
"""

from seuf_ray.command import command

config = command(__doc__)

from seuf_ray.console import heading, progress_printer, show_needs, show_plan
from seuf_ray.job import prepare
from seuf_ray.outputs import TRAINED, claim
from seuf_ray.stages.plan import plan
from seuf_ray.stages.resources import foresee
from seuf_ray.stages.session import session
from seuf_ray.stages.unlearn import unlearn

job = prepare(config)
targets = plan(
    job, write=False
)  # a plan for another model, or none at all, is refused before anything is written
claim(config, *TRAINED)
targets.write(job.path("plan.json"))
show_plan(targets)
with session(config.cluster):
    show_needs(foresee(job, targets))
    heading(f"unlearn: {config.algorithm.name} with router anchor {config.anchor.name}")
    folder = unlearn(job, targets, progress_printer(config.training.steps))
heading(f"done: {folder}")
