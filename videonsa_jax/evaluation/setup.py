"""A run's config and checkpoint -> an evaluator."""

from flax import nnx, traverse_util
from jax.sharding import Mesh

from videonsa_jax.config.run import RunConfig
from videonsa_jax.data.tokenizer import Tokenizer
from videonsa_jax.errors import UserError
from videonsa_jax.evaluation import tasks
from videonsa_jax.evaluation.question import Question
from videonsa_jax.evaluation.runner import Evaluator
from videonsa_jax.training import checkpoint, state


def open_evaluator(cfg: RunConfig, folder: str, mesh: Mesh, *, blind: bool = False) -> Evaluator:
    """Loads the newest parameters of `folder` onto the mesh.

    Raises:
      UserError: there is no checkpoint or tokenizer, or the checkpoint is of another model.
    """
    step = checkpoint.newest_step(folder)
    graphdef, layouts = state.abstract_model(cfg, mesh)
    abstract = {layout.path: layout.abstract for layout in layouts}
    params = checkpoint.load_params(folder, traverse_util.unflatten_dict(abstract, sep="/"))
    try:
        tokenizer = Tokenizer.from_dir(cfg.data.tokenizer)
    except (OSError, ValueError) as error:
        raise UserError(f"config.data.tokenizer: {error}") from error
    return Evaluator(
        model=nnx.merge(graphdef, params),
        tokenizer=tokenizer,
        data=cfg.data,
        cfg=cfg.eval,
        checkpoint=f"{folder} step {step}",
        blind=blind,
    )


def load_questions(cfg: RunConfig, task: str, limit: int | None = None) -> list[Question]:
    """The first `limit` questions of what `config.eval.tasks` names for the task.

    Raises:
      UserError: there is no such task, or its file is not set or not readable.
    """
    tasks.task_of(task)
    paths = dict(cfg.eval.tasks)
    if task not in paths:
        raise UserError(
            f"config.eval.tasks.{task} is not set; write --config.eval.tasks.{task}=PATH of the "
            f"questions"
        )
    return tasks.load(task, paths[task])[:limit]
