"""Do a run that has work to do: write its record, let the workers run, and write the result."""

import logging

from pipelines.outcome import StageResult
from pipelines.training import recording
from pipelines.training.protocol import OpenedRun, PlannedRun, Run, RunConfig
from pipelines.training.run_folder import RunFolder, RunRecord, Taken

logger = logging.getLogger(__name__)


def start(
    run: Run,
    opened: OpenedRun,
    folder: RunFolder,
    *,
    record: RunRecord | None,
    earlier: StageResult | None,
    fresh: bool,
) -> StageResult:
    """Plan a run, take it over, do it and finish it. If the work needs Ray, it runs already.

    Args:
        run: the stage's part.
        opened: the run with its data open.
        folder: of the run.
        record: what an earlier start wrote down.
        earlier: the result of an earlier start, in which something is missing.
        fresh: delete what is there.
    """
    config, identity = run.config, opened.identity
    planned = opened.plan()
    taken = recording.take_over(
        config,
        folder,
        digest=identity.digest,
        inputs=identity.inputs,
        earlier=record,
        fresh=fresh,
        tags=dict(identity.tags),
        data=identity.data,
    )
    return _work(config, planned, taken, earlier)


def _work(
    config: RunConfig, planned: PlannedRun, taken: Taken, earlier: StageResult | None
) -> StageResult:
    """Let the workers run, and finish."""
    work, folder, uri = planned.work(taken), taken.folder, config.tracking.uri
    failure: Exception | None = None
    with recording.ended_in_mlflow(
        uri, taken.run_id, folder, what_is_saved=work.what_is_saved
    ) as stopper:
        folder.forget_failure()
        try:
            recording.run_until_stopped(stopper, work.run, work.channel, config.checkpoint)
        except Exception as error:
            folder.check_start()
            if not planned.is_kept(taken):
                raise
            failure = error
        result = planned.finish(taken, earlier, failure)
        recording.say_where_to_compare(uri, taken.run_id)
    if failure is not None:
        logger.error(
            "the training is complete and stored in %s, but its evaluation failed; the same "
            "command repeats only the evaluation",
            result.output,
        )
        folder.record_failure(failure)
        folder.raise_failure()
        raise failure
    return result
