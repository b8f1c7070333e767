"""Registers the lm-eval model `cola`: import this module, then `lm_eval.simple_evaluate(model="cola", ...)`.

`model_args` names the model's folder and, where they differ from the published ones, the generation settings:
`model_args="path=exports/my-model,guidance_scale=3"`.
"""

from pathlib import Path
from typing import Any

from lm_eval.api.registry import register_model

from cola_megatron.evaluation.lm_eval_adapter import BATCH_SIZE, EvaluationLM, read_batch_size
from cola_megatron.parallel import initialize_parallel
from launchers.eval_benchmarks import open_for_evaluation


@register_model("cola")
class ColaLM(EvaluationLM):
    """A folder's model as a model of lm-eval.

    Args:
        path: published folder, run folder or checkpoint folder.
        batch_size: prompts that are continued at once; "auto": 20.
        max_batch_size: lm-eval gives it to every model; not used.
        settings: of generation by its family, such as `guidance_scale`, and of its likelihood, such as
            `likelihood_samples`.
    """

    def __init__(
        self, path: str, batch_size: int | str = BATCH_SIZE, max_batch_size: int | None = None, **settings: Any
    ):
        size = read_batch_size(batch_size)
        model = open_for_evaluation(Path(path), **settings)
        super().__init__(model, initialize_parallel(), size)
