"""placeholder"""

from pipelines.pipeline_run import PipelineRun


def render(run: PipelineRun) -> str:
    return ""


def stage_table(run: PipelineRun) -> str:
    return ""
