"""From an attribution report to the plan of a job."""

from __future__ import annotations

from seuf_ray.artifacts import AttributionReport, UnlearningPlan
from seuf_ray.attribution.selection import plan_for
from seuf_ray.job import Job
from seuf_ray.outputs import ATTRIBUTION, PLAN
from seuf_ray.unlearning import reads_of


def plan(job: Job, report: AttributionReport | None = None, *, write: bool = True) -> UnlearningPlan:
    """The plan that `inputs.plan` names, or the targets of `report` (default: the job's attribution.json).

    Raises:
        ConfigError: no such artifact, or no such experts.
        MismatchError: an artifact made for another model.
    """
    config = job.config
    if config.inputs.plan is not None:
        found = job.read(UnlearningPlan, PLAN, config.inputs.plan)
    else:
        report = report or job.read(AttributionReport, ATTRIBUTION, config.inputs.attribution)
        found = plan_for(config, report, job.checkpoint)
    reads_of(
        [config.algorithm, config.anchor], job.targets(found)
    )  # what workers would refuse is refused here
    if write:
        found.write(job.path(PLAN))
    return found
