"""What this project needs of DeepSpeed's optimisers beyond their public interface: no other file reaches into them.

Written against DeepSpeed 0.19.8. The stages keep the float32 masters and the moments in different places, and none of
them can be asked whether an update should be applied; `ZeroOptimizer` gives all of them one form. What it reaches for
is listed in `PRIVATE_PARTS`; `tests/test_zero_optimizer.py` fails for a version that has moved one of them.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from cola_megatron.errors import UserError
from cola_megatron.parallel.gradient_sums import GradientSums
from cola_megatron.parallel.groups import ProcessGroups
from cola_megatron.parallel.matrix_exchange import HeldMatrix, MatrixExchange
from cola_megatron.parallel.muon import MuonAdamW
from cola_megatron.parallel.parameters import marks_of

WRITTEN_AGAINST = "0.19.8"

PRIVATE_PARTS = {
    "deepspeed.runtime.zero.stage_1_and_2": (
        "DeepSpeedZeroOptimizer",
        ("scaled_global_norm", "_wait_for_offload_copies"),
    ),
    "deepspeed.runtime.zero.stage3": ("DeepSpeedZeroOptimizer_Stage3", ("_get_norm_groups", "get_param_id")),
    "deepspeed.runtime.bf16_optimizer": ("BF16_Optimizer", ("get_grads_for_norm", "update_hp_grads")),
}
"""Module -> class and the methods of it that are called or replaced."""


class Fragment(NamedTuple):
    """A range of a flattened parameter, as a range of the tensor that AdamW updates in its place."""

    start: int
    """First element, in the flattened parameter."""
    flat: torch.Tensor
    flat_start: int
    length: int


class DeepSpeedChanged(UserError):
    """Another version of DeepSpeed, in which something that this file uses is elsewhere."""


class ZeroOptimizer:
    """The optimiser of a DeepSpeed engine under ZeRO `stage`; 0 is a plain AdamW.

    Args:
        networks: the trained networks by name; the same names on every rank, whatever it holds of them.

    Raises:
        DeepSpeedChanged: the installed version does not have what this file was written against.
    """

    def __init__(
        self,
        deepspeed_engine: Any,
        stage: int,
        offloaded: bool,
        groups: ProcessGroups,
        networks: Mapping[str, nn.Module],
    ):
        self.stage, self.offloaded, self.groups = stage, offloaded, groups
        self._optimizer = deepspeed_engine.optimizer
        self._networks = list(networks)
        self._network_of = {
            id(parameter): name for name, network in networks.items() for parameter in network.parameters()
        }
        self._squares_N: torch.Tensor | None = None
        self._norms_of_flat: list[torch.Tensor] = []
        self._sums: GradientSums | None = None
        self._added_elsewhere: set[int] = set()
        self._may_update: Callable[[float], bool] | None = None
        if stage > 0:
            self._ask_before_updates()
        if hasattr(self._optimizer, "update_hp_grads"):
            self._replace("update_hp_grads", self._add_gradients)
        if isinstance(self.adam, MuonAdamW) and stage == 0:
            self.adam.share_whole(groups)
        elif isinstance(self.adam, MuonAdamW):
            self.adam.share(self._matrices())

    @property
    def adam(self) -> torch.optim.AdamW:
        """The AdamW inside, whose state is keyed by `flat_masters`."""
        return self._optimizer if self.stage == 0 else self._optimizer.optimizer

    @property
    def flat_masters(self) -> list[torch.Tensor]:
        """The float32 tensors that AdamW knows as its parameters."""
        if self.stage == 3:  # which shows them to AdamW one by one, during a step
            return self._optimizer.fp32_partitioned_groups_flat
        return [flat for group in self.adam.param_groups for flat in group["params"]]

    def sums_of_gradients(self, parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
        """The float32 sums of trained parameters' gradients, to which the caller adds (ZeRO 1 in bfloat16 alone).

        What is left on the parameters is added too.
        """
        zero = self._optimizer
        groups = zip(zero.bf16_groups, zero.fp32_groups_gradients, strict=True)
        sums = {id(each): total for group, of_group in groups for each, total in zip(group, of_group, strict=True)}
        self._added_elsewhere |= {id(parameter) for parameter in parameters}
        # `.data` counts its changes by itself. All sums are views of a few flat tensors and would share one count, and
        # autograd would refuse one that a pass in flight has saved for a change of another.
        return [sums[id(parameter)].data.view(parameter.shape) for parameter in parameters]

    def moments(self, flat: torch.Tensor) -> tuple[str, ...]:
        """Names of the optimiser's state of one of `flat_masters`, each a tensor of its size."""
        return self.adam.moments(flat) if isinstance(self.adam, MuonAdamW) else ("exp_avg", "exp_avg_sq")

    @property
    def overflowed(self) -> bool:
        """Whether the last update was left out, because its gradient was not a number or it was refused."""
        return self.stage > 0 and self._optimizer.overflow

    def fragment(self, parameter: nn.Parameter, shared_out: bool) -> Fragment | None:
        """What of a trained parameter this rank updates; None: nothing.

        Args:
            shared_out: leaves out what another rank of `same_weights_group` holds as well.
        """
        zero, groups = self._optimizer, self.groups
        if self.stage == 0:
            rank, ranks = (groups.same_weights_rank, groups.same_weights_size) if shared_out else (0, 1)
            start, stop = (parameter.numel() * end // ranks for end in (rank, rank + 1))
            return Fragment(start, parameter, start, stop - start)
        if self.stage == 3:
            group, flat_start, part = zero.grad_position[zero.get_param_id(parameter)]
            start = groups.same_weights_rank * part
            count = max(0, min(part, deepspeeds(parameter).ds_numel - start))  # the parts are padded to one size
            return Fragment(start, zero.fp32_partitioned_groups_flat[group], flat_start, count)
        mapping = deepspeeds(parameter)._hp_mapping
        if mapping is None:
            return None
        here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
        (flat,) = zero.param_groups[mapping.param_group_index]["params"]
        return Fragment(here.start, flat, there.start, here.numel)

    def ask_before_update(self, may_update: Callable[[float], bool] | None) -> None:
        """`may_update` is asked with the gradient norm before each update until it is replaced; alike on every rank.

        Where it says no, weights, moments and the count of AdamW stay as they are. Without ZeRO nothing here is called
        before an update: the engine asks `refuses`.
        """
        self._may_update = may_update
        self._squares_N = None

    def refuses(self, norm: float) -> bool:
        """Whether an update with this gradient norm is not to be applied."""
        return self._may_update is not None and not self._may_update(norm)

    def measure_networks(self) -> None:
        """Measures the gradient of each network, for `network_norms`; ZeRO does it by itself before every update.

        One small reduction for all of them, and nothing waits for the device.
        """
        norms: dict[str, list[torch.Tensor]] = {name: [] for name in self._networks}
        for parameter, norm in self._norms_held_here():
            if marks_of(parameter).partition_dim is not None or self.groups.tensor_parallel_rank == 0:
                norms[self._network_of[id(parameter)]].append(norm)
        device = self.groups.device
        squares = [
            torch.stack([norm.to(device, torch.float64) for norm in of_network]).square().sum()
            if of_network
            else torch.zeros((), dtype=torch.float64, device=device)
            for of_network in norms.values()
        ]
        self._squares_N = torch.stack(squares)
        # Where a replica holds whole gradients all replicas hold the same.
        torch.distributed.all_reduce(self._squares_N, group=self.groups.replica_group if self._holds_whole else None)

    def network_norms(self) -> dict[str, float]:
        """Norm of each network's gradient before clipping, in the last update; alike on every rank.

        Infinite where DeepSpeed found a gradient that is not a number and left the update out without a norm.
        """
        if self._squares_N is None:
            return dict.fromkeys(self._networks, math.inf)
        return dict(zip(self._networks, self._squares_N.sqrt().tolist(), strict=True))

    @property
    def _holds_whole(self) -> bool:
        """Whether this replica holds whole gradients, and not its share of them: ZeRO 0, and ZeRO 1 in bfloat16."""
        return self.stage == 0 or hasattr(self._optimizer, "fp32_groups_gradients")

    @property
    def _counts_whole_groups(self) -> bool:
        """Whether the flat gradients of a group, which are of one network, count once each: a few norms for all."""
        return hasattr(self._optimizer, "fp32_groups_gradients_flat") and self.groups.tensor_parallel_size == 1

    def _norms_held_here(self) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
        """Of each parameter the norm of what this rank holds of its gradient, accumulated and reduced."""
        zero = self._optimizer
        if self.offloaded:  # DeepSpeed has them already, from before it copied the gradients to the host
            for group in zero.fp16_groups if self.stage == 3 else zero.params_in_partition:
                for parameter in group:
                    norm = zero.norm_for_param_grads.get(zero.get_param_id(parameter))
                    if norm is not None:  # none: it took no part in this step
                        yield parameter, norm
            return
        if self._counts_whole_groups:
            self._norms_of_flat = [torch.linalg.vector_norm(flat) for flat in zero.fp32_groups_gradients_flat]
            yield from zip((group[0] for group in zero.bf16_groups), self._norms_of_flat, strict=True)
            return
        for parameter, gradient in self._gradients_held_here():
            yield parameter, torch.linalg.vector_norm(gradient, dtype=torch.float32)

    def _gradients_held_here(self) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
        zero = self._optimizer
        if self.stage == 0:
            for group in self.adam.param_groups:
                yield from ((each, each.grad) for each in group["params"] if each.grad is not None)
        elif self._holds_whole:
            for group, gradients, have_one in zip(
                zero.bf16_groups, zero.fp32_groups_gradients, zero.fp32_groups_has_gradients, strict=True
            ):
                for parameter, gradient, has_one in zip(group, gradients, have_one, strict=True):
                    if has_one:
                        yield parameter, gradient
        else:
            for index, group in enumerate(zero.fp16_groups if self.stage == 3 else zero.params_in_partition):
                gradients = zero.averaged_gradients[index]
                if self.stage < 3:  # which fills its share up, in the middle with marked zeros
                    gradients = [each for each in gradients if not getattr(each, "_zero_padding", False)]
                yield from zip(group, gradients, strict=False)  # and at the end with zeros that are not marked

    def clear_gradients(self, parameters: Iterable[nn.Parameter], network: str) -> None:
        """Gradient 0 for parameters that took no part in a step: the trained ones of the group `network`.

        Without ZeRO AdamW would skip them; ZeRO 3, and ZeRO 1 and 2 on the host, would keep their last gradient.
        """
        if self.offloaded and self.stage < 3:
            self._optimizer._wait_for_offload_copies()
            for group, flat in zip(
                self._optimizer.param_groups, self._optimizer.single_partition_of_fp32_groups, strict=True
            ):
                if group["network"] == network:
                    flat.grad.zero_()
        if self.stage not in (0, 3):
            return
        from deepspeed.utils import safe_set_local_grad

        for parameter in parameters:
            if not parameter.requires_grad:
                continue
            if self.stage == 0:
                parameter.grad = torch.zeros_like(parameter)
            else:
                safe_set_local_grad(parameter, torch.zeros_like(deepspeeds(parameter).ds_tensor, dtype=torch.float32))

    def _matrices(self) -> dict[int, MatrixExchange]:
        """For Muon: of each flat tensor of its groups, by id, the matrices of which it holds ranges."""
        zero = self._optimizer
        names = {1: "bf16_groups" if self._holds_whole else "bit16_groups", 2: "bit16_groups", 3: "fp16_groups"}
        flats = zip(getattr(zero, names[self.stage]), self.flat_masters, strict=True)
        return {
            id(flat): MatrixExchange([self._held_matrix(each) for each in parameters], self.groups)
            for parameters, flat in flats
            if marks_of(parameters[0]).role.muon_rate is not None
        }

    def _held_matrix(self, parameter: nn.Parameter) -> HeldMatrix:
        fragment, marks = self.fragment(parameter, shared_out=False), marks_of(parameter)
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if fragment is None:
            return HeldMatrix(shape, marks.partition_dim, marks.fused_rows, 0, 0, 0)
        return HeldMatrix(
            shape, marks.partition_dim, marks.fused_rows, fragment.start, fragment.length, fragment.flat_start
        )

    def let_go(self) -> None:
        """Takes the model out of the list in which ZeRO 3 keeps, for ever, those whose forward pass it has seen."""
        if self.stage == 3:
            from deepspeed.runtime.zero import parameter_offload

            parameter_offload.FWD_MODULE_STACK.clear()

    def _ask_before_updates(self) -> None:
        """Has ZeRO leave out an update that is refused, as it does by itself where the norm is not a number.

        DeepSpeed writes a norm that is not a number as -1, and skips the update where it finds one.
        """
        zero = self._optimizer
        if hasattr(zero, "scaled_global_norm"):  # ZeRO 1 in float32, ZeRO 2
            self._replace("scaled_global_norm", self._refusing_norm)
        elif hasattr(zero, "_get_norm_groups"):  # ZeRO 3
            self._replace("_get_norm_groups", self._refusing_norms_of_groups)
        elif hasattr(zero, "get_grads_for_norm"):  # ZeRO 1 in bfloat16, whose norm is a function of what this returns
            self._replace("get_grads_for_norm", self._refusing_gradients)
        else:
            raise changed(f"{type(zero).__name__} computes its gradient norm elsewhere")

    def _add_gradients(self, original: Callable[..., None], clear_lp_grads: bool = False) -> None:
        """Adds the bfloat16 gradients of a micro-batch to the float32 sums, and lets them go.

        ZeRO 1 in bfloat16 copies each to float32 for that, and clears it for the next micro-batch to be added to it: 26
        bytes of memory traffic for a parameter, where 12 do the same.
        """
        zero = self._optimizer
        if self._sums is None:
            self._sums = GradientSums(list(itertools.chain(*zero.fp32_groups_gradients)))
        self._sums.add([parameter.grad for parameter in itertools.chain(*zero.bf16_groups)])
        for group, sums, has_sum in zip(
            zero.bf16_groups, zero.fp32_groups_gradients, zero.fp32_groups_has_gradients, strict=True
        ):
            for index, parameter in enumerate(group):
                if parameter.grad is not None or id(parameter) in self._added_elsewhere:
                    parameter._hp_grad, parameter.grad, has_sum[index] = sums[index], None, True

    def _replace(self, method: str, by: Callable[..., Any]) -> None:
        original = getattr(self._optimizer, method)
        setattr(self._optimizer, method, lambda *arguments, **options: by(original, *arguments, **options))

    def _refuses_deepspeeds(self, norm: torch.Tensor | float) -> bool:
        if self._may_update is None:
            return False  # without reading the norm, which would wait for the device
        return self.refuses(float(norm) if float(norm) >= 0 else math.inf)

    def _refusing_norm(self, original: Callable[..., torch.Tensor], *arguments: Any, **options: Any) -> torch.Tensor:
        self.measure_networks()
        norm = original(*arguments, **options)
        return torch.full_like(norm, -1.0) if self._refuses_deepspeeds(norm) else norm

    def _refusing_norms_of_groups(self, original: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
        from deepspeed.runtime.utils import combine_grad_norm_groups

        self.measure_networks()
        norms = original()
        refused = self._refuses_deepspeeds(combine_grad_norm_groups(norms))
        return [torch.full_like(norm, -1.0) for norm in norms] if refused else norms

    def _refusing_gradients(self, original: Callable[..., Any], for_clipping: bool = False) -> Any:
        from deepspeed.runtime.utils import get_global_norm_of_tensors

        zero = self._optimizer
        if for_clipping:
            return zero.fp32_groups_gradients_flat
        self.measure_networks()
        gradients, of_experts = original()
        if self._counts_whole_groups:
            gradients = self._norms_of_flat  # whose norm is that of the gradients
        if self._may_update is None:
            return gradients, of_experts
        norm = get_global_norm_of_tensors(gradients, mpu=zero.mpu, norm_type=zero.norm_type)
        refused = self._refuses_deepspeeds(norm)
        return ([torch.full((1,), math.nan, device=self.groups.device)] if refused else gradients), of_experts


def deepspeeds(parameter: nn.Parameter) -> Any:
    """The parameter with the attributes that DeepSpeed puts on it, of which no stub knows."""
    return parameter


def changed(what: str) -> DeepSpeedChanged:
    """The refusal of a version in which `what` holds."""
    from importlib.metadata import version

    return DeepSpeedChanged(
        f"deepspeed {version('deepspeed')}: {what}; cola_megatron is written against {WRITTEN_AGAINST}: "
        f"pip install deepspeed=={WRITTEN_AGAINST}"
    )
