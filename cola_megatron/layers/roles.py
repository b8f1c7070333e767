"""What a parameter is to its network, and what follows for its start and its learning rate at every width and depth.

With m = width / base width and l = depth / base depth (l = 1 but in CompleteP), relative to the base sizes:

    role                which parameters                               start            rate       epsilon
    embedding           from a fixed size to the width                 1                1          1 / m
    hidden              from the width to the width                    1 / sqrt(m)      1 / m      1 / m
    readout             from the width to a fixed size                 1 / m            1 / m      1
    in_branch           hidden, in a branch of the residual stream     1 / sqrt(m)      1 / m      1 / (m l)
    ends_branch         hidden, the last factor of a branch            1 / (sqrt(m) l)  1 / (m l)  1 / m
    vector              gains and biases beside the blocks             1                1          1 / m
    vector_in_branch    in a branch                                    1                1          1 / (m l)
    vector_ends_branch  the last gain or bias of a branch              1 / l            1 / l      1 / m
    vector_on_stream    of a norm that the stream itself goes through  1                1 / l      1 / m
    vector_of_readout   the bias of a readout                          1                1          1
    FIXED               what does not see the width                    1                1          1

Where Muon updates the matrices of hidden, in_branch and ends_branch, their rates are 1 / sqrt(m), and 1 / (sqrt(m) l)
of ends_branch: its update has the root mean square of AdamW's, but all its singular values alike, so that its spectral
norm grows as sqrt(m) and not as m; and it does not see the scale of a gradient, so that a factor c in W' = c W asks for
c times the rate, as under AdamW.

The rules are those of muP (arXiv 2203.03466, for Adam) and CompleteP (arXiv 2505.01618, alpha = 1), with every
multiplier of the forward pass folded into start, rate and epsilon: of W' = c W AdamW makes the same steps as of W when
start and rate are multiplied by c and decay and epsilon divided by it. So a multiplier 1 / l of a branch is in the last
matrix of the branch, 1 / m of the logits in the head, and the forward pass knows nothing of it.
"""

from dataclasses import replace

from cola_megatron.config.parametrization import ParametrizationConfig
from cola_megatron.parallel.parameters import Role

FIXED = Role("fixed")


def of_time(role: Role) -> Role:
    """The role of a matrix whose input is the flow time: AdamW updates it in any case.

    A batch has a few distinct times, so its gradient has a few directions, and Muon would bring the noise in all the
    others to their size.
    """
    return replace(role, muon_rate=None)


class Roles:
    """The roles of one network.

    Args:
        width: hidden size.
        depth: blocks that the residual stream goes through.
    """

    def __init__(self, config: ParametrizationConfig, width: int, depth: int):
        self.width_ratio = self.depth_ratio = 1.0
        if config.kind != "standard":
            assert config.base_width is not None, "checked by the config"
            self.width_ratio = width / config.base_width
        if config.has_depth:
            assert config.base_depth is not None, "checked by the config"
            self.depth_ratio = depth / config.base_depth
        m, l = self.width_ratio, self.depth_ratio  # noqa: E741
        self.vector = Role("vector", eps=1 / m)
        self.vector_in_branch = Role("vector_in_branch", eps=1 / (m * l))
        self.vector_ends_branch = Role("vector_ends_branch", start=1 / l, rate=1 / l, eps=1 / m)
        self.vector_on_stream = Role("vector_on_stream", rate=1 / l, eps=1 / m)
        self.embedding = Role("embedding", eps=1 / m, bias=self.vector)
        self.hidden = Role("hidden", start=m**-0.5, rate=1 / m, eps=1 / m, muon_rate=m**-0.5, bias=self.vector)
        self.readout = Role("readout", start=1 / m, rate=1 / m, bias=Role("vector_of_readout"))
        self.in_branch = Role(
            "in_branch", start=m**-0.5, rate=1 / m, eps=1 / (m * l), muon_rate=m**-0.5, bias=self.vector_in_branch
        )
        self.ends_branch = Role(
            "ends_branch",
            start=m**-0.5 / l,
            rate=1 / (m * l),
            eps=1 / m,
            muon_rate=m**-0.5 / l,
            bias=self.vector_ends_branch,
        )

    def last_of_branch(self, ends_branch: bool) -> Role:
        """Of the last matrix of a branch: `ends_branch`, or `in_branch` where a norm or a gate behind it does."""
        return self.ends_branch if ends_branch else self.in_branch
