"""What a recipe is refused for before anything is read or computed: the cheap failures first.

Nothing here loads torch before the files of the data sets are there.
"""

from __future__ import annotations

from tunesmith import launch, libraries, parallel
from tunesmith.compose import check_together
from tunesmith.errors import RecipeError, TunesmithError
from tunesmith.recipe import Launch, Ray, Recipe
from tunesmith.training.fit import quiet_libraries, require_tracker


def check(recipe: Recipe, *, weights: bool = True) -> None:
    """Refuse a recipe that cannot be trained, as far as that shows without reading rows; whatever loads the model asks
    for its `weights` too. Raises TunesmithError."""
    check_together(recipe)  # composed ones were; this one may be somebody's own
    from tunesmith import engines

    check_settings(recipe)
    engines.check_shards(recipe.evaluation)
    quiet_libraries()
    from tunesmith.data import sources

    for source in (recipe.data, *recipe.data.mix):  # before what loads torch
        sources.local(source.dataset)
    libraries.load_libraries()
    from tunesmith import evaluation, models
    from tunesmith.methods import METHODS

    method = METHODS[recipe.method.kind]
    models.check_kind(
        recipe.model.base,
        method.model,
        method=method.kind,
        head=method.head,
        revision=recipe.model.revision,
    )
    if weights:
        models.check_weights(recipe.model.base, revision=recipe.model.revision)
    method.check(recipe)
    check_processes(recipe)
    evaluation.check_scoring(recipe.evaluation.metrics or [], gives_scores=method.head is not None)
    models.check_fit(
        recipe.model.base,
        recipe.adapter,
        revision=recipe.model.revision,
        max_length=recipe.data.max_length,
        head=method.head,
    )


def check_is_here(section: Launch, otherwise: str) -> None:
    """Raises RecipeError for what a cluster trains; `otherwise` says what is to be done to train it here."""
    if launch.is_job(section):
        raise RecipeError(
            f"launch.kind {section.kind} is run by a cluster, and this is not one of its nodes.",
            fix=f"`tunesmith train RECIPE --launch {section.kind}` writes what is to be submitted, with --resume "
            f"latest for a run that is there; {otherwise}",
        )


def check_processes(recipe: Recipe) -> None:
    """Raises RecipeError for what the number of processes does not go with, which may be another one in each life of a
    run."""
    from tunesmith.methods import METHODS

    method = METHODS[recipe.method.kind]
    if (number := launch.processes(recipe.launch)) > 1:
        launch.check(recipe.training, number)
        if why := method.alone(recipe.method):
            raise RecipeError(
                f"The method '{method.kind}' is trained in one process here, and {number} are asked for.",
                found=why,
                fix="Leave --launch out, or start it without a launcher.",
            )
    parallel.check(recipe, number)
    if isinstance(recipe.launch, Ray) and recipe.evaluation.engine == "ray" and not recipe.evaluation.skip:
        raise RecipeError(
            "evaluation.engine ray does not go with launch.kind ray.",
            found="workers that train keep what they have until the run ends, and those that answer would wait for it",
            fix="Leave evaluation.engine out; or set evaluation.skip, and measure the run when it is done: tunesmith "
            "evaluate RUN --set evaluation.engine=ray.",
        )


def check_settings(recipe: Recipe) -> None:
    """Raises TunesmithError for metrics, trackers and a repository that cannot be what the recipe says they are."""
    from tunesmith.dataflow import check_rewarded
    from tunesmith.evaluation import check_runnable

    section = recipe.evaluation
    asked = [*(section.metrics or []), *recipe.training.measured]
    check_runnable(asked, run_code=section.run_code, attempts=section.attempts)
    check_rewarded(recipe, asked)
    for tracker in recipe.tracking.trackers:
        require_tracker(tracker)
    if recipe.export.push_to_hub and not recipe.export.hub_model_id:
        raise TunesmithError(
            "Where to upload is missing.", fix="Give --hub-model-id owner/name with --push-to-hub."
        )
    if recipe.export.push_to_hub and recipe.export.hub_model_id:
        from tunesmith.export.publish import check_repository

        check_repository(recipe.export.hub_model_id)
