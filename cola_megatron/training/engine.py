"""One optimiser step on DeepSpeed: ZeRO 0 to 3, accumulation, clipping, mixed precision."""

import math
from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch import nn

from cola_megatron.checkpoint.pieces import frozen_weights
from cola_megatron.config import RunConfig
from cola_megatron.families import family_of
from cola_megatron.layers.attention import allow_cudnn_in_training
from cola_megatron.layers.linear import ColumnLinear, RowLinear
from cola_megatron.models.compiled_blocks import compile_blocks, compiles, start_compilers
from cola_megatron.models.pipelined import PipelinedModel
from cola_megatron.models.steps import Stage
from cola_megatron.parallel import ProcessGroups, sum_partial_gradients
from cola_megatron.parallel.deepspeed_grid import DeepSpeedGrid
from cola_megatron.parallel.deepspeed_output import quiet_deepspeed
from cola_megatron.parallel.pipeline import Neighbours, SeedGradients, Tensors, one_forward_one_backward
from cola_megatron.parallel.weight_average import WeightAverage
from cola_megatron.parallel.weight_gradients import fuses_weight_gradients
from cola_megatron.parallel.zero_optimizer import ZeroOptimizer
from cola_megatron.training.batches import micro_batches_per_step
from cola_megatron.training.optimizer import build_optimizer, learning_rate, set_learning_rates
from cola_megatron.training.stop_signals import STOP_SIGNALS


class Engine:
    """Trains a model that maps a batch to `{"loss": ..., term: ...}`.

    The model must hold its starting weights, in float32 and on the device, when the engine takes it over.
    """

    def __init__(self, model: PipelinedModel, config: RunConfig, groups: ProcessGroups):
        self.config, self.groups = config, groups
        self.accumulation = micro_batches_per_step(config, groups.data_parallel_size)
        sum_partial_gradients(model, groups)
        self.frozen = frozen_weights(model, groups)
        allow_cudnn_in_training(config.attention_lengths)
        compiled = compiles(config, groups.device)
        if compiled or groups.device.type == "cuda":  # where a chunked cross-entropy is compiled in any case
            start_compilers(STOP_SIGNALS)
        if compiled:
            compile_blocks(model)
        self._neighbours_of: dict[Stage, Neighbours] = {}
        self.skipped_updates = 0
        """Steps so far whose update was refused: AdamW has counted so many fewer."""
        optimizer = build_optimizer(model, config, groups)
        with quiet_deepspeed() as deepspeed:
            self.deepspeed, *_ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                config=deepspeed_config(config, groups, self.accumulation),
                mpu=DeepSpeedGrid,
                dist_init_required=False,
            )
        self.optimizer = ZeroOptimizer(
            self.deepspeed,
            config.parallel.zero_stage,
            config.parallel.offload_optimizer,
            groups,
            model.trained_networks(),
        )
        if fuses_weight_gradients(config, groups.device):
            linears = [each for each in model.modules() if isinstance(each, ColumnLinear | RowLinear)]
            # A stage of a pipeline has None in the place of parameters that are another's.
            trained = [each for each in linears if isinstance(each.weight, nn.Parameter) and each.weight.requires_grad]
            sums = self.optimizer.sums_of_gradients([each.weight for each in trained])
            for linear, total in zip(trained, sums, strict=True):
                linear.add_weight_gradients_to(total)
        decay = config.training.ema_decay
        self.ema = None if decay is None else WeightAverage(self.optimizer.flat_masters, decay)

    @property
    def model(self) -> PipelinedModel:
        """The model, with its parameters in compute precision."""
        return self.deepspeed.module

    def step(
        self,
        batches: Iterator[dict[str, torch.Tensor]],
        step: int,
        accepts: Callable[[dict[str, float]], bool] | None = None,
    ) -> dict[str, float]:
        """Accumulates over the micro-batches of optimiser step `step` (from 0) and updates the parameters.

        Args:
            accepts: asked before the update, with what is returned; alike on every rank. Where it says no, or in bf16 a
                gradient is not a number, weights, moments and the count of AdamW stay as they are.

        Returns:
            the loss and its terms, averaged over the global batch, `gradient_norm` (before clipping), of which
            `gradient_norm_NETWORK` are the parts, and `learning_rate`; alike on every rank.
        """
        training = self.config.training
        mode = family_of(self.config).mode_at(self.config, step)
        idle = self.model.idle_networks(**mode)
        rate = learning_rate(training, step)
        set_learning_rates(self.deepspeed.optimizer.param_groups, rate, idle)
        names = ["loss", *self.model.term_names(**mode)]
        stage = self.model.stage(**mode)
        sums = torch.zeros(len(names), dtype=torch.float64, device=self.groups.device)
        losses: deque[torch.Tensor] = deque()

        def forward(taken: Tensors) -> Tensors:
            outputs = self.deepspeed(next(batches), taken, **mode)
            losses.append(outputs["loss"])
            for index, name in enumerate(names):
                if name in outputs:
                    sums[index] += outputs[name].detach()
            return {name: outputs[name] for name in stage.hands_on}

        def backward(taken: Tensors, handed_on: Tensors, gradients: Tensors) -> Tensors:
            outputs = [handed_on[name] for name in gradients]
            # DeepSpeed takes the mean over all that hold the same weights; context-parallel ranks count summands.
            loss = losses.popleft() * self.groups.context_parallel_size
            self.deepspeed.backward(self._scalar(loss, outputs, list(gradients.values())))
            if not self.deepspeed.is_gradient_accumulation_boundary():
                self.deepspeed.step()  # counts the micro-batch; the update waits until every stage has its gradients
            return {
                name: torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
                for name, tensor in taken.items()
                if tensor.requires_grad
            }

        one_forward_one_backward(self._neighbours(stage), self.accumulation, forward, backward)
        for network, module in idle.items():
            # A network that is left out has gradient 0, in the norm and in the moments, in every layout.
            self.optimizer.clear_gradients(module.parameters(), network=network)
        means = self.groups.sum_over_stages_and_replicas(sums) / (self.accumulation * self.groups.data_parallel_size)
        metrics = dict(zip(names, means.tolist(), strict=True))

        def accepts_norm(norm: float) -> bool:
            metrics["gradient_norm"] = norm
            return accepts is None or accepts({**metrics, "learning_rate": rate})

        self.optimizer.ask_before_update(accepts_norm if accepts is not None else None)
        skipped = self.skipped_updates
        if self.config.parallel.zero_stage == 0:
            metrics["gradient_norm"] = self._update_without_zero()
        else:
            self.deepspeed.step()
            if self.optimizer.overflowed:
                self.skipped_updates += 1
                metrics.setdefault("gradient_norm", math.inf)
            else:
                metrics["gradient_norm"] = float(self.deepspeed.get_global_grad_norm())
        if self.ema is not None and self.skipped_updates == skipped:
            self.ema.update()
        metrics |= {f"gradient_norm_{name}": norm for name, norm in self.optimizer.network_norms().items()}
        metrics["learning_rate"] = rate
        return metrics

    def close(self) -> None:
        """Removes DeepSpeed's hooks and what it holds globally: only then does the memory go with the last reference.

        There is no step after it.
        """
        self.deepspeed.destroy()
        self.optimizer.let_go()

    def _update_without_zero(self) -> float:
        """Clips and updates where there is no ZeRO; returns the norm before."""
        norm = self._clip_without_zero()
        if not self.optimizer.refuses(norm):
            self.deepspeed.step()
            return norm
        self.skipped_updates += 1
        adam = vars(self.optimizer.adam)
        adam["step"] = lambda *arguments, **options: None  # DeepSpeed still counts the step and clears the gradients
        try:
            self.deepspeed.step()
        finally:
            del adam["step"]
        return norm

    def _neighbours(self, stage: Stage) -> Neighbours:
        """One for each form of a pass: what crosses keeps its shapes from step to step."""
        if stage not in self._neighbours_of:
            self._neighbours_of[stage] = Neighbours(self.groups, stage.takes, stage.hands_on)
        return self._neighbours_of[stage]

    def _scalar(self, loss: torch.Tensor, outputs: list[torch.Tensor], gradients: list[torch.Tensor]) -> torch.Tensor:
        """What DeepSpeed runs backward from: this stage's loss, and the gradients that came from the stage behind."""
        if not loss.requires_grad and not outputs:
            # A stage without work in this pass still takes part in the update.
            first = next(parameter for parameter in self.model.parameters() if parameter.requires_grad)
            return 0.0 * first.sum()
        return SeedGradients.apply(loss, gradients, *outputs)

    def _clip_without_zero(self) -> float:
        """Clips and returns the norm before; DeepSpeed's own counts one stage only."""
        self.optimizer.measure_networks()
        norm = math.hypot(*self.optimizer.network_norms().values())
        scale = self.config.training.optimizer.max_gradient_norm / (norm + 1e-6)  # as ZeRO does it
        if scale < 1:
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(scale)
        return norm


