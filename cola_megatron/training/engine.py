"""One optimiser step on DeepSpeed: ZeRO 0 to 3, accumulation, clipping, mixed precision."""

import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from cola_megatron.config import RunConfig
from cola_megatron.parallel import ProcessGroups, gather_state_dict, sum_partial_gradients
from cola_megatron.parallel.deepspeed_grid import DeepSpeedGrid
from cola_megatron.training.batches import micro_batches_per_step
from cola_megatron.training.optimizer import build_optimizer, learning_rate, set_learning_rates


class Engine:
    """Trains a model that maps a batch to `{"loss": ..., term: ...}`.

    The model must hold its starting weights, in float32 and on the device, when the engine takes it over.
    """

    def __init__(self, model: nn.Module, config: RunConfig, groups: ProcessGroups):
        import deepspeed  # slow to import, and only training needs it

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self.config, self.groups = config, groups
        self.accumulation = micro_batches_per_step(config, groups.data_parallel_size)
        sum_partial_gradients(model, groups)
        self.deepspeed, *_ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(model, config),
            config=deepspeed_config(config, groups, self.accumulation),
            mpu=DeepSpeedGrid,
            dist_init_required=False,
        )

    @property
    def model(self) -> nn.Module:
        """The model, with its parameters in compute precision."""
        return self.deepspeed.module

    def step(self, batches: Iterator[dict[str, torch.Tensor]], step: int) -> dict[str, float]:
        """Accumulates over the micro-batches of optimiser step `step` (from 0) and updates the parameters.

        Returns:
            the loss and its terms, averaged over the global batch, `gradient_norm` (before clipping) and
            `learning_rate`.
        """
        training = self.config.training
        train_vae = self.config.stage == 1 or training.vae_update.trains_at(step)
        rate = learning_rate(training, step)
        set_learning_rates(self.deepspeed.optimizer.param_groups, rate, train_vae)
        sums: dict[str, torch.Tensor] = {}
        for _ in range(self.accumulation):
            terms = self.deepspeed(next(batches), train_vae=train_vae)
            self.deepspeed.backward(terms["loss"])
            if self.deepspeed.is_gradient_accumulation_boundary():
                if not train_vae:
                    self._clear_stale_vae_gradients()
                gradient_norm = self._clip_without_zero()
            self.deepspeed.step()
            for name, term in terms.items():
                sums[name] = sums.get(name, 0.0) + term.detach().float()
        means = self.groups.mean_over_data_parallel(torch.stack(list(sums.values())) / self.accumulation)
        metrics = dict(zip(sums, means.tolist(), strict=True))
        metrics["gradient_norm"] = float(self.deepspeed.get_global_grad_norm() or gradient_norm)
        metrics["learning_rate"] = rate
        return metrics

    def _clip_without_zero(self) -> float:
        """Clips where there is no ZeRO and returns the norm before: DeepSpeed's own clipping does not keep it."""
        if self.config.parallel.zero_stage > 0:
            return 0.0
        from deepspeed.runtime.utils import clip_grad_norm_

        return float(clip_grad_norm_(self.model.parameters(), self.config.training.optimizer.clip, mpu=DeepSpeedGrid))

    def _clear_stale_vae_gradients(self) -> None:
        """ZeRO 3 keeps the last gradient of a parameter that got none; it would count in the norm and the moments."""
        if self.config.parallel.zero_stage < 3:
            return
        from deepspeed.utils import safe_set_local_grad

        for parameter in self.model.vae.parameters():
            if parameter.requires_grad:
                safe_set_local_grad(parameter, torch.zeros_like(parameter.ds_tensor, dtype=torch.float32))

    def save(self, folder: Path, tag: str) -> None:
        """Writes parameters and optimiser state, every rank its part."""
        self.deepspeed.save_checkpoint(str(folder), tag=tag, save_latest=False)

    def load(self, folder: Path, tag: str) -> None:
        """Reads what `save` wrote under the same layout."""
        self.deepspeed.load_checkpoint(str(folder), tag=tag)

    def whole_weights(self) -> dict[str, torch.Tensor]:
        """Whole float32 tensors of all parameters but the reference encoder's, on the main process (a collective).

        A frozen network has no master copy: under bf16 it comes out in the precision in which it is used.
        """
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param

        def master_copy(parameter: nn.Parameter) -> torch.Tensor:
            if parameter.requires_grad and self.config.parallel.zero_stage > 0:
                return safe_get_full_fp32_param(parameter)
            with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                return parameter.detach().clone()

        networks = {name: child for name, child in self.model.named_children() if name != "reference"}
        return gather_state_dict(nn.ModuleDict(networks), self.groups, master_copy, keep=self.groups.is_main)


def deepspeed_config(config: RunConfig, groups: ProcessGroups, accumulation: int) -> dict:
    """DeepSpeed's own config, written from ours; nothing in it is left to DeepSpeed's defaults that matters."""
    training, parallel = config.training, config.parallel
    return {
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": training.global_batch_size,
        "gradient_clipping": training.optimizer.clip if parallel.zero_stage > 0 else 0.0,  # see _clip_without_zero
        "bf16": {"enabled": training.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},  # bfloat16 sums would lose the small micro-batches
        "zero_optimization": {
            "stage": parallel.zero_stage,
            "reduce_bucket_size": parallel.reduce_bucket_size,
            "overlap_comm": parallel.overlap_communication and groups.device.type == "cuda",
            "contiguous_gradients": True,
        },
        "zero_allow_untested_optimizer": True,  # torch's AdamW: compiles nothing, and fused on CUDA
        "steps_per_print": 2**62,
    }
