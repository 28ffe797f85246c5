"""Attribute, plan, unlearn, evaluate, compare, report: the whole of SEUF on one page.

python jobs/pipeline.py jobs/demo.toml
python jobs/pipeline.py jobs/demo.toml data.forget=embedded:geography output_dir=runs/geography
"""

from seuf_ray.command import command

config = command(__doc__)  # before torch and ray are imported: --help and mistakes cost nothing

from seuf_ray.artifacts import AttributionReport
from seuf_ray.console import (
    heading,
    progress_printer,
    show_attribution,
    show_evaluation,
    show_needs,
    show_plan,
)
from seuf_ray.errors import ConfigError
from seuf_ray.job import prepare
from seuf_ray.outputs import ATTRIBUTION, EVERYTHING, claim, read_metrics
from seuf_ray.report import console_table, write_report
from seuf_ray.stages.attribute import attribute
from seuf_ray.stages.compare import compare
from seuf_ray.stages.evaluate import evaluate
from seuf_ray.stages.plan import plan
from seuf_ray.stages.resources import foresee
from seuf_ray.stages.session import session
from seuf_ray.stages.unlearn import unlearn

if config.inputs.patch is not None:
    raise ConfigError(
        "inputs.patch: the pipeline trains a patch of its own; python jobs/evaluate.py evaluates another run's"
    )
job = prepare(config)  # reads and checks everything; nothing is written before this returns
claim(config, *EVERYTHING)

with session(config.cluster):
    if config.inputs.attribution is None:
        heading("attribute: which experts does the forget set use?")
        report = attribute(job)
    else:
        report = job.read(AttributionReport, ATTRIBUTION, config.inputs.attribution)
    show_attribution(report)

    heading("plan: the top-M of them, and their routers")
    targets = plan(job, report)
    show_plan(targets)
    show_needs(foresee(job, targets))

    heading(f"unlearn: {config.algorithm.name} with router anchor {config.anchor.name}")
    patch = unlearn(job, targets, progress_printer(config.training.steps))

    heading("evaluate: the original, then the patch")
    before = evaluate(job)
    show_evaluation(before)
    after = evaluate(job, patch)
    show_evaluation(after)

    comparison = compare(job, report, before) if config.compare else None

if comparison is not None:
    print("\n" + console_table(comparison))
page = write_report(
    job.path("report.html"),
    report,
    targets,
    read_metrics(job),
    before,
    after,
    comparison,
    config.model_dump(mode="json"),
)
heading(f"done: {page}")