def deepspeed_config(config: RunConfig, groups: ProcessGroups, accumulation: int) -> dict:
    """DeepSpeed's own config, written from ours; nothing in it is left to DeepSpeed's defaults that matters."""
    training, parallel = config.training, config.parallel
    # DeepSpeed would round the sums of a single rank too.
    rounds = training.precision == "bf16" and groups.same_weights_size > 1
    on_cuda, offload = groups.device.type == "cuda", {}
    if parallel.offload_optimizer:
        offload = {"offload_optimizer": {"device": "cpu", "pin_memory": on_cuda}}
    return {
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        # By its count every rank of a context has samples of its own.
        "train_batch_size": training.global_batch_size * groups.context_parallel_size,
        "gradient_clipping": training.optimizer.max_gradient_norm
        if parallel.zero_stage > 0
        else 0.0,  # see _clip_without_zero
        # A gradient that is not a number skips the update and shows as an infinite norm, which ends the run.
        "bf16": {"enabled": training.precision == "bf16", "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},  # bfloat16 sums would lose the small micro-batches
        "communication_data_type": parallel.gradient_reduction if rounds else "fp32",
        "zero_optimization": {
            "stage": parallel.zero_stage,
            "reduce_bucket_size": parallel.reduce_bucket_size,
            "allgather_bucket_size": parallel.allgather_bucket_size,
            "stage3_prefetch_bucket_size": parallel.prefetch_bucket_size,
            "overlap_comm": parallel.overlap_communication and on_cuda,
            "contiguous_gradients": True,
            **offload,
        },
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW needs no compiler on the host either
        "zero_allow_untested_optimizer": True,  # torch's AdamW: compiles nothing, and fused on CUDA
        "steps_per_print": 2**62,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device twice in every micro-batch
    }
